"""Readers of untrusted or damaged data, which must read each input correctly or raise one of
Tolhouse's errors.

A target reads bytes. An error outside `ALLOWED` or a wrong result is a finding.
"""

import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from io import BytesIO
from math import inf
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ValidationError
from tokenizers import pre_tokenizers
from tolhouse.client.row_connections import RowConnection
from tolhouse.errors import CorruptError, TolhouseError
from tolhouse.gateway.auth import add_key, read_keys
from tolhouse.gateway.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tolhouse.lookup.service import parse_ids
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.gguf import import_gguf
from tolhouse.net.row_frames import pack_request, read_request, send_error, send_records
from tolhouse.store.files import FileStore
from tolhouse.store.registry import publish
from tolhouse.table.destination import Destination
from tolhouse.table.manifest import MAX_RECORD_BYTES, Manifest
from tolhouse.v1 import lookup_pb2

from tests.tables import digest_of, manifest_of, read, records_of, write

ALLOWED = (TolhouseError, ValidationError)
MANIFEST = manifest_of("fuzz", vocab_size=6, width=5, num_shards=1, frequent=(3, 1))
IDS = np.arange(MANIFEST.vocab_size, dtype=np.uint32)
RECORDS = records_of(MANIFEST)
BODIES: tuple[tuple[str, type[BaseModel], str], ...] = (  # target, schema, and one seed per line
    (
        "completion",
        CompletionRequest,
        """
{"model": "m", "prompt": "a", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 3, \
"stop": ["x", "yy"], "logprobs": 2}
{"prompt": [[1, 2], [3]], "n": 2, "stream": true, "stream_options": {"include_usage": true}, \
"logit_bias": {"5": -1.5}, "echo": true}
{"prompt": [1, 2], "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [3], \
"ignore_eos": true, "min_tokens": 1, "user": "u"}""",
    ),
    (
        "chat",
        ChatRequest,
        """
{"messages": [{"role": "user", "content": "a"}, \
{"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "max_tokens": 4}
{"messages": [{"role": "system", "content": "s"}], "logprobs": true, "top_logprobs": 3, \
"user": "u"}""",
    ),
    (
        "tokenize",
        TokenizeRequest,
        """
{"prompt": "a"}
{"messages": [{"role": "user", "content": "a"}]}""",
    ),
    ("detokenize", DetokenizeRequest, '{"tokens": [1, 2]}'),
)


@dataclass(frozen=True)
class Target:
    seeds: Sequence[bytes]
    read: Callable[[bytes], object]
    cost: int = 1  # divides the number of inputs


def targets(folder: Path) -> dict[str, Target]:
    """All targets by name. Their files are written to `folder`."""
    store = FileStore(folder / "tables")
    publish(store, write(store, MANIFEST).ref)
    shard = next(store.root.rglob("*.safetensors"))
    alias, keys = store.root / MANIFEST.name / "alias.json", folder / "keys.json"
    for name in ("one", "two"):
        add_key(keys, name, 60, 4)
    failure = lookup_pb2.Error(status="DATA_LOSS", token_ids=[1])
    fetch = lookup_pb2.FetchRequest(request_id=1, table=MANIFEST.ref, token_ids=IDS.tobytes())

    def of_file(path: Path, read: Callable[[], Any]) -> Target:
        return Target([path.read_bytes()], lambda data: (path.write_bytes(data), read()))

    bodies = {
        name: Target([json.dumps(json.loads(s)).encode() for s in seeds.strip().split("\n")], load)
        for name, seeds, load in ((n, s, model.model_validate_json) for n, model, s in BODIES)
    }
    return bodies | {
        "manifest": Target([MANIFEST.to_json().encode()], _read_manifest),
        "manifest with a new digest": Target([MANIFEST.to_json().encode()], _read_signed),
        "alias": of_file(alias, lambda: store.alias(MANIFEST.name)),
        "record": Target([RECORDS.tobytes()], read_records),
        "shard file": of_file(shard, lambda: _read_table(store.root)),
        "fetch request": Target([fetch.SerializeToString()], _fetch),
        "row request": Target([pack_request(fetch)], lambda data: read_request(BytesIO(data))),
        "row reply": Target(
            [_frames(send_records, RECORDS), _frames(send_error, failure)], _receive_rows
        ),
        "keys file": of_file(keys, lambda: read_keys(str(keys))),
        "gguf": _gguf_target(folder),
    }


def _gguf_target(folder: Path) -> Target:
    """An import of the GGUF file of a random model, with either kind of tokenizer."""
    file, out = folder / "model.gguf", folder / "checkpoint"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        try:
            import_gguf(file, out, "float32")
            try:
                open_checkpoint(out)
            except TolhouseError as error:
                raise AssertionError("an import wrote a checkpoint that is refused") from error
        finally:
            shutil.rmtree(out, ignore_errors=True)

    return Target([_gguf(file, kind) for kind in ("gpt2", "llama")], read, cost=8)


def _gguf(file: Path, kind: str) -> bytes:
    """The bytes of a GGUF file of a llama model with one layer and 32 hidden units."""
    size, writer = 32, gguf.GGUFWriter(file, "llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"gpt2": [*letters, "he", "<end>"], "llama": ["<unk>", "</s>", "▁", "h", "e", "he"]}
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens[kind])
    writer.add_token_types([control if t[0] == "<" else normal for t in tokens[kind]])
    writer.add_token_scores([-float(n) for n in range(len(tokens[kind]))])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(tokens[kind].index("<end>" if kind == "gpt2" else "</s>"))
    writer.add_chat_template("{{ messages }}")
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(size)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    names = [f"blk.0.attn_{name}.weight" for name in ("q", "k", "v", "output")]
    names += [f"blk.0.ffn_{name}.weight" for name in ("gate", "up", "down")]
    for name in (*names, "token_embd.weight"):
        rows = len(tokens[kind]) if name.startswith("token") else size
        rows = size // 2 if name[6:] in ("attn_k.weight", "attn_v.weight") else rows
        values = np.ones((rows, size), np.float32)
        quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def _frames(send: Callable, what: Any) -> bytes:
    """The frames that `send` sends."""
    one, other = socket.socketpair()
    with one, other:
        send(one, list(map(memoryview, what)) if isinstance(what, np.ndarray) else what)
        return other.recv(1 << 20)


def _receive_rows(data: bytes) -> None:
    """A client reads a reply, which ends with `data`."""
    one, other = socket.socketpair()
    with one, other:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        out = np.empty_like(RECORDS)
        connection, slots = RowConnection(other, None), np.arange(len(IDS))
        with suppress(OSError, CorruptError):
            connection.receive_rows(Destination(MANIFEST, IDS, out, slots), inf)
            assert out.tobytes() == RECORDS.tobytes(), "altered records were accepted"


def _read_manifest(data: bytes) -> None:
    assert Manifest.from_json(data) == MANIFEST, "an altered manifest was accepted"


def _read_signed(data: bytes) -> None:
    """A manifest with a correct digest is refused or keeps its meaning when it is written again."""
    try:
        fields = json.loads(data)
        text = json.dumps({**fields, "digest": digest_of(fields)})
    except (ValueError, TypeError, RecursionError):
        return
    read = Manifest.from_json(text)
    assert read == Manifest.from_json(read.to_json()), (
        "a manifest changed when it was written again"
    )
    assert 0 < read.record_bytes <= MAX_RECORD_BYTES
    shards = range(read.num_shards if read.vocab_size < 10_000 else 0)
    assert not shards or read.num_records == sum(len(read.shard_ids(shard)) for shard in shards)


def read_records(data: bytes, verify: Callable = MANIFEST.verify) -> None:
    """Records that pass their checksums are those that were written."""
    if len(data) == RECORDS.nbytes:
        records = np.frombuffer(data, np.uint8).reshape(RECORDS.shape)
        verify(IDS, [row.data for row in records])
        assert data == RECORDS.tobytes(), "altered records were accepted"


def _read_table(root: Path) -> None:
    with closing(FileStore(root)) as store:
        assert read(store, MANIFEST) == RECORDS.tobytes(), "altered records were served"


def _fetch(data: bytes) -> None:
    try:
        request = lookup_pb2.FetchRequest.FromString(data)
    except DecodeError:  # gRPC refuses such a message before Tolhouse reads it
        return
    ids = parse_ids(request.token_ids)
    assert ids.tobytes() == request.token_ids
    MANIFEST.check_ids(ids)


def folder() -> tempfile.TemporaryDirectory:
    """A temporary folder, in memory if possible because files are written often."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() else None
    return tempfile.TemporaryDirectory(prefix="tolhouse-fuzz-", dir=place)
