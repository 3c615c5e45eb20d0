"""Makes a model of transformers read its rows from Tolhouse, in place of its own table.

    from tolhouse.integrations.attach import attach

    attachment = attach(model, rows="file://.tolhouse/tables", table="gemma-4-E2B-it")

Each forward pass fetches the rows of its distinct tokens once, before the first layer runs.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tolhouse.client.client import Client
from tolhouse.errors import InvalidArgumentError, MismatchError, NotFoundError, TolhouseError
from tolhouse.model.checkpoint import CONFIG, open_checkpoint
from tolhouse.model.transformer import ContextFreeFFN
from tolhouse.net.channel import Targets
from tolhouse.sources.base import SourceModel, is_of
from tolhouse.sources.gemma import FINISHED, RAW, Gemma, blocks_of, vocabulary
from tolhouse.sources.memoryllm import MemoryLLM
from tolhouse.table.manifest import Manifest

_SAMPLE = 32  # rows that are compared with those of the model
_MOST_ERROR = 0.5  # of rows of low rank, relative to their norm
_TABLE, _PROJECTION = "embed_tokens_per_layer", "per_layer_model_projection"
_NORM = "per_layer_projection_norm"
# Inputs of multimodal models, which the projection of a finished row has not seen.
_MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "mm_encoder_outputs")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Attachment:
    """A model with rows from a table. `detach` ends this.

    Attributes:
        manifest: The table.
        freed_bytes: The bytes of the weights that the model no longer holds.
        fetched_rows: The number of rows fetched so far.
    """

    def __init__(self, model: Any, client: Client, table: str, checkpoint: str) -> None:
        self._text, self._client = _text_model(model), client
        self._given, self._checkpoint = checkpoint, checkpoint or model.config.name_or_path
        config = self._config = self._text.config
        self.manifest = client.describe(table)
        layers = config.num_hidden_layers
        self.is_finished = self.manifest.blocks == blocks_of(FINISHED, layers)
        self._check_shape(layers)
        names = (_TABLE, _PROJECTION, _NORM) if self.is_finished else (_TABLE,)
        self._parts = {name: getattr(self._text, name) for name in names}
        self._check_rows()
        self._check_folder()
        self.freed_bytes = self.fetched_rows = 0
        self._largest_id = self.manifest.vocab_size - 1
        self._hooks = []
        if self._text is not model and self.is_finished:
            for module in model.modules():
                if getattr(module, "language_model", None) is self._text:
                    hook = module.register_forward_pre_hook(self._refuse_media, with_kwargs=True)
                    self._hooks.append(hook)
                    # Other parts of the model embed the ids of media.
                    self._largest_id = config.vocab_size_per_layer_input - 1
        for name, part in self._parts.items():
            self.freed_bytes += sum(p.nbytes for p in part.parameters() if not p.is_meta)
            part.weight = nn.Parameter(part.weight.to("meta"), requires_grad=False)
            setattr(self._text, name, None)
        self._text.get_per_layer_inputs = self.get_per_layer_inputs
        if self.is_finished:
            self._text.project_per_layer_inputs = self.project_per_layer_inputs

    def rows(self, ids: Tensor) -> Tensor:
        """Fetch the rows of `ids`, of any shape, as [*ids.shape, L, P] on their device."""
        distinct, where = torch.unique(ids, return_inverse=True)
        on_host = distinct.cpu().numpy()
        self.fetched_rows += len(on_host)
        return _staged(self._client.fetch(self.manifest, on_host), ids.device)[where]

    @torch.compiler.disable
    def get_per_layer_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Replace the text model's method of this name."""
        if input_ids is None:
            raise InvalidArgumentError("rows are looked up by token id: give `input_ids`")
        if self.is_finished and int(input_ids.max()) > self._largest_id:
            largest = f"the largest id of text is {self._largest_id}"
            raise InvalidArgumentError(f"token {int(input_ids.max())} stands for media: {largest}")
        return self.rows(input_ids).to(self._text.embed_tokens.weight.dtype)

    def project_per_layer_inputs(
        self, inputs_embeds: Tensor, per_layer_inputs: Tensor | None = None
    ) -> Tensor:
        """Replace the text model's method of this name: finished rows contain the projection."""
        if per_layer_inputs is None:
            raise InvalidArgumentError("rows are looked up by token id: give `input_ids`")
        return per_layer_inputs.to(inputs_embeds.device)

    def detach(self, checkpoint: str = "") -> None:
        """Give the model its own weights again, and close the row source.

        Args:
            checkpoint: The folder of the model. Default: as given to `attach`.

        Raises:
            NotFoundError: The folder has no weights.
            InvalidArgumentError: Its weights lack a tensor, or have one of another shape.
        """
        source = self._source(checkpoint)
        place = self._text.embed_tokens.weight
        for name, part in self._parts.items():
            weight = source.tensor(f"{name}.weight")
            if weight.shape != part.weight.shape:
                shapes = f"{list(weight.shape)} instead of {list(part.weight.shape)}"
                raise InvalidArgumentError(f"{source.path}: {name}.weight has shape {shapes}")
            weight = weight.to(place.device, place.dtype)
            part.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self._text, name, part.to(place.device))
        for name in ("get_per_layer_inputs", "project_per_layer_inputs"):
            self._text.__dict__.pop(name, None)
        for hook in self._hooks:
            hook.remove()
        self._client.close()

    def _check_folder(self) -> None:
        """Compare the hash of the rows, or of the model, with that of the model's folder.

        Does nothing without a folder, such as for a model that was downloaded by its name. Raises
        MismatchError if the table was built from another model.
        """
        if not (self._given or (Path(self._checkpoint) / CONFIG).is_file()):
            return
        try:
            same = is_of(self.manifest, self._rows_source())
        except TolhouseError:
            if self._given:
                raise
            return  # the model may have a name that happens to be that of a folder
        if not same:
            raise _other_model(self.manifest)

    def _rows_source(self) -> SourceModel:
        return self._source()

    def _source(self, checkpoint: str = "") -> Gemma:
        folder = Path(checkpoint or self._checkpoint)
        if not (folder / CONFIG).is_file():
            need = f"{folder} is not the folder of a model: give `checkpoint`"
            raise NotFoundError(f"the weights of the model are needed, and {need}")
        return Gemma(folder, self.manifest.blocks)

    def _check_shape(self, layers: int) -> None:
        manifest, width = self.manifest, self._config.hidden_size_per_layer_input
        size = vocabulary(self._config.to_dict())
        allowed = [blocks_of(kind, layers) for kind in (FINISHED, RAW)]
        if manifest.blocks in allowed and (manifest.width, manifest.vocab_size) == (width, size):
            return
        needs = f"{layers} blocks {FINISHED}.0 … or {RAW}.0 … of {width} values, {size} tokens"
        raise _other_shape(manifest, needs)

    @torch.no_grad()
    def _check_rows(self) -> None:
        """Compare some rows with those of the model.

        Raises MismatchError if the table was built from a model with other rows.
        """
        manifest, text = self.manifest, self._text
        random = np.random.default_rng(int(manifest.version, 16))
        unchanged = np.setdiff1d(np.arange(manifest.vocab_size), manifest.changed)
        ids = random.choice(unchanged, min(_SAMPLE, len(unchanged)), replace=False)
        own = self._own_rows(ids)
        stored = self._client.fetch(manifest, ids).astype(np.float32)
        largest = np.abs(own).max(axis=-1, keepdims=True)
        # The table may be computed in bfloat16, and the model in float32.
        exact = manifest.codec_name == "fp32"
        dtype = text.embed_tokens.weight.dtype if exact else torch.bfloat16
        rounding = 4 * torch.finfo(dtype).eps
        allowed = (manifest.codec.relative_error + rounding) * largest + manifest.codec.step
        if manifest.basis:  # rows of low rank are approximations
            same = np.linalg.norm(stored - own) < _MOST_ERROR * np.linalg.norm(own)
        else:
            same = bool((np.abs(stored - own) <= allowed + 1e-5 * largest).all())
        if not same:
            raise _other_model(manifest)

    def _own_rows(self, ids: np.ndarray) -> np.ndarray:
        """Compute rows [T, L, P] with the model, or with its checkpoint if weights are absent."""
        text = self._text
        if any(p.is_meta for part in self._parts.values() for p in part.parameters()):
            return self._source().rows(ids)
        tokens = torch.from_numpy(ids)[None].to(text.embed_tokens.weight.device)
        rows = text.get_per_layer_inputs(tokens)
        if self.is_finished:
            rows = text.project_per_layer_inputs(text.embed_tokens(tokens), rows)
        return rows[0].float().cpu().numpy()

    def _refuse_media(self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        media = ((name, inputs.get(name)) for name in _MEDIA)
        # `generate` passes an empty dict of encoder outputs for text.
        if given := [name for name, value in media if not (value is None or value == {})]:
            advice = "finished rows serve text only; build the table with --rows raw"
            raise InvalidArgumentError(f"`{given[0]}` cannot be used: {advice}")


class FFNAttachment(Attachment):
    """A MemoryLLM model of `tolhouse.integrations.transformers` with rows from a table."""

    def __init__(self, core: Any, client: Client, table: str, checkpoint: str) -> None:
        self._text, self._client, self._config = core, client, core.config
        self._given, self._checkpoint = checkpoint, checkpoint or core.config.name_or_path
        self.manifest = client.describe(table)
        self._check_shape(core.shape.num_hidden_layers)
        self._parts = {
            f"model.layers.{i}.ffn_m": layer for i, layer in enumerate(core.layers) if layer.ffn_m
        }
        if core.shape.flex_layers:
            self._check_converted()
        else:
            self._check_rows()
            self._check_folder()
        self.freed_bytes = self.fetched_rows = 0
        for layer in self._parts.values():
            self.freed_bytes += sum(p.nbytes for p in layer.ffn_m.parameters() if not p.is_meta)
            layer.ffn_m = None
        core.row_source = self.rows_of

    @torch.compiler.disable
    def rows_of(self, input_ids: Tensor) -> Tensor:
        """Fetch rows as [blocks, B, S, D] in the dtype of the model."""
        rows_BSND = self.rows(input_ids).to(self._text.embed_tokens.weight.dtype)
        return rows_BSND.movedim(-2, 0)

    def detach(self, checkpoint: str = "") -> None:
        """Give the model its own FFN-M again, and close the row source.

        Args:
            checkpoint: The folder of the model. Default: as given to `attach`.

        Raises:
            NotFoundError: The folder has no weights.
            InvalidArgumentError: Its weights lack a tensor, or have one of another shape.
        """
        source = open_checkpoint(checkpoint or self._checkpoint)
        if source.config != self._text.shape:
            raise InvalidArgumentError(f"{source.path} has a model of another shape")
        place = self._text.embed_tokens.weight
        for name, layer in self._parts.items():
            with torch.device("meta"):
                ffn_m = ContextFreeFFN(self._text.shape)
            names = {key: f"{name}.{key}" for key in ffn_m.state_dict()}
            weights = {k: source.tensor(n).to(place.device, place.dtype) for k, n in names.items()}
            ffn_m.load_state_dict(weights, assign=True)
            layer.ffn_m = ffn_m
        self._text.row_source = None
        self._client.close()

    def _check_shape(self, layers: int) -> None:
        manifest, shape = self.manifest, self._text.shape
        blocks = tuple(f"ffn.{i}" for i in shape.row_layers)
        width, size = shape.hidden_size, shape.vocab_size
        same = (manifest.width, manifest.vocab_size) == (width, size)
        if same and manifest.blocks in (blocks, ("x0", *blocks)):
            return
        needs = f"{len(blocks)} blocks {blocks[0]} … of {width} values, {size} tokens"
        raise _other_shape(manifest, needs)

    def _check_converted(self) -> None:
        """Raise MismatchError unless the table names the model in the folder.

        A converted model has no rows to compare.
        """
        if self.manifest.model_id != open_checkpoint(self._checkpoint).model_id():
            raise _other_model(self.manifest)

    def _rows_source(self) -> SourceModel:
        return MemoryLLM(open_checkpoint(self._checkpoint), self.manifest.blocks)

    def _own_rows(self, ids: np.ndarray) -> np.ndarray:
        text, parts = self._text, list(self._parts.values())
        if any(p.is_meta for layer in parts for p in layer.ffn_m.parameters()):
            return self._rows_source().rows(ids)
        tokens = torch.from_numpy(ids)[None].to(text.embed_tokens.weight.device)
        x0_TD = text.embed_tokens(tokens[0]).float()
        own = [x0_TD] if self.manifest.blocks[0] == "x0" else []
        # In float32, as a table is computed. In 16 bits, forms of FFN-M choose other channels.
        rows = own + [copy.deepcopy(layer.ffn_m).float()(x0_TD) for layer in parts]
        return torch.stack(rows, 1).cpu().numpy()


def attach(
    model: nn.Module,
    rows: Targets,
    table: str,
    *,
    checkpoint: str = "",
    timeout: float = 10.0,
    **credentials: Any,
) -> Attachment:
    """Make `model` read its rows from a table, and free its own table or its FFN-M.

    With finished rows, the projection `per_layer_model_projection` is freed as well, and the model
    takes text only. Generation, batches, padding, caches and sampling work as before. The state
    dict of the model lacks the freed weights until `detach`.

    Args:
        model: A text model or a multimodal model of Gemma 3n or Gemma 4, or a MemoryLLM model of
            `tolhouse.integrations.transformers`. Its table may be on the meta device.
        rows: `"file://PATH"`, `"redis://HOST:PORT"` or `"HOST:PORT"` of a lookup service.
        table: `"name@version"`, or `"name"` for the version that is published now.
        checkpoint: The folder of the model, which `detach` needs, and `attach` if the table is on
            the meta device. Default: the folder that the model was loaded from.
        timeout: Seconds that a fetch may take.
        credentials: Fields of `ClientCredentials`, such as `tls_ca` and `token`.

    Raises:
        InvalidArgumentError: The model has no rows, or has rows from a table already.
        NotFoundError: There is no such table.
        MismatchError: The table has other blocks, another vocabulary, or rows of another model.
        UnavailableError: The row source cannot be reached.
    """
    core = _memoryllm(model)
    if core is None:
        _text_model(model)
    client = Client(rows, timeout, **credentials)
    try:
        if core is not None:
            return FFNAttachment(core, client, table, checkpoint)
        return Attachment(model, client, table, checkpoint)
    except BaseException:
        client.close()
        raise


def _memoryllm(model: nn.Module) -> Any:
    """Return the part of `model` with layers of MemoryLLM, or None."""
    core: Any = next((m for m in model.modules() if hasattr(m, "row_source")), None)
    if core is not None and core.row_source is not None:
        raise InvalidArgumentError("the model has rows from a table already: detach it first")
    if core is not None and not core.shape.num_rows:
        raise InvalidArgumentError("a model of kind base has no rows to replace")
    return core


def _text_model(model: nn.Module) -> Any:
    """Return the part of `model` with per-layer embeddings."""
    for module in model.modules():
        if isinstance(getattr(module, _TABLE, None), nn.Module):
            return module
    if any(hasattr(module, _TABLE) for module in model.modules()):
        raise InvalidArgumentError("the model has rows from a table already: detach it first")
    allowed = "models of Gemma 3n and Gemma 4 with per-layer embeddings, and of MemoryLLM"
    raise InvalidArgumentError(f"{type(model).__name__} has no rows to replace; allowed: {allowed}")


def _other_model(manifest: Manifest) -> MismatchError:
    advice = "build the table from the checkpoint of this model"
    return MismatchError(f"table {manifest.ref} has rows of another model: {advice}")


def _other_shape(manifest: Manifest, needs: str) -> MismatchError:
    first, count = manifest.blocks[0], manifest.num_blocks
    has = f"{count} blocks {first} … of {manifest.width} values, {manifest.vocab_size} tokens"
    return MismatchError(f"table {manifest.ref} has {has}; the model needs {needs}")


def _staged(rows: np.ndarray, device: torch.device) -> Tensor:
    """Copy rows to `device`, through pinned memory if it is a GPU."""
    dtype = _DTYPES[rows.dtype.name]
    out = torch.empty(rows.shape, dtype=dtype, pin_memory=device.type == "cuda")
    np.copyto(out.view(torch.uint8).numpy(), rows.view(np.uint8))
    return out.to(device, non_blocking=True)
