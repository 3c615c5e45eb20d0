"""The watch over a lookup service that is away."""

import time
from collections.abc import Callable

from tolhouse.errors import TolhouseError, Unavailable
from tolhouse.worker.outage import Outage


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(2000):
        if what():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


class Answers:
    """What a service says when asked whether it is back, one after the other; each ask is counted."""

    def __init__(self, *answers: bool | TolhouseError) -> None:
        self.left, self.asked = list(answers), 0

    def __call__(self) -> bool:
        self.asked += 1
        answer = self.left.pop(0)
        if isinstance(answer, TolhouseError):
            raise answer
        return answer


def test_an_outage_lasts_until_the_service_is_back() -> None:
    """It is asked again after an error and after a no, and not once it has said yes."""
    answers = Answers(Unavailable("gone"), False, Unavailable("gone"), True)
    outage = Outage(answers, 0.001, 0.004)
    assert not outage.on
    outage.begin(Unavailable("gone"))
    assert outage.on
    wait_for(lambda: not outage.on)
    assert ([], 4) == (answers.left, answers.asked)


def test_pauses_grow_up_to_the_longest_and_begin_anew_after_a_fetch() -> None:
    """An outage that follows at once goes on with the last one's pauses; one after a fetch that worked does not."""
    outage = Outage(Answers(False, True, False, True, True), 0.001, 0.005)
    for fetched, pause in ((False, 0.004), (True, 0.005), (False, 0.002)):
        outage.begin(Unavailable("gone"))
        wait_for(lambda: not outage.on)
        assert pause == outage._pause_seconds
        if fetched:
            outage.fetched()


def test_a_watch_that_is_closed_asks_no_more() -> None:
    """The worker ends while the service is away."""
    answers = Answers()
    outage = Outage(answers, 60)
    outage.begin(Unavailable("gone"))
    outage.close()
    assert (True, 0) == (outage.on, answers.asked)
