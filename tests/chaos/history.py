"""The responses that clients received, and checks of them.

A request ends exactly once: with its complete answer, or with an error, which may follow the
beginning of a stream. The text of an answer is that of exactly one version of the table.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Answers = Mapping[str, Sequence[str]]  # the correct text of each prompt, by version

EDGE_SECONDS = 1.0  # width of the window of a rate


@dataclass
class Seen:
    """One request as its client saw it."""

    prompt: int
    streamed: bool
    began: float  # seconds
    ended: float = 0.0
    pieces: list[str] = field(default_factory=list)
    finishes: int = 0  # number of finish reasons
    dones: int = 0  # number of stream ends (also after an error) or of complete answers
    version: str = ""  # the version that the response names
    error: str = ""
    status: int = 200

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def failed(self) -> bool:
        return bool(self.error)


@dataclass
class Row:
    """The result of one fault: a row of the table."""

    fault: str
    requests: int
    failed: int
    wrong: list[str]  # violations
    recovery_s: float | None  # None: never
    limit_s: float
    usual: float = 0.0  # complete answers per second before the fault


def violations(history: Iterable[Seen], answers: Answers, deadline_seconds: float) -> list[str]:
    """The violations in a history; empty if there are none."""
    found = []
    for seen in history:
        right = {version: texts[seen.prompt] for version, texts in answers.items()}
        if seen.ended - seen.began > deadline_seconds:
            found.append(
                f"prompt {seen.prompt} took {seen.ended - seen.began:.1f} s, more than its deadline"
            )
        if seen.failed:
            if seen.finishes:
                found.append(
                    f"prompt {seen.prompt} ended twice: with an answer and with {seen.error!r}"
                )
            if not any(text.startswith(seen.text) for text in right.values()):
                found.append(f"prompt {seen.prompt} began wrongly before its error: {seen.text!r}")
            continue
        if (seen.finishes, seen.dones) != (1, 1):
            found.append(
                f"prompt {seen.prompt} ended {seen.finishes} times, "
                f"and {seen.dones} times completely"
            )
        if seen.text not in right.values():
            mixed = (
                len(right) > 1
                and seen.text[:1]
                and any(t.startswith(seen.text[:8]) for t in right.values())
            )
            kind = "a wrong or mixed" if mixed else "a wrong"
            found.append(f"prompt {seen.prompt} got {kind} text: {seen.text!r}")
        elif seen.version and right.get(seen.version) != seen.text:
            found.append(
                f"prompt {seen.prompt} names version {seen.version} but has another version's text"
            )
    return found


def rate(history: Iterable[Seen], start: float, end: float) -> float:
    """Complete answers per second that ended in an interval."""
    return sum(start <= seen.ended < end and not seen.failed for seen in history) / (end - start)


def recovery_seconds(
    history: Sequence[Seen], fault: float, until: float, usual: float, share: float = 0.7
) -> float | None:
    """Seconds from a fault until the rate has recovered to `share` of its usual value; None if it
    never does.

    The rate has recovered at the first window of EDGE_SECONDS in which it is that high and after
    which its mean stays that high.
    """
    step = EDGE_SECONDS / 4
    moment = fault
    while moment + EDGE_SECONDS <= until:
        window, rest = rate(history, moment, moment + EDGE_SECONDS), rate(history, moment, until)
        if min(window, rest) >= share * usual:
            return moment - fault
        moment += step
    return None
