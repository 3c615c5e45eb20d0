"""The Prometheus metrics of a worker, collected from the counters of the engine."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tolhouse.engine.engine import Engine
from tolhouse.worker.table_watcher import TableWatcher

GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily


class EngineMetrics(Collector):
    def __init__(self, engine: Engine, watcher: TableWatcher | None) -> None:
        self.engine, self.watcher = engine, watcher

    def collect(self) -> Iterator[Metric]:
        engine, cache, counts = self.engine, self.engine.cache, self.engine.counts()
        used = 1 - cache.free_blocks / cache.num_blocks
        for kind, name, text, value in (
            (GAUGE, "running", "Running sequences", engine.running),
            (GAUGE, "waiting", "Waiting sequences", engine.waiting),
            (GAUGE, "kv_cache_usage_ratio", "Share of the KV cache in use", used),
            (COUNTER, "tokens", "Generated tokens", engine.tokens),
            (COUNTER, "steps", "Engine steps", engine.steps),
            (COUNTER, "step_seconds", "Time in engine steps", engine.step_seconds),
            (COUNTER, "forward_seconds", "Time in forward passes", engine.forward_seconds),
            (COUNTER, "preemptions", "Preempted sequences", engine.scheduler.preemptions),
            (COUNTER, "prompt_tokens", "Admitted prompt tokens", cache.prompt_tokens),
            (
                COUNTER,
                "prefix_hit_tokens",
                "Admitted prompt tokens found in the KV cache",
                cache.shared_tokens,
            ),
            (
                COUNTER,
                "row_bytes",
                "Bytes of rows received over the network",
                counts["remote_bytes"],
            ),
            (
                COUNTER,
                "rows_missing",
                "Rows that are missing or damaged in the row source",
                counts["missing"],
            ),
            (
                COUNTER,
                "row_wait_seconds",
                "Time that steps waited for rows",
                counts["wait_seconds"],
            ),
            (COUNTER, "row_fetches", "Fetches from the row source", counts["fetches"]),
            (
                COUNTER,
                "row_fetch_seconds",
                "Time of fetches from the row source",
                counts["fetch_seconds"],
            ),
        ):
            yield kind(f"tolhouse_worker_{name}", text, value)
        rows = CounterMetricFamily(
            "tolhouse_worker_rows",
            "Rows that steps used, by where they came from",
            labels=["source"],
        )
        for source in ("from_cache", "from_remote", "from_file", "recomputed"):
            rows.add_metric([source.removeprefix("from_")], counts[source])
        yield rows
        refused = self.watcher.refused if self.watcher else ""
        for name, text, table in (
            ("info", "1 for the table version that new sequences use", engine.table),
            ("refused", "1 for a published table version that this worker refused", refused),
        ):
            info = GaugeMetricFamily(f"tolhouse_worker_table_{name}", text, labels=["table"])
            if table:
                info.add_metric([table], 1)
            yield info
        for histogram in engine.histograms:
            yield from histogram.collect()
