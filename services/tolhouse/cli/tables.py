"""Commands that build, compress, list, publish, edit and delete tables."""

import json
import logging
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tolhouse import config
from tolhouse.cli.options import (
    Commands,
    Text,
    checkpoint_argument,
    local,
    options,
    origin_of,
    stores_of,
)
from tolhouse.errors import CorruptError, InvalidArgumentError, MismatchError, NotFoundError
from tolhouse.logs import event, printable
from tolhouse.store import registry
from tolhouse.store.base import Store, open_store
from tolhouse.table.manifest import Manifest, split_ref

if TYPE_CHECKING:
    from tolhouse.sources.base import SourceModel


def _source(checkpoint: Path, settings: config.TableConfig) -> "SourceModel":
    """Open the source model with the blocks that the options select."""
    from tolhouse.sources.base import open_source
    from tolhouse.sources.gemma import RAW, Gemma, blocks_of
    from tolhouse.sources.memoryllm import MemoryLLM, select_blocks

    source = open_source(checkpoint)
    if settings.rows == "raw":
        if not isinstance(source, Gemma):
            rule = "only models of type gemma3n and gemma4 have raw rows"
            raise InvalidArgumentError(f"`rows` must be finished: {rule}, not {source.name}")
        return Gemma(checkpoint, blocks_of(RAW, len(source.blocks)))
    if isinstance(source, MemoryLLM):
        blocks = select_blocks(source.checkpoint, settings.embedding, settings.absent_layers)
        return MemoryLLM(source.checkpoint, blocks)
    if settings.embedding != "auto" or settings.absent_layers:
        rule = "only models of the MemoryLLM family have"
        raise InvalidArgumentError(
            f"`embedding` and `absent_layers` select blocks that {rule}, not {source.name}"
        )
    return source


def _converted(
    checkpoint: Path, settings: config.TableConfig, stores: list[Store]
) -> "SourceModel | None":
    """Return the stored rows of a converted checkpoint, or None for another source model."""
    from tolhouse.build.stored_rows import StoredRows
    from tolhouse.model.checkpoint import is_converted, open_checkpoint

    if not is_converted(checkpoint):
        return None
    if settings.embedding == "yes" or settings.absent_layers:
        rule = "has the blocks of its table: remove `embedding` and `absent_layers`"
        raise InvalidArgumentError(f"converted checkpoint {checkpoint.name} {rule}")
    return StoredRows(open_checkpoint(checkpoint), stores)


@click.command()
@checkpoint_argument("BUILD", urls=True)
@options(config.BuildConfig)
def build(settings: config.BuildConfig, checkpoint: str) -> None:
    """Compute the table of CHECKPOINT with Ray: the feed-forward outputs of every token, in shards.

    A build that is started again with the same options keeps the shards that it has written. With
    two stores, the table is computed once and written to both.
    """
    from tolhouse.build import job

    urls = stores_of(settings)
    if "://" in checkpoint and settings.ray_address != "local":
        rule = "only this machine has the copy of a URL: give a folder that all machines share"
        raise InvalidArgumentError(f"`ray_address` must be local for {checkpoint}: {rule}")
    folder = local(checkpoint)
    planned = job.plan(_source(folder, settings), settings.name, settings.codec, settings.shards)
    rows = f"{planned.vocab_size} rows of {planned.record_bytes} bytes"
    click.echo(f"{planned.ref}: {rows}, {planned.table_bytes / 1e6:.1f} MB", err=True)
    seconds, wait = settings.store_timeout_seconds, settings.store_wait_seconds
    stores = [open_store(url, seconds, wait, origin_of(settings)) for url in urls]
    for risk in filter(None, (store.risk() for store in stores)):
        event(risk, logging.WARNING)
    new_in = [s for s in stores if registry.is_new(s, planned)]
    planned = job.with_stored_shards(planned, stores) if not settings.shards else planned
    counted = job.with_frequent(folder, planned, settings.corpus) if settings.corpus else planned
    built = job.find_whole(stores, counted)
    if built is None:
        counted = counted if settings.corpus else job.with_frequent(folder, planned, "")
        ray = settings.ray_address, settings.ray_wait_seconds, settings.workers
        checked = settings.verify_rows, seconds, origin_of(settings)
        built = job.build(folder, counted, urls, *ray, *checked)
    for s in stores if settings.publish else new_in if settings.publish_new else ():
        registry.publish(s, built.ref)
    if not all(registry.stands_for(s, built.ref) for s in stores):
        command = f"tolhouse publish {built.ref} --store {settings.store}"
        click.echo(f"built and verified; to publish it as {built.name}:\n  {command}", err=True)
    click.echo(built.ref)


@click.command()
@checkpoint_argument("COMPRESS", urls=True)
@options(config.CompressConfig)
def compress(settings: config.CompressConfig, checkpoint: str) -> None:
    """Make a smaller table of CHECKPOINT than `build` does. It is served in the same way.

    Frequent tokens have a finer codec. With --rank-share or --size-ratio, rows are stored as
    coefficients of a basis for each layer, which workers keep in memory. `tolhouse eval` measures
    the loss.

    \b
      --codec int4                          less than a third of 16 bit, +0.1% perplexity
      --codec bf16 --rank-share 0.5 --frequent-rows 0    low rank only
      --codec int4 --size-ratio 8               an eighth of 16 bit
    """
    from tolhouse.build import compress
    from tolhouse.build.job import count_tokens, plan, with_corpus
    from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer

    stores = [
        open_store(url, settings.store_timeout_seconds, origin=origin_of(settings))
        for url in stores_of(settings)
    ]
    folder = local(checkpoint)
    source = _converted(folder, settings, stores) or _source(folder, settings)
    if not source.tokenizer_id:
        lack = "without a tokenizer: frequencies of tokens decide what to keep"
        raise InvalidArgumentError(f"compress needs a tokenizer, and {source.name} is {lack}")
    for store in stores:
        store.refs()  # reports an unreachable store before the computation
    plain = plan(source, settings.name, settings.codec, settings.shards)
    sizes = settings.rank_share, settings.size_ratio, max(0, settings.frequent_rows)
    scheme = compress.Scheme(settings.codec, *sizes, settings.frequent_codec)
    if settings.frequent_rows < 0 and (scheme.low_rank or scheme.finer):
        scheme = replace(scheme, frequent=plain.vocab_size // compress.FREQUENT_SHARE)
    compress.check(plain, scheme)
    counts = count_tokens(load_tokenizer(folder / TOKENIZER), settings.corpus, plain.vocab_size)
    plain = with_corpus(plain, settings.corpus)
    made = compress.compress(plain, source.rows(), counts, scheme)
    manifest = made.manifest
    share = compress.bytes_at_16_bit(plain) / made.bytes
    ranks = f", ranks {' '.join(map(str, manifest.ranks))}" if manifest.ranks else ""
    size = f"{made.bytes / 1e6:.2f} MB, 1/{share:.2f} of 16 bit"
    click.echo(f"{manifest.ref}: {size}{ranks}", err=True)
    if scheme.low_rank and not ranks:
        by_size = f"{settings.codec} alone meets --size-ratio"
        why = by_size if settings.size_ratio else "--rank-share keeps all of it"
        click.echo(f"{why}: rows have their full rank, without a basis", err=True)
    for store in stores:
        with closing(store):
            stored = made.store(store)
            if settings.publish:
                registry.publish(store, stored.ref)
    click.echo(stored.ref)


@click.group(cls=Commands)
def tables() -> None:
    """Manage versions of tables."""


def _stores(settings: config.StoreConfig) -> Iterator[Store]:
    origin = origin_of(settings) if isinstance(settings, config.ChangeConfig) else None
    for url in stores_of(settings):
        with closing(open_store(url, settings.store_timeout_seconds, origin=origin)) as store:
            yield store


@tables.command("list")
@click.option("--all", "everything", is_flag=True, help="Also list deleted versions.")
@options(config.StoreConfig)
def list_tables(settings: config.StoreConfig, everything: bool) -> None:
    """List all versions with their states and sizes, including auxiliary tables.

    A version is building, verified, published, archived or deleted. A star means published.
    """
    for store in _stores(settings):
        found = [one for one in registry.versions(store) if everything or one.state != "deleted"]
        click.echo(f"{store.url}: {len(found) or 'no'} table{'s' * (len(found) != 1)}", err=True)
        sizes = {one.ref: one.manifest.table_bytes for one in found if one.manifest}
        for one in found:
            star, m = "*" if one.state == "published" else " ", one.manifest
            if not m:
                since = one.last or {}
                where = f"  {since['file']}" if "file" in since else ""
                about = f"since {since.get('time')} by {since.get('by')}{where}"
                click.echo(f"  {one.ref}  {one.state:9}  {printable(about)}")
                continue
            size = m.table_bytes + sum(sizes.get(ref, 0) for ref in registry.own_auxiliary(m))
            rows = f"{m.codec_name:5} {m.num_records:>8} rows"
            layers = f"{len(m.layers):>3} layers{' + X0' if m.has_x0 else '':5}"
            over = f"  over {m.parent}" if m.parent else ""
            click.echo(
                f"{star} {m.ref}  {one.state:9}  {rows} {layers} {size / 1e6:>10.1f} MB{over}"
            )


@tables.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print each entry as one line of JSON.")
@options(config.StoreConfig)
def log(settings: config.StoreConfig, name: str, as_json: bool) -> None:
    """Print the log of NAME, or of NAME@VERSION: who changed what, when and why.

    Entries of deleted versions remain. On Redis, `user` is the user of the connection.
    """
    wanted, version = split_ref(name)
    for store in _stores(settings):
        for entry in store.log():
            if entry["name"] != wanted or version not in (None, entry["version"]):
                continue
            if as_json:
                click.echo(json.dumps(entry))
                continue
            known = ("time", "event", "name", "version", "by", "note", "history")
            rest = " ".join(f"{key}={entry[key]}" for key in entry if key not in known)
            words = [entry["time"], f"{entry['event']:9}", f"{entry['name']}@{entry['version']}"]
            words += [f"by {entry.get('by')}", rest, entry.get("note", "")]
            click.echo("  ".join(printable(str(word)) for word in words if word))


@tables.command()
@click.argument("table")
@options(config.StoreConfig)
def show(settings: config.StoreConfig, table: str) -> None:
    """Print the manifest of TABLE, NAME or NAME@VERSION, as JSON."""
    for store in _stores(settings):
        click.echo(store.manifest_text(registry.resolve(store, table)), nl=False)


@click.command()
@click.argument("table")
@options(config.ChangeConfig)
def publish(settings: config.ChangeConfig, table: str) -> None:
    """Publish TABLE, NAME@VERSION: readers of NAME use this version from now on."""
    for store in _stores(settings):
        before: Manifest | None = None
        with suppress(NotFoundError, CorruptError):
            before = registry.resolve(store, table.partition("@")[0])
        made = registry.publish(store, table)
        click.echo(f"{made.ref} is published in {store.url}")
        if before and before.model_id != made.model_id:
            hint = "running workers keep serving that version; start workers of the new model"
            click.echo(f"its model is not that of {before.ref}: {hint}", err=True)


tables.add_command(publish)


@tables.command()
@click.argument("name")
@options(config.ChangeConfig)
def rollback(settings: config.ChangeConfig, name: str) -> None:
    """Publish the version of NAME that was published before the current one."""
    for store in _stores(settings):
        click.echo(f"{registry.rollback(store, name).ref} is published in {store.url}")


@tables.command()
@click.argument("table")
@click.option(
    "--force",
    is_flag=True,
    help="Also delete a version in use, whose readers get errors, or the rest of an unfinished "
    "build or deletion.",
)
@options(config.ChangeConfig)
def delete(settings: config.ChangeConfig, table: str, force: bool) -> None:
    """Delete TABLE, NAME@VERSION, which must be neither published nor in use."""
    for store in _stores(settings):
        registry.delete(store, table, force)
        click.echo(f"{table} is deleted from {store.url}")


@tables.command()
@click.option("--token-file", required=True, help="File of tokens with users and grants.")
def acl(token_file: str) -> None:
    """Print commands for Redis that grant the users in a file of tokens their permissions.

    A line of the file is TOKEN user=USER read=NAMES publish=NAMES admin=NAMES. NAMES are separated
    by commas, and * stands for any characters. The token is the password of the user. The commands
    contain only its SHA-256, and need Redis 7 or Valkey. Lines without a user are skipped.

    \b
      tolhouse tables acl --token-file tokens | redis-cli -h redis
    """
    from tolhouse.net.auth import TokenFile
    from tolhouse.store.redis_permissions import rule

    for token in TokenFile(token_file).tokens.get():
        if token.user:
            words = (f'"{word}"' if " " in word else word for word in rule(token))
            click.echo(f"ACL SETUSER {token.user} {' '.join(words)}")


@click.command()
@click.argument("table")
@click.option(
    "--copy", multiple=True, type=Text(), metavar="TOKEN=OTHER", help="Give TOKEN the row of OTHER."
)
@click.option(
    "--scale", multiple=True, type=Text(), metavar="TOKEN=FACTOR", help="Multiply the row of TOKEN."
)
@click.option(
    "--rows-file", "--rows", type=Path, help="An .npz file with `ids` [T] and `rows` [T, N, D]."
)
@click.option(
    "--append", type=Path, help="Checkpoint with more token ids than TABLE, whose rows are added."
)
@click.option("--checkpoint", type=Path, help="Checkpoint whose tokenizer reads TOKENs as text.")
@click.option("--publish", "publishes", is_flag=True, help="Publish the new version.")
@options(config.ChangeConfig)
def overlay(
    settings: config.ChangeConfig,
    table: str,
    copy: tuple[str, ...],
    scale: tuple[str, ...],
    rows_file: Path | None,
    append: Path | None,
    checkpoint: Path | None,
    publishes: bool,
) -> None:
    """Edit rows of TABLE: make a version that stores only the changed rows.

    A TOKEN is an id or, with --checkpoint, a text of exactly one token. Quotes mark a text: '3' in
    quotes is not an id. An edit is split at its last = that has a token on both sides. The new
    version is published, rolled back and deleted like any other. Its parent cannot be deleted
    before it.

    With --append, the version has a larger vocabulary: the rows of TABLE, and those of the ids that
    only the checkpoint has. The rows of 1024 common ids are compared with the checkpoint first.

    \b
      tolhouse overlay demo-memory --checkpoint models/demo-memory --copy ' import= class' --publish
      tolhouse tables rollback demo-memory
    """
    from tolhouse.analysis.edits import copy_of, edited_rows, read_rows, scale_of
    from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
    from tolhouse.store.overlay import make_overlay

    edits_rows = bool(copy or scale or rows_file)
    if not (edits_rows or append):
        wanted = "give --copy, --scale, --rows-file or --append"
        raise InvalidArgumentError(f"nothing to change: {wanted}")
    if edits_rows and append:
        raise InvalidArgumentError("--append and edits make two versions: append first")
    tokenizer = load_tokenizer(checkpoint / TOKENIZER) if checkpoint else None
    copied = [copy_of(edit, tokenizer) for edit in copy]
    scaled = [scale_of(edit, tokenizer) for edit in scale]
    given = read_rows(rows_file) if rows_file else None

    for store in _stores(settings):
        manifest = registry.resolve(store, table)
        if checkpoint and manifest.tokenizer_id != tokenizer_id(checkpoint / TOKENIZER):
            other = f"another tokenizer than that of {checkpoint}, so ids differ"
            raise MismatchError(f"table {manifest.ref} was built with {other}")
        if append:
            from tolhouse.build.append import append as append_to  # needs torch

            made = append_to(store, manifest.ref, append)
        else:
            edits = edited_rows(store, manifest, copied, scaled, given)
            made = make_overlay(store, manifest.ref, *edits)
        size = sum(m.table_bytes for m in registry.with_own_auxiliary(store, made))
        rows = f"{made.num_records} changed rows over {made.parent}"
        click.echo(f"{rows}, {size / 1e3:.1f} kB, in {store.url}", err=True)
        if publishes:
            registry.publish(store, made.ref)
        click.echo(made.ref)
