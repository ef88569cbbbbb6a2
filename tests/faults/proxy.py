"""A TCP proxy in front of a node that behaves as badly as networks do: late, cut, half-closed, with wrong bytes.

It runs in a thread of its own; what it is told to do takes effect on the connections that are open then.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

_CHUNK: Final = 16_384
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER of zero: close sends RST and drops what is unsent


class Proxy:
    """One listening address that leads to one target."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int], *, seed: int) -> None:
        self.listen = listen
        self.connections = 0  # accepted so far
        self._target = target
        self._random = random.Random(seed)
        self._latency_s = 0.0
        self._to_corrupt = 0
        self._refusing = False
        self._open: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, *self.listen, limit=_CHUNK))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- what it can be told --------------------------------------------------------------------------------

    def delay(self, latency_s: float) -> None:
        """Hold every chunk for up to so long from now on, in each direction, keeping the order."""
        self._latency_s = latency_s

    def reset(self) -> int:
        """Cut every connection with RST. Returns how many."""
        return self._for_each(_Pair.reset)

    def half_close(self) -> int:
        """Send FIN in one direction of every connection; the other stays open. Returns how many."""
        return self._for_each(lambda pair: pair.half_close(self._random.random() < 0.5))

    def corrupt(self, chunks: int) -> None:
        """Change one byte in each of the next chunks."""
        self._to_corrupt = chunks

    def refuse(self, refusing: bool) -> None:
        """Hang up on whoever connects."""
        self._refusing = refusing

    # -- inside ---------------------------------------------------------------------------------------------

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _for_each(self, act: Callable[[_Pair], None]) -> int:
        async def every() -> int:
            pairs = list(self._open)
            for pair in pairs:
                act(pair)
            return len(pairs)

        count: int = self._do(every())
        return count

    async def _close(self) -> None:
        self._server.close()
        for pair in list(self._open):
            pair.reset()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            far = await asyncio.open_connection(*self._target, limit=_CHUNK)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair((reader, writer), far)
        self._open.add(pair)
        try:
            await asyncio.gather(self._pump(reader, far[1]), self._pump(far[0], writer))
        finally:
            self._open.discard(pair)
            pair.reset()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(_CHUNK):
                if self._latency_s:
                    await asyncio.sleep(self._random.random() * self._latency_s)
                if self._to_corrupt:
                    self._to_corrupt -= 1
                    at = self._random.randrange(len(chunk))
                    chunk = chunk[:at] + bytes([chunk[at] ^ 1 << self._random.randrange(8)]) + chunk[at + 1 :]
                writer.write(chunk)
                await writer.drain()
            writer.write_eof()
        except (OSError, RuntimeError):
            writer.transport.abort()  # the other side is gone: so is this one


class _Pair:
    """The two halves of one proxied connection."""

    def __init__(self, *ends: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._ends = ends

    def reset(self) -> None:
        for _, writer in self._ends:
            raw = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def half_close(self, first: bool) -> None:
        writer = self._ends[0 if first else 1][1]
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()
