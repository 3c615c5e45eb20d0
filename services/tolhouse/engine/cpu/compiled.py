"""A block's decode step compiled ahead of time: one call into C++ per layer in place of some twenty of torch's.

The compiler runs in a process of its own, `python -m tolhouse.engine.cpu.compiled`, while the worker loads and serves uncompiled: it
neither delays a start nor takes the worker's memory, and its failure is a warning. The result is kept on disk for the next start.
"""

import dataclasses
import fcntl
import hashlib
import inspect
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tolhouse.config import set_compiler_folder
from tolhouse.engine import attention
from tolhouse.engine.attention import AttentionMetadata, PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS
from tolhouse.engine.cpu import packed
from tolhouse.logs import event, log
from tolhouse.model import transformer
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import Block, Transformer

_ALONE, _SEVERAL = "alone.pt2", "several.pt2"  # one sequence is a case of its own to a compiler
_SUMS = "sums.json"  # of the two
_TURN_SECONDS = 0.2  # between two tries for the lock
_OPTIONS = {
    "assert_indirect_indexing": False,
    "cpp.dynamic_threads": True,
}  # ids are ours; any number of threads


class Compiled:
    """The decode step of a shape's blocks, once it is there."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, cache: str | Path) -> None:
        self.config, self.dtype = config, dtype
        self.cache = cache
        self.ready = self._stopped = False
        self.compiler: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._prepare, name="compile", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> bool:
        """Whether it worked, once that is known."""
        self._thread.join()
        return self.ready

    def stop(self) -> None:
        self._stopped = True
        self._end()
        if self._thread.ident:
            self._thread.join()

    def _end(self) -> None:
        """End the compiler and what it has started."""
        if self.compiler and self.compiler.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.compiler.pid, signal.SIGKILL)

    def attach(self, model: Transformer) -> None:
        """Let the blocks of a packed `model` take their decode steps here; one that could not be packed stays as it is."""
        if any(isinstance(module, nn.Linear) for module in model.layers.modules()):
            return
        for layer, block in enumerate(model.layers):
            model.layers[layer] = DecodeBlock(cast("Block", block), layer, self)

    def _prepare(self) -> None:
        started = time.monotonic()
        try:
            self.folder = Path(self.cache).expanduser() / _key(self.config, self.dtype)
            try:
                self._load()
            except RuntimeError:  # nothing is kept, or it is damaged
                self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with self._turn():
                    try:
                        self._load()
                    except RuntimeError:  # nor has another worker made it meanwhile
                        self._compile()
                        self._load()
        except (OSError, RuntimeError) as error:
            if self._stopped:
                return
            reason = str(error).strip().rpartition("\n")[2]
            log.warning(
                "decoding is not compiled, and slower for it (a C++ compiler such as g++ is needed): %s",
                reason,
            )
            return
        self.ready = True
        event(
            "decoding is compiled",
            seconds=round(time.monotonic() - started, 1),
            cache=str(self.folder),
        )

    def _load(self) -> None:
        try:
            sums = json.loads((self.folder / _SUMS).read_text())
            whole = all(_sum(self.folder / name) == sums[name] for name in (_ALONE, _SEVERAL))
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:  # torch would run whatever is in them
            raise RuntimeError(f"{self.folder} is not there, or damaged")
        # what torch's own `aoti_load_package` wraps; that one imports the compiler, 90 MB
        self.alone, self.several = (
            torch._C._aoti.AOTIModelPackageLoader(str(self.folder / name), "model", False, 1, -1)  # noqa: SLF001
            for name in (_ALONE, _SEVERAL)
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Of all workers that share the cache, one compiles at a time: the others then find it done."""
        lock = os.open(self.folder.parent, os.O_RDONLY)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self._stopped:
                        raise RuntimeError("stopped") from None
                    time.sleep(_TURN_SECONDS)
            yield
        finally:
            os.close(lock)

    def _compile(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix="compiling-") as work:
            task = json.dumps(
                {
                    "config": dataclasses.asdict(self.config),
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "folder": work,
                }
            )
            command = [sys.executable, "-m", "tolhouse.engine.cpu.compiled", task]
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            ) as self.compiler:
                if self._stopped:
                    self._end()
                assert self.compiler.stderr
                told = (
                    self.compiler.stderr.read()
                )  # its stdin stays open for as long as this process lives
            if self.compiler.returncode:
                raise RuntimeError(told or f"the compiler ended with {self.compiler.returncode}")
            self.folder.mkdir(exist_ok=True)
            sums = {name: _sum(Path(work) / name) for name in (_ALONE, _SEVERAL)}
            for name in sums:
                (Path(work) / name).replace(self.folder / name)
            (self.folder / _SUMS).write_text(json.dumps(sums))


def _sum(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


class DecodeBlock(nn.Module):
    """A block that runs compiled where all sequences of a step decode and its code is there, and as it is elsewhere."""

    def __init__(self, block: Block, layer: int, compiled: Compiled) -> None:
        super().__init__()
        self.block, self.layer, self.compiled = block, layer, compiled
        self.state = list(_state(block).values())
        self.has_row = bool(compiled.config.num_rows)

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: AttentionMetadata,
        row_TD: Tensor | None,
    ) -> Tensor:
        if cache.chunks or not self.compiled.ready:
            return self.block(x_TD, rope, cache, row_TD)
        run = self.compiled.alone if len(x_TD) == 1 else self.compiled.several
        if (
            row_TD is None and self.has_row
        ):  # absent from the table: the compiled step adds one all the same
            row_TD = torch.zeros_like(x_TD)
        row = [] if row_TD is None else [row_TD]
        return run.boxed_run([*self.state, x_TD, *rope, *cache.layer(self.layer), *row])[0]


def _state(block: nn.Module) -> dict[str, Tensor]:
    """What tells one block from another: norms, and handles of packed matrices."""
    return dict(sorted([*block.named_parameters(), *block.named_buffers()]))


class _Decode(nn.Module):
    """A block as a function of its state too, for the exporter."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.call = lambda *args: functional_call(
            block, *args
        )  # the block's own state is not exported
        self.names = list(_state(block))

    def forward(
        self,
        state: list[Tensor],
        x_TD: Tensor,
        rope: list[Tensor],
        layer: list[Tensor],
        row: list[Tensor],
    ) -> Tensor:
        return self.call(
            dict(zip(self.names, state, strict=True)),
            (x_TD, rope, _Layer(layer), row[0] if row else None),
        )


class _Layer:
    """Stands for a AttentionMetadata of one layer."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        keys, values, blocks_T, offsets_T, tables_BC, lengths_B = self.tensors
        attention.write(k_THE, v_THE, keys, values, blocks_T, offsets_T)
        return attention.streamed(q_THE, keys, values, tables_BC, lengths_B)


def _processor() -> str:
    """Code is made for exactly this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))),
        torch.backends.cpu.get_cpu_capability(),
    )


def _key(config: ModelConfig, dtype: torch.dtype) -> str:
    """Names all that the code depends on: shape, sources, compiler, processor."""
    sources = [
        inspect.getsource(module)
        for module in (transformer, attention, packed, sys.modules[__name__])
    ]
    told = [
        *sources,
        json.dumps(dataclasses.asdict(config)),
        str(dtype),
        torch.__version__,
        _processor(),
        str(BLOCK_TOKENS),
    ]
    return hashlib.blake2b("\0".join(told).encode(), digest_size=12).hexdigest()


def _export(config: ModelConfig, dtype: torch.dtype, sequences: int, path: Path) -> None:
    """Compile the decode step of one block for one sequence, or for any number from two."""
    block = packed.stand_in(config, dtype)
    pages = PagedKVCache(config, 2 * sequences, torch.device("cpu"), dtype)
    count = torch.zeros(sequences, dtype=torch.int64)
    tables_BC = torch.arange(2 * sequences).view(sequences, 2)
    x_TD = torch.zeros(sequences, config.hidden_size, dtype=dtype)
    rope = list(transformer.rotary(count, config.head_dim, config.rope_theta, dtype))
    keys, values = (
        torch.empty_strided(x[0].shape, x[0].stride(), dtype=dtype)
        for x in (pages.keys, pages.values)
    )
    layer = [keys, values, count, count.clone(), tables_BC, count + 1]
    inputs = (
        list(_state(block).values()),
        x_TD,
        rope,
        layer,
        [x_TD.clone()] * bool(config.num_rows),
    )
    tokens = {0: torch.export.Dim("T", min=2, max=1 << 20)} if sequences > 1 else {}
    blocks, width = torch.export.Dim("blocks", min=2), torch.export.Dim("C", min=2)
    shapes: Any = (
        [{} for _ in inputs[0]],
        tokens,
        [tokens, tokens],
        [{0: blocks}, {0: blocks}, tokens, tokens, {**tokens, 1: width}, tokens],
        [tokens for _ in inputs[4]],
    )
    exported = torch.export.export(_Decode(block), inputs, dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - its documented name
        exported, package_path=str(path), inductor_configs=_OPTIONS
    )


def _end_with_parent(folder: str) -> None:
    """The worker holds the other end of stdin: when it is gone, however that came, so are we, and what we had begun."""
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    os.nice(10)  # requests come first
    warnings.simplefilter("ignore")
    task = json.loads(sys.argv[1])
    set_compiler_folder(f"{task['folder']}/inductor")
    threading.Thread(target=_end_with_parent, args=(task["folder"],), daemon=True).start()
    for name, sequences in ((_ALONE, 1), (_SEVERAL, 3)):
        _export(
            ModelConfig(**task["config"]),
            getattr(torch, task["dtype"]),
            sequences,
            Path(task["folder"]) / name,
        )


if __name__ == "__main__":
    main()
