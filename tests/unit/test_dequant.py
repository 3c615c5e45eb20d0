"""Decoding on the device gives the codecs' values to the bit, in the order that the model reads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.engine.dequant import Decoder, LayerwiseRows, StagedRows, decode
from tolhouse.table.auxiliary import AuxiliaryTables
from tolhouse.table.codecs import CODECS
from tolhouse.table.manifest import Manifest

from tests.tables import manifest_of


def table(codec: str, size: int, layers: int, x0: bool = False) -> Manifest:
    blocks = (*["x0"] * x0, *(f"ffn.{layer}" for layer in range(layers)))
    return manifest_of(codec_name=codec, vocab_size=1000, blocks=blocks, width=size, num_shards=1)


def records_of(manifest: Manifest, count: int, seed: int, top: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, manifest.num_blocks, manifest.width)).astype(np.float32)
    rows *= top * random.choice([0, 1e-3, 1], (count, manifest.num_blocks, 1))
    return manifest.encode(np.arange(count, dtype=np.uint32), rows.astype(np.float32))


def expected_of(manifest: Manifest, records: np.ndarray) -> bytes:
    rows = manifest.decode(records).astype(np.float32).swapaxes(0, 1)
    return np.ascontiguousarray(rows).tobytes()


@pytest.mark.parametrize("codec", CODECS)
@given(
    size=st.integers(1, 9) | st.sampled_from([31, 32, 33, 64, 95, 97, 288]),
    layers=st.integers(1, 4),
    x0=st.booleans(),
    count=st.integers(0, 5),
    top=st.sampled_from([1.0, 1e-38, 1e-43, 9000.0]),
    seed=st.integers(0, 99),
)
def test_decoding_equals_the_codec_s_own(
    codec: str, size: int, layers: int, x0: bool, count: int, top: float, seed: int
) -> None:
    """Decoded rows have the bits of the codec's own decoding, transposed, for any codec and shape
    and down to denormals."""
    manifest = table(codec, size, layers, x0)
    records = records_of(manifest, count, seed, top)
    rows = decode(torch.from_numpy(records), manifest)
    assert ((layers + x0, count, size), torch.float32) == (tuple(rows.shape), rows.dtype)
    assert rows.is_contiguous()
    assert expected_of(manifest, records) == rows.numpy().tobytes()


@pytest.mark.parametrize("codec", CODECS)
@given(
    size=st.sampled_from([1, 6, 33]),
    index=st.lists(st.integers(0, 6), max_size=20),
    piece=st.integers(1, 300),
)
def test_an_index_gathers_and_repeats_rows(
    codec: str, size: int, index: list[int], piece: int
) -> None:
    """An index selects and repeats rows like `records[index]`, for any size of the decoded parts,
    and leaves the records unchanged."""
    manifest = table(codec, size, 2)
    records = records_of(manifest, 7, 0)
    index_T = torch.tensor(index, dtype=torch.int64)
    before = records.copy()
    rows = decode(torch.from_numpy(records), manifest, index_T, piece)
    whole = decode(torch.from_numpy(records), manifest, piece_values=piece)
    assert expected_of(manifest, records[index]) == rows.numpy().tobytes()
    assert expected_of(manifest, records) == whole.numpy().tobytes()
    assert before.tobytes() == records.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@given(
    size=st.sampled_from([1, 6, 33, 64]),
    x0=st.booleans(),
    index=st.lists(st.integers(0, 6), max_size=9),
)
def test_layer_by_layer_rows_are_the_same(
    codec: str, size: int, x0: bool, index: list[int]
) -> None:
    """Rows decoded layer by layer have the same bits as rows decoded at once."""
    manifest = table(codec, size, 3, x0)
    records = torch.from_numpy(records_of(manifest, 7, 0))
    index_T = torch.tensor(index, dtype=torch.int64)
    decoder = Decoder(AuxiliaryTables(manifest), torch.device("cpu"), torch.float32)
    rows = LayerwiseRows(decoder, StagedRows(records, index_T, index_T), 3)
    assert 3 + x0 == len(rows)
    layers = b"".join(rows[layer].numpy().tobytes() for layer in range(len(rows)))
    assert decode(records, manifest, index_T).numpy().tobytes() == layers
