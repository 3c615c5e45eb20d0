"""Inputs that users of similar projects reported, with the correct results.

A module `case_NN_name` has `check(folder)`, which yields a `Result` for each claim. `folder` has
the case's input files: `inputs/NN-name` here, or a folder of the same structure elsewhere.
"""

from typing import NamedTuple


class Result(NamedTuple):
    claim: str
    right: bool
    seen: str = ""  # the observed value, printed if it is wrong


def equal(claim: str, expected: object, found: object) -> Result:
    """Return a result that is right if both values are equal."""
    return Result(claim, expected == found, f"expected {expected!r:.300}, found {found!r:.300}")
