"""Manages the blocks of the KV cache, and shares those with equal prefixes.

This module has the accounting, and `attention.py` has the keys and values. A full block has a
digest, which is chained from the first block of its sequence. Sequences with the same prefix share
blocks with the same digest. An unused block keeps its digest until it is reused. The least recently
used block is reused first.
"""

import hashlib
from collections import OrderedDict

import numpy as np

from tolhouse.engine.kv_policy import BLOCK_TOKENS, FULL, Full
from tolhouse.engine.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, policy: Full = FULL) -> None:
        self.num_blocks, self.policy = num_blocks, policy
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

    def lacking(self, sequence: Sequence, tokens: int) -> tuple[int, int]:
        """Return how many blocks a sequence lacks for its first `tokens` tokens, and for a copy."""
        blocks = -(-(tokens - sequence.dropped) // BLOCK_TOKENS) - len(sequence.blocks)
        prompt = sequence.prompt_tokens
        if not sequence.computed < prompt == tokens:
            return blocks, 0
        return blocks, -(-sequence.policy.copied(prompt) // BLOCK_TOKENS) - len(sequence.copy)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate blocks for the first `tokens` tokens of a sequence.

        If too few blocks are free, nothing is allocated, and the result is False.
        """
        lacking = self.lacking(sequence, tokens)
        if sum(lacking) > len(self.unused):
            return False
        for blocks, count in zip((sequence.blocks, sequence.copy), lacking, strict=True):
            for _ in range(count):
                block, _ = self.unused.popitem(last=False)
                self._block_of.pop(self._digest_of.pop(block, b""), None)
                self.users[block] = 1
                blocks.append(block)
        return True

    def share(self, sequence: Sequence) -> int:
        """Assign the blocks of the longest known prefix of a new sequence, and return its length.

        Blocks that the policy has dropped at the end of the prefix are not needed.

        The last token is always recomputed, because its logits are needed. The whole prompt is
        recomputed if its log probabilities are requested.
        """
        if sequence.sampling.prompt_logprobs is not None:
            return 0
        policy, longest, begin = sequence.policy, 0, 0  # blocks from `begin` on were found
        blocks: list[int] = []
        end = policy.shareable(sequence)
        # Only blocks that the policy can drop may be unknown.
        droppable = policy.head_blocks + policy.dropped(end) // BLOCK_TOKENS
        for number in range(end // BLOCK_TOKENS):
            block = self._block_of.get(_digest(sequence, number), -1)
            blocks.append(block)
            if block < 0 and not policy.head_blocks <= number < droppable:
                break
            begin = number + 1 if block < 0 else begin
            tokens = len(blocks) * BLOCK_TOKENS
            if begin <= policy.head_blocks + policy.dropped(tokens) // BLOCK_TOKENS:
                longest = tokens
        sequence.dropped = policy.dropped(longest)
        del blocks[longest // BLOCK_TOKENS :]
        del blocks[policy.head_blocks : policy.head_blocks + sequence.dropped // BLOCK_TOKENS]
        for block in blocks:
            self.unused.pop(block, None)
            self.users[block] += 1
        sequence.blocks = blocks
        return longest

    def commit(self, sequence: Sequence, first: int, last: int) -> None:
        """Share the blocks that are full after computing the tokens from `first` up to `last`."""
        last = min(last, sequence.policy.shared(sequence))
        for number in range(first // BLOCK_TOKENS, last // BLOCK_TOKENS):
            block = sequence.blocks[number - sequence.dropped // BLOCK_TOKENS]
            digest = _digest(sequence, number)
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence. Later blocks are evicted before earlier ones."""
        self._free(sequence.blocks + sequence.copy)
        sequence.blocks, sequence.copy, sequence.dropped, sequence.memory = [], [], 0, None

    def trim(self, sequence: Sequence) -> None:
        """Free the blocks that the policy drops after the tokens computed so far."""
        if sequence.copy:
            self._free(sequence.blocks)
            sequence.blocks, sequence.copy = sequence.copy, []
            sequence.dropped = sequence.computed - sequence.policy.copied(sequence.computed)
            return
        policy, computed = sequence.policy, sequence.computed
        dropped = policy.dropped(computed)
        if dropped > sequence.dropped:
            begin, end = policy.head_blocks, len(sequence.blocks)
            if policy.moved(computed):  # the places after them are unused
                begin = -(-(computed - dropped) // BLOCK_TOKENS)
            else:
                end = begin + (dropped - sequence.dropped) // BLOCK_TOKENS
            self._free(sequence.blocks[begin:end])
            del sequence.blocks[begin:end]
            sequence.dropped = dropped

    def _free(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.unused[block] = None
                if block not in self._digest_of:
                    self.unused.move_to_end(block, last=False)  # no prefix can match it


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
