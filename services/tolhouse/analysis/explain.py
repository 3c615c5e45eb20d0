"""What the memory of a model holds for a token: row norms, strongest keys, nearest rows.

A key of a layer is one of FFN-M's K hidden units. Its coefficient for a token is SiLU(gate) * up,
the factor of its value (a column of down_proj) in the row (PAPER section 2). Two tokens are near
when the cosine of their rows, all layers joined, is high.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.analysis.evaluate import RowsOf
from tolhouse.analysis.probes import probed
from tolhouse.errors import InvalidArgument
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.transformer import ContextFreeFFN, Transformer
from tolhouse.sources.memoryllm import MemoryLLM

_BATCH_TOKENS = 1024
_SHARERS = 4  # tokens shown for a key


@torch.inference_mode()
def explain_text(
    checkpoint: Checkpoint, text: str, keys: int, neighbours: int, rows: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Of each distinct token: id, token, norms by layer, strongest keys by layer, nearest.

    Norms and neighbours are of the model's rows or, of a table, of `rows` [V, N, D], which may
    have X0 in front.
    """
    tokenizer, config, model = checkpoint.tokenizer(), checkpoint.config, model_of(checkpoint)
    try:
        ids = list(dict.fromkeys(tokenizer.encode(text).ids))
    except TypeError:  # bytes of the command line that are not UTF-8
        raise InvalidArgument(f"the text {text[:80]!a} is not UTF-8") from None
    if not ids:
        raise InvalidArgument("the text is empty; at least one token is needed")
    ids_T = torch.tensor(ids)
    rows_of = model.rows if rows is None else probed(rows[:, -config.num_rows :])
    norms_TN = rows_of(ids_T).norm(dim=-1).T
    near = nearest(rows_of, config.vocab_size, ids_T, neighbours)

    def word(i: int) -> str:
        return tokenizer.decode([i], skip_special_tokens=False)

    strongest: list[list[list[dict[str, Any]]]] = [[] for _ in ids]
    for layer in range(config.num_rows):
        c_TK = coefficients(model, layer, ids_T)
        top_TK = c_TK.abs().topk(min(keys, c_TK.shape[1])).indices
        sharers_TKS = shared_by(model, layer, top_TK, _SHARERS)
        for t, by_key in enumerate(strongest):
            top = zip(top_TK[t].tolist(), sharers_TKS[t].tolist(), strict=True)
            names = ("key", "coefficient", "shared_by")
            values = [(k, round(float(c_TK[t, k]), 4), [*map(word, who)]) for k, who in top]
            by_key.append([dict(zip(names, value, strict=True)) for value in values])
    return [
        {
            "id": token,
            "token": word(token),
            "norms": [round(n, 4) for n in norms_TN[t].tolist()],
            "keys": strongest[t],
            "nearest": [
                {"id": i, "token": word(i), "cosine": round(c, 4)}
                for i, c in zip(near.indices[t].tolist(), near.values[t].tolist(), strict=True)
            ],
        }
        for t, token in enumerate(ids)
    ]


def model_of(checkpoint: Checkpoint) -> Transformer:
    """The model; InvalidArgument if it has no token memory."""
    return MemoryLLM(checkpoint).model


def coefficients(model: Transformer, layer: int, ids_T: Tensor | None = None) -> Tensor:
    """Key coefficients [T, K] of one layer, by default of the whole vocabulary."""
    ids_T = torch.arange(model.config.vocab_size) if ids_T is None else ids_T
    ffn = cast("ContextFreeFFN", model.ffn_m[layer])
    parts = [ffn.norm(model.x0(part)) for part in ids_T.split(_BATCH_TOKENS)]
    return torch.cat([F.silu(ffn.mlp.gate_proj(x_TD)) * ffn.mlp.up_proj(x_TD) for x_TD in parts])


def shared_by(model: Transformer, layer: int, keys_TK: Tensor, count: int) -> Tensor:
    """For each of the keys [T, K] the `count` tokens of the largest coefficients: [T, K, count]."""
    unique, index_TK = keys_TK.unique(return_inverse=True)
    parts = torch.arange(model.config.vocab_size).split(_BATCH_TOKENS)
    c_VU = torch.cat([coefficients(model, layer, part)[:, unique].abs() for part in parts])
    return c_VU.topk(min(count, len(c_VU)), dim=0).indices.T[index_TK]


@torch.inference_mode()
def explorer(checkpoint: Checkpoint, keys: int = 3, neighbours: int = 5) -> dict[str, np.ndarray]:
    """The same of all tokens, for the gateway's explorer page: arrays that gateway/explore.py reads."""
    model, count = model_of(checkpoint), checkpoint.config.vocab_size
    parts = torch.arange(count).split(_BATCH_TOKENS)
    by_layer: dict[str, list[Tensor]] = {"keys": [], "coefficients": [], "sharers": []}
    for layer in range(checkpoint.config.num_rows):
        c_VK = coefficients(model, layer)
        top_Vk = c_VK.abs().topk(min(keys, c_VK.shape[1])).indices
        by_layer["keys"].append(top_Vk)
        by_layer["coefficients"].append(c_VK.gather(1, top_Vk))
        by_layer["sharers"].append(c_VK.abs().topk(min(_SHARERS, count), dim=0).indices.T)
    near = [nearest(model.rows, count, part, neighbours) for part in parts]
    arrays = {
        "norms": torch.cat([model.rows(part).norm(dim=-1).T for part in parts]).half(),
        "keys": torch.stack(by_layer["keys"], 1).int(),
        "coefficients": torch.stack(by_layer["coefficients"], 1).half(),
        "sharers": torch.stack(by_layer["sharers"]).int(),
        "near": torch.cat([n.indices for n in near]).int(),
        "cosines": torch.cat([n.values for n in near]).half(),
    }
    ids = {"tokenizer_id": checkpoint.tokenizer_id, "model_id": checkpoint.model_id()}
    return {name: np.asarray(value) for name, value in {**ids, **arrays}.items()}


def nearest(rows: RowsOf, vocab_size: int, ids_T: Tensor, count: int) -> torch.return_types.topk:
    """The `count` tokens whose rows are nearest to each of `ids_T` by cosine, without itself."""

    def directions(part_U: Tensor) -> Tensor:
        return F.normalize(rows(part_U).transpose(0, 1).flatten(1), dim=-1)

    own_TX, parts = directions(ids_T), torch.arange(vocab_size).split(_BATCH_TOKENS)
    cosines_TV = torch.cat([own_TX @ directions(part).T for part in parts], dim=1)
    cosines_TV[torch.arange(len(ids_T)), ids_T] = -torch.inf
    return cosines_TV.topk(min(count, vocab_size - 1))


def table_of(found: list[dict[str, Any]]) -> str:
    """The same for a terminal."""
    lines = []
    for entry in found:
        lines.append(f"{entry['token']!r} (id {entry['id']})")
        for layer, (norm, keys) in enumerate(zip(entry["norms"], entry["keys"], strict=True)):
            strongest = "  ".join(
                f"{k['key']}:{k['coefficient']:.2f} {' '.join(map(repr, k['shared_by'][:2]))}"
                for k in keys
            )
            lines.append(f"  layer {layer:>2}  norm {norm:8.3f}  keys {strongest}")
        near = (f"{n['token']!r} ({n['id']}) {n['cosine']:.2f}" for n in entry["nearest"])
        lines.append("  nearest   " + "  ".join(near))
    return "\n".join(lines)
