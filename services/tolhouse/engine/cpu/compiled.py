"""A block's decode step compiled ahead of time: one call into C++ per layer, not twenty into torch.

`tolhouse compile` (export.py) keeps it on disk. A worker runs that command as a child while it
loads and serves uncompiled: that delays no start, and a failure is a warning.
"""

import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from tolhouse.engine import attention
from tolhouse.engine.attention import AttentionMetadata
from tolhouse.engine.cpu import packed
from tolhouse.logs import event, log
from tolhouse.model import transformer
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import Block, Transformer

ALONE, SEVERAL = "alone.pt2", "several.pt2"  # one sequence is a case of its own to a compiler
DIGESTS = "digests.json"  # of the two
_END_SECONDS = 10.0  # for a compiler to remove its files


class CompiledDecode:
    """The decode step of a checkpoint's blocks, once it is loaded."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, cache: str | Path) -> None:
        self.checkpoint, self.dtype, self.cache = checkpoint, dtype, Path(cache).expanduser()
        self.folder = self.cache / key(checkpoint.config, dtype)
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
        """End the compiler, if it runs."""
        self._stopped = True
        self._signal(signal.SIGTERM)
        if self._thread.ident:
            self._thread.join(_END_SECONDS)
            self._signal(signal.SIGKILL)
            self._thread.join()

    def attach(self, model: Transformer) -> None:
        """Let the blocks of `model` decode with this, if they are packed."""
        if any(isinstance(module, nn.Linear) for module in model.layers.modules()):
            return
        for layer, block in enumerate(model.layers):
            model.layers[layer] = DecodeBlock(cast("Block", block), layer, self)

    def _prepare(self) -> None:
        started = time.monotonic()
        try:
            if not is_complete(self.folder):
                self._compile()
            # what `aoti_load_package` wraps: that one imports torch's compiler, 70 MB
            loader = torch._C._aoti.AOTIModelPackageLoader  # noqa: SLF001
            self.alone, self.several = (
                loader(str(self.folder / name), "model", False, 1, -1) for name in (ALONE, SEVERAL)
            )
        except (OSError, RuntimeError) as error:
            if not self._stopped:
                reason = str(error).strip().rpartition("\n")[2]
                log.warning("decoding is not compiled, and slower for it: %s", reason)
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
            stdin=subprocess.PIPE,  # open for as long as this process lives: the child ends with it
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as self.compiler:
            if self._stopped:
                self._signal(signal.SIGTERM)
            assert self.compiler.stderr
            message = self.compiler.stderr.read()
        if self.compiler.returncode:
            raise RuntimeError(message or f"the compiler ended with {self.compiler.returncode}")

    def _signal(self, number: signal.Signals) -> None:
        if self.compiler and self.compiler.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.compiler.pid, number)


class DecodeBlock(nn.Module):
    """A block that decodes with compiled code once that is loaded; for prompts, as it is."""

    def __init__(self, block: Block, layer: int, compiled: CompiledDecode) -> None:
        super().__init__()
        self.block, self.layer, self.compiled = block, layer, compiled
        self.state = list(block_state(block).values())
        self.has_row = bool(compiled.checkpoint.config.num_rows)

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
        if row_TD is None and self.has_row:  # absent from the table: compiled code adds one anyway
            row_TD = torch.zeros_like(x_TD)
        row = [] if row_TD is None else [row_TD]
        return run.boxed_run([*self.state, x_TD, *rope, *cache.layer(self.layer), *row])[0]


def block_state(block: nn.Module) -> dict[str, Tensor]:
    """What differs between blocks: norms, and handles of packed matrices."""
    return dict(sorted([*block.named_parameters(), *block.named_buffers()]))


def is_complete(folder: Path) -> bool:
    """Whether compiled code is there, undamaged: torch would run whatever is in the files."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        return all(digest(folder / name) == digests[name] for name in (ALONE, SEVERAL))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def key(config: ModelConfig, dtype: torch.dtype) -> str:
    """Identifies all that the code depends on: shape, sources, compiler, processor."""
    modules = transformer, attention, packed, sys.modules[__name__]
    parts = [inspect.getsource(module) for module in modules]
    parts += [Path(__file__).with_name("export.py").read_text(), json.dumps(config.to_json())]
    parts += [str(dtype), torch.__version__, _processor()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _processor() -> str:
    """Code is compiled for exactly this one."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    return next(flags, torch.backends.cpu.get_cpu_capability())
