"""Limits on an API key's requests per minute, to this process or, with Redis, to all gateways."""

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

from tolhouse.errors import InvalidArgumentError
from tolhouse.logs import event

_TIMEOUT_SECONDS = 0.5  # for one reply of Redis
_PAUSE_SECONDS = 1.0  # the time without Redis after a failure
_LEAST_RATE = Fraction(1, 1_000_000)


def window(requests_per_minute: float) -> RateLimitItem:
    """Return the rate as a number of requests in about ten seconds.

    A low rate becomes one request in a longer time.
    """
    rate = Fraction(requests_per_minute).limit_denominator(_LEAST_RATE.denominator)
    pause = 60 / max(rate, _LEAST_RATE)  # seconds per request
    times = math.ceil(10 / pause.numerator)
    return RateLimitItemPerSecond(pause.denominator * times, pause.numerator * times)


class RateLimiter:
    def __init__(self, redis_url: str = "", *, insecure: bool = False) -> None:
        """Raises InvalidArgumentError if the URL is not a Redis URL, or is remote plaintext."""
        self._local = self._shared = MovingWindowRateLimiter(MemoryStorage())
        self._redis: Any = None
        self._resume = 0.0  # the time to try Redis again
        if redis_url:
            from tolhouse.store.base import require_private
            from tolhouse.store.redis_connection import split_credentials

            if not redis_url.startswith(("redis://", "rediss://")):
                raise InvalidArgumentError(
                    "--rate-limit-store must be redis://HOST:PORT, or rediss://"
                )
            require_private(redis_url, insecure=insecure)
            url, credentials = split_credentials(redis_url)
            options: dict[str, Any] = {"implementation": "redispy", "key_prefix": "tolhouse:rate"}
            options |= {"credential_provider": credentials, "wrap_exceptions": True}
            names = ("socket_timeout", "socket_connect_timeout")
            options |= dict.fromkeys(names, _TIMEOUT_SECONDS)
            storage: Any = storage_from_string(f"async+{url}", **options)
            self._shared, self._redis = MovingWindowRateLimiter(storage), storage.bridge.storage

    async def hit(self, name: str, requests_per_minute: float) -> float:
        """Count a request. Returns 0, or the seconds to wait if the limit is reached."""
        item = window(requests_per_minute)
        limiter = self._shared if time.monotonic() >= self._resume else self._local
        try:
            if await limiter.hit(item, name):
                return 0.0
            stats = await limiter.get_window_stats(item, name)
            return max(0.001, stats.reset_time - time.time())
        except StorageError as error:
            self._resume = time.monotonic() + _PAUSE_SECONDS
            reason = str(error.storage_error)
            event("each gateway counts its own requests for now", logging.WARNING, reason=reason)
            return await self.hit(name, requests_per_minute)

    async def close(self) -> None:
        if self._redis:
            await self._redis.aclose()
