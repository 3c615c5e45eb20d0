"""The commands `tolhouse import …`, which convert files of other formats."""

from contextlib import ExitStack, nullcontext
from pathlib import Path

import click

from tolhouse import config
from tolhouse.cli.options import Commands, options, origin_of, stores_of


@click.group("import", cls=Commands)
def import_() -> None:
    """Convert files of other formats to what Tolhouse loads."""


@import_.command("gguf")
@click.argument("file", metavar="FILE|URL")
@click.option("--out", type=Path, required=True, help="A new or an empty folder.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    help="Type of the weights. auto: that of the file, float16 if it is quantised.",
)
def import_gguf(file: str, out: Path, dtype: str) -> None:
    """Convert the GGUF file FILE to a checkpoint in Hugging Face's form.

    The architectures llama, qwen2 and qwen3 are supported. Weights are dequantised, and the
    tokenizer is built from the file. The folder can be loaded by Tolhouse and by transformers.
    """
    from tolhouse.model import gguf
    from tolhouse.sources.remote import is_url, local_file

    with local_file(file) if is_url(file) else nullcontext(Path(file)) as path:
        gguf.import_gguf(path, out, dtype, progress=True)
    click.echo(out)


@import_.command("tensor")
@click.argument("place", metavar="FILE|FOLDER|URL")
@click.argument("tensor")
@options(config.ImportConfig)
def import_tensor(settings: config.ImportConfig, place: str, tensor: str) -> None:
    """Make a table of TENSOR, a matrix [V, blocks * width] in safetensors files, row by row.

    A folder holds model.safetensors, or several files and their index. URLs are those that fsspec
    reads, such as s3://, gs:// and hf://, if the package of the protocol is installed. The tensor
    is then first copied to the folder of temporary files. Memory stays below a few shards. A
    command that is started again keeps the shards that it has written.

    \b
      tolhouse import tensor hf://OWNER/MODEL model.moe_table.weight --blocks 48 --name mole
    """
    from tolhouse.build import job
    from tolhouse.sources.remote import is_url, local_tensor
    from tolhouse.sources.tensor import TensorRows
    from tolhouse.store import registry
    from tolhouse.store.base import open_store

    with ExitStack() as stack:
        urls = stores_of(settings)
        path = stack.enter_context(local_tensor(place, tensor)) if is_url(place) else Path(place)
        source = TensorRows(path, tensor, settings.blocks, settings.block_prefix)
        codec = source.codec_name if settings.codec == "auto" else settings.codec
        planned = job.plan(source, settings.name, codec, settings.shards)
        rows = f"{planned.vocab_size} rows of {planned.record_bytes} bytes"
        click.echo(f"{planned.ref}: {rows}, {planned.table_bytes / 1e6:.1f} MB", err=True)
        stores = [
            open_store(url, settings.store_timeout_seconds, origin=origin_of(settings))
            for url in urls
        ]
        for store in stores:
            stack.callback(store.close)
        planned = job.with_stored_shards(planned, stores) if not settings.shards else planned
        made = job.find_whole(stores, planned)
        made = made or job.copy(source, planned, stores, settings.verify_rows)
        for store in stores if settings.publish else ():
            registry.publish(store, made.ref)
    click.echo(made.ref)
