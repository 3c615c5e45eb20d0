"""Faults under load, and a checker of what clients saw: `make chaos`, or `python -m tests.chaos
[--only WORD]`.

For each fault: some seconds as usual, the fault, a version flip a second later, the fault's end,
and some seconds more. Prints a table and, last, one line of JSON; ends with 1 where anything was
seen that must not be."""

import argparse
import json
import sys
import time
from contextlib import ExitStack

from tests.chaos.faults import Fault, of_redis, of_services, settled
from tests.chaos.history import Answers, failed_before_a_token, rate, recovery_seconds, violations
from tests.chaos.storage import storage_faults
from tests.chaos.system import DEADLINE_SECONDS, Load, System, over_redis

USUAL_SECONDS, FAULT_SECONDS, AFTER_SECONDS = 4.0, 9.0, 5.0
FLIP_AFTER_SECONDS = 1.0


def run(fault: Fault, system: System, answers: Answers, flip_to: str) -> dict:
    """One fault under load; its row of the table."""
    load = Load(system.gateway.address)
    load.start()
    started = time.monotonic()
    time.sleep(USUAL_SECONDS)
    moment = time.monotonic()
    fault.inject()
    time.sleep(max(0.0, moment + FLIP_AFTER_SECONDS - time.monotonic()))
    flipped = system.flip(flip_to)
    time.sleep(max(0.0, moment + FAULT_SECONDS - time.monotonic()))
    until = time.monotonic()
    fault.mend()
    time.sleep(AFTER_SECONDS)
    load.stop()
    ended = time.monotonic()
    usual = rate(load.history, started + 1, moment)
    last = ended if fault.recovers_within > FAULT_SECONDS else until
    recovery = recovery_seconds(load.history, moment, last, usual)
    wrong = violations(load.history, answers, DEADLINE_SECONDS)
    failed = [seen for seen in load.history if seen.failed]
    if fault.may_fail == "none":
        wrong += [f"a request failed: {seen.error}" for seen in failed]
    elif fault.may_fail == "streaming":
        early = failed_before_a_token(failed)
        wrong += [f"a request failed before its first token: {seen.error}" for seen in early]
    if not flipped:
        wrong.append("no version could be published during the fault")
    elif flip_to not in {seen.version for seen in load.history}:
        wrong.append("nobody was answered with the published version")
    return {
        "fault": fault.name,
        "requests": len(load.history),
        "failed": len(failed),
        "wrong": wrong,
        "usual": usual,
        "recovery_s": recovery,
        "limit_s": fault.recovers_within,
    }


def show(row: dict) -> None:
    recovery = "never" if row["recovery_s"] is None else f"{row['recovery_s']:.1f} s"
    counts = f"{row['requests']:8} {row['failed']:6} {len(row['wrong']):6}"
    print(f"{row['fault']:38} {counts} {recovery:>9}   {row['usual']:.0f}/s before", flush=True)
    for text in row["wrong"][:3]:
        print(f"    {text[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument(
        "--only", default="", metavar="WORD", help="only faults whose name has this in it"
    )
    only = parser.parse_args().only
    rows = []
    print(f"{'fault':38} {'requests':>8} {'failed':>6} {'wrong':>6} {'recovery':>9}")
    with ExitStack() as stack:
        system, nodes, links, answers = stack.enter_context(over_redis())
        refs = list(answers)
        faults = of_services(system) + of_redis(system, nodes, links, refs[0])
        for number, fault in enumerate(f for f in faults if only in f.name):
            rows.append(run(fault, system, answers, refs[(number + 1) % 2]))
            show(rows[-1])
            if not settled(nodes):
                print("    the Redis Cluster did not come to rest", flush=True)
    for row in storage_faults(only):
        rows.append(row)
        show(row)
    wrong = sum(len(row["wrong"]) for row in rows)
    slow = [r["fault"] for r in rows if r["recovery_s"] is None or r["recovery_s"] > r["limit_s"]]
    sums = {key: sum(row[key] for row in rows) for key in ("requests", "failed")}
    print(json.dumps({"faults": len(rows), **sums, "wrong": wrong, "slow": slow}))
    sys.exit(bool(wrong or slow))


if __name__ == "__main__":
    main()
