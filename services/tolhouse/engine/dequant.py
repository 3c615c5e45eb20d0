"""Records to rows on the device they are on: what crosses the bus is codes. The values are those of `Manifest.decode`.

Rows are gathered as codes and written once, in the order the model reads them. Codes are widened and multiplied in
place of the result: no array of the rows' size is made besides it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tolhouse.errors import InvalidArgument
from tolhouse.table.auxiliary import AuxiliaryTables
from tolhouse.table.codecs import GROUP
from tolhouse.table.manifest import Manifest

_PIECE_VALUES = {"cpu": 2**21}  # decoded at a time: 8 MiB, which the last cache holds
_GPU_PIECE_VALUES = 2**26  # bounds the memory for codes being widened


def decode(records_UB: Tensor, manifest: Manifest, index_T: Tensor | None = None) -> Tensor:
    """Rows float32 [N, T, D], contiguous, of records uint8 [U, record_bytes], or of `records_UB[index_T]`; both on one device.

    The records' memory must be contiguous; it is not checked against their checksums.
    """
    if manifest.ranks:
        raise InvalidArgument(
            f"the records of {manifest.ref} hold coefficients: their rows come from a Decoder"
        )
    count = len(records_UB if index_T is None else index_T)
    blocks, size = manifest.num_blocks, manifest.width
    rows_NTD = torch.empty(blocks, count, size, device=records_UB.device)
    step = max(1, _PIECE_VALUES.get(records_UB.device.type, _GPU_PIECE_VALUES) // (blocks * size))
    for start in range(0, count, step):
        part = slice(start, start + step)
        piece_TB = (
            records_UB[part] if index_T is None else records_UB.index_select(0, index_T[part])
        )
        blocks_TNB = piece_TB[:, :-8].unflatten(1, (blocks, -1))  # without the checksum
        _INTO[manifest.codec_name](blocks_TNB, rows_NTD[:, part].transpose(0, 1))
    return rows_NTD


def decode_block(records_UB: Tensor, manifest: Manifest, block: int, index_T: Tensor) -> Tensor:
    """One block of `records_UB[index_T]`: its row float32 [T, D], or its coefficients [T, r]."""
    sizes = manifest.ranks or (manifest.width,) * manifest.num_blocks
    start = sum(manifest.codec.block(size).itemsize for size in sizes[:block])
    end = start + manifest.codec.block(sizes[block]).itemsize
    block_TB = records_UB[:, start:end].index_select(0, index_T)
    values_TS = torch.empty(len(index_T), sizes[block], device=block_TB.device)
    _INTO[manifest.codec_name](block_TB[:, None], values_TS[:, None])
    return values_TS


@dataclass
class Staged:
    """Records uint8 [U, record_bytes] on the model's device, and which of them each of T tokens has, int64 [T].

    `places`, int64 [T]: where in the table's head each token's row is, -1 where it has none; None for a table without.
    `scales`, float32 [N, T]: by what each layer's row is multiplied for each token, where requests ask for that (PAPER section 5).
    """

    records: Tensor
    index: Tensor
    places: Tensor | None = None
    scales: Tensor | None = None


class Decoder:
    """Rows of one table in `dtype` on `device`, from its records and its auxiliary tables."""

    def __init__(
        self, auxiliary: AuxiliaryTables, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.manifest, self.dtype, self.finer = auxiliary.manifest, dtype, auxiliary.finer
        self.means: list[Tensor] = []
        self.vectors: list[Tensor] = []
        if auxiliary.basis:
            self.means = [torch.from_numpy(mean).to(device) for mean in auxiliary.basis.means]
            self.vectors = [torch.from_numpy(v).to(device) for v in auxiliary.basis.vectors]
        self.finer_records = (
            None
            if auxiliary.finer_records is None
            else torch.from_numpy(auxiliary.finer_records).to(device)
        )

    def rows(self, staged: Staged) -> Tensor:
        """[N, T, D]"""
        if not (self.vectors or self.finer):
            return decode(staged.records, self.manifest, staged.index).to(self.dtype)
        return torch.stack([self.block(staged, block) for block in range(self.manifest.num_blocks)])

    def block(self, staged: Staged, block: int) -> Tensor:
        """[T, D] of one of them."""
        row_TD = decode_block(staged.records, self.manifest, block, staged.index)
        if self.vectors:
            row_TD = torch.addmm(self.means[block], row_TD, self.vectors[block])
        if self.finer and self.finer_records is not None and staged.places is not None:
            finer_TD = decode_block(
                self.finer_records, self.finer, block, staged.places.clamp(min=0)
            )
            row_TD = torch.where(staged.places[:, None] >= 0, finer_TD, row_TD)
        return row_TD.to(self.dtype)


class LayerwiseRows:
    """Rows of all `num_rows` layers, and X0 if the table carries it; each decoded when it is asked for: of long prompts only one is in memory.

    A layer that the table lacks is None, and others are scaled where requests ask for it.
    """

    def __init__(self, decoder: Decoder, staged: Staged, num_rows: int) -> None:
        manifest = decoder.manifest
        self.decoder, self.staged = decoder, staged
        self.block_of: list[int | None] = [0] if manifest.has_x0 else []
        present = {layer: block for block, layer in enumerate(manifest.layers, manifest.has_x0)}
        self.block_of += [present.get(layer) for layer in range(num_rows)]

    def __len__(self) -> int:
        return len(self.block_of)

    def __getitem__(self, number: int) -> Tensor | None:
        block, scales, x0 = self.block_of[number], self.staged.scales, self.decoder.manifest.has_x0
        if block is None:
            return None
        row_TD = self.decoder.block(self.staged, block)
        return (
            row_TD
            if scales is None or number < x0
            else row_TD * scales[number - x0, :, None].to(row_TD.dtype)
        )


def is_long(count: int, manifest: Manifest) -> bool:
    """Whether the rows of so many tokens are more than the processor's last cache holds."""
    return count * manifest.num_blocks * manifest.width > _PIECE_VALUES["cpu"]


def _plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def into(blocks_TNB: Tensor, rows_TND: Tensor) -> None:
        rows_TND.copy_(blocks_TNB.view(dtype))

    return into


def _int8(blocks_TNB: Tensor, rows_TND: Tensor) -> None:
    rows_TND.copy_(blocks_TNB[..., 4:].view(torch.int8))
    rows_TND.mul_(_scales(blocks_TNB[..., :4], torch.float32))


def _int4(blocks_TNB: Tensor, rows_TND: Tensor) -> None:
    groups, half = -(-rows_TND.shape[-1] // GROUP), rows_TND.shape[-1] // 2
    codes = blocks_TNB[..., 2 * groups :].view(torch.int8)
    # codes times 16, which a nibble is where it stands, and scales by 16: all of it is exact
    rows_TND[..., :half] = codes[..., :half] * 16
    rows_TND[..., half : 2 * half] = codes[..., :half] & -16
    rows_TND[..., 2 * half :] = codes[..., half:] * 16  # where D is odd, the last one
    scales_TNG = _scales(blocks_TNB[..., : 2 * groups], torch.bfloat16).float() / 16
    whole = rows_TND.shape[-1] // GROUP
    rows_TND[..., : whole * GROUP].unflatten(-1, (whole, GROUP)).mul_(scales_TNG[..., :whole, None])
    rows_TND[..., whole * GROUP :].mul_(scales_TNG[..., whole:])


def _scales(bytes_TNB: Tensor, dtype: torch.dtype) -> Tensor:
    return bytes_TNB.clone(memory_format=torch.contiguous_format).view(
        dtype
    )  # in blocks of odd sizes they lie unaligned


_INTO: dict[str, Callable[[Tensor, Tensor], None]] = {
    "fp32": _plain(torch.float32),
    "fp16": _plain(torch.float16),
    "bf16": _plain(torch.bfloat16),
    "int8": _int8,
    "int4": _int4,
}
