"""Who is there: alive, suspect or down. Pure: signs of life and time go in, messages to send and changes come out.

Presence decides when to dial and what to show, never whether something is delivered. Times are monotonic. A node
that was itself suspended (a closed laptop, a debugger) has heard nobody for a while, which says nothing about the
others: its own lag stretches its time-outs.

Small meshes, up to `Limits.beat_members_max` nodes: everybody hears everybody's beats, any frame counts as one. Silence
makes a peer suspect; then it is asked directly and through three others, and as long as one of them vouches for it,
it is alive although nothing comes from it (one direction of the network is broken). More silence makes it down.

Large meshes: beats to everybody would cost n² messages, so nodes probe instead, as in SWIM (Das, Gupta, Motivala, DSN
2002). In each period a node pings one member, in a random order that comes round to everybody; without an answer it
asks three others to try; without theirs the member is suspect. What changed travels as news: whoever hears of it first
tells `RUMOUR` members at once, which reaches most of a thousand in less than a second, and repeats it on its next pings
and acks for those that the rumour missed. (On pings and acks alone news takes log n periods, longer than a suspicion
lasts: in a simulated mesh of 1,000 refutations came too late.) A member that hears that it is suspect refutes that with
a higher incarnation; a suspicion that nobody refutes ends in down. Only the member itself raises its incarnation, so
that of two contradicting claims the later one is known.

    message, one JSON object                                           meaning
    {"ping": nonce, "news": [...]}                                     are you there?
    {"ack": nonce, "about": node, "inc": incarnation, "news": [...]}   I am; or: it is, I have just heard it
    {"ask": node, "nonce": nonce}                                      try it for me
    {"roll": true}                                                     tell me of everybody (a node that has started)
    {"news": [[node, state, incarnation], ...]}                        the answer, state being 0 alive 1 suspect 2 down
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Literal

from broker_free.errors import InvalidInput
from broker_free.limits import Limits

State = Literal["alive", "suspect", "down"]
STATES: Final[tuple[State, ...]] = ("alive", "suspect", "down")

RUMOUR: Final = 2
NEWS_MAX: Final = 24  # items on a ping or an ack: about 1 KiB
ASKED_MAX: Final = 256  # questions of others that wait for an answer here
_LAG_MS: Final = 1_000  # a loop that is late by more than this was not running
_IDLE_MS: Final = 60_000  # a mesh of one has nobody to watch
_PAUSE_MS: Final = 20  # between two looks, at least
_NEVER_MS: Final = -(1 << 62)
INCARNATION_MAX: Final = 1 << 53  # what JSON readers that know only doubles can carry
_DOWN_PROBED: Final = 0.1  # of its turns, a member that is down gets a ping in so many: it may be back
_ROLL_PERIODS: Final = 30  # between two exchanges of everything, which mend what news has lost


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to a peer; where there is no session, dial it (an answer to that is a sign of life too)."""

    peer: str
    message: Mapping[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class Changed:
    peer: str
    state: State


Action = Tell | Changed


@dataclass(slots=True)
class _Peer:
    state: State = "down"
    direct_ms: int = _NEVER_MS  # last sign of life that came from itself
    heard_ms: int = _NEVER_MS  # the same, or somebody vouched for it
    probed_ms: int = _NEVER_MS
    suspected_ms: int = 0
    incarnation: int = 0
    rank: int = 0  # the worst state (index of STATES) claimed of it under this incarnation


@dataclass(slots=True)
class _Question:
    """Somebody asked whether `target` is there."""

    asker: str
    target: str
    nonce: int
    until_ms: int


@dataclass(slots=True)
class _Probe:
    """The ping of the present period."""

    target: str
    asks_ms: int
    ends_ms: int
    has_asked: bool = False


@dataclass(slots=True)
class _News:
    """What is told of one member, and how often it has been told."""

    rank: int
    incarnation: int
    told: int = 0


@dataclass(slots=True)
class Counts:
    """What presence has sent, for those who look at its cost."""

    messages: int = 0
    suspicions: int = 0
    refutations: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)


class Presence:
    """What this node believes of each peer. A peer never heard is down."""

    def __init__(self, limits: Limits, *, me: str, random: Random, incarnation: int) -> None:
        """`incarnation` must not be lower than in an earlier life of this node: UTC at its start will do."""
        self.counts = Counts()
        self._limits = limits
        self._me = me
        self._random = random
        self._incarnation = incarnation
        self._peers: dict[str, _Peer] = {}
        self._suspects: set[str] = set()
        self._news = {me: _News(0, incarnation)}
        self._questions: list[_Question] = []
        self._order: list[str] = []  # whom to ping in the next periods
        self._probe: _Probe | None = None
        self._next_ms = 0
        self._roll_ms = 0
        self._stretch = 1
        self._stretch_until_ms = 0

    # -- who is to be watched -------------------------------------------------------------------------------

    def add(self, peer: str) -> None:
        if peer not in self._peers:
            self._peers[peer] = _Peer()
            self._next_ms = 0  # whatever was due next did not know of it

    def discard(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self._news.pop(peer, None)
        self._suspects.discard(peer)

    @property
    def is_large(self) -> bool:
        """Whether this mesh is too large for everybody's beats."""
        return len(self._peers) >= self._limits.beat_members_max

    @property
    def incarnation(self) -> int:
        return self._incarnation

    def state(self, peer: str) -> State:
        found = self._peers.get(peer)
        return found.state if found else "down"

    # -- signs of life --------------------------------------------------------------------------------------

    def heard(self, peer: str, now_ms: int, *, incarnation: int = 0) -> list[Action]:
        """Take any frame or beat of a peer as a sign of life."""
        found = self._peers.get(peer)
        if found is None:
            return []
        found.direct_ms = now_ms
        actions = self._is_alive(peer, found, now_ms, incarnation)
        if self._questions:
            waiting = [one for one in self._questions if one.target == peer]
            if waiting:
                self._questions = [one for one in self._questions if one.target != peer]
                actions += [self._ack(one.asker, one.nonce, peer, found.incarnation) for one in waiting]
        return actions

    def lagged(self, lag_ms: int, now_ms: int) -> None:
        """Take into account that this node's own loop was late by `lag_ms`."""
        if lag_ms >= _LAG_MS:
            self._stretch = min(self._limits.lag_stretch_max, 1 + lag_ms // _LAG_MS)
            self._stretch_until_ms = now_ms + self._limits.down_after_ms * self._stretch

    def receive(self, peer: str, message: Mapping[str, Any], now_ms: int) -> list[Action]:
        """Take in a message (as `decode` returned it) of a peer. The frame itself has been `heard` already."""
        if peer not in self._peers:
            return []
        actions: list[Action] = []
        for target, rank, incarnation in message.get("news", ()):
            actions += self._learn(target, rank, incarnation, now_ms)
        match message:
            case {"ping": int(nonce)}:
                actions.append(self._ack(peer, nonce, self._me, self._incarnation))
            case {"ack": int(), "about": str(about), "inc": int(incarnation)}:
                found = self._peers.get(about)
                if found is not None:
                    actions += self._is_alive(about, found, now_ms, incarnation)
            case {"ask": str(target), "nonce": int(nonce)}:
                actions += self._try_for(peer, target, nonce, now_ms)
            case {"roll": True}:
                actions.append(self._tell(peer, "news", {"news": self._everybody()}))
        return actions

    # -- time -----------------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> list[Action]:
        """Draw the conclusions from silence, and send what is due."""
        if now_ms >= self._stretch_until_ms:
            self._stretch = 1
        self._questions = [one for one in self._questions if now_ms < one.until_ms]
        if now_ms < self._next_ms:
            return []
        if self.is_large:
            return self._probe_on(now_ms)
        self._probe = None
        actions = [
            action for peer, found in self._peers.items() for action in self._judge(peer, found, now_ms)
        ]
        due_ms = min(
            (self._due_ms(found, now_ms) for found in self._peers.values()), default=now_ms + _IDLE_MS
        )
        self._next_ms = max(due_ms, now_ms + _PAUSE_MS)
        return actions

    def next_wake_ms(self) -> int:
        return self._next_ms

    def _judge(self, peer: str, found: _Peer, now_ms: int) -> list[Action]:
        """Small mesh: conclude from one peer's silence.

        It is asked one beat before it would turn suspect: a peer whose beats do not come through, or in one direction
        only, stays alive instead of turning to and fro.
        """
        limits, stretch = self._limits, self._stretch
        silence_ms = now_ms - found.heard_ms
        actions: list[Action] = []
        if silence_ms >= limits.down_after_ms * stretch:
            actions += self._turn(peer, found, "down")
        elif silence_ms >= limits.suspect_after_ms * stretch:
            actions += self._turn(peer, found, "suspect")
        is_silent = now_ms - found.direct_ms >= self._asked_after_ms
        if is_silent and now_ms - found.probed_ms >= self._pause_ms(found):
            found.probed_ms = now_ms
            actions.append(self._ping(peer))
            actions += self._ask_others(peer)
        return actions

    @property
    def _asked_after_ms(self) -> int:
        return (self._limits.suspect_after_ms - self._limits.heartbeat_ms) * self._stretch

    def _pause_ms(self, found: _Peer) -> int:
        return self._limits.down_after_ms if found.state == "down" else self._limits.heartbeat_ms

    def _due_ms(self, found: _Peer, now_ms: int) -> int:
        """Small mesh: return when `_judge` may conclude something new of a peer, if it stays silent."""
        limits, stretch = self._limits, self._stretch
        times = [max(found.direct_ms + self._asked_after_ms, found.probed_ms + self._pause_ms(found))]
        if found.state == "alive":
            times.append(found.heard_ms + limits.suspect_after_ms * stretch)
        if found.state != "down":
            times.append(found.heard_ms + limits.down_after_ms * stretch)
        return min((time_ms for time_ms in times if time_ms > now_ms), default=now_ms)

    def _probe_on(self, now_ms: int) -> list[Action]:
        """Large mesh: one period after another, each with one ping."""
        limits = self._limits
        actions = self._give_up_suspects(now_ms)
        probe = self._probe
        if probe is not None and probe.target in self._peers and now_ms < probe.ends_ms:
            if not probe.has_asked:
                probe.has_asked = True
                if self._peers[probe.target].heard_ms < probe.asks_ms - limits.probe_ack_ms:
                    actions += self._ask_others(probe.target)
            self._next_ms = probe.ends_ms
            return actions
        if probe is not None:
            actions += self._conclude(probe, now_ms)
        self._probe = None
        target = self._next_target()
        if target is not None:
            period_ms = limits.heartbeat_ms * self._stretch
            asks_ms = now_ms + limits.probe_ack_ms * self._stretch
            self._probe = _Probe(target, asks_ms=asks_ms, ends_ms=now_ms + period_ms)
            self._peers[target].probed_ms = now_ms
            actions.append(self._ping(target))
            self._next_ms = asks_ms
        else:
            self._next_ms = now_ms + limits.heartbeat_ms
        if now_ms >= self._roll_ms:
            alive = self._some_alive(1, but="")
            if alive:
                self._roll_ms = now_ms + _ROLL_PERIODS * limits.heartbeat_ms
                actions.append(self._tell(alive[0], "roll", {"roll": True}))
        return actions

    def _conclude(self, probe: _Probe, now_ms: int) -> list[Action]:
        found = self._peers.get(probe.target)
        if found is None or found.heard_ms >= found.probed_ms or found.state != "alive":
            return []
        found.rank = max(found.rank, 1)
        found.suspected_ms = now_ms
        self.counts.suspicions += 1
        return [*self._turn(probe.target, found, "suspect"), *self._spread(probe.target, found)]

    def _give_up_suspects(self, now_ms: int) -> list[Action]:
        limits = self._limits
        patience_ms = (limits.down_after_ms - limits.suspect_after_ms) * self._stretch
        actions: list[Action] = []
        for peer in [one for one in self._suspects if now_ms - self._peers[one].suspected_ms >= patience_ms]:
            found = self._peers[peer]
            found.rank = 2
            actions += [*self._turn(peer, found, "down"), *self._spread(peer, found)]
        return actions

    def _next_target(self) -> str | None:
        for _ in range(len(self._peers) + 1):
            if not self._order:
                self._order = list(self._peers)
                self._random.shuffle(self._order)
                if not self._order:
                    return None
            peer = self._order.pop()
            found = self._peers.get(peer)
            if found is None:
                continue
            is_unknown = found.heard_ms == _NEVER_MS
            if found.state != "down" or is_unknown or self._random.random() < _DOWN_PROBED:
                return peer
        return None

    # -- claims ---------------------------------------------------------------------------------------------

    def _is_alive(self, peer: str, found: _Peer, now_ms: int, incarnation: int) -> list[Action]:
        found.heard_ms = now_ms
        if incarnation > found.incarnation:
            found.incarnation, found.rank = incarnation, 0
        return self._turn(peer, found, "alive")

    def _learn(self, peer: str, rank: int, incarnation: int, now_ms: int) -> list[Action]:
        """Take in what somebody claims of a member. The later incarnation counts, then the worse state."""
        if peer == self._me:
            if rank:
                self._incarnation = max(self._incarnation, incarnation + 1)
                self.counts.refutations += 1
                return self._rumour(self._me, 0, self._incarnation)
            return []
        found = self._peers.get(peer)
        if found is None or (incarnation, rank) <= (found.incarnation, found.rank):
            return []
        found.incarnation, found.rank = incarnation, rank
        actions = self._spread(peer, found)
        if rank == 0:
            found.heard_ms = now_ms
            return [*actions, *self._turn(peer, found, "alive")]
        if not self.is_large or now_ms - found.direct_ms < self._limits.suspect_after_ms:
            return actions  # own ears are better evidence; the member itself refutes the claim
        if STATES.index(found.state) >= rank:
            return actions
        if rank == 1:
            found.suspected_ms = now_ms
        return [*actions, *self._turn(peer, found, STATES[rank])]

    def _turn(self, peer: str, found: _Peer, state: State) -> list[Action]:
        if found.state == state or (found.state == "down" and state == "suspect"):
            return []
        found.state = state
        if state == "suspect":
            self._suspects.add(peer)
        else:
            self._suspects.discard(peer)
        return [Changed(peer, state)]

    def _spread(self, peer: str, found: _Peer) -> list[Action]:
        return self._rumour(peer, found.rank, found.incarnation) if self.is_large else []

    def _rumour(self, node: str, rank: int, incarnation: int) -> list[Action]:
        self._news[node] = _News(rank, incarnation)
        told = self._some_alive(RUMOUR, but=node)
        if rank == 1:
            told.append(node)  # it may be there and can refute it at once
        return [self._tell(one, "news", {"news": [(node, rank, incarnation)]}) for one in told]

    # -- messages -------------------------------------------------------------------------------------------

    def _ping(self, peer: str) -> Tell:
        return self._tell(peer, "ping", {"ping": self._random.getrandbits(32), "news": self._latest(peer)})

    def _ack(self, peer: str, nonce: int, about: str, incarnation: int) -> Tell:
        message = {"ack": nonce, "about": about, "inc": incarnation, "news": self._latest(peer)}
        return self._tell(peer, "ack", message)

    def _ask_others(self, target: str) -> list[Action]:
        nonce = self._random.getrandbits(32)
        return [
            self._tell(one, "ask", {"ask": target, "nonce": nonce})
            for one in self._some_alive(self._limits.probe_members, but=target)
        ]

    def _try_for(self, asker: str, target: str, nonce: int, now_ms: int) -> list[Action]:
        if target == self._me:
            return [self._ack(asker, nonce, self._me, self._incarnation)]
        if target not in self._peers or len(self._questions) >= ASKED_MAX:
            return []
        until_ms = now_ms + self._limits.pong_timeout_ms
        self._questions.append(_Question(asker, target, nonce, until_ms))
        return [self._ping(target)]

    def _tell(self, peer: str, kind: str, message: Mapping[str, Any]) -> Tell:
        self.counts.messages += 1
        self.counts.by_kind[kind] = self.counts.by_kind.get(kind, 0) + 1
        return Tell(peer, message)

    def _some_alive(self, count: int, *, but: str) -> list[str]:
        """Pick members at random. Tries first at single ones, since looking at all costs n."""
        peers = list(self._peers)
        found: dict[str, None] = {}
        for _ in range(4 * count):
            one = self._random.choice(peers) if peers else ""
            if one and one != but and self._peers[one].state == "alive":
                found[one] = None
            if len(found) == count:
                return list(found)
        alive = [peer for peer in peers if peer != but and self._peers[peer].state == "alive"]
        return self._random.sample(alive, min(count, len(alive)))

    def _latest(self, peer: str) -> list[tuple[str, int, int]]:
        """Return the news told least often. Whoever is suspected hears that first, so that it can refute it."""
        news: list[tuple[str, int, int]] = []
        found = self._peers.get(peer)
        if found and found.rank:
            news.append((peer, found.rank, found.incarnation))
        if not self._news:
            return news
        told_max = math.ceil(3 * math.log(len(self._peers) + 2))
        for node, item in sorted(self._news.items(), key=lambda pair: (pair[1].told, -pair[1].rank))[
            :NEWS_MAX
        ]:
            item.told += 1
            if item.told >= told_max:
                del self._news[node]
            if node != peer:
                news.append((node, item.rank, item.incarnation))
        return news

    def _everybody(self) -> list[tuple[str, int, int]]:
        everybody = [
            (peer, STATES.index(found.state), found.incarnation)
            for peer, found in self._peers.items()
            if found.incarnation and found.state != "suspect"
        ]
        return [*everybody, (self._me, 0, self._incarnation)]


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def decode(body: bytes, *, peers_max: int) -> Mapping[str, Any]:
    """Read a message of a peer. Raises InvalidInput for anything of another shape; unknown keys are left alone."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInput("a probe that is not JSON") from None
    if not isinstance(message, dict):
        raise InvalidInput("a probe that is not an object")
    news = message.get("news", [])
    if not isinstance(news, list) or len(news) > peers_max + 1 or not all(_is_news(one) for one in news):
        raise InvalidInput("a probe with malformed news")
    if not 0 <= _number(message.get("inc", 0)) < INCARNATION_MAX:
        raise InvalidInput("a probe with an impossible incarnation")
    return message


def _is_news(one: object) -> bool:
    match one:
        case [str(), int(rank), int(incarnation)]:
            return 0 <= rank < len(STATES) and 0 <= incarnation < INCARNATION_MAX - 1
    return False


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1
