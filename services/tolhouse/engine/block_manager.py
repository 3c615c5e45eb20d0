"""Manages the blocks of the KV cache, and shares those with equal prefixes.

This module has the accounting, and `attention.py` has the keys and values. A full block has a
digest, which is chained from the first block of its sequence. Sequences with the same prefix share
blocks with the same digest. An unused block keeps its digest until it is reused. The least recently
used block is reused first.
"""

import hashlib
from collections import OrderedDict

import numpy as np

from tolhouse.engine.sequence import Sequence

BLOCK_TOKENS = 16


class BlockManager:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.prompt_tokens = 0  # admitted prompt tokens
        self.shared_tokens = 0  # admitted prompt tokens that were found in the cache
        self.users = [0] * num_blocks  # the number of sequences that use each block
        self.unused = OrderedDict.fromkeys(range(num_blocks))  # in the order of reuse
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    @property
    def free_blocks(self) -> int:
        return len(self.unused)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate blocks for the first `tokens` tokens of a sequence.

        If too few blocks are free, nothing is allocated, and the result is False.
        """
        lacking = -(-tokens // BLOCK_TOKENS) - len(sequence.blocks)
        if lacking > len(self.unused):
            return False
        for _ in range(lacking):
            block, _ = self.unused.popitem(last=False)
            self._block_of.pop(self._digest_of.pop(block, b""), None)
            self.users[block] = 1
            sequence.blocks.append(block)
        return True

    def share(self, sequence: Sequence) -> int:
        """Assign the blocks that hold the prefix of a new sequence, and return their token count.

        The last token is always recomputed, because its logits are needed. The whole prompt is
        recomputed if its log probabilities are requested.
        """
        if sequence.sampling.prompt_logprobs is not None:
            return 0
        for number in range((len(sequence.ids) - 1) // BLOCK_TOKENS):
            block = self._block_of.get(_digest(sequence, number))
            if block is None:
                break
            self.unused.pop(block, None)
            self.users[block] += 1
            sequence.blocks.append(block)
        return len(sequence.blocks) * BLOCK_TOKENS

    def commit(self, sequence: Sequence, first: int, last: int) -> None:
        """Share the blocks that are full after computing the tokens from `first` up to `last`."""
        for number in range(first // BLOCK_TOKENS, last // BLOCK_TOKENS):
            block, digest = sequence.blocks[number], _digest(sequence, number)
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence. Later blocks are evicted before earlier ones."""
        for block in reversed(sequence.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.unused[block] = None
                if block not in self._digest_of:
                    self.unused.move_to_end(block, last=False)  # no prefix can match it
        sequence.blocks = []


def _digest(sequence: Sequence, number: int) -> bytes:
    """Return a collision-resistant digest of a sequence up to the end of block `number`.

    It covers the tokens and the rows.
    """
    while len(sequence.digests) <= number:
        start = len(sequence.digests) * BLOCK_TOKENS
        before = sequence.digests[-1] if sequence.digests else sequence.rows_key.encode()
        tokens = np.array(sequence.ids[start : start + BLOCK_TOKENS], np.uint32).tobytes()
        sequence.digests.append(hashlib.blake2b(before + tokens, digest_size=16).digest())
    return sequence.digests[number]
