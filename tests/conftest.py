"""Real servers and checkpoints that several test files share, each started or made once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tolhouse.testing import redis_cluster, redis_server, tiny_model

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models, and many processes on few cores: threads would wait for each other
os.environ["TOLHOUSE_WORKER_COMPILE"] = "never"  # of the many workers that tests start; test_attention.py compiles
settings.register_profile("tolhouse", deadline=None, max_examples=60)
settings.load_profile("tolhouse")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def redis_cluster_url() -> Iterator[str]:
    with redis_cluster() as url:
        yield url


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("checkpoints") / "tiny-memory")


@pytest.fixture(scope="session")
def flex_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("checkpoints") / "tiny-flex", "flex", 3)
