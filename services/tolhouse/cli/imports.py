"""The commands `tolhouse import …`, which convert files of other formats."""

from pathlib import Path

import click

from tolhouse.cli.options import Commands


@click.group("import", cls=Commands)
def import_() -> None:
    """Convert files of other formats to what Tolhouse loads."""


@import_.command("gguf")
@click.argument("file", type=Path)
@click.option("--out", type=Path, required=True, help="A new or an empty folder.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    help="Type of the weights. auto: that of the file, float16 if it is quantised.",
)
def import_gguf(file: Path, out: Path, dtype: str) -> None:
    """Convert the GGUF file FILE to a checkpoint in Hugging Face's form.

    The architectures llama, qwen2 and qwen3 are supported. Weights are dequantised, and the
    tokenizer is built from the file. The folder can be loaded by Tolhouse and by transformers.
    """
    from tolhouse.model import gguf

    gguf.import_gguf(file, out, dtype, progress=True)
    click.echo(out)
