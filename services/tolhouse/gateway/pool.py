"""The workers behind the gateway: who is healthy, who has least to do, and whom to ask next when one fails."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from tolhouse.client.generation import WorkerChannel
from tolhouse.errors import (
    DeadlineExceeded,
    Mismatch,
    NotFound,
    Overloaded,
    TolhouseError,
    Unavailable,
)
from tolhouse.logs import event, log
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.dns import Addresses
from tolhouse.v1 import generation_pb2

_POLL_TIMEOUT_SECONDS = 2.0  # a busy machine is not a lost one
_MOST_MISSED = 2  # looks that a worker may leave unanswered before its requests are given up


@dataclass(eq=False)
class Member:
    channel: WorkerChannel
    described: generation_pb2.DescribeWorkerReply | None = None
    trouble: TolhouseError | None = None  # why it gets no requests
    in_flight: int = 0  # requests of ours
    others: int = 0  # requests of other gateways, at the last look
    missed: int = 0  # looks in a row that it did not answer

    @property
    def load(self) -> int:
        return self.in_flight + self.others

    @property
    def full(self) -> bool:
        """Whether it would refuse another request, as far as is known here."""
        return bool(self.described and 0 < self.described.most_sequences <= self.load)


class Limits(NamedTuple):
    context_tokens: int
    vocab_size: int
    eos_token_id: int


class Pool:
    def __init__(
        self,
        addresses: Addresses,
        credentials: ClientCredentials,
        tokenizer_id: str,
        poll_seconds: float,
    ) -> None:
        self.addresses, self.credentials, self.tokenizer_id, self.poll_seconds = (
            addresses,
            credentials,
            tokenizer_id,
            poll_seconds,
        )
        self.members: list[Member] = []

    async def watch(self) -> None:
        """Look at every worker again and again, and at who they are; one that hangs does not keep the others waiting. Ends by being cancelled."""
        async with asyncio.TaskGroup() as looks:
            while True:
                try:
                    for member in await self._renew():
                        looks.create_task(self._look_on(member))
                except Exception:  # noqa: BLE001 - a TLS file that does not fit, for now, or a defect: the members there are go on
                    log.exception("new workers can't be called")
                await asyncio.sleep(self.poll_seconds)

    async def _renew(self) -> list[Member]:
        """Take up the workers that there are now; those that are new."""
        found = await asyncio.to_thread(self.addresses.look_up)
        kept = [m for m in self.members if m.channel.target in found]
        known = {m.channel.target for m in kept}
        new = [
            Member(
                WorkerChannel(t, self.addresses.credentials_for(t, self.credentials)),
                trouble=Unavailable(f"worker {t} has not answered yet"),
            )
            for t in found
            if t not in known
        ]
        self.members = kept + new
        return new

    async def _look_on(self, member: Member) -> None:
        """Until it is gone, and what it had to do for us is done."""
        target = member.channel.target
        try:
            while member in self.members or member.in_flight:
                try:
                    await self._look(member)
                except Exception:  # noqa: BLE001 - a defect: the other workers, and the next look, have nothing to do with it
                    log.exception("a look at worker %s failed", target)
                await asyncio.sleep(self.poll_seconds)
            event("worker is gone", worker=target)
        finally:
            await member.channel.close()

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

    def check_room(self, model: str) -> None:
        """Overloaded where all workers of a model have all they take: better said before any work is done for a request."""
        serving = [m for m in self.healthy() if m.described and m.described.model == model]
        if serving and all(m.full for m in serving):
            raise Overloaded(
                f"{sum(m.load for m in serving)} requests are with the workers already, all that they take: try again later"
            )

    def limits(self, model: str) -> Limits:
        """What all healthy workers of a model can take."""
        described = [
            m.described for m in self.healthy() if m.described and m.described.model == model
        ]
        if not described:
            raise self.trouble()
        context, vocabulary = (
            min(d.context_tokens for d in described),
            min(d.vocab_size for d in described),
        )
        return Limits(context, vocabulary, described[0].eos_token_id)

    def trouble(self) -> TolhouseError:
        """Why no worker is healthy."""
        causes = [m.trouble for m in self.members if m.trouble]
        kind = Mismatch if causes and all(isinstance(c, Mismatch) for c in causes) else Unavailable
        return kind(
            f"no healthy worker: {'; '.join(map(str, causes)) or 'there is no address of one yet'}"
        )

    async def generate(
        self, model: str, request: generation_pb2.GenerateRequest, may_restart: bool = False
    ) -> AsyncGenerator[generation_pb2.GenerateReply | None]:
        """The replies of the least loaded worker. One that fails or hangs before its first reply is replaced by the next.

        may_restart: also one that fails later; None says that the replies begin anew.
        """
        tried: set[Member] = set()
        while True:
            left = [
                m
                for m in self.healthy()
                if m not in tried and m.described and m.described.model == model
            ]
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
                event(
                    "worker failed a request",
                    worker=member.channel.target,
                    request_id=request.request_id,
                    error=str(error),
                )
                another = any(
                    m not in tried and m.described and m.described.model == model
                    for m in self.healthy()
                )
                if (begun and not may_restart) or not another:
                    raise
                if begun:
                    yield None
            finally:
                member.in_flight -= 1

    async def _look(self, member: Member) -> None:
        before = member.trouble
        try:
            reply = await member.channel.describe(_POLL_TIMEOUT_SECONDS)
            member.described, member.trouble, member.missed = reply, None, 0
            member.others = max(0, reply.running + reply.waiting - member.in_flight)
            if reply.tokenizer_id != self.tokenizer_id:
                member.trouble = Mismatch(
                    f"worker {member.channel.target} serves {reply.model} with tokenizer {reply.tokenizer_id[:12]}, "
                    f"but this gateway has {self.tokenizer_id[:12]}: start it with the worker's checkpoint"
                )
        except TolhouseError as error:
            member.trouble = error
            # one that refuses is ending, and may yet finish what it has begun; only one that is silent hangs
            member.missed = member.missed + 1 if isinstance(error, DeadlineExceeded) else 0
            if member.missed == _MOST_MISSED:
                member.channel.abandon()  # one that hangs keeps its calls open, and says nothing
        if str(before) != str(member.trouble):
            event(
                "worker changed",
                worker=member.channel.target,
                trouble=str(member.trouble or "none"),
            )
