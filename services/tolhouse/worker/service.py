"""The gRPC service of the worker. It converts between protobuf and the types of the engine."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from prometheus_client import Counter

from tolhouse import tracing
from tolhouse.client.results import NO_TOKEN
from tolhouse.engine.engine import Engine
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.errors import InvalidArgumentError
from tolhouse.logs import event
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import ModelConfig
from tolhouse.net.server import status_of
from tolhouse.sampling import FEATURES, SamplingParams, check_prompt
from tolhouse.v1 import generation_pb2 as pb
from tolhouse.v1.generation_pb2_grpc import GenerationServicer

REQUESTS = Counter("tolhouse_worker_requests_total", "Generate calls by gRPC status", ["status"])
MAX_REQUEST_ID = 256  # characters; the id appears in the log
_AS_COMPUTED = ("fp32", "fp16", "bf16")  # codecs that round rows to 16 bits at most


class WorkerService(GenerationServicer):
    def __init__(self, engine: Engine, checkpoint: Checkpoint, name: str) -> None:
        self.engine, self.config = engine, checkpoint.config
        manifest = engine.rows.manifest
        embedding = not (manifest and manifest.has_x0)
        self._of_checkpoint: dict[str, Any] = {
            "model": name,
            "model_id": checkpoint.model_id(),
            "tokenizer_id": checkpoint.tokenizer_id,
            "context_tokens": self.config.context_tokens,
            "vocab_size": self.config.text_vocab_size,
            "row_layers": self.config.num_rows,
            "most_sequences": engine.scheduler.max_running + engine.max_waiting,
            "eos_token_id": next(iter(self.config.end_token_ids), NO_TOKEN),
            "features": FEATURES,
            "weight_bytes": checkpoint.weight_bytes(dense=False, embedding=embedding),
            "dense_weight_bytes": checkpoint.weight_bytes(dense=True),
        }

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateReply]:
        request_id, sequence, reason = request.request_id, None, ""
        status, message = "CANCELLED", ""  # unless the code below sets another status
        about = {
            "gen_ai.request.model": self._of_checkpoint["model"],
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "tolhouse.request_id": request_id,
        }
        metadata = dict(context.invocation_metadata() or ())
        caller = tracing.remote(str(metadata.get(tracing.HEADER, "")))
        trace = tracing.begin("worker Generate", caller, about, root=True)
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        try:
            sequence = self._sequence(request, outputs)
            sequence.span, prompt_tokens = trace, sequence.prompt_tokens
            event("request", logging.DEBUG, request_id=request_id, prompt_tokens=prompt_tokens)
            self.engine.add(sequence)
            while not reason:
                output = await outputs.get()
                if output.error:
                    error = str(output.error)
                    event("request failed", logging.WARNING, request_id=request_id, error=error)
                    raise output.error
                if reason := output.finish_reason:
                    status = "OK"
                    trace.set_attribute("gen_ai.usage.output_tokens", sequence.answer_tokens)
                    trace.set_attribute("tolhouse.table", sequence.table)
                    trace.set_attribute("tolhouse.finish_reason", reason)
                chosen, prompt = output.logprobs, output.prompt_logprobs
                yield pb.GenerateReply(
                    token_ids=output.tokens,
                    finish_reason=reason,
                    end_id=output.end_id,
                    logprobs=vars(chosen) if chosen else None,
                    prompt_logprobs=vars(prompt) if prompt else None,
                    table=sequence.table,
                )
        except Exception as failure:  # noqa: BLE001 - every error becomes a gRPC status here
            status, message = status_of(failure)
            await context.abort(grpc.StatusCode[status], message)
        finally:  # also after cancellation by the caller; has no effect on a finished sequence
            REQUESTS.labels(status).inc()
            tracing.end(trace, message)
            if sequence:
                self.engine.cancel(sequence)

    async def DescribeWorker(
        self, request: pb.DescribeWorkerRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeWorkerReply:
        engine, absent, altered = self.engine, set[int](), list[str]()
        if manifest := engine.rows.manifest:  # a table may hold modified rows
            absent = set(self.config.row_layers) - set(manifest.layers)
            altered += [manifest.codec_name] * (manifest.codec_name not in _AS_COMPUTED)
            altered += ["low rank"] * bool(manifest.basis) + ["edited"] * manifest.is_edited
        return pb.DescribeWorkerReply(
            **self._of_checkpoint,
            absent_layers=sorted(absent),
            altered=altered,
            table=engine.table,
            running=engine.running,
            waiting=engine.waiting,
            rows=pb.RowCounts(**engine.counts()),
            tokens=engine.tokens,
        )

    def _sequence(self, request: pb.GenerateRequest, outputs: asyncio.Queue[Output]) -> Sequence:
        if (length := len(request.request_id)) > MAX_REQUEST_ID:
            raise InvalidArgumentError(
                f"request_id has {length} characters; allowed: {MAX_REQUEST_ID}"
            )
        bounds = self.config.text_vocab_size, self.config.context_tokens
        prompt = check_prompt(request.prompt_token_ids, request.max_tokens, *bounds)
        sampling = SamplingParams.from_proto(request)
        check_sampling(self.config, sampling)
        if not sampling.ignore_eos:
            ends = (*sampling.stop_token_ids, *self.config.end_token_ids)
            sampling = sampling.model_copy(update={"stop_token_ids": ends})
        loop = asyncio.get_running_loop()

        def emit(output: Output) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        return Sequence(len(prompt), prompt, sampling, emit)


def check_sampling(config: ModelConfig, sampling: SamplingParams) -> None:
    """Raise InvalidArgumentError if the model lacks tokens or rows in a request."""
    for name in ("stop_token_ids", "logit_bias"):
        if bad := [i for i in getattr(sampling, name) if i >= config.text_vocab_size]:
            message = f"{name}: token id {bad[0]} is outside the vocabulary"
            raise InvalidArgumentError(f"{message}: allowed are 0 to {config.text_vocab_size - 1}")
    rows, scales, absent = config.num_rows, len(sampling.layer_scales), sampling.absent_layers
    if scales in (0, rows) and (not sampling.probes or (rows and max(absent, default=0) < rows)):
        return
    there = f"layers 0 to {rows - 1}" if rows > 1 else "one row for all layers" if rows else "none"
    raise InvalidArgumentError(
        f"row_scale, absent_layers and layer_scales are for looked-up rows; the model has {there}, "
        f"the request {scales} layer_scales and absent_layers {list(absent)!s:.200}"
    )
