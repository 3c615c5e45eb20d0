"""The engine of the paced benchmark, whose forward is a wait."""

from tolhouse.engine.row_providers import NoRows

from loadtest.pace import CPU, engine
from loadtest.replay import Contender


def test_replayed_texts_run_to_their_ends() -> None:
    """All tokens of the texts are generated, and each step waits for its number of tokens."""
    asked: list[int] = []

    def seconds(tokens: int) -> float:
        asked.append(tokens)
        return 1e-4

    one = Contender("no rows", engine(NoRows(1, CPU), seconds))
    one.start([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]])
    one.until_done()
    assert (one.engine.tokens, one.engine.steps) == (5, 3)
    assert asked == [5, 2, 1]
