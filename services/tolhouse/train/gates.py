"""Trains the gates of the policy `compressive` (engine/kv_policy.py), with the model frozen.

EdgeInfinite (arXiv 2503.22196) adds trained gates to a model and leaves its weights as they are.

Shapes are those of model/transformer.py, with B sequences of S tokens.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from tolhouse.config import GatesConfig
from tolhouse.errors import InvalidArgumentError
from tolhouse.logs import event
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import Cache, NoCache, Transformer, for_queries, rotary, rotate

Batch = tuple[Tensor, Tensor]  # inputs and targets [B, S]; a target of -100 has no loss
IGNORED = -100
RATE = 0.1  # of Adam, for the logits of the gates


class GatedMemory:
    """A cache for T = B * S tokens of B whole sequences, with a window and a memory.

    It computes what a worker computes with `Compressive`, with gradients, also of `gate_NH`.
    """

    def __init__(
        self, config: ModelConfig, sequence_length: int, sinks: int, window: int, gate_NH: Tensor
    ) -> None:
        self.config, self.sequence_length, self.gate_NH = config, sequence_length, gate_NH
        own_S1 = torch.arange(sequence_length, device=gate_NH.device)[:, None]
        other_S = own_S1[:, 0]
        causal_SS = other_S <= own_S1
        self.seen_SS = causal_SS & ((other_S < sinks) | (other_S > own_S1 - window))
        self.passed_SS = causal_SS & ~self.seen_SS
        self.back_S = -other_S

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        every = q_THE, for_queries(k_TGE, q_THE), for_queries(v_TGE, q_THE)
        heads = (-1, self.sequence_length, *q_THE.shape[1:])
        # Computed again for the gradients, because weights [B, H, S, S] take much memory.
        out_BSHE = checkpoint(
            self._mixed,
            *(x.reshape(heads) for x in every),
            self.gate_NH[layer],
            use_reentrant=False,
        )
        return out_BSHE.reshape(q_THE.shape)

    def _mixed(self, q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, gate_H: Tensor) -> Tensor:
        rope = rotary(self.back_S, self.config, q_BSHE.dtype)
        own, other = (F.elu(rotate(x, rope)).transpose(1, 2) + 1 for x in (q_BSHE, k_BSHE))
        q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BSHE, v_BSHE))  # [B, H, S, E]
        local = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen_SS)
        weights_BHSS = own @ other.transpose(2, 3) * self.passed_SS
        recalled = weights_BHSS @ v / weights_BHSS.sum(-1, keepdim=True).clamp_min(1e-30)
        mixed = torch.lerp(local, recalled, gate_H.to(q.dtype)[:, None, None])
        return torch.where(self.passed_SS.any(1)[:, None], mixed, local).transpose(1, 2)


def loss_of(model: Transformer, batch: Batch, cache: Cache) -> Tensor:
    """Return the mean loss of the targets, in nats."""
    ids_BS, targets_BS = batch
    ids_T, targets_T = ids_BS.flatten(), targets_BS.flatten()
    positions_T = torch.arange(ids_BS.shape[1], device=ids_T.device).repeat(len(ids_BS))
    hidden_TD = model.hidden(ids_T, positions_T, cache, model.rows(ids_T))
    kept_T = targets_T != IGNORED
    return F.cross_entropy(model.lm_head(hidden_TD[kept_T]), targets_T[kept_T])


def train_gates(
    model: Transformer, batches: Iterable[Batch], steps: int, sinks: int, window: int
) -> Tensor:
    """Return gates [N, H] that lower the loss of `steps` batches. The model does not change."""
    config, device = model.config, model.norm.weight.device
    shape = config.num_hidden_layers, config.num_attention_heads
    logits_NH = nn.Parameter(torch.zeros(shape, device=device))
    optimizer = torch.optim.Adam([logits_NH], RATE)
    model.requires_grad_(False)
    look: Any = {"dynamic_ncols": True, "disable": None}  # shown on a terminal only
    bar = tqdm(batches, total=steps, desc="train gates", **look)
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        cache = GatedMemory(config, batch[0].shape[1], sinks, window, logits_NH.sigmoid())
        loss = loss_of(model, batch, cache)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if bar.disable and (step + 1) * 10 // steps > step * 10 // steps:
            event("training gates", step=step + 1, steps=steps, loss=round(loss.item(), 3))
    return logits_NH.sigmoid().detach().cpu()


def train_on_text(
    model: Transformer, ids: np.ndarray, settings: GatesConfig
) -> tuple[Tensor, dict[str, float]]:
    """Train gates on token ids [T], of which the last tenth is held out.

    Returns the gates [N, H], and the held-out loss in nats per token by policy: `full`, `window`
    and `compressive`. Raises InvalidArgumentError if the text has fewer than two sequences, or if
    a sequence is not longer than the sinks and the window.
    """
    config, device = model.config, model.norm.weight.device
    length = min(settings.sequence_tokens, config.max_position_embeddings)
    sinks, window = settings.kv_sinks, settings.kv_window
    if length <= sinks + window:
        rule = f"sequences of {length} tokens are not longer than the sinks and the window"
        raise InvalidArgumentError(f"{rule}, {sinks} + {window} tokens: there is nothing to train")
    held_out = max(length + 1, len(ids) // 10)
    if len(ids) < held_out + length + 1:
        need = f"at least {2 * (length + 1)} are needed"
        raise InvalidArgumentError(f"{settings.text} gives {len(ids)} tokens; {need}")
    train, rest = (torch.from_numpy(part).to(device) for part in np.split(ids, [-held_out]))
    batches = _random_batches(train, length, settings)
    gate_NH = train_gates(model, batches, settings.steps, sinks, window)
    shown = rest.unfold(0, length + 1, length)[: settings.held_out_sequences]
    found = {}
    with torch.inference_mode():
        for name, gate in (("window", 0 * gate_NH), ("compressive", gate_NH)):
            cache = GatedMemory(config, length, sinks, window, gate.to(device))
            found[name] = _mean_loss(model, shown, cache)
        found["full"] = _mean_loss(model, shown, NoCache(length))
    return gate_NH, found


def _random_batches(ids: Tensor, length: int, settings: GatesConfig) -> Iterator[Batch]:
    random = np.random.default_rng(settings.seed)
    for _ in range(settings.steps):
        starts = random.integers(0, len(ids) - length, settings.batch_sequences)
        windows = torch.stack([ids[start : start + length + 1] for start in starts])
        yield windows[:, :-1], windows[:, 1:]


def _mean_loss(model: Transformer, windows: Tensor, cache: Cache) -> float:
    losses = [loss_of(model, (one[:, :-1], one[:, 1:]), cache).item() for one in windows.split(1)]
    return float(np.mean(losses))
