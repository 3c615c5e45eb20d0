"""Explains the memory of a model by token: row norms, strongest keys and nearest rows.

A key of a layer is one of FFN-M's K hidden units. Its coefficient for a token is SiLU(gate) * up.
The row is the sum of the values (the columns of down_proj) times their coefficients (paper,
section 2). Two tokens are near if the cosine of their rows, with all layers joined, is high.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.analysis.evaluate import probed
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.ffn import SwiGLU
from tolhouse.model.losses import RowsOf
from tolhouse.model.tokenizer import TokenTexts
from tolhouse.model.transformer import ContextFreeFFN, Transformer
from tolhouse.sources.memoryllm import MemoryLLM

_BATCH_TOKENS = 1024
_SHARERS = 4  # tokens shown for a key


@torch.inference_mode()
def explain_text(
    checkpoint: Checkpoint, text: str, keys: int, neighbours: int, rows: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return id, text, norms, strongest keys and nearest tokens of each distinct token of `text`.

    Norms and keys are listed by layer. `keys` and `neighbours` limit the numbers of keys and of
    nearest tokens. Norms and nearest tokens are computed from the model's rows, or from the table
    rows `rows`: [V, N, D], or [V, 1 + N, D] with X0 first.

    Raises InvalidArgumentError if the text is empty.
    """
    model, config = MemoryLLM(checkpoint).model, checkpoint.config
    tokenizer = checkpoint.tokenizer()
    texts = TokenTexts(tokenizer)
    ids = list(dict.fromkeys(tokenizer.encode(text).ids))
    if not ids:
        raise InvalidArgumentError("the text is empty; at least one token is needed")
    ids_T = torch.tensor(ids)
    rows_of = model.rows if rows is None else probed(rows[:, -config.num_rows :])
    norms_TN = rows_of(ids_T).norm(dim=-1).T
    near = nearest(rows_of, config.vocab_size, ids_T, neighbours)

    def word(i: int) -> str:
        return texts.name(i)[0]

    found: list[dict[str, Any]] = [
        {
            "id": token,
            "token": word(token),
            "norms": [round(norm, 4) for norm in norms_TN[t].tolist()],
            "keys": [],
            "nearest": [
                {"id": i, "token": word(i), "cosine": round(cosine, 4)}
                for i, cosine in zip(near.indices[t].tolist(), near.values[t].tolist(), strict=True)
            ],
        }
        for t, token in enumerate(ids)
    ]
    for layer in range(config.num_rows):
        c_TK = coefficients(model, layer, ids_T)
        top_TK = c_TK.abs().topk(min(keys, c_TK.shape[1])).indices
        sharers_TKS = shared_by(model, layer, top_TK, _SHARERS).tolist()
        for t, entry in enumerate(found):
            entry["keys"].append([])
            for k, ids in zip(top_TK[t].tolist(), sharers_TKS[t], strict=True):
                key = {"key": k, "coefficient": round(float(c_TK[t, k]), 4)}
                entry["keys"][-1].append({**key, "shared_by": [*map(word, ids)]})
    return found


def coefficients(model: Transformer, layer: int, ids_T: Tensor | None = None) -> Tensor:
    """Return the key coefficients [T, K] of one layer.

    Without `ids_T`, T is the size of the vocabulary. Raises InvalidArgumentError for a form of
    FFN-M without keys.
    """
    ids_T = torch.arange(model.config.vocab_size) if ids_T is None else ids_T
    ffn = cast("ContextFreeFFN", model.ffn_m[layer])
    if not isinstance(ffn.mlp, SwiGLU):
        allowed = "forms with keys are swiglu, moc and avgk"
        raise InvalidArgumentError(f"FFN-M of the form {model.config.ffn_m} has no keys; {allowed}")
    parts = ids_T.split(_BATCH_TOKENS)
    return torch.cat([ffn.mlp.coefficients(ffn.norm(model.x0(part))) for part in parts])


def shared_by(model: Transformer, layer: int, keys_TK: Tensor, count: int) -> Tensor:
    """Return the `count` tokens with the largest coefficients of each key: [T, K, count]."""
    unique, index_TK = keys_TK.unique(return_inverse=True)
    parts = torch.arange(model.config.vocab_size).split(_BATCH_TOKENS)
    c_VU = torch.cat([coefficients(model, layer, part)[:, unique].abs() for part in parts])
    return c_VU.topk(min(count, len(c_VU)), dim=0).indices.T[index_TK]


@torch.inference_mode()
def explorer(checkpoint: Checkpoint, keys: int = 3, neighbours: int = 5) -> dict[str, np.ndarray]:
    """Return the arrays of a memory file, which holds `explain_text` for the whole vocabulary.

    `tolhouse.gateway.explorer.data.MemoryFile` describes their shapes.
    """
    model, count = MemoryLLM(checkpoint).model, checkpoint.config.vocab_size
    strongest, values, sharers = [], [], []
    for layer in range(checkpoint.config.num_rows):
        c_VK = coefficients(model, layer)
        strongest.append(c_VK.abs().topk(min(keys, c_VK.shape[1])).indices)
        values.append(c_VK.gather(1, strongest[-1]))
        sharers.append(c_VK.abs().topk(min(_SHARERS, count), dim=0).indices.T)
    parts = torch.arange(count).split(_BATCH_TOKENS)
    near = [nearest(model.rows, count, part, neighbours) for part in parts]
    arrays = {
        "tokenizer_id": checkpoint.tokenizer_id,
        "model_id": checkpoint.model_id(),
        "norms": torch.cat([model.rows(part).norm(dim=-1).T for part in parts]).half(),
        "keys": torch.stack(strongest, 1).int(),
        "coefficients": torch.stack(values, 1).half(),
        "sharers": torch.stack(sharers).int(),
        "near": torch.cat([n.indices for n in near]).int(),
        "cosines": torch.cat([n.values for n in near]).half(),
    }
    return {name: np.asarray(value) for name, value in arrays.items()}


def nearest(rows: RowsOf, vocab_size: int, ids_T: Tensor, count: int) -> torch.return_types.topk:
    """Return for each of `ids_T` the `count` other tokens with the highest cosine between rows."""

    def directions(part_U: Tensor) -> Tensor:
        return F.normalize(rows(part_U).transpose(0, 1).flatten(1), dim=-1)

    own_TX, parts = directions(ids_T), torch.arange(vocab_size).split(_BATCH_TOKENS)
    cosines_TV = torch.cat([own_TX @ directions(part).T for part in parts], dim=1)
    cosines_TV[torch.arange(len(ids_T)), ids_T] = -torch.inf
    return cosines_TV.topk(min(count, vocab_size - 1))


def table_of(found: list[dict[str, Any]]) -> str:
    """Format the result of `explain_text` for a terminal."""
    lines = []
    for entry in found:
        lines.append(f"{entry['token']!r} (id {entry['id']})")
        for layer, (norm, keys) in enumerate(zip(entry["norms"], entry["keys"], strict=True)):
            lines.append(f"  layer {layer:>2}  norm {norm:8.3f}  keys ")
            for k in keys:
                tokens = " ".join(map(repr, k["shared_by"][:2]))
                lines[-1] += f"{k['key']}:{k['coefficient']:.2f} {tokens}  "
        near = (f"{n['token']!r} ({n['id']}) {n['cosine']:.2f}" for n in entry["nearest"])
        lines.append("  nearest   " + "  ".join(near))
    return "\n".join(map(str.rstrip, lines))
