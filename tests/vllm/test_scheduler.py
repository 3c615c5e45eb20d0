"""The scheduler without a model: what remains of requests whose rows are missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tolhouse.integrations.vllm.scheduler import new_scheduler
from tolhouse.testing import tiny_model
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

SIZES = (16, 32)  # tokens in a block of each group
PROMPT = list(range(1, 101))


def make(folder: Path, blocks: int, *, asynchronous: bool, window: int = 0) -> Any:
    """Return a scheduler for two groups of layers whose blocks have different sizes.

    With a `window`, there is only the first group, and its attention has a sliding window.
    """
    model = str(tiny_model(folder / "tiny", "base", 0))
    config = EngineArgs(model, max_model_len=256).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous  # vLLM turns it off on a CPU
    config.cache_config.num_gpu_blocks = blocks
    groups = [
        KVCacheGroupSpec(
            [f"layer.{size}"],
            FullAttentionSpec(
                block_size=size, num_kv_heads=1, head_size=1024 // size, dtype=torch.float32
            ),
        )
        for size in SIZES
    ]
    if window:
        shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
        spec = SlidingWindowSpec(block_size=SIZES[0], sliding_window=window, **shape)
        groups = [KVCacheGroupSpec(["layer"], spec)]
    init_none_hash(sha256)
    return new_scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=min(SIZES) if window else max(SIZES),
        hash_block_size=min(SIZES),
    )


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def scheduler(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A scheduler with many blocks."""
    return make(tmp_path, 100, asynchronous=request.param)


def add(scheduler: Any, name: str, prompt: list[int]) -> Request:
    """Add a request with a prompt."""
    hasher = get_request_block_hasher(min(SIZES), sha256)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    sampling.update_from_generation_config({}, 0)
    request = Request(name, prompt, sampling, None, block_hasher=hasher)
    scheduler.add_request(request)
    return request


def finish_step(scheduler: Any, step: Any, *failed: str) -> None:
    """Give the scheduler the output of a step in which requests failed."""
    names = list(step.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[[7] for _ in names],
        num_nans_in_logits={name: int(name in failed) for name in names},
    )
    scheduler.update_from_output(step, output)


def cached(scheduler: Any, prompt: list[int]) -> int:
    """Return the tokens of a prompt that are in the prefix cache."""
    request = add(scheduler, "probe", prompt)
    found = scheduler.kv_cache_manager.get_computed_blocks(request)[1]
    scheduler.finish_requests("probe", RequestStatus.FINISHED_ABORTED)
    return found


def test_blocks_of_finished_steps_stay(scheduler: Any) -> None:
    """A request that fails late leaves the blocks of its finished steps in the cache."""
    add(scheduler, "first", PROMPT)
    finish_step(scheduler, scheduler.schedule())
    assert 96 == cached(scheduler, PROMPT)
    finish_step(scheduler, scheduler.schedule(), "first")
    assert "first" not in scheduler.requests
    assert 96 == cached(scheduler, PROMPT)


@pytest.mark.parametrize("cancelled", [False, True])
def test_blocks_of_a_failed_step_do_not_stay(scheduler: Any, cancelled: bool) -> None:
    """Nothing of a failed step stays in the cache, also if the request is cancelled before."""
    add(scheduler, "first", PROMPT)
    step = scheduler.schedule()
    if cancelled:
        scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    finish_step(scheduler, step, "first")
    assert "first" not in scheduler.requests
    assert 0 == cached(scheduler, PROMPT)


def test_blocks_of_a_preempted_request_do_not_stay(tmp_path: Path) -> None:
    """Nothing of a failed step stays in the cache if the request lost its blocks before."""
    scheduler = make(tmp_path, 1 + 2 * (96 // 16 + 96 // 32), asynchronous=True)
    add(scheduler, "first", PROMPT[:96])
    second = add(scheduler, "second", PROMPT[:-97:-1])
    step = scheduler.schedule()
    assert 2 == len(scheduler.running)
    scheduler.schedule()  # the first request takes a block of the second one
    assert RequestStatus.PREEMPTED == second.status
    finish_step(scheduler, step, "second")
    assert ["first"] == list(scheduler.requests)
    assert 0 == cached(scheduler, PROMPT[:-101:-1])


@pytest.mark.parametrize("cancelled", [False, True])
def test_requests_that_begin_with_wrong_blocks_end(scheduler: Any, cancelled: bool) -> None:
    """A request that shares blocks with a failed one ends too, and one of other blocks does not."""
    for name, prompt in (("first", PROMPT), ("heir", [*PROMPT, 5]), ("other", PROMPT[::-1])):
        add(scheduler, name, prompt)
    step = scheduler.schedule()
    assert 3 == len(scheduler.running)
    if cancelled:
        scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    finish_step(scheduler, step, "first")
    assert ["other"] == list(scheduler.requests)
    assert 0 == cached(scheduler, PROMPT)
    assert 96 == cached(scheduler, PROMPT[::-1])


def preempt(scheduler: Any, request: Request) -> None:
    """Take a request's blocks while a step is in flight, as vLLM does if it has too few blocks."""
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)  # noqa: SLF001  # vLLM has no public way


def test_a_late_failure_of_a_preempted_request_ends_no_other(scheduler: Any) -> None:
    """Once the step in flight has succeeded, a request is independent of the preempted one."""
    first = add(scheduler, "first", PROMPT)
    add(scheduler, "second", [*PROMPT, 5])
    step = scheduler.schedule()
    preempt(scheduler, first)
    finish_step(scheduler, step)
    step = scheduler.schedule()
    assert "first" in step.num_scheduled_tokens
    finish_step(scheduler, step, "first")
    assert ["second"] == list(scheduler.requests)


@pytest.mark.parametrize("order", [["second"], ["first", "second"], ["second", "first"]])
def test_preempted_requests_end_with_the_one_that_failed(scheduler: Any, order: list[str]) -> None:
    """Requests with blocks of a failed step end, whether they or the failed one are preempted."""
    requests = {
        name: add(scheduler, name, [*PROMPT, *more])
        for name, more in (("first", []), ("second", [5] * 40), ("third", [5] * 50))
    }
    add(scheduler, "other", PROMPT[::-1])
    step = scheduler.schedule()
    assert 4 == len(scheduler.running)
    for name in order:
        preempt(scheduler, requests[name])
    finish_step(scheduler, step, "first")
    assert ["other"] == list(scheduler.requests)


def test_the_heir_of_an_heir_ends(tmp_path: Path) -> None:
    """A request ends that shares no block with the failed one, but with an heir of it."""
    scheduler = make(tmp_path, 100, asynchronous=True, window=32)
    prompts = PROMPT[:96], [*PROMPT[:96], *[5] * 64], [*PROMPT[:96], *[5] * 80]
    requests = [add(scheduler, str(i), prompt) for i, prompt in enumerate(prompts)]
    step = scheduler.schedule()
    assert 3 == len(scheduler.running)
    blocks = [set(scheduler.kv_cache_manager.get_block_ids(str(i))[0]) - {0} for i in range(3)]
    assert blocks[0] & blocks[1]
    assert blocks[1] & blocks[2]
    assert not blocks[0] & blocks[2]
    for request in requests[:2]:
        preempt(scheduler, request)
    finish_step(scheduler, step, "0")
    assert not scheduler.requests
