"""A node: the owner thread that runs the ticks, and the asyncio face over it.

One thread holds the ZeroMQ objects and the only writing connection. It drains what has arrived, runs one tick
(`tick.py` has the order that the promises rest on), and wakes the event loop once with everything there is to
tell. The loop side never touches a socket or the connection: it puts work into a queue and awaits its future.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from broker_free import frames
from broker_free.errors import (
    BrokerFreeError,
    InvalidInput,
    NodeClosed,
    NodeInUse,
    PairingRefused,
    TimedOut,
    UnsuitableHome,
)
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.message import Envelope, Message, check_message, new_id
from broker_free.presence import Presence, State
from broker_free.registry import Entry, Registry
from broker_free.security import Invitation, KeyPair, load_or_create_keys, node_id_of
from broker_free.store import Member, Reader, Store
from broker_free.subject import check_pattern, matches
from broker_free.tick import Effect, Outcome, Publish, Tick, Transact, Tx, Work
from broker_free.transport import Beat, Closed, Connected, Received, Transport, new_keypair, public_of

if TYPE_CHECKING:
    import peewee

log = logging.getLogger("broker_free")

T = TypeVar("T")

_JOIN_USER: Final = "join:"  # user id of a connection that holds a one-time key and may only send JOIN
_WORK_MAX: Final = 20_000  # waiting operations; a caller beyond that waits until some are done
_SLOW_MS: Final = 50  # a transactional function that takes longer holds up everybody
_HOUSEKEEPING_MS: Final = 5_000
_PRUNE_MS: Final = 3_600_000
_JOIN_TIMEOUT_S: Final = 10.0
_FIRST_SESSION_S: Final = 3.0

Link = Literal["open", "closed"]


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


class Receipt:
    """A publish that is on disk here. Follow it to the disks of its recipients."""

    __slots__ = ("_dead", "_followers", "_waiting", "id", "recipients")

    def __init__(self, message_id: str, recipients: Sequence[str]) -> None:
        self.id = message_id
        self.recipients = tuple(recipients)  # node ids it was queued for
        self._waiting = set(recipients)
        self._dead: dict[str, str] = {}
        self._followers: list[asyncio.Future[None]] = []

    async def delivered(self, timeout: float | None = None) -> None:
        """Wait until every recipient holds the message on disk; `timeout` is in seconds.

        Raises TimedOut when that has not happened yet (the message stays queued), InvalidInput when a recipient
        refused it for good or its time ran out, NodeClosed when this node ends before it knows.
        """
        try:
            if self._waiting:
                follower: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._followers.append(follower)
                if timeout is None:
                    await follower
                else:  # not wait_for, which loses a cancellation on Python 3.11
                    async with asyncio.timeout(timeout):
                        await follower
        except TimeoutError:
            raise TimedOut(
                f"{len(self._waiting)} of {len(self.recipients)} recipients have not confirmed yet",
                hint="the message stays queued and leaves when they can be reached",
            ) from None
        if self._dead:
            peer, reason = next(iter(self._dead.items()))
            raise InvalidInput(f"{peer} refused the message: {reason}")

    def acked_by(self, peer: str) -> bool:
        """Take in one recipient's answer. Returns whether it was the last."""
        self._waiting.discard(peer)
        if self._waiting:
            return False
        for follower in self._followers:
            _succeed(follower, None)
        self._followers.clear()
        return True

    def refused_by(self, peer: str, reason: str) -> bool:
        self._dead[peer] = reason
        return self.acked_by(peer)

    def fail(self, error: BaseException) -> None:
        """Tell those who wait that this node will not learn of it any more."""
        for follower in self._followers:
            _fail(follower, error)
        self._followers.clear()


class Job:
    """A message handed to one durable consumer. It comes back unless it is acked."""

    def __init__(self, subscription: Subscription, envelope: Envelope, attempts: int) -> None:
        self.envelope = envelope
        self.attempts = attempts  # earlier tries
        self._subscription = subscription

    @property
    def subject(self) -> str:
        return self.envelope.subject

    @property
    def body(self) -> bytes:
        return self.envelope.body

    async def ack(self) -> None:
        """Say that the work is done. Returns once that is on disk."""
        await self._subscription.settle(self)

    async def nak(self, delay_ms: int = 0) -> None:
        """Give it back, to be handed out again after a delay."""
        await self._subscription.give_back(self, delay_ms)


class Subscription:
    """A durable consumer: an async context manager and an async iterator over jobs, oldest first."""

    def __init__(self, node: Node, pattern: str, durable: str) -> None:
        check_pattern(pattern)
        self.pattern = pattern
        self._node = node
        self._durable = durable
        self._consumer = 0
        self._fetched: deque[Job] = deque()
        self._leased: set[int] = set()  # rows handed out: memory only, so a crash hands them out again
        self._wake = asyncio.Event()

    async def __aenter__(self) -> Subscription:
        self._consumer = await self._node._open_consumer(self, self._durable)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._node._close_consumer(self)

    def __aiter__(self) -> AsyncIterator[Job]:
        return self

    async def __anext__(self) -> Job:
        while not self._fetched:
            self._wake.clear()
            await self._fetch()
            if not self._fetched:
                # Delayed jobs become due without anything arriving.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._wake.wait()
        return self._fetched.popleft()

    def notify(self) -> None:
        self._wake.set()

    async def settle(self, job: Job) -> None:
        await self._node._settle_job(self._consumer, job.envelope.row)
        self._leased.discard(job.envelope.row)

    async def give_back(self, job: Job, delay_ms: int) -> None:
        await self._node._return_job(self._consumer, job.envelope.row, delay_ms)
        self._leased.discard(job.envelope.row)
        self._wake.set()

    async def _fetch(self) -> None:
        for envelope, attempts in await self._node._fetch_jobs(self._consumer, set(self._leased)):
            self._leased.add(envelope.row)
            self._fetched.append(Job(self, envelope, attempts))


class Node:
    """One member of the mesh. Use it as an async context manager, from one event loop."""

    def __init__(
        self,
        name: str,
        *,
        home: Path | str,
        listen: str = "tcp://127.0.0.1:0",
        limits: Limits | None = None,
        models: Sequence[type[peewee.Model]] = (),
    ) -> None:
        self.name = name
        self.home = Path(home)
        self.node_id = ""
        self.endpoints: list[str] = []
        self.boot = secrets.randbits(63)
        self.limits = limits or Limits()
        self._listen = listen
        self._models = tuple(models)
        self._effects: list[tuple[str, Effect]] = []
        self._owner: _Owner | None = None
        self._views: dict[str, PeerView] = {}
        self._registry = Registry("")
        self._receipts: dict[str, Receipt] = {}  # not yet answered by all; as many as outboxes hold at most
        self._futures: dict[Work, asyncio.Future[Any]] = {}  # Any: each transact has its own result
        self._subscriptions: list[Subscription] = []
        self._on_delivered: list[Callable[[list[tuple[str, str]]], None]] = []
        self._on_dead: list[Callable[[list[tuple[str, str, str]]], None]] = []
        self._on_peer: list[Callable[[PeerView], None]] = []
        self._on_failed: list[Callable[[BaseException], None]] = []
        self._on_registry: list[tuple[str, Callable[[list[Entry]], None]]] = []
        self._room = asyncio.Event()
        self._readers: ThreadPoolExecutor | None = None
        self._reader_state = threading.local()
        self._open_readers: list[Reader] = []

    # -- set-up, before start -------------------------------------------------------------------------------

    def effect(self, pattern: str, fn: Effect) -> None:
        """Run `fn(tx, envelope)` for each message of a pattern, inside the transaction that accepts it.

        A plain function, short and without I/O. What it writes to this node's store happens exactly once.
        """
        assert self._owner is None, "effects are registered before the start"
        self._effects.append((pattern, fn))

    def on_delivered(self, fn: Callable[[list[tuple[str, str]]], None]) -> None:
        """Call `fn([(message id, peer)])` on the loop when peers confirm that they hold messages on disk."""
        self._on_delivered.append(fn)

    def on_dead(self, fn: Callable[[list[tuple[str, str, str]]], None]) -> None:
        """Call `fn([(message id, peer, reason)])` on the loop when a message can never be delivered."""
        self._on_dead.append(fn)

    def on_peer(self, fn: Callable[[PeerView], None]) -> None:
        """Call `fn(view)` on the loop when a peer's presence changes."""
        self._on_peer.append(fn)

    def on_registry(self, bucket: str, fn: Callable[[list[Entry]], None]) -> None:
        """Call `fn(entries)` on the loop after entries of a bucket changed, here or at a peer."""
        self._on_registry.append((bucket, fn))

    def on_failed(self, fn: Callable[[BaseException], None]) -> None:
        """Call `fn(error)` on the loop when the owner thread has ended by an error. Only a new node helps then."""
        self._on_failed.append(fn)

    # -- life -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the home, open the store, bind the sockets. Raises NodeInUse, UnsuitableHome, AddressInUse."""
        assert self._owner is None, "a node starts once"
        self._room.set()
        owner = _Owner(self, asyncio.get_running_loop())
        await owner.start(self._listen, self._models, self._effects)
        self._owner = owner
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="bf-read", initializer=self._open_reader)

    async def close(self) -> None:
        """Stop cleanly. What was accepted stays; what waits is sent when a node opens this home again."""
        owner, self._owner = self._owner, None
        if owner is None:
            return
        if self._readers:
            await asyncio.to_thread(self._readers.shutdown)
        for reader in self._open_readers:
            reader.discard()
        await (
            owner.stop()
        )  # last: the connection that writes empties the write-ahead log when no other is open
        self._abandon(NodeClosed("the node has been closed"))

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- messages -------------------------------------------------------------------------------------------

    async def publish(
        self,
        subject: str,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        to: Sequence[str] | None = None,
        ttl_ms: int | None = None,
        message_id: str | None = None,
    ) -> Receipt:
        """Queue a message durably and return once it is on disk here.

        `to` names node ids (this node's own included, if wanted); without it the recipients are all members whose
        interest covers the subject now, offline ones too. Raises InvalidInput, UnknownPeer, OutboxFull, StoreFailed;
        OutcomeUnknown when the commit failed after the message may have left.
        """
        message = Message(
            id=message_id or new_id(_utc_ms()), subject=subject, body=body, headers=headers or {}
        )
        meta = check_message(message, self.limits)
        work = Publish(
            message=message,
            meta=meta,
            recipients=to,
            ttl_ms=ttl_ms,
            may_repeat=message_id is not None,
        )
        receipt: Receipt = await self._submit(work)
        return receipt

    def subscribe(self, pattern: str, *, durable: str) -> Subscription:
        """Consume messages of a pattern under a durable name: `async with` opens it, `async for` yields jobs."""
        return Subscription(self, pattern, durable)

    async def transact(self, fn: Callable[..., T], *args: Any) -> T:  # Any: handed through to fn
        """Run `fn(tx, *args)` in the owner thread, inside one transaction, and return after it is on disk.

        `fn` is a plain function. If it raises, what it wrote is undone and the exception comes out here. A
        cancelled await does not undo it.
        """
        result: T = await self._submit(Transact(fn=_watched, args=(fn, *args)))
        return result

    async def read(self, fn: Callable[..., T], *args: Any) -> T:  # Any: handed through to fn
        """Run `fn(db, *args)` in a reading thread on a read-only connection; models read through it too."""
        if self._readers is None:
            raise NodeClosed("the node is not running")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, fn, args)

    def registry(self, bucket: str) -> list[Entry]:
        """Return the live entries of a bucket, one for each key and writer."""
        return self._registry.bucket(bucket)

    # -- the mesh -------------------------------------------------------------------------------------------

    def peers(self) -> list[PeerView]:
        return sorted(self._views.values(), key=lambda view: (view.name, view.node_id))

    async def refused(self) -> dict[str, int]:
        """Count what the sockets have turned away since the start, by reason."""
        return await self._running().ask(lambda owner: owner.refused())

    async def invite(self, *, ttl_ms: int = 900_000, address: str | None = None) -> Invitation:
        """Make a one-time invitation. `address` (HOST:PORT) replaces the addresses found by themselves."""
        owner = self._running()
        if not 0 < ttl_ms <= 86_400_000:
            raise InvalidInput("an invitation lasts between a moment and a day")
        keys = new_keypair()
        expires_ms = _utc_ms() + ttl_ms
        invitation = Invitation(
            endpoints=tuple([_endpoint_of(address)] if address else owner.reachable_at()),
            server_key=owner.keys.public,
            secret=keys.secret,
            expires_ms=expires_ms,
        )
        await self.transact(owner.save_invitation, keys.public, expires_ms)
        log.info("invitation made", extra={"expires_ms": expires_ms})
        return invitation

    async def join(self, code: str) -> PeerView:
        """Join the mesh of the node that made this code. Raises InvalidInput, PairingRefused, TimedOut."""
        owner = self._running()
        invitation = Invitation.decode(code)
        if invitation.server_key == owner.keys.public:
            raise PairingRefused("this code was made by this very node", hint="use it on the other machine")
        member = await owner.join(invitation)
        await self._linked(member.node_id)
        return self._views[member.node_id]

    async def _linked(self, peer: str) -> None:
        """Give the first session with a new peer a moment to open, so that what is shown next is true."""
        is_open = asyncio.Event()

        def look(view: PeerView) -> None:
            if view.node_id == peer and view.link == "open":
                is_open.set()

        self._on_peer.append(look)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_SESSION_S):
                    await is_open.wait()
        finally:
            self._on_peer.remove(look)

    # -- between loop and owner -----------------------------------------------------------------------------

    def _running(self) -> _Owner:
        if self._owner is None:
            raise NodeClosed("the node is not running")
        return self._owner

    async def _submit(self, work: Work) -> Any:  # Any: the work's own result
        owner = self._running()
        while len(self._futures) >= _WORK_MAX:
            self._room.clear()
            await self._room.wait()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._futures[work] = future
        owner.submit(work)
        return await future  # a caller that is cancelled leaves; the work is done all the same

    def _take(self, outcome: Outcome) -> None:
        """Take in what a tick has to tell. Runs on the loop, once a tick."""
        for work, result in outcome.results:
            if isinstance(work, Publish):
                receipt = Receipt(work.message.id, result)
                if result:
                    self._receipts[receipt.id] = receipt
                self._resolve(work, receipt, None)
            else:
                self._resolve(work, result, None)
        for work, error in outcome.failures:
            self._resolve(work, None, error)
        for message_id, peer in outcome.delivered:
            found = self._receipts.get(message_id)
            if found is not None and found.acked_by(peer):
                del self._receipts[message_id]
        for message_id, peer, reason in outcome.dead:
            found = self._receipts.get(message_id)
            if found is not None and found.refused_by(peer, reason):
                del self._receipts[message_id]
        for subscription in self._subscriptions:
            if any(matches(subscription.pattern, envelope.subject) for envelope in outcome.arrivals):
                subscription.notify()
        self._registry.apply(outcome.entries)
        calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(fn, ()) for fn in outcome.callbacks]
        if outcome.delivered:
            calls += [(fn, (outcome.delivered,)) for fn in self._on_delivered]
        if outcome.dead:
            calls += [(fn, (outcome.dead,)) for fn in self._on_dead]
        for bucket, fn in self._on_registry:
            entries = [entry for entry in outcome.entries if entry.bucket == bucket]
            if entries:
                calls.append((fn, (entries,)))
        self._call(calls)
        self._room.set()

    def _take_views(self, views: list[PeerView], gone: list[str]) -> None:
        for node_id in gone:
            self._views.pop(node_id, None)
        for view in views:
            self._views[view.node_id] = view
        self._call([(fn, (view,)) for view in views for fn in self._on_peer])

    def _resolve(self, work: Work, result: Any, error: BaseException | None) -> None:
        future = self._futures.pop(work, None)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
            future.exception()  # a caller that was cancelled has nobody left to hear it

    @staticmethod
    def _call(calls: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        for fn, args in calls:
            try:
                fn(*args)
            except Exception:
                log.exception("a callback failed")  # one listener must not silence the others

    def _died(self, error: BaseException) -> None:
        """The owner thread has ended by an error. Nothing accepted is lost; nothing more is accepted."""
        self._abandon(NodeClosed(f"the node has failed: {error}", hint="see its log, then start it again"))
        self._call([(fn, (error,)) for fn in self._on_failed])

    def _abandon(self, error: NodeClosed) -> None:
        """Answer everybody who waits, because nothing more will come."""
        for future in self._futures.values():
            _fail(future, error)
            future.exception()  # a caller that was cancelled has nobody left to hear it
        self._futures.clear()
        for receipt in self._receipts.values():
            receipt.fail(error)
        self._receipts.clear()

    # -- durable consumers ----------------------------------------------------------------------------------

    async def _open_consumer(self, subscription: Subscription, durable: str) -> int:
        owner = self._running()
        number = await self.transact(owner.open_consumer, durable, subscription.pattern)
        self._subscriptions.append(subscription)
        return number

    def _close_consumer(self, subscription: Subscription) -> None:
        self._subscriptions.remove(subscription)

    async def _fetch_jobs(self, consumer: int, leased: set[int]) -> list[tuple[Envelope, int]]:
        return await self._running().ask(lambda owner: owner.fetch_jobs(consumer, leased))

    async def _settle_job(self, consumer: int, row: int) -> None:
        await self.transact(self._running().settle_job, consumer, row)

    async def _return_job(self, consumer: int, row: int, delay_ms: int) -> None:
        await self.transact(self._running().return_job, consumer, row, delay_ms)

    # -- readers --------------------------------------------------------------------------------------------

    def _open_reader(self) -> None:
        reader = Reader(self.home / "store.db")
        self._reader_state.db = reader.open()
        self._open_readers.append(reader)

    def _read(self, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        return fn(self._reader_state.db, *args)


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """Something to do in the owner thread between transactions."""

    fn: Callable[[_Owner], Any]
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Joining:
    conn: int
    invitation: Invitation
    future: asyncio.Future[Member]


class _Owner:
    """The owner thread: the only one that touches sockets and the writing connection."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop) -> None:
        self.keys: KeyPair
        self._node = node
        self._loop = loop
        self._limits = node.limits
        self._queue: deque[Work | _Question] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="bf-owner", daemon=True)
        self._started: asyncio.Future[None] = loop.create_future()
        self._stopped = asyncio.Event()
        self._has_ended = False
        self._lock_fd = -1
        self._store: Store
        self._transport: Transport
        self._tick: Tick
        self._presence = Presence(node.limits)
        self._members: dict[str, Member] = {}
        self._by_key: dict[bytes, str] = {}  # public key -> node id
        self._invited: dict[bytes, int] = {}  # one-time public key -> expiry, UTC
        self._joining: _Joining | None = None
        self._beat_endpoint = ""
        self._dial_turn: dict[str, int] = {}
        self._rtt: dict[str, float] = {}
        self._seen_ms: dict[str, int] = {}
        self._beat_due_ms = 0
        self._housekeeping_due_ms = 0
        self._prune_due_ms = 0  # UTC
        self._dirty: set[str] = set()  # peers whose view has changed

    # -- called on the loop ---------------------------------------------------------------------------------

    async def start(
        self, listen: str, models: Sequence[type[peewee.Model]], effects: Sequence[tuple[str, Effect]]
    ) -> None:
        self._setup = (listen, models, effects)
        self._thread.start()
        await self._started

    async def stop(self) -> None:
        self._stopping = True
        self._transport.wake()
        await self._stopped.wait()
        self._thread.join()

    def submit(self, work: Work) -> None:
        if self._has_ended:
            raise NodeClosed("the node has failed", hint="see its log, then start it again")
        self._queue.append(work)
        self._transport.wake()

    def _later(self, fn: Callable[[_Owner], object]) -> None:
        """Have the owner thread run `fn(owner)` between transactions; nobody waits for it."""
        self._queue.append(_Question(fn, self._loop.create_future()))
        self._transport.wake()

    async def ask(self, fn: Callable[[_Owner], T]) -> T:
        """Run `fn(owner)` in the owner thread, between transactions."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.append(_Question(fn, future))
        self._transport.wake()
        return await future

    async def join(self, invitation: Invitation) -> Member:
        future: asyncio.Future[Member] = self._loop.create_future()
        try:
            for endpoint in invitation.endpoints:
                await self.ask(lambda owner, at=endpoint: owner._begin_join(at, invitation, future))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_JOIN_TIMEOUT_S / len(invitation.endpoints)):
                        return await asyncio.shield(future)
        finally:
            await self.ask(lambda owner: owner._end_join(future))
        raise TimedOut(
            f"nobody answered at {', '.join(invitation.endpoints)}",
            hint="is the other node running and its port reachable from here? the code stays valid",
        )

    def refused(self) -> dict[str, int]:
        return dict(self._transport.refused)

    def reachable_at(self) -> list[str]:
        """Return the endpoints at which another machine may reach this node, the likeliest first."""
        return [one for endpoint in self._node.endpoints for one in _reachable(endpoint)]

    # -- transactional functions (run inside a tick) --------------------------------------------------------

    def save_invitation(self, tx: Tx, public_key: bytes, expires_ms: int) -> None:
        self._store.save_invitation(public_key, expires_ms)
        self._invited[public_key] = expires_ms

    def open_consumer(self, tx: Tx, durable: str, pattern: str) -> int:
        number = self._store.consumer_open(durable, pattern)
        self._tick.add_interest(pattern)
        return number

    def settle_job(self, tx: Tx, consumer: int, row: int) -> None:
        self._store.job_done(consumer, row)

    def return_job(self, tx: Tx, consumer: int, row: int, delay_ms: int) -> None:
        self._store.job_again(consumer, row, tx.now_ms + delay_ms)

    def fetch_jobs(self, consumer: int, leased: set[int]) -> list[tuple[Envelope, int]]:
        return self._store.jobs(
            consumer, now_ms=_utc_ms(), limit=self._limits.credit_messages, leave_out=leased
        )

    # -- the thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._open()
        except BaseException as error:  # noqa: BLE001  whatever it is, start() must raise it
            self._release()
            self._tell(_fail, self._started, error)
            self._tell(self._stopped.set)
            return
        self._tell(_succeed, self._started, None)
        try:
            self._loop_until_stopped()
        except BaseException as error:  # the last that can say why
            log.exception("the node has failed")
            self._tell(self._node._died, error)
        finally:
            self._has_ended = True
            self._release()
            self._tell(self._stopped.set)

    def _open(self) -> None:
        listen, models, effects = self._setup
        node = self._node
        _make_private(node.home)
        self._lock_fd = _lock(node.home / "node.lock")
        self.keys = load_or_create_keys(node.home / "node.keys", new_keypair)
        node.node_id = node_id_of(self.keys.public)
        self._store = Store(node.home / "store.db", me=node.node_id, limits=self._limits, models=models)
        self._store.open()
        self._transport = Transport(keys=self.keys, admit=self._admit, limits=self._limits)
        endpoint, self._beat_endpoint = self._transport.bind(listen)
        node.endpoints = [endpoint]
        entries = self._store.registry_load()
        self._tick = Tick(
            me=node.node_id,
            boot=node.boot,
            about=self._about,
            journal=self._store,
            wire=self,
            limits=self._limits,
            random=random.Random(secrets.randbits(64)),
            registry=Registry(node.node_id, entries),
        )
        for pattern, fn in effects:
            self._tick.add_effect(pattern, fn)
        self._store.has_effect = self._tick.effects_of
        for pattern in self._store.patterns():
            self._tick.add_interest(pattern)
        node._registry = Registry(node.node_id, entries)
        self._invited = self._store.invitations()
        for member in self._store.members():
            self._tick.interests[member.node_id] = member.interests
            if member.seen_ms:
                self._seen_ms[member.node_id] = member.seen_ms
            self._admit_member(member)
        self._tell_views()

    def _release(self) -> None:
        if (transport := getattr(self, "_transport", None)) is not None:
            transport.close_all()
        if (store := getattr(self, "_store", None)) is not None:
            store.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def _loop_until_stopped(self) -> None:
        timeout_ms = 0
        while True:
            before_ms = _mono_ms()
            events = self._transport.poll(timeout_ms)
            now_ms = _mono_ms()
            self._presence.lagged(now_ms - before_ms - timeout_ms, now_ms)
            is_last = self._stopping
            self._tick.start(now_ms=now_ms, utc_ms=_utc_ms())
            for event in events:
                self._on_event(event, now_ms)
            work = self._take_work()
            outcome = self._tick.run(work)
            self._follow(outcome)
            if is_last and not self._queue:
                self._tick.close()
                return
            self._keep_house(now_ms)
            timeout_ms = 0 if self._queue else self._sleep_ms()

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
            self._tell(_succeed, question.future, question.fn(self))
        except BrokerFreeError as error:
            self._tell(_fail, question.future, error)

    def _on_event(self, event: Connected | Closed | Received | Beat, now_ms: int) -> None:
        match event:
            case Received(conn, user_id, parts):
                self._on_frames(conn, user_id, parts, now_ms)
            case Connected(conn):
                if self._joining and self._joining.conn == conn:
                    self._say_join(self._joining)
                else:
                    self._tick.connected(conn)
            case Closed(conn, reason):
                if self._joining and self._joining.conn == conn:
                    self._join_closed(self._joining, reason)
                else:
                    self._tick.closed(conn, reason)
            case Beat(parts):
                self._on_beat(parts, now_ms)

    def _on_frames(self, conn: int, user_id: str, parts: list[bytes], now_ms: int) -> None:
        try:
            frame = frames.decode(parts, self._limits)
        except InvalidInput as error:
            log.warning("frame dropped", extra={"peer": user_id, "reason": error.message})
            return
        if self._joining and self._joining.conn == conn:
            self._on_join_ok(self._joining, frame)
        elif user_id.startswith(_JOIN_USER):
            self._on_join(conn, bytes.fromhex(user_id.removeprefix(_JOIN_USER)), frame)
        else:
            peer = user_id or self._tick.peer_of(conn)
            if peer in self._members:
                self._heard(peer, now_ms)
                self._tick.frame(peer, conn, frame)

    def _follow(self, outcome: Outcome) -> None:
        """Draw this side's conclusions from a tick, then tell the loop."""
        for peer, opened in outcome.opened:
            self._rtt[peer] = float(opened.rtt_ms)
            self._note_whereabouts(peer, opened.about)
            self._dirty.add(peer)
            log.info("session open", extra={"peer": peer, "peer_name": self._members[peer].name})
        for peer, reason in outcome.lost:
            self._dirty.add(peer)
            log.info("session lost", extra={"peer": peer, "reason": reason})
        if (
            outcome.results
            or outcome.failures
            or outcome.delivered
            or outcome.dead
            or outcome.arrivals
            or outcome.callbacks
            or outcome.entries
        ):
            self._tell(self._node._take, outcome)
        if self._dirty:
            self._tell_views()

    def _keep_house(self, now_ms: int) -> None:
        if now_ms >= self._beat_due_ms:
            self._beat_due_ms = now_ms + self._limits.heartbeat_ms
            self._transport.beat(
                [json.dumps({"node_id": self._node.node_id, "boot": self._node.boot}).encode()]
            )
            for peer, state in self._presence.changes(now_ms):
                self._dirty.add(peer)
                if state == "suspect":
                    self._tick.ping(peer)
            if self._dirty:
                self._tell_views()
        if now_ms >= self._housekeeping_due_ms:
            self._housekeeping_due_ms = now_ms + _HOUSEKEEPING_MS
            utc_ms = _utc_ms()
            is_over = any(utc_ms >= expires_ms for expires_ms in self._invited.values())
            # An idle node writes nothing: a laptop's disk may sleep.
            if is_over or utc_ms >= self._prune_due_ms or self._store.has_expired(utc_ms):
                self._queue.append(Transact(fn=self._clean_up))

    def _clean_up(self, tx: Tx) -> None:
        """One slice of house-keeping, inside a transaction."""
        if tx.now_ms >= self._prune_due_ms and not self._store.prune(tx.now_ms):
            self._prune_due_ms = tx.now_ms + _PRUNE_MS
        for peer, link in self._tick.links.items():
            for message_id in self._store.expire(peer, beyond_row=link.cursor, now_ms=tx.now_ms):
                self._tell(self._node._take, Outcome(dead=[(message_id, peer, "expired")]))
        for public_key, expires_ms in list(self._invited.items()):
            if tx.now_ms >= expires_ms:
                self._store.strike_invitation(public_key)
                del self._invited[public_key]
        for peer, seen_ms in self._seen_ms.items():
            self._store.save_seen(peer, seen_ms)

    def _sleep_ms(self) -> int:
        due_ms = min(self._tick.next_wake_ms(), self._beat_due_ms, self._housekeeping_due_ms)
        return max(0, due_ms - _mono_ms())

    def _tell(self, fn: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(fn, *args)

    # -- the wire, as the tick sees it ----------------------------------------------------------------------

    def send(self, conn: int, frame: Frame) -> bool:
        return self._transport.send(conn, frames.encode(frame))

    def close(self, conn: int) -> None:
        self._transport.close(conn)

    def dial(self, peer: str) -> int | None:
        member = self._members[peer]
        if not member.endpoints:
            return None
        turn = self._dial_turn.get(peer, 0)
        self._dial_turn[peer] = turn + 1
        endpoint = member.endpoints[turn % len(member.endpoints)]
        try:
            return self._transport.dial(endpoint, server_key=member.public_key)
        except InvalidInput as error:
            log.warning("cannot dial", extra={"peer": peer, "reason": error.message})
            return None

    # -- members and presence -------------------------------------------------------------------------------

    def _admit(self, public_key: bytes) -> str | None:
        """Answer ZAP: the user id for a key, or None. Looked up at every handshake; anything unknown is refused."""
        node_id = self._by_key.get(public_key)
        if node_id is not None:
            return node_id
        if self._invited.get(public_key, 0) > _utc_ms():
            return _JOIN_USER + public_key.hex()
        log.warning("handshake refused", extra={"reason": "unknown key"})
        return None

    def _admit_member(self, member: Member) -> None:
        known = self._members.get(member.node_id)
        self._members[member.node_id] = member
        self._by_key[member.public_key] = member.node_id
        self._tick.add_peer(member.node_id)
        if known and known.beat_endpoint and known.beat_endpoint != member.beat_endpoint:
            self._transport.unwatch(known.beat_endpoint)
        if member.beat_endpoint and (known is None or known.beat_endpoint != member.beat_endpoint):
            self._transport.watch(member.beat_endpoint, server_key=member.public_key)
        self._dirty.add(member.node_id)

    def _note_whereabouts(self, peer: str, about: Mapping[str, Any]) -> None:
        """Take in what a peer said of itself in its greeting."""
        said = _member_from(about, node_id=peer, public_key=self._members[peer].public_key)
        known = self._members[peer]
        self._seen_ms[peer] = _utc_ms()
        if said is None or (said.name, said.endpoints, said.beat_endpoint) == (
            known.name,
            known.endpoints,
            known.beat_endpoint,
        ):
            return
        self._admit_member(replace(said, interests=known.interests))
        self._queue.append(
            Transact(
                fn=lambda tx: self._store.save_whereabouts(
                    peer,
                    name=said.name,
                    endpoints=said.endpoints,
                    beat_endpoint=said.beat_endpoint,
                    now_ms=tx.now_ms,
                )
            )
        )

    def _on_beat(self, parts: list[bytes], now_ms: int) -> None:
        try:
            beat = json.loads(parts[0]) if len(parts) == 1 and len(parts[0]) <= 1_024 else {}
        except ValueError:
            return
        peer = beat.get("node_id") if isinstance(beat, dict) else None
        if isinstance(peer, str) and peer in self._members:
            self._heard(peer, now_ms)
            link = self._tick.links[peer]
            if not link.is_open:
                link.redial_now()  # it is there: no reason to wait out the back-off

    def _heard(self, peer: str, now_ms: int) -> None:
        was_alive = self._presence.state(peer) == "alive"
        self._presence.heard(peer, now_ms)
        self._seen_ms[peer] = _utc_ms()
        if not was_alive:
            self._dirty.update(one for one, _ in self._presence.changes(now_ms))

    def _tell_views(self) -> None:
        views = [self._view(self._members[peer]) for peer in self._dirty if peer in self._members]
        gone = [peer for peer in self._dirty if peer not in self._members]
        self._dirty.clear()
        self._tell(self._node._take_views, views, gone)

    def _view(self, member: Member) -> PeerView:
        link = self._tick.links[member.node_id]
        return PeerView(
            node_id=member.node_id,
            name=member.name,
            state=self._presence.state(member.node_id),
            link="open" if link.is_open else "closed",
            rtt_ms=self._rtt.get(member.node_id),
            last_seen_ms=self._seen_ms.get(member.node_id),
            endpoints=member.endpoints,
        )

    def _about(self) -> dict[str, Any]:
        return {"name": self._node.name, "endpoints": self.reachable_at(), "beat": self._reachable_beat()}

    def _reachable_beat(self) -> str:
        return next(iter(_reachable(self._beat_endpoint)), "")

    # -- pairing --------------------------------------------------------------------------------------------

    def _begin_join(self, endpoint: str, invitation: Invitation, future: asyncio.Future[Member]) -> None:
        if self._joining is not None and self._joining.future is not future:
            raise PairingRefused("another join is under way on this node", hint="wait for it, then try again")
        self._end_join(future)
        keys = KeyPair(public=public_of(invitation.secret), secret=invitation.secret)
        conn = self._transport.dial(endpoint, server_key=invitation.server_key, keys=keys)
        self._joining = _Joining(conn, invitation, future)

    def _end_join(self, future: asyncio.Future[Member]) -> None:
        if self._joining is not None and self._joining.future is future:
            self._transport.close(self._joining.conn)
            self._joining = None

    def _say_join(self, joining: _Joining) -> None:
        frame = Frame(
            kind=frames.JOIN,
            meta={
                "node_id": self._node.node_id,
                "public_key": self.keys.public.decode(),
                "about": self._about(),
            },
        )
        self._transport.send(joining.conn, frames.encode(frame))

    def _join_closed(self, joining: _Joining, reason: str) -> None:
        self._joining = None
        if reason != "refused":
            return  # not reached: the next endpoint, or the time-out, says so
        is_over = _utc_ms() >= joining.invitation.expires_ms
        self._tell(
            _fail,
            joining.future,
            PairingRefused(
                f"the other node refused this code: {'it has expired' if is_over else 'used before, or expired'}",
                hint="make a new one there: each code works once and for a short time",
            ),
        )

    def _on_join(self, conn: int, one_time_key: bytes, frame: Frame) -> None:
        """Serve a connection that holds a one-time key. Its only right is one JOIN."""
        if frame.kind != frames.JOIN:
            return
        member = _member_from(frame.meta.get("about"), node_id="", public_key=b"")
        try:
            public_key = str(frame.meta.get("public_key")).encode()
            node_id = node_id_of(public_key)
        except InvalidInput:
            member = None
        if member is None or node_id != frame.meta.get("node_id") or node_id == self._node.node_id:
            self._refuse_join(conn, "malformed JOIN")
            return
        if self._invited.get(one_time_key, 0) <= _utc_ms():
            self._refuse_join(conn, "this invitation has been used or is over")
            return
        member = replace(member, node_id=node_id, public_key=public_key)
        self._queue.append(Transact(fn=self._accept_join, args=(conn, one_time_key, member)))

    def _accept_join(self, tx: Tx, conn: int, one_time_key: bytes, member: Member) -> None:
        """Strike the key and take in the member, in one transaction; the answer leaves after it."""
        if not self._store.strike_invitation(one_time_key):
            self._refuse_join(conn, "this invitation has been used or is over")
            return
        self._store.save_member(member, tx.now_ms)
        tx.after_commit(lambda: self._later(lambda owner: owner._welcome(conn, one_time_key, member)))

    def _welcome(self, conn: int, one_time_key: bytes, member: Member) -> None:
        """A member that joined is on disk: let it in and answer."""
        self._invited.pop(one_time_key, None)
        self._admit_member(member)
        # It does not know us before the answer, so it is the one to dial.
        self._tick.links[member.node_id].dial_failed(_mono_ms())
        about = {"node_id": self._node.node_id, "about": self._about(), "members": []}
        self.send(conn, Frame(kind=frames.JOIN_OK, meta=about))
        log.info("member joined", extra={"peer": member.node_id, "peer_name": member.name})

    def _refuse_join(self, conn: int, reason: str) -> None:
        log.warning("join refused", extra={"reason": reason})
        self.send(conn, Frame(kind=frames.BYE, meta={"reason": reason}))

    def _on_join_ok(self, joining: _Joining, frame: Frame) -> None:
        public_key = joining.invitation.server_key
        if frame.kind == frames.BYE:
            self._end_join(joining.future)
            reason = str(frame.meta.get("reason", "no reason given"))[:200]
            self._tell(
                _fail,
                joining.future,
                PairingRefused(f"the other node refused: {reason}", hint="make a new code"),
            )
            return
        member = _member_from(frame.meta.get("about"), node_id=node_id_of(public_key), public_key=public_key)
        if frame.kind != frames.JOIN_OK or member is None:
            return
        if not member.endpoints:
            member = replace(member, endpoints=joining.invitation.endpoints)
        self._end_join(joining.future)
        future = joining.future

        def save(tx: Tx) -> None:
            self._store.save_member(member, tx.now_ms)
            tx.after_commit(lambda: self._later(lambda owner: owner._joined(member, future)))

        self._queue.append(Transact(fn=save))

    def _joined(self, member: Member, future: asyncio.Future[Member]) -> None:
        """The inviter is on disk here: it counts as a member from now on."""
        self._admit_member(member)
        self._tell_views()
        self._tell(_succeed, future, member)


def _member_from(about: object, *, node_id: str, public_key: bytes) -> Member | None:
    """Read what a node says of itself. None when it is not of the right shape."""
    if not isinstance(about, Mapping):
        return None
    name, endpoints, beat = about.get("name"), about.get("endpoints"), about.get("beat", "")
    if not isinstance(name, str) or not isinstance(beat, str) or not isinstance(endpoints, list):
        return None
    if len(endpoints) > 16 or not all(isinstance(one, str) and len(one) <= 255 for one in [*endpoints, beat]):
        return None
    if not 0 < len(name) <= 64 or not name.isprintable():
        return None
    return Member(
        node_id=node_id, name=name, public_key=public_key, endpoints=tuple(endpoints), beat_endpoint=beat
    )


def _endpoint_of(address: str) -> str:
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise InvalidInput(f"{address!r} is not HOST:PORT", hint="for example 192.0.2.7:7420")
    return f"tcp://{host}:{port}"


def _reachable(endpoint: str) -> list[str]:
    """Replace the wildcard host by the addresses that other machines may use, then loopback."""
    if not endpoint:
        return []
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host not in ("0.0.0.0", "*", "[::]"):
        return [endpoint]
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: asks the routing table which address of ours faces the outside (192.0.2.0/24 is for examples).
        probe.connect(("192.0.2.1", 9))
        found.append(probe.getsockname()[0])
    return [f"tcp://{one}:{port}" for one in dict.fromkeys([*found, "127.0.0.1"])]


def _make_private(home: Path) -> None:
    """Make the folder, or refuse one that others could read or change."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.stat()
    except OSError as error:
        raise UnsuitableHome(f"cannot use {home}: {error.strerror}", hint="choose another folder") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UnsuitableHome(
            f"{home} is not private (mode {status.st_mode & 0o777:o}, owner {status.st_uid})",
            hint=f"chmod 700 {home}",
        )


def _lock(path: Path) -> int:
    """Take the home for this process. The kernel gives the lock back when the process ends, however it ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        pid = int(text) if text.isdigit() else None
        raise NodeInUse(f"already running, pid {pid or 'unknown'}", pid=pid) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _watched(tx: Tx, fn: Callable[..., T], *args: Any) -> T:
    """Run a caller's function and say so when it held up everybody else."""
    began = time.monotonic()
    result = fn(tx, *args)
    took_ms = int((time.monotonic() - began) * 1_000)
    if took_ms > _SLOW_MS:
        log.warning(
            "slow transaction",
            extra={"function": getattr(fn, "__qualname__", type(fn).__name__), "ms": took_ms},
        )
    return result


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _utc_ms() -> int:
    return time.time_ns() // 1_000_000


def _mono_ms() -> int:
    return time.monotonic_ns() // 1_000_000
