"""Converts a dense model to a Flex model without training.

One pass of a text through the dense model accumulates, for each layer, the second moments of the
FFN's normed input x and its output y, and the sums of x and y for each token. FFN-C is the ridge
solution of y = W x + b. The row of a token is the mean of its residuals y - W x - b, shrunk by its
count n with the factor n / (n + k), where k is the ratio of the variance within tokens to the
variance between tokens. Tokens that the text lacks have zero rows. Layers are chosen by perplexity
on a later part of the text. A GPU may run the model. The CPU solves the equations.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import (
    Checkpoint,
    open_checkpoint,
    tensor_shapes,
    write_checkpoint,
)
from tolhouse.model.config import ModelConfig
from tolhouse.model.ffn import LinearStack
from tolhouse.model.tokenizer import TOKENIZER
from tolhouse.model.transformer import Block, NoCache, Transformer, rotary
from tolhouse.store.base import Store
from tolhouse.store.registry import refuse_another
from tolhouse.store.writer import shard_count, write_table
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import MAX_FREQUENT, Manifest, check_name, content_id

WINDOW = 256  # tokens of a window of the text; each is a sequence of its own
RIDGE = 1e-3  # relative to the mean variance of x
CPU = torch.device("cpu")
_BATCH_TOKENS = 2048
_BAR: Any = {"leave": False, "dynamic_ncols": True, "disable": None}


@dataclass(frozen=True)
class Replacement:
    """FFN-C and the rows [S, D] of one layer, for the S tokens of the statistics."""

    ffn_c: LinearStack
    rows_SD: Tensor

    def to(self, device: torch.device) -> "Replacement":
        return Replacement(self.ffn_c.to(device), self.rows_SD.to(device))


class Statistics:
    """Moments of the inputs and outputs of every FFN on the token ids of a text.

    Moments are float64, and those of one batch float32. The sums of each token are float32, in a
    file in `folder` that takes 8 * N * S * D bytes for N layers and S distinct tokens.
    """

    def __init__(self, model: Transformer, ids_WS: Tensor, folder: Path) -> None:
        config, device = model.config, model.norm.weight.device
        layers, size = config.num_hidden_layers, config.hidden_size
        distinct, places, counts = torch.unique(ids_WS, return_inverse=True, return_counts=True)
        self.tokens, self.counts = distinct, counts.double()
        exact: Any = {"dtype": torch.float64, "device": device}
        inputs = torch.zeros(layers, size + 1, size + 1, **exact)
        products = torch.zeros(layers, size + 1, size, **exact)
        self.squares = [0.0] * layers  # the sum of all |y|^2
        shape = layers, 2, len(distinct), size
        file = np.memmap(folder / "sums", np.float32, "w+", shape=shape)
        self._sums = torch.from_numpy(file)
        part = torch.empty(0, dtype=torch.int64)

        def record(layer: int, x_TD: Tensor, y_TD: Tensor) -> None:
            x_TE = F.pad(x_TD, (0, 1), value=1.0)
            inputs[layer] += x_TE.T @ x_TE
            products[layer] += x_TE.T @ y_TD
            self.squares[layer] += float(y_TD.double().square().sum())
            for number, values in enumerate((x_TD, y_TD)):
                self._sums[layer, number].index_add_(0, part, values.float().cpu())

        step = max(1, _BATCH_TOKENS // ids_WS.shape[1])
        with _observed(model, record), torch.inference_mode():
            windows = list(zip(ids_WS.split(step), places.split(step), strict=True))
            for ids, place in tqdm(windows, desc="statistics", unit="batch", **_BAR):
                part = place.flatten()
                positions = torch.arange(ids.shape[1], device=device).repeat(len(ids))
                empty = torch.empty(0)
                model.hidden(ids.flatten().to(device), positions, NoCache(ids.shape[1]), empty)
        self.inputs, self.products = inputs.cpu(), products.cpu()

    def replacement(self, layer: int, dtype: torch.dtype) -> Replacement:
        """Compute FFN-C and rows of a layer. The weights have values of `dtype`."""
        gram, product, total = self.inputs[layer], self.products[layer], self.counts.sum()
        mean_x, mean_y = gram[-1, :-1] / total, product[-1] / total
        size = len(mean_x)
        covariance = gram[:-1, :-1] / total - torch.outer(mean_x, mean_x)
        crossed = product[:-1] / total - torch.outer(mean_x, mean_y)
        ridge = RIDGE * covariance.diagonal().mean() + 1e-12
        covariance.diagonal().add_(ridge)
        weight = torch.linalg.solve(covariance, crossed).T.to(dtype).double()
        bias = (mean_y - weight @ mean_x).to(dtype).double()
        affine = torch.cat((weight, bias[:, None]), 1)
        x_SD, y_SD = self._sums[layer].double()
        residuals_SD = y_SD - x_SD @ weight.T - self.counts[:, None] * bias
        error = self.squares[layer] - 2 * (affine * product.T).sum()
        error += ((affine @ gram) * affine).sum()
        rows_SD = shrunk(residuals_SD, self.counts, float(error)).float()
        ffn_c = LinearStack(size, 1, bias=True).requires_grad_(False)
        linear = cast("nn.Linear", ffn_c.maps[0])
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        return Replacement(ffn_c, rows_SD)


def shrunk(residuals_SD: Tensor, counts_S: Tensor, error: float) -> Tensor:
    """Return the shrunk mean residual [S, D] of each token.

    `residuals_SD` are sums, and `error` is the sum of the squares of all residuals. The estimate is
    that of one-way analysis of variance with random effects.
    """
    total, tokens = float(counts_S.sum()), len(counts_S)
    between = float((residuals_SD.square().sum(1) / counts_S).sum())  # of means, times counts
    within = max(0.0, error - between) / max(1.0, total - tokens)
    spread = (between - tokens * within) / total
    if spread <= 0:
        return torch.zeros_like(residuals_SD)
    return residuals_SD / (counts_S[:, None] + within / spread)


@contextmanager
def _observed(model: Transformer, record: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `record` with layer, input and output of each FFN."""
    hooks = []
    for layer, block in enumerate(cast("Sequence[Block]", model.layers)):

        def hook(_: nn.Module, inputs: Any, output: Tensor, layer: int = layer) -> None:
            record(layer, inputs[0], output)

        assert block.mlp
        hooks.append(block.mlp.register_forward_hook(hook))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


class Trials:
    """Measures the perplexity of a dense model whose layers are replaced one by one.

    A trial begins at the first layer that differs from the accepted replacements.
    """

    def __init__(
        self, model: Transformer, statistics: Statistics, ids_WS: Tensor, dtype: torch.dtype
    ) -> None:
        self.model, self.statistics, self.dtype = model, statistics, dtype
        self.device = model.norm.weight.device
        length, ids_WS = ids_WS.shape[1] - 1, ids_WS.to(self.device)
        self.ids_T, self.targets_T = ids_WS[:, :-1].flatten(), ids_WS[:, 1:].flatten()
        self.cache = NoCache(length)
        positions_T = torch.arange(length, device=self.device).repeat(len(ids_WS))
        self.rope = rotary(positions_T, model.config, model.norm.weight.dtype)
        tokens = statistics.tokens.to(self.device)
        found = torch.searchsorted(tokens, self.ids_T).clamp(max=len(tokens) - 1)
        self.seen_T1 = (tokens[found] == self.ids_T)[:, None]
        self.places_T = found
        self.accepted: dict[int, Replacement] = {}
        self.accepted_ratio = 1.0
        self.dense = self._run(0, model.x0(self.ids_T), {})
        if not math.isfinite(self.dense):
            what = "the loss of the dense model on the text is not finite"
            raise InvalidArgumentError(f"{what}: check its weights")
        self.inputs = self._states  # the residual stream [T, D] before each layer

    @torch.inference_mode()
    def _run(self, start: int, x_TD: Tensor, replaced: dict[int, Replacement]) -> float:
        """Return the loss in nats, and keep the inputs of the layers from `start` on."""
        self._states = [x_TD]
        for layer in range(start, len(self.model.layers)):
            block = cast("Block", self.model.layers[layer])
            dense, row_TD, new = block.mlp, None, replaced.get(layer)
            if new:
                row_TD = new.rows_SD[self.places_T] * self.seen_T1
                block.mlp = new.ffn_c
            x_TD = block(x_TD, self.rope, self.cache, row_TD)
            block.mlp = dense
            self._states.append(x_TD)
        hidden, total = self.model.norm(x_TD), 0.0
        for part, targets in zip(hidden.split(WINDOW), self.targets_T.split(WINDOW), strict=True):
            total += float(F.cross_entropy(self.model.lm_head(part), targets, reduction="sum"))
        return total / len(self.targets_T)

    def ratio(self, layer: int, *, accept_below: float = 0.0) -> float:
        """Return the perplexity with `layer` replaced too, divided by that of the dense model.

        The replacement is accepted if the ratio is at most `accept_below`.
        """
        new = self.statistics.replacement(layer, self.dtype).to(self.device)
        replaced = {**self.accepted, layer: new}
        ratio = math.exp(self._run(layer, self.inputs[layer], replaced) - self.dense)
        if ratio <= accept_below:
            self.accepted, self.accepted_ratio = replaced, ratio
            self.inputs[layer:] = self._states
        return ratio


@dataclass(frozen=True)
class Choice:
    """The chosen layers. `single` has the ratio of perplexities with each layer alone.

    `steps` has the layers in the order of their acceptance, and the ratio after each.
    """

    single: dict[int, float]
    steps: tuple[tuple[int, float], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(layer for layer, _ in self.steps))

    @property
    def ratio(self) -> float:
        return self.steps[-1][1] if self.steps else 1.0


def rank(trials: Trials) -> dict[int, float]:
    """Measure the ratio of perplexities with each layer alone replaced."""
    layers = range(len(trials.model.layers))
    return {n: trials.ratio(n) for n in tqdm(layers, desc="layers", unit="layer", **_BAR)}


def choose(trials: Trials, single: dict[int, float], budget: float) -> Choice:
    """Add layers, those with the lowest own ratio first, while the ratio is at most 1 + budget.

    Each addition is measured together with the layers that were accepted before it. An addition is
    not measured if its own ratio times the present one is too high, because costs rarely add up to
    less than their product.
    """
    steps, most = [], 1 + budget
    for layer in sorted(single, key=lambda n: (single[n], n)):
        if layer in trials.accepted or trials.accepted_ratio * single[layer] > most:
            continue
        ratio = trials.ratio(layer, accept_below=most)
        if layer in trials.accepted:
            steps.append((layer, ratio))
    return Choice(single, tuple(steps))


def windows(ids: np.ndarray, most_tokens: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Split token ids into windows: the text for statistics [W, S], and held-out text [W, S + 1].

    Held-out windows are spread evenly over the text that follows that of the statistics. Windows
    among it would be of the same documents, and the rare tokens of a document recur in it.
    """
    length = min(WINDOW, len(ids) // 8)
    if length < 2:
        raise InvalidArgumentError(f"the text has {len(ids)} tokens; at least 16 are needed")
    count = len(ids) // length
    kept = torch.from_numpy(ids[: count * length].astype(np.int64)).view(count, length)
    held = max(1, min(held_out // length, count // 4))
    most = min(max(1, most_tokens // length) if most_tokens else count, count - held)
    text, rest = kept[:most], kept[most:]
    return text, rest[np.linspace(0, len(rest) - 1, held).round().astype(int)]


def parse_layers(given: str, config: ModelConfig) -> tuple[int, ...] | None:
    """Return the layers of `--layers`: None for auto, and an empty tuple for none."""
    if given in ("auto", "none"):
        return None if given == "auto" else ()
    count = config.num_hidden_layers
    allowed = f"allowed are auto, none, or layers from 0 to {count - 1} separated by commas"
    try:
        layers = tuple(sorted({int(part) for part in given.split(",")}))
    except ValueError:
        raise InvalidArgumentError(f"`layers` {given!r:.60}: {allowed}") from None
    if bad := [layer for layer in layers if not 0 <= layer < count]:
        raise InvalidArgumentError(f"`layers` {given!r:.60}: there is no layer {bad[0]}; {allowed}")
    return layers


def check_dense(checkpoint: Checkpoint) -> None:
    """Raise InvalidArgumentError unless the checkpoint is dense."""
    kind = checkpoint.config.kind
    if kind != "base":
        rule = "only dense models can be converted, which are of kind base"
        raise InvalidArgumentError(f"checkpoint {checkpoint.name} is of kind {kind}: {rule}")


@dataclass(frozen=True)
class Converted:
    checkpoint: Checkpoint
    manifest: Manifest | None
    choice: Choice

    def sizes(self, dense: Checkpoint) -> str:
        """Describe the bytes that leave the worker, and those of the table."""
        left = dense.weight_bytes(dense=True) - self.checkpoint.weight_bytes(dense=False)
        table = self.manifest.table_bytes if self.manifest else 0
        return f"{left / 1e6:.1f} MB leave the worker, the table has {table / 1e6:.1f} MB"


def percent(ratio: float) -> str:
    """Return a ratio of perplexities as a change in percent."""
    return f"{100 * (ratio - 1):+.2f}%"


class Conversion:
    """The conversion of one dense checkpoint. Statistics are computed once.

    `ids` [T] is the text. `folder` stores the sums of each token while the object is in use.
    `device` runs the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: np.ndarray,
        folder: Path,
        most: int,
        held_out: int,
        device: torch.device,
    ) -> None:
        check_dense(checkpoint)
        self.checkpoint = checkpoint
        self.model = checkpoint.model().to(device)
        tensor = checkpoint.weights.tensors["model.layers.0.mlp.down_proj.weight"]
        self.dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(tensor.dtype, torch.float32)
        text, held = windows(ids, most, held_out)
        self.statistics = Statistics(self.model, text, folder)
        self.held = held

    def trials(self) -> Trials:
        return Trials(self.model, self.statistics, self.held, self.dtype)

    def given(self, layers: Sequence[int]) -> Choice:
        """Measure given layers instead of a choice."""
        trials = self.trials()
        steps = [(n, trials.ratio(n, accept_below=math.inf)) for n in layers]
        return Choice({}, tuple(steps))

    def write(
        self, choice: Choice, out: Path, name: str, codec_name: str, store: Store
    ) -> Converted:
        """Write the checkpoint to the folder `out`, and its table to `store`.

        Without layers, the checkpoint equals the dense one, and there is no table.
        """
        layers, source = choice.layers, self.checkpoint
        new = {n: self.statistics.replacement(n, self.dtype) for n in layers}
        more: dict[str, Any] = {"kind": "flex", "beta": 1, "flex_layers": layers}
        config = replace(source.config, **more) if layers else source.config
        weights = {
            f"model.layers.{layer}.mlp.maps.0.{name}": value.to(self.dtype)
            for layer, one in new.items()
            for name, value in one.ffn_c.maps[0].named_parameters()
        }
        kept = tensor_shapes(config).keys() - weights
        state = {**weights, **{n: source.tensor(n) for n in sorted(kept)}}
        write_checkpoint(out, config, state, source.path / TOKENIZER)
        made = open_checkpoint(out)
        if not layers:
            return Converted(made, None, choice)
        manifest = self._table(made, new, name, codec_name, store)
        return Converted(made, manifest, choice)

    def _table(
        self,
        made: Checkpoint,
        new: dict[int, Replacement],
        name: str,
        codec_name: str,
        store: Store,
    ) -> Manifest:
        tokens = self.statistics.tokens.numpy()
        order = np.argsort(-self.statistics.counts.numpy(), kind="stable")[:MAX_FREQUENT]
        arrays = [one.rows_SD.numpy() for one in new.values()]
        blocks = tuple(f"ffn.{layer}" for layer in new)
        size, width = made.config.vocab_size, made.config.hidden_size
        kind = codec(codec_name).name
        manifest = Manifest(
            name=check_name(name or made.name),
            version=content_id("converted", made.model_id(), kind, blocks, tokens, *arrays),
            codec_name=kind,
            vocab_size=size,
            blocks=blocks,
            width=width,
            num_shards=1,
            model_id=made.model_id(),
            tokenizer_id=made.tokenizer_id,
            frequent=tuple(tokens[order].tolist()),
        )
        manifest = replace(manifest, num_shards=shard_count(size, manifest.record_bytes))
        refuse_another(store, manifest)

        def records(shard: int) -> np.ndarray:
            ids = manifest.shard_ids(shard)
            rows = np.zeros((len(ids), len(arrays), width), np.float32)
            _, here, there = np.intersect1d(ids, tokens, assume_unique=True, return_indices=True)
            for number, array in enumerate(arrays):
                rows[here, number] = array[there]
            return manifest.encode(ids, rows)

        return write_table([store], manifest, records)


@contextmanager
def conversion(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    beside: Path,
    most_tokens: int,
    held_out: int,
    device: torch.device = CPU,
) -> Iterator[Conversion]:
    """Compute the statistics of a checkpoint on `ids` [T], with its file in the folder `beside`."""
    check_dense(checkpoint)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=beside) as folder:
        yield Conversion(checkpoint, ids, Path(folder), most_tokens, held_out, device)
