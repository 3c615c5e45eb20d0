"""The build job on a local Ray: stores, interrupted and repeated builds, and errors."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tolhouse.build.job import build_shards, plan, with_frequent
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.sources.base import open_source
from tolhouse.store.base import open_store
from tolhouse.store.registry import delete, stands_for
from tolhouse.testing import build_table, free_port, tiny_model, wait_until

from tests.commands import start, tolhouse

DEMO = Path("models/demo-memory")
SHARDS = 64
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 32}


def build(*arguments: str | int | Path) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of `tolhouse build`."""
    popen = start("build", *arguments)
    out, err = popen.communicate(timeout=240)
    assert "Traceback" not in err
    return popen.returncode, out.strip(), err


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("shard-*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of an uninterrupted build of the demo model."""
    folder = tmp_path_factory.mktemp("whole")
    build_table(DEMO, f"file://{folder}", codec="bf16", shards=SHARDS)
    return shards(folder)


def wait_for(what, popen: subprocess.Popen, seconds: float = 120):
    """Return the first true value of `what()` while the build runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        assert popen.poll() is None, popen.stderr.read()
        time.sleep(0.002)
    raise AssertionError("the moment never came")


def test_a_build_writes_the_same_rows_to_both_stores(
    checkpoint: Path, tmp_path: Path, redis_url: str
) -> None:
    """Files and Redis get the same records, and these decode to the model's rows, with X0 on
    request."""
    files = f"file://{tmp_path}"
    options = "--codec int8 --shards 7 --name both --embedding yes --publish"
    ref = tolhouse(f"build {checkpoint} --store {files},{redis_url} {options}").stdout.strip()
    opened = open_checkpoint(checkpoint)
    ids = np.arange(opened.config.vocab_size, dtype=np.uint32)
    expected = opened.model().rows(torch.arange(len(ids)), x0=True).transpose(0, 1).numpy()
    records = []
    for url in (files, redis_url):
        with closing(open_store(url)) as store:
            manifest = store.manifest(ref)
            assert ref == f"both@{store.alias('both').version}"
            assert (7, True) == (len(manifest.shards), manifest.has_x0)
            out = np.empty((len(ids), manifest.record_bytes), np.uint8)
            store.read_records(manifest, ids, out)
            records.append(out)
            largest = np.abs(expected).max(axis=-1, keepdims=True)
            error = np.abs(manifest.decode(out) - expected) / largest
            assert error.max() <= manifest.codec.relative_error + 1e-5
    assert records[0].tobytes() == records[1].tobytes()


def test_a_killed_build_resumes_to_the_same_bytes(tmp_path: Path, whole: dict) -> None:
    """A build killed by SIGKILL leaves complete shards, and the next build reuses them."""
    options = (DEMO, "--store", f"file://{tmp_path}", "--shards", SHARDS, "--workers", "1")
    popen = start("build", *options)
    wait_for(lambda: len(shards(tmp_path)) >= 3, popen)
    family = psutil.Process(popen.pid).children(recursive=True)
    popen.kill()
    popen.communicate()
    agents = [p for p in family if "agent" in title(p)]  # these end some time after Ray's raylet
    _, alive = psutil.wait_procs([p for p in family if p not in agents], timeout=60)
    assert [] == alive
    for agent in agents:
        with suppress(psutil.NoSuchProcess):
            agent.kill()
    left = shards(tmp_path)
    assert 3 <= len(left) < SHARDS
    assert [] == list(tmp_path.rglob("manifest.json"))
    assert left.items() <= whole.items()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")}
    code, _, err = build(*options)
    assert 0 == code, err
    assert whole == shards(tmp_path)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}


def test_a_repeated_job_does_not_undo_a_publish(checkpoint: Path, tmp_path: Path) -> None:
    """--publish-new publishes each version once, and a repeated job does not publish it again."""
    url = f"file://{tmp_path}"
    job = (checkpoint, "--store", url, "--name", "job", "--shards", "8", "--publish-new")
    with closing(open_store(url)) as store:
        built = build_table(checkpoint, url, name="job", codec="bf16", publish=False)
        assert built == build(*job)[1].strip()
        assert stands_for(store, built)
        other = build_table(checkpoint, url, name="job", codec="int8")
        code, _, said = build(*job)
        assert (0, True) == (code, f"tolhouse publish {built}" in said)
        assert stands_for(store, other)
        newer = build(*job, "--codec", "fp16")[1].strip()
        assert stands_for(store, newer)
        (tmp_path / "job" / "alias.json").unlink()
        build(*job)
        assert stands_for(store, built)


def test_a_killed_ray_worker_does_not_fail_the_build(tmp_path: Path, whole: dict) -> None:
    """Ray repeats the tasks of a worker process that is killed by SIGKILL."""
    popen = start(f"build {DEMO} --store file://{tmp_path} --shards {SHARDS} --workers 1")
    wait_for(lambda: len(shards(tmp_path)) >= 3, popen)
    family = psutil.Process(popen.pid)

    def workers() -> list[psutil.Process]:
        return [p for p in family.children(recursive=True) if "build_shard" in title(p)]

    wait_for(workers, popen)[0].kill()
    out, err = popen.communicate(timeout=240)
    assert 0 == popen.returncode, err
    assert "demo-memory@" in out
    assert whole == shards(tmp_path)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).lower()
    except psutil.Error:
        return ""


def test_a_second_build_repairs_damaged_shards(checkpoint: Path, tmp_path: Path) -> None:
    """A second build rewrites truncated, altered and missing shards, and keeps the intact one."""
    url = f"file://{tmp_path}"
    build_table(checkpoint, url, codec="bf16", shards=4)
    before = shards(tmp_path)
    files = sorted(tmp_path.rglob("shard-*"))
    files[0].write_bytes(before[files[0].name][:-100])
    altered = bytearray(before[files[1].name])
    altered[-20] ^= 1
    files[1].write_bytes(altered)
    files[2].unlink()
    whole_since = files[3].stat().st_mtime_ns
    planned = plan(open_source(checkpoint), "", "bf16", 4)
    repaired = build_shards(str(checkpoint), planned, [*range(4)], (url,), 10.0)
    assert [True, True, True, False] == [computed for _, computed in repaired]
    assert before == shards(tmp_path)
    assert whole_since == files[3].stat().st_mtime_ns


def test_a_complete_table_needs_no_ray(checkpoint: Path, tmp_path: Path, redis_url: str) -> None:
    """A build uses Ray only if a store lacks shards of the table or the corpus differs. By default
    a stored table keeps its number of shards."""
    files = f"file://{tmp_path}"
    options = "--name found --ray-address 127.0.0.1:1"
    ref = build_table(
        checkpoint, files, redis_url, codec="bf16", shards=4, name="found", publish=False
    )
    both = f"build {checkpoint} --store {files},{redis_url} {options}"
    found = tolhouse(both)
    assert ref == found.stdout.strip()
    assert "the table is complete" in found.stderr
    with closing(open_store(redis_url)) as store:
        delete(store, ref, force=True)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("self.items", encoding="utf-8")
    assert "no Ray cluster" in tolhouse(both, code=1).stderr
    alone = f"build {checkpoint} --store {files} {options}"
    assert "no Ray cluster" in tolhouse(f"{alone} --corpus {corpus}", code=1).stderr
    assert "the table is complete" in tolhouse(f"{alone} --publish").stderr
    with closing(open_store(files)) as store:
        assert stands_for(store, ref)
    next(tmp_path.rglob("shard-*")).unlink()
    assert "no Ray cluster" in tolhouse(alone, code=1).stderr


@pytest.mark.parametrize("layout", ["hashes", "keys"])
def test_a_table_is_copied_from_files_to_redis(
    checkpoint: Path, tmp_path: Path, redis_url: str, layout: str
) -> None:
    """A build copies shards between stores if one store has the complete table."""
    redis_url = f"{redis_url}?layout={layout}"
    files = f"file://{tmp_path}"
    ref = build_table(checkpoint, files, codec="fp16", shards=4, name=layout)
    planned = plan(open_source(checkpoint), layout, "fp16", 4)
    copied = build_shards(str(checkpoint), planned, [*range(4)], (files, redis_url), 10.0)
    assert [False] * 4 == [computed for _, computed in copied]
    with closing(open_store(redis_url)) as store:
        held = sum(store.count(planned, shard) for shard in range(4))
    assert (ref, planned.vocab_size) == (planned.ref, held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--codec", "int3"), "int3"),
        (("--shards", "-1"), "TOLHOUSE_BUILD_SHARDS"),
        (("--shards", "60000"), "at most one shard per token"),
        (("--store", "ftp://x"), "not understood"),
        (("--store", "redis://127.0.0.1:1"), "cannot be reached"),
        (("--name", "new", "--ray-address", "127.0.0.1:1"), "no Ray cluster"),
        (("--name", "new", "--ray-address", "nowhere"), "no Ray cluster"),
        (("--name", "../up"), "not allowed"),
        (("--shards", "3"), "delete it first"),
        (("--frobnicate",), "No such option"),
    ],
)
def test_bad_options_are_refused_with_a_clear_error(
    options: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    """A bad option gives an exit code and an error on stderr, and changes no existing table."""
    store = f"file://{tmp_path}"
    build_table(checkpoint, store, codec="bf16", shards=4)
    before = shards(tmp_path)
    code, out, err = build(checkpoint, "--store", store, "--shards", "4", *options)
    assert code in (1, 2)
    assert "" == out
    assert message in err
    assert before == shards(tmp_path)


@pytest.mark.parametrize(
    ("tied", "embedding", "x0"),
    [
        *((False, "auto", True), (False, "no", False)),
        *((True, "auto", False), (True, "yes", True)),
    ],
)
def test_a_table_has_x0_if_embeddings_are_untied_or_on_request(
    tied: bool, embedding: str, x0: bool, tmp_path: Path
) -> None:
    """`--embedding` decides whether rows include x0, and the default depends on the checkpoint."""
    path = tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    ref = build_table(path, f"file://{tmp_path}", shards=3, embedding=embedding)
    model, ids = open_checkpoint(path).model(), np.array([7, 300, 9], np.uint32)
    with closing(open_store(f"file://{tmp_path}")) as store:
        manifest = store.manifest(ref)
        records = np.empty((3, manifest.record_bytes), np.uint8)
        store.read_records(manifest, ids, records)
    assert x0 == manifest.has_x0
    expected = model.rows(torch.from_numpy(ids.astype(np.int64)), x0).transpose(0, 1)
    torch.testing.assert_close(expected, torch.from_numpy(manifest.decode(records).copy()))


def test_a_checkpoint_without_rows_and_a_bad_checkpoint_are_refused(tmp_path: Path) -> None:
    """A base model, a missing folder and a malformed checkpoint each give a clear error."""
    base = tiny_model(tmp_path / "base", "base")
    assert "no context-free FFNs" in build(base)[2]
    assert "no context-free FFNs" in build(base, "--embedding", "yes")[2]
    assert "no checkpoint at" in build(tmp_path / "nothing")[2]
    (base / "config.json").write_text("{", encoding="utf-8")
    assert "not JSON" in build(base)[2]


def test_a_build_fails_if_its_store_is_not_writable(checkpoint: Path, tmp_path: Path) -> None:
    """A build fails if a file is in the place of the store's folder."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    code, _, err = build(checkpoint, "--store", f"file://{blocked}")
    assert 1 == code
    assert "is a file, not a folder" in err


def test_the_manifest_lists_the_corpus_tokens_by_frequency(
    checkpoint: Path, tmp_path: Path
) -> None:
    """`--corpus` decides which tokens are frequent, but it changes neither rows nor version."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("self.items self.items self.items def", encoding="utf-8")
    (corpus / "b.bin").write_bytes(b"\xff\xfe\x00")
    urls = f"file://{tmp_path}/counted", f"file://{tmp_path}/uncounted"
    code, ref, err = build(checkpoint, "--store", urls[0], "--shards", "2", "--corpus", corpus)
    assert 0 == code, err
    assert ref == build_table(checkpoint, urls[1], codec="bf16", shards=2)
    manifests = []
    for url in urls:
        with closing(open_store(url)) as store:
            manifests.append(store.manifest(ref))
    counted, uncounted = manifests
    assert counted.shards == uncounted.shards
    usual = with_frequent(checkpoint, uncounted, "")
    tokenizer = open_checkpoint(checkpoint).tokenizer()
    ids = tokenizer.encode((corpus / "a.txt").read_text(encoding="utf-8")).ids
    counts = {i: ids.count(i) for i in ids}
    assert sorted(counts, key=lambda i: (-counts[i], i)) == list(counted.frequent)
    assert len(counted.frequent) < len(usual.frequent) <= usual.vocab_size


def test_a_corpus_without_text_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A build without a readable corpus fails with one line and writes no table."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for corpus, message in (("nowhere", "no corpus at"), ("binary", "holds no text")):
        options = f"--store file://{tmp_path}/tables --corpus {tmp_path / corpus}"
        assert message in tolhouse(f"build {checkpoint} {options}", code=1).stderr
    assert not (tmp_path / "tables").exists()


def test_shards_built_together_equal_shards_built_one_by_one(
    checkpoint: Path, tmp_path: Path, redis_url: str
) -> None:
    """Shards built together have the same bytes as shards built one at a time, and shards that one
    store has are copied to the other."""
    planned = plan(open_source(checkpoint), "overlap", "int4", 5)
    alone, both = (f"file://{tmp_path}/alone",), (f"file://{tmp_path}/both", redis_url)
    path, every = str(checkpoint), [*range(5)]
    one_by_one = [build_shards(path, planned, [shard], alone, 10.0)[0] for shard in every]
    assert [True] * 5 == [new for _, new in one_by_one]
    assert one_by_one == build_shards(path, planned, every, both, 10.0)
    with closing(open_store(redis_url)) as store:
        store.delete_records(planned.ref)
        copied = build_shards(path, planned, every, both, 10.0)
        assert [(digest, False) for digest, _ in one_by_one] == copied
        sizes = [len(planned.shard_ids(shard)) for shard in every]
        assert sizes == [store.count(planned, shard) for shard in every]


def test_memory_does_not_grow_with_the_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    """Peak memory stays below the size of a few shards, whatever their number."""
    code = """if True:
        import sys
        from pathlib import Path
        from tolhouse.build.job import build_shards, plan
        from tolhouse.sources.base import open_source

        def kilobytes(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field))

        path, count, url = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        planned = plan(open_source(path), "memory", "fp32", 8)
        build_shards(path, planned, [0, 1], (url,), 10.0)
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        build_shards(path, planned, list(range(2, 2 + count)), (url,), 10.0)
        shard = planned.record_bytes * len(planned.shard_ids(0))
        print((kilobytes("VmHWM") - before) * 1024, shard)
    """
    big = tiny_model(tmp_path / "big", hidden_size=768, num_hidden_layers=8, vocab_size=8192)
    for shards in (1, 6):
        command = [sys.executable, "-c", code, str(big), str(shards), f"file://{tmp_path}/{shards}"]
        shown = subprocess.run(
            command, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout
        above, shard = map(int, shown.split())
        assert above < 4 * shard


def test_ray_restarts_after_its_node_dies_and_needs_no_home(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build restarts Ray if its node dies at start, and it needs no writable home folder."""
    monkeypatch.setenv("HOME", "/proc")
    popen = start(f"build {checkpoint} --store file://{tmp_path} --shards 2")
    build = psutil.Process(popen.pid)

    def node() -> psutil.Process | None:
        family = build.children(recursive=True)
        return next((p for p in family if "raylet/raylet" in title(p)), None)

    wait_for(node, popen).kill()
    out, err = popen.communicate(timeout=240)
    assert 0 == popen.returncode, err
    assert "Ray did not start on this machine" in err
    assert "Traceback" not in err
    assert out.strip()


def quick_build(checkpoint: Path, folder: Path) -> str:
    """Return a build command that counts tokens in a short text."""
    (folder / "text.txt").write_text("def add(a, b):", encoding="utf-8")
    return f"build {checkpoint} --store file://{folder} --shards 2 --corpus {folder}/text.txt"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RAY_TMPDIR", f"/tmp/{'x' * 100}", "Ray did not start on this machine: .*AF_UNIX path"),
        ("RAY_ADDRESS", "auto", "no Ray cluster at 'auto': "),
        ("RAY_ADDRESS", "nonsense", "no Ray cluster at 'nonsense': "),
        ("RAY_ADDRESS", "ray://[::1]:9", r"no Ray cluster at ray://\[::1\]:9: "),
        ("RAY_ADDRESS", "::1:9", "address '::1:9' is not HOST:PORT"),
    ],
)
def test_a_failure_of_ray_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    message: str,
) -> None:
    """The last line of stderr is the error, and stdout is empty."""
    monkeypatch.setenv(name, value)
    try:
        done = tolhouse(quick_build(checkpoint, tmp_path), code=1)
    finally:
        shutil.rmtree(value, ignore_errors=True)
    assert re.match(f"error: {message}", done.stderr.splitlines()[-1])
    assert not done.stdout


def test_an_address_that_does_not_answer_is_no_cluster(checkpoint: Path, tmp_path: Path) -> None:
    """A build does not wait for Ray, which would retry for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = tolhouse(f"{quick_build(checkpoint, tmp_path)} --ray-address {address}", code=1)
    message = f"error: no Ray cluster at {address}: no answer within "
    assert done.stderr.splitlines()[-1].startswith(message)


def test_messages_of_ray_do_not_reach_stdout(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stdout holds only the table's name, even if Ray writes its logs to the terminal."""
    monkeypatch.setenv("RAY_LOG_TO_STDERR", "1")
    popen = start(quick_build(checkpoint, tmp_path))
    out, err = popen.communicate(timeout=240)
    assert popen.returncode == 0, err
    assert re.fullmatch(r"tiny-memory@[0-9a-f]{16}\n", out)
    assert "gcs_server" in err  # on a busy machine, also tracebacks of Ray's agents


def test_an_interrupted_build_ends_without_a_traceback(checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C while Ray starts also ends Ray's processes."""
    popen = start(quick_build(checkpoint, tmp_path))
    build = psutil.Process(popen.pid)
    wait_for(lambda: build.children(recursive=True), popen)
    family = build.children(recursive=True)
    popen.send_signal(signal.SIGINT)
    out, err = popen.communicate(timeout=240)
    assert (1, "") == (popen.returncode, out)
    assert "Traceback" not in err
    wait_until(lambda: not any(p.is_running() for p in family))


@pytest.fixture
def token_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Callable]]:
    """Yield the address of a Ray cluster without cores, and a function that adds a node.

    The cluster requires a token. The function takes the number of cores.
    """
    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need a short path
    head = f"--head --include-dashboard=false --port={port} --num-cpus=0 --temp-dir={folder}"
    started: list[subprocess.Popen] = []

    def ray(options: str) -> None:
        options += f" --object-store-memory={80 << 20} --node-ip-address=127.0.0.1 --block"
        options += " --min-worker-port=0 --max-worker-port=0"  # any but `port`
        command = [Path(sys.executable).parent / "ray", "start", *options.split()]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, **TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        started.append(subprocess.Popen(command, env=environment, **silent))

    def node(cores: int) -> None:
        ray(f"--address=127.0.0.1:{port} --num-cpus={cores}")

    ray(head)
    try:
        wait_until(lambda: not socket.create_connection(("127.0.0.1", port), 1).close())
        yield f"127.0.0.1:{port}", node
    finally:
        family = [p for s in started for p in psutil.Process(s.pid).children(recursive=True)]
        for one in (*started, *family):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        for one in started:
            one.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_an_unusable_cluster_is_an_error_and_new_nodes_are_used(
    token_cluster: tuple[str, Callable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build fails without the cluster's token or a free core, and uses nodes that join later."""
    address, add_node = token_cluster
    big = tiny_model(tmp_path / "big", hidden_size=768, num_hidden_layers=8, vocab_size=8192)
    line = f"build {big} --store file://{tmp_path}/tables --shards 256 --ray-address {address}"
    monkeypatch.setenv("HOME", str(tmp_path))  # the real home may hold a Ray token
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)  # a build in this process sets it
    assert "wants a token" in tolhouse(line, code=1).stderr
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "y" * 32)
    assert "wants another token" in tolhouse(line, code=1).stderr
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN["RAY_AUTH_TOKEN"])
    assert "none of the 0 cores" in tolhouse(f"{line} --ray-wait-seconds 1", code=1).stderr
    add_node(1)
    popen = start(f"{line} --ray-wait-seconds 120")

    def tasks() -> int:
        return sum("ray::build_shards" in title(p) for p in psutil.process_iter())

    wait_for(tasks, popen)
    add_node(3)
    wait_for(lambda: tasks() > 2, popen)
    out, err = popen.communicate(timeout=240)
    assert (0, "big@") == (popen.returncode, out[:4]), err
