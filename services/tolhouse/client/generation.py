"""Asynchronous calls to one worker, for the gateway and `AsyncClient`."""

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
    """The channel to one worker, for one event loop."""

    def __init__(self, target: str, credentials: ClientCredentials, name: str = "") -> None:
        """`name` stands for the worker in error messages. The default is "worker TARGET"."""
        self.target, self.credentials = target, credentials
        self._name = name or f"worker {target}"
        self._channel = reloading_channel(target, credentials, grpc.aio)
        self._calls: set[grpc.aio.Call] = set()

    def abandon(self) -> None:
        """End all calls in flight with UnavailableError."""
        calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()

    async def describe(self, seconds: float) -> pb.DescribeWorkerReply:
        """Describe the worker, within `seconds`."""
        stub, metadata = GenerationStub(self._channel()), self.credentials.metadata()
        try:
            request = pb.DescribeWorkerRequest()
            return await stub.DescribeWorker(request, timeout=seconds, metadata=metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._name) from None

    async def generate(
        self, request: pb.GenerateRequest, timeout: float | None = None
    ) -> AsyncGenerator[pb.GenerateReply, None]:
        """Yield replies up to the one with a finish_reason. Closing the iterator cancels the call.

        `timeout` limits the seconds of the whole call. None means no limit.
        """
        metadata = self.credentials.metadata()
        if traceparent := tracing.traceparent():
            metadata = (*metadata, (tracing.HEADER, traceparent))
        stub = GenerationStub(self._channel())
        call = stub.Generate(request, timeout=timeout, metadata=metadata)
        self._calls.add(call)
        try:
            async for reply in call:
                yield reply
        except grpc.RpcError as error:
            # A worker that stops cancels its calls.
            if error.code() is grpc.StatusCode.CANCELLED:
                raise UnavailableError(f"{self._name} takes no more calls") from None
            raise error_of(error, self._name) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call in self._calls or (task and task.cancelling()):
                raise  # the task was cancelled
            raise UnavailableError(f"{self._name} does not answer any more") from None
        finally:
            self._calls.discard(call)
            call.cancel()

    async def close(self) -> None:
        """Close the channel, and end all calls in flight with UnavailableError."""
        self.abandon()
        await self._channel().close()
