"""A survey and explained tokens as one HTML file, with its plots inside and no links elsewhere."""

import io
from collections.abc import Callable
from typing import Any

import jinja2

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>{{ checkpoint }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } h2 { margin-top: 2.5rem }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
code { background: #f2f2f2; padding: 0 .2rem; white-space: pre }
svg { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption { color: #555 }
</style></head><body>
{%- macro table(head, rows) %}<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
{%- macro tokens(texts) %}{% for text in texts %}<code>{{ quoted(text) }}</code> {% endfor %}
{%- endmacro %}
{%- macro figure(plot) %}<figure>{{ plot.svg|safe }}<figcaption>{{ plot.caption }}</figcaption>
</figure>{% endmacro %}
<h1>The memory of {{ checkpoint }}</h1>
<p>A {{ kind }} model of {{ vocab_size }} tokens and {{ layers|length }} rows for each.</p>
<dl>{% for word, meaning in definitions.items() %}<dt>{{ word }}</dt><dd>{{ meaning }}</dd>
{% endfor %}</dl><h2>By layer</h2>
{{ table(["layer", "mean norm", "clustering", "outliers per token", "rank for 90%"],
  layers|map("values_of", "layer", "mean_norm", "clustering", "outliers", "rank_90")) }}
{% for plot in plots[:3] %}{{ figure(plot) }}{% endfor %}
{% if probes %}<h2>Probes</h2><p>Perplexity of {{ "{:,}".format(probes.tokens) }} held-out tokens;
with all rows it is {{ "%.3f"|format(probes.perplexity) }}.</p>
{% for plot in plots[3:] %}{{ figure(plot) }}{% endfor %}{% endif %}
<h2>Clusters</h2><p>Those that text has most of, with their most frequent tokens.</p>
{% for layer in layers %}<h3>Layer {{ layer.layer }}</h3><table>
<tr><th>share of text</th><th>tokens</th><th>most frequent</th></tr>
{% for c in layer.clusters %}<tr><td>{{ "%.1f%%"|format(100 * c.share_of_text) }}</td>
<td>{{ c.tokens }}</td><td>{{ tokens(c.most_frequent) }}</td></tr>{% endfor %}</table>{% endfor %}
{% for token in explained %}<h2>Token {{ tokens([token.token]) }}({{ token.id }})</h2><table>
<tr><th>layer</th><th>norm</th><th>strongest keys, and the tokens that have them most</th></tr>
{% for norm in token.norms %}<tr><td>{{ loop.index0 }}</td><td>{{ norm }}</td><td>
{% for k in token["keys"][loop.index0] %}{{ k.key }}: {{ "%.2f"|format(k.coefficient) }}
{{ tokens(k.shared_by) }}{{ "" if loop.last else "·" }}{% endfor %}</td></tr>{% endfor %}</table>
<p>Nearest rows: {% for n in token.nearest %}{{ tokens([n.token]) }}({{ n.id }})
{{ "%.2f"|format(n.cosine) }} {% endfor %}</p>{% endfor %}
</body></html>
"""


def report(found: dict[str, Any], tokens: list[dict[str, Any]]) -> str:
    """`found` is of `survey`, `tokens` of `explain_text` and may be empty."""
    layers, probes = found["layers"], found.get("probes", {})
    numbers = [entry["layer"] for entry in layers]

    def by_layer(name: str, caption: str) -> dict[str, str]:
        def draw(axes: Any) -> None:
            axes.plot(numbers, [entry[name] for entry in layers], marker="o")
            axes.set(xlabel="layer", ylabel=name)

        return _plot(caption, draw)

    def spectra(axes: Any) -> None:
        for entry in layers:
            values = entry["spectrum"]
            axes.semilogy([v / values[0] for v in values if v > 0], label=f"layer {entry['layer']}")
        axes.set(xlabel="singular value", ylabel="over the first")
        axes.legend(fontsize="small")

    def sweep(axes: Any) -> None:
        axes.semilogy(
            [*map(float, probes["row_scale"])], [*probes["row_scale"].values()], marker="o"
        )
        axes.set(xlabel="row_scale", ylabel="perplexity over that of row_scale 1")

    def dropped(axes: Any) -> None:
        increases = [ratio - 1 for ratio in probes["without_layer"]]
        axes.bar(numbers, increases)
        # a log scale has no place for a layer without which nothing is worse
        scale = "log" if min(increases) > 0 else "linear"
        axes.set(xlabel="layer left out", ylabel="relative increase of perplexity", yscale=scale)

    plots = [
        by_layer("clustering", "Clustering of key coefficients"),
        by_layer("outliers", "Outliers per token"),
        _plot("Singular values of each layer's rows", spectra),
    ]
    if probes:
        plots += [
            _plot("All rows times row_scale", sweep),
            _plot("Without the rows of one layer", dropped),
        ]
    environment = jinja2.Environment(autoescape=True)
    environment.globals["quoted"] = lambda text: repr(text)[1:-1]
    environment.filters["values_of"] = lambda entry, *names: [entry[name] for name in names]
    return environment.from_string(_PAGE).render(**found, explained=tokens, plots=plots)


def _plot(caption: str, draw: Callable[[Any], None]) -> dict[str, str]:
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
    return {"caption": caption, "svg": svg[svg.index("<svg") :]}
