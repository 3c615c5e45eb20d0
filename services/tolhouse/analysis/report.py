"""Writes a survey and explained tokens as one self-contained HTML file with plots."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
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
<h2>Clusters</h2><p>The most frequent clusters, with their most frequent tokens.</p>
{% for layer in layers %}<h3>Layer {{ layer.layer }}</h3><table>
<tr><th>share of text</th><th>tokens</th><th>most frequent</th></tr>
{% for c in layer.clusters %}<tr><td>{{ "%.1f%%"|format(100 * c.share_of_text) }}</td>
<td>{{ c.tokens }}</td><td>{{ tokens(c.most_frequent) }}</td></tr>{% endfor %}</table>{% endfor %}
{% for token in explained %}<h2>Token {{ tokens([token.token]) }}({{ token.id }})</h2><table>
<tr><th>layer</th><th>norm</th><th>strongest keys, and the tokens that activate them most</th></tr>
{% for norm in token.norms %}<tr><td>{{ loop.index0 }}</td><td>{{ norm }}</td><td>
{% for k in token["keys"][loop.index0] %}{{ k.key }}: {{ "%.2f"|format(k.coefficient) }}
{{ tokens(k.shared_by) }}{{ "" if loop.last else "·" }}{% endfor %}</td></tr>{% endfor %}</table>
<p>Nearest rows: {% for n in token.nearest %}{{ tokens([n.token]) }}({{ n.id }})
{{ "%.2f"|format(n.cosine) }} {% endfor %}</p>{% endfor %}
</body></html>
"""


def report(found: dict[str, Any], tokens: list[dict[str, Any]]) -> str:
    """Return the report as HTML.

    `found` is the result of `survey`. `tokens` is the result of `explain_text`, or empty.
    """
    layers, probes, plots = found["layers"], found.get("probes"), list[dict[str, str]]()
    numbers = [entry["layer"] for entry in layers]
    captions = {"clustering": "Clustering of key coefficients", "outliers": "Outliers per token"}
    for name, caption in captions.items():
        with _plot(plots, caption, xlabel="layer", ylabel=name) as axes:
            axes.plot(numbers, [entry[name] for entry in layers], marker="o")
    labels = {"xlabel": "singular value", "ylabel": "over the first"}
    with _plot(plots, "Singular values of each layer's rows", **labels) as axes:
        for entry in layers:
            values = entry["spectrum"]
            axes.semilogy([v / values[0] for v in values if v > 0], label=f"layer {entry['layer']}")
        axes.legend(fontsize="small")
    if probes:
        labels = {"xlabel": "row_scale", "ylabel": "perplexity over that of row_scale 1"}
        with _plot(plots, "All rows times row_scale", **labels) as axes:
            scales = probes["row_scale"]
            axes.semilogy([*map(float, scales)], [*scales.values()], marker="o")
        increases = [ratio - 1 for ratio in probes["without_layer"]]
        labels = {"xlabel": "layer left out", "ylabel": "relative increase of perplexity"}
        # A log scale cannot show a layer whose removal does not raise the perplexity.
        labels["yscale"] = "log" if min(increases) > 0 else "linear"
        with _plot(plots, "Perplexity without the rows of one layer", **labels) as axes:
            axes.bar(numbers, increases)
    environment = jinja2.Environment(autoescape=True)
    environment.globals["quoted"] = lambda text: repr(text)[1:-1]
    environment.filters["values_of"] = lambda entry, *names: [entry[name] for name in names]
    return environment.from_string(_PAGE).render(**found, explained=tokens, plots=plots)


@contextmanager
def _plot(plots: list[dict[str, str]], caption: str, **settings: str) -> Iterator[Any]:
    """Yield axes to draw on, then add the figure to `plots`."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "tolhouse"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    yield axes
    axes.set(**settings)
    axes.grid(alpha=0.3)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    plots.append({"caption": caption, "svg": "<svg" + out.getvalue().partition("<svg")[2]})
