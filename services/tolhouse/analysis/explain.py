"""What the memory of a model holds for a token: row norms, strongest keys, nearest rows.

A key of a layer is one of FFN-M's K hidden units. Its coefficient for a token is SiLU(gate) * up, the factor with which
its value (a column of down_proj) enters the row (PAPER section 2). Two tokens are near when the cosine of their rows,
all layers joined, is high.
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

_BATCH_TOKENS = 1024
_SHARERS = 4  # tokens told for a key


@torch.inference_mode()
def explain_text(
    checkpoint: Checkpoint, text: str, keys: int, neighbours: int, rows: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """One entry per distinct token of `text`, in order: id, token, norms by layer, strongest keys by layer, nearest.

    Norms and neighbours are those of the model's rows or, of a table, of `rows` [V, N, D], which may have X0 in front.
    """
    if not checkpoint.config.num_rows:
        raise InvalidArgument(
            f"checkpoint {checkpoint.path.name} is of kind {checkpoint.config.kind}: it has no token memory"
        )
    tokenizer, model = checkpoint.tokenizer(), checkpoint.model()
    try:
        ids = list(dict.fromkeys(tokenizer.encode(text).ids))
    except TypeError:  # bytes of the command line that are not UTF-8
        raise InvalidArgument(f"the text {text[:80]!a} is not UTF-8") from None
    if not ids:
        raise InvalidArgument("the text is empty; at least one token is needed")
    ids_T = torch.tensor(ids)
    of = (
        probed(rows[:, rows.shape[1] - checkpoint.config.num_rows :])
        if rows is not None
        else model.rows
    )
    norms_TN = of(ids_T).norm(dim=-1).T
    near = nearest(of, checkpoint.config.vocab_size, ids_T, neighbours)
    by_layer = [coefficients(model, layer, ids_T) for layer in range(checkpoint.config.num_rows)]
    strongest = [c_TK.abs().topk(min(keys, c_TK.shape[1])).indices for c_TK in by_layer]
    sharers = [shared_by(model, layer, top_TK, _SHARERS) for layer, top_TK in enumerate(strongest)]
    return [
        {
            "id": token,
            "token": tokenizer.decode([token], skip_special_tokens=False),
            "norms": [round(n, 4) for n in norms_TN[t].tolist()],
            "keys": [
                [
                    {
                        "key": k,
                        "coefficient": round(float(c_TK[t, k]), 4),
                        "shared_by": [
                            tokenizer.decode([i], skip_special_tokens=False)
                            for i in who_TKS[t, place].tolist()
                        ],
                    }
                    for place, k in enumerate(top_TK[t].tolist())
                ]
                for c_TK, top_TK, who_TKS in zip(by_layer, strongest, sharers, strict=True)
            ],
            "nearest": [
                {
                    "id": i,
                    "token": tokenizer.decode([i], skip_special_tokens=False),
                    "cosine": round(c, 4),
                }
                for i, c in zip(near.indices[t].tolist(), near.values[t].tolist(), strict=True)
            ],
        }
        for t, token in enumerate(ids)
    ]


def coefficients(model: Transformer, layer: int, ids_T: Tensor) -> Tensor:
    """Key coefficients [T, K] of one layer."""
    ffn = cast("ContextFreeFFN", model.ffn_m[layer])
    x_TD = ffn.norm(model.x0(ids_T))
    return F.silu(ffn.mlp.gate_proj(x_TD)) * ffn.mlp.up_proj(x_TD)


def shared_by(model: Transformer, layer: int, keys_TK: Tensor, count: int) -> Tensor:
    """The `count` tokens, strongest first, that have the largest coefficients of each of the keys [T, K], by magnitude: [T, K, count]."""
    wanted, place_TK = keys_TK.unique(return_inverse=True)
    vocabulary = torch.arange(model.config.vocab_size)
    c_VW = torch.cat(
        [coefficients(model, layer, part)[:, wanted] for part in vocabulary.split(_BATCH_TOKENS)]
    )
    return c_VW.abs().topk(min(count, len(vocabulary)), dim=0).indices.T[place_TK]


@torch.inference_mode()
def explorer(checkpoint: Checkpoint, keys: int = 3, neighbours: int = 5) -> dict[str, np.ndarray]:
    """The same of all tokens, for the gateway's explorer page: arrays by the names that gateway/explore.py reads."""
    if not checkpoint.config.num_rows:
        raise InvalidArgument(
            f"checkpoint {checkpoint.path.name} is of kind {checkpoint.config.kind}: it has no token memory"
        )
    model, parts = (
        checkpoint.model(),
        torch.arange(checkpoint.config.vocab_size).split(_BATCH_TOKENS),
    )
    norms, strongest, values, sharers = [], [], [], []
    for layer, ffn in enumerate(model.ffn_m):
        c_VK = torch.cat([coefficients(model, layer, part) for part in parts])
        top_Vk = c_VK.abs().topk(min(keys, c_VK.shape[1])).indices
        norms.append(torch.cat([ffn(model.x0(part)).norm(dim=-1) for part in parts]))
        strongest.append(top_Vk)
        values.append(c_VK.gather(1, top_Vk))
        sharers.append(c_VK.abs().topk(min(_SHARERS, len(c_VK)), dim=0).indices.T)
    near = [nearest(model.rows, checkpoint.config.vocab_size, part, neighbours) for part in parts]
    arrays = {
        "norms": torch.stack(norms, 1).half(),
        "keys": torch.stack(strongest, 1).int(),
        "coefficients": torch.stack(values, 1).half(),
        "sharers": torch.stack(sharers).int(),
        "near": torch.cat([n.indices for n in near]).int(),
        "cosines": torch.cat([n.values for n in near]).half(),
    }
    of = {
        "tokenizer_id": np.array(checkpoint.tokenizer_id),
        "model_id": np.array(checkpoint.model_id()),
    }
    return {**of, **{name: array.numpy() for name, array in arrays.items()}}


def nearest(rows: RowsOf, vocab_size: int, ids_T: Tensor, count: int) -> torch.return_types.topk:
    """The `count` tokens whose rows are nearest to each of `ids_T` by cosine, themselves left out."""

    def directions(part_U: Tensor) -> Tensor:
        return F.normalize(rows(part_U).transpose(0, 1).flatten(1), dim=-1)

    wanted = directions(ids_T)
    cosines_TV = torch.cat(
        [wanted @ directions(part).T for part in torch.arange(vocab_size).split(_BATCH_TOKENS)],
        dim=1,
    )
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
        lines.append(
            "  nearest   "
            + "  ".join(f"{n['token']!r} ({n['id']}) {n['cosine']:.2f}" for n in entry["nearest"])
        )
    return "\n".join(lines)
