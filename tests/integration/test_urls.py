"""Checkpoints, GGUF files and tensors at URLs, through the commands."""

import functools
import http.server
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file
from tolhouse.cli import main
from tolhouse.testing import build_table, tiny_model

from tests.integration.test_import_gguf import write


def run(*arguments: object, code: int = 0) -> str:
    """Run a command in this process. Return what it prints, or its error for code 1."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert code == result.exit_code, result.output
    return " ".join(result.stderr.split()) if code else result.stdout.strip()


@contextmanager
def in_memory(folder: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/bucket", recursive=True)
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


class Handler(http.server.SimpleHTTPRequestHandler):
    failing = "no file"  # this file has the status 503

    def send_head(self) -> Any:
        if self.path.endswith(f"/{self.failing}"):
            return self.send_error(503)
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def over_http(folder: Path, kind: type[Handler] = Handler) -> Iterator[str]:
    """Serve a folder. This server ignores ranges, and lists folders as pages."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(kind, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(params=[in_memory, over_http], ids=["memory", "http"])
def served(request: pytest.FixtureRequest) -> Callable:
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `flex` and `dense`, of which the second is sharded."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "flex", "flex", 1)
    dense = tiny_model(folder / "dense", "base")
    shard(dense)
    return folder


def shard(folder: Path) -> None:
    """Distribute the weights of a checkpoint over two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def test_every_command_reads_urls(models: Path, tmp_path: Path, served: Callable) -> None:
    """build, compress, convert and import make the same of a URL as of a folder, and leave no
    copy."""
    store = f"file://{tmp_path}/tables"
    expected = build_table(models / "flex", store, codec="bf16")
    text, tensor = ("--text", __file__, "--layers", "1"), "model.embed_tokens.weight"
    write(models / "m.gguf")
    with served(models) as url, pytest.MonkeyPatch.context() as patch:
        (tmp_path / "temporary").mkdir()
        patch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        assert expected == run("build", f"{url}/flex", "--store", store)
        assert "flex@" in run("compress", f"{url}/flex/", "--codec", "int4", "--store", store)
        for name, place in enumerate(("dense", "flex", "flex/model.safetensors")):
            one, other = (
                run("import", "tensor", at, tensor, "--name", f"t{name}", "--store", store)
                for at in (f"{url}/{place}", models / place)
            )
            assert one == other
        made = [tmp_path / "of-url", tmp_path / "of-folder"]
        for at, out in zip((f"{url}/dense", models / "dense"), made, strict=True):
            run("convert", at, *text, "--out", out, "--name", "c", "--store", store)
        for at, out in zip((f"{url}/m.gguf", models / "m.gguf"), made, strict=True):
            run("import", "gguf", at, "--out", out / "gguf")
        for file in sorted(made[1].rglob("*.*")):
            relative = file.relative_to(made[1])
            assert file.read_bytes() == (made[0] / relative).read_bytes()
        assert [] == list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("absent", "there is no file .*absent/config.json"),
        ("lacks-weights", r"lacks-weights is no .safetensors file, nor a folder"),
        ("lacks-shard", r"lacks-shard lacks model-00002-of-00002.safetensors, which model"),
        ("truncated", r"truncated/model-00001-of-00002.safetensors is not a safetensors file"),
        ("outside", "must have a weight_map from tensors to .safetensors files of its folder"),
        ("unknown", r"unknown/config.json: model_type 'x' has no rows that can be built"),
    ],
)
def test_defects_name_the_url(
    models: Path, tmp_path: Path, served: Callable, place: str, message: str
) -> None:
    """An error about files at a URL names the URL, and not its copy."""
    folder = tmp_path / "served" / place
    if place != "absent":
        shutil.copytree(models / "dense", folder)
    parts = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    if place == "lacks-weights":
        index.unlink()
    elif place == "lacks-shard":
        parts[1].unlink()
    elif place == "truncated":
        parts[0].write_bytes(parts[0].read_bytes()[:-1])
    elif place == "outside":
        index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}), encoding="utf-8")
    elif place == "unknown":
        config.write_text(json.dumps({"model_type": "x"}), encoding="utf-8")
    (tmp_path / "served").mkdir(exist_ok=True)
    with served(tmp_path / "served") as url:
        shown = run("build", f"{url}/{place}", "--store", f"file://{tmp_path}/tables", code=1)
    assert re.search(message, shown)
    assert url in shown or "bucket" in shown
    assert "tolhouse-" not in shown


def test_urls_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown protocol, a missing package, an unreachable server, and commands that read
    folders only give errors that say what to do."""
    store = ("--store", f"file://{tmp_path}/tables")
    assert "Protocol not known: nowhere" in run("build", "nowhere://x", *store, code=1)
    if find_spec("aiohttp"):
        shown = run("build", "http://127.0.0.1:1/model", *store, code=1)
        assert "http://127.0.0.1:1/model cannot be read: Cannot connect to host" in shown
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for command in (("build",), ("import", "gguf", "--out", tmp_path / "x")):
        shown = run(
            *command, "s3://bucket/model", *(store if command == ("build",) else ()), code=1
        )
        assert "the package s3fs is not installed: pip install s3fs" in shown
    shown = run("worker", "s3://bucket/model", code=2)
    assert "s3://bucket/model is not a folder of this machine" in shown
    shown = run("build", "s3://bucket/model", *store, "--ray-address", "head:6379", code=1)
    assert "--ray-address must be local for s3://bucket/model" in shown
    monkeypatch.setitem(sys.modules, "fsspec", None)
    shown = run("build", "s3://bucket/model", *store, code=1)
    assert "the package fsspec is not installed: pip install 'tolhouse[build]'" in shown


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("flex", "tokenizer.json"),
        ("flex", "model.safetensors"),
        ("dense", "model.safetensors.index.json"),
    ],
)
def test_a_file_that_the_server_cannot_send_is_not_absent(
    models: Path, tmp_path: Path, model: str, file: str
) -> None:
    """A table is not built without the tokenizer because its server fails for a moment."""
    kind = type("Failing", (Handler,), {"failing": file})
    commands = ("build",), ("import", "tensor", "model.embed_tokens.weight", "--name", "t")
    store = "--store", f"file://{tmp_path}/tables"
    with over_http(models, kind) as url:
        for command in commands:
            at = 2 if command[0] == "import" else 1
            shown = run(*command[:at], f"{url}/{model}", *command[at:], *store, code=1)
            assert re.search(rf"{url}/{model} cannot be read: .*503.*{file}", shown)
    assert not (tmp_path / "tables").exists()


class Hiding(Handler):
    """Sends 403 for absent files, as S3 does without the permission to list."""

    def send_head(self) -> Any:
        if not Path(self.translate_path(self.path)).exists():
            return self.send_error(403)
        return super().send_head()


@contextmanager
def hiding_in_memory(folder: Path) -> Iterator[str]:
    info = MemoryFileSystem.info

    def hiding(fs: MemoryFileSystem, path: str, **options: Any) -> Any:
        try:
            return info(fs, path, **options)
        except FileNotFoundError:
            raise PermissionError("403 Forbidden") from None

    with in_memory(folder) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", hiding)
        yield url


@pytest.mark.parametrize(
    "served",
    [hiding_in_memory, functools.partial(over_http, kind=Hiding)],
    ids=["memory", "http"],
)
def test_an_absent_file_may_be_forbidden(models: Path, tmp_path: Path, served: Callable) -> None:
    """Models are read from a server that answers 403 for their absent files."""
    store = "--store", f"file://{tmp_path}/tables"
    tensor = "model.embed_tokens.weight", "--name", "t"
    expected = build_table(models / "flex", store[1], codec="bf16")
    with served(models) as url:
        assert expected == run("build", f"{url}/flex", *store)
        assert "t@" in run("import", "tensor", f"{url}/dense", *tensor, *store)


def test_a_forbidden_model_is_not_read(models: Path, tmp_path: Path) -> None:
    """If a server answers 403 for all files of a model, the error has the status."""
    store = "--store", f"file://{tmp_path}/tables"
    with over_http(models, Hiding) as url:
        for command in (("build",), ("import", "tensor")):
            tensor = ("model.embed_tokens.weight", "--name", "t") if command[1:] else ()
            shown = run(*command, f"{url}/no", *tensor, *store, code=1)
            assert re.search(f"{url}/no cannot be read: .*403", shown)


def test_errors_do_not_show_secrets_of_urls(models: Path, tmp_path: Path) -> None:
    """Messages name a URL without user, password and query."""
    url = "http://someone:hunter2@127.0.0.1:9/model?signature=hunter3"
    message = run("build", url, code=1)
    assert "http://127.0.0.1:9/model" in message
    assert not re.search("someone|hunter", message)
    with over_http(models / "flex") as address:  # the URL has no name for the table
        url = address.replace("://", "://someone:hunter2@")
        message = run("build", url, "--store", f"file://{tmp_path}/tables", code=1)
    assert "is not allowed" in message
    assert not re.search("someone|hunter", message)
