"""What clients saw, and what of it must not be.

A request ends exactly once: in its whole answer, or in an error, before which a stream may have
shown the beginning of it. An answer is that of one version of the table, token for token."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Answers = Mapping[str, Sequence[str]]  # by version: the right text of each prompt

EDGE_SECONDS = 1.0  # around a moment


@dataclass
class Seen:
    """One request, as its client saw it."""

    prompt: int
    streamed: bool
    began: float  # seconds
    ended: float = 0.0
    pieces: list[str] = field(default_factory=list)
    finishes: int = 0  # finish reasons
    dones: int = 0  # ends of the stream, also after an error, or whole answers
    version: str = ""  # that it was told
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
    """What came of one fault: a row of the table."""

    fault: str
    requests: int
    failed: int
    wrong: list[str]  # what must not be
    recovery_s: float | None  # None: never
    limit_s: float
    usual: float = 0.0  # whole answers per second before it


def violations(history: Iterable[Seen], answers: Answers, deadline_seconds: float) -> list[str]:
    """What is wrong with each request that should not have ended as it did; empty where all is
    well."""
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
                    f"prompt {seen.prompt} ended twice: in an answer, and in {seen.error!r}"
                )
            if not any(text.startswith(seen.text) for text in right.values()):
                found.append(f"prompt {seen.prompt} began wrongly before its error: {seen.text!r}")
            continue
        if (seen.finishes, seen.dones) != (1, 1):
            found.append(
                f"prompt {seen.prompt} ended {seen.finishes} times, and {seen.dones} times whole"
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
                f"prompt {seen.prompt} was told version {seen.version}, and got another's text"
            )
    return found


def rate(history: Iterable[Seen], start: float, end: float) -> float:
    """Whole answers per second that ended between two moments."""
    return sum(start <= seen.ended < end and not seen.failed for seen in history) / (end - start)


def recovery_seconds(
    history: Sequence[Seen], fault: float, until: float, usual: float, share: float = 0.7
) -> float | None:
    """Seconds from a fault until the rate is back at `share` of the usual one, and stays there on
    the whole; None if it never is.

    Looked at in windows of EDGE_SECONDS: the first one from which on the mean of what follows is
    that much, and it itself too."""
    step = EDGE_SECONDS / 4
    moment = fault
    while moment + EDGE_SECONDS <= until:
        window, rest = rate(history, moment, moment + EDGE_SECONDS), rate(history, moment, until)
        if min(window, rest) >= share * usual:
            return moment - fault
        moment += step
    return None
