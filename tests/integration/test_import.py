"""`tolhouse import tensor`, and builds of MoLE checkpoints, through the commands."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tolhouse.cli import main
from tolhouse.store.base import open_store
from tolhouse.store.registry import resolve
from tolhouse.testing import build_table, tiny_model
from torch.nn import functional as F

from tests.commands import LOCAL, tolhouse

TENSOR = "model.embed_tokens_per_layer.weight"
VOCABULARY, BLOCKS, WIDTH = 300, 3, 16


def run(*arguments: object, code: int = 0) -> str:
    """Run a command in this process. Return the table that it prints, or its error for code 1."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert code == result.exit_code, result.output
    return result.stderr.strip() if code else result.stdout.strip()


def stored_rows(url: str, ref: str) -> tuple[tuple[str, ...], np.ndarray]:
    with closing(open_store(url)) as store:
        manifest = resolve(store, ref)
        return manifest.blocks, store.rows(
            manifest, np.arange(manifest.vocab_size, dtype=np.uint32)
        )


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return torch.randn(VOCABULARY, BLOCKS * WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sharded(table: torch.Tensor, tmp_path: Path) -> Path:
    """A folder with the table in the second of two files of an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    files = {"model-00001-of-2.safetensors": {"model.other.weight": torch.ones(8, 4)}}
    files["model-00002-of-2.safetensors"] = {TENSOR: table.bfloat16()}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    places = {tensor: name for name, tensors in files.items() for tensor in tensors}
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


@pytest.fixture
def in_memory(sharded: Path) -> Iterator[str]:
    """The URL of a copy of the folder in fsspec's file system in memory."""
    fs = fsspec.filesystem("memory")
    fs.put(str(sharded), "/bucket/sharded", recursive=True)
    yield "memory://bucket/sharded"
    fs.rm("/bucket", recursive=True)


OPTIONS = ("--blocks", BLOCKS, "--block-prefix", "ple", "--name", "copied", "--shards", 4)


@pytest.mark.parametrize("place", ["folder", "file", "url", "url of a file"])
def test_a_tensor_becomes_a_table(
    place: str, sharded: Path, in_memory: str, table: torch.Tensor, tmp_path: Path
) -> None:
    """A tensor of a folder, a file or a URL gives the same table, whose rows equal the tensor's."""
    file = "model-00002-of-2.safetensors"
    places = {"folder": sharded, "file": sharded / file, "url": in_memory}
    places["url of a file"] = f"{in_memory}/{file}"
    url = f"file://{tmp_path}/tables"
    ref = run("import", "tensor", places[place], TENSOR, *OPTIONS, "--store", url)
    direct = run("import", "tensor", sharded, TENSOR, *OPTIONS, "--store", url)
    blocks, rows = stored_rows(url, ref)
    assert (direct, ("ple.0", "ple.1", "ple.2")) == (ref, blocks)
    expected = table.bfloat16().float().view(VOCABULARY, BLOCKS, WIDTH).numpy()
    assert expected.tobytes() == rows.astype(np.float32).tobytes()


def test_an_import_keeps_complete_shards(sharded: Path, tmp_path: Path) -> None:
    """A second import of a damaged table writes only the missing shard, and the same bytes."""
    url = f"file://{tmp_path}/tables"
    command = ("import", "tensor", sharded, TENSOR, *OPTIONS, "--store", url)
    ref = run(*command)
    before = {p: p.read_bytes() for p in sorted((tmp_path / "tables").rglob("shard-*"))}
    kept = {p: p.stat().st_mtime_ns for p in list(before)[1:]}
    next(iter(before)).unlink()
    assert ref == run(*command)
    assert before == {p: p.read_bytes() for p in sorted((tmp_path / "tables").rglob("shard-*"))}
    assert kept == {p: p.stat().st_mtime_ns for p in kept}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("", ("model.absent.weight",), "has no tensor model.absent.weight; it has .*" + TENSOR),
        ("", (TENSOR, "--blocks", 5), "48 values a row, which --blocks 5 does not divide"),
        (
            "",
            (TENSOR, "--block-prefix", "PLE"),
            "--block-prefix 'PLE' is not allowed: use a lower-case",
        ),
        ("shard", (TENSOR,), "lacks model-00002-of-2.safetensors.*index.json"),
        ("pickle", (TENSOR,), "is not a safetensors file"),
        ("type", (TENSOR,), r"is I8 \[300, 48\]; allowed are matrices"),
        ("missing", (TENSOR,), "there is no file"),
        ("protocol", (TENSOR,), "cannot be read: Protocol not known: nowhere"),
    ],
)
@pytest.mark.parametrize("remote", [False, True], ids=["local", "url"])
def test_bad_input_is_refused_by_name(
    change: str, arguments: tuple, message: str, sharded: Path, tmp_path: Path, *, remote: bool
) -> None:
    """An error names what is wrong with the tensor, the files or the options, also at a URL."""
    file = sharded / "model-00002-of-2.safetensors"
    if change == "shard":
        file.unlink()
    elif change == "pickle":
        file.write_bytes(b"\x80\x04" * 50)
    elif change == "type":
        save_file({TENSOR: torch.ones(300, 48, dtype=torch.int8)}, file)
    place = f"file://{sharded}" if remote else str(sharded)
    place += "/absent" if change == "missing" else ""
    place = "nowhere://bucket/x" if change == "protocol" else place
    message = f"{message}|is no .safetensors file, nor a folder" if change == "missing" else message
    url = f"file://{tmp_path}/tables"
    shown = run("import", "tensor", place, *arguments, "--store", url, code=1)
    assert re.search(message, shown)


def test_the_command_prints_one_line_for_an_error(sharded: Path) -> None:
    """The process ends with status 1 and one line that lists the tensors that there are."""
    done = tolhouse("import tensor", sharded, "absent", "--store", "file:///tmp/none", code=1)
    assert 1 == len(done.stderr.strip().splitlines())
    assert TENSOR in done.stderr


def test_memory_stays_below_four_shards(tmp_path: Path) -> None:
    """The anonymous memory of an import stays below four shards."""
    save_file({"t": torch.ones(65_536, 1024, dtype=torch.bfloat16)}, tmp_path / "t.safetensors")
    code = """if True:
        import sys
        import threading
        from tolhouse.build import job
        from tolhouse.sources.tensor import TensorRows
        from tolhouse.store.base import open_store
        from pathlib import Path

        def anonymous():
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(n.split()[1]) for n in lines if n.startswith("RssAnon"))

        def watch():
            while not done.wait(0.002):
                seen.append(anonymous())

        source = TensorRows(Path(sys.argv[1]), "t", 4)
        planned, store = job.plan(source, "t", "bf16", 4), open_store(sys.argv[2])
        source.rows(planned.shard_ids(0)[:1])
        before, seen, done = anonymous(), [], threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        job.copy(source, planned, [store], 8)
        done.set()
        watcher.join()
        print(max(seen) - before, planned.table_bytes // 4)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "t.safetensors"), f"file://{tmp_path}/s"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    peak, shard = map(int, done.stdout.split())
    assert peak < 4 * shard


# MoLE

LAYERS, EXPERTS, HIDDEN, INNER = 2, 3, 16, 24


def mole(folder: Path, *, stored: bool) -> torch.Tensor:
    """Write a random MoLE checkpoint, and return its rows [V, L * E, D] by the paper's equation."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=draw) * 0.3  # noqa: E731 - short
    state = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN)}
    x, outputs = state["model.embed_tokens.weight"], []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        gain = state[f"{prefix}.expert_layernorm.weight"] = 1 + random(HIDDEN)
        normed = F.rms_norm(x, (HIDDEN,), gain, 1e-6)
        for e in range(EXPERTS):
            up = state[f"{prefix}.experts.{e}.up_proj.weight"] = random(INNER, HIDDEN)
            down = state[f"{prefix}.experts.{e}.down_proj.weight"] = random(HIDDEN, INNER)
            outputs.append(F.gelu(normed @ up.T) @ down.T)
    rows = torch.stack(outputs, 1)
    save_file(
        {"model.moe_table.weight": rows.view(VOCABULARY, -1)} if stored else state,
        folder / "model.safetensors",
    )
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER}
    sizes |= {"num_hidden_layers": LAYERS, "num_experts": EXPERTS}
    about = {"model_type": "llama", "architectures": ["MoleForCausalLM"], "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(about | sizes), encoding="utf-8")
    return rows


@pytest.mark.parametrize("stored", [True, False], ids=["table", "experts"])
def test_a_mole_checkpoint_becomes_a_table(tmp_path: Path, *, stored: bool) -> None:
    """The rows are the outputs of all experts, from the stored table or from the experts."""
    expected, url = mole(tmp_path / "mole", stored=stored).numpy(), f"file://{tmp_path}/tables"
    ref = build_table(tmp_path / "mole", url, codec="fp32", shards=4)
    blocks, rows = stored_rows(url, ref)
    names = [f"expert.{layer}.{e}" for layer in range(LAYERS) for e in range(EXPERTS)]
    assert names == list(blocks)
    assert np.abs(expected - rows).max() < 1e-5


def test_a_build_refuses_what_has_no_rows(tmp_path: Path) -> None:
    """An unknown architecture, experts that are absent, and options of other models are errors."""
    url, folder = f"file://{tmp_path}/tables", tmp_path / "mole"
    mole(folder, stored=False)
    shown = run("build", folder, "--embedding", "yes", "--store", url, code=1)
    assert re.search(r"--embedding.*MemoryLLM.*not mole", shown)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 4}), encoding="utf-8")
    shown = run("build", folder, "--store", url, code=1)
    assert re.search(r"lacks model.layers.0.experts.3.up_proj.weight", shown)
    for field, value, message in (
        ("hidden_size", 0, "must be positive"),
        ("rms_norm_eps", "small", "rms_norm_eps must be a number"),
        ("num_experts", 10**12, "experts; allowed are 65536"),
        ("hidden_size", 8, r"is \[300, 16\] of F32; expected is \[300, 8\]"),
    ):
        wrong = json.dumps({**config, field: value})
        (folder / "config.json").write_text(wrong, encoding="utf-8")
        assert re.search(message, run("build", folder, "--store", url, code=1))
    other = {**config, "model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(other), encoding="utf-8")
    shown = run("build", folder, "--store", url, code=1)
    assert re.search(r"model_type 'bert'.*'memoryllm'", shown)


def test_a_table_of_another_model_is_refused(tmp_path: Path, sharded: Path) -> None:
    """A worker refuses a table that was imported from another model."""
    url = f"file://{tmp_path}/tables"
    ref = run("import", "tensor", sharded, TENSOR, *OPTIONS, "--store", url)
    model = tiny_model(tmp_path / "model")
    done = tolhouse("worker", model, "--rows", url, "--table", ref, *LOCAL, code=1)
    assert ref in done.stderr
    assert "build a table from this checkpoint" in done.stderr
