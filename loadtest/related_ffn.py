"""Parts of `loadtest.related`: the forms of FFN-C against their formulas and against SwiGLU.

A difference is the largest one, relative to the largest output. Channels and blocks are permuted.
"""

import copy
import functools
import math
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from tolhouse.config import set_compiler_folder
from tolhouse.engine.cpu import compiled
from tolhouse.engine.cpu.gathered import gathered
from tolhouse.engine.cpu.packed import by_handle, linear, load
from tolhouse.model import ffn
from tolhouse.model.checkpoint import open_checkpoint, save_checkpoint
from tolhouse.model.config import ModelConfig, preset
from tolhouse.model.losses import evaluate
from tolhouse.model.transformer import Transformer
from tolhouse.testing import tiny_model
from tolhouse.train import corpus
from tolhouse.train.recipes import recipe
from tolhouse.train.trainer import Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
WIDTHS = 1024, 2048, 4096
TOKENS = 64
FIT_BATCHES, FIT_STEPS = 16, 300
STEPS, TUNING_STEPS, HELD_OUT = 120, 40, 10_000


def pairs(folder: Path, **form: Any) -> Iterator[tuple[ffn.SwiGLU, nn.Module]]:
    """Yield the FFN-C of each layer of a random model, and the module that a worker runs."""
    path = tiny_model(folder / "model", "flex", 3, **form)
    model = open_checkpoint(path).model()
    for block in model.layers:
        permute(cast("ffn.SwiGLU", block.mlp), form.get("ffn_blocks", 1))
    save_checkpoint(folder / "permuted", model, path / "tokenizer.json")
    checkpoint = open_checkpoint(folder / "permuted")
    packed = load(checkpoint, CPU, torch.float32)
    for own, theirs in zip(checkpoint.model().layers, packed.layers, strict=True):
        yield cast("ffn.SwiGLU", own.mlp), mlp_of(theirs)


def mlp_of(block: nn.Module) -> nn.Module:
    """The FFN-C of a layer. A module's attributes have the type Tensor | Module."""
    return block.get_submodule("mlp")


def permute(mlp: ffn.SwiGLU, blocks: int) -> None:
    """Permute the blocks of channels, and the channels of each block."""
    size = len(mlp.gate_proj.weight) // blocks
    order = torch.randperm(blocks)[:, None] * size + torch.stack(
        [torch.randperm(size) for _ in range(blocks)]
    )
    for matrix, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        matrix.weight.data = matrix.weight.index_select(dim, order.flatten())


def masked(mlp: ffn.SwiGLU, x_TD: Tensor, mask_TM: Tensor) -> Tensor:
    """A dense SwiGLU in float64, of which a mask keeps some channels."""
    gate, up, down = (m.weight.double() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return (F.silu(x_TD @ gate.T) * (x_TD @ up.T) * mask_TM) @ down.T


def chosen(mlp: ffn.SwiGLU, x_TD: Tensor, share: float) -> Tensor:
    """The formula of `moc` in float64, with all channels and a mask."""
    gate_TM = x_TD.double() @ mlp.gate_proj.weight.double().T
    return masked(mlp, x_TD.double(), top(gate_TM, round(share * gate_TM.shape[1])))


def top(score_TM: Tensor, active: int) -> Tensor:
    """A mask of the `active` largest scores."""
    return score_TM >= score_TM.sort(descending=True).values[:, active - 1 : active]


def difference(found: Tensor, expected: Tensor) -> float:
    relative = float((found - expected).abs().max() / expected.abs().max())
    assert math.isfinite(relative), "not a number, which `max` would drop"
    return relative


@torch.inference_mode()
def moc() -> dict[str, Any]:
    """Differences, the weights that are read, and the speed against SwiGLU by width."""
    figures: dict[str, Any] = {}
    x_TD, read = torch.randn(TOKENS, 96), {}
    for name, share in (("full", 1.0), ("quarter", 0.25)):
        worst = 0.0
        with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
            for own, packed in pairs(Path(folder), ffn_c="moc", ffn_share=share):
                worst = max(worst, difference(packed(x_TD), chosen(own, x_TD, share)))
                with WeightBytes() as read[name]:
                    packed(x_TD[:1])
        figures[f"moc_{name}_diff"] = worst
    figures["moc_bytes_ratio"] = read["quarter"].bytes / read["full"].bytes
    for width in WIDTHS:
        config = preset("tiny", "flex", 3, hidden_size=width, ffn_c="moc")
        codes = {form: ffn_code(form, config) for form in ("swiglu", "moc")}
        made, x_TD = with_weights(ffn.make("moc", config, width)), torch.randn(1, width)
        one, expected = InWorker(made, codes["moc"]), chosen(cast("ffn.MoC", made), x_TD, 0.25)
        figures[f"moc_compiled_{width}_diff"] = difference(one(x_TD), expected)
        figures[f"moc_speed_{width}"] = round(speed(config, codes), 2)
    for by in ("gate", "activation"):
        found = perplexity(tuned(0, ffn_c="moc", ffn_share=0.5, ffn_by=by))
        figures[f"moc_half_{by}_untuned_loss"] = round(found / swiglu(0) - 1, 4)
    return figures | {f"moc_{name}_loss": loss for name, loss in losses("moc").items()}


@torch.inference_mode()
def avgk() -> dict[str, Any]:
    """Differences, and the loss against the share of blocks after fine-tuning."""
    figures: dict[str, Any] = {}
    x_TD, blocks = torch.randn(TOKENS, 96), 12
    for name, share in (("full", 1.0), ("quarter", 0.25)):
        worst, form = 0.0, {"ffn_c": "avgk", "ffn_blocks": blocks, "ffn_share": share}
        with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
            for own, packed in pairs(Path(folder), **form):
                keys_BD = own.gate_proj.weight.double().unflatten(0, (blocks, -1)).mean(1)
                mask_TB = top(x_TD.double() @ keys_BD.T, round(share * blocks))
                mask_TM = mask_TB.repeat_interleave(len(own.gate_proj.weight) // blocks, 1)
                worst = max(worst, difference(packed(x_TD), masked(own, x_TD.double(), mask_TM)))
        figures[f"avgk_{name}_diff"] = worst
    return figures | {f"avgk_{name}_loss": loss for name, loss in losses("avgk").items()}


@torch.inference_mode()
def flashmhf() -> dict[str, Any]:
    """The difference, and the peak of activations against SwiGLU with as many parameters."""
    x_TD, worst = torch.randn(TOKENS, 96), 0.0
    form: dict[str, Any] = {"ffn_heads": 4, "ffn_experts": 3}
    with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
        path = tiny_model(Path(folder), "flex", 3, ffn_c="flashmhf", **form)
        checkpoint = open_checkpoint(path)
        packed = load(checkpoint, CPU, torch.float32)
        for own, theirs in zip(checkpoint.model().layers, packed.layers, strict=True):
            weights = {name: p.double() for name, p in mlp_of(own).named_parameters()}
            expected = unfused(weights, x_TD.double(), **form)
            worst = max(worst, difference(mlp_of(theirs)(x_TD), expected))
    config = preset("tiny", "flex", 3, hidden_size=1024, ffn_c="flashmhf", ffn_experts=4)
    peaks = {}
    for name in ("swiglu", "flashmhf"):
        one, x_TD = in_worker(with_weights(ffn.make(name, config, 1024))), torch.randn(512, 1024)
        with PeakBytes() as memory:
            one(x_TD)
        peaks[name] = memory.peak
    ratio = round(peaks["flashmhf"] / peaks["swiglu"], 4)
    return {"flashmhf_max_diff": worst, "flashmhf_peak_ratio": ratio}


def unfused(weights: dict[str, Tensor], x_TD: Tensor, ffn_heads: int, ffn_experts: int) -> Tensor:
    """The formula with all channels of a head at once: K, U and V are stacked by network."""
    outs = []
    for h, q_TE in enumerate((x_TD @ weights["in_proj.weight"].T).chunk(ffn_heads, 1)):
        keys, ups, values = (
            torch.stack([weights[f"heads.{h}.{e}.{m}_proj.weight"] for e in range(ffn_experts)])
            for m in ("gate", "up", "down")
        )
        router = torch.sigmoid(q_TE @ weights[f"routers.{h}.weight"].T)
        router = router / router.sum(1, keepdim=True)
        c = F.silu(torch.einsum("te,nme->tnm", q_TE, keys))
        c = c * torch.einsum("te,nme->tnm", q_TE, ups)
        outs.append(torch.einsum("tn,tnm,nem->te", router, c, values))
    return torch.cat(outs, 1) @ weights["o_proj.weight"].T


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations allocate and that are alive together."""

    now = peak = 0

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if self.users[key] or key not in known:  # else a view of a weight or an input
                self.now += size if not self.users[key] else 0
                self.users[key] += 1
                weakref.finalize(tensor, self._release, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.now -= size if not self.users[key] else 0


def tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


@torch.inference_mode()
def lookup() -> dict[str, Any]:
    """The difference, operations and speed against SwiGLU, and the fit to trained FFN-C."""
    x_TD, worst = torch.randn(TOKENS, 96), 0.0
    with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
        checkpoint = open_checkpoint(tiny_model(Path(folder), "flex", 3, ffn_c="lookup"))
        packed = load(checkpoint, CPU, torch.float32)
        for own, theirs in zip(checkpoint.model().layers, packed.layers, strict=True):
            mlp = cast("ffn.LookupFFN", own.mlp)
            expected = all_codes(mlp, x_TD.double(), checkpoint.config.ffn_bits)
            worst = max(worst, difference(mlp_of(theirs)(x_TD), expected))
    width, figures = 1024, {"lookup_max_diff": worst}
    config = preset("tiny", "flex", 3, hidden_size=width, ffn_c="lookup", ffn_bits=8)
    both = [ffn.make(name, config, width) for name in ("lookup", "swiglu")]
    for name, tokens in (("lookup_flops_ratio", 8), ("lookup_flops_ratio_alone", 1)):
        hashed, dense = (operations(one, torch.randn(tokens, width)) for one in both)
        figures[name] = round(hashed / dense, 4)
    codes = {form: ffn_code(form, config) for form in ("swiglu", "lookup")}
    figures["lookup_speed_1024"] = round(speed(config, codes), 2)
    return figures | fitted()


def all_codes(mlp: ffn.LookupFFN, x_TD: Tensor, bits: int) -> Tensor:
    """The formula with dense matrices: the product with each code, of which one is kept."""
    stages = mlp.blocks.double().chunk(mlp.STAGES)
    z_TP = F.pad(x_TD, (0, len(stages[0]) - x_TD.shape[1]))
    signs = torch.arange(len(stages[0]))
    both = signs[:, None] & signs
    parity = sum(((both >> b & 1) for b in range(len(signs).bit_length())), torch.tensor(0)) % 2
    for blocks in stages:
        dense = torch.block_diag(*blocks.split(mlp.BLOCK))
        z_TP = z_TP @ dense.T @ (1.0 - 2 * parity).double() / len(signs) ** 0.5
    codes_CB = 2.0 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1) - 1
    z_TNB = z_TP[:, : mlp.num_tables * bits].unflatten(1, (-1, bits))
    products_TNC = z_TNB @ codes_CB.double().T
    best = products_TNC == products_TNC.amax(-1, keepdim=True)
    weights_TNC = products_TNC * products_TNC.softmax(-1) * best
    return weights_TNC.flatten(1) @ mlp.tables.double()


class Operations(TorchDispatchMode):
    """Counts arithmetic: two for each product and sum of matrices, one for each other element."""

    count = 0
    MOVES: tuple[str, ...] = ("view", "t", "unsqueeze", "slice", "split", "unbind", "expand")
    MOVES += ("constant_pad_nd", "_to_copy", "arange", "select", "_unsafe_view", "cat", "alias")
    MOVES += ("detach", "stack")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "linear", "matmul"):
            self.count += 2 * out.numel() * args[-2].shape[-1]
        elif "embedding_bag" in name:
            self.count += 2 * args[1].numel() * args[0].shape[1]
        elif name not in self.MOVES:
            sizes = [t.numel() for t in tensors((args, out))]
            self.count += max(sizes, default=0)
        return out


def operations(module: nn.Module, x_TD: Tensor) -> int:
    with Operations() as counted:
        module(x_TD)
    return counted.count


@torch.inference_mode(mode=False)
def fitted() -> dict[str, float]:
    """Fit `lookup` to each FFN-C of the trained model, by least squares on its inputs."""
    trainer, errors = replace(trained()), []
    trainer.model = model = tuned(0)
    inputs = inputs_of(trainer, trainer.train_ids, FIT_BATCHES)
    others = inputs_of(trainer, trainer.valid_ids, FIT_BATCHES // 4)
    config = replace(model.config, ffn_c="lookup")
    for block, x_TD, other_TD in zip(model.layers, inputs, others, strict=True):
        made = ffn.make("lookup", config, config.hidden_size)
        ffn.initialise(made)
        with torch.no_grad():
            y_TD, expected_TD = mlp_of(block)(x_TD), mlp_of(block)(other_TD)
            scale = y_TD.std()  # tables are fitted to outputs of scale 1, and scaled afterwards
        optimizer = torch.optim.Adam(made.parameters(), 3e-3)
        for _ in range(FIT_STEPS):
            part = torch.randint(len(x_TD), (1024,))
            error = F.mse_loss(made(x_TD[part]), y_TD[part] / scale)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        with torch.no_grad():
            made.tables *= scale
            errors.append(float((made(other_TD) - expected_TD).var() / expected_TD.var()))
        block.mlp = made
    loss, mean = perplexity(model) / swiglu(0) - 1, sum(errors) / len(errors)
    return {"lookup_fit_error": round(mean, 4), "lookup_fit_loss": round(loss, 4)}


@torch.no_grad()
def inputs_of(trainer: Trainer, ids: np.ndarray, batches: int) -> list[Tensor]:
    """Return the inputs [T, D] of each FFN-C for random windows of a text."""
    seen: list[list[Tensor]] = [[] for _ in trainer.model.layers]
    hooks = [
        mlp_of(block).register_forward_pre_hook(lambda _, args, mine=mine: mine.append(args[0]))
        for block, mine in zip(trainer.model.layers, seen, strict=True)
    ]
    for step in range(batches):
        trainer.loss(*trainer.batch(ids, 2, step))
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def losses(form: str, **fields: Any) -> dict[str, float]:
    """Return relative increases of perplexity over SwiGLU after as much fine-tuning, by share."""
    exact, shares = swiglu(TUNING_STEPS), {"full": 1.0, "half": 0.5, "quarter": 0.25}
    return {
        name: round(perplexity(tuned(ffn_c=form, ffn_share=share, **fields)) / exact - 1, 4)
        for name, share in shares.items()
    }


@functools.cache
def swiglu(steps: int) -> float:
    """Return the perplexity of the trained model after some more steps."""
    return perplexity(tuned(steps))


@functools.cache
def trained() -> Trainer:
    """A trained Flex model of recipe tiny with SwiGLU as FFN-C, and its text."""
    run = recipe("tiny", "flex", 3)
    run = replace(run, config=replace(run.config, ffn_c="swiglu"), steps=STEPS)
    with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
        size = run.config.vocab_size
        ids = corpus.prepare(corpus.standard_library(), Path(folder), size, run.sequence_tokens)
        with torch.inference_mode(mode=False):
            trainer = Trainer(run, *ids, Path(folder))
            trainer.run()
    return trainer


@torch.inference_mode(mode=False)
def tuned(steps: int = TUNING_STEPS, **form: Any) -> Transformer:
    """Return the trained model with another form of FFN-C, after some more steps."""
    source = trained()
    model = Transformer(replace(source.recipe.config, **form))
    model.load_state_dict(source.model.state_dict())
    one = replace(source)
    one.model = model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        one.loss(*one.batch(one.train_ids, 1, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def perplexity(model: Transformer) -> float:
    return evaluate(model, trained().valid_ids[:HELD_OUT]).perplexity


class WeightBytes(TorchDispatchMode):
    """Counts the bytes of weights that kernels read for a token: chosen rows, or a matrix."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name == "index_select":
            self.bytes += out.numel() * out.element_size()
        elif "linear" in name or name == "mm":
            self.bytes += out.numel() * args[0].shape[-1] * (2 if "fp16" in name else 4)
        return out


def speed(config: ModelConfig, codes: dict[str, Any]) -> float:
    """Return the time of one token with the first of two forms over that with the second.

    Weights are in bfloat16, and cycle through several copies, so that they come from memory.
    """
    width = config.hidden_size
    copies = max(2, (64 << 20) // (6 * width * width))
    sets = [
        [InWorker(with_weights(ffn.make(form, config, width)), codes[form]) for form in codes]
        for _ in range(copies)
    ]
    x_TD = torch.randn(1, width)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(3, 200 // copies)):
        for pair in sets:
            for one, seconds in zip(pair, times, strict=True):
                start = time.perf_counter()
                one(x_TD)
                seconds.append(time.perf_counter() - start)
    first, second = (sorted(one)[len(one) // 2] for one in times)
    return first / second


class InWorker:
    """An FFN as a worker runs it for one token, with compiled code if there is code."""

    def __init__(self, module: nn.Module, code: Any) -> None:
        self.packed, self.code = in_worker(module), code
        self.state = list(compiled.state_of(self.packed).values())

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.code.boxed_run([*self.state, x_TD])[0] if self.code else self.packed(x_TD)


@torch.inference_mode(mode=False)
def ffn_code(form: str, config: ModelConfig) -> Any:
    """Compile an FFN-C for one token with the worker's options, or return None for other forms."""
    if form not in compiled.FORMS:
        return None
    with torch.device("meta"):
        module = in_worker(ffn.make(form, config, config.hidden_size), by_handle)
    module.to_empty(device="cpu").requires_grad_(False)
    inputs = list(compiled.state_of(module).values()), torch.zeros(1, config.hidden_size)
    with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
        set_compiler_folder(f"{folder}/inductor")
        compiled.write_code(Stateless(module), inputs, path := Path(folder) / "code.pt2")
        return compiled.load_code(path)


class Stateless(nn.Module):
    """A module as a function of its state and its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        names = list(compiled.state_of(module))
        named = functools.partial(zip, names, strict=True)
        self.call = lambda state, x_TD: functional_call(module, dict(named(state)), (x_TD,))

    def forward(self, state: list[Tensor], x_TD: Tensor) -> Tensor:
        return self.call(state, x_TD)


def with_weights(module: nn.Module) -> nn.Module:
    """Return the module with random weights in bfloat16 that keep the scale of its input."""
    for p in module.parameters():
        p.data = (torch.randn(p.shape) * p.shape[-1] ** -0.5).bfloat16()
    return module


def in_worker(
    module: nn.Module,
    make: Callable[..., nn.Module] = lambda w, b: linear(w, b, CPU, torch.float32),
) -> nn.Module:
    """Return a copy of an FFN whose matrices are packed as in a worker."""
    holder = nn.Module()
    holder.add_module("mlp", gathered(copy.deepcopy(module), torch.bfloat16))
    for name, child in list(holder.named_modules()):
        if isinstance(child, nn.Linear):
            holder.set_submodule(name, make(child.weight, child.bias))
    for p in holder.parameters():  # the tables of lookup
        p.data = p.float()
    return mlp_of(holder)
