"""Load-test an OpenAI-compatible server: `python -m loadtest.serve --rate 2,4,8`.

Requests arrive at random times with the given average rate (a Poisson process), whether or not
earlier requests have been answered. A load generator that waits for answers before it sends more
would hide the latency of an overloaded server. Each request streams a completion of a random piece
of text, with a random length and number of tokens. The program needs httpx and numpy and works with
any server that has OpenAI's API.

  good        goodput: requests per second that were answered completely, with the first token
              within --first-token-seconds and later tokens within --token-seconds of one
              another on average
  first token time from sending the request to the first piece of text
  between     time from one piece of text to the next, over all requests
  whole       time from sending the request to the end of its answer
  errors      requests without a complete answer, by kind

Several rates, separated by commas, are run one after the other. The server's capacity is the
highest rate that goodput still matches. The output is a table and a final line of JSON.
"""

import argparse
import asyncio
import json
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

PERCENTILES = (50, 95, 99)
_HEAD = (
    f"{'rate':>6} {'sent':>6} {'good/s':>7} {'tokens/s':>8}  "
    f"{'first token, ms':^21}  {'between, ms':^21}  {'whole, ms':^21}  errors\n"
    f"{'':29}" + "".join("  " + " ".join(f"{f'p{p}':>6}" for p in PERCENTILES) for _ in range(3))
)


@dataclass
class Load:
    """The server, model and requests of a load test."""

    url: str
    model: str
    text: str
    prompt_characters: tuple[int, int]
    max_tokens: tuple[int, int]
    deadline_seconds: float
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """One request. Times are in seconds since it was sent; `error` is empty for a complete
    answer."""

    pieces: list[float] = field(default_factory=list)
    whole: float = 0.0
    tokens: int = 0
    error: str = ""

    def good(self, first_token_seconds: float, token_seconds: float) -> bool:
        if self.error or not self.pieces:
            return False
        between = (self.pieces[-1] - self.pieces[0]) / max(1, self.tokens - 1)
        return self.pieces[0] <= first_token_seconds and between <= token_seconds


async def send(
    client: httpx.AsyncClient, load: Load, prompt: str | list[int], max_tokens: int
) -> Answer:
    """Send one streamed completion of a text or of token ids. Failures are recorded in the
    answer's `error`."""
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer, started, ended = Answer(), time.perf_counter(), False
    try:
        async with (
            asyncio.timeout(load.deadline_seconds),
            client.stream("POST", "/v1/completions", json=body) as reply,
        ):
            if reply.status_code != 200:
                answer.error = f"HTTP {reply.status_code}"
            else:
                async for line in reply.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            answer.error = f"{event['error'].get('type', 'error')} in the stream"
                            break
                        if any(choice["text"] for choice in event["choices"]):
                            answer.pieces.append(time.perf_counter() - started)
                        answer.tokens = (event.get("usage") or {}).get(
                            "completion_tokens", answer.tokens
                        )
                if not answer.error and (not ended or answer.tokens != max_tokens):
                    answer.error = "cut short"
    except TimeoutError:
        answer.error = "incomplete at the deadline"
    except httpx.HTTPError as error:
        answer.error = "connection lost" if answer.pieces else type(error).__name__
    except (ValueError, KeyError, TypeError):
        answer.error = "not an answer of OpenAI's API"
    answer.whole = time.perf_counter() - started
    return answer


async def run(load: Load, rate: float, seconds: float, seed: int = 0) -> tuple[list[Answer], float]:
    """Send `rate` requests per second for `seconds` seconds. Return the answers and the seconds
    until the last one."""
    rng = np.random.default_rng(seed)
    sent: list[asyncio.Task[Answer]] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=load.url,
        headers=load.headers,
        limits=limits,
        timeout=load.deadline_seconds,
        trust_env=False,  # a proxy would be part of the measurement
    ) as client:
        started, at = time.perf_counter(), rng.exponential(1 / rate)
        while at < seconds:
            await asyncio.sleep(started + at - time.perf_counter())
            prompt = piece(
                load.text,
                int(rng.integers(load.prompt_characters[0], load.prompt_characters[1] + 1)),
                rng,
            )
            max_tokens = int(rng.integers(load.max_tokens[0], load.max_tokens[1] + 1))
            sent.append(asyncio.create_task(send(client, load, prompt, max_tokens)))
            at += rng.exponential(1 / rate)
        await asyncio.sleep(max(0, started + seconds - time.perf_counter()))
        answers = await asyncio.gather(*sent)
        return answers, time.perf_counter() - started


def piece(text: str, characters: int, rng: np.random.Generator) -> str:
    start = int(rng.integers(max(1, len(text) - characters)))
    return text[start : start + characters]


def summary(
    answers: list[Answer],
    rate: float,
    elapsed: float,
    first_token_seconds: float,
    token_seconds: float,
) -> dict:
    """The figures of one rate. Times are in milliseconds; percentiles are over complete answers
    only."""
    whole = [a for a in answers if not a.error]
    times = {
        "first_token_ms": [a.pieces[0] for a in whole if a.pieces],
        "between_ms": [
            later - earlier
            for a in whole
            for earlier, later in zip(a.pieces, a.pieces[1:], strict=False)
        ],
        "whole_ms": [a.whole for a in whole],
    }
    return {
        "rate": rate,
        "seconds": round(elapsed, 1),
        "sent": len(answers),
        "answered": len(whole),
        "good_per_second": round(
            sum(a.good(first_token_seconds, token_seconds) for a in whole) / elapsed, 3
        ),
        "tokens_per_second": round(sum(a.tokens for a in whole) / elapsed, 1),
        **{
            name: {
                f"p{p}": round(float(np.percentile(t, p)) * 1e3, 1) if t else None
                for p in PERCENTILES
            }
            for name, t in times.items()
        },
        "errors": dict(Counter(a.error for a in answers if a.error).most_common()),
    }


def row(found: dict) -> str:
    cells = "".join(
        "  "
        + " ".join(
            f"{'-' if ms is None else format(ms, '.0f' if ms >= 100 else '.1f'):>6}"
            for ms in found[name].values()
        )
        for name in ("first_token_ms", "between_ms", "whole_ms")
    )
    errors = ", ".join(f"{count} {kind}" for kind, count in found["errors"].items()) or "none"
    rates = f"{found['good_per_second']:>7.2f} {found['tokens_per_second']:>8.1f}"
    return f"{found['rate']:>6g} {found['sent']:>6} {rates}{cells}  {errors}"


def model_of(url: str, headers: dict[str, str]) -> str:
    """The name of the only model that the server has."""
    try:
        reply = httpx.get(f"{url}/v1/models", headers=headers, timeout=10, trust_env=False)
        reply.raise_for_status()
        served = [model["id"] for model in reply.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        sys.exit(f"error: {url}/v1/models does not answer as OpenAI's API: {error}")
    if len(served) != 1:
        names = ", ".join(served) or "none"
        sys.exit(f"error: {url} serves {len(served)} models; choose one with --model: {names}")
    return served[0]


def text_of(path: str) -> str:
    """The text of a file, or of the standard library's Python files."""
    try:
        files = [Path(path)] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "\n".join(file.read_text(errors="replace", encoding="utf-8") for file in files)
    except OSError as error:
        sys.exit(f"error: {error}")
    return text or sys.exit("error: there is no text for prompts; give a file with --text")


def positive(given: str) -> float:
    value = float(given)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def rates(given: str) -> list[float]:
    return [positive(rate) for rate in given.split(",")]


def between(given: str) -> tuple[int, int]:
    low, _, high = given.partition(":")
    if not 1 <= int(low) <= int(high):
        raise ValueError
    return int(low), int(high)


# argparse uses these names in its error messages
positive.__name__, rates.__name__, between.__name__ = (
    "positive number",
    "list of positive numbers",
    "range LOW:HIGH of whole numbers",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server (default %(default)s)")
    add(
        "--rate",
        type=rates,
        default=[2.0],
        metavar="RATE,…",
        help="requests per second; several rates are separated by commas (default 2)",
    )
    add(
        "--seconds",
        type=positive,
        metavar="S",
        default=30.0,
        help="duration of each rate, in seconds (default %(default)g)",
    )
    for name, default, of in (
        ("--prompt-characters", (40, 400), "prompts (default 40:400)"),
        ("--max-tokens", (16, 64), "answers (default 16:64)"),
    ):
        add(name, type=between, default=default, metavar="LOW:HIGH", help=f"length of {of}")
    add(
        "--text",
        default="",
        metavar="FILE",
        help="text from which prompts are cut (default: Python's standard library)",
    )
    add("--model", default="", help="name of the model (default: the server's only model)")
    add(
        "--key-file",
        default="",
        metavar="FILE",
        help="file with the API key, if the server requires one",
    )
    for name, limit, text in (
        ("--first-token-seconds", 1.0, "time limit for a good answer's first token"),
        ("--token-seconds", 0.1, "limit for a good answer's average time between tokens"),
        ("--deadline-seconds", 60.0, "timeout of a request"),
    ):
        shown = f"{text} (default %(default)g)"
        add(name, type=positive, metavar="S", default=limit, help=shown)
    add("--seed", type=int, default=0, help="random seed for times and prompts (default 0)")
    add("--quick", action="store_true", help="5 seconds for each rate")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    url, headers = options.url.rstrip("/"), {}
    if options.key_file:
        headers["Authorization"] = f"Bearer {text_of(options.key_file).strip()}"
    model = options.model or model_of(url, headers)
    load = Load(
        url,
        model,
        text_of(options.text),
        options.prompt_characters,
        options.max_tokens,
        options.deadline_seconds,
        headers,
    )
    seconds = 5.0 if options.quick else options.seconds
    print(
        f"{model} at {url}: prompts of {load.prompt_characters[0]} to "
        f"{load.prompt_characters[1]} characters, answers of {load.max_tokens[0]} to "
        f"{load.max_tokens[1]} tokens, {seconds:g} seconds per rate\n{_HEAD}",
        flush=True,
    )
    found = []
    for rate in options.rate:
        answers, elapsed = asyncio.run(run(load, rate, seconds, options.seed))
        found.append(
            summary(answers, rate, elapsed, options.first_token_seconds, options.token_seconds)
        )
        print(row(found[-1]), flush=True)
    print(json.dumps({"model": model, "rates": found}))
    if not any(one["answered"] for one in found):
        sys.exit("error: no request was answered completely")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
