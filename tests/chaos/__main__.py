"""Inject faults under load and check the responses that clients received.

    python -m tests.chaos [--only WORD] [--group NAME]      # or make chaos

Each fault runs under load: some seconds of normal operation, injection, publication of another
version a second later, repair, and some more seconds. The output is a table and a final line of
JSON. The exit status is 1 if a check failed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial

from tests.chaos.builds import build_faults
from tests.chaos.faults import Fault, Group, over_cluster
from tests.chaos.files import over_files
from tests.chaos.history import Row, rate, recovery_seconds, violations
from tests.chaos.one_redis import over_one_redis
from tests.chaos.system import DEADLINE_SECONDS, Load, answers_of_versions

USUAL_SECONDS, AFTER_SECONDS = 4.0, 5.0
FLIP_AFTER_SECONDS = 1.0


def run(fault: Fault, group: Group) -> Row:
    """Run one fault under load and return its row of the table."""
    load = Load(group.system.gateway.address)
    load.start()
    started = time.monotonic()
    time.sleep(USUAL_SECONDS)
    moment = time.monotonic()
    fault.inject()
    time.sleep(max(0.0, moment + FLIP_AFTER_SECONDS - time.monotonic()))
    flipped = group.system.flip(group.refs) if fault.flips else ""
    time.sleep(max(0.0, moment + fault.seconds - time.monotonic()))
    until = time.monotonic()
    fault.mend()
    time.sleep(AFTER_SECONDS)
    load.stop()
    ended = time.monotonic()
    usual = rate(load.history, started + 1, moment)
    last = ended if fault.recovers_within > fault.seconds else until
    recovery = recovery_seconds(load.history, moment, last, usual)
    wrong = fault.found + violations(load.history, answers_of_versions(), DEADLINE_SECONDS)
    failed = [seen for seen in load.history if seen.failed]
    wrong += [
        f"a request failed {'after' if seen.pieces else 'before'} its first token: {seen.error}"
        for seen in failed
        if not fault.may_fail(seen)
    ]
    if fault.flips and not flipped:
        wrong.append("no version could be published during the fault")
    elif fault.flips and flipped not in {seen.version for seen in load.history}:
        wrong.append("no answer had the published version")
    sums = len(load.history), len(failed)
    return Row(fault.name, *sums, wrong, recovery, fault.recovers_within, usual)


def served(over: Callable[[], AbstractContextManager[Group]], only: str) -> Iterator[Row]:
    """Run the faults of a group whose names contain `only`."""
    answers_of_versions()  # computed once, before any measurement
    with over() as group:
        for fault in group.faults:
            if only in fault.name:
                yield run(fault, group)
                if not group.settled():
                    print("    the Redis Cluster did not settle", flush=True)


GROUPS: dict[str, Callable[[str], Iterator[Row]]] = {
    "cluster": partial(served, over_cluster),
    "files": partial(served, over_files),
    "redis": partial(served, over_one_redis),
    "builds": build_faults,
}


def show(row: Row) -> None:
    recovery = "never" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
    counts = f"{row.requests:8} {row.failed:6} {len(row.wrong):6}"
    print(f"{row.fault:38} {counts} {recovery:>9}   {row.usual:.0f}/s before", flush=True)
    for text in row.wrong[:3]:
        print(f"    {text[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", default="", metavar="WORD", help="run only faults whose names contain this word"
    )
    parser.add_argument("--group", choices=GROUPS, help="run only faults of this group")
    options = parser.parse_args()
    rows = []
    print(f"{'fault':38} {'requests':>8} {'failed':>6} {'wrong':>6} {'recovery':>9}")
    for name in [options.group] if options.group else GROUPS:
        for row in GROUPS[name](options.only):
            rows.append(row)
            show(row)
    wrong = sum(len(row.wrong) for row in rows)
    slow = [row.fault for row in rows if row.recovery_s is None or row.recovery_s > row.limit_s]
    sums = {key: sum(asdict(row)[key] for row in rows) for key in ("requests", "failed")}
    print(json.dumps({"faults": len(rows), **sums, "wrong": wrong, "slow": slow}))
    sys.exit(bool(wrong or slow))


if __name__ == "__main__":
    main()
