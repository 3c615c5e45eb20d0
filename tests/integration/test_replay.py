"""The replay of a load trace: when requests are sent, and what a stopped process has not read."""

import asyncio
import json
import os
import socket

from loadtest.serve import Answer
from loadtest.trace import replay, unread

REQUESTS = 5


async def serve_together() -> list[Answer]:
    """Replay REQUESTS requests to a server that answers none before it has received all."""
    received: list[dict] = []
    complete = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.partition("content-length:")[2].splitlines()[0])
        received.append(json.loads(await reader.readexactly(size)))
        if len(received) == REQUESTS:
            complete.set()
        await complete.wait()
        text = {
            "choices": [{"text": "a"}],
            "usage": {"completion_tokens": received[-1]["max_tokens"]},
        }
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        writer.write(f"data: {json.dumps(text)}\n\ndata: [DONE]\n\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        arrivals = [(n / 100, [n], 3) for n in range(REQUESTS)]
        answers = await replay(f"http://127.0.0.1:{port}", arrivals)
    assert [[n] for n in range(REQUESTS)] == sorted(request["prompt"] for request in received)
    return answers


def test_requests_do_not_wait_for_answers() -> None:
    """All requests of a trace are sent although the server answers none before the last one."""
    answers = asyncio.run(serve_together())
    assert [("", 3)] * REQUESTS == [(answer.error, answer.tokens) for answer in answers]


def test_unread_bytes_of_a_process() -> None:
    """Bytes that have arrived at a connection count until the process reads them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            with accepted:
                before = unread(os.getpid())
                client.sendall(bytes(1000))
                accepted.recv(1, socket.MSG_PEEK)
                assert before + 1000 == unread(os.getpid())
                accepted.recv(1000, socket.MSG_WAITALL)
                assert before == unread(os.getpid())
