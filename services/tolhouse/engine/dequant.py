"""Decodes records to rows on the device. Only encoded records cross the bus.

The values equal those of `table/codecs.py`. Decoding widens and scales codes in the memory of the
result and allocates no second array of that size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tolhouse.table.auxiliary import AuxiliaryTables
from tolhouse.table.codecs import GROUP
from tolhouse.table.manifest import Manifest

CACHED_VALUES = 2**21  # 8 MiB of rows, which fit the last-level cache of a processor
_GPU_VALUES = 2**26  # values in a piece, which bounds the memory for widened codes


def decode(
    records_UB: Tensor,
    manifest: Manifest,
    index_T: Tensor | None = None,
    piece_values: int = 0,  # values in a piece; 0: the default for the device
) -> Tensor:
    """Decode records uint8 [U, record_bytes], or `records_UB[index_T]`, to float32 [N, T, D].

    Both tensors are contiguous and on one device. The records hold values, not the coefficients of
    a low-rank table. Checksums are not verified here.
    """
    count = len(records_UB if index_T is None else index_T)
    blocks, size, device = manifest.num_blocks, manifest.width, records_UB.device
    rows_NTD = torch.empty(blocks, count, size, device=device)
    piece_values = piece_values or (CACHED_VALUES if device.type == "cpu" else _GPU_VALUES)
    step = max(1, piece_values // (blocks * size))
    for start in range(0, count, step):
        part = slice(start, start + step)
        piece_TB = records_UB[part]
        if index_T is not None:
            piece_TB = records_UB.index_select(0, index_T[part])
        blocks_TNB = piece_TB[:, :-8].unflatten(1, (blocks, -1))  # without the checksum
        _DECODERS[manifest.codec_name](blocks_TNB, rows_NTD[:, part].transpose(0, 1))
    return rows_NTD


def decode_block(records_UB: Tensor, manifest: Manifest, block: int, index_T: Tensor) -> Tensor:
    """Decode one block of `records_UB[index_T]` to values float32 [T, D] or coefficients [T, r]."""
    sizes = manifest.ranks or (manifest.width,) * manifest.num_blocks
    start = sum(manifest.codec.block(size).itemsize for size in sizes[:block])
    end = start + manifest.codec.block(sizes[block]).itemsize
    block_TB = records_UB[:, start:end].index_select(0, index_T)
    values_TS = torch.empty(len(index_T), sizes[block], device=block_TB.device)
    _DECODERS[manifest.codec_name](block_TB[:, None], values_TS[:, None])
    return values_TS


@dataclass
class StagedRows:
    """Records uint8 [U, record_bytes] on the device of the model, and their index for T tokens."""

    records: Tensor
    index: Tensor  # int64 [T]
    ids: Tensor  # int64 [T]
    scales: Tensor | None = None  # float32 [N, T]: a factor for each row (paper, section 5)


class Decoder:
    """Decodes the records of one table, with its auxiliary tables, to `dtype` on `device`."""

    def __init__(self, tables: AuxiliaryTables, device: torch.device, dtype: torch.dtype) -> None:
        self.manifest, self.dtype, self.finer = tables.manifest, dtype, tables.finer
        basis, records = tables.basis, tables.finer_records
        self.means = [torch.from_numpy(mean).to(device) for mean in basis.means] if basis else []
        self.vectors = [torch.from_numpy(v).to(device) for v in basis.vectors] if basis else []
        if records is not None:
            self.finer_records = torch.from_numpy(records).to(device)
            self.finer_slots = torch.from_numpy(tables.finer_slots).to(device)

    def rows(self, staged: StagedRows) -> Tensor:
        """Return the rows [N, T, D]."""
        if not (self.vectors or self.finer):
            return decode(staged.records, self.manifest, staged.index).to(self.dtype)
        return torch.stack([self.block(staged, block) for block in range(self.manifest.num_blocks)])

    def block(self, staged: StagedRows, block: int) -> Tensor:
        """Return the rows [T, D] of one block."""
        row_TD = decode_block(staged.records, self.manifest, block, staged.index)
        if self.vectors:
            row_TD = torch.addmm(self.means[block], row_TD, self.vectors[block])
        if self.finer:
            slots_T = self.finer_slots[staged.ids]  # -1: the token has no finer row
            finer_TD = decode_block(self.finer_records, self.finer, block, slots_T.clamp(min=0))
            row_TD = torch.where(slots_T[:, None] >= 0, finer_TD, row_TD)
        return row_TD.to(self.dtype)


class LayerwiseRows:
    """The rows of `num_rows` layers, after X0 if the table has it, decoded when they are read.

    A long prompt therefore needs memory for the rows of only one layer. A layer that the table
    lacks is None. The other rows are scaled if a request has factors.
    """

    def __init__(self, decoder: Decoder, staged: StagedRows, num_rows: int) -> None:
        manifest = decoder.manifest
        self.decoder, self.staged, self.x0 = decoder, staged, manifest.has_x0
        present = {block: number for number, block in enumerate(manifest.blocks)}
        self.block_of = [present.get(block) for block in manifest.model_blocks(num_rows)]

    def __len__(self) -> int:
        return len(self.block_of)

    def __getitem__(self, number: int) -> Tensor | None:
        block, scales = self.block_of[number], self.staged.scales
        if block is None:
            return None
        row_TD = self.decoder.block(self.staged, block)
        if scales is None or number < self.x0:
            return row_TD
        return row_TD * scales[number - self.x0, :, None].to(row_TD.dtype)


def _plain(dtype: torch.dtype, blocks_TNB: Tensor, rows_TND: Tensor) -> None:
    rows_TND.copy_(blocks_TNB.view(dtype))


def _int8(blocks_TNB: Tensor, rows_TND: Tensor) -> None:
    rows_TND.copy_(blocks_TNB[..., 4:].view(torch.int8))
    rows_TND.mul_(_scales(blocks_TNB[..., :4], torch.float32))


def _int4(blocks_TNB: Tensor, rows_TND: Tensor) -> None:
    groups, half = -(-rows_TND.shape[-1] // GROUP), rows_TND.shape[-1] // 2
    codes = blocks_TNB[..., 2 * groups :].view(torch.int8)
    # The nibbles are read in place, which makes codes 16 times too large. Scales are divided by
    # 16. Both operations are exact.
    rows_TND[..., :half] = codes[..., :half] * 16
    rows_TND[..., half : 2 * half] = codes[..., :half] & -16
    rows_TND[..., 2 * half :] = codes[..., half:] * 16  # the last value of an odd D
    scales_TNG = _scales(blocks_TNB[..., : 2 * groups], torch.bfloat16).float() / 16
    full = rows_TND.shape[-1] // GROUP
    rows_TND[..., : full * GROUP].unflatten(-1, (full, GROUP)).mul_(scales_TNG[..., :full, None])
    rows_TND[..., full * GROUP :].mul_(scales_TNG[..., full:])


def _scales(bytes_TNB: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy, because scales are unaligned in blocks of odd sizes.
    return bytes_TNB.clone(memory_format=torch.contiguous_format).view(dtype)


_DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "fp32": partial(_plain, torch.float32),
    "fp16": partial(_plain, torch.float16),
    "bf16": partial(_plain, torch.bfloat16),
    "int8": _int8,
    "int4": _int4,
}
