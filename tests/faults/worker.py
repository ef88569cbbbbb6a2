"""One node in a process of its own, made to be hurt: it streams numbered messages and tells the oracle everything.

Commands come as JSON lines over a socket to the fleet, each answered by one line. Reports go to the oracle: an intent
before each batch (answered once it is synced), then what came of each publish, what arrived and was committed, which
acks came back, and how this node sees its peers. The node is an ordinary `broker_free.Node` behind its public door.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import peewee as pw

from broker_free import Limits, Node, Tx
from broker_free.errors import BrokerFreeError, NodeClosed, OutcomeUnknown
from broker_free.faults import arm_from
from broker_free.message import Envelope
from broker_free.owner import PeerView
from tests.faults.oracle import SUBJECT, body_of, number_of

_CLONE_NEWNET = 0x4000_0000
_LINE_BYTES_MAX = 1 << 20
_true_time_ns = time.time_ns


class Filed(pw.Model):
    """What the effect writes, in the transaction that accepts the message."""

    sender = pw.TextField()
    number = pw.IntegerField()


def run(spec: dict[str, Any], fd: int) -> NoReturn:
    """Be this worker until the fleet hangs up. Called in a fresh fork."""
    code = 1
    try:
        _settle_in(spec)
        asyncio.run(_Worker(spec).main(socket.socket(fileno=fd)))
        code = 0
    except BaseException:
        logging.getLogger("tests.faults").exception("the worker has failed")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _settle_in(spec: dict[str, Any]) -> None:
    """Everything a process must be before its first thread: its namespace, its limits, its place to complain."""
    os.setsid()
    complaints = os.open(spec["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(complaints, 2)
    os.close(complaints)
    faulthandler.register(signal.SIGUSR1)  # the fleet asks a worker that hangs where it is
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s %(__fields__)s")
    logging.getLogger().handlers[0].addFilter(_show_fields)
    if "netns" in spec:
        with open(f"/run/netns/{spec['netns']}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
    if "descriptors" in spec:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spec["descriptors"], spec["descriptors"]))
    os.environ.update(spec.get("env", {}))
    arm_from(os.environ)


def _show_fields(record: logging.LogRecord) -> bool:
    usual = {"name", "msg", "args", "created", "msecs", "relativeCreated", "taskName"}
    record.__fields__ = {
        key: value
        for key, value in vars(record).items()
        if key not in usual and key not in logging.makeLogRecord({}).__dict__
    }
    return True


class _Worker:
    def __init__(self, spec: dict[str, Any]) -> None:
        self._name: str = spec["name"]
        self._spec = spec
        self._random = random.Random(spec["seed"])
        self._next = spec["first"]  # message numbers of this life begin here
        self._oracle_reader: asyncio.StreamReader
        self._oracle: asyncio.StreamWriter
        self._intent_lock = asyncio.Lock()
        self._streams: list[asyncio.Future[None]] = []
        self._is_halting = False
        self._sending: set[asyncio.Task[None]] = set()
        self._sent: list[int] = []  # returned in this turn of the loop
        self._arrived: list[tuple[str, int]] = []
        self._turn_is_planned = False
        self._poison: set[int] = set()
        self._effect_ms = 0
        self._dead: dict[str, tuple[float, str]] = {}  # message id -> when and why
        self._hogged: list[int] = []
        self._names: dict[str, str] = {}
        self.node = Node(
            self._name,
            home=Path(spec["home"]),
            listen=spec["listen"],
            limits=Limits(**spec.get("limits", {})),
            models=[Filed],
            **spec.get("node", {}),
        )
        self.node.effect(SUBJECT, self._file)
        self.node.on_delivered(self._on_delivered)
        self.node.on_dead(self._on_dead)
        self.node.on_peer(self._on_peer)
        self.node.on_failed(lambda error: self._say(t="failed", error=repr(error)))

    async def main(self, channel: socket.socket) -> None:
        self._oracle_reader, self._oracle = await asyncio.open_unix_connection(self._spec["oracle"])
        reader, writer = await asyncio.open_connection(sock=channel, limit=_LINE_BYTES_MAX)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_sigterm, writer)
        try:
            await self.node.start()
        except BrokerFreeError as error:
            writer.write(json.dumps({"error": error.code, "message": error.message}).encode() + b"\n")
            await writer.drain()
            return
        self._say(t="node", id=self.node.node_id, home=str(self.node.home), pid=os.getpid())
        _answer(writer, id=self.node.node_id, endpoint=self.node.endpoints[0])
        while line := await reader.readline():
            command = json.loads(line)
            try:
                result = await getattr(self, f"do_{command.pop('do')}")(**command)
            except (BrokerFreeError, OSError) as error:
                _answer(writer, error=getattr(error, "code", "os-error"), message=str(error))
            else:
                _answer(writer, **(result or {}))
        os._exit(0)  # the fleet has gone: nobody is left to ask for a clean end

    # -- reports --------------------------------------------------------------------------------------------

    def _say(self, **report: object) -> None:
        self._oracle.write(
            json.dumps({"node": self._name, "at": time.monotonic(), **report}).encode() + b"\n"
        )

    def _plan_turn(self) -> None:
        """Report all that came in one turn of the loop in one line."""
        if not self._turn_is_planned:
            self._turn_is_planned = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._turn_is_planned = False
        if self._sent:
            self._say(t="sent", numbers=self._sent)
            self._sent = []
        if self._arrived:
            self._say(t="arrived", messages=self._arrived)
            self._arrived = []

    def _file(self, tx: Tx, envelope: Envelope) -> None:
        found = number_of(envelope.body)
        assert found is not None, "a body that no worker makes"
        sender, number, _ = found
        if number in self._poison:
            raise ValueError(f"poison: {number}")
        if self._effect_ms:
            time.sleep(self._effect_ms / 1_000)  # a slow handler is what is being tested
        Filed.create(sender=sender, number=number)
        tx.after_commit(lambda: self._on_arrived(sender, number))

    def _on_arrived(self, sender: str, number: int) -> None:
        self._arrived.append((sender, number))
        self._plan_turn()

    def _on_delivered(self, delivered: list[tuple[str, str]]) -> None:
        by_peer: dict[str, list[str]] = {}
        for message_id, peer in delivered:
            by_peer.setdefault(peer, []).append(message_id)
        for peer, ids in by_peer.items():
            self._say(t="acked", peer=peer, ids=ids)

    def _on_dead(self, dead: list[tuple[str, str, str]]) -> None:
        self._say(t="dead", dead=dead)
        self._dead.update((message_id, (time.monotonic(), reason)) for message_id, _, reason in dead)

    def _on_peer(self, view: PeerView) -> None:
        if self._names.get(view.node_id) != view.state:
            self._names[view.node_id] = view.state
            self._say(t="view", peer=view.name, state=view.state)

    # -- commands -------------------------------------------------------------------------------------------

    async def do_invite(self) -> dict[str, Any]:
        return {"code": (await self.node.invite()).encode()}

    async def do_join(self, code: str) -> dict[str, Any]:
        return {"peer": (await self.node.join(code)).name}

    async def do_stream(
        self,
        *,
        to: Sequence[str],
        count: int = 0,
        batch: int = 16,
        size: int = 100,
        gap_ms: float = 0.0,
        ttl_ms: int | None = None,
    ) -> None:
        """Publish to these node ids in random batches up to `batch`, without end unless `count` says so."""
        self._streams.append(
            asyncio.ensure_future(
                self._stream(to=to, count=count, batch=batch, size=size, gap_ms=gap_ms, ttl_ms=ttl_ms)
            )
        )

    async def do_halt(self) -> dict[str, Any]:
        """Stop streaming; answer when every publish has."""
        self._is_halting = True  # not by cancelling: an intent that is being written must be answered
        await asyncio.gather(*self._streams)
        self._streams.clear()
        self._is_halting = False
        await asyncio.gather(*self._sending)
        await asyncio.sleep(0)  # the last turn's report
        await self._oracle.drain()
        return {"next": self._next}

    async def do_wait(self) -> None:
        """Answer when the counted streams are through."""
        await asyncio.gather(*self._streams)
        await asyncio.gather(*self._sending)

    async def do_queued(self) -> dict[str, Any]:
        """Count what waits in the outbox, as it is on disk."""
        sql = "SELECT count(*) FROM outbox WHERE state = 0"
        return {"queued": await self.node.read(lambda db: db.execute_sql(sql).fetchone()[0])}

    async def do_peers(self) -> dict[str, Any]:
        return {
            "peers": {
                view.name: {"state": view.state, "link": view.link, "id": view.node_id}
                for view in self.node.peers()
            }
        }

    async def do_resources(self) -> dict[str, Any]:
        """What this process uses: the bounds of I7."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        wal = self.node.home / "store.db-wal"
        return {
            "rss_bytes": pages * resource.getpagesize(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "wal_bytes": wal.stat().st_size if wal.exists() else 0,
            "cpu_s": sum(os.times()[:2]),
        }

    async def do_refused(self) -> dict[str, Any]:
        return {"refused": await self.node.refused()}

    async def do_poison(self, numbers: Sequence[int]) -> None:
        self._poison = set(numbers)
        self._say(t="poisoned", numbers=list(numbers))

    async def do_slow(self, effect_ms: int) -> None:
        self._effect_ms = effect_ms

    async def do_in_flight(self) -> dict[str, Any]:
        """Count what is on the wire and not acked, by peer: the promise of credit has no public face."""
        owner = self.node._running()
        links = owner._tick.links
        return {"in_flight": await owner.ask(lambda: {peer: link.in_flight for peer, link in links.items()})}

    async def do_inbox(self) -> dict[str, Any]:
        """What the inbox holds of each number: its state and how often its effect was tried."""
        sql = "SELECT body, state, attempts FROM inbox ORDER BY row"
        rows = await self.node.read(lambda db: db.execute_sql(sql).fetchall())
        return {"inbox": [[number_of(body)[1], state, attempts] for body, state, attempts in rows]}

    async def do_events(self, kind: str) -> dict[str, Any]:
        """What the node has written down about itself."""
        return {"events": [event.detail for event in await self.node.events(kind=kind)]}

    async def do_filed(self) -> dict[str, Any]:
        """The numbers that the effect has written, in its order."""
        return {
            "filed": await self.node.read(lambda _: [row.number for row in Filed.select().order_by(Filed.id)])
        }

    async def do_set_clock(self, ahead_ms: int) -> None:
        """Set UTC, as this process sees it, so much ahead of the true time. Other clocks go on as they do."""
        time.time_ns = lambda: _true_time_ns() + ahead_ms * 1_000_000

    async def do_lifetimes(self, to: Sequence[str], ttls_ms: Sequence[int]) -> dict[str, Any]:
        """Publish one message with each of these lifetimes; answer with (number, id, lifetime, moment)."""
        made = []
        for ttl_ms in ttls_ms:
            async with self._intent_lock:
                number, self._next = self._next, self._next + 1
                self._say(t="intent", first=number, count=1, to=list(to))
                await self._oracle_reader.readline()
                body = body_of(self._name, number, 100)
                began = time.monotonic()
                receipt = await self.node.publish(SUBJECT, body, to=to, ttl_ms=ttl_ms)
                self._say(t="sent", numbers=[number])
                made.append([number, receipt.id, ttl_ms, began])
        return {"made": made}

    async def do_dead(self) -> dict[str, Any]:
        """What has died here: message id -> moment and reason."""
        return {"dead": self._dead}

    async def do_hog(self) -> dict[str, Any]:
        """Open files until there is no descriptor left."""
        with contextlib.suppress(OSError):
            while True:
                self._hogged.append(os.open("/dev/null", os.O_RDONLY))
        return {"hogged": len(self._hogged)}

    async def do_let_go(self) -> None:
        for fd in self._hogged:
            os.close(fd)
        self._hogged.clear()

    # -- what careless applications do ----------------------------------------------------------------------

    async def do_block(self, s: float) -> None:
        """Hold up the loop."""
        time.sleep(s)

    async def do_fork(self, life_s: float) -> dict[str, Any]:
        """Fork a child that lives a while and then ends the way an interpreter does, clean-up included."""
        pid = os.fork()
        if pid == 0:
            time.sleep(life_s)
            self.node = None  # type: ignore[assignment]  # what a child does at its end: let go of everything
            gc.collect()
            atexit._run_exitfuncs()
            os._exit(0)
        return {"pid": pid}

    async def do_reap(self, pid: int) -> dict[str, Any]:
        """Wait for a forked child; answer how it ended."""
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        return {"status": os.waitstatus_to_exitcode(status)}

    async def do_cancel(self, to: Sequence[str], count: int) -> dict[str, Any]:
        """Publish, read and wait for receipts, and cancel each of these awaits at some moment."""
        cancelled = 0
        for _ in range(count):
            await self._send_batch(to, 4, 100, None)
            reading = asyncio.ensure_future(self.node.read(lambda db: db.execute_sql("SELECT 1").fetchone()))
            transacting = asyncio.ensure_future(self.node.transact(lambda tx: None))
            pending = [*self._sending, reading, transacting]
            for _ in range(self._random.randint(0, 3)):
                await asyncio.sleep(0)
            for task in self._random.sample(pending, len(pending) // 2):
                cancelled += task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        # Whoever left must leave nothing behind.
        async with asyncio.timeout(20):
            while self.node._futures or self.node._receipts:
                await asyncio.sleep(0.01)
        return {"cancelled": cancelled}

    async def do_close(self) -> None:
        await self.do_halt()
        await self.node.close()

    # -- the stream -----------------------------------------------------------------------------------------

    async def _stream(
        self, *, to: Sequence[str], count: int, batch: int, size: int, gap_ms: float, ttl_ms: int | None
    ) -> None:
        left = count or sys.maxsize
        while left > 0 and not self._is_halting:
            some = min(left, self._random.randint(1, batch))
            left -= some
            await self._send_batch(to, some, size, ttl_ms)
            await asyncio.sleep(self._random.random() * 2 * gap_ms / 1_000)
            while len(self._sending) > 16 * batch:
                await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)

    async def _send_batch(self, to: Sequence[str], some: int, size: int, ttl_ms: int | None) -> None:
        async with self._intent_lock:  # numbers leave in the order in which they were meant
            first, self._next = self._next, self._next + some
            self._say(t="intent", first=first, count=some, to=list(to))
            if not await self._oracle_reader.readline():
                os._exit(3)  # without a witness nothing may be sent
            for number in range(first, first + some):
                task = asyncio.ensure_future(self._send_one(number, to, size, ttl_ms))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
            await asyncio.sleep(0)  # each has put its work into the queue, in order

    async def _send_one(self, number: int, to: Sequence[str], size: int, ttl_ms: int | None) -> None:
        try:
            await self.node.publish(SUBJECT, body_of(self._name, number, size), to=to, ttl_ms=ttl_ms)
        except (OutcomeUnknown, NodeClosed) as error:
            self._say(t="unknown", number=number, error=error.code)
        except asyncio.CancelledError:
            self._say(t="unknown", number=number, error="cancelled")
        except BrokerFreeError as error:
            self._say(t="refused", number=number, error=error.code)
            await asyncio.sleep(0.05)  # whatever is full has to get emptier
        else:
            self._sent.append(number)
            self._plan_turn()

    def _on_sigterm(self, writer: asyncio.StreamWriter) -> None:
        """End like a host application does: close the node in the middle of everything."""

        async def end() -> None:
            await self.node.close()
            await asyncio.gather(*self._sending, return_exceptions=True)
            await asyncio.sleep(0)
            with contextlib.suppress(ConnectionError):
                await self._oracle.drain()
            self._oracle.close()
            with contextlib.suppress(ConnectionError):
                await self._oracle.wait_closed()
            os._exit(0)

        self._is_halting = True
        self._ending = asyncio.ensure_future(end())


def _answer(writer: asyncio.StreamWriter, **fields: object) -> None:
    writer.write(json.dumps(fields).encode() + b"\n")
