"""An HTTP proxy between an S3 client and its server that does to requests what networks and loaded stores do.

It forwards every request as it came, Host header included, so that signatures hold: give it as `endpoint_url`, path style.
Knows the shape of S3's URLs; no credentials, and nothing of the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
EXPIRED = (
    b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
)
KINDS = ("slow_down", "reset_before", "reset_after", "truncate", "short", "stall")


@dataclass
class Faults:
    """What to do, to which share of the requests.

    slow_down      503 SlowDown, not forwarded
    reset_before   the connection is reset, not forwarded
    reset_after    forwarded, done by the server, and the answer lost: of a PUT too
    truncate       half of the body, less than its Content-Length says
    short          half of an object's body, with a Content-Length to match: no client can tell from the answer alone
    stall          `stall_s` seconds of silence before the answer
    expired        400 ExpiredToken, not forwarded; not one of KINDS, because no retry helps
    """

    share: float = 0.0
    kinds: tuple[str, ...] = KINDS
    operations: frozenset[str] = frozenset()  # empty: all
    at_most: int | None = None  # faults in all; with share=1.0 exactly so many
    list_share: float | None = None  # of listings: answered SlowDown, whatever `kinds` says
    stall_s: float = 0.3


@dataclass
class Answer:
    """A response, read whole."""

    head: list[bytes]  # the status line, then the header lines
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head[0].split()[1])

    def with_length(self, length: int) -> bytes:
        dropped = (b"content-length:", b"connection:", b"transfer-encoding:")
        kept = [line for line in self.head if not line.lower().startswith(dropped)]
        return b"\r\n".join([*kept, b"Content-Length: %d" % length, b"", b""])


@dataclass
class Request:
    """A request, read whole."""

    line: bytes
    headers: list[bytes]
    body: bytes = b""
    query: dict[str, list[str]] = field(default_factory=dict)

    @property
    def operation(self) -> str:
        """S3's name of it, as far as a method and a query tell."""
        method = self.line.split()[0].decode()
        if "uploadId" in self.query or "uploads" in self.query:
            return {"POST": "MultipartUpload", "PUT": "UploadPart"}.get(method, method)
        if method == "GET":
            return "ListObjects" if self.query.keys() & {"list-type", "prefix", "delimiter"} else "GetObject"
        return {"PUT": "PutObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}.get(method, method)

    @property
    def conditional(self) -> bool:
        return any(line.lower().startswith((b"if-match:", b"if-none-match:")) for line in self.headers)


class FaultProxy:
    """Listens on `address` while used as a context, on a thread of its own. `done` counts (kind, operation)."""

    def __init__(self, upstream: str, address: str = "127.0.0.1") -> None:
        parts = urlsplit(upstream)
        self._address = address
        self._upstream = (parts.hostname, parts.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._condition = asyncio.Lock()
        self.inject(Faults())
        self.done: Counter[tuple[str, str]] = Counter()
        self.url = ""

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        start = asyncio.start_server(self._serve, self._address, 0, limit=1 << 20)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://{self._address}:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def inject(self, faults: Faults, seed: int = 0) -> None:
        """From the next request on."""
        self._random = random.Random(seed)
        self._faults = faults

    def count(self, kind: str = "", operation: str = "") -> int:
        """How often it did `kind` to `operation`; an empty name means any, and "pass" is no fault."""
        return sum(n for (k, o), n in self.done.items() if kind in ("", k) and operation in ("", o))

    @property
    def injected(self) -> int:
        return self.count() - self.count("pass")

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            while (request := await _read_request(reader, writer)) and await self._answer(request, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client gave up, or the proxy ends
        finally:
            self._tasks.discard(task)
            writer.close()

    def _draw(self, operation: str) -> str:
        faults = self._faults
        if operation == "ListObjects" and faults.list_share is not None:
            return "slow_down" if self._random.random() < faults.list_share else "pass"
        hit = self._random.random() < faults.share and (not faults.operations or operation in faults.operations)
        if not hit or faults.at_most == 0:
            return "pass"
        if faults.at_most is not None:
            faults.at_most -= 1
        return self._random.choice(faults.kinds)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """False: the connection is at its end."""
        operation = request.operation
        kind = self._draw(operation)
        if kind in ("slow_down", "reset_before", "expired"):
            self.done[kind, operation] += 1
            if kind == "reset_before":
                return _reset(writer)
            status, body = (b"503 Slow Down", SLOW_DOWN) if kind == "slow_down" else (b"400 Bad Request", EXPIRED)
            body = b"" if operation == "HeadObject" else body
            writer.write(
                b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
                + body
            )
            await writer.drain()
            return True
        answer = await self._forward(request)
        if kind in ("truncate", "short") and len(answer.body) < 2:
            kind = "reset_after"
        elif kind == "short" and not (operation == "GetObject" and answer.status in (200, 206)):
            kind = "truncate"  # a listing or an error cut in the middle is no XML: the same as truncate to its reader
        self.done[kind, operation] += 1
        if kind == "reset_after":
            return _reset(writer)
        if kind == "stall":
            await asyncio.sleep(self._faults.stall_s)
        half = len(answer.body) // 2
        if kind == "truncate":
            writer.write(answer.with_length(len(answer.body)) + answer.body[:half])
            await writer.drain()
            return False
        if kind == "short":
            writer.write(answer.with_length(half) + answer.body[:half])
        elif operation == "HeadObject":
            writer.write(b"\r\n".join([*answer.head, b"", b""]))  # its Content-Length is that of the object
        else:
            writer.write(answer.with_length(len(answer.body)) + answer.body)
        await writer.drain()
        return operation != "HeadObject"

    async def _forward(self, request: Request) -> Answer:
        """One connection a request; of writes under a condition one at a time: moto looks and writes in two steps, stores do in one."""
        async with self._condition if request.conditional else contextlib.nullcontext():
            return await self._exchange(request)

    async def _exchange(self, request: Request) -> Answer:
        """Only Connection and Expect are left out, which are signed by no client."""
        reader, writer = await asyncio.open_connection(*self._upstream, limit=1 << 20)
        try:
            kept = [line for line in request.headers if not line.lower().startswith((b"connection:", b"expect:"))]
            writer.write(b"\r\n".join([request.line, *kept, b"Connection: close", b"", b""]) + request.body)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
            if request.operation == "HeadObject":
                return Answer(head, b"")
            if any(line.lower().startswith(b"transfer-encoding: chunked") for line in head):
                return Answer(head, await _read_chunks(reader))
            return Answer(head, await reader.read())
        finally:
            writer.close()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    head = await reader.readuntil(b"\r\n\r\n")
    line, *headers = head[:-4].split(b"\r\n")
    values = {name.strip().lower(): value.strip() for name, _, value in (h.partition(b":") for h in headers)}
    if values.get(b"expect", b"").lower() == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
    if b"chunked" in values.get(b"transfer-encoding", b""):
        raise OSError("a chunked request: no S3 client here sends one")
    body = await reader.readexactly(int(values.get(b"content-length", 0)))
    query = parse_qs(urlsplit(line.split()[1].decode()).query, keep_blank_values=True)
    return Request(line, headers, body, query)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    return body


def _reset(writer: asyncio.StreamWriter) -> bool:
    """An RST instead of a FIN: closing a socket that lingers for no time sends one."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False
