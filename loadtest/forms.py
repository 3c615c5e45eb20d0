"""Compare forms of FFN-C in the worker's engine.

    python -m loadtest.forms [--preset 250m] [--layers N] [--forms swiglu,moc,avgk] [--quick]

Each form is a Flex model with random weights in bfloat16, beta 3, the form's default options and
compiled decoding. All rows are in memory, so that the models differ in FFN-C alone. Models decode
in turn, at several numbers of sequences. The output is a table and a final line of JSON with the
tokens per second of each form over those of the first form.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from tolhouse.engine.cpu.compiled import FORMS, CompiledDecode
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import ModelConfig, preset

from loadtest.decode import (
    ANSWER,
    COMPILED,
    CPU,
    PROMPT,
    SLICE,
    VOCABULARY,
    Measured,
    engine_of,
    rows_of,
)
from loadtest.replay import rates_in_turn, start_all
from loadtest.tables import alike, served
from loadtest.text import trace
from loadtest.weights import random_weights

ROUNDS = {1: 6, 2: 4, 8: 2}  # by the number of sequences


def shapes_of(name: str, forms: list[str], layers: int) -> dict[str, ModelConfig]:
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": 8192}
    if layers:
        limits["num_hidden_layers"] = layers
    return {form: preset(name, "flex", 3, ffn_c=form, **limits) for form in forms}


@contextmanager
def contenders(
    shapes: dict[str, ModelConfig], folder: Path, frequent: tuple[int, ...]
) -> Iterator[list[Measured]]:
    """An engine for each form, all with the rows of one table."""
    manifest = alike(next(iter(shapes.values())), "int8", frequent)
    with ExitStack() as stack:
        files = stack.enter_context(served(folder / "tables", manifest, 1))["file"]
        engines, codes = [], []
        for form, shape in shapes.items():
            checkpoint = Checkpoint(random_weights(folder / form, shape), shape, form)
            code = CompiledDecode(checkpoint, CPU.dtype, COMPILED)
            code.start()
            stack.callback(code.stop)
            codes.append(code)
            engines.append(engine_of(checkpoint, rows_of(files, manifest, 1), code, form))
        assert all(code.wait() for code in codes), "decoding was not compiled"
        yield engines


def compare(ones: list[Measured], ids: np.ndarray, concurrency: int, rounds: int) -> list[float]:
    """The median ratio of each contender's tokens per second to the first one's."""
    rates: list[list[float]] = [[] for _ in ones]
    length = PROMPT + ANSWER
    for number in range(rounds):
        at = (np.arange(concurrency) + number * concurrency) * length % (len(ids) - length)
        texts = [ids[start : start + length].tolist() for start in at]
        start_all(texts, PROMPT, *ones)
        for found, more in zip(rates, rates_in_turn(SLICE, *ones), strict=True):
            found.extend(more)
    ratios = [float(np.median(np.array(found) / rates[0])) for found in rates]
    for one, found, ratio in zip(ones, rates, ratios, strict=True):
        rate = f"{statistics.median(found):8.1f} tokens/s"
        print(f"  {concurrency:3} sequences  {one.name:9} {rate}   {ratio:.2f}", flush=True)
    return ratios


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    presets = "demo", "250m", "750m", "1b"
    parser.add_argument("--preset", default="250m", choices=presets, help="default 250m")
    parser.add_argument("--layers", type=int, default=0, help="default: as the preset has")
    text = f"the first is the baseline; of {', '.join(FORMS)} (default swiglu,moc,avgk)"
    parser.add_argument("--forms", default="swiglu,moc,avgk", help=text)
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    forms = options.forms.split(",")
    if unknown := set(forms) - set(FORMS):
        parser.error(f"no code is compiled for {', '.join(sorted(unknown))}: {text}")
    _, ids, frequent = trace(VOCABULARY)
    shapes = shapes_of(options.preset, forms, options.layers)
    result = {}
    with (
        tempfile.TemporaryDirectory(prefix="tolhouse-forms-") as folder,
        torch.inference_mode(),
        contenders(shapes, Path(folder), frequent) as engines,
    ):
        shape = shapes[forms[0]]
        size = f"hidden size {shape.hidden_size}, {shape.num_hidden_layers} layers"
        print(f"{options.preset}, {size}, beta 3, {CPU}")
        for concurrency, rounds in ROUNDS.items():
            ratios = compare(engines, ids, concurrency, 1 if options.quick else rounds)
            for form, ratio in zip(forms[1:], ratios[1:], strict=True):
                result[f"{form}_vs_{forms[0]}_c{concurrency}"] = round(ratio, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
