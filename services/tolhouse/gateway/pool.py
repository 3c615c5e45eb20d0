"""The workers behind the gateway: who is healthy, who has least to do, and whom to ask next when one fails."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from tolhouse.client.generation import WorkerChannel
from tolhouse.errors import DeadlineExceeded, Mismatch, NotFound, Overloaded, TolhouseError, Unavailable
from tolhouse.telemetry import event
from tolhouse.v1 import generation_pb2

_POLL_TIMEOUT_SECONDS = 2.0


@dataclass(eq=False)
class Member:
    channel: WorkerChannel
    described: generation_pb2.DescribeWorkerReply | None = None
    trouble: TolhouseError | None = None  # why it gets no requests
    in_flight: int = 0  # requests of ours
    others: int = 0  # requests of other gateways, at the last look

    @property
    def load(self) -> int:
        return self.in_flight + self.others


class Limits(NamedTuple):
    context_tokens: int
    vocab_size: int
    eos_token_id: int


class Pool:
    def __init__(self, targets: list[str], tokenizer_id: str, poll_seconds: float) -> None:
        self.tokenizer_id, self.poll_seconds = tokenizer_id, poll_seconds
        self.members = [Member(WorkerChannel(target), trouble=Unavailable(f"worker {target} has not answered yet")) for target in targets]

    async def watch(self) -> None:
        """Look at every worker again and again."""
        while True:
            await asyncio.gather(*(self._look(member) for member in self.members))
            await asyncio.sleep(self.poll_seconds)

    async def close(self) -> None:
        await asyncio.gather(*(member.channel.close() for member in self.members))

    def healthy(self) -> list[Member]:
        return [m for m in self.members if m.trouble is None]

    def models(self) -> list[str]:
        return sorted({m.described.model for m in self.healthy() if m.described})

    def check_model(self, model: str | None) -> str:
        """The name of the model to use; NotFound if no worker serves it, Unavailable if there are none."""
        served = self.models()
        if not served:
            raise self.trouble()
        if model is None and len(served) == 1:
            return served[0]
        if model not in served:
            raise NotFound(f"model {model!r} is not served here; available: {', '.join(served)}")
        return model

    def limits(self, model: str) -> Limits:
        """What all healthy workers of a model can take."""
        described = [m.described for m in self.healthy() if m.described and m.described.model == model]
        if not described:
            raise self.trouble()
        context, vocabulary = min(d.context_tokens for d in described), min(d.vocab_size for d in described)
        return Limits(context, vocabulary, described[0].eos_token_id)

    def trouble(self) -> TolhouseError:
        """Why no worker is healthy."""
        causes = [m.trouble for m in self.members if m.trouble]
        kind = Mismatch if causes and all(isinstance(c, Mismatch) for c in causes) else Unavailable
        return kind("no healthy worker: " + "; ".join(map(str, causes)))

    async def generate(self, model: str, request: generation_pb2.GenerateRequest) -> AsyncGenerator[generation_pb2.GenerateReply]:
        """The replies of the least loaded worker. One that fails before its first reply is replaced by the next."""
        tried: set[Member] = set()
        while True:
            left = [m for m in self.healthy() if m not in tried and m.described and m.described.model == model]
            if not left:
                raise self.trouble()
            member = min(left, key=lambda m: m.load)
            tried.add(member)
            member.in_flight += 1
            begun = False
            try:
                async with aclosing(member.channel.generate(request)) as replies:
                    async for reply in replies:
                        begun = True
                        yield reply
                return
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                event("worker failed a request", worker=member.channel.target, request_id=request.request_id, error=str(error))
                another = any(m not in tried and m.described and m.described.model == model for m in self.healthy())
                if begun or not another:
                    raise
            finally:
                member.in_flight -= 1

    async def _look(self, member: Member) -> None:
        before = member.trouble
        try:
            reply = await member.channel.describe(_POLL_TIMEOUT_SECONDS)
            member.described, member.trouble = reply, None
            member.others = max(0, reply.running + reply.waiting - member.in_flight)
            if reply.tokenizer_id != self.tokenizer_id:
                member.trouble = Mismatch(
                    f"worker {member.channel.target} serves {reply.model} with tokenizer {reply.tokenizer_id[:12]}, "
                    f"but this gateway has {self.tokenizer_id[:12]}: start it with the worker's checkpoint"
                )
        except TolhouseError as error:
            member.trouble = error
        if str(before) != str(member.trouble):
            event("worker changed", worker=member.channel.target, trouble=str(member.trouble or "none"))
