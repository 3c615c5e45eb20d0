"""What the memory of a model holds as a whole, layer by layer: the measures of PAPER section 5, which leaves their definitions open."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tolhouse.analysis.evaluate import evaluate
from tolhouse.analysis.explain import coefficients
from tolhouse.analysis.probes import model_rows, probed, read_text
from tolhouse.errors import InvalidArgument
from tolhouse.model.checkpoint import Checkpoint

OUTLIER = 6.0
ALPHAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
DEFINITIONS = {
    "source": "what is measured follows section 5 of the MemoryLLM paper (arXiv 2602.00398), which is silent on how; the definitions are ours",
    "key coefficients": "of a token, for each of a layer's K hidden units: SiLU(gate) * up, the factor of the unit's value in the row (section 2)",
    "clusters": "spherical k-means of the tokens' coefficient vectors, each brought to length one",
    "clustering": "share of these vectors' variance that the clusters' centres explain: 0 for none, 1 for all",
    "outliers": f"coefficients of a token whose magnitude is over {OUTLIER:g} times the token's root mean square; their mean number a token",
    "rank for 90%": "how many singular values of the layer's rows, mean taken off, hold 90% of the energy",
    "probes": "held-out perplexity with all rows times alpha, or without one layer's, over that with them as they are",
}
_ROUNDS = 12
_SHOWN_TOKENS = 8  # of a cluster
_SHOWN_CLUSTERS, _TOLD_CLUSTERS = 12, 4
_BATCH_TOKENS = 2048


@torch.inference_mode()
def survey(
    checkpoint: Checkpoint,
    clusters: int,
    probe_tokens: int,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> dict[str, Any]:
    """All of DEFINITIONS as plain values, for the model's rows or, of a table, `rows` [V, N, D] with X0 in front if it has it.

    The probes read the default text's first tokens, 0 for none. InvalidArgument for a model without token memory.
    """
    config = checkpoint.config
    if not config.num_rows:
        raise InvalidArgument(
            f"checkpoint {checkpoint.path.name} is of kind {config.kind}: it has no token memory"
        )
    if probe_tokens == 1:
        raise InvalidArgument(
            "the probes need at least 2 tokens, one to predict the other from, or 0 for no probes"
        )
    if not 1 < clusters <= config.vocab_size:
        raise InvalidArgument(
            f"the number of clusters must be from 2 to {config.vocab_size}, the vocabulary, not {clusters}"
        )
    tokenizer, model = checkpoint.tokenizer(), checkpoint.model()
    rows = model_rows(checkpoint) if rows is None else rows
    x0 = rows.shape[1] - config.num_rows
    text = read_text(checkpoint, None, max(probe_tokens, 200_000))
    counts = np.bincount(text, minlength=config.vocab_size)
    layers = []
    for layer in tqdm(range(config.num_rows), desc="layers", leave=False, dynamic_ncols=True):
        c_VK = torch.cat(
            [
                coefficients(model, layer, part)
                for part in torch.arange(config.vocab_size).split(_BATCH_TOKENS)
            ]
        )
        outliers = (
            (c_VK.abs() > OUTLIER * c_VK.square().mean(1, keepdim=True).sqrt())
            .sum(1)
            .float()
            .mean()
        )
        cluster_V, explained = k_means(F.normalize(c_VK, dim=1), clusters, seed)
        mine = rows[:, x0 + layer]
        energy = np.linalg.svd(mine - mine.mean(0), compute_uv=False) ** 2
        layers.append(
            {
                "layer": layer,
                "clustering": round(explained, 4),
                "outliers": round(float(outliers), 3),
                "mean_norm": round(float(np.linalg.norm(mine, axis=1).mean()), 4),
                "rank_90": int(np.searchsorted(np.cumsum(energy), 0.9 * energy.sum())) + 1,
                "spectrum": [float(f"{value:.4g}") for value in np.sqrt(energy)],
                "clusters": _described(cluster_V.numpy(), counts, tokenizer),
            }
        )
    found: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "kind": config.kind,
        "vocab_size": config.vocab_size,
    }
    found |= {"definitions": DEFINITIONS, "layers": layers}
    if probe_tokens:
        ids = text[:probe_tokens]
        asked = [
            (1.0, ()),
            *((alpha, ()) for alpha in ALPHAS),
            *((1.0, (layer,)) for layer in range(config.num_rows)),
        ]
        exact, *others = (
            evaluate(model, ids, probed(rows, alpha, absent, x0)).perplexity
            for alpha, absent in tqdm(asked, desc="probes", leave=False, dynamic_ncols=True)
        )
        ratios = [perplexity / exact for perplexity in others]
        sweep, dropped = ratios[: len(ALPHAS)], ratios[len(ALPHAS) :]
        found["probes"] = {
            "tokens": len(ids),
            "perplexity": round(exact, 4),
            "alpha": {
                f"{alpha:g}": round(ratio, 4) for alpha, ratio in zip(ALPHAS, sweep, strict=True)
            },
            "without_layer": [round(ratio, 4) for ratio in dropped],
        }
    return found


def k_means(x_VK: Tensor, clusters: int, seed: int) -> tuple[Tensor, float]:
    """Cluster numbers [V] of vectors of length one, and the share of their variance that the centres explain; Lloyd's rounds from random tokens."""
    picked = torch.randperm(len(x_VK), generator=torch.Generator().manual_seed(seed))[:clusters]
    centres_CK = x_VK[picked]
    for _ in range(_ROUNDS):
        cluster_V = torch.cat(
            [(part @ centres_CK.T).argmax(1) for part in x_VK.split(_BATCH_TOKENS)]
        )
        sums_CK = torch.zeros_like(centres_CK).index_add_(0, cluster_V, x_VK)
        empty_C = torch.bincount(cluster_V, minlength=clusters) == 0
        centres_CK = torch.where(empty_C[:, None], centres_CK, F.normalize(sums_CK, dim=1))
    sizes_C = torch.bincount(cluster_V, minlength=clusters).clamp(min=1)
    means_CK = torch.zeros_like(centres_CK).index_add_(0, cluster_V, x_VK) / sizes_C[:, None]
    within = (x_VK - means_CK[cluster_V]).square().sum()
    total = (x_VK - x_VK.mean(0)).square().sum()
    return cluster_V, float(1 - within / total)


def _described(cluster_V: np.ndarray, counts: np.ndarray, tokenizer: Any) -> list[dict[str, Any]]:
    """Clusters from the one that text has most of, each with its most frequent tokens."""
    share = np.bincount(cluster_V, weights=counts) / max(1, counts.sum())
    found = []
    for number in np.argsort(-share)[:_SHOWN_CLUSTERS].tolist():
        members = np.flatnonzero(cluster_V == number)
        top = members[np.argsort(-counts[members], kind="stable")][:_SHOWN_TOKENS].tolist()
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in top]
        found.append(
            {
                "tokens": len(members),
                "share_of_text": round(float(share[number]), 4),
                "most_frequent": texts,
            }
        )
    return found


def summary(found: dict[str, Any]) -> str:
    """The same for a terminal."""
    lines = [
        f"{found['checkpoint']}: {found['kind']}, {found['vocab_size']} tokens",
        "  layer  mean norm  clustering  outliers  rank for 90%",
    ]
    lines += [
        f"  {e['layer']:>5}  {e['mean_norm']:9.3f}  {e['clustering']:10.3f}  {e['outliers']:8.2f}  {e['rank_90']:>12}"
        for e in found["layers"]
    ]
    for entry in found["layers"]:
        lines.append(f"clusters of layer {entry['layer']} that text has most of")
        lines += [
            f"  {c['share_of_text']:6.1%}  {c['tokens']:>6} tokens  {' '.join(map(repr, c['most_frequent']))}"
            for c in entry["clusters"][:_TOLD_CLUSTERS]
        ]
    if "probes" in found:
        probes = found["probes"]
        lines.append(
            f"perplexity over {probes['perplexity']:.3f}, that of {probes['tokens']:,} tokens with all rows"
        )
        lines.append("  α      " + "".join(f"{alpha:>9}" for alpha in probes["alpha"]))
        lines.append("         " + "".join(f"{ratio:9.3f}" for ratio in probes["alpha"].values()))
        lines.append(
            "  without"
            + "".join(f"{f'layer {layer}':>9}" for layer in range(len(probes["without_layer"])))
        )
        lines.append("         " + "".join(f"{ratio:9.3f}" for ratio in probes["without_layer"]))
    lines += [f"{word}: {meaning}" for word, meaning in found["definitions"].items()]
    return "\n".join(lines)
