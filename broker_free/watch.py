"""Who is there, in the owner thread: sends and reads the beats and probes that `presence.py` decides on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from broker_free.clock import mono_ms, utc_ms
from broker_free.errors import InvalidInput
from broker_free.limits import Limits
from broker_free.membership import Member
from broker_free.presence import INCARNATION_MAX, Action, Presence, State, Tell, decode, encode
from broker_free.tick import Tick
from broker_free.transport import Transport

log = logging.getLogger("broker_free")


class Watch:
    """Presence with a wire: everybody's beats in a small mesh, probes in a large one."""

    def __init__(
        self,
        *,
        me: str,
        boot: int,
        limits: Limits,
        random: Random,
        tick: Tick,
        transport: Transport,
        newest_row: Callable[[], int],
        changed: Callable[[str], None],
    ) -> None:
        """`changed(peer)` is called when the state of a peer is another one."""
        self.seen_ms: dict[str, int] = {}  # UTC of the last sign of life
        self._me = me
        self._boot = boot
        self._limits = limits
        self._tick = tick
        self._transport = transport
        self._newest_row = newest_row
        self._changed = changed
        # UTC, so that a node that starts again is believed over what was said of its earlier life.
        self._presence = Presence(limits, me=me, random=random, incarnation=utc_ms())
        self._members: dict[str, Member] = {}
        self._untold: dict[str, list[bytes]] = {}  # messages that wait a moment for a session
        self._is_beating = True  # whether this mesh is small enough for beats to everybody
        self._beat_due_ms = 0

    # -- members --------------------------------------------------------------------------------------------

    def add(self, member: Member) -> None:
        """Watch a member, or take in where its beats come from now."""
        known = self._members.get(member.node_id)
        self._members[member.node_id] = member
        self._presence.add(member.node_id)
        if self._is_beating and known and known.beat_endpoint != member.beat_endpoint:
            self._transport.unwatch(known.beat_endpoint)
        if self._is_beating:
            self._watch([member])
        self._fit_to_size()

    def remove(self, peer: str) -> None:
        member = self._members.pop(peer, None)
        if member is None:
            return
        self._transport.unwatch(member.beat_endpoint)
        self._presence.discard(peer)
        self._untold.pop(peer, None)
        self.seen_ms.pop(peer, None)
        self._fit_to_size()

    def renew(self, peer: str) -> None:
        """Subscribe to a member's beats anew: a subscription that was refused never tries again by itself.

        Whoever has just paired may have been let in only now.
        """
        member = self._members[peer]
        if self._is_beating and member.beat_endpoint:
            self._transport.unwatch(member.beat_endpoint)
            self._watch([member])

    def state(self, peer: str) -> State:
        return self._presence.state(peer)

    def _watch(self, members: Iterable[Member]) -> None:
        for member in members:
            if member.beat_endpoint:
                self._transport.watch(member.beat_endpoint, server_key=member.public_key)

    def _fit_to_size(self) -> None:
        """Beat to everybody and dial everybody in a small mesh only."""
        is_beating = not self._presence.is_large
        if is_beating == self._is_beating:
            return
        self._is_beating = is_beating
        self._tick.be_eager(is_beating)
        if is_beating:
            self._watch(self._members.values())
        else:
            for member in self._members.values():
                self._transport.unwatch(member.beat_endpoint)

    # -- signs of life --------------------------------------------------------------------------------------

    def lagged(self, lag_ms: int, now_ms: int) -> None:
        self._presence.lagged(lag_ms, now_ms)

    def heard(self, peer: str, now_ms: int, *, incarnation: int = 0) -> None:
        """Take any frame of a peer as a sign of life."""
        self.seen_ms[peer] = utc_ms()
        self._carry_out(self._presence.heard(peer, now_ms, incarnation=incarnation))

    def on_beat(self, parts: Sequence[bytes], now_ms: int) -> None:
        try:
            beat: Any = json.loads(parts[0]) if len(parts) == 1 and len(parts[0]) <= 1_024 else None
        except (ValueError, RecursionError):
            return
        match beat:
            case {"node_id": str(peer)} if peer in self._members:
                said = beat.get("inc")
                incarnation = said if isinstance(said, int) and 0 <= said < INCARNATION_MAX - 1 else 0
                self.heard(peer, now_ms, incarnation=incarnation)
                if not self._tick.links[peer].is_open:
                    self._tick.redial_now(peer)  # it is there: no reason to wait out the back-off

    def on_probe(self, peer: str, body: bytes) -> None:
        try:
            message = decode(body, peers_max=self._limits.peers_max)
        except InvalidInput as error:
            log.warning("frame dropped", extra={"peer": peer, "reason": error.message})
            return
        self._carry_out(self._presence.receive(peer, message, mono_ms()))

    def on_opened(self, peer: str) -> None:
        self.seen_ms[peer] = utc_ms()
        for body in self._untold.pop(peer, ()):
            self._tick.probe(peer, body)

    # -- time -----------------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        if now_ms >= self._beat_due_ms:
            self._beat_due_ms = now_ms + self._limits.heartbeat_ms
            self._untold.clear()
            if self._is_beating:
                self._transport.beat([self._beat()])
            self._tick.retire_idle(keep=self._limits.idle_sessions_max, idle_ms=self._limits.session_idle_ms)
        self._carry_out(self._presence.tick(now_ms))

    def next_wake_ms(self) -> int:
        return min(self._beat_due_ms, self._presence.next_wake_ms())

    def _beat(self) -> bytes:
        """Say that this node is there. The newest row shows that its store works too, not only its process."""
        beat = {
            "node_id": self._me,
            "boot": self._boot,
            "inc": self._presence.incarnation,
            "row": self._newest_row(),
        }
        return json.dumps(beat).encode()

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Tell):
                body = encode(action.message)
                if not self._tick.probe(action.peer, body) and self._presence.state(action.peer) != "down":
                    self._untold.setdefault(action.peer, []).append(body)
            else:
                self._changed(action.peer)
                if action.state == "suspect":
                    self._tick.ping(action.peer)  # ends a dead session, so that a new one is dialled
