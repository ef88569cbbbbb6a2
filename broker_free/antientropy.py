"""How registry entries travel: each change at once, and whatever is missed by comparing trees of digests. Pure.

A change is pushed to every open session. Whoever gets it forwards it to peers that the sender did not reach, unless
two others are better placed (by a hash that all compute alike): so a full mesh of n nodes sends n - 1 frames a change,
and a star or a chain the same. What that misses is found by comparing, over the same sessions:

    asker                                             answerer (remembers nothing between two frames)
    root    hash of everything, time away  →
            ←  same                                   … and both know that they are alike
            ←  leaves   256 digests, one a leaf       leaf = hash of (bucket, key) modulo 256
    page    for a few leaves that differ: (key hash, stamp, digest) of each entry  →
            ←  give     entries that win over the asker's, up to one frame; keys wanted; keys gone; leaves done
    fill    the wanted entries, up to one frame  →
    page    …                                 →       until every leaf that differed is done
    done                                      →

One page is under way at a time and every frame is small, so mail on the same connection waits for one of them at most.
A question is answered after the commit of what arrived before it. Nodes compare when a session opens (greetings carry
the root, so equals exchange nothing), every `Limits.registry_sync_ms` with one peer, and soon after they have learned
something in this way, so that it goes on along chains of nodes that have no link with each other.

Tombstones are kept for `Limits.tombstone_ms` after they arrive, and for as long as this node has not compared with
anybody since. A node that compared with nobody for longer than that may hold what the others deleted and forgot. It is
*stale*: it asks, and drops what the answerer lacks and what is older than that time; its own owned keys excepted.

Frames are REGISTRY; `k` in the metadata names them. Numbers in bodies are big endian.

    leaves  256 × digest:u64          page  n × (hash:u64 stamp:u64 digest:u64 is_tombstone:u8)
    put     entries (`registry.encode`)   fill  the same
    give    wanted:u32 gone:u32  wanted × hash:u64  gone × hash:u64  entries
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from heapq import nsmallest
from random import Random
from typing import Any, Final, NamedTuple

from broker_free.errors import InvalidInput
from broker_free.limits import DAY_MS, Limits
from broker_free.registry import LEAVES, Entry, Key, Registry, decode, encode, written_ms_of

log = logging.getLogger("broker_free")

_SUMS: Final = struct.Struct(f">{LEAVES}Q")
_LINE: Final = struct.Struct(">QQQB")
_COUNTS: Final = struct.Struct(">II")
_ASKING_MAX: Final = 2  # comparisons under way that this node began
_ANSWERS_A_TICK: Final = 4  # a page takes about a millisecond; the rest waits for the next tick
_QUESTIONS_MAX: Final = 4  # of one peer, waiting; it has one under way if it keeps to the protocol
_PAUSE_MS: Final = 5  # between two pages: as long as one keeps a node busy, so mail has half of the time
_ROUND_MS: Final = 10_000  # without an answer for so long, a comparison is given up
_SOON_MS: Final = 1_000
_RELAYS: Final = 2  # nodes that forward one change to one peer that its sender did not reach
_MARKS_MAX: Final = 256  # beyond so many peers changes are not forwarded, only compared
_MARK_CHARS: Final = 8
_STALER_BY_MS: Final = DAY_MS  # times away that differ by less say nothing about who forgot more
_NOTE_MS: Final = DAY_MS // 4  # how exactly the store knows when this node last compared
_WARN_MS: Final = 60_000  # a wrong clock shows in every comparison
_HOUSE_MS: Final = 3_600_000
_WITH_AWAY: Final = ("root", "same", "leaves")
_CLOCK_WRONG_MS: Final = 600_000  # a clock that is wrong after a boot is set within minutes


class Say(NamedTuple):
    """A REGISTRY frame to send over the open session with a peer."""

    peer: str
    meta: Mapping[str, Any]
    body: bytes = b""


@dataclass(slots=True)
class Findings:
    """What the next transaction is to do to the registry: drop, then save, then note."""

    entries: dict[Key, Entry] = field(default_factory=dict)
    drops: list[Key] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entries or self.drops or self.notes)


_Question = tuple[str, Mapping[str, Any], bytes]


@dataclass(slots=True)
class _Round:
    """A comparison that this node began."""

    deadline_ms: int
    leaves: list[int] | None = None  # still to be compared; None until the answer to the root is here
    page: tuple[int, ...] = ()  # those under way
    page_due_ms: int = 0  # the next page not before
    filled: set[int] = field(default_factory=set)  # hashes sent for the first leaf: never twice


@dataclass(slots=True)
class _Rumor:
    """A change that arrived and may have to be forwarded."""

    entries: list[Entry]
    to: tuple[str, ...]  # marks of those whom its sender sent it to
    seen: frozenset[str]  # marks of all who have it or had it sent


class Sync:
    """The conversation of one node with all its peers about the registry."""

    def __init__(
        self, *, me: str, registry: Registry, limits: Limits, random: Random, synced_ms: int = 0
    ) -> None:
        """`synced_ms` is the UTC time at which this node last compared with anybody, 0 for never."""
        self.skews_ms: dict[str, int] = {}  # peer -> how far its clock was ahead of ours at its greeting
        self._me = me
        self._registry = registry
        self._limits = limits
        self._random = random
        self._synced_ms = self._noted_ms = synced_ms
        self._peers: dict[str, int] = {}  # with an open session -> how long it was away
        self._questions: dict[str, list[_Question]] = {}
        self._rounds: dict[str, _Round] = {}
        self._wanted: dict[str, None] = {}  # peers to compare with as soon as there is room
        self._gossip: list[str] = []  # peers to compare with one by one
        self._gossip_due_ms = 0
        self._due_ms: int | None = None
        self._rumors: list[_Rumor] = []
        self._fills: list[tuple[str, list[Entry]]] = []
        self._house_due_ms = 0
        self._warn_after_ms = 0
        self.turns = 0  # how often it was time to compare with somebody
        self._wrong_since_ms: int | None = None

    # -- sessions -------------------------------------------------------------------------------------------

    def about(self, utc_ms: int) -> dict[str, Any]:
        """What this node says in its greetings."""
        return {"registry": self._registry.root, "away_ms": self.away_ms(utc_ms), "utc_ms": utc_ms}

    def away_ms(self, utc_ms: int) -> int:
        """Say how long ago this node last compared with anybody; 0 for one that never did: it forgot nothing."""
        return max(0, utc_ms - self._synced_ms) if self._synced_ms else 0

    def opened(self, peer: str, about: Mapping[str, Any], *, now_ms: int, utc_ms: int) -> None:
        root, away_ms, their_ms = about.get("registry"), about.get("away_ms"), about.get("utc_ms")
        if not (isinstance(root, str) and type(away_ms) is int and type(their_ms) is int):
            return  # of a version without this protocol
        self.skews_ms[peer] = their_ms - utc_ms
        if self._due_ms is None:
            self._due_ms = now_ms + self._pause_ms()
        self._peers[peer] = max(0, away_ms)
        if root == self._registry.root:
            self._has_synced(utc_ms)
        elif self._asks(peer, utc_ms):
            self._wanted[peer] = None
        elif (
            peer not in self._gossip
        ):  # it asks; but a change between greeting and opening only we may know of
            self._gossip.append(peer)
            self._gossip_due_ms = now_ms + _SOON_MS

    def _asks(self, peer: str, utc_ms: int) -> bool:
        """Say which of two asks: the stale one, else the one with the smaller id."""
        if self._is_staler(peer, utc_ms):
            return False
        return self._am_staler(peer, utc_ms) or self._me < peer

    def _is_staler(self, peer: str, utc_ms: int) -> bool:
        return self._is_stale(self._peers.get(peer, 0), self.away_ms(utc_ms))

    def _am_staler(self, peer: str, utc_ms: int) -> bool:
        return peer in self._peers and self._is_stale(self.away_ms(utc_ms), self._peers[peer])

    def _is_stale(self, away_ms: int, other_ms: int) -> bool:
        return away_ms > self._limits.tombstone_ms and away_ms - other_ms > _STALER_BY_MS

    def lost(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self._questions.pop(peer, None)
        self._rounds.pop(peer, None)
        self._wanted.pop(peer, None)
        self._fills = [fill for fill in self._fills if fill[0] != peer]
        if peer in self._gossip:
            self._gossip.remove(peer)

    # -- before the transaction -----------------------------------------------------------------------------

    def take(
        self, peer: str, meta: Mapping[str, Any], body: bytes, *, now_ms: int, utc_ms: int, into: Findings
    ) -> None:
        """Take in a frame: entries into the next transaction, questions for after it. Raises InvalidInput."""
        kind = meta.get("k")
        if peer not in self._peers or not isinstance(kind, str):
            return
        if kind == "put":
            entries = self._judge(peer, decode(body, self._limits), utc_ms, into)
            self._note_rumor(peer, entries, meta)
        elif kind == "fill":
            if self._judge(peer, decode(body, self._limits), utc_ms, into):
                self._learned(peer, now_ms)
        elif kind == "give":
            self._on_give(peer, meta, body, now_ms=now_ms, utc_ms=utc_ms, into=into)
        else:
            _check(kind, meta, body)
            questions = self._questions.setdefault(peer, [])
            if len(questions) < _QUESTIONS_MAX:
                questions.append((kind, meta, body))

    def _judge(self, peer: str, entries: list[Entry], utc_ms: int, into: Findings) -> list[Entry]:
        stale = peer if self._is_staler(peer, utc_ms) else None
        before = self._registry.refused["registry-future"]
        accepted = self._registry.judge(entries, now_ms=utc_ms, into=into.entries, stale=stale)
        if self._registry.refused["registry-future"] > before and utc_ms >= self._warn_after_ms:
            self._warn_after_ms = utc_ms + _WARN_MS
            skew_ms = self.skews_ms.get(peer)
            log.warning("registry entry of the future refused", extra={"peer": peer, "skew_ms": skew_ms})
        return accepted

    def _learned(self, peer: str, now_ms: int) -> None:
        """Tell the others, one a second: most have heard of it by then, and the root says so."""
        others = [one for one in self._peers if one != peer]
        self._random.shuffle(others)
        if others and not self._gossip:
            self._gossip_due_ms = now_ms + _SOON_MS // 2 + int(self._random.random() * _SOON_MS)
        self._gossip += [one for one in others if one not in self._gossip]

    def _note_rumor(self, peer: str, entries: list[Entry], meta: Mapping[str, Any]) -> None:
        to, seen = _marks(meta.get("to")), _marks(meta.get("seen"))
        if entries and to:
            self._rumors.append(_Rumor(entries, to, frozenset((*to, *seen, mark(peer), mark(self._me)))))

    def _on_give(
        self,
        peer: str,
        meta: Mapping[str, Any],
        body: bytes,
        *,
        now_ms: int,
        utc_ms: int,
        into: Findings,
    ) -> None:
        one, done = self._rounds.get(peer), meta.get("done")
        wanted, gone, entries = _unpack_give(body, self._limits)
        if one is None or one.leaves is None or not isinstance(done, int) or not one.page:
            return
        accepted = self._judge(peer, entries, utc_ms, into)
        if accepted:
            self._learned(peer, now_ms)
        if gone and self._am_staler(peer, utc_ms):
            yielded, kept = self._yield(one.page, set(gone), utc_ms)
            into.drops += yielded
            wanted += kept
        fills, rest = self._fill(one, wanted)
        if fills:
            self._fills.append((peer, fills))
        done = max(0, min(done, len(one.page)))
        if rest is not None:  # the frame was full: the leaf where it ended comes again
            done = min(done, one.page.index(rest))
        if not done and not accepted and not fills:
            done = 1  # what we gave each other is refused on both sides: no use in asking again
        over = set(one.page[:done])
        one.filled = {each for each in one.filled if each % LEAVES not in over}
        one.leaves = [leaf for leaf in one.leaves if leaf not in over]
        one.page = ()
        one.page_due_ms = now_ms + _PAUSE_MS
        one.deadline_ms = one.page_due_ms + _ROUND_MS

    def _fill(self, one: _Round, wanted: Sequence[int]) -> tuple[list[Entry], int | None]:
        """Return what fits into one frame of the wanted entries, and the leaf where it ended, if it did."""
        wishes = set(wanted) - one.filled
        fills: list[Entry] = []
        size = 0
        for leaf in one.page:
            for found in self._registry.leaf(leaf):
                if found.hash not in wishes:
                    continue
                size += len(found.entry.text()) + 1
                if fills and (
                    size >= self._limits.registry_frame_bytes_max
                    or len(fills) >= self._limits.registry_frame_entries_max
                ):
                    return fills, leaf
                fills.append(found.entry)
                one.filled.add(found.hash)
        return fills, None

    def _yield(self, page: Sequence[int], gone: set[int], utc_ms: int) -> tuple[list[Key], list[int]]:
        """Return what a stale node gives up of what the others lack, and the hashes of its own keys, which it keeps."""
        before_ms = utc_ms - self._limits.tombstone_ms
        missing = [found for leaf in page for found in self._registry.leaf(leaf) if found.hash in gone]
        yielded = [
            found.entry.at
            for found in missing
            if found.entry.owner != self._me and found.entry.written_ms < before_ms
        ]
        return yielded, [found.hash for found in missing if found.entry.owner == self._me]

    def keep_house(self, *, now_ms: int, utc_ms: int, into: Findings) -> None:
        """Add what time asks for: tombstones that are over, stamps of a clock that was wrong, the last comparison."""
        if self._synced_ms - self._noted_ms >= _NOTE_MS or (self._synced_ms and not self._noted_ms):
            self._noted_ms = into.notes["synced_ms"] = self._synced_ms
        if now_ms < self._house_due_ms:
            return
        self._house_due_ms = now_ms + _HOUSE_MS
        registry = self._registry
        registry.age(utc_ms)
        if drops := registry.over(utc_ms, synced_ms=self._synced_ms):
            into.drops += drops
            into.notes["clock"] = registry.clock.last  # the newest stamp may be among them
        if not registry.is_ahead(utc_ms):
            self._wrong_since_ms = None
        elif self._wrong_since_ms is None:
            self._wrong_since_ms = now_ms
            self._house_due_ms = now_ms + _CLOCK_WRONG_MS
        elif now_ms - self._wrong_since_ms >= _CLOCK_WRONG_MS:
            self._wrong_since_ms = None
            rewritten, dropped = registry.repaired(utc_ms)
            into.drops += [*dropped, *(entry.at for entry in rewritten)]
            into.entries.update({entry.at: entry for entry in rewritten})
            into.notes["clock"] = registry.clock.last

    # -- after the transaction ------------------------------------------------------------------------------

    def committed(self, own: Sequence[Entry]) -> list[Say]:
        """Push this node's own new entries, forward what others wrote, and send what was wanted."""
        says: list[Say] = []
        if not (own or self._rumors or self._fills):
            return says
        if own and self._peers:
            says += self._push(own, tuple(self._peers), frozenset())
        rumors, self._rumors = self._rumors, []
        for rumor in rumors:
            says += self._forward(rumor)
        fills, self._fills = self._fills, []
        for peer, entries in fills:
            says += [Say(peer, {"k": "fill"}, body) for body in encode(entries, self._limits)]
        return says

    def forget(self) -> None:
        """The transaction failed: nothing of what was taken in is to be passed on."""
        self._rumors.clear()
        self._fills.clear()

    def _push(self, entries: Sequence[Entry], to: Sequence[str], seen: frozenset[str]) -> list[Say]:
        meta: dict[str, Any] = {"k": "put"}
        if len(to) + len(seen) <= _MARKS_MAX:
            meta["to"] = "".join(map(mark, to))
            if seen:
                meta["seen"] = "".join(sorted(seen))
        bodies = encode(entries, self._limits)
        body = next(bodies)
        if next(bodies, None) is not None:  # a flood: the rest is paced by comparing
            self._wanted.update(dict.fromkeys(to))
        return [Say(peer, meta, body) for peer in to]

    def _forward(self, rumor: _Rumor) -> list[Say]:
        me = mark(self._me)
        missed = [peer for peer in self._peers if mark(peer) not in rumor.seen]
        to = [peer for peer in missed if me in _relays(mark(peer), rumor.to)]
        # Those that fall to another relay count as reached: were it wrong, a comparison finds out.
        return self._push(rumor.entries, to, rumor.seen.union(map(mark, missed))) if to else []

    def converse(self, *, now_ms: int, utc_ms: int) -> list[Say]:
        """Answer what was asked, go on with what this node asks, and begin what is due."""
        says = self._answers(utc_ms)
        self._schedule(now_ms)
        for peer in list(self._wanted):
            if len(self._rounds) >= _ASKING_MAX:
                break
            del self._wanted[peer]
            if peer in self._peers and peer not in self._rounds:
                self._rounds[peer] = _Round(deadline_ms=now_ms + _ROUND_MS)
                says.append(self._root(peer, utc_ms))
        for peer, one in list(self._rounds.items()):
            if now_ms >= one.deadline_ms:
                del self._rounds[peer]
            elif one.leaves is not None and not one.page and now_ms >= one.page_due_ms:
                says.append(self._next_page(peer, one, now_ms, utc_ms))
        return says

    def next_wake_ms(self, now_ms: int) -> int:
        """Return when `converse` or `keep_house` has something to do though nothing arrives."""
        if self._questions or (self._wanted and len(self._rounds) < _ASKING_MAX):
            return now_ms
        wake_ms = self._house_due_ms
        for one in self._rounds.values():
            is_waiting = one.page or one.leaves is None
            wake_ms = min(wake_ms, one.deadline_ms if is_waiting else one.page_due_ms)
        if self._gossip:
            wake_ms = min(wake_ms, self._gossip_due_ms)
        if self._due_ms is not None and self._due_ms < wake_ms:
            wake_ms = self._due_ms
        return max(now_ms, wake_ms)

    def _schedule(self, now_ms: int) -> None:
        if self._gossip and now_ms >= self._gossip_due_ms:
            self._wanted[self._gossip.pop(0)] = None
            self._gossip_due_ms = now_ms + _SOON_MS
        if self._due_ms is not None and now_ms >= self._due_ms:
            self._due_ms = now_ms + self._pause_ms()
            self.turns += 1
            if self._peers:
                self._wanted[list(self._peers)[int(self._random.random() * len(self._peers))]] = None

    def _pause_ms(self) -> int:
        return int(self._limits.registry_sync_ms * (0.75 + self._random.random() / 2))

    def _root(self, peer: str, utc_ms: int) -> Say:
        return Say(peer, {"k": "root", "root": self._registry.root, "away_ms": self.away_ms(utc_ms)})

    # -- answering ------------------------------------------------------------------------------------------

    def _answers(self, utc_ms: int) -> list[Say]:
        says: list[Say] = []
        for peer in list(self._questions)[:_ANSWERS_A_TICK]:
            questions = self._questions.pop(peer)
            says += self._answer(peer, *questions[0], utc_ms)
            if questions[1:]:
                self._questions[peer] = questions[1:]
        return says

    def _answer(self, peer: str, kind: str, meta: Mapping[str, Any], body: bytes, utc_ms: int) -> list[Say]:
        if kind in _WITH_AWAY:
            self._peers[peer] = meta["away_ms"]
        match kind:
            case "root":
                return self._on_root(peer, meta, utc_ms)
            case "same":
                self._rounds.pop(peer, None)
                self._has_synced(utc_ms)
            case "leaves":
                self._on_leaves(peer, body, utc_ms)
            case "page":
                return [self._give(peer, meta["leaves"], body, utc_ms)]
            case "done":
                self._has_synced(utc_ms)
        return []

    def _on_root(self, peer: str, meta: Mapping[str, Any], utc_ms: int) -> list[Say]:
        away = {"away_ms": self.away_ms(utc_ms)}
        if meta.get("root") == self._registry.root:
            self._rounds.pop(peer, None)
            self._has_synced(utc_ms)
            return [Say(peer, {"k": "same", **away})]
        if self._am_staler(peer, utc_ms):  # then we ask
            if peer not in self._rounds:
                self._wanted[peer] = None
            return []
        if peer in self._rounds and self._asks(peer, utc_ms):
            return []  # both asked: it answers ours
        self._rounds.pop(peer, None)
        self._wanted.pop(peer, None)
        return [Say(peer, {"k": "leaves", **away}, _SUMS.pack(*self._registry.sums))]

    def _on_leaves(self, peer: str, body: bytes, utc_ms: int) -> None:
        one = self._rounds.get(peer)
        if one is None or one.leaves is not None:
            return
        if self._is_staler(peer, utc_ms):  # it asks us, now that it knows
            del self._rounds[peer]
            return
        mine = self._registry.sums
        one.leaves = [leaf for leaf, theirs in enumerate(_SUMS.unpack(body)) if theirs != mine[leaf]]

    def _next_page(self, peer: str, one: _Round, now_ms: int, utc_ms: int) -> Say:
        """Ask about as many of the leaves as fit into a frame; when none is left, say so."""
        assert one.leaves is not None
        if not one.leaves:
            del self._rounds[peer]
            self._has_synced(utc_ms)
            return Say(peer, {"k": "done"})
        lines: list[bytes] = []
        page: list[int] = []
        most = max(1, self._limits.registry_frame_bytes_max // _LINE.size)
        for leaf in one.leaves:
            entries = self._registry.leaf(leaf)
            if page and len(lines) + len(entries) > most:
                break
            page.append(leaf)
            lines += [
                _LINE.pack(found.hash, found.entry.stamp, found.digest, found.entry.value is None)
                for found in entries
            ]
        one.page = tuple(page)
        one.deadline_ms = now_ms + _ROUND_MS
        return Say(peer, {"k": "page", "leaves": page}, b"".join(lines))

    def _give(self, peer: str, page: Sequence[int], body: bytes, utc_ms: int) -> Say:
        """Compare some leaves with those of a peer: what wins here, what is wanted, what it should give up."""
        theirs: dict[int, dict[int, tuple[int, int, int]]] = {leaf: {} for leaf in page}
        for hash_, stamp, digest, is_tombstone in _LINE.iter_unpack(body):
            theirs.get(hash_ % LEAVES, {})[hash_] = (stamp, digest, is_tombstone)
        answer = _Answer(self._limits)
        done = 0
        for leaf, lines in theirs.items():
            for found in self._registry.leaf(leaf):
                line = lines.pop(found.hash, None)
                if line is None:
                    has_room = self._registry.is_over(found.entry, utc_ms) or answer.give(found.entry)
                elif line[:2] == (found.entry.stamp, found.digest):
                    continue
                else:
                    if line[0] >= found.entry.stamp:
                        answer.wanted.append(found.hash)
                    has_room = line[0] > found.entry.stamp or answer.give(found.entry)
                if not has_room:
                    return Say(peer, {"k": "give", "done": done}, answer.packed())
            self._judge_missing(peer, lines, answer, utc_ms)
            done += 1
        return Say(peer, {"k": "give", "done": done}, answer.packed())

    def _judge_missing(
        self, peer: str, lines: Mapping[int, tuple[int, int, int]], answer: _Answer, utc_ms: int
    ) -> None:
        """Sort what only the peer has: to be had, to be given up, or a tombstone whose time is over."""
        before_ms = utc_ms - self._limits.tombstone_ms
        is_stale = self._is_staler(peer, utc_ms)
        for hash_, (stamp, _, is_tombstone) in lines.items():
            is_old = written_ms_of(stamp) < before_ms
            if is_old and is_stale and not is_tombstone:
                answer.gone.append(hash_)
            elif not (is_old and is_tombstone):
                answer.wanted.append(hash_)

    def _has_synced(self, utc_ms: int) -> None:
        self._synced_ms = utc_ms


class _Answer:
    """What a page is answered with, one frame of it."""

    def __init__(self, limits: Limits) -> None:
        self.wanted: list[int] = []
        self.gone: list[int] = []
        self._limits = limits
        self._entries: list[Entry] = []
        self._size = 0

    def give(self, entry: Entry) -> bool:
        """Add an entry, if there is room for it."""
        size = self._size + len(entry.text()) + 1
        limits = self._limits
        if self._entries and (
            size >= limits.registry_frame_bytes_max or len(self._entries) >= limits.registry_frame_entries_max
        ):
            return False
        self._entries.append(entry)
        self._size = size
        return True

    def packed(self) -> bytes:
        hashes = [*self.wanted, *self.gone]
        return b"".join(
            (
                _COUNTS.pack(len(self.wanted), len(self.gone)),
                struct.pack(f">{len(hashes)}Q", *hashes),
                next(encode(self._entries, self._limits), b"[]"),
            )
        )


def _unpack_give(body: bytes, limits: Limits) -> tuple[list[int], list[int], list[Entry]]:
    if len(body) < _COUNTS.size:
        raise InvalidInput("a registry answer that is cut short")
    wanted, gone = _COUNTS.unpack_from(body)
    end = _COUNTS.size + 8 * (wanted + gone)
    if len(body) < end:
        raise InvalidInput("a registry answer that is cut short")
    hashes = struct.unpack_from(f">{wanted + gone}Q", body, _COUNTS.size)
    return list(hashes[:wanted]), list(hashes[wanted:]), decode(body[end:], limits)


def _check(kind: str, meta: Mapping[str, Any], body: bytes) -> None:
    """Raise InvalidInput for a question of the wrong shape."""
    if kind in _WITH_AWAY:
        away_ms = meta.get("away_ms")
        if type(away_ms) is not int or away_ms < 0:
            raise InvalidInput("a registry frame without a time away")
    if kind == "leaves" and len(body) != _SUMS.size:
        raise InvalidInput("registry leaves of the wrong size")
    if kind == "page":
        page = meta.get("leaves")
        if not isinstance(page, list) or len(body) % _LINE.size:
            raise InvalidInput("a registry page of the wrong shape")
        if not all(type(leaf) is int and 0 <= leaf < LEAVES for leaf in page):
            raise InvalidInput("a registry page with leaves that are none")


@lru_cache(4_096)
def mark(node: str) -> str:
    """A short name of a node, the same everywhere. Two alike cost one change its haste, and nothing else."""
    return blake2b(node.encode(), digest_size=_MARK_CHARS // 2).hexdigest()


def _marks(text: object) -> tuple[str, ...]:
    if not isinstance(text, str) or len(text) > _MARKS_MAX * _MARK_CHARS:
        return ()
    return tuple(text[at : at + _MARK_CHARS] for at in range(0, len(text), _MARK_CHARS))


def _relays(target: str, candidates: Sequence[str]) -> list[str]:
    """Choose who forwards to a node that the sender did not reach. All who got the same frame choose the same."""
    return nsmallest(
        _RELAYS, candidates, key=lambda one: blake2b((target + one).encode(), digest_size=8).digest()
    )
