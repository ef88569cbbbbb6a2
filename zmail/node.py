"""The node's process: holds the home, puts the parts together, keeps a log, stops when it is told to.

    lock ─► log ─► settings ─► broker_free.Node ─► post office ─► local door, last: who may knock is served

Stopping goes the other way round. Nothing depends on a clean stop: what was acknowledged is on disk, the kernel
lets go of the lock, and the next node replaces the door. This file decides nothing about mail.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import logging.handlers
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from broker_free.errors import AddressInUse, BrokerFreeError, NodeClosed
from zmail import __version__
from zmail.config import Settings, load
from zmail.paths import Home

if TYPE_CHECKING:
    from broker_free.door import DoorConnection
    from zmail.identity import Caller, Identity, Resolution
    from zmail.postoffice import PostOffice

log = logging.getLogger(__name__)

LOG_BYTES_MAX = 4 * 1024 * 1024
DESCRIPTORS = 16_384  # 1,024 peers and as many sessions, with room
LOG_FILES_KEPT = 3  # besides the current one
STOP_S_MAX = 1.8  # a stop that hangs is cut off: it is over within two seconds, and nothing is lost by that


def run(home: Home, env: Mapping[str, str], *, say: Callable[[str], None]) -> int:
    """Be the node of `home` until a signal ends it; return the exit status. NodeInUse when another one is.

    The lock is never let go of here: it is free once this process has really ended.
    """
    os.umask(0o077)
    _allow_descriptors()
    home.prepare()
    home.hold()
    configure_logging(home.log_path)
    try:
        settings = load(home, env)
        status = asyncio.run(_serve(home, settings, say))
    except BrokerFreeError as error:
        log.error("the node did not start", extra={"code": error.code, "why": error.message})
        raise
    except Exception:
        log.exception("the node failed")
        raise
    log.info("stopped", extra={"status": status})
    return status


def _allow_descriptors() -> None:
    """Raise the soft limit: a dialled link takes four descriptors, a session one, and 1,024 is a common default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(home: Home, settings: Settings, say: Callable[[str], None]) -> int:
    """Serve until there is a reason to stop, then close everything in the opposite order of opening."""
    stop = _Stop()
    async with AsyncExitStack() as opened:
        name, endpoints = await _open(home, settings, opened, stop)
        log.info(
            "ready", extra={"version": __version__, "pid": os.getpid(), "node": name, "listen": endpoints}
        )
        say(f"node {name} listens at {endpoints} (pid {os.getpid()}, log {home.log_path}); Ctrl-C stops it")
        return await stop.reason


class _Stop:
    """The one reason for which this process ends, as its exit status."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reason: asyncio.Future[int] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.because, number.name, 130 if number == signal.SIGINT else 0)

    def because(self, why: str, status: int) -> None:
        if not self.reason.done():
            log.info("stopping", extra={"why": why})
            # Counts in a thread of C: neither a blocked loop nor a thread that does not end can hold it up.
            faulthandler.dump_traceback_later(STOP_S_MAX, exit=True)
            self.reason.set_result(status)


async def _open(home: Home, settings: Settings, opened: AsyncExitStack, stop: _Stop) -> tuple[str, str]:
    """Put the parts together and open them, the door last. Returns the node's name and where it listens."""
    # A quarter of a second of imports, which only this process needs, and only once it holds the home.
    from broker_free.door import Door
    from broker_free.node import Node
    from zmail.identity import Identity
    from zmail.mcp_server import McpHost
    from zmail.models import MIGRATIONS, MODELS
    from zmail.postoffice import PostOffice
    from zmail.push import Push

    listen = listen_endpoint(settings.listen, _remembered_port(home))
    node = Node(settings.node_name, home=home.state, listen=listen, models=MODELS, migrations=MIGRATIONS)
    identity, push = Identity(), Push()
    office = PostOffice(node, identity=identity, push=push, settings=settings)
    reception = _Reception(identity, office, stop)
    host = McpHost(office, resolve=reception.somebody, push=push, node_name=settings.node_name)
    door = Door(
        home.door,
        handle=reception.handle,
        upgrades={"mcp": host.serve},
        on_accept=reception.accept,
        log_path=home.log,
    )
    try:
        await opened.enter_async_context(node)
    except AddressInUse as error:
        raise AddressInUse(
            error.message,
            hint="choose another: ZMAIL_LISTEN=tcp://0.0.0.0:PORT, or node.listen in zmail.toml; 0 is any free one",
        ) from error
    node.on_failed(lambda error: stop.because(f"the message queue has failed: {error}", 1))
    _remember_port(home, node.endpoints[0])
    opened.push_async_callback(office.close)
    await office.start()
    opened.push_async_callback(host.close)
    opened.push_async_callback(door.close)
    await door.open()
    # A daemon: a node that is told to stop does not wait for an import.
    threading.Thread(target=host.preload, name="mcp import", daemon=True).start()
    return node.name, ", ".join(node.endpoints)


class _Reception:
    """Between the door and the post office: finds out who is at the other end of each connection."""

    def __init__(self, identity: Identity, office: PostOffice, stop: _Stop) -> None:
        self._identity = identity
        self._office = office
        self._stop = stop

    def accept(self, connection: DoorConnection) -> None:
        """Look at the caller's process while it certainly waits for its answer."""
        caller = connection.caller
        connection.state["resolution"] = self._identity.resolve(caller.pid, {}, uid=caller.uid)

    async def handle(
        self, connection: DoorConnection, verb: str, args: dict[str, Any], hints: dict[str, Any]
    ) -> dict[str, Any]:
        """Answer one request."""
        try:
            # The state of the node is no business of a mailbox: asking for it opens none.
            who = None if verb == "node-status" else await self._caller(connection, hints)
            return await self._office.call(who, verb, args)
        except NodeClosed:
            # While serving, it means that the owner thread has failed. The next command starts a sound node.
            self._stop.because("the message queue has failed", 1)
            raise
        except BrokerFreeError as error:
            log.info("refused", extra={"verb": verb, "code": error.code, "why": error.message})
            raise

    async def somebody(self, connection: DoorConnection, hints: Mapping[str, Any]) -> Caller:
        """Say whom a session acts as: NoIdentity when that is nobody."""
        from zmail.leases import need

        return need(await self._caller(connection, hints))

    async def _caller(self, connection: DoorConnection, hints: Mapping[str, Any]) -> Caller | None:
        return await self._office.enter(self._resolution(connection, hints), hints)

    def _resolution(self, connection: DoorConnection, hints: Mapping[str, Any]) -> Resolution:
        """What was found at accept, completed once by the caller's own hints; kept for the connection."""
        found: Resolution = connection.state["resolution"]
        if "hinted" not in connection.state and ("config_dir" in hints or "claude_pid" in hints):
            hinted = self._identity.resolve(connection.caller.pid, hints, uid=connection.caller.uid)
            if hinted.caller == found.caller:  # else the pid has gone to another process meanwhile
                connection.state["resolution"] = found = hinted
            connection.state["hinted"] = True
        return found


# ── port 0 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def listen_endpoint(listen: str, remembered: str) -> str:
    """Put the port of last time in the place of port 0, if it is still free: peers find the node where it was."""
    port = urlsplit(listen).port
    if port == 0 and remembered.isdigit() and _is_free(urlsplit(listen).hostname or "", int(remembered)):
        return f"{listen.rpartition(':')[0]}:{remembered}"
    return listen


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As libzmq does: the last connections of the node before are no reason to move.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, port))
        except (OSError, OverflowError):
            return False
    return True


def _remember_port(home: Home, endpoint: str) -> None:
    port = home.port
    fresh = port.with_name("port.new")
    fresh.write_text(endpoint.rpartition(":")[2] + "\n", encoding="ascii")
    fresh.replace(port)


def _remembered_port(home: Home) -> str:
    try:
        return home.port.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""  # there is none yet, or none that makes sense: any port will do


# ── log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def configure_logging(path: str) -> None:
    """Send every record of this process to a file that is rotated. Comes before what would configure it otherwise."""
    keep = logging.handlers.RotatingFileHandler(
        path, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES_KEPT, encoding="utf-8", errors="backslashreplace"
    )
    keep.setFormatter(FieldFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[keep], force=True)
    logging.captureWarnings(True)
    logging.getLogger("mcp").setLevel(logging.WARNING)  # the SDK has a line for each request
    faulthandler.enable()  # to stderr, which a node in the background has in the same file


class FieldFormatter(logging.Formatter):
    """One line a record, `time level logger message key=value …`; what came from outside cannot start another."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        fields = "".join(f" {name}={_shown(value)}" for name, value in extra_fields(record).items())
        line = f"{at} {record.levelname} {record.name} {_one_line(record.getMessage())}{fields}"
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        return "\n".join(filter(None, [line, record.exc_text, record.stack_info]))


# What logging itself puts on a record; everything else came in as `extra`.
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:  # Any: whatever the caller logged
    return {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}


def _shown(value: object) -> str:
    """A value that reads as one word, else as a JSON text."""
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)
