"""`tolhouse compile`: exports the decode step of a block and compiles it for this processor."""

import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tolhouse.config import set_compiler_folder
from tolhouse.engine import attention
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.cpu import packed
from tolhouse.engine.cpu.compiled import (
    ALONE,
    DIGESTS,
    SEVERAL,
    block_state,
    digest,
    is_complete,
    key,
)
from tolhouse.errors import Internal
from tolhouse.model import transformer
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import Block, RMSNorm

# ids are the engine's own; any number of threads
_OPTIONS = {"assert_indirect_indexing": False, "cpp.dynamic_threads": True}


def compile_decode(config: ModelConfig, dtype: torch.dtype, cache: str | Path) -> Path:
    """The folder of a shape's compiled decode step, which is made unless it is there.

    Of all processes that share `cache` one compiles at a time, and the others find it done.
    """
    folder = Path(cache).expanduser() / key(config, dtype)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(folder.parent):
        if not is_complete(folder):
            for left in folder.parent.glob("compiling-*"):  # by processes that were killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="compiling-") as work:
                _compile(config, dtype, Path(work), folder)
    return folder


def end_with_parent() -> None:
    """Yield to other processes, and end when the parent closes stdin, however that comes about."""

    def wait() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGTERM)

    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that files are removed
    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _compile(config: ModelConfig, dtype: torch.dtype, work: Path, folder: Path) -> None:
    warnings.simplefilter("ignore")
    set_compiler_folder(f"{work}/inductor")
    try:
        for name, sequences in ((ALONE, 1), (SEVERAL, 3)):
            _export(config, dtype, sequences, work / name)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise Internal(f"a C++ compiler such as g++ is needed: {reason}") from None
    digests = {name: digest(work / name) for name in (ALONE, SEVERAL)}
    folder.mkdir(exist_ok=True)
    for name in digests:
        (work / name).replace(folder / name)
    (folder / DIGESTS).write_text(json.dumps(digests))


def _export(config: ModelConfig, dtype: torch.dtype, sequences: int, path: Path) -> None:
    """Compile the decode step of one block for one sequence, or for any number from two."""
    block = _stand_in(config, dtype)
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
    row = [x_TD.clone()] * bool(config.num_rows)
    inputs = list(block_state(block).values()), x_TD, rope, layer, row
    tokens = {0: torch.export.Dim("T", min=2, max=1 << 20)} if sequences > 1 else {}
    blocks, width = torch.export.Dim("blocks", min=2), torch.export.Dim("C", min=2)
    shapes: Any = (
        [{} for _ in inputs[0]],
        tokens,
        [tokens, tokens],
        [{0: blocks}, {0: blocks}, tokens, tokens, {**tokens, 1: width}, tokens],
        [tokens for _ in row],
    )
    exported = torch.export.export(_Decode(block), inputs, dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - its documented name
        exported, package_path=str(path), inductor_configs=_OPTIONS
    )


def _stand_in(config: ModelConfig, dtype: torch.dtype) -> Block:
    """A packed block without weights: its linear layers call those that their handles will name."""
    with torch.device("meta"):
        block = Block(config, 0)
    packed.pack(block, packed.by_handle)
    ones = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype), requires_grad=False)
    for module in block.modules():
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(ones.clone(), requires_grad=False)
    if block.ffn_scale is not None:
        block.ffn_scale = ones
    return block


class _Decode(nn.Module):
    """A block as a function of its state too, for the exporter."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.call = lambda *args: functional_call(block, *args)  # hides the block's own state
        self.names = list(block_state(block))

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


class _Layer:
    """One layer's part of AttentionMetadata."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        keys, values, blocks_T, offsets_T, tables_BC, lengths_B = self.tensors
        attention.write(k_THE, v_THE, keys, values, blocks_T, offsets_T)
        return attention.streamed(q_THE, keys, values, tables_BC, lengths_B)
