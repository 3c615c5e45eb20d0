"""What happens once, before vLLM starts its processes: options are checked, and a table is found.

All ranks then use the same version, also if another one is published in the meantime.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from xxhash import xxh32_intdigest

from tolhouse.config import VLLMConfig, set_vllm_variables
from tolhouse.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from tolhouse.integrations.vllm.config import padded_head_dim
from tolhouse.integrations.vllm.options import KEY, AdditionalConfig, parse

SCHEDULER = "tolhouse.integrations.vllm.scheduler.new_scheduler"


class Start:
    """vLLM calls these methods for our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Change nothing."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Replace `additional_config` by the checked options and the version of the table.

        Raises UnsupportedError for an option of vLLM that does not work, NotFoundError if the
        model is not a folder, and InvalidArgumentError for all other errors of Tolhouse.
        """
        shape = vllm_config.model_config.hf_config.shape
        if vllm_config.lora_config and padded_head_dim(shape.head_dim) != shape.head_dim:
            reason = (
                f"vLLM's attention pads heads of size {shape.head_dim}, and adapters do not fit"
            )
            raise UnsupportedError(f"--enable-lora is not supported: {reason}")
        prepare(vllm_config, needs_table=shape.num_rows > 0)


def check_supported(vllm_config: Any) -> None:
    """Raise UnsupportedError for an option of vLLM with which rows cannot be staged."""
    if vllm_config.model_config.enable_prompt_embeds:
        reason = "rows are looked up by token id, which an embedding does not have"
        raise UnsupportedError(f"--enable-prompt-embeds is not supported: {reason}")
    if vllm_config.parallel_config.use_ubatching:
        reason = "a step would be divided after its rows are staged"
        raise UnsupportedError(f"--enable-dbo and --ubatch-size are not supported: {reason}")


def avoid_full_graphs(vllm_config: Any) -> None:
    """Let the first model runner capture no more than the compiled model.

    A graph of a whole step would contain the staging of rows, which is host code.
    """
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike() or vllm_config.use_v2_model_runner:
        return
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode != CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def prepare(vllm_config: Any, *, needs_table: bool) -> None:
    """Check the options, find the table, and choose the scheduler."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedError("--pipeline-parallel-size must be 1 for this model")
    additional = vllm_config.additional_config or {}
    options = parse(additional)
    found = find_table(options, vllm_config.model_config.model) if needs_table else {}
    table, blocks = found.get("table", ""), tuple(found.get("blocks", ()))
    others = {name: value for name, value in additional.items() if name != KEY}
    vllm_config.additional_config = AdditionalConfig(options, table, blocks, others)
    if not table:
        return
    check_supported(vllm_config)
    avoid_full_graphs(vllm_config)
    scheduling, caching = vllm_config.scheduler_config, vllm_config.cache_config
    scheduling.scheduler_cls = scheduling.scheduler_cls or SCHEDULER
    # A seed that is known must not be used with hashes for which collisions can be found.
    secure = str(caching.prefix_caching_hash_algo).startswith("sha256")
    set_vllm_variables(xxh32_intdigest(table.encode()) if secure else None)


def find_table(options: VLLMConfig, model: str) -> dict[str, Any]:
    """Return `table`, "name@version", and its `blocks`, for the checkpoint in folder `model`.

    Raises NotFoundError if there is no folder, and InvalidArgumentError for each other error.
    """
    if not Path(model).is_dir():
        advice = "download it with `hf download`, and give its folder"
        raise NotFoundError(f"model {model!r} is not a folder: {advice}")
    given = {"options": options.model_dump(), "model": model}
    command = [sys.executable, "-m", "tolhouse.integrations.vllm.resolve"]
    done = subprocess.run(
        command,
        input=json.dumps(given),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=True,
    )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise InvalidArgumentError(answer["error"])
    return answer
