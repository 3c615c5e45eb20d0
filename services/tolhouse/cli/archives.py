"""Commands that move versions of tables between stores and files."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import click

from tolhouse import config
from tolhouse.cli.options import options, origin_of, stores_of
from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.store import table_file
from tolhouse.store.base import Store, open_store
from tolhouse.store.registry import resolve, with_own_auxiliary


@contextmanager
def _one_store(settings: config.StoreConfig) -> Iterator[Store]:
    urls = stores_of(settings)
    if len(urls) > 1:
        raise InvalidArgumentError("`store` must be one store: a file belongs to one store")
    origin = origin_of(settings) if isinstance(settings, config.ChangeConfig) else None
    with closing(open_store(urls[0], settings.store_timeout_seconds, origin=origin)) as store:
        yield store


@contextmanager
def _progress(label: str, total: int) -> Iterator[table_file.Report]:
    """Show the progress in bytes on a terminal."""
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update


def _bytes(store: Store, table: str) -> int:
    manifest = resolve(store, table)
    return sum(m.table_bytes for m in with_own_auxiliary(store, manifest))


@click.command()
@click.argument("table")
@click.argument("file", type=Path)
@options(config.StoreConfig)
def export(settings: config.StoreConfig, table: str, file: Path) -> None:
    """Write TABLE, NAME or NAME@VERSION, to FILE, which another installation can import.

    The file is a safetensors file with the manifest, the log of the version and all of its rows.
    The parent of an overlay is not included. The command prints the SHA-256 of the file.
    """
    with _one_store(settings) as store:
        manifest = resolve(store, table)
        with _progress(f"export {manifest.name}", _bytes(store, manifest.ref)) as report:
            sha256 = table_file.export(store, manifest.ref, file, report)
    click.echo(f"{manifest.ref}  {file}  sha256 {sha256}")


@click.command("import")
@click.argument("file", type=Path)
@click.option(
    "--sha256", default="", show_default=False, help="Refuse a file with another SHA-256."
)
@options(config.ChangeConfig)
def import_version(settings: config.ChangeConfig, file: Path, sha256: str) -> None:
    """Import the version in FILE, which `tolhouse tables export` has written.

    All digests are checked before the first row is written, and each shard is compared after it was
    written. A command that is started again keeps the shards that it has written. The version is
    not published.
    """
    opened = table_file.TableFile(file)
    with _progress(f"verify {file.name}", opened.num_bytes) as report:
        found = table_file.check_sha256(opened, sha256, report)
    with _one_store(settings) as store:
        with _progress(f"import {opened.manifest.name}", opened.num_bytes) as report:
            made = table_file.import_file(
                store, opened, report=report, file=file.name, sha256=found
            )
        click.echo(made.ref)


@click.command()
@click.argument("table")
@click.option("--to", "folder", type=Path, required=True, help="Folder of the file.")
@options(config.ChangeConfig)
def archive(settings: config.ChangeConfig, table: str, folder: Path) -> None:
    """Move TABLE, NAME@VERSION, to a file in a folder, and remove its rows from the store.

    The file has the form of `tolhouse tables export`. It is verified before the rows are removed. A
    version that is published or in use is refused. An archive that was interrupted is completed. If
    it is in the log already, the file of the log is used, also with another --to.
    """
    with _one_store(settings) as store:
        total = 0
        with suppress(NotFoundError):  # an interrupted archive has removed the manifest
            total = _bytes(store, table)
        with _progress(f"archive {table}", total) as report:
            path = table_file.archive(store, table, folder, report)
        click.echo(f"{table} is archived in {path}")


@click.command()
@click.argument("table")
@click.option("--from", "file", type=Path, help="The file. Default: the one in the log.")
@options(config.ChangeConfig)
def restore(settings: config.ChangeConfig, table: str, file: Path | None) -> None:
    """Write the archived TABLE, NAME@VERSION, into the store again, with identical bytes.

    The SHA-256 of the file must be that of the log. The version is not published.
    """
    with _one_store(settings) as store:
        opened = table_file.archived_file(store, table, file)
        with _progress(f"restore {table}", opened.num_bytes) as report:
            table_file.import_file(store, opened, "restored", report, file=str(opened.path))
        click.echo(f"{table} is in {store.url}")
