"""The local door's client. Standard library only, and little of it: a hook must start in the time of bare Python.

It knows nothing of what a verb means, and of the node only the path of its socket.
"""

from __future__ import annotations

import json
import os
import socket
import time

from broker_free.errors import NodeUnreachable, Refused, TimedOut

TYPE_CHECKING = False  # as typing's own, without the cost of importing it
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Any

_READ_BYTES = 65_536


class DoorClient:
    """One connection to a node, made at the first call and again after a loss. Not for several threads at once."""

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float = 30.0) -> None:
        self._path = os.fspath(path)
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._unread = bytearray()
        self._scanned = 0  # bytes of `_unread` known to hold no newline: a long line is searched once
        self._asked = 0
        self._events: list[dict[str, Any]] = []

    def call(
        self,
        verb: str,
        args: Mapping[str, Any] | None = None,
        *,
        hints: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Ask and wait for the answer.

        Refused: the node said no, with its code. NodeUnreachable: nobody answers, or the node went away meanwhile.
        TimedOut: no answer yet; it may still happen, and the connection stays usable.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        self._asked += 1
        request: dict[str, Any] = {"id": self._asked, "verb": verb, "args": dict(args or {})}
        if hints:
            request["hints"] = dict(hints)
        self._write(json.dumps(request, separators=(",", ":")).encode("ascii") + b"\n", deadline)
        while True:
            answer = self._read(deadline)
            if "event" in answer:
                self._events.append(answer)
            elif (
                answer.get("id") is None or answer["id"] == self._asked
            ):  # null: the connection as such was refused
                break
            # else: an answer to an earlier call that had timed out
        if "error" in answer:
            error = answer["error"]
            raise Refused(error["message"], code=error["code"], hint=error.get("hint"))
        result: dict[str, Any] = answer["result"]
        return result

    def events(self, *, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield what the node pushes on this connection; end when nothing comes for `timeout_s` (None: wait)."""
        while True:
            while self._events:
                yield self._events.pop(0)
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            try:
                line = self._read(deadline)
            except TimedOut:
                return
            if "event" in line:
                self._events.append(line)

    def close(self) -> None:
        """Hang up. The node cancels what it still does for this connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._unread.clear()
        self._scanned = 0

    def __enter__(self) -> DoorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: bytes, deadline: float) -> None:
        door = self._connected(deadline)
        try:
            door.settimeout(_left(deadline))
            door.sendall(line)
        except TimeoutError:
            self.close()  # half a line may be out: the connection cannot be used any more
            raise TimedOut(f"the node at {self._path} does not read its door") from None
        except OSError:
            # A node that refuses a connection says why and hangs up: its last line may still be there to read.
            pass

    def _read(self, deadline: float | None) -> dict[str, Any]:
        """Return the next line from the node as an object."""
        if self._socket is None:
            raise NodeUnreachable("not connected to a node")
        door = self._socket
        while (end := self._unread.find(b"\n", self._scanned)) < 0:
            self._scanned = len(self._unread)
            try:
                door.settimeout(None if deadline is None else _left(deadline))
                arrived = door.recv(_READ_BYTES)
            except TimeoutError:
                raise TimedOut("the node has not answered in time; what was asked may still happen") from None
            except OSError:
                arrived = b""
            if not arrived:
                self.close()
                raise NodeUnreachable(
                    "the node went away before it answered; what was asked may or may not have happened",
                    hint="look whether the node runs, then call again",
                )
            self._unread += arrived
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        self._scanned = 0
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _connected(self, deadline: float | None) -> socket.socket:
        if self._socket is not None:
            if not _hung_up(self._socket):
                return self._socket
            self.close()  # the node was restarted since the last call; nothing of this one has left yet
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            door.settimeout(None if deadline is None else _left(deadline))
            door.connect(self._path)
        except OSError as error:
            door.close()
            if isinstance(error, TimeoutError | BlockingIOError):
                raise TimedOut(f"the node at {self._path} does not accept connections") from None
            raise NodeUnreachable(
                f"no node answers at {self._path} ({error.strerror or error})",
                hint="start the node",
            ) from None
        self._socket = door
        return door


def _hung_up(door: socket.socket) -> bool:
    door.setblocking(False)
    try:
        return not door.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _left(deadline: float) -> float:
    """Seconds until then, never 0: that would mean "do not wait at all" to a socket, and raise another error."""
    return max(deadline - time.monotonic(), 0.001)
