"""Blocks of the KV cache: which are free, in use, or hold a known beginning of a text.

Accounting only: keys and values lie in `attention.py`. A full block has a digest, chained from the
sequence's first block on, and is shared with sequences that begin alike. An unused block stays
findable until it is needed for others, the least recently used first.
"""

import hashlib
from collections import OrderedDict

import numpy as np

from tolhouse.engine.sequence import Sequence

BLOCK_TOKENS = 16


class BlockManager:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.prompt_tokens = self.shared_tokens = 0  # of admitted sequences; and found here
        self.users = [0] * num_blocks  # how many sequences use each block
        self.unused = OrderedDict.fromkeys(range(num_blocks))  # the next to use first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    @property
    def free_blocks(self) -> int:
        return len(self.unused)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for its first `tokens` tokens; False if there are too few."""
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
        """Give a sequence without blocks those that hold its beginning; how many tokens that is.

        Its last token is left to be computed, for its logits. So is all of a prompt whose log
        probabilities are asked for.
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
        """Tokens `first` to `last` (not included) are computed: their full blocks can be shared."""
        for number in range(first // BLOCK_TOKENS, last // BLOCK_TOKENS):
            block, digest = sequence.blocks[number], _digest(sequence, number)
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def release(self, sequence: Sequence) -> None:
        """Free the sequence's blocks; they will be evicted from the end of its text."""
        for block in reversed(sequence.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.unused[block] = None
                if block not in self._digest_of:
                    self.unused.move_to_end(block, last=False)  # nothing can be found in it
        sequence.blocks = []


def _digest(sequence: Sequence, number: int) -> bytes:
    """Digest of a sequence's rows and text up to block `number`; no crafted text collides."""
    while len(sequence.digests) <= number:
        start = len(sequence.digests) * BLOCK_TOKENS
        before = sequence.digests[-1] if sequence.digests else sequence.rows_key.encode()
        tokens = np.array(sequence.ids[start : start + BLOCK_TOKENS], np.uint32).tobytes()
        sequence.digests.append(hashlib.blake2b(before + tokens, digest_size=16).digest())
    return sequence.digests[number]
