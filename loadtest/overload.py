"""Send three times the load that the system can handle: `python -m loadtest.overload [--quick]`.

The whole system runs in processes on this machine. Clients send requests at a fixed rate without
waiting for answers (see loadtest/serve.py). First the rate grows until the rate of good answers
stops growing; the best value is the peak. Then clients send three times the peak, and finally half
of it. A good answer is complete and its first token arrives within FIRST_TOKEN_SECONDS. The output
is a table and a final line of JSON:

  goodput_ratio        good answers per second at three times the peak, over the peak
                       (required: 0.8)
  refused_ms           95th percentile of the time until a 429 response arrives
  memory_growth_mb     largest growth of any process's resident memory during the overload
  recovered_s          seconds after the overload until half the peak is answered well again
                       (required: at most 5)
"""

import argparse
import asyncio
import json
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import psutil
from tolhouse.testing import build_table, local_cluster

from loadtest.serve import Answer, Load, run, text_of

CHECKPOINT = Path("models/demo-memory")
FIRST_TOKEN_SECONDS, TOKEN_SECONDS = 10.0, 1.0
QUEUE = ("--max-num-seqs", "16", "--max-waiting", "32")


def good(answers: list[Answer]) -> int:
    return sum(answer.good(FIRST_TOKEN_SECONDS, TOKEN_SECONDS) for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="6 seconds for each rate instead of 20"
    )
    seconds = 6.0 if parser.parse_args().quick else 20.0
    with tempfile.TemporaryDirectory(prefix="tolhouse-overload-") as folder:
        url = f"file://{folder}"
        build_table(CHECKPOINT, url)
        with local_cluster(
            CHECKPOINT, url, workers=2, worker_options=(*QUEUE, "--threads", "1")
        ) as cluster:
            load = Load(
                f"http://{cluster.gateway}", CHECKPOINT.name, text_of(""), (40, 200), (32, 32), 60.0
            )
            processes = [psutil.Process(process.pid) for process in cluster.processes]

            def at(rate: float) -> tuple[list[Answer], float]:
                answers, elapsed = asyncio.run(run(load, rate, seconds))
                kinds = ", ".join(
                    f"{sum(a.error == kind for a in answers)} {kind}"
                    for kind in sorted({a.error for a in answers if a.error})
                )
                sent = f"{len(answers):5} sent, {good(answers) / elapsed:6.1f} good per second"
                print(f"  {rate:6.1f} per second: {sent}   {kinds}", flush=True)
                return answers, good(answers) / elapsed

            asyncio.run(run(load, 4.0, 3.0))  # warm-up
            peak = 0.0
            for rate in (8.0 * 1.5**n for n in count()):
                best, (answers, rate_of_good) = peak, at(rate)
                peak = max(peak, rate_of_good)
                if (
                    good(answers) < 0.9 * len(answers) or rate_of_good < 1.1 * best
                ):  # the system is saturated, or a higher rate no longer helps
                    break
            before = [process.memory_info().rss for process in processes]
            answers, during = at(3 * peak)
            grown = max(
                process.memory_info().rss - had
                for process, had in zip(processes, before, strict=True)
            )
            refused = [answer.whole for answer in answers if answer.error == "HTTP 429"]
            ended = time.perf_counter()
            while time.perf_counter() - ended < 30:
                tried = time.perf_counter()
                after, _ = asyncio.run(run(load, peak / 2, 1.0))
                if after and good(after) == len(after):
                    break
    print(
        json.dumps(
            {
                "peak_per_second": round(peak, 1),
                "goodput_ratio": round(during / peak, 3),
                "refused": len(refused),
                "refused_ms": round(float(np.percentile(refused, 95)) * 1e3, 1)
                if refused
                else None,
                "memory_growth_mb": round(grown / 1e6, 1),
                "recovered_s": round(tried - ended, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
