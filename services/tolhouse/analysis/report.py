"""A survey and explained tokens as one HTML file: its plots are inside, and it asks for nothing from anywhere."""

import html
import io
from collections.abc import Callable
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } code { background: #f2f2f2; padding: 0 .2rem; white-space: pre }
svg { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption { color: #555 } h2 { margin-top: 2.5rem }
"""


def report(found: dict[str, Any], tokens: list[dict[str, Any]]) -> str:
    """`found` is of `survey`, `tokens` of `explain_text` and may be empty."""
    layers = found["layers"]
    numbers = [entry["layer"] for entry in layers]

    def by_layer(name: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            axes.plot(numbers, [entry[name] for entry in layers], marker="o")
            axes.set(xlabel="layer", ylabel=name.replace("_", " "))

        return draw

    def spectra(axes: Any) -> None:
        for entry in layers:
            values = entry["spectrum"]
            axes.semilogy([v / values[0] for v in values if v > 0], label=f"layer {entry['layer']}")
        axes.set(xlabel="singular value", ylabel="over the first")
        axes.legend(fontsize="small")

    parts = [
        f"<h1>The memory of {html.escape(found['checkpoint'])}</h1>",
        f"<p>A {html.escape(found['kind'])} model of {found['vocab_size']} tokens and {len(layers)} rows for each.</p>",
        "<dl>"
        + "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>"
            for k, v in found["definitions"].items()
        )
        + "</dl>",
        "<h2>By layer</h2>",
        _table(
            ["layer", "mean norm", "clustering", "outliers per token", "rank for 90%"],
            [
                [e["layer"], e["mean_norm"], e["clustering"], e["outliers"], e["rank_90"]]
                for e in layers
            ],
        ),
        *(
            _figure(by_layer(name), caption)
            for name, caption in (
                ("clustering", "Clustering of key coefficients"),
                ("outliers", "Outliers per token"),
            )
        ),
        _figure(spectra, "Singular values of each layer's rows"),
    ]
    if "probes" in found:
        probes = found["probes"]
        alphas = [float(alpha) for alpha in probes["alpha"]]

        def sweep(axes: Any) -> None:
            axes.semilogy(alphas, list(probes["alpha"].values()), marker="o")
            axes.set(xlabel="α", ylabel="perplexity over that of α = 1")

        def dropped(axes: Any) -> None:
            increases = [ratio - 1 for ratio in probes["without_layer"]]
            axes.bar(numbers, increases)
            scale = (
                "log" if min(increases) > 0 else "linear"
            )  # a log scale has no place for a layer without which nothing is worse
            axes.set(
                xlabel="layer left out", ylabel="relative increase of perplexity", yscale=scale
            )

        parts += [
            "<h2>Probes</h2>",
            f"<p>Perplexity of {probes['tokens']:,} held-out tokens; with all rows it is {probes['perplexity']:.3f}.</p>",
            _figure(sweep, "All rows times α"),
            _figure(dropped, "Without the rows of one layer"),
        ]
    parts.append(
        "<h2>Clusters</h2><p>Those that text has most of, with their most frequent tokens.</p>"
    )
    for entry in layers:
        cells = [
            [f"{c['share_of_text']:.1%}", c["tokens"], _tokens(c["most_frequent"])]
            for c in entry["clusters"]
        ]
        parts.append(
            f"<h3>Layer {entry['layer']}</h3>"
            + _table(["share of text", "tokens", "most frequent"], cells)
        )
    for token in tokens:
        parts.append(f"<h2>Token {_tokens([token['token']])} ({token['id']})</h2>")
        keys = [
            [
                layer,
                norm,
                " · ".join(
                    f"{k['key']}: {k['coefficient']:.2f} {_tokens(k.get('shared_by', []))}"
                    for k in strongest
                ),
            ]
            for layer, (norm, strongest) in enumerate(
                zip(token["norms"], token["keys"], strict=True)
            )
        ]
        parts.append(
            _table(["layer", "norm", "strongest keys, and the tokens that have them most"], keys)
        )
        near = " ".join(
            f"{_tokens([n['token']])} ({n['id']}) {n['cosine']:.2f}" for n in token["nearest"]
        )
        parts.append(f"<p>Nearest rows: {near}</p>")
    body = "\n".join(parts)
    title = html.escape(found["checkpoint"])
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n'


def _tokens(texts: list[str]) -> str:
    return " ".join(f"<code>{html.escape(repr(text)[1:-1])}</code>" for text in texts)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _figure(draw: Callable[[Any], None], caption: str) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "tolhouse"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = out.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"
