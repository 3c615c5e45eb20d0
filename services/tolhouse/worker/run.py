"""The worker process, which builds the engine, follows the table and serves."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from prometheus_client import REGISTRY
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tolhouse import tracing
from tolhouse.client.row_source import RowSource, open_row_source
from tolhouse.config import GATE_OPTIONS, WorkerConfig, gate_options, set_triton_defaults
from tolhouse.engine.attention import PagedKVCache, blocks_of
from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.cpu.compiled import CompiledDecode, cache_folder
from tolhouse.engine.cpu.packed import add_embedding, load
from tolhouse.engine.engine import Engine
from tolhouse.engine.kv_policy import Compressive, policy_of
from tolhouse.engine.row_providers import CachedRows, NoRows, RecomputedRows, RowProvider
from tolhouse.engine.runner import GraphRunner, Runner
from tolhouse.engine.scheduler import Scheduler
from tolhouse.engine.table import check_table, wait_for_table
from tolhouse.errors import InvalidArgumentError, MismatchError
from tolhouse.logs import event
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint, torch_device, torch_dtype
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import Transformer
from tolhouse.net.server import serve
from tolhouse.table.manifest import Manifest
from tolhouse.v1.generation_pb2_grpc import add_GenerationServicer_to_server
from tolhouse.worker.metrics import EngineMetrics
from tolhouse.worker.service import WorkerService
from tolhouse.worker.table_watcher import TableWatcher

NAME = "tolhouse.v1.Generation"
_GATE_DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16  # of a file of gates
STEP_TOKENS = {"cpu": 512, "cuda": 2048}  # a GPU needs more tokens for the same use of its units


class Builder:
    """Builds the engine of a checkpoint, and runners for later versions of its table."""

    def __init__(
        self, checkpoint: Checkpoint, config: WorkerConfig, source: RowSource | None
    ) -> None:
        self.checkpoint, self.config, self.source = checkpoint, config, source
        self.table = config.table or checkpoint.name
        self.device = torch_device(config.device)
        self.on_cpu = self.device.type == "cpu"
        self.dtype = torch_dtype(config.dtype, self.device)
        capacity_bytes = int(config.kv_cache_megabytes * 1e6)
        kept = config.kv_sinks, config.kv_window, config.kv_keep_share
        shape = checkpoint.config
        gate_NH = gate_of(config.kv_gate, shape, gate_options(config))
        policy = policy_of(config.kv_policy, *kept, gate_NH, shape)
        if isinstance(policy, Compressive) and not self.on_cpu:
            raise InvalidArgumentError("--kv-policy compressive runs on a CPU only")
        if shape.summary_tokens and not policy.summary:
            hint = "the model was trained with summary tokens: use --kv-policy summary"
            event(hint, logging.WARNING, kv_policy=config.kv_policy)
        num_blocks = blocks_of(checkpoint.config, capacity_bytes, self.dtype)
        self.cache = BlockManager(num_blocks, policy)
        self.compiled = CompiledDecode(checkpoint, self.dtype, config.compile_cache)
        if not self.on_cpu:
            set_triton_defaults(cache_folder(config.compile_cache) / "triton")

    def build(self) -> Engine:
        config, shape = self.config, self.checkpoint.config
        compressive = isinstance(self.cache.policy, Compressive)  # this policy runs uncompiled
        if self.on_cpu and config.compile == "auto" and not compressive:
            self.compiled.start()
        rows: RowProvider = NoRows(shape.hidden_size, self.device)
        # GraphRunner needs one block more.
        self.pages = PagedKVCache(shape, self.cache.num_blocks + 1, self.device, self.dtype)
        with ThreadPoolExecutor(1) as pool:  # the table may be published later
            loading = pool.submit(self._load)
            if self.source:
                self.checkpoint.model_id()  # a hash of all weights, which the check needs
                table = wait_for_table(self.source, self.table, config.lookup_wait_seconds)
                rows = self._rows(table)
            self.model = loading.result()
        if not rows.has_x0:
            add_embedding(self.model, self.checkpoint, self.device, self.dtype)
        if self.on_cpu:
            self.compiled.attach(self.model)
        step_tokens = config.max_num_batched_tokens or STEP_TOKENS[self.device.type]
        scheduler = Scheduler(self.cache, config.max_num_seqs, step_tokens)
        self.engine = Engine(self._runner(rows), scheduler, config.max_waiting)
        return self.engine

    def reload(self, manifest: Manifest) -> None:
        """Use another version of the table for new sequences."""
        if self.model.embed_tokens is None and not manifest.has_x0:
            raise MismatchError(
                "it has no X0, and this worker runs without an input embedding; restart the worker"
            )
        self.engine.use(self._runner(self._rows(manifest)))

    def _load(self) -> Transformer:
        started = time.monotonic()
        model = load(self.checkpoint, self.device, self.dtype, embedding=False)
        seconds = round(time.monotonic() - started, 1)
        event("weights loaded", checkpoint=self.checkpoint.name, seconds=seconds)
        return model

    def _runner(self, rows: RowProvider) -> Runner:
        return (Runner if self.on_cpu else GraphRunner)(self.model, self.pages, rows)

    def _rows(self, manifest: Manifest) -> CachedRows:
        assert self.source
        config, checkpoint = self.config, self.checkpoint
        check_table(manifest, checkpoint)
        cache_bytes = int(config.row_cache_megabytes * 1e6)
        recompute = config.fallback == "recompute"
        fallback = RecomputedRows(checkpoint, manifest) if recompute else None
        place = self.device, self.dtype, checkpoint.config.num_rows, fallback
        rows = CachedRows(self.source, manifest, cache_bytes, *place)
        rows.fill()
        return rows


def gate_of(given: str, config: ModelConfig, options: str = "") -> Tensor:
    """Return the gates [N, H] of an option: a number for all heads, or a safetensors file.

    Logs a warning if the gates were trained with options other than `options`, those of the worker.
    Raises InvalidArgumentError if it is neither, or if the file has another shape.
    """
    shape = config.num_hidden_layers, config.num_attention_heads
    try:
        gate_NH = torch.full(shape, float(given))
    except ValueError:
        gate_NH = _gate_in(given, options)
    if not bool(((gate_NH >= 0) & (gate_NH <= 1)).all()):
        raise InvalidArgumentError(f"--kv-gate {given}: gates must be between 0 and 1")
    if gate_NH.shape != shape:
        raise InvalidArgumentError(f"--kv-gate {given}: {[*gate_NH.shape]} is not {[*shape]}")
    return gate_NH


def _gate_in(file: str, options: str) -> Tensor:
    if not file.strip():
        raise InvalidArgumentError("--kv-gate is empty: give a number or a file")
    try:
        if Path(file).is_dir():
            raise InvalidArgumentError(f"--kv-gate {file} is a folder: give a number or a file")
        with safe_open(file, "pt") as opened:
            trained = (opened.metadata() or {}).get(GATE_OPTIONS, "")
            gate_NH = opened.get_tensor("gate")
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError(f"--kv-gate {file}: {error}") from None
    if gate_NH.dtype not in _GATE_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _GATE_DTYPES)
        what = str(gate_NH.dtype).removeprefix("torch.")
        raise InvalidArgumentError(f"--kv-gate {file}: gates are {what}; allowed are {allowed}")
    if options and trained and options != trained:
        hint = "the gates were trained with other options: use the same for the worker"
        event(hint, logging.WARNING, file=file, trained=trained, used=options)
    return gate_NH


async def run(checkpoint_path: str | Path, config: WorkerConfig) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT."""
    if config.threads:
        torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(checkpoint_path)
    tracing.start_tracing("worker", config.traces, insecure=config.insecure)
    with ExitStack() as stack:
        source, watcher = None, None
        if checkpoint.config.num_rows:
            calling, timeout = config.client_credentials(), config.fetch_timeout_seconds
            source = open_row_source(config.rows, timeout, calling)
            stack.callback(source.close)
        builder = Builder(checkpoint, config, source)
        stack.callback(builder.compiled.stop)
        engine = await asyncio.to_thread(builder.build)
        engine.start()
        stack.callback(engine.stop)
        if source:
            name, poll = builder.table, config.table_poll_seconds
            watcher = TableWatcher(source, name, engine, builder.reload, poll)
            watcher.start()
            stack.callback(watcher.stop)
        service = WorkerService(engine, checkpoint, config.served_model_name or checkpoint.name)
        REGISTRY.register(EngineMetrics(engine, watcher))
        event(
            "loaded",
            checkpoint=checkpoint.name,
            table=engine.table,
            kv_cache_tokens=engine.cache.capacity_tokens,
            device=str(builder.device),
            dtype=str(builder.dtype).removeprefix("torch."),
        )
        register = partial(add_GenerationServicer_to_server, service)
        await serve("worker", NAME, config, register)
