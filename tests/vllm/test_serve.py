"""`vllm serve` with rows over TCP: concurrent requests, and a lookup service that ends."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.error import HTTPError

import numpy as np
import pytest
from tolhouse.client.row_source import open_row_source
from tolhouse.testing import free_port, process, wait_until

from tests.vllm.engines import Case, complete, reference, served

FEW_ROWS = {"row_cache_megabytes": 1, "fetch_timeout_seconds": 1}  # about 140 rows


def rare_prompt(case: Case, count: int = 40) -> list[int]:
    """Return tokens that no row cache is filled with at start."""
    source = open_row_source(case.rows)
    manifest = source.describe(case.checkpoint.name)
    rare = np.setdiff1d(np.arange(manifest.vocab_size), manifest.frequent[:2000])
    source.close()
    return np.random.default_rng(1).choice(rare, count, replace=False).tolist()


def status(address: str, prompt: list[int]) -> int | list[int]:
    """Return the completion of a prompt, or the HTTP status of the error."""
    try:
        return complete(address, prompt)
    except HTTPError as error:
        return error.code


def test_ten_requests_at_once(memory: Case) -> None:
    """Ten concurrent requests get the tokens of the reference."""
    with process("lookup", "--store", memory.rows, "--listen", "127.0.0.1:0") as lookup:
        with served(memory, {"rows": lookup.address}) as address, ThreadPoolExecutor(10) as pool:
            assert memory.expected == list(pool.map(partial(complete, address), memory.prompts))


def test_a_lost_lookup_fails_only_requests_without_rows(memory: Case) -> None:
    """Without a fallback, cached rows serve on, other requests get an error, and both work again
    when the service is back."""
    listen = ("--store", memory.rows, "--listen", f"127.0.0.1:{free_port()}")
    known, rare = memory.prompts[2], rare_prompt(memory)
    expected = memory.expected[2]
    expected_rare = reference(memory.checkpoint, [rare])[0]
    with process("lookup", *listen) as lookup:
        options = {"rows": lookup.address, "fallback": "none", **FEW_ROWS}
        with served(memory, options) as address, ThreadPoolExecutor(10) as pool:
            assert expected == complete(address, known)
            lookup.popen.kill()
            lookup.popen.wait()
            for _ in range(2):
                prompts = [known, rare, known, rare]
                answers = list(pool.map(partial(status, address), prompts))
                assert [expected, 500, expected, 500] == answers
            with process("lookup", *listen):
                wait_until(lambda: status(address, rare) != 500, "rows")
                # nothing of the failed requests is in the prefix cache
                assert expected_rare == complete(address, rare)
                assert expected == complete(address, known)


@pytest.mark.parametrize("fallback", ["auto", "second"])
def test_with_a_fallback_a_lost_lookup_changes_no_token(memory: Case, fallback: str) -> None:
    """Rows that the service no longer delivers are computed, or come from a second source."""
    second = memory.rows if fallback == "second" else fallback
    rare = rare_prompt(memory)
    with process("lookup", "--store", memory.rows, "--listen", "127.0.0.1:0") as lookup:
        options = {"rows": lookup.address, "fallback": second, **FEW_ROWS}
        with served(memory, options) as address, ThreadPoolExecutor(11) as pool:
            waiting = [pool.submit(complete, address, prompt) for prompt in memory.prompts]
            lookup.popen.kill()
            assert reference(memory.checkpoint, [rare])[0] == complete(address, rare)
            assert memory.expected == [answer.result() for answer in waiting]
