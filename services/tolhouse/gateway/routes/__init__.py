"""The routes, by subject, and what they share."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from tolhouse.gateway.explore import MemoryFile
from tolhouse.gateway.router import WorkerRouter
from tolhouse.gateway.templates import ChatTemplate
from tolhouse.gateway.vocabulary import Vocabulary


@dataclass(frozen=True)
class Services:
    router: WorkerRouter
    vocabulary: Vocabulary
    template: ChatTemplate
    memory: MemoryFile | None


async def _services(request: Request) -> Services:
    return request.app.state.services


Gateway = Annotated[Services, Depends(_services)]
