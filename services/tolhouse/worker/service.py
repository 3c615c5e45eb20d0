"""The gRPC face of the worker. Protobuf types end here."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import torch
from prometheus_client import REGISTRY, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tolhouse import tracing
from tolhouse.client.row_source import open_row_source
from tolhouse.config import WorkerConfig
from tolhouse.engine.attention import PagedKVCache, blocks_of
from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.cpu.compiled import Compiled
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.cuda_graphs import GraphRunner
from tolhouse.engine.engine import Engine
from tolhouse.engine.recompute import Recompute
from tolhouse.engine.row_providers import NoRows, Rows, check_table, wait_for_table
from tolhouse.engine.runner import Runner
from tolhouse.engine.sampler import Logprobs
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.errors import InvalidArgument, Mismatch, TolhouseError
from tolhouse.logs import event
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.generate import check_prompt
from tolhouse.net.metrics import serve_metrics
from tolhouse.net.server import serve, stream
from tolhouse.sampling import SamplingParams
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import generation_pb2
from tolhouse.v1.generation_pb2_grpc import GenerationServicer, add_GenerationServicer_to_server
from tolhouse.worker.table_watcher import TableWatcher

NAME = "tolhouse.v1.Generation"
REQUESTS = Counter(
    "tolhouse_worker_requests_total", "Generate calls answered, by gRPC status", ["status"]
)
MAX_REQUEST_ID = 256  # characters: it stands in the log
_AS_COMPUTED = ("fp32", "fp16", "bf16")  # codecs that keep rows but for the rounding to 16 bits


class WorkerService(GenerationServicer):
    def __init__(self, engine: Engine, checkpoint: Checkpoint, name: str) -> None:
        self.engine, self.config = engine, checkpoint.config
        manifest = engine.rows.manifest
        self._of_checkpoint: dict[str, Any] = {
            "model": name,
            "model_id": checkpoint.model_id(),
            "tokenizer_id": checkpoint.tokenizer_id,
            "context_tokens": checkpoint.config.max_position_embeddings,
            "vocab_size": checkpoint.config.vocab_size,
            "row_layers": checkpoint.config.num_rows,
            "most_sequences": engine.scheduler.max_running + engine.max_waiting,
            "eos_token_id": checkpoint.config.eos_token_id,
            "weight_bytes": checkpoint.weight_bytes(
                dense=False, embedding=not (manifest and manifest.has_x0)
            ),
            "dense_weight_bytes": checkpoint.weight_bytes(dense=True),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What the worker is, and what the table that new sequences begin with is to its model."""
        if not (manifest := self.engine.rows.manifest):
            return self._of_checkpoint
        altered = [manifest.codec_name] if manifest.codec_name not in _AS_COMPUTED else []
        altered += ["low rank"] * bool(manifest.basis) + ["edited"] * bool(manifest.parent)
        absent = sorted(set(range(self.config.num_rows)) - set(manifest.layers))
        return {**self._of_checkpoint, "absent_layers": absent, "altered": altered}

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateReply]:
        async for reply in stream(context, self._generate(request, _caller(context))):
            yield reply

    async def DescribeWorker(
        self, request: generation_pb2.DescribeWorkerRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.DescribeWorkerReply:
        engine = self.engine
        counts = generation_pb2.RowCounts(**engine.counts())
        return generation_pb2.DescribeWorkerReply(
            **self.identity,
            table=engine.table,
            running=engine.running,
            waiting=engine.waiting,
            rows=counts,
            tokens=engine.tokens,
        )

    async def _generate(
        self, request: generation_pb2.GenerateRequest, caller: tracing.Span
    ) -> AsyncIterator[generation_pb2.GenerateReply]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Output] = asyncio.Queue()
        sequence: Sequence | None = None
        status, told = "CANCELLED", ""  # unless it ends otherwise
        about = {
            "gen_ai.request.model": self.identity["model"],
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        }
        trace = tracing.begin(
            "worker Generate",
            caller,
            {**about, "tolhouse.request_id": request.request_id},
            tracing.SERVER,
            root=True,
        )

        def emit(output: Output) -> None:
            loop.call_soon_threadsafe(events.put_nowait, output)

        try:
            sequence = self._sequence(request, emit)
            sequence.span = trace
            event(
                "request",
                logging.DEBUG,
                request_id=request.request_id,
                prompt_tokens=sequence.prompt_tokens,
            )
            self.engine.add(sequence)
            while True:
                output = await events.get()
                if output.error:
                    event(
                        "request failed",
                        logging.WARNING,
                        request_id=request.request_id,
                        error=str(output.error),
                    )
                    raise output.error
                if output.finish_reason:
                    status = "OK"
                    new = len(sequence.ids) - sequence.prompt_tokens
                    trace.set_attributes(
                        {
                            "gen_ai.usage.output_tokens": new,
                            "tolhouse.table": sequence.table,
                            "tolhouse.finish_reason": output.finish_reason,
                        }
                    )
                yield generation_pb2.GenerateReply(
                    token_ids=output.tokens,
                    finish_reason=output.finish_reason,
                    end_id=output.end_id,
                    logprobs=_logprobs(output.logprobs),
                    prompt_logprobs=_logprobs(output.prompt_logprobs),
                    table=sequence.table,
                )
                if output.finish_reason:
                    return
        except TolhouseError as error:
            status, told = error.grpc_status, str(error)
            raise
        finally:  # also when the caller went away; a sequence that has ended is left alone
            REQUESTS.labels(status).inc()
            tracing.end(trace, told)
            if sequence:
                self.engine.cancel(sequence)

    def _sequence(
        self, request: generation_pb2.GenerateRequest, emit: Callable[[Output], None]
    ) -> Sequence:
        if len(request.request_id) > MAX_REQUEST_ID:
            raise InvalidArgument(
                f"the request_id has {len(request.request_id)} characters; at most {MAX_REQUEST_ID} are taken"
            )
        prompt = check_prompt(self.config, request.prompt_token_ids, request.max_tokens)
        sampling, config = SamplingParams.from_proto(request), self.config
        for name in ("stop_token_ids", "logit_bias"):
            if bad := [i for i in getattr(sampling, name) if i >= config.vocab_size]:
                raise InvalidArgument(
                    f"{name}: token id {bad[0]} is outside the vocabulary: "
                    f"allowed are 0 to {config.vocab_size - 1}"
                )
        rows, scales = config.num_rows, len(sampling.layer_scales)
        if scales not in (0, rows) or (
            sampling.probes and (not rows or max(sampling.absent_layers, default=0) >= rows)
        ):
            there = f"layers 0 to {rows - 1}" if rows > 1 else "one row for all layers"
            raise InvalidArgument(
                "row_scale, absent_layers and layer_scales apply to looked-up rows; this model has "
                f"{there if rows else 'none'}, and the request has {scales} layer_scales "
                f"and absent_layers {list(sampling.absent_layers)!s:.200}"
            )
        if not sampling.ignore_eos:
            ends = (*sampling.stop_token_ids, config.eos_token_id)
            sampling = sampling.model_copy(update={"stop_token_ids": ends})
        return Sequence(len(prompt), prompt, sampling, emit)


def _caller(context: grpc.aio.ServicerContext) -> tracing.Span:
    metadata = dict(context.invocation_metadata() or ())
    return tracing.remote(str(metadata.get(tracing.HEADER, "")))


def _logprobs(logprobs: Logprobs | None) -> generation_pb2.Logprobs | None:
    return (
        generation_pb2.Logprobs(chosen=logprobs.chosen, top_ids=logprobs.top_ids, top=logprobs.top)
        if logprobs
        else None
    )


class EngineMetrics(Collector):
    """The engine's own counts, read when Prometheus asks: nothing is counted twice."""

    def __init__(self, engine: Engine, follower: TableWatcher | None) -> None:
        self.engine, self.follower = engine, follower

    def collect(self) -> Iterator[Metric]:
        engine, counts, cache = self.engine, self.engine.counts(), self.engine.cache
        yield GaugeMetricFamily("tolhouse_worker_running", "Sequences in the batch", engine.running)
        yield GaugeMetricFamily("tolhouse_worker_waiting", "Sequences in the queue", engine.waiting)
        used = 1 - cache.free_blocks / cache.num_blocks
        yield GaugeMetricFamily(
            "tolhouse_worker_kv_cache_usage_ratio", "Share of the KV cache in use", used
        )
        yield CounterMetricFamily("tolhouse_worker_tokens", "Tokens generated", engine.tokens)
        yield CounterMetricFamily("tolhouse_worker_steps", "Engine steps", engine.steps)
        yield CounterMetricFamily(
            "tolhouse_worker_step_seconds", "Time in engine steps", engine.step_seconds
        )
        yield CounterMetricFamily(
            "tolhouse_worker_forward_seconds",
            "Time of steps in the model's forward",
            engine.forward_seconds,
        )
        yield CounterMetricFamily(
            "tolhouse_worker_preemptions",
            "Sequences that gave their KV cache back",
            engine.scheduler.preemptions,
        )
        yield CounterMetricFamily(
            "tolhouse_worker_prompt_tokens",
            "Prompt tokens of sequences let into the batch",
            cache.prompt_tokens,
        )
        yield CounterMetricFamily(
            "tolhouse_worker_prefix_hit_tokens",
            "Prompt tokens found in the KV cache",
            cache.found_tokens,
        )
        by_source = CounterMetricFamily(
            "tolhouse_worker_rows", "Rows that steps asked for, by source", labels=["source"]
        )
        by_source.add_metric(["cache"], counts["from_cache"])
        by_source.add_metric(["remote"], counts["from_remote"])
        by_source.add_metric(["recomputed"], counts["recomputed"])
        yield by_source
        yield CounterMetricFamily(
            "tolhouse_worker_row_bytes", "Bytes of rows fetched", counts["remote_bytes"]
        )
        yield CounterMetricFamily(
            "tolhouse_worker_row_wait_seconds",
            "Time that steps waited for rows",
            counts["wait_seconds"],
        )
        yield CounterMetricFamily(
            "tolhouse_worker_row_fetches", "Calls of the lookup service for rows", counts["fetches"]
        )
        yield CounterMetricFamily(
            "tolhouse_worker_row_fetch_seconds", "Time that these took", counts["fetch_seconds"]
        )
        yield CounterMetricFamily(
            "tolhouse_worker_sat_out",
            "Tokens that came a step later because their row did",
            engine.sat_out,
        )
        info = GaugeMetricFamily(
            "tolhouse_worker_table_info",
            "1 for the table version that new sequences begin with",
            labels=["table"],
        )
        if engine.table:
            info.add_metric([engine.table], 1)
        yield info
        refused = GaugeMetricFamily(
            "tolhouse_worker_table_refused",
            "1 for a published version that does not fit this worker",
            labels=["table"],
        )
        if self.follower and self.follower.refused:
            refused.add_metric([self.follower.refused], 1)
        yield refused
        for histogram in engine.latencies:
            yield from histogram.collect()


async def run(checkpoint_path: str | Path, config: WorkerConfig) -> None:
    """Serve the checkpoint until told to stop."""
    checkpoint = open_checkpoint(checkpoint_path)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    if config.threads:
        torch.set_num_threads(config.threads)
    compiled = Compiled(checkpoint.config, dtype, config.compile_cache)
    if config.compile == "auto" and device.type == "cpu":
        compiled.start()
    cache = BlockManager(blocks_of(checkpoint.config, int(config.kv_cache_megabytes * 1e6), dtype))
    credentials = config.server_credentials()
    tracing.start_tracing("worker", config.traces, insecure=config.insecure)
    client = open_row_source(
        config.rows,
        timeout_seconds=config.fetch_timeout_seconds,
        credentials=config.client_credentials(),
    )
    table = config.table or checkpoint.name

    def rows_of(manifest: Manifest) -> Rows:
        check_table(manifest, checkpoint)
        fallback = Recompute(checkpoint, manifest) if config.fallback == "recompute" else None
        rows = Rows(
            client,
            manifest,
            int(config.row_cache_megabytes * 1e6),
            device,
            dtype,
            fallback,
            checkpoint.config.num_rows,
        )
        rows.fill()
        return rows

    rows: Rows | NoRows = NoRows(checkpoint.config.hidden_size, device)
    if checkpoint.config.num_rows:
        rows = rows_of(
            await asyncio.to_thread(wait_for_table, client, table, config.lookup_wait_seconds)
        )
    pages = PagedKVCache(
        checkpoint.config, cache.num_blocks + 1, device, dtype
    )  # one to spare, for GraphRunner
    embedding = not (rows.manifest and rows.manifest.has_x0)
    model = load(checkpoint, device, dtype, embedding)
    if device.type == "cpu":
        compiled.attach(model)
    kind = Runner if device.type == "cpu" else GraphRunner
    runner = kind(model, pages, rows)
    engine = Engine(
        runner, rows, cache, config.max_num_seqs, config.max_waiting, config.max_num_batched_tokens
    )

    def take_up(manifest: Manifest) -> None:
        if model.embed_tokens is None and not manifest.has_x0:
            raise Mismatch(
                "it does not carry X0, and this worker was started without its input embedding: start it again"
            )
        rows = rows_of(manifest)
        engine.use(kind(model, pages, rows), rows)

    follower = (
        TableWatcher(client, table, engine, take_up, config.table_poll_seconds)
        if engine.table
        else None
    )
    service = WorkerService(engine, checkpoint, config.served_model_name or checkpoint.name)
    metrics = serve_metrics(config.metrics_listen, credentials)
    REGISTRY.register(EngineMetrics(engine, follower))
    event(
        "loaded",
        checkpoint=checkpoint.name,
        table=engine.table,
        kv_cache_tokens=cache.capacity_tokens,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )
    engine.start()
    if follower:
        follower.start()
    try:
        await serve(
            "worker",
            config.listen,
            lambda server: add_GenerationServicer_to_server(service, server),
            (NAME,),
            config.drain_seconds,
            credentials=credentials,
            metrics=metrics,
        )
    finally:
        compiled.stop()
        if follower:
            follower.stop()
        engine.stop()
        client.close()


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 on a CPU, where batches of all sizes then give the same tokens, and bfloat16 on a GPU, unless another is asked for."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidArgument(f"--device {name!r} is unknown; cpu, cuda or auto") from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and not torch.cuda.is_available()
    ):
        raise InvalidArgument(
            f"--device {name!r} is not on this machine; cpu, cuda where there is one, or auto"
        )
    return device
