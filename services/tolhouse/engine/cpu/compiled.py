"""Compiles the decode step of a block ahead of time: one C++ call replaces twenty calls of torch.

A converted model has two kinds of blocks, and code for each.

`tolhouse compile` writes the code to disk. A worker runs that command as a child process, and runs
uncompiled until it succeeds. The compiler therefore neither delays the start of the worker nor uses
its memory. A failure is only a warning.
"""

import fcntl
import hashlib
import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tolhouse.config import set_compiler_folder
from tolhouse.engine import attention
from tolhouse.engine.attention import AttentionMetadata, PagedKVCache
from tolhouse.engine.cpu import gathered as sparse
from tolhouse.engine.cpu import packed
from tolhouse.engine.cpu.gathered import gathered
from tolhouse.errors import InternalError, InvalidArgumentError
from tolhouse.logs import event, log
from tolhouse.model import ffn, transformer
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import Block, Transformer

FORMS = "linear", "swiglu", "moc", "avgk"  # of FFN-C
SEQUENCES = {"alone": 1, "several": 3}  # the compiler specialises code for one sequence
DIGESTS = "digests.json"  # the SHA-256 digests of all files of code
_END_SECONDS = 10.0  # the time that a terminated compiler has to remove its files
# Index checks are off, because all indices come from the engine. The thread count is not fixed.
_OPTIONS = {"assert_indirect_indexing": False, "cpp.dynamic_threads": True}


class CompiledDecode:
    """Compiles the decode step of a checkpoint's blocks, or loads it, in a thread."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, cache: str | Path) -> None:
        self.checkpoint, self.dtype, self.cache = checkpoint, dtype, cache
        self.ready = self._stopped = False
        self.code: dict[tuple[str, int], Any] = {}  # by a name of SEQUENCES and a layer
        self.compiler: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._prepare, name="compile", daemon=True)

    @cached_property
    def folder(self) -> Path:
        return cache_folder(self.cache) / key(self.checkpoint, self.dtype)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the compilation, and return whether it succeeded."""
        self._thread.join()
        return self.ready

    def stop(self) -> None:
        """Terminate the compiler if it runs."""
        self._stopped = True
        self._signal(signal.SIGTERM)
        if self._thread.ident:
            self._thread.join(_END_SECONDS)
            self._signal(signal.SIGKILL)
            self._thread.join()

    def attach(self, model: Transformer) -> None:
        """Make the packed blocks of `model` decode with the compiled code."""
        if any(isinstance(module, nn.Linear) for module in model.layers.modules()):
            return
        for layer, block in enumerate(model.layers):
            model.layers[layer] = DecodeBlock(cast("Block", block), layer, self)

    def _prepare(self) -> None:
        started = time.monotonic()
        try:
            if not _is_complete(self.folder):
                self._compile()
            for name, layer in itertools.product(SEQUENCES, kinds(self.checkpoint.config)):
                self.code[name, layer] = load_code(self.folder / file_name(name, layer))
        except (OSError, RuntimeError, InvalidArgumentError) as error:
            if not self._stopped:
                reason = str(error).strip().rpartition("\n")[2]
                log.warning("decoding runs uncompiled, which is slower: %s", reason)
            return
        self.ready = True
        seconds = round(time.monotonic() - started, 1)
        event("decoding is compiled", seconds=seconds, cache=str(self.folder))

    def _compile(self) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        options = "--dtype", dtype, "--compile-cache", str(self.cache), "--background"
        command = [sys.executable, "-m", "tolhouse.cli", "compile", str(self.checkpoint.path)]
        with subprocess.Popen(
            [*command, *options],
            stdin=subprocess.PIPE,  # it closes when this process ends, and then the child ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # A session of its own would be scheduled as a group with a full share of the processor.
            process_group=0,
            encoding="utf-8",
        ) as self.compiler:
            if self._stopped:
                self._signal(signal.SIGTERM)
            message = self.compiler.stderr.read() if self.compiler.stderr else ""
        if self.compiler.returncode:
            raise RuntimeError(message or f"the compiler exited: {self.compiler.returncode}")

    def _signal(self, number: signal.Signals) -> None:
        if self.compiler and self.compiler.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.compiler.pid, number)


class DecodeBlock(nn.Module):
    """A block that decodes with compiled code once it is loaded. Prompts run uncompiled."""

    def __init__(self, block: Block, layer: int, compiled: CompiledDecode) -> None:
        super().__init__()
        self.block, self.layer, self.compiled = block, layer, compiled
        self.state = list(state_of(block).values())
        config = compiled.checkpoint.config
        self.has_row, self.kind = bool(config.num_rows), alike(config, layer)

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: AttentionMetadata,
        row_TD: Tensor | None,
    ) -> Tensor:
        if not self.compiled.ready or not cache.decoding:
            return self.block(x_TD, rope, cache, row_TD)
        if cache.chunks:  # decoding gives the same bits in steps with and without prompts
            count = [cache.decoding, len(x_TD) - cache.decoding]
            rows = [None, None] if row_TD is None else row_TD.split(count)
            ropes = zip(*(part.split(count) for part in rope), strict=True)
            parts = zip(x_TD.split(count), ropes, cache.parts, rows, strict=True)
            return torch.cat([self(*part) for part in parts])
        run = self.compiled.code["alone" if len(x_TD) == 1 else "several", self.kind]
        # The compiled code always adds a row, so a layer without one adds zeros.
        row = [torch.zeros_like(x_TD) if row_TD is None else row_TD] if self.has_row else []
        return run.boxed_run([*self.state, x_TD, *rope, *cache.layer(self.layer), *row])[0]


def compile_decode(checkpoint: Checkpoint, dtype: torch.dtype, cache: str | Path) -> Path:
    """Compile the decode step of a checkpoint if necessary, and return the folder with the code.

    Checkpoints share the code if their shapes and the dtypes of FFN-C are the same.

    One process at a time compiles in `cache`. Other processes wait and use its result.
    """
    config = checkpoint.config
    if config.kind == "flex" and config.ffn_c not in FORMS:
        rule = f"code is compiled for {', '.join(FORMS)}"
        raise InvalidArgumentError(f"FFN-C {config.ffn_c} decodes uncompiled: {rule}")
    folder = cache_folder(cache) / key(checkpoint, dtype)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        advice = "choose a writable folder with --compile-cache"
        reason = f"{folder.parent}: {error.strerror}"
        raise InvalidArgumentError(f"cannot store compiled code: {reason}; {advice}") from None
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(folder):
            for left in folder.parent.glob("compiling-*"):  # folders of killed processes
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="compiling-") as work:
                _compile(checkpoint, dtype, Path(work), folder)
    finally:
        os.close(lock)
    return folder


def cache_folder(cache: str | Path) -> Path:
    """Return the folder `cache`. ~ stands for the home folder.

    Raises InvalidArgumentError if there is no home folder.
    """
    try:
        return Path(cache).expanduser()
    except RuntimeError:
        reason = f"{cache}: there is no home folder"
        advice = "choose a writable folder with --compile-cache"
        raise InvalidArgumentError(f"cannot store compiled code: {reason}; {advice}") from None


def end_with_parent() -> None:
    """Lower the priority of this process, and exit when the parent closes stdin or ends."""

    def wait() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGTERM)

    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that exit handlers remove files
    threading.Thread(target=wait, daemon=True).start()


def _compile(checkpoint: Checkpoint, dtype: torch.dtype, work: Path, folder: Path) -> None:
    warnings.simplefilter("ignore")
    layers = kinds(checkpoint.config)
    set_compiler_folder(f"{work}/inductor")
    try:
        for (name, sequences), layer in itertools.product(SEQUENCES.items(), layers):
            _export(checkpoint, dtype, sequences, layer, work / file_name(name, layer))
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise InternalError(f"compiling needs a C++ compiler such as g++: {reason}") from None
    digests = _digests(work)
    folder.mkdir(exist_ok=True)
    for name in digests:
        (work / name).replace(folder / name)
    (folder / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")


def alike(config: ModelConfig, layer: int) -> int:
    """Return the first layer whose block has the code of `layer`.

    In a converted model, the blocks of converted layers are alike, and so are the others.
    """
    flex = config.flex_layers
    return next(n for n in range(config.num_hidden_layers) if (n in flex) == (layer in flex))


def kinds(config: ModelConfig) -> list[int]:
    """Return one layer for each kind of block."""
    return sorted({alike(config, layer) for layer in range(config.num_hidden_layers)})


def file_name(name: str, layer: int) -> str:
    return f"{name}-{layer}.pt2"


def _export(
    checkpoint: Checkpoint, dtype: torch.dtype, sequences: int, number: int, path: Path
) -> None:
    """Compile the decode step of block `number`, for one sequence or for two and more."""
    config = checkpoint.config
    with torch.device("meta"):
        block = Block(config, number).to(dtype)
        block.mlp = gathered(block.mlp, checkpoint.ffn_dtype)
    packed.pack(block, packed.by_handle)  # no weights: handles identify the linear layers
    block.to_empty(device="cpu").requires_grad_(False)
    pages = PagedKVCache(config, 2 * sequences, torch.device("cpu"), dtype)
    count = torch.zeros(sequences, dtype=torch.int64)
    tables_BC = torch.arange(2 * sequences).view(sequences, 2)
    x_TD = torch.zeros(sequences, config.hidden_size, dtype=dtype)
    rope = list(transformer.rotary(count, config, dtype))
    keys, values = (torch.empty_strided(x.shape, x.stride(), dtype=dtype) for x in pages.layers[0])
    spans_3B = torch.ones(3, sequences, dtype=torch.int64)
    layer = [keys, values, count, count.clone(), tables_BC, spans_3B]
    row = [x_TD.clone()] * bool(config.num_rows)
    inputs = list(state_of(block).values()), x_TD, rope, layer, row
    tokens = {0: torch.export.Dim("T", min=2, max=1 << 20)} if sequences > 1 else {}
    blocks, width = torch.export.Dim("blocks", min=2), torch.export.Dim("C", min=2)
    spans = {1: tokens[0]} if tokens else {}
    tables: list[Any] = [{0: blocks}, {0: blocks}, tokens, tokens, {**tokens, 1: width}, spans]
    shapes: Any = [{} for _ in inputs[0]], tokens, [tokens] * 2, tables, [tokens] * len(row)
    write_code(_Decode(block), inputs, path, shapes)


def write_code(module: nn.Module, inputs: tuple[Any, ...], path: Path, shapes: Any = None) -> None:
    """Compile a module for inputs of these shapes. `shapes` says which sizes may differ."""
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package  # noqa: SLF001 - the documented name
    package(exported, package_path=str(path), inductor_configs=_OPTIONS)


def load_code(path: Path) -> Any:
    # `aoti_load_package` wraps this class, but imports the compiler of torch.
    loader = torch._C._aoti.AOTIModelPackageLoader  # noqa: SLF001
    return loader(str(path), "model", False, 1, -1)


class _Decode(nn.Module):
    """A block as a function of its inputs and its state, as the exporter requires."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.call = lambda *args: functional_call(block, *args)  # hides the state of the block
        self.names = list(state_of(block))

    def forward(
        self,
        state: list[Tensor],
        x_TD: Tensor,
        rope: list[Tensor],
        layer: list[Tensor],
        row: list[Tensor],
    ) -> Tensor:
        named = dict(zip(self.names, state, strict=True))
        return self.call(named, (x_TD, rope, _Layer(layer), row[0] if row else None))


@dataclass
class _Layer:
    """The part of AttentionMetadata that one layer reads."""

    tensors: list[Tensor]

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        keys, values, blocks_T, offsets_T, tables_BC, spans_3B = self.tensors
        attention.write(k_TGE, v_TGE, keys, values, blocks_T, offsets_T)
        return attention.streamed(q_THE, keys, values, tables_BC, spans_3B)


def state_of(block: nn.Module) -> dict[str, Tensor]:
    """Return the state that differs between blocks: norms, and handles of packed matrices."""
    return dict(sorted([*block.named_parameters(), *block.named_buffers()]))


def _is_complete(folder: Path) -> bool:
    """Return whether `folder` has complete and undamaged compiled code.

    The check is necessary because torch runs any bytes in these files.
    """
    try:
        return json.loads((folder / DIGESTS).read_bytes()) == _digests(folder)
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.pt2"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def key(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """Return a digest of what the code depends on.

    This is the shape, the dtype of FFN-C, sources, compiler and processor.
    """
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    processor = next(flags, torch.backends.cpu.get_cpu_capability())
    modules = transformer, ffn, attention, packed, sparse, sys.modules[__name__]
    parts = [inspect.getsource(module) for module in modules]
    parts += [json.dumps(checkpoint.config.to_json()), str(dtype), str(checkpoint.ffn_dtype)]
    parts += [torch.__version__, processor]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
