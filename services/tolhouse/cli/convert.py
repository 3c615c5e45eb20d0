"""The command that converts a dense model to a Flex model."""

from contextlib import closing

import click

from tolhouse import config
from tolhouse.cli.options import checkpoint_argument, local, options, origin_of, stores_of
from tolhouse.errors import InvalidArgumentError
from tolhouse.store import registry
from tolhouse.store.base import open_store


@click.command()
@checkpoint_argument("CONVERT", urls=True)
@options(config.ConvertConfig)
def convert(settings: config.ConvertConfig, checkpoint: str) -> None:
    """Convert the dense model of CHECKPOINT to a Flex model and its table, without training.

    In a converted layer, a linear map and the row of the token replace the feed-forward network.
    They are fitted on --text, in one pass. Perplexity is measured on the text that follows the
    first --most-tokens. With --layers auto, layers are converted while perplexity grows by at most
    --budget percent.

    The table has rows of the converted layers. They cannot be computed again from the checkpoint,
    so the table is a part of the model: keep it.

    \b
      tolhouse convert models/dense --text notes.txt --out models/flex --publish
      tolhouse worker models/flex
    """
    from tolhouse.analysis.evaluate import read_text
    from tolhouse.build.convert import (
        check_dense,
        choose,
        conversion,
        parse_layers,
        percent,
        rank,
    )
    from tolhouse.model.checkpoint import open_checkpoint, torch_device

    opened, out = open_checkpoint(local(checkpoint)), settings.out
    check_dense(opened)
    layers, device = parse_layers(settings.layers, opened.config), torch_device(settings.device)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgumentError(f"`out` {out} exists: give a new or empty folder")
    urls = stores_of(settings)
    if len(urls) > 1:
        raise InvalidArgumentError("`store` must be one store: a converted table is written once")
    ids = read_text(opened, settings.text)
    out.parent.mkdir(parents=True, exist_ok=True)
    size = settings.most_tokens, settings.held_out_tokens
    with closing(
        open_store(urls[0], settings.store_timeout_seconds, origin=origin_of(settings))
    ) as store:
        store.refs()  # reports an unreachable store before the computation
        with conversion(opened, ids, out.parent, *size, device) as conversion_:
            if layers is None:
                trials = conversion_.trials()
                choice = choose(trials, rank(trials), settings.budget / 100)
                for layer, ratio in sorted(choice.single.items()):
                    click.echo(f"layer {layer:>3} alone: perplexity {percent(ratio)}", err=True)
                if not choice.steps:
                    least = percent(min(choice.single.values()))
                    message = f"no layer fits `budget` {settings.budget:g}: the cheapest costs"
                    raise InvalidArgumentError(f"{message} {least}; raise it, or give `layers`")
            else:
                choice = conversion_.given(layers)
            for layer, ratio in choice.steps:
                click.echo(f"with layer {layer:>3} too: perplexity {percent(ratio)}", err=True)
            made = conversion_.write(choice, out, settings.name, settings.codec, store)
        if made.manifest and settings.publish:
            registry.publish(store, made.manifest.ref)
    count, total = len(choice.layers), opened.config.num_hidden_layers
    click.echo(f"{count} of {total} layers converted: {made.sizes(opened)}", err=True)
    if made.manifest is None:
        click.echo(str(out))
        return
    if not settings.publish:
        command = f"tolhouse publish {made.manifest.ref} --store {settings.store}"
        click.echo(f"to publish the table:\n  {command}", err=True)
    click.echo(made.manifest.ref)
