"""A bad line on loopback: a TCP proxy that delays, throttles, cuts, goes silent, or says everything twice."""

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_CHUNK = 1024
_BUFFER = 4096  # of the kernel's, so that what is slow here is slow for the caller


@dataclass
class Line:
    """What the line does, and what it has seen; may be changed while it carries.

    Attributes:
        delay_s: Before every piece of up to 1 kB, both ways.
        bytes_per_s: Up, on each connection; None for no limit.
        trip_bytes: How much a caller must say without being answered for ``trip`` to happen; above what a question
            takes, so that it happens within an upload.
        trip: What then happens to that connection: ``cut`` (reset, both ways), ``silent`` (stays open and carries
            nothing more, half-open), ``twice`` (the same bytes once more), or None.
        times: How often it happens.
        held: Carry nothing at all until this is false.
        away: Take no connection and drop those there are.
        tripped: How often it has happened, each with the time.
        up, down: Bytes carried.
        longest: The most a caller said without being answered.
        recorded: What the latest callers said, the first 64 kB of each.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    trip_bytes: int = 4096
    trip: str | None = None
    times: int = 0
    held: bool = False
    away: bool = False
    tripped: list[float] = field(default_factory=list)
    connections: int = 0
    up: int = 0
    down: int = 0
    longest: int = 0
    recorded: deque[bytearray] = field(default_factory=lambda: deque(maxlen=8))

    def heal(self) -> None:
        """Carry everything again."""
        self.delay_s, self.bytes_per_s, self.trip, self.times = 0.0, None, None, 0
        self.held = self.away = False


class _Connection:
    """One caller and the other end."""

    def __init__(self, line: Line) -> None:
        self.line, self.said, self.silent = line, 0, False
        line.recorded.append(bytearray())
        self.record = line.recorded[-1]
        self.writers: list[asyncio.StreamWriter] = []

    def drop(self) -> None:
        for writer in self.writers:
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        line = self.line
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if line.delay_s:
                    await asyncio.sleep(line.delay_s)
                if up and line.bytes_per_s:
                    await asyncio.sleep(len(data) / line.bytes_per_s)
                while (line.held or self.silent) and not line.away:
                    await asyncio.sleep(0.05)
                if line.away:
                    break
                data = self._count(data, up=up)
                writer.write(data)
                await writer.drain()
        self.drop()

    def _count(self, data: bytes, *, up: bool) -> bytes:
        line = self.line
        if not up:
            self.said, line.down = 0, line.down + len(data)
            return data
        self.said, line.up = self.said + len(data), line.up + len(data)
        self.record += data[: 65536 - len(self.record)]
        line.longest = max(line.longest, self.said)
        if line.trip is None or not line.times or self.said < line.trip_bytes:
            return data
        line.times -= 1
        line.tripped.append(time.monotonic())
        if line.trip == "twice":
            return data + data
        if line.trip == "silent":
            self.silent = True
            return b""
        self.drop()
        return b""


@contextmanager
def bad_line(target: int) -> Iterator[tuple[int, Line]]:
    """A proxy to a loopback port for the length of a block; its own port, and the line."""
    line, ready = Line(), threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    port: int = listening.getsockname()[1]
    ends: list[Callable[[], object]] = []
    met: list[_Connection] = []

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line.connections += 1
        connection = _Connection(line)
        connection.writers.append(writer)
        met.append(connection)
        if line.away:
            connection.drop()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            connection.drop()
            return
        connection.writers.append(back)
        await asyncio.gather(connection.carry(reader, back, up=True), connection.carry(there, writer, up=False))

    async def serve() -> None:
        end, loop = asyncio.Event(), asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(end.set))
        async with await asyncio.start_server(meet, sock=listening):
            ready.set()
            await end.wait()
        line.heal()
        line.away = True
        for connection in met:
            connection.drop()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()} or {asyncio.create_task(asyncio.sleep(0))})
        await asyncio.sleep(0.05)  # their sockets close

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="line", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield port, line
    finally:
        ends[0]()
        thread.join(5.0)
