"""Generate calls to workers: the request, and the asynchronous call that the gateway makes."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import TypedDict, Unpack

import grpc

from tolhouse import tracing
from tolhouse.errors import InvalidArgument, Unavailable
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import ReloadingChannel, dial_async, error_of
from tolhouse.v1 import generation_pb2
from tolhouse.v1.generation_pb2_grpc import GenerationStub

MAX_ROW_SCALE = 16.0  # either way


class Options(TypedDict, total=False):
    """How tokens are chosen and when they end; the worker checks the values, and protos/tolhouse/v1 explains them."""

    temperature: float  # 0, the default: greedy
    top_k: int  # 0: all
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop_ids: Iterable[int]
    ignore_eos: bool
    min_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    row_scale: float
    absent_layers: Iterable[int]
    layer_scales: Iterable[float]


def request_of(
    prompt_ids: Iterable[int], max_tokens: int, request_id: str = "", **options: Unpack[Options]
) -> generation_pb2.GenerateRequest:
    """The message; InvalidArgument where a value can't be sent. The worker checks what the values mean."""
    try:
        return generation_pb2.GenerateRequest(
            request_id=request_id, prompt_ids=prompt_ids, max_tokens=max_tokens, **options
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidArgument(
            f"a generation parameter is out of range or of the wrong type: {error}"
        ) from None


class WorkerChannel:
    """One worker, called from an event loop."""

    def __init__(self, target: str, credentials: ClientCredentials) -> None:
        self.target, self.credentials = target, credentials
        self._line = ReloadingChannel(credentials, self._dial)
        self._calls: set[grpc.aio.Call] = set()

    def _dial(self) -> tuple[grpc.aio.Channel, GenerationStub]:
        channel = dial_async(self.target, self.credentials)
        return channel, GenerationStub(channel)

    @property
    def stub(self) -> GenerationStub:
        return self._line.current[1]

    def abandon(self) -> None:
        """End all calls in flight with Unavailable: the worker hangs."""
        calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()

    async def describe(self, timeout_seconds: float) -> generation_pb2.DescribeWorkerReply:
        try:
            request = generation_pb2.DescribeWorkerRequest()
            return await self.stub.DescribeWorker(
                request, timeout=timeout_seconds, metadata=self.credentials.metadata()
            )
        except grpc.RpcError as error:
            raise error_of(error, f"worker {self.target}") from None

    async def generate(
        self, request: generation_pb2.GenerateRequest
    ) -> AsyncGenerator[generation_pb2.GenerateReply]:
        """Replies up to the one with a finish_reason. Closing the iterator cancels the call."""
        traceparent = tracing.traceparent()
        call = self.stub.Generate(
            request,
            metadata=(
                *(self.credentials.metadata() or ()),
                *([(tracing.HEADER, traceparent)] if traceparent else []),
            ),
        )
        self._calls.add(call)
        try:
            async for reply in call:
                yield reply
        except grpc.RpcError as error:
            raise error_of(error, f"worker {self.target}") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call in self._calls or (
                task and task.cancelling()
            ):  # it is the caller who is cancelled
                raise
            raise Unavailable(f"worker {self.target} does not answer any more") from None
        finally:
            self._calls.discard(call)
            call.cancel()

    async def close(self) -> None:
        await self._line.current[0].close()
