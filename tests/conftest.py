"""Servers and checkpoints that several test files share. Each is started or created once."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tolhouse import testing
from tolhouse.certs import ensure_authority, issue
from tolhouse.integrations.vllm.versions import installed
from tolhouse.testing import build_table, redis_cluster, redis_server, tiny_model

from tests import preloaded

# Tests fork processes that use gRPC, whose fork support can abort in the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# tests run many processes with tiny models on few cores, so that more threads would only wait
os.environ["OMP_NUM_THREADS"] = "1"
# for the many workers that tests start; test_compiled.py and test_wide.py compile
os.environ["TOLHOUSE_WORKER_COMPILE"] = "never"
# torch's compiler would set it, and commands could then not be forks of one interpreter
folder = str(Path(tempfile.gettempdir(), "tolhouse-compiler"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
# a shell's background job ignores SIGINT, and child processes would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
preloaded.ENVIRONMENT.update(os.environ)
testing.start_process = preloaded.Popen
settings.register_profile("tolhouse", deadline=None, max_examples=60)
settings.load_profile("tolhouse")

FOLDERS = Path(__file__).parent
collect_ignore = [] if installed() else ["vllm"]  # `make vllm-test` runs these


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder, so that `-m unit` selects tests/unit."""
    for item in items:
        item.add_marker(item.path.relative_to(FOLDERS).parts[0])


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """Remove variables that a test's commands set in this process, such as those of Ray.

    With other variables, commands of later tests could not be forks of one interpreter.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def redis_cluster_url() -> Iterator[str]:
    with redis_cluster() as nodes:
        yield nodes[0].url


@pytest.fixture(params=["file", "redis", "cluster", "redis-keys", "cluster-keys"])
def store_url(
    request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, redis_cluster_url: str
) -> str:
    """A store of each kind. In `keys`, Redis has a key per record in place of a hash per shard."""
    kind, _, layout = request.param.partition("-")
    urls = {"file": f"file://{tmp_path}", "redis": redis_url, "cluster": redis_cluster_url}
    return urls[kind] + "?layout=keys" * bool(layout)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("checkpoints") / "tiny-memory")


@pytest.fixture(scope="session")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A read-only store with the table of `checkpoint`."""
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    build_table(checkpoint, url)
    return url


@pytest.fixture(scope="session")
def flex_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("checkpoints") / "tiny-flex", "flex", 3)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model without rows."""
    return tiny_model(tmp_path_factory.mktemp("checkpoints") / "tiny-base", "base")


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority, ca.pem, and certificates of a local service and of a
    client."""
    folder = tmp_path_factory.mktemp("pki")
    ensure_authority(folder)
    issue(folder, "service", ["localhost", "127.0.0.1"])
    issue(folder, "client", [])
    return folder
