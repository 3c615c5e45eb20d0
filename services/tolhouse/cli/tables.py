"""A table's life: built, compressed, listed, published, edited, deleted."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tolhouse import config
from tolhouse.cli.options import Commands, checkpoint_argument, layer_numbers, options, stores_of
from tolhouse.errors import Corrupt, InvalidArgument, Mismatch, NotFound
from tolhouse.table.manifest import Manifest


@click.command()
@checkpoint_argument("build")
@click.option(
    "--publish", "publish_it", is_flag=True, help="Publish the table once it is whole and verified."
)
@click.option(
    "--publish-new",
    is_flag=True,
    help="Publish it where it is new, or nothing is published under its name: for jobs that may run again after a rollback or an edit.",
)
@options(config.BuildConfig)
def build(
    settings: config.BuildConfig, checkpoint: Path, publish_it: bool, publish_new: bool
) -> None:
    """Compute the table of CHECKPOINT with Ray: every token's feed-forward outputs, in shards.

    Start a build that was killed again with the same options: whole shards are kept. With two stores, the table is
    computed once and written to both.
    """
    from tolhouse.build.frequency import frequent_tokens
    from tolhouse.build.job import build as build_table
    from tolhouse.build.job import plan
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.store.base import wait_for_store
    from tolhouse.store.registry import is_new, publish, stands_for

    opened = open_checkpoint(checkpoint)
    stores = stores_of(settings)
    absent = layer_numbers(settings.absent_layers, "--absent-layers")
    manifest = plan(
        opened,
        settings.name,
        settings.codec,
        settings.shards,
        embedding=settings.embedding,
        absent=absent,
    )
    manifest = replace(
        manifest, frequent=frequent_tokens(opened.tokenizer(), settings.corpus, manifest.vocab_size)
    )
    click.echo(
        f"{manifest.ref}: {manifest.vocab_size} rows of {manifest.record_bytes} bytes, {manifest.table_bytes / 1e6:.1f} MB",
        err=True,
    )
    opened_stores = [
        wait_for_store(url, settings.store_timeout_seconds, settings.store_wait_seconds)
        for url in stores
    ]
    new_in = [store for store in opened_stores if is_new(store, manifest)]
    built = build_table(
        opened,
        manifest,
        stores,
        settings.ray_address,
        settings.workers,
        settings.verify_rows,
        settings.store_timeout_seconds,
    )
    for store in new_in if publish_new and not publish_it else opened_stores if publish_it else ():
        publish(store, built.ref)
    if not all(stands_for(store, built.ref) for store in opened_stores):
        click.echo(
            f"built and verified; to make it what {built.name!r} stands for:\n  tolhouse publish {built.ref} --store {settings.store}",
            err=True,
        )
    click.echo(built.ref)


@click.command()
@checkpoint_argument("compress")
@click.option("--publish", "publish_it", is_flag=True, help="Publish the table once it is stored.")
@options(config.CompressConfig)
def compress(settings: config.CompressConfig, checkpoint: Path, publish_it: bool) -> None:
    """Make a table of CHECKPOINT in fewer bytes than `build` does; lookup, workers and clients serve it like any other.

    Frequent tokens are kept in a finer codec, and with --rank-share or --size-ratio rows become a few coefficients of a basis for each layer, which
    workers hold. `tolhouse eval` says what it costs.

    \b
      --codec int4                          under a third of 16 bit, for about a tenth of a percent of perplexity
      --codec bf16 --rank-share 0.5 --head 0    low rank alone
      --codec int4 --size-ratio 8               an eighth of 16 bit
    """
    from tolhouse.analysis.probes import model_rows
    from tolhouse.build.compress import HEAD_SHARE, Scheme, bytes_at_16_bit, check
    from tolhouse.build.compress import compress as compress_rows
    from tolhouse.build.frequency import count_tokens
    from tolhouse.build.job import plan
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.store.base import open_store
    from tolhouse.store.registry import publish

    opened = open_checkpoint(checkpoint)
    opened_stores = [open_store(url, settings.store_timeout_seconds) for url in stores_of(settings)]
    for store in opened_stores:
        store.refs()  # one that can't be had is told before the work, not after
    absent = layer_numbers(settings.absent_layers, "--absent-layers")
    plain = plan(
        opened,
        settings.name,
        settings.codec,
        settings.shards,
        embedding=settings.embedding,
        absent=absent,
    )
    scheme = Scheme(
        settings.codec,
        settings.rank_share,
        settings.size_ratio,
        max(0, settings.head),
        settings.head_codec,
    )
    if settings.head < 0 and (scheme.low_rank or scheme.finer):
        scheme = replace(scheme, head=plain.vocab_size // HEAD_SHARE)
    check(plain, scheme)
    counts = count_tokens(opened.tokenizer(), settings.corpus, plain.vocab_size)
    rows = model_rows(opened, plain.has_x0, plain.layers)
    made = compress_rows(plain, rows, counts, scheme)
    share = bytes_at_16_bit(plain) / made.bytes
    ranks = (
        f", ranks {' '.join(map(str, made.companions.manifest.ranks))}"
        if made.companions.manifest.ranks
        else ""
    )
    click.echo(
        f"{made.companions.manifest.ref}: {made.bytes / 1e6:.2f} MB, 1/{share:.2f} of 16 bit{ranks}",
        err=True,
    )
    if scheme.low_rank and not ranks:
        why = (
            f"{settings.codec} alone meets --size-ratio"
            if settings.size_ratio
            else "--rank-share keeps all of it"
        )
        click.echo(f"{why}: rows have their full rank, without a basis", err=True)
    for store in opened_stores:
        stored = made.store(store)
        if publish_it:
            publish(store, stored.ref)
        store.close()
    click.echo(stored.ref)


@click.group(cls=Commands)
def tables() -> None:
    """List, show, publish, roll back and delete versions of tables."""


def _each_store(settings: config.StoreConfig, work: Callable[[Any], Any]) -> None:
    from tolhouse.store.base import open_store

    for url in stores_of(settings):
        store = open_store(url, settings.store_timeout_seconds)
        try:
            work(store)
        finally:
            store.close()


def _own_auxiliary(manifest: Manifest) -> tuple[str, ...]:
    """Those that are stored for it: an overlay's basis and head are its parent's."""
    return tuple(ref for ref in manifest.auxiliary if not manifest.parent or ref == manifest.edits)


@tables.command("list")
@options(config.StoreConfig)
def list_tables(settings: config.StoreConfig) -> None:
    """List every table with its size, that of its parts included; a star marks the version that a name stands for."""
    from tolhouse.store.registry import tables as all_tables

    def work(store: Any) -> None:
        found = list(all_tables(store))
        click.echo(
            f"{store.url}: {len(found) or 'no'} table{'' if len(found) == 1 else 's'}", err=True
        )
        sizes = {m.ref: m.table_bytes for m, _ in found}
        for m, published in found:
            size = m.table_bytes + sum(sizes.get(ref, 0) for ref in _own_auxiliary(m))
            click.echo(
                f"{'*' if published else ' '} {m.ref}  {m.codec_name:5} {m.num_records:>8} rows {len(m.layers):>3} layers{' + X0' if m.has_x0 else '':5} {size / 1e6:>10.1f} MB{f'  over {m.parent}' * bool(m.parent)}"
            )

    _each_store(settings, work)


@tables.command()
@click.argument("table")
@options(config.StoreConfig)
def show(settings: config.StoreConfig, table: str) -> None:
    """Show the manifest of TABLE, NAME or NAME@VERSION, as JSON."""
    from tolhouse.store.registry import resolve

    _each_store(settings, lambda store: click.echo(resolve(store, table).to_json(), nl=False))


@click.command()
@click.argument("table")
@options(config.StoreConfig)
def publish(settings: config.StoreConfig, table: str) -> None:
    """Make a name stand for this version: TABLE is NAME@VERSION."""
    from tolhouse.store.registry import publish as publish_table
    from tolhouse.store.registry import resolve

    def work(store: Any) -> None:
        before: Manifest | None = None
        with suppress(NotFound, Corrupt):
            before = resolve(store, table.partition("@")[0])
        made = publish_table(store, table)
        click.echo(f"{made.ref} is published in {store.url}")
        if before and before.model_id != made.model_id:
            click.echo(
                f"it is of another model than {before.ref}: workers of that one stay with what they have, start others",
                err=True,
            )

    _each_store(settings, work)


tables.add_command(publish)


@tables.command()
@click.argument("name")
@options(config.StoreConfig)
def rollback(settings: config.StoreConfig, name: str) -> None:
    """Make NAME stand for the version it stood for before."""
    from tolhouse.store.registry import rollback as roll_back

    _each_store(
        settings,
        lambda store: click.echo(f"{roll_back(store, name).ref} is published in {store.url}"),
    )


@tables.command()
@click.argument("table")
@click.option(
    "--force", is_flag=True, help="Also a version that is in use: who reads it gets errors."
)
@options(config.StoreConfig)
def delete(settings: config.StoreConfig, table: str, force: bool) -> None:
    """Delete a version that is neither published nor in use: TABLE is NAME@VERSION."""
    from tolhouse.store.registry import delete as delete_table

    def work(store: Any) -> None:
        delete_table(store, table, force)
        click.echo(f"{table} is deleted from {store.url}")

    _each_store(settings, work)


@click.command()
@click.argument("table")
@click.option(
    "--copy", "copies", multiple=True, metavar="TOKEN=OTHER", help="TOKEN gets the row of OTHER."
)
@click.option(
    "--scale",
    "scales",
    multiple=True,
    metavar="TOKEN=FACTOR",
    help="TOKEN's row is multiplied; 0 takes its memory away.",
)
@click.option(
    "--rows",
    "file",
    type=click.Path(path_type=Path),
    help="Rows from elsewhere: an .npz with `ids` [T] and `rows` [T, N, D].",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Its tokenizer tells the ids of tokens that are given as text.",
)
@click.option("--publish", "publish_it", is_flag=True, help="Publish the version at once.")
@options(config.StoreConfig)
def overlay(
    settings: config.StoreConfig,
    table: str,
    copies: tuple[str, ...],
    scales: tuple[str, ...],
    file: Path | None,
    checkpoint: Path | None,
    publish_it: bool,
) -> None:
    """Edit rows of TABLE, NAME or NAME@VERSION: a version that stores the changed rows alone, over the one it changes.

    A TOKEN is an id or, with --checkpoint, a text that is one token, which may be in quotes: '3' in quotes is a text. The last = that has a
    token on both sides divides an edit. The version is published, rolled back and deleted like any other; the one it lies over can't be
    deleted before it.

    \b
      tolhouse overlay demo-memory --checkpoint models/demo-memory --copy ' import= class' --publish
      tolhouse tables rollback demo-memory
    """
    from tolhouse.analysis.edits import copy_of, edited_rows, read_rows, scale_of
    from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
    from tolhouse.store.overlay import make_overlay
    from tolhouse.store.registry import publish as publish_table
    from tolhouse.store.registry import resolve

    if not (copies or scales or file):
        raise InvalidArgument("nothing to change: give --copy, --scale or --rows")
    tokenizer = load_tokenizer(checkpoint / TOKENIZER) if checkpoint else None
    copied = [copy_of(edit, tokenizer) for edit in copies]
    scaled = [scale_of(edit, tokenizer) for edit in scales]
    given = read_rows(file) if file else None

    def work(store: Any) -> None:
        manifest = resolve(store, table)
        if checkpoint and manifest.tokenizer_id != tokenizer_id(checkpoint / TOKENIZER):
            raise Mismatch(
                f"table {manifest.ref} was built with another tokenizer than that of {checkpoint}: its tokens have other ids"
            )
        made = make_overlay(
            store, manifest.ref, *edited_rows(store, manifest, copied, scaled, given)
        )
        size = made.table_bytes + sum(
            store.manifest(ref).table_bytes for ref in _own_auxiliary(made)
        )
        click.echo(
            f"{made.num_records} changed rows over {made.parent}, {size / 1e3:.1f} kB, in {store.url}",
            err=True,
        )
        if publish_it:
            publish_table(store, made.ref)
        click.echo(made.ref)

    _each_store(settings, work)
