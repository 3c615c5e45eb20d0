"""Asynchronous calls to workers, as the gateway makes them."""

import asyncio
from collections.abc import AsyncGenerator

import grpc

from tolhouse import tracing
from tolhouse.errors import UnavailableError
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import error_of, reloading_channel
from tolhouse.v1 import generation_pb2 as pb
from tolhouse.v1.generation_pb2_grpc import GenerationStub


class WorkerChannel:
    """One worker, called from an event loop."""

    def __init__(self, target: str, credentials: ClientCredentials) -> None:
        self.target, self.credentials = target, credentials
        self._channel = reloading_channel(target, credentials, grpc.aio)
        self._calls: set[grpc.aio.Call] = set()

    def abandon(self) -> None:
        """End all calls in flight with UnavailableError: the worker hangs."""
        calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()

    async def describe(self, seconds: float) -> pb.DescribeWorkerReply:
        stub, metadata = GenerationStub(self._channel()), self.credentials.metadata()
        try:
            request = pb.DescribeWorkerRequest()
            return await stub.DescribeWorker(request, timeout=seconds, metadata=metadata)
        except grpc.RpcError as error:
            raise error_of(error, f"worker {self.target}") from None

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateReply]:
        """Replies up to the one with a finish_reason. Closing the iterator cancels the call."""
        metadata = self.credentials.metadata()
        if traceparent := tracing.traceparent():
            metadata = (*metadata, (tracing.HEADER, traceparent))
        call = GenerationStub(self._channel()).Generate(request, metadata=metadata)
        self._calls.add(call)
        try:
            async for reply in call:
                yield reply
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:  # not by us: it ends
                raise UnavailableError(f"worker {self.target} takes no more calls") from None
            raise error_of(error, f"worker {self.target}") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call in self._calls or (task and task.cancelling()):
                raise  # the caller was cancelled
            raise UnavailableError(f"worker {self.target} does not answer any more") from None
        finally:
            self._calls.discard(call)
            call.cancel()

    async def close(self) -> None:
        await self._channel().close()
