"""Files and requests that users of similar projects reported, each with the right result.

A module `case_NN_name` has `check(folder)`, which yields a `Result` for each claim. `folder` holds
the case's input files: `inputs/NN-name` here, or a folder of the same form elsewhere.
"""

from typing import NamedTuple


class Result(NamedTuple):
    claim: str
    right: bool
    seen: str = ""  # what was found, printed where it is wrong


def equal(claim: str, expected: object, found: object) -> Result:
    """A result that is right if both values are equal."""
    return Result(claim, expected == found, f"expected {expected!r:.300}, found {found!r:.300}")
