"""Repeat the same fetch for profiling: `python -m loadtest.repeat hot|redis [SECONDS]`.

Each fetch reads 32 rows of 96 KiB, either hot or from Redis without a useful cache. The program
prints "ready" with the process ids of client and service when the loop starts, and the transfer
rate when it ends.

  py-spy record --gil -d 5 -p PID -o profile.svg
"""

import os
import sys
import time
from contextlib import closing

from tolhouse import Client
from tolhouse.store.base import open_store
from tolhouse.testing import redis_server

from loadtest.fetch import in_turn
from loadtest.tables import load, manifest_of, service


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("hot", "redis"):
        sys.exit(__doc__)
    kind, seconds = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    manifest = manifest_of("large", 2048, 96)
    batches = in_turn(manifest.vocab_size, 32, manifest.vocab_size // 32)
    with redis_server() as url, closing(open_store(url)) as store:
        load(store, manifest)
        with (
            service(url, 32 if kind == "redis" else 250) as lookup,
            Client(lookup.address) as client,
        ):
            for batch in batches:
                client.fetch(manifest, batch)
            print(f"ready: client {os.getpid()}, service {lookup.pid}", flush=True)
            count, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                client.fetch(manifest, batches[count % len(batches)])
                count += 1
            print(f"{count} fetches, {count * 32 * manifest.record_bytes / seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
