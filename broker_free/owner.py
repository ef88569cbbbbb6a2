"""The owner thread: the one place that touches sockets and the writing connection.

It drains what has arrived, runs one tick (`tick.py` has the order that the promises rest on), and wakes the event loop
once with everything there is to tell. The asyncio face over it is `node.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from broker_free import faults, frames
from broker_free.blobfiles import Blob, BlobFiles
from broker_free.carrier import Carrier, Waiter
from broker_free.clock import SteadyClock, machine_boot, mono_ms, since_boot_ms, utc_ms
from broker_free.consumer import Lease, Leases
from broker_free.disk import Disk
from broker_free.errors import (
    BrokerFreeError,
    DiskLow,
    InvalidInput,
    LeaseLost,
    MalformedFrame,
    NodeClosed,
    StoreBroken,
    StoreFailed,
    UnknownBlob,
    UnknownPeer,
)
from broker_free.filesystem import check_suitable
from broker_free.flood import resident_bytes
from broker_free.frames import Frame
from broker_free.futures import fail, succeed
from broker_free.health import Health, HealthState
from broker_free.home import check_files, lock, make_private, unlock
from broker_free.membership import MEMBERS, WHEREABOUTS, Member
from broker_free.mesh import Mesh
from broker_free.message import Envelope, Message
from broker_free.outside import Allowance, Refusals, printable
from broker_free.pairing import Pairing
from broker_free.presence import State
from broker_free.registry import Registry
from broker_free.schema import Migrations
from broker_free.security import load_or_create_keys, replace_keys
from broker_free.store import DAMAGED, Store
from broker_free.storefile import STORE
from broker_free.tick import CANCELLED, EXPIRED, Effect, Outcome, Tick, Transact, Tx, Work
from broker_free.transport import Beat, Closed, Connected, Received, Transport, new_keypair
from broker_free.watch import Watch

if TYPE_CHECKING:
    import peewee


if TYPE_CHECKING:
    from broker_free.node import Node

log = logging.getLogger("broker_free")

T = TypeVar("T")

_HOUSEKEEPING_MS: Final = 5_000
_PRUNE_MS: Final = 3_600_000
_RELISTEN_AFTER_MS: Final = 200
_RELISTEN_AGAIN_MS: Final = 1_000
# A member on a fast network sends some 200 MB in that time; each look wakes an idle node.
_MEMORY_MS: Final = 1_000
_ROTATE_TIMEOUT_S: Final = 3.0
_ROTATE_LOOK_S: Final = 0.02
KEY_FILE: Final = "node.keys"

_DISK_LOW: Final = "disk low"

Link = Literal["open", "closed"]

_SENT: Final = {frames.HELLO: "hello-sent", frames.HELLO_OK: "hello-ok-sent", frames.READY: "ready-sent"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """What is known of one peer now."""

    node_id: str
    name: str
    state: State
    link: Link
    rtt_ms: float | None  # of the last greeting
    last_seen_ms: int | None  # UTC
    endpoints: tuple[str, ...]
    is_blocked: bool = False  # it has said that it takes no messages now; they wait here
    credit: tuple[int, int] = (
        0,
        0,
    )  # messages and bytes that may be on the wire to it; (0, 0) without a session
    skew_ms: int | None = (
        None  # how far its clock was ahead of ours at its last greeting, to about a round trip
    )
    is_pending: bool = False  # introduced, and not met by anybody yet
    introduced_by: str = ""  # node id
    why_closed: str = ""  # "refused": it does not let this node in; see `transport.Closed`


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """Something to do in the owner thread between transactions."""

    fn: Callable[[], Any]
    future: asyncio.Future[Any]


_HERE: Final = threading.local()


def in_owner_thread() -> bool:
    """Say whether the caller runs in the owner thread of a node, this one's or another's."""
    return getattr(_HERE, "is_owner", False)


class Owner:
    """The owner thread: the only one that touches sockets and the writing connection."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop) -> None:
        self.refusals = Refusals()
        self.pairing: Pairing
        self._node = node
        self._loop = loop
        self._limits = node.limits
        self._queue: deque[Work | _Question] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="bf-owner", daemon=True)
        self._started: asyncio.Future[None] = loop.create_future()
        self._stopped = asyncio.Event()
        self._has_ended = self._has_failed = False
        self._lock_fd = -1
        self._store: Store
        self._transport: Transport
        self._tick: Tick
        self._steady: SteadyClock
        self._watch: Watch
        self.mesh: Mesh
        self.blobs: BlobFiles
        self.carrier: Carrier
        self._has_chunks = False  # to be sent at once, after the mail that has come meanwhile
        self._rtt: dict[str, float] = {}
        self._housekeeping_due_ms = 0
        self._prune_due_ms = 0  # steady
        self._ephemerals_told = 0
        self._dirty: set[str] = set()  # peers whose view has changed
        self._leases = Leases()
        self._broken: StoreFailed | None = None  # why the store is not written to any more
        self._health = Health()
        self._disk: Disk
        self._failures: dict[str, str] = {}  # why there is no session with a peer
        self._hellos: dict[str, Allowance] = {}
        self._relisten_due_ms: int | None = None
        self._memory_due_ms = 0
        self._steady_ahead_ms = (
            0  # of monotonic time, when the last turn began: they part while the machine sleeps
        )
        self._resident = resident_bytes()

    # -- called on the loop ---------------------------------------------------------------------------------

    async def start(
        self,
        listen: str,
        models: Sequence[type[peewee.Model]],
        migrations: Migrations | None,
        effects: Sequence[tuple[str, Effect]],
    ) -> None:
        self._setup = (listen, models, migrations, effects)
        self._thread.start()
        await self._started

    async def stop(self) -> None:
        self._stopping = True
        self._transport.wake()
        await self._stopped.wait()
        self._thread.join()

    def submit(self, work: Work) -> None:
        self._queue.append(work)
        self._check_alive()
        self._transport.wake()

    def _check_alive(self) -> None:
        """Called after something was queued: then either this or the ending thread notices it."""
        if self._has_ended:
            raise NodeClosed("the node has failed", hint="see its log, then start it again")

    def later(self, fn: Callable[[], object]) -> None:
        """Have the owner thread run `fn` between transactions; nobody waits for it."""
        self._queue.append(_Question(fn, self._loop.create_future()))
        self._transport.wake()

    async def ask(self, fn: Callable[[], T]) -> T:
        """Run `fn` in the owner thread, between transactions."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.append(_Question(fn, future))
        self._check_alive()
        self._transport.wake()
        return await future

    def refused(self) -> dict[str, int]:
        """Count what was turned away since the start, by reason."""
        counts = self._transport.refused + self._tick.refused + self.carrier.counts()
        return dict(sorted((counts + self.refusals.counts).items()))

    def listen(self, patterns: tuple[str, ...]) -> None:
        self._tick.listen(patterns)

    def send_ephemeral(self, message: Message, to: Sequence[str] | None) -> list[str]:
        return self._tick.send(message, to)

    def alarms(self) -> dict[str, int]:
        return dict(self._tick.alarms)

    def hold(self, reason: str, *, for_ms: int | None = None) -> None:
        """Take no more messages from peers until `release(reason)`: low disk, a store that is in trouble."""
        self._tick.hold(reason, for_ms=for_ms)

    def release(self, reason: str) -> None:
        self._tick.release(reason)

    # -- another key: on the loop, step by step ---------------------------------------------------------------

    async def rotate_key(self) -> tuple[list[str], list[str]]:
        """Change this node's key; return which peers know it already, and which learn it when they are back."""
        await self.ask(self._announce_key)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ROTATE_TIMEOUT_S):
                while await self.ask(self._is_awaited):
                    await asyncio.sleep(_ROTATE_LOOK_S)
        return await self.ask(self._change_key)

    def _announce_key(self) -> None:
        keys = self.mesh.keys
        if self.mesh.next_keys is not None:
            raise InvalidInput("the key is being changed already", hint="wait for that")
        if keys.former is not None and self.mesh.unaware:
            names = ", ".join(sorted(self.mesh.name_of(peer) for peer in self.mesh.unaware))
            raise InvalidInput(
                f"the last change of the key has not reached {names} yet",
                hint="wait until they are back, or remove them: zmail peers remove NAME",
            )
        changed = keys.changed(new_keypair(), now_ms=utc_ms())
        # From here on a crash goes on with the new key, and tells the peers with the help of the former one.
        replace_keys(self._node.home / KEY_FILE, changed)
        faults.reach("keys-replaced")
        self.mesh.announce_key(changed)

    def _is_awaited(self) -> bool:
        """Say whether a peer with an open session has not confirmed the key yet."""
        return any(self._tick.links[peer].is_open for peer in self.mesh.unaware if peer in self._tick.links)

    def _change_key(self) -> tuple[list[str], list[str]]:
        self.mesh.change_key()
        self.transact(self.pairing.strike_all)
        unaware = sorted(self.mesh.unaware)
        return [peer for peer in self.mesh.members if peer not in self.mesh.unaware], unaware

    def _drop_former_key(self) -> None:
        """Forget the former key once everybody knows the present one, or when it is old."""
        keys = self.mesh.keys
        if keys.former is None or self.mesh.next_keys is not None:
            return
        if not self.mesh.unaware or utc_ms() >= keys.changed_ms + self._limits.former_key_ms:
            self.mesh.keys = keys.without_former()
            replace_keys(self._node.home / KEY_FILE, self.mesh.keys)

    # -- transactional functions (run inside a tick) --------------------------------------------------------

    def open_consumer(self, tx: Tx, durable: str, pattern: str) -> int:
        self._tick.check_interest(pattern)  # before the store takes it into memory
        number = self._store.consumer_open(durable, pattern)
        self._tick.add_interest(pattern)
        return number

    def commit_job(self, tx: Tx, lease: Lease, fn: Callable[..., T], *args: Any) -> T:
        """Settle a job and run `fn(tx, *args)`, both or neither. LeaseLost before anything is written."""
        self._leases.check(lease, now_ms=mono_ms())
        if not self._store.job_done(lease.consumer, lease.row, tx.steady_ms):
            raise LeaseLost(f"job {lease.row} has been settled before", hint="nothing is left to do for it")
        result = fn(tx, *args)
        faults.reach("job-done")
        tx.after_commit(lambda: self.later(lambda: self._leases.drop(lease)))
        return result

    def return_job(self, tx: Tx, lease: Lease, delay_ms: int) -> None:
        self._leases.check(lease, now_ms=mono_ms())
        self._store.job_again(lease.consumer, lease.row, tx.steady_ms + delay_ms)
        tx.after_commit(lambda: self._free(lease))

    def _free(self, lease: Lease) -> None:
        """On the loop: end a lease, then have the consumers look again; the queue keeps that order."""
        self.later(lambda: self._leases.drop(lease))
        self._node.jobs_are_free()

    def cancel(self, tx: Tx, message_id: str) -> dict[str, str]:
        states, cancelled = self._tick.cancel(tx, message_id)
        dead = [(message_id, peer, CANCELLED) for peer in cancelled]
        tx.after_commit(partial(self._node.take, Outcome(dead=dead)))
        return states

    # -- durable consumers, between transactions ------------------------------------------------------------

    def fetch_jobs(self, consumer: int, holder: int) -> list[tuple[Envelope, int, Lease]]:
        """Reserve jobs that are due and free: (envelope, earlier attempts, lease), oldest first."""
        lapsed = self._leases.lapse(consumer, now_ms=mono_ms())
        if lapsed:  # they count as attempts, and are free once that is on disk
            self._queue.append(Transact(fn=self._count_lapsed, args=(consumer, lapsed)))
        found = self._store.jobs(
            consumer,
            now_ms=self._steady.ms(),
            limit=self._limits.credit_messages,
            leave_out={*self._leases.held(consumer), *lapsed},
        )
        leases = self._leases.reserve(consumer, [envelope.row for envelope, _ in found], holder=holder)
        return [
            (envelope, attempts, lease) for (envelope, attempts), lease in zip(found, leases, strict=True)
        ]

    def _count_lapsed(self, tx: Tx, consumer: int, rows: Sequence[int]) -> None:
        for row in rows:
            log.warning("lease over", extra={"row": row})
            self._store.job_again(consumer, row, tx.steady_ms)
        tx.after_commit(self._node.jobs_are_free)

    def extend_lease(self, lease: Lease, lease_ms: int) -> None:
        now_ms = mono_ms()
        self._leases.check(lease, now_ms=now_ms)
        self._leases.start(lease, now_ms=now_ms, lease_ms=lease_ms)

    # called on the loop; what follows them in the queue sees their effect

    def start_lease(self, lease: Lease, lease_ms: int) -> None:
        self.later(lambda: self._leases.start(lease, now_ms=mono_ms(), lease_ms=lease_ms))

    def close_consumer(self, holder: int) -> None:
        self.later(lambda: self._leases.close(holder))

    def record_blob(self, tx: Tx, blob: Blob) -> bool:
        """Enter a blob that has just been written. False when its file has been dropped in between."""
        if not self.blobs.is_here(blob.id):
            return False
        self._store.add_blob(blob.id, blob.size, tx.steady_ms)
        return True

    def fetch_blob(self, blob_id: str, peer: str, waiter: Waiter) -> None:
        """Begin to fetch; the waiter is told. Between transactions."""
        if peer == self._node.node_id:
            if not self.blobs.is_here(blob_id):
                raise UnknownBlob(f"no blob {blob_id[:12]} on this node")
        elif peer not in self.mesh.members:
            raise UnknownPeer(f"no member {peer!r} in this mesh", hint="pair with it by an invitation first")
        self.carrier.fetch(blob_id, peer, waiter)

    # -- the thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        _HERE.is_owner = True
        try:
            self._open()
        except BaseException as error:  # noqa: BLE001  whatever it is, start() must raise it
            self._release()
            self.tell(fail, self._started, error)
            self.tell(self._stopped.set)
            return
        self.tell(succeed, self._started, None)
        try:
            self._loop_until_stopped()
        except BaseException as error:  # the last that can say why
            log.exception("the node has failed")
            self._has_failed = self._has_ended = (
                True  # before that is told: nobody queues after all were answered
            )
            self.tell(self._node.died, error)
        finally:
            self._has_ended = True
            self._refuse_questions()
            try:
                self._release()
            finally:
                self.tell(self._stopped.set)

    def _refuse_questions(self) -> None:
        for one in list(self._queue):
            if isinstance(one, _Question):
                self.tell(fail, one.future, NodeClosed("the node has been closed"))

    def _open(self) -> None:
        listen, models, migrations, effects = self._setup
        node = self._node
        make_private(node.home)
        check_files(node.home)
        self._lock_fd = lock(node.home / "node.lock")
        check_suitable(str(node.home))
        had_keys, had_store = (node.home / KEY_FILE).exists(), (node.home / STORE).exists()
        keys = load_or_create_keys(node.home / KEY_FILE, new_keypair)
        node.node_id = keys.node_id
        self._store = Store(
            node.home / STORE,
            me=node.node_id,
            limits=self._limits,
            models=models,
            migrations=migrations,
        )
        self._store.open()
        self._steady = SteadyClock(
            self._store.anchor(), boot=machine_boot(), since_boot_ms=since_boot_ms(), utc_ms=utc_ms()
        )
        if (anchor := self._steady.anchor(utc_ms=utc_ms())) is not None:
            self._store.save_anchor(anchor)
        mesh = self.mesh = Mesh(
            host=self,
            name=node.name,
            node_id=node.node_id,
            keys=keys,
            store=self._store,
            limits=self._limits,
        )
        self.pairing = Pairing(host=self, mesh=mesh, store=self._store, limits=self._limits)
        mesh.transport = self._transport = Transport(
            keys=keys.current, admit=self._admit, admit_watcher=mesh.admit, limits=self._limits
        )
        endpoint, mesh.beat_endpoint = self._transport.bind(listen)
        mesh.endpoints = node.endpoints = [endpoint]
        mesh.advertise = node.advertise
        entries, notes = self._store.registry_load(), self._store.registry_notes()
        mesh.tick = self._tick = Tick(
            me=node.node_id,
            boot=node.boot,
            about=mesh.about,
            journal=self._store,
            wire=self,
            limits=self._limits,
            random=random.Random(secrets.randbits(64)),
            registry=Registry(node.node_id, entries, clock=notes.get("clock", 0), limits=self._limits),
            synced_ms=notes.get("synced_ms", 0),
        )
        self.blobs = BlobFiles(node.home / "blobs", self._limits)
        self.blobs.open()
        self.carrier = Carrier(
            files=self.blobs,
            sessions=self._tick,
            rows=self._store,
            wake=self._transport.wake,
            loop=self._loop,
            limits=self._limits,
            random=random.Random(secrets.randbits(64)),
        )
        for pattern, fn in effects:
            self._tick.add_effect(pattern, fn)
        self._store.has_effect = self._tick.effects_of
        if had_keys and not had_store:
            log.warning("the store is gone: this node starts with an empty one")
            self._store.note(
                "store-missing", "there were keys but no store: members and mail are gone from here"
            )
        self._disk = Disk(node.home / STORE, self._limits)
        self._tick.admit = self._disk.admit
        self._disk.look(mono_ms())
        self._room_may_have_changed()
        for pattern in self._store.patterns():
            self._tick.add_interest(pattern)
        node._entries.load(entries)
        mesh.watch = self._watch = Watch(
            me=node.node_id,
            boot=node.boot,
            limits=self._limits,
            random=random.Random(secrets.randbits(64)),
            tick=self._tick,
            transport=self._transport,
            newest_row=lambda: self._store.newest_row,
            changed=self.member_changed,
        )
        self._tick.start(now_ms=mono_ms(), utc_ms=utc_ms())
        mesh.load()
        self.pairing.load()
        self.tell_views()

    def _release(self) -> None:
        with contextlib.ExitStack() as last_first:  # each is done, whatever becomes of the others
            if self._lock_fd >= 0:
                last_first.callback(unlock, self._lock_fd)
            if (store := getattr(self, "_store", None)) is not None:
                # After an error a transaction may be open, and memory of it is not to be trusted.
                is_sound = self._broken is None and not self._has_failed
                last_first.callback(store.close if is_sound else store.abandon)
            if (transport := getattr(self, "_transport", None)) is not None:
                last_first.callback(transport.close_all)
            if (carrier := getattr(self, "carrier", None)) is not None:
                last_first.callback(carrier.close)

    def _loop_until_stopped(self) -> None:
        timeout_ms = 0
        now_ms = mono_ms()
        while True:
            due_ms = now_ms + timeout_ms  # by the last round: what took long since then counts as lag too
            events = self._transport.poll(timeout_ms)
            now_ms = mono_ms()
            self._watch.lagged(now_ms - due_ms, now_ms)
            is_last = self._stopping
            try:
                if self._broken is None:
                    self._turn(events, now_ms)
                else:
                    self._turn_away(events, now_ms)
                if is_last and not self._queue:
                    if self._broken is None:
                        self._close()
                    return
                self._keep_house(now_ms)
            except DiskLow:
                self._disk.filled()
                self._room_may_have_changed()
            except StoreFailed as error:
                self._break(error)
            timeout_ms = 0 if self._queue or self._has_chunks else self._sleep_ms()

    def _turn(self, events: Sequence[Connected | Closed | Received | Beat], now_ms: int) -> None:
        steady_ms = self._steady.ms()
        self._steady_ahead_ms = steady_ms - now_ms
        self._tick.start(now_ms=now_ms, utc_ms=utc_ms(), steady_ms=steady_ms)
        for event in events:
            self._on_event(event, now_ms)
        work = self._take_work()
        try:
            outcome = self._tick.run(work)
        except StoreFailed as error:
            told = self._tick.take_outcome()  # what is on disk all the same
            settled = {one for one, _ in [*told.results, *told.failures]}
            told.failures += [(one, error) for one in work if one not in settled]
            self._follow(told)
            raise
        took_ms = mono_ms() - now_ms
        if took_ms >= self._limits.slow_store_ms:
            # Of the tick's own time, which began so long ago.
            self._tick.hold("slow store", for_ms=2 * took_ms)
        self._follow(outcome)
        self._has_chunks = self.carrier.turn(now_ms)

    def _close(self) -> None:
        if self._store.has_notes:
            self._follow(self._tick.run([Transact(fn=self._write_notes)]))
        self._tick.close()

    # -- a store that failed --------------------------------------------------------------------------------

    def _break(self, error: StoreFailed) -> None:
        """Accept and acknowledge nothing from now on. What is on disk stays as it is, for the next start."""
        if self._broken is not None:
            return
        self._broken = error
        log.critical(
            "the store has failed: nothing is accepted until the node is started again",
            extra={"reason": error.message, "hint": error.hint},
        )
        with contextlib.suppress(StoreFailed):
            self._tick.end_sessions("the store has failed")
        self._has_chunks = False
        self.carrier.abandon(error)
        self._tell_health()

    def _turn_away(self, events: Sequence[Connected | Closed | Received | Beat], now_ms: int) -> None:
        """Serve without a store: peers are told, callers are refused, presence goes on."""
        assert self._broken is not None
        for event in events:
            match event:
                case Received(conn, user_id, parts):
                    self._turn_away_frame(conn, user_id, parts, now_ms)
                case Connected(conn):
                    self._transport.close(conn)
                case Beat(parts):
                    self._watch.on_beat(parts, now_ms)
                case Closed():
                    pass
        refusal = StoreBroken(f"this node's store has failed: {self._broken.message}", hint=self._broken.hint)
        failures: list[tuple[Work, BaseException]] = [(one, refusal) for one in self._take_work()]
        if failures:
            self.tell(self._node.take, Outcome(failures=failures))

    def _turn_away_frame(self, conn: int, user_id: str, parts: list[bytes], now_ms: int) -> None:
        with contextlib.suppress(MalformedFrame):
            frame = frames.decode(parts, self._limits)
            if user_id in self.mesh.members:
                self._watch.heard(user_id, now_ms)
            if frame.kind in (frames.HELLO, frames.JOIN):
                reason = {"reason": "the store has failed here"}
                self.send(conn, Frame(kind=frames.BYE, session=frame.session, meta=reason))

    def _room_may_have_changed(self) -> None:
        """Let peers wait while room is short, and go on when there is some again."""
        is_known = self._health.state == "disk-low"
        if self._disk.is_low == is_known or self._broken is not None:
            return
        if self._disk.is_low:
            self._tick.hold(_DISK_LOW)
            refusal = self._disk.refusal()
            log.warning("the disk is nearly full: nothing new is accepted", extra={"reason": refusal.message})
            self._store.note("disk-low", refusal.message)
        else:
            self._tick.release(_DISK_LOW)
            log.info("there is room on the disk again")
            self._store.note("disk-room", "there is room again")
        self._tell_health()

    def _tell_health(self) -> None:
        error: StoreFailed | None = self._broken
        state: HealthState = "ok" if error is None else "failed"
        if error is None and self._disk.is_low:
            error, state = self._disk.refusal(), "disk-low"
        is_same = state == self._health.state
        health = Health(
            state=state,
            why=self._health.why if is_same else error.message if error else "",
            hint=self._health.hint if is_same else error.hint or "" if error else "",
            since_ms=self._health.since_ms if is_same else utc_ms(),
            quarantined=self._store.quarantined,
        )
        if health != self._health:
            self._health = health
            self.tell(self._node.take_health, health)

    def _take_work(self) -> list[Work]:
        work: list[Work] = []
        while self._queue and len(work) < self._limits.tick_operations_max:
            one = self._queue.popleft()
            if isinstance(one, _Question):
                self._answer(one)
            else:
                work.append(one)
        return work

    def _answer(self, question: _Question) -> None:
        try:
            self.tell(succeed, question.future, question.fn())
        except BrokerFreeError as error:
            self.tell(fail, question.future, error)
        except (TypeError, ValueError) as error:  # the caller's arguments: no reason for the node to end
            self.tell(fail, question.future, error)
        except BaseException as error:
            self.tell(fail, question.future, error)
            raise  # ours, not the caller's: the node ends, and whoever asked knows

    def _on_event(self, event: Connected | Closed | Received | Beat, now_ms: int) -> None:
        match event:
            case Received(conn, user_id, parts):
                try:
                    self._on_frames(conn, user_id, parts, now_ms)
                except BrokerFreeError:
                    raise
                except Exception:
                    # Protects the node from a peer's frames: a mistake of ours in reading them ends a session only.
                    if not self.refusals.counts["internal"]:
                        log.exception("a frame could not be handled", extra={"peer": user_id})
                    self.refusals.add("internal", now_ms, peer=user_id)
                    self._tick.drop(user_id, "a frame that could not be handled")
            case Connected(conn):
                if not self.pairing.connected(conn):
                    self._tick.connected(conn)
            case Closed(conn, reason):
                if not self.pairing.closed(conn, reason):
                    self._note_failure(self._tick.peer_of(conn), reason)
                    self.mesh.dial_ended(conn, reason)
                    self._tick.closed(conn, reason)
            case Beat(parts):
                self._watch.on_beat(parts, now_ms)

    def _on_frames(self, conn: int, user_id: str, parts: list[bytes], now_ms: int) -> None:
        try:
            frame = frames.decode(parts, self._limits)
        except MalformedFrame as error:
            self._tick.refused[error.reason] += 1
            log.debug("frame dropped", extra={"peer": user_id, "reason": error.message})
            if error.reason == "frame-version" and parts[0][3] == frames.HELLO:
                self._refuse_version(conn, user_id or self._tick.peer_of(conn), parts, error.message)
            return
        if self.pairing.frame(conn, user_id, frame):
            return
        peer = user_id or self._tick.peer_of(conn)
        if peer not in self.mesh.members or self.mesh.is_blocked(peer):
            self.refusals.add("not-a-member", now_ms, peer=peer)
            return
        self._watch.heard(peer, now_ms)
        if self.mesh.frame(conn, peer, frame):
            return
        if frame.kind == frames.HELLO and not self._may_greet(peer, conn, frame, now_ms):
            return
        self._tick.frame(peer, conn, frame)

    def _may_greet(self, peer: str, conn: int, frame: Frame, now_ms: int) -> bool:
        """Bound how often a peer greets, and with how many there are sessions at once."""
        allowance = self._hellos.get(peer)
        if allowance is None:
            allowance = self._hellos[peer] = Allowance(
                burst=self._limits.hellos_burst, a_second=self._limits.hellos_a_second_max, now_ms=now_ms
            )
        if not allowance.take(now_ms):
            self.refusals.add("hello-rate", now_ms, peer=peer)
            return False
        if self._tick.links[peer].conn is None and self._is_full():
            self.refusals.add("too-many-sessions", now_ms, peer=peer)
            meta = {"reason": "too many sessions"}
            self.send(conn, Frame(kind=frames.BYE, session=frame.session, meta=meta))
            return False
        return True

    def _is_full(self) -> bool:
        sessions = sum(link.conn is not None for link in self._tick.links.values())
        return sessions >= self._limits.sessions_max

    def _admit(self, public_key: bytes) -> str | None:
        return self.mesh.admit(public_key) or self.pairing.admit(public_key)

    def _note_failure(self, peer: str, reason: str) -> None:
        if peer and self._failures.get(peer) != reason:
            self._failures[peer] = reason
            self._dirty.add(peer)

    def _refuse_version(self, conn: int, peer: str, parts: list[bytes], reason: str) -> None:
        """Answer a greeting in a version that cannot be read here, in that version: a BYE is the same in all."""
        if peer not in self.mesh.members:
            return
        session = int.from_bytes(parts[1][:8], "big")
        meta = {"reason": reason, "code": "version"}
        self.send(conn, Frame(kind=frames.BYE, version=parts[0][2], session=session, meta=meta))
        self._tick.raise_alarm("version", peer, reason)

    def _follow(self, outcome: Outcome) -> None:
        """Draw this side's conclusions from a tick, then tell the loop."""
        if isinstance(outcome.error, StoreBroken):
            self._break(outcome.error)
        elif isinstance(outcome.error, DiskLow):
            self._disk.filled()
            self._room_may_have_changed()
        for alarm in outcome.alarms:
            if alarm.kind != "regression":  # that one is written together with what it causes
                self._store.note(alarm.kind, alarm.detail, peer=alarm.peer)
        for peer, body in outcome.probes:
            self._watch.on_probe(peer, body)
        for peer, opened in outcome.opened:
            self._rtt[peer] = float(opened.rtt_ms)
            self._watch.on_opened(peer)
            self.mesh.note_whereabouts(peer, opened.about)
            self.mesh.session_opened(peer)
            self._failures.pop(peer, None)
            self._dirty.add(peer)
            log.info("session open", extra={"peer": peer, "peer_name": self.mesh.members[peer].name})
        for peer, frame in outcome.chunks:
            self.carrier.on_frame(peer, frame, mono_ms())
        for peer, reason in outcome.lost:
            self._dirty.add(peer)
            self._note_failure(peer, printable(reason))
            log.info("session lost", extra={"peer": peer, "reason": printable(reason)})
        for peer in outcome.blocked:
            self._dirty.add(peer)
            is_blocked = peer in self._tick.links and self._tick.links[peer].is_blocked
            log.info("peer takes no messages" if is_blocked else "peer takes messages", extra={"peer": peer})
        if outcome.entries and any(entry.bucket in (MEMBERS, WHEREABOUTS) for entry in outcome.entries):
            self.mesh.learn(outcome.entries)
        if (
            outcome.results
            or outcome.failures
            or outcome.delivered
            or outcome.dead
            or outcome.arrivals
            or outcome.callbacks
            or outcome.entries
            or outcome.alarms
            or outcome.receipts
            or outcome.ephemerals
        ):
            if outcome.ephemerals:
                self._bound_ephemerals(outcome)
            self.tell(self._node.take, outcome)
        if self._dirty:
            self.tell_views()

    def _bound_ephemerals(self, outcome: Outcome) -> None:
        """Let only so many messages that are never stored wait for a loop that is behind; the others are lost."""
        room = self._limits.ephemeral_pending_max - (self._ephemerals_told - self._node.ephemerals_taken)
        lost = len(outcome.ephemerals) - max(0, room)
        if lost > 0:
            del outcome.ephemerals[-lost:]
            self._tick.refused["ephemeral-overflow"] += lost
        self._ephemerals_told += len(outcome.ephemerals)

    def _keep_house(self, now_ms: int) -> None:
        self._room_may_have_changed()
        if mono_ms() >= self._house_wake_ms():  # now: the turn itself may have been long
            self._do_what_is_due(now_ms)
        if self._dirty:
            self.tell_views()

    def _do_what_is_due(self, now_ms: int) -> None:
        self.pairing.keep(now_ms)
        if (at_ms := mono_ms()) >= self._memory_due_ms:
            self._look_for_floods(at_ms)
        if self._relisten_due_ms is not None and now_ms >= self._relisten_due_ms:
            self._relisten(now_ms)
        self._watch.tick(now_ms)
        if self._disk.look(now_ms):
            self._room_may_have_changed()
        if self._broken is not None:
            if now_ms >= self._housekeeping_due_ms:
                self._housekeeping_due_ms = now_ms + _HOUSEKEEPING_MS
            return
        next_expiry_ms = self._store.next_expiry_ms
        if next_expiry_ms is not None and self._steady.ms() >= next_expiry_ms:
            self._store.next_expiry_ms = None  # found anew at the end of it
            self._queue.append(Transact(fn=self._clean_up))
        if now_ms >= self._housekeeping_due_ms:
            self._housekeeping_due_ms = now_ms + _HOUSEKEEPING_MS
            self._tell_health()
            self.mesh.unblock(now_ms)
            self._resident = 0  # look once: memory that was freed before hides growth
            self._drop_former_key()
            self._hellos = {peer: one for peer, one in self._hellos.items() if not one.is_full(now_ms)}
            now_utc_ms, steady_ms = utc_ms(), self._steady.ms()
            anchor = self._steady.anchor(utc_ms=now_utc_ms)
            if anchor is not None:  # UTC was set
                self._queue.append(Transact(fn=lambda tx: self._store.save_anchor(anchor)))
            # An idle node writes nothing: a laptop's disk may sleep.
            if (
                self.pairing.has_expired(now_utc_ms)
                or steady_ms >= self._prune_due_ms
                or self._store.has_notes
            ):
                self._queue.append(Transact(fn=self._clean_up))

    def _clean_up(self, tx: Tx) -> None:
        """One slice of house-keeping, inside a transaction."""
        if self._store.has_notes:
            self._write_notes(tx)
        if tx.steady_ms >= self._prune_due_ms and not self._store.prune(tx.steady_ms):
            self._prune_due_ms = tx.steady_ms + _PRUNE_MS
            self._prune_blobs(tx)
        for peer, link in self._tick.links.items():
            for message_id in self._store.expire(peer, beyond_row=link.cursor, now_ms=tx.steady_ms):
                tx.after_commit(partial(self._node.take, Outcome(dead=[(message_id, peer, EXPIRED)])))
        self._store.expire_inbox(tx.steady_ms, leave_out=self._leases.rows())
        self.pairing.strike_expired(tx.now_ms)
        for peer, seen_ms in self._watch.seen_ms.items():
            self._store.save_seen(peer, seen_ms)

    def _write_notes(self, tx: Tx) -> None:
        dead = [(message_id, peer, DAMAGED) for message_id, peer in self._store.write_notes(tx.now_ms)]
        if dead:
            tx.after_commit(lambda: self._node.take(Outcome(dead=dead)))

    def note(self, kind: str, detail: str, *, peer: str = "") -> None:
        """Keep an event, to be written with the next house-keeping."""
        self._store.note(kind, detail, peer=peer)

    def _prune_blobs(self, tx: Tx) -> None:
        unused = self._store.drop_unused_blobs(tx.steady_ms)
        left_since_s = (utc_ms() - self._limits.blob_retained_ms) / 1_000  # as files count
        tx.after_commit(lambda: self.later(lambda: self.carrier.drop(unused)))
        tx.after_commit(lambda: self.later(lambda: self.carrier.sweep(left_since_s)))

    def transact(self, fn: Callable[..., object], *args: Any) -> None:
        self._queue.append(Transact(fn=fn, args=args))

    def tell_dead(self, dead: list[tuple[str, str, str]]) -> None:
        self._node.take(Outcome(dead=dead))

    def member_changed(self, peer: str) -> None:
        self._dirty.add(peer)

    def member_left(self, peer: str) -> None:
        for known in (self._rtt, self._failures, self._hellos):
            known.pop(peer, None)
        self._dirty.add(peer)
        self.cut_inbound()

    def _look_for_floods(self, now_ms: int) -> None:
        """Cut who sends messages that never end. Looking costs a little, so only when this process has grown."""
        self._memory_due_ms = now_ms + _MEMORY_MS
        resident = resident_bytes()
        if resident < self._resident + self._limits.unread_bytes_max // 2:
            self._resident = min(resident, self._resident)
            return
        culprits = self._transport.cut_floods()
        if culprits is None:
            self._resident = resident  # grown for another reason
            return
        self.refusals.add("flood", now_ms, peers=", ".join(culprits))
        for user_id, is_sure in culprits.items():
            if not is_sure and user_id in self._tick.links and self._tick.links[user_id].is_open:
                continue  # it has a session, over another connection: it is not the silent one
            self.mesh.block(user_id, now_ms)
            self._tick.drop(user_id, "blocked")

    def cut_inbound(self) -> None:
        """Cut every connection that others have opened to this node; those who may come back do so by themselves.

        libzmq cannot cut a single one. What was just said on them is given a moment to leave.
        """
        if self._relisten_due_ms is None:
            self._relisten_due_ms = mono_ms() + _RELISTEN_AFTER_MS

    def _relisten(self, now_ms: int) -> None:
        self._relisten_due_ms = None
        try:
            self._transport.relisten()
        except BrokerFreeError as error:  # somebody was quicker to take the port
            log.error("cannot listen", extra={"reason": error.message})
            self._relisten_due_ms = now_ms + _RELISTEN_AGAIN_MS
        self._tick.drop_inbound("listening anew")

    def _house_wake_ms(self) -> int:
        """Return the monotonic time at which `_keep_house` has something to do though nothing happens.

        Asked twice in each round of the loop: whatever house-keeping is added names its time here.
        """
        wake_ms = min(self._housekeeping_due_ms, self._memory_due_ms, self._watch.next_wake_ms())
        for soon_ms in (self._relisten_due_ms, self.pairing.next_wake_ms()):
            if soon_ms is not None and soon_ms < wake_ms:
                wake_ms = soon_ms
        expiry_ms = self._store.next_expiry_ms
        if expiry_ms is not None and self._broken is None:
            wake_ms = min(wake_ms, expiry_ms - self._steady_ahead_ms)
        return wake_ms

    def _sleep_ms(self) -> int:
        wake_ms, now_ms = self._house_wake_ms(), mono_ms()
        if self._broken is None:
            wake_ms = min(wake_ms, self._tick.next_wake_ms())
            chunks_ms = self.carrier.next_wake_ms(now_ms)
            if chunks_ms is not None:
                wake_ms = min(wake_ms, chunks_ms)
        return max(0, wake_ms - now_ms)

    def tell(self, fn: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(fn, *args)

    # -- the wire, as the tick sees it ----------------------------------------------------------------------

    def send(self, conn: int, frame: Frame) -> bool:
        has_left = self._transport.send(conn, frames.encode(frame))
        if frame.kind in _SENT:
            faults.reach(_SENT[frame.kind])
        return has_left

    def close(self, conn: int) -> None:
        self.mesh.dial_ended(conn, "closed here")
        self._transport.close(conn)

    def dial(self, peer: str) -> int | None:
        return None if self._is_full() else self.mesh.dial(peer)

    # -- what the loop is told of the peers -----------------------------------------------------------------

    def tell_views(self) -> None:
        views = [self._view(self.mesh.members[peer]) for peer in self._dirty if peer in self.mesh.members]
        gone = [peer for peer in self._dirty if peer not in self.mesh.members]
        self._dirty.clear()
        self.tell(self._node.take_views, views, gone)

    def _view(self, member: Member) -> PeerView:
        link = self._tick.links[member.node_id]
        return PeerView(
            node_id=member.node_id,
            name=member.name,
            state=self._watch.state(member.node_id),
            link="open" if link.is_open else "closed",
            rtt_ms=self._rtt.get(member.node_id),
            last_seen_ms=self._watch.seen_ms.get(member.node_id),
            endpoints=member.endpoints,
            is_blocked=link.is_blocked,
            credit=link.credit,
            skew_ms=self._tick.skew_ms(member.node_id),
            is_pending=self.mesh.is_pending(member.node_id),
            introduced_by=member.introduced_by,
            why_closed="" if link.is_open else self._failures.get(member.node_id, ""),
        )
