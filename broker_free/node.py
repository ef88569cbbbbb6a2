"""A node: the asyncio face over the owner thread (`owner.py`).

The loop side never touches a socket or the writing connection: it puts work into the owner's queue and awaits its
future. What a tick has to tell comes back in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from broker_free.blob import check_id
from broker_free.blobfiles import Blob
from broker_free.bucket import Bucket, Mirror
from broker_free.carrier import Waiter
from broker_free.clock import utc_ms
from broker_free.consumer import Lease
from broker_free.errors import (
    InvalidInput,
    NodeClosed,
    PairingRefused,
    TimedOut,
    TooLarge,
    TransactionMisused,
    UnknownMessage,
)
from broker_free.futures import fail, succeed
from broker_free.health import Health
from broker_free.limits import Limits
from broker_free.message import Envelope, Message, check_message, id_to_bytes, new_id
from broker_free.owner import Owner, PeerView, in_owner_thread
from broker_free.schema import Migrations
from broker_free.security import Invitation
from broker_free.store import Event, Reader, read_events
from broker_free.storefile import STORE, backup
from broker_free.subject import check_pattern, matches
from broker_free.subscription import Subscription
from broker_free.tick import Alarm, Effect, Outcome, Publish, Transact, Tx, Work
from broker_free.transport import new_keypair

if TYPE_CHECKING:
    import peewee

log = logging.getLogger("broker_free")

T = TypeVar("T")

_WORK_MAX: Final = 20_000  # waiting operations; a caller beyond that waits until some are done
_SLOW_S: Final = 0.05  # a transactional function that takes longer holds up everybody
_FIRST_SESSION_S: Final = 3.0


_ENDS: Final = {"delivered": "delivered", "cancelled": "cancelled", "expired": "expired"}


class Receipt:
    """A publish that is on disk here. Follow it to the disks of its recipients."""

    __slots__ = ("_dead", "_followers", "_undone", "_waiting", "_watchers", "id", "recipients")

    def __init__(
        self, message_id: str, recipients: Sequence[str], ended: Mapping[str, str] | None = None
    ) -> None:
        self.id = message_id
        self.recipients = tuple(recipients)  # node ids it was queued for, or waits for since an earlier try
        self._waiting = set(recipients)
        self._dead: dict[str, str] = dict(ended or {})
        self._followers: list[asyncio.Future[None]] = []
        self._undone = set(recipients)
        self._watchers: list[asyncio.Future[None]] = []

    def add(self, recipients: Sequence[str], ended: Mapping[str, str] | None) -> None:
        """The same message was published again, to others or to the same."""
        self._undone.update(set(recipients).difference(self.recipients))
        self.recipients = tuple(dict.fromkeys([*self.recipients, *recipients]))
        self._waiting.update(recipients)
        for peer, state in (ended or {}).items():
            self.refused_by(peer, state)

    async def done(self, timeout: float | None = None) -> None:
        """Wait until every recipient is done with a message that was published with `receipt=True`.

        Raises TimedOut when that has not happened yet, InvalidInput when one will never be (it refused the message, or
        gave it up after too many tries), NodeClosed when this node ends before it knows.
        """
        try:
            if self._undone:
                watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._watchers.append(watcher)
                async with asyncio.timeout(timeout):
                    await watcher
        except TimeoutError:
            raise TimedOut(
                f"{len(self._undone)} of {len(self.recipients)} recipients are not done with it yet",
                hint="their receipts come when they are, also after a restart: see on_receipt",
            ) from None
        if self._dead:
            peer, reason = next(iter(self._dead.items()))
            raise InvalidInput(f"{peer} is not done with the message and never will be: {reason}")

    def done_by(self, peer: str, state: str) -> bool:
        """Take in one recipient's receipt. Returns whether it was the last."""
        if state != "done":
            self._dead.setdefault(peer, state)
        self._undone.discard(peer)
        if self._undone:
            return False
        for watcher in self._watchers:
            succeed(watcher, None)
        self._watchers.clear()
        return True

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
            succeed(follower, None)
        self._followers.clear()
        return True

    def refused_by(self, peer: str, reason: str) -> bool:
        self._dead[peer] = reason
        return self.acked_by(peer)

    def fail(self, error: BaseException) -> None:
        """Tell those who wait that this node will not learn of it any more."""
        for follower in (*self._followers, *self._watchers):
            fail(follower, error)
        self._followers.clear()
        self._watchers.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancellation:
    """What became of a message that was withdrawn, for each of its recipients."""

    id: str
    states: Mapping[str, str]  # node id -> cancelled, delivered, revoking, queued, expired, dead

    @property
    def cancelled(self) -> tuple[str, ...]:
        """Who will never have it."""
        return tuple(peer for peer, state in self.states.items() if state == "cancelled")

    @property
    def held(self) -> tuple[str, ...]:
        """Who has it."""
        return tuple(peer for peer, state in self.states.items() if state == "delivered")

    @property
    def pending(self) -> tuple[str, ...]:
        """Who could not be asked yet."""
        return tuple(peer for peer, state in self.states.items() if state == "revoking")


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
        migrations: Migrations | None = None,
        advertise: Sequence[str] = (),
    ) -> None:
        """`models` are an application's tables in this node's store, `migrations` how they came to be so.

        `advertise` names the endpoints at which others reach this node, where it cannot know them by itself: behind
        a forwarded port, an address translation, a container.
        """
        self.name = name
        self.home = Path(home)
        self.node_id = ""
        self.endpoints: list[str] = []
        self.boot = secrets.randbits(63)
        self.limits = limits or Limits()
        self.advertise = tuple(_endpoint_of(one) for one in advertise)
        self._listen = listen
        self._models = tuple(models)
        self._migrations = migrations
        self._effects: list[tuple[str, Effect]] = []
        self._owner: Owner | None = None
        self._views: dict[str, PeerView] = {}
        self._entries = Mirror()
        self._undone: dict[str, Receipt] = {}  # of those that asked for receipts
        self._handlers: list[tuple[str, Callable[[Envelope], None]]] = []
        self._on_receipt: list[Callable[[list[tuple[str, str, str]]], None]] = []
        self.ephemerals_taken = 0  # how many `take` has seen: what waits for the loop is bounded
        self._receipts: dict[str, Receipt] = {}  # not yet answered by all; as many as outboxes hold at most
        self._futures: dict[Work, asyncio.Future[Any]] = {}  # Any: each transact has its own result
        self._subscriptions: list[Subscription] = []
        self._subscription_numbers = itertools.count(1)
        self._on_delivered: list[Callable[[list[tuple[str, str]]], None]] = []
        self._on_dead: list[Callable[[list[tuple[str, str, str]]], None]] = []
        self._cancelling: list[tuple[str, dict[str, str], asyncio.Event]] = []
        self._on_alarm: list[Callable[[Alarm], None]] = []
        self._on_peer: list[Callable[[PeerView], None]] = []
        self._health = Health()
        self._too_large: Counter[str] = Counter()
        self._on_health: list[Callable[[Health], None]] = []
        self._on_failed: list[Callable[[BaseException], None]] = []
        self._waiters: set[Waiter] = set()  # of fetches
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
        _check_plain(fn)
        self._effects.append((pattern, functools.partial(_watched, fn)))

    def on_delivered(self, fn: Callable[[list[tuple[str, str]]], None]) -> None:
        """Call `fn([(message id, peer)])` on the loop when peers confirm that they hold messages on disk."""
        self._on_delivered.append(fn)

    def on_dead(self, fn: Callable[[list[tuple[str, str, str]]], None]) -> None:
        """Call `fn([(message id, peer, reason)])` on the loop when a message can never be delivered."""
        self._on_dead.append(fn)

    def on_receipt(self, fn: Callable[[list[tuple[str, str, str]]], None]) -> None:
        """Call `fn([(message id, peer, state)])` on the loop when recipients are done with what asked for receipts.

        `state` is done, or dead when the recipient gave up after too many tries. Told once, also after restarts.
        """
        self._on_receipt.append(fn)

    def on(self, pattern: str, fn: Callable[[Envelope], None]) -> Callable[[], None]:
        """Call `fn(envelope)` on the loop for each message that somebody hands out with `send`; return what stops it.

        Such messages are stored nowhere: what comes while this node is not connected, or its loop is behind, is lost.
        """
        check_pattern(pattern)
        entry = (pattern, fn)
        self._handlers.append(entry)
        self._tell_listening()

        def stop() -> None:
            if entry in self._handlers:
                self._handlers.remove(entry)
                self._tell_listening()

        return stop

    def _tell_listening(self) -> None:
        owner = self._owner
        if owner is not None:
            patterns = self.listening()
            owner.later(lambda: owner.listen(patterns))

    def listening(self) -> tuple[str, ...]:
        return tuple(pattern for pattern, _ in self._handlers)

    async def send(
        self,
        subject: str,
        body: bytes,
        *,
        to: Sequence[str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[str, ...]:
        """Hand a message to peers that are connected now, at most once, stored nowhere; return whom it was handed to.

        `to` names node ids; without it, whoever listens (`on`) to the subject. Nobody answers for its arrival: for what
        must arrive there is `publish`. Raises InvalidInput, UnknownPeer.
        """
        owner = self._running()
        message = Message(id=new_id(utc_ms()), subject=subject, body=body, headers=headers or {})
        self._checked(message)
        return tuple(await owner.ask(lambda: owner.send_ephemeral(message, to)))

    def on_alarm(self, fn: Callable[[Alarm], None]) -> None:
        """Call `fn(alarm)` on the loop when something happened that a person should look at: see `Alarm.kind`."""
        self._on_alarm.append(fn)

    def on_peer(self, fn: Callable[[PeerView], None]) -> None:
        """Call `fn(view)` on the loop when a peer's presence changes."""
        self._on_peer.append(fn)

    def on_failed(self, fn: Callable[[BaseException], None]) -> None:
        """Call `fn(error)` on the loop when the owner thread has ended by an error. Only a new node helps then."""
        self._on_failed.append(fn)

    def on_health(self, fn: Callable[[Health], None]) -> None:
        """Call `fn(health)` on the loop when the state of the store changes."""
        self._on_health.append(fn)

    # -- life -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the home, open the store, bind the sockets. Raises NodeInUse, UnsuitableHome, AddressInUse."""
        assert self._owner is None, "a node starts once"
        self._room.set()
        owner = Owner(self, asyncio.get_running_loop())
        await owner.start(self._listen, self._models, self._migrations, self._effects)
        self._owner = owner
        self._tell_listening()
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

    def publish(
        self,
        subject: str,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        to: Sequence[str] | None = None,
        ttl_ms: int | None = None,
        message_id: str | None = None,
        blobs: Sequence[str] = (),
        receipt: bool = False,
    ) -> Coroutine[Any, Any, Receipt]:
        """Queue a message durably and return once it is on disk here.

        `to` names node ids (this node's own included, if wanted); without it the recipients are all members whose
        interest covers the subject now, offline ones too. `blobs` are ids from `put_blob`: the recipients may fetch
        them from here for as long as the message is queued or retained. With `receipt`, the recipients say when they
        are done with it (`Receipt.done`, `on_receipt`): each consumer there has acked it, or its effect ran. Raises
        InvalidInput, UnknownPeer, UnknownBlob, OutboxFull, StoreFailed; OutcomeUnknown when the commit failed after the
        message may have left.
        """
        _refuse_inside("publish", "tx.publish joins the transaction")
        message = Message(
            id=message_id or new_id(utc_ms()),
            subject=subject,
            body=body,
            headers=headers or {},
            blobs=tuple(blobs),
            wants_receipt=receipt,
        )
        meta = self._checked(message)
        work = Publish(
            message=message,
            meta=meta,
            recipients=to,
            ttl_ms=ttl_ms,
            may_repeat=message_id is not None,
        )
        return self._submit(work)

    async def put_blob(self, source: Path | str | bytes) -> Blob:
        """Copy a large body, a file or bytes, into this home and return once it is on disk.

        Name it in `publish(…, blobs=[blob.id])`. What no message names is dropped `Limits.blob_retained_ms` after its
        last use. Raises TooLarge, DiskLow, InvalidInput when the file cannot be read.
        """
        owner = self._running()
        content = source if isinstance(source, bytes) else Path(source)
        while True:
            blob = await asyncio.to_thread(owner.blobs.put, content)
            if await self.transact(owner.record_blob, blob):
                return blob

    async def fetch_blob(
        self,
        blob_id: str,
        *,
        peer: str,
        timeout: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Pull a large body from `peer`, usually `envelope.sender`, and return its path in this home.

        Every piece is checked. While the peer cannot be reached this waits; a fetch that was broken off, by a time-out
        (in seconds), a cancellation or a crash, goes on from the chunks that are here. `on_progress(bytes here, size)`
        is called on the loop. Copy or link the file to keep it: it is dropped `Limits.blob_retained_ms` after its last
        fetch. Raises UnknownBlob, BlobDamaged, TooLarge, DiskLow, UnknownPeer, TimedOut, NodeClosed.
        """
        check_id(blob_id)
        owner = self._running()
        while True:
            blob = await self._fetch_blob(owner, blob_id, peer, timeout, on_progress)
            if await self.transact(owner.record_blob, blob):
                return blob.path

    async def _fetch_blob(
        self,
        owner: Owner,
        blob_id: str,
        peer: str,
        timeout: float | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> Blob:
        waiter = Waiter(asyncio.get_running_loop().create_future(), on_progress)
        self._waiters.add(waiter)
        try:
            await owner.ask(lambda: owner.fetch_blob(blob_id, peer, waiter))
            async with asyncio.timeout(timeout):
                return await waiter.future
        except TimeoutError:
            raise TimedOut(
                f"blob {blob_id[:12]} has not come from {peer} in time",
                hint="fetch it again: it goes on from what is here",
            ) from None
        finally:
            self._waiters.discard(waiter)
            owner.later(lambda: owner.carrier.leave(blob_id, waiter))

    async def cancel(self, message_id: str, *, timeout: float = 5.0) -> Cancellation:
        """Withdraw a message from every recipient that does not hold it yet, and say what became of each.

        What was never on the wire is cancelled at once. Otherwise its recipient is asked; it is not sent meanwhile.
        One that does not answer within `timeout` seconds is `pending`: it is asked as soon as there is a session, also
        after a restart, and `on_delivered` or `on_dead` ("cancelled") tell the answer. Raises UnknownMessage.
        """
        owner = self._running()
        id_to_bytes(message_id)
        answers: dict[str, str] = {}
        has_answer = asyncio.Event()
        self._cancelling.append((message_id, answers, has_answer))
        try:
            states = await self.transact(owner.cancel, message_id)
            if not states:
                raise UnknownMessage(
                    f"no message {message_id} in this node's outbox", hint="settled ones go after a day"
                )
            states.update(answers)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while "revoking" in states.values():
                        await has_answer.wait()
                        has_answer.clear()
                        states.update(answers)
        finally:
            self._cancelling.remove((message_id, answers, has_answer))
        return Cancellation(id=message_id, states=states)

    def subscribe(self, pattern: str, *, durable: str, lease_ms: int | None = None) -> Subscription:
        """Consume messages of a pattern under a durable name: `async with` opens it, `async for` yields jobs.

        A job that is not settled within `lease_ms` (of `Limits` unless given) is handed out again.
        """
        return Subscription(
            self,
            pattern,
            durable=durable,
            lease_ms=self.limits.lease_ms if lease_ms is None else lease_ms,
            number=next(self._subscription_numbers),
        )

    def transact(
        self, fn: Callable[..., T], *args: Any
    ) -> Coroutine[Any, Any, T]:  # Any: handed through to fn
        """Run `fn(tx, *args)` in the owner thread, inside one transaction, and return after it is on disk.

        `fn` is a plain function. If it raises, what it wrote is undone and the exception comes out here. A
        cancelled await does not undo it.
        """
        _refuse_inside("transact", "call the function itself, with the same tx")
        _check_plain(fn)
        return self._submit(Transact(fn=functools.partial(_watched, fn), args=args))

    async def read(self, fn: Callable[..., T], *args: Any) -> T:  # Any: handed through to fn
        """Run `fn(db, *args)` in a reading thread on a read-only connection; models read through it too."""
        if self._readers is None:
            raise NodeClosed("the node is not running")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, fn, args)

    def registry(self, bucket: str) -> Bucket:
        """Return a bucket of the replicated registry: last writer wins, and every node has all of it."""
        return Bucket(bucket, self._entries, self.transact)

    # -- the mesh -------------------------------------------------------------------------------------------

    def peers(self) -> list[PeerView]:
        return sorted(self._views.values(), key=lambda view: (view.name, view.node_id))

    async def backup(self, path: Path | str) -> int:
        """Write a checked copy of the store to a new file while everything goes on; return its bytes.

        It holds neither the keys of this node nor its settings. Raises InvalidInput when the file exists, DiskLow,
        StoreFailed.
        """
        self._running()
        return await asyncio.to_thread(backup, self.home / STORE, Path(path))

    @property
    def health(self) -> Health:
        """How the store is: sound, short of room, or failed."""
        return self._health

    async def events(self, *, limit: int = 100, kind: str | None = None) -> list[Event]:
        """Return what has happened to this node, the newest first: damage, regressions, unclean starts, refusals."""
        return await self.read(read_events, limit, kind)

    async def refused(self) -> dict[str, int]:
        """Count what was turned away since the start, by reason: frames and peers, and callers beyond a limit."""
        owner = self._running()
        return dict(Counter(await owner.ask(owner.refused)) + self._too_large)

    async def alarms(self) -> dict[str, int]:
        """Count the alarms since the start, by kind."""
        owner = self._running()
        return await owner.ask(owner.alarms)

    async def invite(self, *, ttl_ms: int = 900_000, address: str | None = None) -> Invitation:
        """Make a one-time invitation. `address` (HOST:PORT) replaces the addresses found by themselves."""
        owner = self._running()
        if not 0 < ttl_ms <= 86_400_000:
            raise InvalidInput("an invitation lasts between a moment and a day")
        keys = new_keypair()
        expires_ms = utc_ms() + ttl_ms
        invitation = Invitation(
            endpoints=tuple([_endpoint_of(address)] if address else owner.mesh.reachable_at()),
            server_key=owner.mesh.keys.public,
            secret=keys.secret,
            expires_ms=expires_ms,
        )
        await self.transact(owner.pairing.save_invitation, keys.public, expires_ms)
        log.info("invitation made", extra={"expires_ms": expires_ms})
        return invitation

    async def join(self, code: str) -> PeerView:
        """Join the mesh of the node that made this code. Raises InvalidInput, PairingRefused, TimedOut."""
        owner = self._running()
        invitation = Invitation.decode(code)
        if invitation.server_key == owner.mesh.keys.public:
            raise PairingRefused("this code was made by this very node", hint="use it on the other machine")
        member = await owner.pairing.join(invitation)
        await self._linked(member.node_id)
        return self._views[member.node_id]

    async def remove_peer(self, node_id: str) -> str:
        """Remove a member from the mesh, everywhere; return its name. Its own id makes this node leave.

        Its frames are ignored and its key is refused from now on, here at once and at every other member as soon as
        that is reached. Messages that wait for it are dead, with the reason. Raises UnknownPeer.
        """
        return await self.transact(self._running().mesh.remove, node_id)

    async def rotate_key(self) -> tuple[list[str], list[str]]:
        """Replace this node's key; its id, its mail and its place in the mesh stay.

        Returns the ids of the peers that know the new key, and of those that were away: they learn it over a
        connection made with the former one, which is kept for that. Invitations that are open become void.
        """
        return await self._running().rotate_key()

    @property
    def removed_by(self) -> str | None:
        """The node id of who removed this node from the mesh, None while it belongs."""
        return self._owner.mesh.removed_by if self._owner else None

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

    def _checked(self, message: Message) -> bytes:
        try:
            return check_message(message, self.limits)
        except TooLarge as error:
            self._too_large[error.code] += 1
            raise

    def _running(self) -> Owner:
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
        try:
            owner.submit(work)
        except NodeClosed:
            del self._futures[work]
            raise
        return await future  # a caller that is cancelled leaves; the work is done all the same

    def take(self, outcome: Outcome) -> None:
        """Take in what a tick has to tell. Runs on the loop, once a tick."""
        for work, result in outcome.results:
            if isinstance(work, Publish):
                receipt = self._receipts.get(work.message.id) if work.may_repeat else None
                if receipt is None:
                    receipt = Receipt(work.message.id, result, work.ended)
                else:
                    receipt.add(result, work.ended)
                if result:
                    self._receipts[receipt.id] = receipt
                    if work.message.wants_receipt:
                        self._undone[receipt.id] = receipt
                self._resolve(work, receipt, None)
            else:
                self._resolve(work, result, None)
        for work, error in outcome.failures:
            self._resolve(work, None, error)
        for wanted, answers, has_answer in self._cancelling:
            told = {peer: "delivered" for message_id, peer in outcome.delivered if message_id == wanted}
            told |= {peer: reason for message_id, peer, reason in outcome.dead if message_id == wanted}
            if told:
                answers |= {peer: _ENDS.get(state, "dead") for peer, state in told.items()}
                has_answer.set()
        for message_id, peer in outcome.delivered:
            found = self._receipts.get(message_id)
            if found is not None and found.acked_by(peer):
                del self._receipts[message_id]
        for message_id, peer, reason in outcome.dead:
            found = self._receipts.get(message_id)
            if found is not None and found.refused_by(peer, reason):
                del self._receipts[message_id]
        ended = [*outcome.receipts, *outcome.dead] if self._undone else ()
        for message_id, peer, state in ended:
            found = self._undone.get(message_id)
            if found is not None and found.done_by(peer, state):
                del self._undone[message_id]
        for subscription in self._subscriptions:
            if any(matches(subscription.pattern, envelope.subject) for envelope in outcome.arrivals):
                subscription.notify()
        self._entries.take(outcome.entries)
        calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(fn, ()) for fn in outcome.callbacks]
        if outcome.delivered:
            calls += [(fn, (outcome.delivered,)) for fn in self._on_delivered]
        if outcome.dead:
            calls += [(fn, (outcome.dead,)) for fn in self._on_dead]
        if outcome.receipts:
            calls += [(fn, (outcome.receipts,)) for fn in self._on_receipt]
        self.ephemerals_taken += len(outcome.ephemerals)
        calls += [
            (fn, (envelope,))
            for envelope in outcome.ephemerals
            for pattern, fn in self._handlers
            if matches(pattern, envelope.subject)
        ]
        calls += [(fn, (alarm,)) for alarm in outcome.alarms for fn in self._on_alarm]
        self._call(calls)
        self._room.set()

    def take_views(self, views: list[PeerView], gone: list[str]) -> None:
        for node_id in gone:
            self._views.pop(node_id, None)
        for view in views:
            self._views[view.node_id] = view
        self._call([(fn, (view,)) for view in views for fn in self._on_peer])

    def take_health(self, health: Health) -> None:
        self._health = health
        self._call([(fn, (health,)) for fn in self._on_health])

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

    def died(self, error: BaseException) -> None:
        """The owner thread has ended by an error. Nothing accepted is lost; nothing more is accepted."""
        self._abandon(NodeClosed(f"the node has failed: {error}", hint="see its log, then start it again"))
        self._call([(fn, (error,)) for fn in self._on_failed])

    def _abandon(self, error: NodeClosed) -> None:
        """Answer everybody who waits, because nothing more will come."""
        for future in self._futures.values():
            fail(future, error)
            future.exception()  # a caller that was cancelled has nobody left to hear it
        self._futures.clear()
        self._room.set()  # whoever waited for it is told by what it asks next
        for waiter in self._waiters:
            fail(waiter.future, error)
        for receipt in (*self._receipts.values(), *self._undone.values()):
            receipt.fail(error)
        self._receipts.clear()
        self._undone.clear()
        self._entries.close()

    # -- durable consumers (called by subscriptions and jobs) -------------------------------------------------

    async def open_consumer(self, subscription: Subscription) -> int:
        owner = self._running()
        number = await self.transact(owner.open_consumer, subscription.durable, subscription.pattern)
        self._subscriptions.append(subscription)
        return number

    def close_consumer(self, subscription: Subscription) -> None:
        self._subscriptions.remove(subscription)
        if self._owner is not None:
            self._owner.close_consumer(subscription.number)
        self.jobs_are_free()

    def jobs_are_free(self) -> None:
        """Have everybody look again for jobs: some were given back."""
        for subscription in self._subscriptions:
            subscription.notify()

    async def fetch_jobs(self, consumer: int, holder: int) -> list[tuple[Envelope, int, Lease]]:
        owner = self._running()
        return await owner.ask(lambda: owner.fetch_jobs(consumer, holder))

    def start_lease(self, lease: Lease, lease_ms: int) -> None:
        self._running().start_lease(lease, lease_ms)

    async def extend_lease(self, lease: Lease, lease_ms: int) -> None:
        owner = self._running()
        await owner.ask(lambda: owner.extend_lease(lease, lease_ms))

    def commit_job(
        self,
        lease: Lease,
        fn: Callable[..., T],
        *args: Any,  # Any: handed through to fn
    ) -> Coroutine[Any, Any, T]:
        _refuse_inside("commit", "settle the job after the transaction, or do all in one commit")
        _check_plain(fn)
        owner = self._running()
        return self._submit(
            Transact(fn=owner.commit_job, args=(lease, functools.partial(_watched, fn), *args))
        )

    async def return_job(self, lease: Lease, delay_ms: int) -> None:
        await self.transact(self._running().return_job, lease, delay_ms)

    # -- readers --------------------------------------------------------------------------------------------

    def _open_reader(self) -> None:
        reader = Reader(self.home / "store.db")
        self._reader_state.db = reader.open()
        self._open_readers.append(reader)

    def _read(self, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        return fn(self._reader_state.db, *args)


def _endpoint_of(address: str) -> str:
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise InvalidInput(f"{address!r} is not HOST:PORT", hint="for example 192.0.2.7:7420")
    return f"tcp://{host}:{port}"


def _refuse_inside(what: str, hint: str) -> None:
    """A transaction that waited for another one would wait for ever: both need the owner thread."""
    if in_owner_thread():
        raise TransactionMisused(f"{what} was called inside a transaction", hint=hint)


def _check_plain(fn: Callable[..., object]) -> None:
    """Refuse a coroutine function before anything runs: its body would run outside the transaction, or never."""
    if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None)):  # noqa: B004
        raise TypeError("a transaction takes a plain function, not a coroutine function")


def _watched(fn: Callable[..., T], tx: Tx, *args: Any) -> T:
    """Run a caller's function and say so when it held up everybody else."""
    began = time.monotonic()
    try:
        return fn(tx, *args)
    finally:
        took_s = time.monotonic() - began
        if took_s > _SLOW_S:
            name = getattr(fn, "__qualname__", type(fn).__name__)
            log.warning("slow transaction", extra={"function": name, "ms": int(took_s * 1_000)})
