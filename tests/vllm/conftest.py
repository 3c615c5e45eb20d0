"""Settings of vLLM for small machines, and checkpoints with their tables."""

import os
import subprocess
from pathlib import Path

import pytest
from tolhouse import testing

from tests.vllm.engines import Case, flex_case, memory_case

# The environment of vLLM has no Ray, which the forked interpreter of other tests imports.
testing.start_process = subprocess.Popen


@pytest.fixture(scope="session", autouse=True)
def _settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set variables of vLLM: little memory, and compiled code of this session only."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("vllm"))
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # by default, kernels multiply in TF32
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("TOLHOUSE_WORKER_COMPILE", None)


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return memory_case(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="session")
def flex(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return flex_case(tmp_path_factory.mktemp("flex"))


@pytest.fixture(scope="session")
def tables(memory: Case) -> Path:
    """The folder of the tables of `memory`."""
    return Path(memory.rows.removeprefix("file://"))
