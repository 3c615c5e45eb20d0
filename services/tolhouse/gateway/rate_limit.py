"""Requests per minute of API keys, counted in this process or, with a Redis, by all gateways."""

import logging
import math
import time
from fractions import Fraction
from typing import Any

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from tolhouse.errors import InvalidArgument
from tolhouse.logs import event

_TIMEOUT_SECONDS = 0.5  # for one answer of Redis
_PAUSE_SECONDS = 1.0  # without Redis after a failure


def window(requests_per_minute: float) -> RateLimitItem:
    """The rate as a number of requests in about ten seconds, or in one request's time if longer."""
    least = Fraction(1, 1_000_000)
    rate = max(Fraction(requests_per_minute).limit_denominator(1_000_000), least)
    pause = 60 / rate  # seconds per request
    times = math.ceil(10 / pause.numerator)
    return RateLimitItemPerSecond(pause.denominator * times, pause.numerator * times)


class RateLimiter:
    def __init__(self, redis_url: str = "", *, insecure: bool = False) -> None:
        """InvalidArgument if the URL is none of a Redis, or of a remote one in plaintext."""
        self._local = MovingWindowRateLimiter(MemoryStorage())
        self._shared: MovingWindowRateLimiter | None = None
        self._resume = 0.0  # when Redis is asked again
        if redis_url:
            from tolhouse.store.base import require_private
            from tolhouse.store.redis import split_credentials

            if not redis_url.startswith(("redis://", "rediss://")):
                raise InvalidArgument(
                    "--rate-limit-store must be redis://HOST:PORT or rediss://HOST:PORT"
                )
            require_private(redis_url, insecure=insecure)
            url, credentials = split_credentials(redis_url)
            options: dict[str, Any] = {
                "implementation": "redispy",
                "key_prefix": "tolhouse:rate",
                "credential_provider": credentials,
                "wrap_exceptions": True,
                "socket_timeout": _TIMEOUT_SECONDS,
                "socket_connect_timeout": _TIMEOUT_SECONDS,
            }
            storage: Any = storage_from_string(f"async+{url}", **options)
            self._shared = MovingWindowRateLimiter(storage)
            self._redis = storage.bridge.storage

    async def hit(self, name: str, requests_per_minute: float) -> float:
        """Count a request; the seconds to wait if there were too many before, else 0."""
        item = window(requests_per_minute)
        if self._shared and time.monotonic() >= self._resume:
            try:
                return await _hit(self._shared, item, name)
            except StorageError as error:
                self._resume = time.monotonic() + _PAUSE_SECONDS
                alone = "each gateway counts its own requests for a while"
                event(alone, logging.WARNING, reason=str(error.storage_error))
        return await _hit(self._local, item, name)

    async def close(self) -> None:
        if self._shared:
            await self._redis.aclose()


async def _hit(limiter: MovingWindowRateLimiter, item: RateLimitItem, name: str) -> float:
    if await limiter.hit(item, name):
        return 0.0
    stats = await limiter.get_window_stats(item, name)
    return max(0.001, stats.reset_time - time.time())
