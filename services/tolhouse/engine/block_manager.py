"""Blocks of the KV cache: which are free, who uses which, and which hold the beginning of a prompt seen before.

Accounting only; keys and values themselves lie in `attention.py`. A block holds BLOCK_TOKENS tokens. Once it is full its contents have
a digest, chained from the first block on, and whoever brings the same beginning shares it. A block that nobody uses stays
findable until its place is needed: least recently used first.
"""

import hashlib
from collections import OrderedDict

import numpy as np

from tolhouse.engine.sequence import Sequence

BLOCK_TOKENS = 16


class BlockManager:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.prompt_tokens = self.found_tokens = (
            0  # of the sequences that were let in, and of those the ones found here
        )
        self._users = [0] * num_blocks
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(
            range(num_blocks)
        )  # next to be taken first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    @property
    def free_blocks(self) -> int:
        return len(self._unused)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for its first `tokens` tokens; False, and nothing given, if there are too few."""
        lacking = -(-tokens // BLOCK_TOKENS) - len(sequence.blocks)
        if lacking > len(self._unused):
            return False
        for _ in range(lacking):
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            sequence.blocks.append(block)
        return True

    def share(self, sequence: Sequence) -> int:
        """Give a sequence that has no blocks those that hold its beginning already; how many tokens that is.

        Its last token is left to be computed: what follows from it is not kept here. So is all of a prompt to be scored.
        """
        if sequence.sampling.prompt_logprobs is not None:
            return 0
        for number in range((len(sequence.ids) - 1) // BLOCK_TOKENS):
            block = self._block_of.get(_digest(sequence, number))
            if block is None:
                break
            if not self._users[block]:
                del self._unused[block]
            self._users[block] += 1
            sequence.blocks.append(block)
        return len(sequence.blocks) * BLOCK_TOKENS

    def seal(self, sequence: Sequence, first: int, last: int) -> None:
        """Tokens `first` to `last` (not included) have been computed: blocks that they filled can be shared from now on."""
        for number in range(first // BLOCK_TOKENS, last // BLOCK_TOKENS):
            block, digest = sequence.blocks[number], _digest(sequence, number)
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def release(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back; the end of its text is forgotten before its beginning."""
        for block in reversed(sequence.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._unused[block] = None
                if block not in self._digest_of:
                    self._unused.move_to_end(block, last=False)  # there is nothing to find in it
        sequence.blocks = []

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]


def _digest(sequence: Sequence, number: int) -> bytes:
    """The digest of a sequence's rows' version, and its text up to and with its block `number`. It is cryptographic: nobody can craft a text to get another's block."""
    while len(sequence.digests) <= number:
        start = len(sequence.digests) * BLOCK_TOKENS
        before = sequence.digests[-1] if sequence.digests else sequence.rows_key.encode()
        tokens = np.array(sequence.ids[start : start + BLOCK_TOKENS], np.uint32).tobytes()
        sequence.digests.append(hashlib.blake2b(before + tokens, digest_size=16).digest())
    return sequence.digests[number]
