"""Surveys the memory of a model layer by layer, with the measures of the paper (section 5)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tolhouse.analysis.evaluate import probed, read_text
from tolhouse.analysis.explain import coefficients
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.losses import evaluate
from tolhouse.model.tokenizer import TokenTexts
from tolhouse.sources.memoryllm import MemoryLLM

OUTLIER = 6.0
_BAR: Any = {"leave": False, "dynamic_ncols": True, "disable": None}  # shown on a terminal only
SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
DEFINITIONS = {
    "source": "measures follow section 5 of the MemoryLLM paper (arXiv 2602.00398), "
    "which does not define them; the definitions are ours",
    "key coefficients": "of a token, for each of a layer's K hidden units: SiLU(gate) * up, "
    "the factor of the unit's value in the row (section 2)",
    "clusters": "spherical k-means of the tokens' coefficient vectors, each of length one",
    "clustering": "share of these vectors' variance that the clusters' centres explain",
    "outliers": f"coefficients of a token whose magnitude is over {OUTLIER:g} times the token's "
    "root mean square; their mean number per token",
    "rank for 90%": "singular values of the layer's rows, less their mean, that hold 90% of the "
    "energy",
    "probes": "held-out perplexity with all rows times a factor, or without one layer's, over "
    "that with the rows as they are",
}
_ROUNDS = 12
_SHOWN_TOKENS = 8  # shown for each cluster
_SHOWN_CLUSTERS, _PRINTED_CLUSTERS = 12, 4
_BATCH_TOKENS = 2048


@torch.inference_mode()
def survey(
    checkpoint: Checkpoint, clusters: int, probe_tokens: int, rows: np.ndarray | None = None
) -> dict[str, Any]:
    """Compute all measures of DEFINITIONS for the rows of the model, or for `rows` [V, N, D].

    `rows` are those of a table and may begin with X0. The probes read the first tokens of the
    default text, and 0 tokens skip the probes.
    """
    source, config = MemoryLLM(checkpoint), checkpoint.config
    if probe_tokens == 1:
        raise InvalidArgumentError("the probes need at least 2 tokens, or 0 for no probes")
    if not 1 < clusters <= config.vocab_size:
        allowed = f"from 2 to {config.vocab_size}, the vocabulary"
        raise InvalidArgumentError(f"the number of clusters must be {allowed}, not {clusters}")
    tokenizer, model = checkpoint.tokenizer(), source.model
    rows = source.rows() if rows is None else rows
    x0 = rows.shape[1] - config.num_rows
    text = read_text(checkpoint, None, max(probe_tokens, 200_000))
    counts = np.bincount(text, minlength=config.vocab_size)
    layers = []
    for layer in tqdm(range(config.num_rows), desc="layers", **_BAR):
        c_VK, rows_VD = coefficients(model, layer), rows[:, x0 + layer]
        rms_V1 = c_VK.square().mean(1, keepdim=True).sqrt()
        cluster_V, explained = k_means(F.normalize(c_VK, dim=1), clusters)
        energy = np.linalg.svd(rows_VD - rows_VD.mean(0), compute_uv=False) ** 2
        outliers = (c_VK.abs() > OUTLIER * rms_V1).sum(1).float().mean()
        entry = {
            "layer": layer,
            "clustering": round(explained, 4),
            "outliers": round(float(outliers), 3),
            "mean_norm": round(float(np.linalg.norm(rows_VD, axis=1).mean()), 4),
            "rank_90": int(np.searchsorted(np.cumsum(energy), 0.9 * energy.sum())) + 1,
            "spectrum": [float(f"{value:.4g}") for value in np.sqrt(energy)],
            "clusters": _described(cluster_V.numpy(), counts, tokenizer),
        }
        layers.append(entry)
    found = {"checkpoint": checkpoint.name, "kind": config.kind, "vocab_size": config.vocab_size}
    found |= {"definitions": DEFINITIONS, "layers": layers}
    if probe_tokens:
        ids = text[:probe_tokens]
        cases: list[tuple[float, tuple[int, ...]]] = [(1, ()), *((s, ()) for s in SCALES)]
        cases += [(1, (layer,)) for layer in range(config.num_rows)]
        exact, *others = (
            evaluate(model, ids, probed(rows, scale, absent, x0)).perplexity
            for scale, absent in tqdm(cases, desc="probes", **_BAR)
        )
        ratios = [round(perplexity / exact, 4) for perplexity in others]
        found["probes"] = {
            "tokens": len(ids),
            "perplexity": round(exact, 4),
            "row_scale": {f"{s:g}": ratio for s, ratio in zip(SCALES, ratios, strict=False)},
            "without_layer": ratios[len(SCALES) :],
        }
    return found


def k_means(x_VK: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, float]:
    """Return the cluster numbers [V] of unit vectors, and the explained share of their variance."""
    start = torch.randperm(len(x_VK), generator=torch.Generator().manual_seed(seed))[:clusters]
    centres_CK = x_VK[start]
    for _ in range(_ROUNDS):
        parts = x_VK.split(_BATCH_TOKENS)
        cluster_V = torch.cat([(part @ centres_CK.T).argmax(1) for part in parts])
        sums_CK = torch.zeros_like(centres_CK).index_add_(0, cluster_V, x_VK)
        sizes_C1 = torch.bincount(cluster_V, minlength=clusters)[:, None]
        centres_CK = torch.where(sizes_C1 == 0, centres_CK, F.normalize(sums_CK, dim=1))
    means_CK = sums_CK / sizes_C1.clamp(min=1)
    within = (x_VK - means_CK[cluster_V]).square().sum()
    total = (x_VK - x_VK.mean(0)).square().sum()
    return cluster_V, float(1 - within / total)


def _described(cluster_V: np.ndarray, counts: np.ndarray, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the clusters by their frequency in text, each with its most frequent tokens."""
    share = np.bincount(cluster_V, weights=counts) / max(1, counts.sum())
    described, texts = [], TokenTexts(tokenizer)
    for number in np.argsort(-share)[:_SHOWN_CLUSTERS].tolist():
        members = np.flatnonzero(cluster_V == number)
        top = members[np.argsort(-counts[members], kind="stable")][:_SHOWN_TOKENS].tolist()
        words = [texts.name(i)[0] for i in top]
        entry = {"tokens": len(members), "share_of_text": round(float(share[number]), 4)}
        described.append({**entry, "most_frequent": words})
    return described


def summary(found: dict[str, Any]) -> str:
    """Format the result of `survey` for a terminal."""
    lines = [f"{found['checkpoint']}: {found['kind']}, {found['vocab_size']} tokens"]
    lines.append("  layer  mean norm  clustering  outliers  rank for 90%")
    for e in found["layers"]:
        head = f"  {e['layer']:>5}  {e['mean_norm']:9.3f}  {e['clustering']:10.3f}"
        lines.append(f"{head}  {e['outliers']:8.2f}  {e['rank_90']:>12}")
    for e in found["layers"]:
        lines.append(f"most frequent clusters of layer {e['layer']}")
        for c in e["clusters"][:_PRINTED_CLUSTERS]:
            words = " ".join(map(repr, c["most_frequent"]))
            lines.append(f"  {c['share_of_text']:6.1%}  {c['tokens']:>6} tokens  {words}")
    if probes := found.get("probes"):
        ratios, dropped = probes["row_scale"], probes["without_layer"]
        base = f"{probes['perplexity']:.3f}, that of {probes['tokens']:,} tokens with all rows"
        lines.append(f"perplexity over {base}")
        rows = [("factor", ratios), ("", (f"{ratio:.3f}" for ratio in ratios.values()))]
        rows += [("without", (f"layer {layer}" for layer in range(len(dropped))))]
        rows += [("", (f"{ratio:.3f}" for ratio in dropped))]
        lines += [f"  {head:7}" + "".join(f"{cell:>9}" for cell in cells) for head, cells in rows]
    lines += [f"{word}: {meaning}" for word, meaning in found["definitions"].items()]
    return "\n".join(lines)
