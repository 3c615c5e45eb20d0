"""Tracks the health and load of the workers, and chooses a worker for each request."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from tolhouse import errors
from tolhouse.client.generation import WorkerChannel
from tolhouse.logs import event, log
from tolhouse.net.channel import Addresses
from tolhouse.net.health import PeerHealth
from tolhouse.sampling import check_features
from tolhouse.v1.generation_pb2 import DescribeWorkerReply, GenerateReply, GenerateRequest

_POLL_TIMEOUT_SECONDS = 2.0  # long enough for a busy machine
_MAX_MISSED = 2  # after this many polls without a reply, the worker's requests fail
# Errors of a worker after which another worker is tried.
_OTHERS_MAY_DO = errors.UnavailableError, errors.OverloadedError, errors.DeadlineExceededError
# Messages for callers. Only the log has addresses and paths.
_FOR_CALLERS: dict[type[errors.TolhouseError], str] = {
    errors.OverloadedError: "all workers are full: try again later",
    errors.DeadlineExceededError: "no worker answered in time: try again later",
    errors.CorruptError: "rows that this request needs are missing or damaged",
    errors.InternalError: "a worker failed; its log has the details",
}


class ModelNotFoundError(errors.NotFoundError):
    """No healthy worker serves the model."""


def _for_callers(error: errors.TolhouseError) -> errors.TolhouseError:
    if text := _FOR_CALLERS.get(type(error)):
        return type(error)(text)
    return errors.UnavailableError("no worker can complete this request now: try again later")


@dataclass(eq=False)
class Worker:
    target: str
    channel: WorkerChannel
    error: errors.TolhouseError | None  # the error of the last poll
    description: DescribeWorkerReply = field(default_factory=DescribeWorkerReply)
    in_flight: int = 0  # the number of requests of this gateway
    others: int = 0  # the number of requests of other gateways at the last poll
    missed: int = 0

    @property
    def load(self) -> int:
        return self.in_flight + self.others


class ServedModel(NamedTuple):
    """The limits within which every healthy worker of a model can serve."""

    name: str
    context_tokens: int
    vocab_size: int
    eos_token_id: int


@dataclass
class WorkerRouter:
    addresses: Addresses
    tokenizer_id: str
    poll_seconds: float
    workers: list[Worker] = field(default_factory=list)
    health: PeerHealth = field(default_factory=lambda: PeerHealth("worker"))

    async def watch(self) -> None:
        """Resolve addresses, and poll each worker in its own task, until cancelled."""
        async with asyncio.TaskGroup() as polls:
            while True:
                try:
                    found = await asyncio.to_thread(self.addresses.look_up)
                    self.workers = [w for w in self.workers if w.target in found]
                    for target in found:
                        if target in (w.target for w in self.workers):
                            continue
                        credentials = self.addresses.credentials_for(target)
                        error = errors.UnavailableError(f"worker {target} has not answered yet")
                        worker = Worker(target, WorkerChannel(target, credentials), error)
                        self.workers.append(worker)
                        polls.create_task(self._watch(worker))
                except Exception:  # noqa: BLE001 - a TLS file is being replaced
                    log.exception("new workers can't be called")
                await asyncio.sleep(self.poll_seconds)

    def healthy(self, model: str | None = None) -> list[Worker]:
        """Return the workers that may get requests, for one model or for all models."""
        up = (w for w in self.workers if not w.error and self.health.up(w.target))
        return [w for w in up if model in (None, w.description.model)]

    def descriptions(self, model: str | None = None) -> list[DescribeWorkerReply]:
        return [w.description for w in self.healthy(model)]

    def models(self) -> list[str]:
        return sorted({d.model for d in self.descriptions()})

    def model(self, name: str | None) -> ServedModel:
        """Return the model to use.

        Raises ModelNotFoundError if no worker serves it, and UnavailableError if no worker is
        healthy.
        """
        served = self.models()
        if not served:
            raise self.unavailable()
        name = served[0] if name is None and len(served) == 1 else name
        if name not in served:
            available = ", ".join(served)
            raise ModelNotFoundError(f"model {name!r} is not served; available: {available}")
        found = self.descriptions(name)
        least = (min(d.context_tokens for d in found), min(d.vocab_size for d in found))
        return ServedModel(name, *least, found[0].eos_token_id)

    def check_room(self, model: str) -> None:
        """Raise OverloadedError if all workers of a model are full."""
        serving = self.healthy(model)
        if serving and all(0 < w.description.most_sequences <= w.load for w in serving):
            requests = f"{sum(w.load for w in serving)} requests"
            raise errors.OverloadedError(f"the workers already have {requests}: try again later")

    def check_features(self, model: str, request: GenerateRequest) -> None:
        """Raise UnsupportedError if no healthy worker implements all parameters of a request."""
        if (serving := self.healthy(model)) and not self._able(model, request):
            check_features(request, serving[0].description.features, "the worker")

    def _able(self, model: str, request: GenerateRequest) -> list[Worker]:
        """Return the healthy workers of a model that implement all parameters of a request."""
        able = []
        for worker in self.healthy(model):
            with suppress(errors.UnsupportedError):
                check_features(request, worker.description.features, worker.target)
                able.append(worker)
        return able

    def unavailable(self) -> errors.TolhouseError:
        """Return the error to raise if no worker is healthy."""
        found = [w.error for w in self.workers if w.error]
        why = "; ".join(map(str, found)) or "no worker has an address yet"
        event("no worker is healthy", logging.WARNING, reason=why)
        if found and all(isinstance(e, errors.MismatchError) for e in found):
            advice = "start it with the worker's checkpoint"
            return errors.MismatchError(f"no worker has the tokenizer of this gateway: {advice}")
        return errors.UnavailableError("no worker is healthy: try again later")

    async def generate(
        self, model: str, request: GenerateRequest, asked: set[str], may_restart: bool = False
    ) -> AsyncGenerator[GenerateReply | None]:
        """Yield replies of the least loaded worker.

        If a worker fails before its first reply, the next one is called. With `may_restart`, the
        next worker is also called after the first reply, and None marks the new beginning. The
        addresses of called workers are added to `asked`.
        """
        tried: set[Worker] = set()
        while left := [w for w in self._able(model, request) if w not in tried]:
            worker = min(left, key=lambda w: w.load)
            tried.add(worker)
            asked.add(worker.target)
            worker.in_flight += 1
            begun = False
            try:
                async with aclosing(worker.channel.generate(request)) as replies:
                    async for reply in replies:
                        begun = True
                        yield reply
                return
            except errors.InvalidArgumentError:
                raise
            except errors.TolhouseError as error:
                about = {"request_id": request.request_id, "worker": worker.target}
                event("request failed at a worker", logging.WARNING, **about, reason=str(error))
                last = (begun and not may_restart) or tried.issuperset(self._able(model, request))
                if last or not isinstance(error, _OTHERS_MAY_DO):
                    raise _for_callers(error) from None
                if begun:
                    yield None
            finally:
                worker.in_flight -= 1
        self.check_features(model, request)
        raise self.unavailable()

    async def _watch(self, worker: Worker) -> None:
        """Poll a worker until its address is gone and its requests have ended."""
        try:
            while worker in self.workers or worker.in_flight:
                try:
                    await self._poll(worker)
                except errors.TolhouseError as error:
                    worker.error = error
                    self.health.report_down(worker.target, error)
                    # A draining worker refuses polls but finishes its requests. A silent one hangs.
                    silent = isinstance(error, errors.DeadlineExceededError)
                    worker.missed = worker.missed + 1 if silent else 0
                    if worker.missed == _MAX_MISSED:
                        worker.channel.abandon()
                except Exception:  # noqa: BLE001 - polling must continue
                    log.exception("polling worker %s failed", worker.target)
                await asyncio.sleep(self.poll_seconds)
            event("worker removed", worker=worker.target)
        finally:
            self.health.forget(worker.target)
            await worker.channel.close()

    async def _poll(self, worker: Worker) -> None:
        reply = await worker.channel.describe(_POLL_TIMEOUT_SECONDS)
        worker.description, worker.missed = reply, 0
        worker.others = max(0, reply.running + reply.waiting - worker.in_flight)
        if reply.tokenizer_id != self.tokenizer_id:
            theirs = f"{reply.model} with tokenizer {reply.tokenizer_id[:12]}"
            own = f"{self.tokenizer_id[:12]}: start it with the worker's checkpoint"
            raise errors.MismatchError(
                f"worker {worker.target} serves {theirs}, this gateway has {own}"
            )
        worker.error = None
        self.health.report_up(worker.target)
