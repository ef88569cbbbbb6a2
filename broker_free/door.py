"""The local door's server: one JSON object a line over a Unix stream socket, callers named by the kernel.

Knows nothing of messages, peers or verbs: `handle` answers requests, an *upgrade* takes a whole connection over.

    request   {"id": 1, "verb": "send", "args": {...}, "hints": {...}}
    answer    {"id": 1, "result": {...}}  or  {"id": 1, "error": {"code": "...", "message": "...", "hint": "..."}}

Several requests may be in flight on one connection; answers come as they are ready and carry the id. The caller's
pid and uid come from the kernel, not from the request, and `on_accept` runs before the first line is read: a caller
waits for its answer, so for that long its process and its ancestors can be looked at.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_free.errors import BrokerFreeError, InvalidInput, NodeInUse, Refused, TooLarge, UnsuitableHome

log = logging.getLogger(__name__)

PATH_BYTES_MAX = 103  # sun_path is 104 bytes on macOS and 108 on Linux, with a closing NUL
_BACKLOG = 128  # callers that arrive within one turn of the loop; more wait in connect()


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """Bounds of the local door. Its callers are programs of the same user: these stop accidents, not attacks."""

    line_bytes_max: int = (
        4 * 1024 * 1024
    )  # a body of 1 MiB with every character escaped still fits in practice
    requests_max: int = 64  # in flight on one connection; further lines wait unread
    connections_max: int = 1_024
    stall_s: float = 10.0  # a caller that reads nothing for so long is cut off, so no answer queues for ever


@dataclass(frozen=True, slots=True)
class Peer:
    """Who holds the other end, as the kernel says. pid 0: a process of another pid namespace."""

    pid: int
    uid: int
    gid: int


class DoorConnection:
    """One caller. `state` belongs to the handlers and lives as long as the connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: Peer, limits: DoorLimits
    ) -> None:
        self.caller = caller
        self.state: dict[str, Any] = {}
        self.closed = asyncio.Event()  # the other end has gone, or we have cut it off
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._one_line_at_a_time = asyncio.Lock()
        self._upgrade: _Request | None = None
        # drain() then means "the kernel has it", which is what `send` promises.
        writer.transport.set_write_buffer_limits(high=0)

    async def receive(self) -> bytes | None:
        """Return the next line without its newline, or None once the caller has gone."""
        try:
            return (await self._reader.readuntil(b"\n"))[:-1]
        except (asyncio.IncompleteReadError, ConnectionError):  # half a line at the end is not a request
            self.closed.set()
            return None
        except asyncio.LimitOverrunError:
            raise TooLarge(f"a line is longer than {self._limits.line_bytes_max} bytes") from None

    async def send(self, line: bytes) -> None:
        """Write one line; return once the kernel has all of it. ConnectionError: the caller has gone."""
        async with self._one_line_at_a_time:
            if self.closed.is_set():
                raise ConnectionResetError("the caller has gone")
            self.post(line)
            try:
                async with asyncio.timeout(self._limits.stall_s):
                    await self._writer.drain()
            except TimeoutError:
                log.warning("cut off a caller that does not read", extra={"pid": self.caller.pid})
                self.abort()
            except ConnectionError:
                self.closed.set()
                raise
            if self._writer.is_closing():
                self.closed.set()
                raise ConnectionResetError("the caller has gone")

    def post(self, line: bytes) -> None:
        """Write one line without waiting: for a last word where nothing may be awaited any more."""
        self._writer.write(line + b"\n")

    async def answer(self, result: dict[str, Any]) -> None:
        """Accept the request that takes this connection over. What follows, both ways, is the upgrade's own."""
        assert self._upgrade is not None, "only an upgrade answers by itself"
        request, self._upgrade = self._upgrade, None
        await self.send(encode({"id": request.id, "result": result}))

    def abort(self) -> None:
        """Cut the connection off, unsent lines and all."""
        self.closed.set()
        self._writer.transport.abort()

    def _close(self) -> None:
        self.closed.set()
        if (
            self._writer.transport.get_write_buffer_size()
        ):  # it does not read: closing would wait for it for ever
            self._writer.transport.abort()
        self._writer.close()


Handle = Callable[[DoorConnection, str, dict[str, Any], dict[str, Any]], Awaitable[dict[str, Any]]]
Upgrade = Callable[[DoorConnection, dict[str, Any], dict[str, Any]], Awaitable[None]]


class Door:
    """The listening end. `open` refuses a path that a live node holds and replaces one that a dead node left."""

    def __init__(
        self,
        path: Path,
        *,
        handle: Handle,
        upgrades: Mapping[str, Upgrade] | None = None,
        on_accept: Callable[[DoorConnection], None] | None = None,
        log_path: Path | None = None,
        limits: DoorLimits | None = None,
    ) -> None:
        """`handle(connection, verb, args, hints)` answers; a verb in `upgrades` takes its connection over.

        Both raise BrokerFreeError for what they foresee; anything else is logged and answered as "internal" with
        `log_path` in the text. A handler whose caller goes away is cancelled.
        """
        self.path = path
        self._handle = handle
        self._upgrades = dict(upgrades or {})
        self._on_accept = on_accept
        self._log_path = log_path
        self._limits = limits or DoorLimits()
        self._server: asyncio.Server | None = None
        self._inode: int | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. NodeInUse when a live node answers there, UnsuitableHome when the place will not do."""
        if len(os.fsencode(self.path)) > PATH_BYTES_MAX:
            raise UnsuitableHome(
                f"the door's path is longer than {PATH_BYTES_MAX} bytes: {self.path}",
                hint="choose a shorter home folder",
            )
        _require_private(self.path.parent)
        _clear(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(self.path))
            os.chmod(self.path, 0o600)  # before listen(): nobody can have connected yet
            self._inode = self.path.stat().st_ino
            self._server = await asyncio.start_unix_server(
                self._accept, sock=listener, limit=self._limits.line_bytes_max, backlog=_BACKLOG
            )
        except BaseException:
            listener.close()
            raise

    async def close(self) -> None:
        """Stop listening, cancel what is running, wait for it to end, remove the socket file."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:  # never another node's
                self.path.unlink()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = peer_of(writer.get_extra_info("socket"))
        connection = DoorConnection(reader, writer, caller, self._limits)
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._connections.add(task)  # owned here: close() cancels and awaits it
        task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: DoorConnection) -> None:
        """One connection from accept to end. Nothing it raises may reach another connection."""
        answering: set[asyncio.Task[None]] = set()
        try:
            self._admit(connection)
            await self._converse(connection, answering)
        except ConnectionError:
            pass  # the caller left while we were writing
        except BrokerFreeError as error:
            with suppress(ConnectionError):
                await connection.send(encode({"id": None, "error": _described(error)}))
        except Exception as error:  # noqa: BLE001 - the edge of a connection: the door must survive it
            with suppress(ConnectionError):
                await connection.send(encode({"id": None, "error": self._failed(error, verb=None)}))
        finally:
            for task in answering:
                task.cancel()
            await asyncio.gather(*answering, return_exceptions=True)
            connection._close()

    def _admit(self, connection: DoorConnection) -> None:
        caller = connection.caller
        if caller.uid != os.geteuid():
            log.warning("refused another user at the door", extra={"pid": caller.pid, "uid": caller.uid})
            raise Refused("this node serves the user who started it only", code="other-user")
        if len(self._connections) > self._limits.connections_max:
            raise Refused(f"{self._limits.connections_max} connections are open already", code="busy")
        if self._on_accept is not None:
            self._on_accept(connection)

    async def _converse(self, connection: DoorConnection, answering: set[asyncio.Task[None]]) -> None:
        """Read requests until the caller goes or one of them takes the connection over."""
        loop = asyncio.get_running_loop()
        while (line := await connection.receive()) is not None:
            try:
                request = _parsed(line)
            except _Malformed as error:
                await connection.send(encode({"id": error.request_id, "error": _described(error)}))
                continue
            if request.verb in self._upgrades:
                if answering:
                    busy = InvalidInput(
                        f"{request.verb!r} takes the connection over: nothing else may be in flight"
                    )
                    await connection.send(encode({"id": request.id, "error": _described(busy)}))
                elif await self._give_over(connection, request):
                    return
                continue
            task = loop.create_task(self._answer(connection, request))
            answering.add(task)
            task.add_done_callback(answering.discard)
            if len(answering) >= self._limits.requests_max:
                await asyncio.wait(answering, return_when=asyncio.FIRST_COMPLETED)

    async def _answer(self, connection: DoorConnection, request: _Request) -> None:
        try:
            result = await self._handle(connection, request.verb, request.args, request.hints)
            line = encode({"id": request.id, "result": result})
        except BrokerFreeError as error:
            line = encode({"id": request.id, "error": _described(error)})
        except Exception as error:  # noqa: BLE001 - the edge of a handler: the connection must survive it
            line = encode({"id": request.id, "error": self._failed(error, verb=request.verb)})
        with suppress(ConnectionError):  # nobody is left to tell
            await connection.send(line)

    async def _give_over(self, connection: DoorConnection, request: _Request) -> bool:
        """Run an upgrade. False: it refused before it answered, and the connection goes on as before."""
        connection._upgrade = request
        try:
            await self._upgrades[request.verb](connection, request.args, request.hints)
            return True
        except ConnectionError:
            raise
        except BrokerFreeError as error:
            refusal = _described(error)
        except Exception as error:  # noqa: BLE001 - the edge of an upgrade: the door must survive it
            refusal = self._failed(error, verb=request.verb)
        if connection._upgrade is not request:
            log.warning("an upgraded connection ended", extra={"verb": request.verb, "code": refusal["code"]})
            return True  # too late to refuse: the lines belong to the upgrade's own protocol
        connection._upgrade = None
        await connection.send(encode({"id": request.id, "error": refusal}))
        return False

    def _failed(self, error: Exception, *, verb: str | None) -> dict[str, Any]:
        """Log what nobody foresaw, once, and say where it was logged."""
        log.error("a request at the door failed", exc_info=error, extra={"verb": verb})
        where = f"; see its log: {self._log_path}" if self._log_path is not None else ""
        return {"code": "internal", "message": f"the node failed{where}", "hint": None}


def encode(line: Mapping[str, Any]) -> bytes:
    """One object as a line without its newline. ASCII only: no character can break a line or fail to encode."""
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode("ascii")


def unknown_verb(verb: str) -> Refused:
    """Make the error that a handler raises for a verb it does not serve."""
    return Refused(
        f"this node does not know {verb!r}",
        code="unknown-verb",
        hint="the node may be older than its caller: restart it",
    )


def peer_of(connected: socket.socket) -> Peer:
    """Ask the kernel who holds the other end of a connected Unix socket."""
    if sys.platform == "darwin":
        # <sys/un.h>: LOCAL_PEERCRED gives struct xucred {u_int version; uid_t uid; short n; gid_t groups[16]}.
        sol_local, local_peercred, local_peerpid = 0, 1, 2
        pid = connected.getsockopt(sol_local, local_peerpid)
        _, uid, _, gid = struct.unpack_from("IIhxxI", connected.getsockopt(sol_local, local_peercred, 76))
    else:
        # struct ucred {pid_t pid; uid_t uid; gid_t gid}
        pid, uid, gid = struct.unpack("iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(pid, uid, gid)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    id: Any  # whatever JSON the caller chose; it only goes back
    verb: str
    args: dict[str, Any]
    hints: dict[str, Any]


class _Malformed(InvalidInput):
    def __init__(self, message: str, *, request_id: Any) -> None:  # whatever JSON the caller chose
        super().__init__(message)
        self.request_id = request_id


def _parsed(line: bytes) -> _Request:
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        raise _Malformed("a request is one JSON object on one line", request_id=None) from None
    if not isinstance(asked, dict):
        raise _Malformed("a request is one JSON object on one line", request_id=None)
    verb = asked.get("verb")
    args, hints = ({} if asked.get(key) is None else asked[key] for key in ("args", "hints"))
    if not (isinstance(verb, str) and isinstance(args, dict) and isinstance(hints, dict)):
        raise _Malformed(
            'a request needs "verb", a text; "args" and "hints" are objects', request_id=asked.get("id")
        )
    return _Request(id=asked.get("id"), verb=verb, args=args, hints=hints)


def _described(error: BrokerFreeError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "hint": error.hint}


def _require_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise UnsuitableHome(f"{folder} belongs to another user", hint="choose a home folder of your own")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise UnsuitableHome(f"{folder} is open to other users", hint=f"chmod 700 {folder}")


def _clear(path: Path) -> None:
    """Remove a socket file that nobody listens on any more."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UnsuitableHome(f"{path} is in the way: it is not a socket", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # a listener whose queue is full is alive
            pid = None
        else:
            pid = peer_of(probe).pid
    raise NodeInUse(f"a node answers at {path} already" + (f", pid {pid}" if pid else ""), pid=pid)
