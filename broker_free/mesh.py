"""The members in the owner thread: whose key is let in, where each is dialled, and what follows when the roll changes.

Who belongs is decided in `membership.py` from records in the registry; how a new node comes in, in `pairing.py`;
sessions and messages are the tick's business.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from broker_free import faults, frames
from broker_free.clock import mono_ms
from broker_free.errors import UnknownPeer
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.membership import (
    MEMBERS,
    WHEREABOUTS,
    Member,
    Roll,
    about_of,
    introduction,
    keys_from,
    member_from,
    removal,
    roll_of,
    taken_over,
    word_key,
    word_of,
)
from broker_free.outside import Refusals
from broker_free.registry import Entry
from broker_free.security import NodeKeys
from broker_free.tick import Tick, Tx
from broker_free.transport import Transport
from broker_free.watch import Watch

if TYPE_CHECKING:
    from broker_free.store import Store

log = logging.getLogger("broker_free")

T = TypeVar("T")


class Host(Protocol):
    """What the owner thread lends to the mesh."""

    refusals: Refusals

    def transact(self, fn: Callable[..., object], *args: Any) -> None:  # Any: handed through to fn
        """Queue `fn(tx, *args)` for the next transaction."""
        ...

    def later(self, fn: Callable[[], object]) -> None:
        """Have the owner thread run `fn` between transactions. Any thread."""
        ...

    async def ask(self, fn: Callable[[], T]) -> T:
        """Run `fn` in the owner thread, between transactions; on the loop."""
        ...

    def tell(self, fn: Callable[..., object], *args: Any) -> None:  # Any: handed through to fn
        """Have the event loop run `fn(*args)`."""
        ...

    def tell_dead(self, dead: list[tuple[str, str, str]]) -> None:
        """Tell those who wait that (message id, peer, reason) will never be delivered; on the loop."""
        ...

    def member_changed(self, peer: str) -> None: ...
    def member_left(self, peer: str) -> None:
        """Forget what is known of a peer, and cut its connections."""
        ...


class Mesh:
    """The table of members."""

    def __init__(
        self, *, host: Host, name: str, node_id: str, keys: NodeKeys, store: Store, limits: Limits
    ) -> None:
        self.members: dict[str, Member] = {}
        self.roll = Roll()
        self.endpoints: list[str] = []  # where this node listens
        self.advertise: tuple[str, ...] = ()  # where others reach it, if that is another place
        self.beat_endpoint = ""
        self.name = name
        self.me = node_id
        self.keys = keys
        self.tick: Tick
        self.transport: Transport
        self.watch: Watch
        self._host = host
        self._store = store
        self._limits = limits
        self._by_key: dict[bytes, str] = {}  # public key -> node id
        self._bound: dict[str, Member] = {}  # members as the store had them at the start: their keys count
        self._unvouched: set[str] = set()  # members of an older store, about whom no record is written yet
        self._dial_turn: dict[str, int] = {}
        self._insists: set[str] = set()  # peers that know only this node's former key
        self._dialled: dict[int, tuple[str, bool]] = {}  # conn -> peer, with the former key?
        self._blocked_until_ms: dict[str, int] = {}
        self.next_keys: NodeKeys | None = None  # announced, not yet in use
        self.unaware: set[str] = set()  # peers that may not know our key

    def load(self) -> None:
        """Let in whom the store and the registry know."""
        self._bound = {member.node_id: member for member in self._store.members()}
        roll = self._read_roll()
        for member in self._bound.values():
            self.tick.interests[member.node_id] = member.interests
            if member.seen_ms:
                self.watch.seen_ms[member.node_id] = member.seen_ms
            if member.node_id in roll.removed or member.node_id in roll.strangers:
                # This node ended before it could act on that.
                self._host.transact(self._bury, member.node_id, f"{member.name} was removed from the mesh")
            elif member.node_id not in roll.members:
                self._unvouched.add(member.node_id)
                self._let_in(member)
        if self._unvouched:
            self._host.transact(self._vouch_for_all)
        self.learn(())
        self._bound.clear()
        if self.keys.former:
            self.unaware = set(self.members)
        if self._whereabouts_of(self.me) != about_of(self.myself):
            self._host.transact(
                lambda tx: tx.registry_put(WHEREABOUTS, self.me, about_of(self.myself)),
            )

    # -- who is let in, and where each one is ---------------------------------------------------------------

    def admit(self, public_key: bytes) -> str | None:
        """Answer ZAP: the node id for a member's key, or None. Looked up at every handshake; unknown is refused."""
        node_id = self._by_key.get(public_key)
        return None if node_id is None or node_id in self._blocked_until_ms else node_id

    def holder_of(self, public_key: bytes) -> str | None:
        """Return whose key this is, of the members and this node. No other may claim it: it would lock them out."""
        return self.me if public_key == self.keys.current.public else self._by_key.get(public_key)

    def dial(self, peer: str) -> int | None:
        """Start a connection to a member, at its next endpoint. None when there is none to try."""
        member = self.members[peer]
        if not member.endpoints or self.removed_by is not None or peer in self._blocked_until_ms:
            return None
        turn = self._dial_turn.get(peer, 0)
        self._dial_turn[peer] = turn + 1
        former = self.keys.former if peer in self._insists else None
        conn = self.transport.dial(
            member.endpoints[turn % len(member.endpoints)],
            server_key=member.public_key,
            user_id=peer,
            keys=former,
        )
        self._dialled[conn] = (peer, former is not None)
        return conn

    def dial_ended(self, conn: int, reason: str) -> None:
        """A dialled connection failed or broke. One that was refused is tried with the other of this node's keys."""
        peer, was_former = self._dialled.pop(conn, ("", False))
        if peer and reason == "refused":
            if self.keys.former and not was_former:
                self._insists.add(peer)
            else:
                self._insists.discard(peer)

    def uses_former_key(self, conn: int) -> bool:
        """Say whether this connection was dialled with the key that this node had before."""
        return self._dialled.get(conn, ("", False))[1]

    @property
    def myself(self) -> Member:
        """Return what this node would say if it introduced itself."""
        beat = next(iter(_reachable(self.beat_endpoint)), "")
        return Member(
            node_id=self.me,
            name=self.name,
            public_key=self.keys.current.public,
            first_key=self.keys.first,
            endpoints=tuple(self.reachable_at()),
            beat_endpoint=beat,
        )

    def about(self) -> dict[str, Any]:
        """Say what this node tells of itself in greetings."""
        return about_of(self.myself)

    def reachable_at(self) -> list[str]:
        """Return the endpoints at which another machine may reach this node, the likeliest first."""
        return list(self.advertise) or [one for endpoint in self.endpoints for one in _reachable(endpoint)]

    @property
    def removed_by(self) -> str | None:
        """Return the node id of who removed this node, None while it belongs."""
        word = self.roll.removed.get(self.me)
        return word.writer if word else None

    def is_pending(self, peer: str) -> bool:
        """Say whether a member was introduced but nobody has met it yet: it speaks of itself once it is in."""
        return self._whereabouts_of(peer) is None

    def note_whereabouts(self, peer: str, about: Mapping[str, Any]) -> None:
        """Take in what a peer said of itself, in its greeting or in its record."""
        known = self.members.get(peer)
        if known is None:
            return
        said = member_from(about, node_id=peer, public_key=known.public_key)
        if said is None or about_of(said) == about_of(known):
            return
        now = replace(known, name=said.name, endpoints=said.endpoints, beat_endpoint=said.beat_endpoint)
        self._let_in(now)
        self._host.transact(self._save, now)

    def _save(self, tx: Tx, member: Member) -> None:
        self._store.save_member(member, tx.now_ms)
        faults.reach("whereabouts-saved")

    # -- the roll -------------------------------------------------------------------------------------------

    def learn(self, entries: Iterable[Entry]) -> None:
        """Follow what registry entries say of members. Call it after their commit."""
        was_removed = self.removed_by
        self.roll = self._read_roll()
        self._unvouched -= self.roll.members.keys() | self.roll.removed.keys()
        for node_id in [one for one in self.members if one not in self.roll.members]:
            if node_id not in self._unvouched:
                self._let_go(node_id)
        for node_id, member in self.roll.members.items():
            known = self.members.get(node_id)
            if node_id != self.me and (known is None or known.introduced != member.introduced):
                self._introduced(member)
        for entry in entries:
            if entry.bucket == WHEREABOUTS and entry.value is not None:
                self.note_whereabouts(entry.key, entry.value)
                self._host.member_changed(entry.key)
        if self.removed_by and self.removed_by != was_removed:
            log.warning("this node was removed from the mesh", extra={"by": self.removed_by})

    def _read_roll(self) -> Roll:
        words = (word_of(entry) for entry in self.tick.registry.bucket(MEMBERS))
        return roll_of(word for word in words if word)

    def _introduced(self, member: Member) -> None:
        if len(self.members) >= self._limits.peers_max:
            self._host.refusals.add("mesh-full", mono_ms(), peer=member.node_id)
            return
        bound = self._bound.get(member.node_id)
        if bound is not None:  # what its own session has proven since the introduction
            member = replace(
                member, public_key=bound.public_key, interests=bound.interests, seen_ms=bound.seen_ms
            )
        said = self._whereabouts_of(member.node_id)
        here = member_from(said, node_id=member.node_id, public_key=member.public_key) or bound
        if here is not None:
            member = replace(
                member, name=here.name, endpoints=here.endpoints, beat_endpoint=here.beat_endpoint
            )
        if self.holder_of(member.public_key) not in (None, member.node_id):
            self._host.refusals.add("key-conflict", mono_ms(), peer=member.node_id)
            return
        self._let_in(member)
        if bound is None:
            self._host.transact(self._save, member)
            log.info("member introduced", extra={"peer": member.node_id, "by": member.introduced_by})

    def _whereabouts_of(self, node_id: str) -> Mapping[str, Any] | None:
        entry = self.tick.registry.entry((WHEREABOUTS, node_id))
        return entry.value if entry else None

    def _let_in(self, member: Member) -> None:
        peer = member.node_id
        known = self.members.get(peer)
        if known and known.public_key != member.public_key:
            self._by_key.pop(known.public_key, None)
        self.members[peer] = member
        self._by_key[member.public_key] = peer
        self.tick.add_peer(peer)
        self.watch.add(member)
        self._host.member_changed(peer)

    def _let_go(self, peer: str) -> None:
        """Act on a removal: from now on this key is a stranger's."""
        member = self.members.pop(peer)
        self._by_key.pop(member.public_key, None)
        self._blocked_until_ms.pop(peer, None)
        self._insists.discard(peer)
        self._dial_turn.pop(peer, None)
        self.tick.remove_peer(peer)
        self.watch.remove(peer)
        word = self.roll.removed.get(peer)
        by = self.name_of(word.writer) if word else "a node whose word counts no more"
        log.warning("member removed", extra={"peer": peer, "peer_name": member.name, "by": by})
        self._host.transact(self._bury, peer, f"{member.name} was removed from the mesh by {by}")
        self._host.member_left(peer)

    def _bury(self, tx: Tx, peer: str, reason: str) -> None:
        if peer in self.members:
            return  # it was introduced again meanwhile
        ids = self._store.drop_member(peer, reason=reason, now_ms=tx.now_ms)
        if ids:
            dead = [(message_id, peer, reason) for message_id in ids]
            tx.after_commit(lambda: self._host.tell_dead(dead))

    def name_of(self, node_id: str) -> str:
        if node_id == self.me:
            return self.name
        member = self.members.get(node_id)
        return member.name if member else node_id

    # -- words of this node ---------------------------------------------------------------------------------

    def introduce(self, tx: Tx, member: Member) -> None:
        """Vouch for a member, in the name of this node."""
        tx.registry_put(MEMBERS, word_key(self.me, member.node_id), introduction(member))

    def remove(self, tx: Tx, node_id: str) -> str:
        """Remove a member, or this node itself; return its name. Raises UnknownPeer."""
        if node_id != self.me and node_id not in self.members:
            raise UnknownPeer(f"no member {node_id!r} in this mesh", hint="see who is: zmail peers")
        name = self.name_of(node_id)
        if node_id != self.me:
            for one in taken_over(self.roll, remover=self.myself, removed=node_id):
                known = self.members.get(one.node_id)
                self.introduce(tx, replace(one, public_key=known.public_key) if known else one)
        tx.registry_put(MEMBERS, word_key(self.me, node_id), removal())
        return name

    def _vouch_for_all(self, tx: Tx) -> None:
        for node_id in self._unvouched:
            self.introduce(tx, self.members[node_id])

    # -- another key ----------------------------------------------------------------------------------------

    def frame(self, conn: int, peer: str, frame: Frame) -> bool:
        """Take in what a peer says of its key, or answers about ours. False: it is another frame."""
        if frame.kind not in (frames.KEY, frames.KEY_OK):
            return False
        if peer in self.members and frame.kind == frames.KEY:
            self._on_key(conn, peer, frame)
        elif peer in self.members:
            self._on_key_ok(peer, frame)
        return True

    def _on_key(self, conn: int, peer: str, frame: Frame) -> None:
        """Bind a peer to the key it names. The connection has proven the one it had."""
        keys = keys_from(frame.meta, node_id=peer)
        if keys is None or self.holder_of(keys[0]) not in (None, peer):
            self._host.refusals.add("key-malformed", mono_ms(), peer=peer)
            return
        now = replace(self.members[peer], public_key=keys[0], first_key=keys[1])
        self._host.transact(self._bind, conn, now)

    def _bind(self, tx: Tx, conn: int, member: Member) -> None:
        self._store.save_member(member, tx.now_ms)
        faults.reach("key-saved")
        tx.after_commit(lambda: self._host.later(lambda: self._bound_to(conn, member)))

    def _bound_to(self, conn: int, member: Member) -> None:
        if member.node_id in self.members:
            self._let_in(member)
            log.info("a peer has another key", extra={"peer": member.node_id, "peer_name": member.name})
            meta = {"key": member.public_key.decode()}
            self.transport.send(conn, frames.encode(Frame(kind=frames.KEY_OK, meta=meta)))

    def _on_key_ok(self, peer: str, frame: Frame) -> None:
        if frame.meta.get("key") != (self.next_keys or self.keys).public.decode():
            return
        self.unaware.discard(peer)
        if peer in self._insists:  # from now on it lets in the present key, and only that
            self._insists.discard(peer)
            self.tick.drop(peer, "key changed")

    def tell_key(self, peer: str) -> None:
        """Tell a peer over its open session which key this node has, or is about to have."""
        link = self.tick.links[peer]
        keys = self.next_keys or self.keys
        if link.is_open and link.conn is not None:
            meta = {"key": keys.public.decode(), "first_key": keys.first.decode()}
            self.transport.send(link.conn, frames.encode(Frame(kind=frames.KEY, meta=meta)))

    def announce_key(self, keys: NodeKeys) -> None:
        """Begin a change of key: those who are there learn it before it counts."""
        self.next_keys = keys
        self.unaware = set(self.members)
        for peer in self.members:
            self.tell_key(peer)

    def change_key(self) -> None:
        """Be known by the key that was announced. Everybody is dialled anew."""
        assert self.next_keys is not None, "announced before"
        self.keys, self.next_keys = self.next_keys, None
        for peer in self.members:
            self.tick.drop(peer, "key changed")
        self.transport.rekey(self.keys.current)
        self.tick.drop_inbound("key changed")
        self._host.transact(self.introduce, self.myself)

    def session_opened(self, peer: str) -> None:
        """Tell a peer that knows only the former key of the present one."""
        conn = self.tick.links[peer].conn
        self.watch.renew(peer)
        if conn is not None and self.uses_former_key(conn):
            self.tell_key(peer)
        else:
            self.unaware.discard(peer)

    # -- peers that misbehave -------------------------------------------------------------------------------

    def block(self, peer: str, now_ms: int) -> None:
        """Keep a member out for a while: its connections are cut and its key is not let in."""
        if peer in self.members:
            self._blocked_until_ms[peer] = now_ms + self._limits.block_ms

    def is_blocked(self, peer: str) -> bool:
        return peer in self._blocked_until_ms

    def unblock(self, now_ms: int) -> None:
        """Let those in again whose time is over."""
        for peer, until_ms in list(self._blocked_until_ms.items()):
            if now_ms >= until_ms:
                del self._blocked_until_ms[peer]


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
