"""What strangers and damaged disks can hand to Tolhouse, and what has to become of it: one of our errors, or a right reading.

A target takes bytes; an error that is none of `ALLOWED`, or a wrong reading, is a finding.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import ValidationError
from tolhouse.errors import TolhouseError
from tolhouse.gateway.auth import add_key, read_keys
from tolhouse.gateway.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tolhouse.lookup.service import parse_ids
from tolhouse.net import fetch_reply
from tolhouse.store.base import Alias
from tolhouse.store.files import FileStore
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2

from tests.tables import manifest_of, read, records_of, write

ALLOWED = (TolhouseError, ValidationError)
MANIFEST = manifest_of("fuzz", vocab_size=6, width=5, num_shards=1, frequent=(3, 1))
IDS = np.arange(MANIFEST.vocab_size, dtype=np.uint32)
RECORDS = records_of(MANIFEST)


@dataclass(frozen=True)
class Target:
    seeds: Sequence[bytes]
    read: Callable[[bytes], object]


def targets(folder: Path) -> dict[str, Target]:
    """By name; files are written in `folder`."""
    store = FileStore(folder / "tables")
    write(store, MANIFEST)
    shard = next((folder / "tables").rglob("*.safetensors"))
    keys = folder / "keys.json"
    for name in ("one", "two"):
        add_key(keys, name, 60, 4)
    reply = fetch_reply.serialize(
        lookup_pb2.FetchReply(request_id=7, last=True),
        list(map(memoryview, RECORDS)),
        RECORDS.nbytes,
    )
    failure = lookup_pb2.FetchReply(request_id=7, error=lookup_pb2.Error(status="NOT_FOUND"))
    return {
        "manifest": Target([MANIFEST.to_json().encode()], Manifest.from_json),
        "alias": Target(
            [Alias("0123456789abcdef", ("fedcba9876543210",)).to_json().encode()], Alias.from_json
        ),
        "record": Target([RECORDS.tobytes()], read_records),
        "shard file": Target([shard.read_bytes()], lambda data: _shard(store.root, shard, data)),
        "fetch request": Target(
            [
                lookup_pb2.FetchRequest(
                    request_id=1, table=MANIFEST.ref, token_ids=IDS.tobytes()
                ).SerializeToString()
            ],
            _fetch,
        ),
        "fetch reply": Target([reply, failure.SerializeToString()], fetch_reply.parse),
        "keys file": Target(
            [keys.read_bytes()], lambda data: (keys.write_bytes(data), read_keys(str(keys)))
        ),
        "completion": Target(
            _bodies(COMPLETIONS), lambda data: CompletionRequest.model_validate_json(data)
        ),
        "chat": Target(_bodies(CHATS), lambda data: ChatRequest.model_validate_json(data)),
        "tokenize": Target(
            _bodies([{"prompt": "a"}, {"messages": CHATS[0]["messages"]}]),
            lambda data: TokenizeRequest.model_validate_json(data),
        ),
        "detokenize": Target(
            _bodies([{"tokens": [1, 2]}]), lambda data: DetokenizeRequest.model_validate_json(data)
        ),
    }


COMPLETIONS = [
    {
        "model": "m",
        "prompt": "a",
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x", "yy"],
        "logprobs": 2,
    },
    {
        "prompt": [[1, 2], [3]],
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {"5": -1.5},
        "echo": True,
    },
    {
        "prompt": [1, 2],
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "min_tokens": 1,
        "user": "u",
    },
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        ],
        "max_tokens": 4,
    },
    {
        "messages": [{"role": "system", "content": "s"}],
        "logprobs": True,
        "top_logprobs": 3,
        "user": "u",
    },
]


def _bodies(bodies: list[dict]) -> list[bytes]:
    return [json.dumps(body).encode() for body in bodies]


def read_records(data: bytes, verify: Callable = MANIFEST.verify) -> None:
    """Records that pass their checksums are those that were written."""
    if len(data) != RECORDS.nbytes:
        return
    records = np.frombuffer(data, np.uint8).reshape(RECORDS.shape)
    verify(IDS, [row.data for row in records])
    assert data == RECORDS.tobytes(), "altered records pass"


def _shard(root: Path, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with closing(FileStore(root)) as store:
        assert read(store, MANIFEST) == RECORDS.tobytes(), "altered records are served"


def _fetch(data: bytes) -> None:
    try:
        request = lookup_pb2.FetchRequest.FromString(data)
    except DecodeError:  # gRPC refuses it before we see it
        return
    ids = parse_ids(request.token_ids, MANIFEST)
    assert ids.size == 0 or int(ids.max()) < MANIFEST.vocab_size, (
        "an id outside the vocabulary passes"
    )


def folder() -> tempfile.TemporaryDirectory:
    """Files are written often: in memory where that is possible."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="tolhouse-fuzz-", dir=memory if memory.is_dir() else None
    )
