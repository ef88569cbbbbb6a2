"""The mail service inside the node: every use-case, once. CLI, MCP and whatever comes are thin faces on `call`.

    call ─► arguments and addresses, on the loop ─► one transaction ─► after the commit: notices, waiters
    a brief or a receipt from a peer ─► effect, in the transaction that accepts it ─► the same

Nothing changes before all arguments are read and all addresses resolve, and nobody is told before the commit. The
rules live in files of their own: who is who (leases), where an address leads (directory), what travels (wire), what
is written (filing), how states move (receipts), what is shown (views), when a session is told (push).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from broker_free import Node, Tx
from broker_free.errors import InvalidInput, TimedOut, TooLarge
from broker_free.message import Envelope, new_id
from broker_free.owner import PeerView
from zmail import __version__, address, arguments, brief, filing, leases, receipts, times, views, wire
from zmail.arguments import Args
from zmail.brief import Draft
from zmail.config import Settings
from zmail.directory import BUCKET, OFFLINE, Directory, NodeSeen, Place, Resident, resident_from
from zmail.errors import InvalidBrief, NotFound, UnknownAddress
from zmail.identity import Caller, Identity, Resolution
from zmail.models import Brief, Delivery
from zmail.push import Push, Waiting
from zmail.receipts import Moves
from zmail.states import ANNOUNCED, DEAD, DELIVERED, DONE, ENDED, PROGRESS, QUEUED, READ
from zmail.upkeep import SLICE, Upkeep
from zmail.views import Shape
from zmail.wire import Letter

log = logging.getLogger(__name__)

LIMIT_DEFAULT = 20  # of a listing
WARNINGS_MAX = 20  # of one send: `all` may reach a thousand
WAIT_MS_MAX = 3_600_000
_EVENTS_SHOWN = 5
INVITE_MS_DEFAULT = 15 * times.MINUTE_MS


class PostOffice:
    """Made before its node starts; `start` after it, `close` before it."""

    def __init__(self, node: Node, *, identity: Identity, push: Push, settings: Settings) -> None:
        self.refused: Counter[str] = Counter()  # what peers sent that could not be read
        self._node = node
        self._push = push
        self._settings = settings
        self._judge = identity.liveness
        self._started_s = time.monotonic()
        self._residents: dict[Place, Resident] = {}
        self._residents_at = -1  # the revision of the registry that they are of
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._verbs: dict[str, Callable[[Caller | None, Args], Awaitable[Shape]]] = {
            "send": self.send,
            "reply": self.reply,
            "check": self.check,
            "inbox": self.inbox,
            "read": self.read,
            "mark_read": self.mark_read,
            "wait_state": self.wait_state,
            "roster": self.roster,
            "status": self.status,
            "backup": self.backup,
            "peers": self.peers,
            "remove_peer": self.remove_peer,
            "rotate_key": self.rotate_key,
            "invite": self.invite,
            "join": self.join,
            "node-status": self.node_status,
        }
        node.effect(wire.BRIEF, self._on_brief)
        node.effect(wire.RECEIPT, self._on_receipts)
        self._upkeep = Upkeep(node, judge=self._judge, moves=self._moves)
        push.serve(self)

    async def start(self) -> None:
        """Catch up with what happened while no node ran, and begin to keep house."""
        await self._upkeep.start()

    async def close(self) -> None:
        """Stop telling sessions of mail. What is unread is announced after the next start."""
        await self._push.close()
        await self._upkeep.close()

    # ---- callers ----

    async def enter(self, resolution: Resolution, hints: Mapping[str, object]) -> Caller | None:
        """Decide whom a caller acts as, and take or confirm its lease. None: it acts as nobody.

        CallsignTaken when the callsign it insists on is held by another process.
        """
        wish = await asyncio.to_thread(leases.wish_of, resolution, hints)
        if wish is None:
            return None
        now_ms = _now_ms()
        if caller := await self._node.read(lambda _: leases.standing(wish, now_ms)):
            return caller
        directory = self.directory()
        elsewhere = frozenset(each.callsign for each in directory.residents if each.node != directory.me)
        return await self._node.transact(leases.enter, wish, self._judge, self._settings, elsewhere)

    async def call(self, who: Caller | None, verb: str, args: Args) -> Shape:
        """Do what one verb asks for. `who` may be nobody for the verbs about the node."""
        if (use_case := self._verbs.get(verb)) is None:
            raise InvalidInput(f"no such verb: {verb[:40]!r}", hint=f"one of: {', '.join(self._verbs)}")
        return await use_case(who, args)

    def directory(self) -> Directory:
        """Everybody known now."""
        node = self._node
        callsigns = node.registry(BUCKET)
        if self._residents_at != callsigns.revision:
            self._residents_at = callsigns.revision
            found = (resident_from(each.key, each.value or {}) for each in callsigns.entries())
            self._residents = {each.place: each for each in found if each is not None}
        nodes = {node.node_id: NodeSeen(name=node.name, is_alive=True, last_seen_ms=None)} | {
            peer.node_id: NodeSeen(
                name=peer.name, is_alive=peer.state != "down", last_seen_ms=peer.last_seen_ms
            )
            for peer in node.peers()
        }
        residents = {place: each for place, each in self._residents.items() if place.node in nodes}
        return Directory(me=node.node_id, nodes=nodes, residents=residents)

    # ---- sending ----

    async def send(self, caller: Caller | None, args: Args) -> Shape:
        """Send a brief to everybody it names. Returns once it is on disk."""
        who = leases.need(caller)
        draft = brief.draft_of(args)
        directory = self.directory()
        sender = Place(who.callsign, directory.me)
        if not (draft.to or draft.cc):
            raise InvalidBrief("the brief is for nobody", hint="name a recipient: zmail send bravo …")
        to = directory.resolve(draft.to, sender=sender)
        cc = tuple(each for each in directory.resolve(draft.cc, sender=sender) if each not in to)
        return await self._send(who, draft, to=to, cc=cc, directory=directory)

    async def reply(self, caller: Caller | None, args: Args) -> Shape:
        """Answer a brief, to its sender, in its thread. One's own brief is answered to whom it was for."""
        who = leases.need(caller)
        directory = self.directory()
        answered, delivery = await self._find(who, arguments.needed(args, "id"))
        to, cc = _only(Place(answered.from_callsign, answered.from_node))
        if delivery is None:
            to, cc = filing.places_of(answered)
        if gone := [place for place in (*to, *cc) if place.node not in directory.nodes]:
            raise UnknownAddress(f"the node of {gone[0].callsign} is no longer in the mesh")
        title = arguments.text(args, "title") or _re(answered.title)
        asked = {"body": arguments.needed(args, "body"), "actions": args.get("actions"), "title": title}
        draft = brief.draft_of({**asked, "thread": answered.thread, "reply_to": answered.id})
        return await self._send(who, draft, to=to, cc=cc, directory=directory, answers=delivery)

    async def _send(
        self,
        who: Caller,
        draft: Draft,
        *,
        to: tuple[Place, ...],
        cc: tuple[Place, ...],
        directory: Directory,
        answers: Delivery | None = None,
    ) -> Shape:
        now_ms = _now_ms()
        letter = Letter(
            sender=who.callsign,
            sender_class=who.sender_class,
            sent_ms=now_ms,
            draft=draft,
            to=to,
            cc=cc,
        )
        body = wire.encode_letter(letter)
        if len(body) > (limit := self._node.limits.body_bytes_max):
            raise TooLarge(
                f"the brief has {len(body)} bytes, at most {limit}", hint="send a file's path instead"
            )
        brief_id = new_id(now_ms)

        def write(tx: Tx) -> dict[Place, str]:
            return self._write_sent(tx, who=who, letter=letter, body=body, brief_id=brief_id, answers=answers)

        states = await self._node.transact(write)
        log.info("sent", extra={"id": brief_id, "from": who.callsign, "recipients": len(states)})
        return {
            "id": brief_id,
            "thread": draft.thread or brief_id,
            "recipients": [
                {
                    "address": directory.address(*place),
                    "state": state,
                    "last_seen": views.shown(directory.last_seen_ms(place, now_ms=now_ms)),
                }
                for place, state in states.items()
            ],
            "warnings": _warnings(states, directory, now_ms=now_ms),
        }

    def _write_sent(
        self, tx: Tx, *, who: Caller, letter: Letter, body: bytes, brief_id: str, answers: Delivery | None
    ) -> dict[Place, str]:
        """File a brief for those who are here, queue it for the other nodes, in one transaction."""
        leases.still_holds(who)
        tx.check_room(len(body))  # for those who are here too
        me = self._node.node_id
        filed = filing.write_brief(letter, brief_id=brief_id, node=me)
        assert filed is not None, "the id was made for this brief"
        here = filing.deliver(tx, filed, letter, me=me)
        nodes = list(dict.fromkeys(place.node for place in letter.places if place.node != me))
        if nodes:
            longest_ms = self._node.limits.ttl_ms_max
            ttl_ms = min(letter.draft.ttl_ms, longest_ms) if letter.draft.ttl_ms else None
            tx.publish(wire.BRIEF, body, to=nodes, ttl_ms=ttl_ms, message_id=brief_id)
        states = {
            place: QUEUED if place.node != me else DELIVERED if place.callsign in here.callsigns else DEAD
            for place in letter.places
        }
        filing.write_recipients(tx, filed, states)
        if answers is not None:
            self._answered(tx, answers)
        self._announce(tx, here.callsigns)
        return states

    def _answered(self, tx: Tx, answers: Delivery) -> None:
        """A reply is all that most briefs ask for. One that only informs asks for nothing."""
        answered = Brief.get_by_id(answers.brief)
        if answered.intent != "info":
            moves = self._moves(tx)
            moves.move(answered, Delivery.get_by_id(answers.id), DONE)
            moves.tell()

    # ---- receiving ----

    def _on_brief(self, tx: Tx, envelope: Envelope) -> None:
        """File a brief of another node. Runs in the transaction that accepts it, so a bad one must not raise."""
        moves = self._moves(tx)
        try:
            letter = wire.decode_letter(envelope.body)
        except (InvalidInput, InvalidBrief) as error:
            self._refuse(envelope, error.message)
            moves.dead(brief=envelope.id, sender=envelope.sender, callsign=None, reason=receipts.UNREADABLE)
        else:
            self._file(tx, moves, envelope, letter)
        moves.tell()

    def _file(self, tx: Tx, moves: Moves, envelope: Envelope, letter: Letter) -> None:
        filed = filing.write_brief(letter, brief_id=envelope.id, node=envelope.sender)
        if filed is None:
            log.warning("brief filed before", extra={"id": envelope.id, "peer": envelope.sender})
            return
        here = filing.deliver(tx, filed, letter, me=self._node.node_id)
        for name in here.missing:
            moves.dead(
                brief=envelope.id, sender=envelope.sender, callsign=name, reason=receipts.NO_SUCH_CALLSIGN
            )
        self._announce(tx, here.callsigns)
        log.info(
            "filed", extra={"id": envelope.id, "peer": envelope.sender, "mailboxes": len(here.callsigns)}
        )

    def _on_receipts(self, tx: Tx, envelope: Envelope) -> None:
        """Take in what another node says of briefs that were sent from here. Must not raise for a bad one."""
        try:
            told = wire.decode_receipts(envelope.body)
        except InvalidInput as error:
            self._refuse(envelope, error.message)
            return
        self._moves(tx).hear(envelope.sender, told)

    def _refuse(self, envelope: Envelope, why: str) -> None:
        self.refused[envelope.subject] += 1
        log.warning(
            "unreadable",
            extra={"id": envelope.id, "peer": envelope.sender, "subject": envelope.subject, "why": why},
        )

    def _announce(self, tx: Tx, callsigns: Sequence[str]) -> None:
        for callsign in callsigns:
            tx.after_commit(partial(self._push.arrived, callsign))

    def _moves(self, tx: Tx) -> Moves:
        return Moves(tx, me=self._node.node_id, changed=self._changed)

    # ---- reading ----

    async def check(self, caller: Caller | None, args: Args) -> Shape:
        """Count what is unread. Changes nothing."""
        who, directory = leases.need(caller), self.directory()
        return await self._node.read(lambda _: views.check(who.callsign, directory))

    async def inbox(self, caller: Caller | None, args: Args) -> Shape:
        """List unread briefs, or all, newest first. Changes nothing."""
        who, directory = leases.need(caller), self.directory()
        sender, since = arguments.text(args, "from"), arguments.text(args, "since")
        listing = partial(
            views.inbox,
            who.callsign,
            directory,
            with_read=arguments.flag(args, "all"),
            sender=address.parse(sender) if sender else None,
            since_ms=arguments.time_ms(since, now_ms=_now_ms()) if since else None,
            limit=arguments.number(args, "limit", default=LIMIT_DEFAULT),
        )
        return await self._node.read(lambda _: listing())

    async def read(self, caller: Caller | None, args: Args) -> Shape:
        """Return a brief in full and mark it read, unless `peek`; its sender is told."""
        who, directory = leases.need(caller), self.directory()
        ident, raw = arguments.needed(args, "id"), arguments.flag(args, "raw")
        if not arguments.flag(args, "peek"):
            await self._node.transact(self._mark_read, who, [ident])

        def shape(_: object) -> Shape:
            return views.read_shape(*views.find(who.callsign, ident, me=directory.me), directory, raw=raw)

        return await self._node.read(shape)

    async def mark_read(self, caller: Caller | None, args: Args) -> Shape:
        """Mark briefs as read whose text has been shown."""
        who, idents = leases.need(caller), arguments.texts(args, "ids")
        return {"ids": await self._node.transact(self._mark_read, who, idents)}

    def _mark_read(self, tx: Tx, who: Caller, idents: Sequence[str]) -> list[str]:
        leases.still_holds(who)
        moves = self._moves(tx)
        found = [views.find(who.callsign, each, me=self._node.node_id) for each in idents]
        for filed, delivery in found:
            if delivery is not None:
                moves.move(filed, delivery, READ)
        moves.tell()
        return [filed.id for filed, _ in found]

    async def _find(self, who: Caller, ident: str) -> tuple[Brief, Delivery | None]:
        return await self._node.read(lambda _: views.find(who.callsign, ident, me=self._node.node_id))

    async def wait_state(self, caller: Caller | None, args: Args) -> Shape:
        """Wait until a sent brief is `delivered` or `read` at every recipient that can still get it. Else TimedOut."""
        who, state = leases.need(caller), arguments.text(args, "state") or DELIVERED
        if state not in (DELIVERED, READ):
            raise InvalidInput(f"cannot wait for {state[:40]!r}", hint=f"one of: {DELIVERED}, {READ}")
        timeout_ms = arguments.number(args, "timeout_ms", default=30_000)
        filed, _ = await self._find(who, arguments.needed(args, "id"))
        if (filed.from_callsign, filed.from_node) != (who.callsign, self._node.node_id):
            raise NotFound(f"{who.callsign} has not sent {filed.id}")
        changed = asyncio.Event()
        self._watchers.setdefault(filed.id, set()).add(changed)
        try:
            async with asyncio.timeout(min(timeout_ms, WAIT_MS_MAX) / 1000):
                while not _all_reached(told := await self._recipients(filed), state):
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            raise TimedOut(
                f"{filed.id} is not {state} everywhere yet", hint="nothing is lost: it is still under way"
            ) from None
        finally:
            self._watchers[filed.id].discard(changed)
            if not self._watchers[filed.id]:
                del self._watchers[filed.id]
        return {"id": filed.id, "thread": filed.thread, "recipients": told}

    async def _recipients(self, filed: Brief) -> list[Shape]:
        directory, now_ms = self.directory(), _now_ms()
        return await self._node.read(lambda _: views.recipients(filed.row, directory, now_ms=now_ms))

    def _changed(self, brief_id: str) -> None:
        for event in self._watchers.get(brief_id, ()):
            event.set()

    # ---- what push asks for ----

    async def waiting(self, callsign: str) -> Sequence[Waiting]:
        directory = self.directory()
        return await self._node.read(lambda _: views.waiting(callsign, directory))

    async def announced(self, told: Sequence[Waiting], *, door: str) -> None:
        for start in range(0, len(told), SLICE):
            await self._node.transact(self._write_announced, told[start : start + SLICE], door)

    def left(self, callsign: str) -> None:
        self._upkeep.wanted.set()

    def _write_announced(self, tx: Tx, told: Sequence[Waiting], door: str) -> None:
        moves = self._moves(tx)
        for each in told:
            delivery = Delivery.get_by_id(each.delivery)
            moves.move(
                Brief.get_by_id(delivery.brief),
                delivery,
                ANNOUNCED,
                door=door,
                lease_number=each.lease_number,
            )
        moves.tell()

    # ---- the node and the mesh ----

    async def roster(self, who: Caller | None, args: Args) -> Shape:
        """Say who is where, and which nodes can be reached."""
        directory, now_ms = self.directory(), _now_ms()
        callsign = who.callsign if who else None
        counted = await self._node.read(lambda _: views.roster_counts(callsign, now_ms=now_ms))
        me = {
            "id": directory.me,
            "name": self._node.name,
            "state": "alive",
            "rtt_ms": None,
            "last_seen": views.shown(now_ms),
        }
        return {
            "nodes": [me]
            + [
                {
                    "id": peer.node_id,
                    "name": peer.name,
                    "state": peer.state,
                    "rtt_ms": peer.rtt_ms,
                    "last_seen": views.shown(peer.last_seen_ms),
                }
                for peer in self._node.peers()
            ],
            "callsigns": [
                views.roster_row(
                    place,
                    directory,
                    counted,
                    now_ms=now_ms,
                    door=self._push.door_of(place.callsign) if place.node == directory.me else None,
                )
                for place in sorted(directory.residents)
            ],
        }

    async def status(self, who: Caller | None, args: Args) -> Shape:
        """Describe node, mailbox, store and peers in one answer. Nobody has neither inbox nor actions."""
        node, callsign = self._node, who.callsign if who else None

        def counted(_: object) -> Shape:
            return {
                "inbox": views.inbox_counts(callsign) if callsign else None,
                "actions": views.action_counts(callsign) if callsign else None,
                "store": views.store_counts(),
            }

        counts = await node.read(counted)
        path = node.home / "store.db"
        files = [each for each in (path, path.with_name("store.db-wal")) if each.exists()]
        return {
            "version": __version__,
            "node": {
                "id": node.node_id,
                "name": node.name,
                "pid": os.getpid(),
                "uptime_s": int(time.monotonic() - self._started_s),
                "endpoints": list(node.endpoints),
                "removed_by": self._name_of(node.removed_by),
            },
            "inbox": counts["inbox"],
            "actions": counts["actions"],
            "store": {
                "path": str(path),
                "bytes": sum(each.stat().st_size for each in files),
                **counts["store"],
                "state": node.health.state,
                "why": node.health.why,
                "quarantined": node.health.quarantined,
                "events": [
                    {
                        "at": times.format_time(one.at_ms),
                        "kind": one.kind,
                        "peer": one.peer,
                        "detail": one.detail,
                    }
                    for one in await node.events(limit=_EVENTS_SHOWN)
                ],
            },
            "peers": [_peer_shape(peer) for peer in node.peers()],
            "refused": {**await node.refused(), **self.refused},
            "config": self._settings.listing(),
        }

    async def backup(self, who: Caller | None, args: Args) -> Shape:
        """Copy the store to a new file while everything goes on."""
        path = arguments.needed(args, "path")
        return {"path": path, "bytes": await self._node.backup(path)}

    async def peers(self, who: Caller | None, args: Args) -> Shape:
        """List the other nodes of the mesh."""
        return {"peers": [_peer_shape(peer) for peer in self._node.peers()]}

    async def remove_peer(self, who: Caller | None, args: Args) -> Shape:
        """Remove a node, named by its name, its id or the beginning of it; this one leaves the mesh."""
        node_id = self.directory().node(arguments.needed(args, "node").lower())
        name = await self._node.remove_peer(node_id)
        return {"removed": {"id": node_id, "name": name, "is_this": node_id == self._node.node_id}}

    async def rotate_key(self, who: Caller | None, args: Args) -> Shape:
        """Give this node another key, and say which nodes know it."""
        names = {peer.node_id: peer.name for peer in self._node.peers()}
        aware, unaware = await self._node.rotate_key()
        return {
            "aware": [names.get(one, one) for one in aware],
            "unaware": [names.get(one, one) for one in unaware],
        }

    async def invite(self, who: Caller | None, args: Args) -> Shape:
        """Make a code with which one other node may join."""
        ttl = arguments.text(args, "ttl")
        ttl_ms = (
            times.parse_duration(ttl) if ttl else arguments.number(args, "ttl_ms", default=INVITE_MS_DEFAULT)
        )
        invitation = await self._node.invite(ttl_ms=ttl_ms, address=arguments.text(args, "address"))
        return {"code": invitation.encode(), "expires_at": times.format_time(invitation.expires_ms)}

    async def join(self, who: Caller | None, args: Args) -> Shape:
        """Join the mesh of the node that made `code`."""
        joined = await self._node.join(arguments.needed(args, "code"))
        return {"node": joined.name, **await self.peers(who, args)}

    def _name_of(self, node_id: str | None) -> str | None:
        if node_id is None:
            return None
        if node_id == self._node.node_id:
            return self._node.name
        return next((peer.name for peer in self._node.peers() if peer.node_id == node_id), node_id)

    async def node_status(self, who: Caller | None, args: Args) -> Shape:
        return {"state": "running", "pid": os.getpid(), "version": __version__}


# ---- pure pieces ----


def _warnings(states: Mapping[Place, str], directory: Directory, *, now_ms: int) -> list[str]:
    """Say what the sender may want to know: who is not there, and which nodes cannot be reached."""
    said: dict[str, None] = {}
    for place, state in states.items():
        node, shown = directory.label(place.node), directory.address(*place)
        resident = directory.residents.get(place)
        if state == DEAD:
            said[f"nobody is called {place.callsign} at {node}"] = None
        elif not directory.nodes[place.node].is_alive:
            said[f"{node} cannot be reached now: the brief leaves when it is back"] = None
        elif resident is None:
            said[f"nobody called {place.callsign} is known at {node} yet: the node will say"] = None
        elif resident.kind == "agent" and resident.state == OFFLINE:
            ago = times.age(since_ms=resident.last_seen_ms, now_ms=now_ms)
            said[f"{shown} is not running (last seen {ago}): the brief waits for it"] = None
    warnings = list(said)
    if len(warnings) > WARNINGS_MAX:
        return [*warnings[: WARNINGS_MAX - 1], f"and {len(warnings) - WARNINGS_MAX + 1} more"]
    return warnings


def _all_reached(recipients: Sequence[Shape], state: str) -> bool:
    """Whether all are as far as `state`. Those that never will be are not waited for."""
    least = PROGRESS.index(state)
    return all(each["state"] in ENDED or PROGRESS.index(each["state"]) >= least for each in recipients)


def _only(place: Place) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    return (place,), ()


def _re(title: str) -> str:
    return title if title.lower().startswith("re: ") else f"Re: {title}"[: brief.TITLE_CHARS_MAX]


def _peer_shape(peer: PeerView) -> Shape:
    return {
        "id": peer.node_id,
        "name": peer.name,
        "state": peer.state,
        "rtt_ms": peer.rtt_ms,
        "endpoints": list(peer.endpoints),
        "pending": peer.is_pending,
        "why": peer.why_closed or None,
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
