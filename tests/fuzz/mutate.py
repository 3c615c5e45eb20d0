"""Malformed inputs, made from valid ones by a few mutations."""

import json
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

ODD = rb"""{ } [ ] " , : null true -1 0 1e999 -0.0 NaN Infinity 2147483648 \ud800 __proto__
../.. %s%n 18446744073709551616 999999999999999999999999999999""".split()
ODD += [b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\r\n", b"\x80" * 11]
ODD += [b"[" * 2000, b'{"a":' * 500, b"\xff" * 9 + b"\x01"]

VALUES: list[Any] = [None, True, False, 0, 1, -1, 0.5, 1e308, 2**31, 2**63, 2**64, 10**400]
VALUES += ["", "a", "\ud800", "x" * 600, [], {}, [1], ["a"], [[]], [None], {"a": 1}, {"1": 1}]
VALUES += [list(range(300)), [[0] * 20] * 20]


def mutations(seeds: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """An infinite iterator that starts with the seeds themselves."""
    yield from seeds
    while True:
        seed = rng.choice(seeds)
        if seed[:1] == b"{" and rng.random() < 0.5:
            yield _restructured(seed, rng)
            continue
        data = bytearray(seed)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            _once(data, seeds, rng)
        yield bytes(data)


def _once(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 2, 4, 8, rng.randrange(len(data) + 1)))
    kind = rng.randrange(7)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length]
    elif kind == 4:
        data[at : at + rng.choice((0, length))] = rng.choice(ODD)
    elif kind == 5:
        del data[at:]
    else:
        other = rng.choice(seeds)
        start = rng.randrange(len(other) + 1)
        data[at : at + length] = other[start : start + length]


def _restructured(seed: bytes, rng: random.Random) -> bytes:
    """Valid JSON in which some values are changed, removed, or added."""
    whole = json.loads(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node: Any = whole
        while True:
            keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys) if keys else None
            if key is None or not isinstance(node[key], dict | list) or rng.random() < 0.4:
                break
            node = node[key]
        what = rng.randrange(4)
        if key is None or what == 0:
            if isinstance(node, dict):
                name = rng.choice(("odd", "", "prompt", "n", "messages"))
                node[name] = deepcopy(rng.choice(VALUES))
            else:
                node.append(deepcopy(rng.choice(VALUES)))
        elif what == 1:
            del node[key]
        else:
            node[key] = deepcopy(rng.choice(VALUES))
    return json.dumps(whole).encode()
