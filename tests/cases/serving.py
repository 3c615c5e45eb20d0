"""Gateways for the cases: real processes that serve a random model with a given tokenizer."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tolhouse.testing import Cluster, build_table, local_cluster, tiny_model

_stack = ExitStack()
_running: dict[tuple[str, ...], Cluster] = {}


@contextmanager
def gateways() -> Iterator[None]:
    """End all gateways of `gateway` when the block ends."""
    with _stack:
        yield
    _running.clear()


def gateway(tokenizer: Path, template: str = "", *options: str) -> Cluster:
    """Start a system whose model has this tokenizer and chat template, once for equal arguments.

    options: options of the gateway.
    """
    key = (tokenizer.read_text(encoding="utf-8"), template, *options)
    if key not in _running:
        folder = Path(_stack.enter_context(tempfile.TemporaryDirectory()))
        model = tiny_model(folder / "model", tokenizer=tokenizer)
        if template:
            (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        store = f"file://{folder / 'tables'}"
        build_table(model, store)
        running = local_cluster(model, store, gateway_options=options)
        _running[key] = _stack.enter_context(running)
    return _running[key]
