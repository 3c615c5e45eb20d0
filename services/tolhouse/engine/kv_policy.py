"""Policies of the KV cache, which decide the tokens whose keys and values a sequence keeps.

A token has a position in its sequence, on which its rotary embedding depends, and a place in the
cache of the sequence. Place p is in block p // BLOCK_TOKENS of `Sequence.blocks`. Without a policy
that drops tokens, both numbers are equal. A token sees the first `sinks` and the last `window`
places up to its own.

Shapes: H query heads, G key-value heads, L places, E head size, O observed queries, K kept places.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.config import ModelConfig

if TYPE_CHECKING:
    from tolhouse.engine.sequence import Sequence

BLOCK_TOKENS = 16
UNBOUNDED = 2**40  # a window that no sequence fills


class Full:
    """Keeps every token. The other policies override a part of these methods."""

    sinks, window = 0, UNBOUNDED
    key = ""  # Sequences share blocks of the KV cache only if they have the same key.
    observed = 0  # the number of last prompt tokens that one step has to compute together
    segment = UNBOUNDED  # the number of text tokens before each group of summary tokens
    summary: tuple[int, ...] = ()  # the ids of a group of summary tokens

    @property
    def head_blocks(self) -> int:
        """The number of blocks with sinks, which are never dropped."""
        return -(-self.sinks // BLOCK_TOKENS)

    @property
    def group(self) -> int:
        """The number of tokens of a segment with its summary tokens."""
        return self.segment + len(self.summary)

    def with_summaries(self, ids: list[int]) -> list[int]:
        """Return token ids of a text with the summary tokens of its whole segments."""
        if not self.summary:
            return ids
        parts = [ids[i : i + self.segment] for i in range(0, len(ids), self.segment)]
        return [i for p in parts for i in (*p, *self.summary * (len(p) == self.segment))]

    def text_tokens(self, tokens: int) -> int:
        """Return how many of the first `tokens` tokens of a sequence are text."""
        groups, rest = divmod(tokens, self.group)
        return groups * self.segment + min(rest, self.segment)

    def is_text(self, number: int) -> bool:
        """Return whether the token with this number in a sequence is text."""
        return number % self.group < self.segment

    def most_places(self, prompt_tokens: int, tokens: int, step_tokens: int) -> int:
        """Return the most places that a sequence of `tokens` text tokens needs at once.

        A step computes at most `step_tokens` of them.
        """
        return tokens

    def dropped(self, computed: int) -> int:
        """Return how many tokens, a multiple of BLOCK_TOKENS, are dropped after `computed` tokens.

        They follow the blocks of the sinks.
        """
        return 0

    def moved(self, computed: int) -> int:
        """Return how many last places move down by `segment` places after `computed` tokens."""
        return 0

    def copied(self, prompt_tokens: int) -> int:
        """Return how many places of a prompt are copied to other blocks at its end, 0 if none."""
        return 0

    def shareable(self, sequence: "Sequence") -> int:
        """Return the number of first tokens that may come from the blocks of other sequences."""
        return len(sequence.ids) - 1  # the logits of the last token are needed

    def shared(self, sequence: "Sequence") -> int:
        """Return the number of first tokens whose blocks other sequences may use."""
        return len(sequence.ids)

    def chunk_end(self, sequence: "Sequence", first: int, last: int) -> int:
        """Return where a chunk of a step ends, which begins at `first`, and at most at `last`."""
        return last

    def select(self, q_OHE: Tensor, k_GLE: Tensor) -> Tensor:
        """Return the places [G, K] to copy at the end of a prompt, in ascending order."""
        raise NotImplementedError


class Window(Full):
    """Keeps the first `sinks` and the last `window` tokens (attention sinks, arXiv 2309.17453).

    A token counts itself among the last ones. Blocks are freed when the window has passed them.
    """

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.window = sinks, window
        self.key = f"window {sinks} {window}"

    def most_places(self, prompt_tokens: int, tokens: int, step_tokens: int) -> int:
        # The first token of a step sees window - 1 earlier tokens, which begin within a block.
        kept = (self.head_blocks + 1) * BLOCK_TOKENS + self.window
        return min(tokens, kept + step_tokens)

    def dropped(self, computed: int) -> int:
        first_seen = computed - self.window + 1  # by the next token
        return max(0, first_seen // BLOCK_TOKENS - self.head_blocks) * BLOCK_TOKENS


class Compressive(Window):
    """A window and a memory of constant size of the tokens that the window has passed.

    The memory sums φ(k) [v, 1] over these tokens for each key-value head, where φ is elu + 1. A
    query reads it as φ(q) Σ φ(k) v / φ(q) Σ φ(k), and `gate_NH` is the share of this in the output
    of a head (Infini-attention, arXiv 2404.07143; EdgeInfinite, arXiv 2503.22196). Queries and keys
    are without their rotary embedding. Without passed tokens, the output is that of the window.
    """

    def __init__(self, sinks: int, window: int, gate_NH: Tensor) -> None:
        super().__init__(sinks, window)
        self.gate_NH = gate_NH.float()
        self.key = f"compressive {sinks} {window} {self.gate_NH.tolist()}"

    @property
    def undropped(self) -> int:
        """The most tokens of a sequence that has dropped none. The prefix cache has no memories."""
        return (self.head_blocks + 1) * BLOCK_TOKENS + self.window - 2

    def shareable(self, sequence: "Sequence") -> int:
        return min(self.undropped, super().shareable(sequence))

    def shared(self, sequence: "Sequence") -> int:
        return min(self.undropped, super().shared(sequence))


class Summary(Full):
    """Adds summary tokens to the text, and keeps only those of finished segments.

    The tokens `summary` follow every `segment` tokens of text (Memo, arXiv 2510.19732). A token
    sees the summary tokens of all segments before, and the tokens of its own segment up to itself.
    The next text token is sampled from the output of the last summary token. Positions count text
    and summary tokens, as if nothing was dropped.

    At the end of a segment, the places of its summary tokens move down behind those of earlier
    segments. A sequence therefore sees all its places, and needs no mask. Blocks are overwritten,
    so they are not shared.
    """

    key = "summary"

    def __init__(self, segment: int, summary: tuple[int, ...]) -> None:
        self.segment, self.summary = segment, summary

    def most_places(self, prompt_tokens: int, tokens: int, step_tokens: int) -> int:
        segments = tokens // self.segment
        return segments * len(self.summary) + (self.segment if segments else tokens)

    def dropped(self, computed: int) -> int:  # not whole blocks
        return computed // self.group * self.segment

    def moved(self, computed: int) -> int:
        return 0 if computed % self.group else len(self.summary)

    def shareable(self, sequence: "Sequence") -> int:
        return 0

    def shared(self, sequence: "Sequence") -> int:
        return 0

    def chunk_end(self, sequence: "Sequence", first: int, last: int) -> int:
        return min(last, (first // self.group + 1) * self.group)


class Score(Full):
    """Keeps a share of the middle of the prompt, by the attention of the prompt's last queries.

    The middle is between the first `first` and the last `last` tokens of the prompt, which are kept
    like all tokens of the answer. Each key-value head keeps places of its own (SnapKV, arXiv
    2404.14469; Sparse-dLLM, arXiv 2508.02558). Tokens of the prompt see the whole prompt before.
    """

    observed = BLOCK_TOKENS
    neighbours = 5  # The score of a place is the largest one among these, as in SnapKV.

    def __init__(self, first: int, last: int, share: float) -> None:
        self.first, self.last, self.share = first, last, share

    def copied(self, prompt_tokens: int) -> int:
        middle = prompt_tokens - self.first - self.last
        return prompt_tokens - middle + math.ceil(self.share * middle) if middle > 0 else 0

    def most_places(self, prompt_tokens: int, tokens: int, step_tokens: int) -> int:
        if not (copied := self.copied(prompt_tokens)):
            return tokens
        # At the end of the prompt the sequence has the blocks of the prompt and of the copy.
        both = -(-prompt_tokens // BLOCK_TOKENS) - (-copied // BLOCK_TOKENS)
        return max(both * BLOCK_TOKENS, tokens - prompt_tokens + copied)

    def shareable(self, sequence: "Sequence") -> int:
        # The queries of the observed tokens are needed.
        end = sequence.prompt_tokens - self.observed
        return max(0, end) if self.copied(sequence.prompt_tokens) else super().shareable(sequence)

    def shared(self, sequence: "Sequence") -> int:
        # Tokens after the copy depend on what it lacks.
        prompt_tokens = sequence.prompt_tokens
        return prompt_tokens if self.copied(prompt_tokens) else super().shared(sequence)

    def chunk_end(self, sequence: "Sequence", first: int, last: int) -> int:
        end = sequence.prompt_tokens
        if first >= end or not self.copied(end):
            return last
        return end if last >= end else min(last, max(first, end - self.observed))

    def select(self, q_OHE: Tensor, k_GLE: Tensor) -> Tensor:
        places, count = k_GLE.shape[1], self.copied(k_GLE.shape[1])
        order = self.scores(q_OHE, k_GLE).argsort(dim=1, descending=True, stable=True)
        # Of equal scores, the first place is kept.
        best = order[:, : count - self.first - self.last].sort(1).values + self.first
        first = torch.arange(self.first, device=best.device).expand(len(best), -1)
        last = torch.arange(places - self.last, places, device=best.device).expand(len(best), -1)
        return torch.cat([first, best, last], 1)

    def scores(self, q_OHE: Tensor, k_GLE: Tensor) -> Tensor:
        """Return the scores [G, M] of the M places of the middle.

        They are the mean attention of the queries of the last O places. A place has the largest
        score of its neighbours, so that the rest of a phrase is kept with its first token.
        """
        groups, places, size = k_GLE.shape
        q_GJOE = q_OHE.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).float()
        scores_GJOL = q_GJOE @ k_GLE.float().transpose(1, 2)[:, None] * size**-0.5
        mask = scores_GJOL.new_full((len(q_OHE), places), -math.inf).triu(places - len(q_OHE) + 1)
        attention_GL = (scores_GJOL + mask).softmax(-1).mean((1, 2))
        middle_GM = attention_GL[:, self.first : places - self.last]
        return F.max_pool1d(middle_GM[None], self.neighbours, 1, self.neighbours // 2)[0]


FULL = Full()


def policy_of(
    name: str, sinks: int, window: int, share: float, gate_NH: Tensor, shape: ModelConfig
) -> Full:
    """Return the policy with this name (`WorkerConfig.kv_policy`) for a model.

    Raises InvalidArgumentError if the model lacks summary tokens.
    """
    if name == "summary":
        if not shape.summary_tokens:
            lack = "this one's config.json has no `summary_tokens`"
            message = f"--kv-policy summary needs a model with summary tokens: {lack}"
            raise InvalidArgumentError(message)
        ids = range(shape.text_vocab_size, shape.vocab_size)
        return Summary(shape.summary_segment, tuple(ids))
    if name == "window":
        return Window(sinks, window)
    if name == "compressive":
        return Compressive(sinks, window, gate_NH)
    return Score(sinks, window, share) if name == "score" else FULL
