"""The replicated registry: one winner for each (bucket, key), by hybrid logical clock and writer. Pure.

Every node of a mesh holds all entries. Merging keeps the entry of the greater (stamp, writer), so it may be repeated,
reordered and mixed in any way, and every node ends up with the same. A deleted key stays as a tombstone (value None)
for `Limits.tombstone_ms`, because forgetting it at once would let an older copy come back.

    shared buckets   any member writes any key, the last writer wins
    owned buckets    their name begins with "own.", their keys with a node id ("own.callsign", "<node id>.alpha"):
                     only that node writes them. That is a fact of the name, so no node can be configured otherwise.

Entries are relayed, so members trust each other not to lie about who wrote what. One thing needs no trust: nobody
overwrites what a node has written of itself since it started. It answers a forged entry with its own, stamped anew.
An entry that it does not know is another matter: a store that was put back from a backup gets its own newer entries
from the others.

How entries travel is `antientropy.py`.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Final

from broker_free.errors import InvalidInput, NotOwner, RegistryFull, TooLarge
from broker_free.limits import Limits
from broker_free.outside import load_json

OWNED: Final = "own."  # what the name of an owned bucket begins with
MESH: Final = (
    "own.bf."  # and one of this library: who belongs to the mesh must be writable when all else is full
)
LEAVES: Final = 256  # of the tree by which two nodes find out where they differ

_COUNTER_BITS: Final = 16
_STAMP_END: Final = 1 << 63  # SQLite's integers
_SUMS: Final = struct.Struct(f">{LEAVES}Q")
_NAME = re.compile(r"[^\s*>\x00-\x1f\x7f]+")
_REASSERT_MS: Final = 10_000  # two live copies of one node must not answer each other without end

Key = tuple[str, str]  # bucket, key


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    bucket: str
    key: str
    value: Mapping[str, Any] | None  # JSON object; None is a tombstone
    stamp: int  # milliseconds UTC << 16 | counter
    origin: str  # node id of the writer
    held_ms: int = field(default=0, compare=False)  # UTC here when this node stored it; never leaves the node

    @property
    def at(self) -> Key:
        return self.bucket, self.key

    @property
    def written_ms(self) -> int:
        """UTC, by the writer's clock."""
        return written_ms_of(self.stamp)

    @property
    def owner(self) -> str | None:
        return owner_of(self.bucket, self.key)

    def text(self) -> str:
        """The one form in which an entry travels and is compared."""
        value = None if self.value is None else dict(self.value)
        return json.dumps(
            [self.bucket, self.key, value, self.stamp, self.origin], separators=(",", ":"), sort_keys=True
        )


def written_ms_of(stamp: int) -> int:
    return stamp >> _COUNTER_BITS


def owner_of(bucket: str, key: str) -> str | None:
    """Return the node that alone may write a key, None for a key of a shared bucket."""
    return key.partition(".")[0] if bucket.startswith(OWNED) else None


def _size_key(bucket: str, key: str) -> str:
    """Return what a key is counted under: its bucket, and in those of the mesh its writer too."""
    return f"{bucket} {owner_of(bucket, key)}" if bucket.startswith(MESH) else bucket


class HybridClock:
    """Stamps that never go back and stay near the wall clock (Kulkarni et al., 2014)."""

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def next(self, now_ms: int) -> int:
        self.last = max(self.last + 1, now_ms << _COUNTER_BITS)
        return self.last

    def observe(self, stamp: int) -> None:
        self.last = max(self.last, stamp)


@dataclass(slots=True)
class Held:
    """An entry with its place in the tree."""

    entry: Entry
    digest: int
    hash: int  # of bucket and key: its leaf is the lowest byte
    counts: bool = True  # in the sum of its leaf; a tombstone whose time is over does not


class Registry:
    """All entries in memory. The store holds the same; the tick keeps the two in step."""

    def __init__(
        self, me: str, entries: Iterable[Entry] = (), *, clock: int = 0, limits: Limits | None = None
    ) -> None:
        """`entries` and `clock` are what the store has: no stamp is given out that is not above them."""
        self.refused: Counter[str] = Counter()  # entries of peers turned away, by reason
        self.clock = HybridClock(clock)
        self._me = me
        self._limits = limits or Limits()
        self._held: dict[Key, Held] = {}
        self._leaves: defaultdict[int, dict[Key, Held]] = defaultdict(dict)
        self.sums = [0] * LEAVES  # of each leaf: all its digests, XOR
        self._root = ""
        self._tombstones: set[Key] = set()
        self._sizes: Counter[str] = Counter()  # keys by `_size_key`, tombstones included
        self._written: set[Key] = set()  # by this node since its start
        self._reassert_after_ms: dict[Key, int] = {}
        for entry in entries:
            self.clock.observe(entry.stamp)
            self._put(entry)

    # -- writing --------------------------------------------------------------------------------------------

    def make(
        self, bucket: str, key: str, value: Mapping[str, Any] | None, *, now_ms: int, pending: int = 0
    ) -> Entry:
        """Stamp a new entry of this node. It counts once `apply` is called, after its commit.

        `pending` is the number of entries that were made and do not count yet. Raises InvalidInput (NotOwner,
        TooLarge) and RegistryFull.
        """
        for name in (bucket, key):
            if len(name) > self._limits.registry_name_chars_max:
                raise TooLarge(
                    f"a registry name of {len(name)} characters; the limit is"
                    f" {self._limits.registry_name_chars_max}"
                )
            if not _NAME.fullmatch(name):
                raise InvalidInput(
                    f"{name[:80]!r} is not a registry name", hint="no spaces, no * or >, not empty"
                )
        owner = owner_of(bucket, key)
        if owner not in (None, self._me):
            raise NotOwner(
                f"{key!r} in {bucket!r} belongs to node {owner!r}",
                hint=f"keys of an {OWNED}… bucket begin with the writer's node id and a dot",
            )
        value = self._checked(value)
        if reason := self._no_room(bucket, key, pending):
            raise RegistryFull(
                reason, hint="delete keys that are not needed, or raise the limit on every node"
            )
        return Entry(
            bucket=bucket,
            key=key,
            value=value,
            stamp=self.clock.next(now_ms),
            origin=self._me,
            held_ms=now_ms,
        )

    def _checked(self, value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the value as every other node will read it."""
        if value is None:
            return None
        try:
            text = json.dumps(dict(value), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"a registry value is a JSON object: {error}") from None
        if len(text) > self._limits.registry_value_bytes_max:
            raise TooLarge(
                f"a registry value of {len(text)} bytes; the limit is {self._limits.registry_value_bytes_max}",
                hint="send large content as a message and register its id",
            )
        try:
            back: Mapping[str, Any] = _loaded(text.encode(), self._limits, depth=0)
        except InvalidInput as error:
            raise InvalidInput(f"a registry value that other nodes would not read: {error.message}") from None
        return back

    def _no_room(self, bucket: str, key: str, pending: int) -> str:
        if (bucket, key) in self._held:
            return ""
        limits = self._limits
        if bucket.startswith(MESH):
            written = self._sizes[_size_key(bucket, key)]
            if written >= 2 * limits.peers_max:
                return f"a node has written {written} keys of {bucket!r}: more than there can be members"
            return ""
        if len(self._held) + pending >= limits.registry_entries_max:
            return f"the registry holds {len(self._held)} entries; the limit is {limits.registry_entries_max}"
        if self._sizes[bucket] + pending >= limits.registry_bucket_keys_max:
            return (
                f"bucket {bucket!r} holds {self._sizes[bucket]} keys;"
                f" the limit is {limits.registry_bucket_keys_max}"
            )
        return ""

    # -- merging --------------------------------------------------------------------------------------------

    def judge(
        self, entries: Iterable[Entry], *, now_ms: int, into: dict[Key, Entry], stale: str | None = None
    ) -> list[Entry]:
        """Put `into` what is to be stored of a peer's entries: those that win, and answers to forged ones.

        What is there already was judged before and does not count yet. `stale` names the sender if it was away for so
        long that what it holds may have been deleted and forgotten here (`antientropy.py`). Returns the winners.
        """
        winners: list[Entry] = []
        for entry in entries:
            known = into.get(entry.at) or self.entry(entry.at)
            if known is None and self.is_over(entry, now_ms):
                continue  # nothing here that this deletion could concern
            if known is not None and not _beats(entry, known):
                continue
            reason = self._refusal(entry, now_ms=now_ms, is_known=known is not None, stale=stale)
            if not reason and self._no_room(entry.bucket, entry.key, len(into)):
                reason = "registry-full"
            if reason:
                self.refused[reason] += 1
                continue
            self.clock.observe(entry.stamp)
            if entry.origin == self._me and entry.at in self._written:
                self._reassert(entry.at, now_ms, into)
            else:
                into[entry.at] = replace(entry, held_ms=now_ms)
                winners.append(into[entry.at])
        return winners

    def _refusal(self, entry: Entry, *, now_ms: int, is_known: bool, stale: str | None) -> str:
        if owner_of(entry.bucket, entry.key) not in (None, entry.origin):
            return "registry-not-owner"
        if entry.written_ms > now_ms + self._limits.registry_ahead_ms_max:
            return "registry-future"  # a broken clock, not a newer value: it would win for ever
        if stale and not is_known and entry.owner != stale and self._is_old(entry, now_ms):
            return "registry-stale"
        return ""

    def _reassert(self, at: Key, now_ms: int, into: dict[Key, Entry]) -> None:
        """Answer an entry in this node's name that this node did not write: what it wrote, stamped anew."""
        self.refused["registry-forged"] += 1
        held = self._held[at].entry
        if now_ms < self._reassert_after_ms.get(at, 0) <= now_ms + _REASSERT_MS:
            return
        self._reassert_after_ms[at] = now_ms + _REASSERT_MS
        into[at] = replace(held, stamp=self.clock.next(now_ms), origin=self._me, held_ms=now_ms)

    def apply(self, entries: Iterable[Entry], *, own: bool = False) -> None:
        """Make entries count that are on disk now. `own` ones were made here; what they say is protected."""
        for entry in entries:
            self.clock.observe(entry.stamp)
            known = self.entry(entry.at)
            if known is None or _beats(entry, known):
                self._put(entry)
            if own:
                self._written.add(entry.at)

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget entries altogether, as if they had never been."""
        for at in keys:
            self._remove(at)
            self._written.discard(at)
            self._reassert_after_ms.pop(at, None)

    # -- what is there --------------------------------------------------------------------------------------

    def entry(self, at: Key) -> Entry | None:
        """Return the winner of a key, a tombstone included."""
        held = self._held.get(at)
        return held.entry if held else None

    def __iter__(self) -> Iterator[Entry]:
        return (held.entry for held in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def bucket(self, bucket: str) -> list[Entry]:
        """Return the live entries of a bucket, by key."""
        found = [entry for entry in self if entry.bucket == bucket and entry.value is not None]
        return sorted(found, key=lambda entry: entry.key)

    @property
    def root(self) -> str:
        """One word for all that this node holds: two nodes with the same root hold the same."""
        if not self._root:
            self._root = blake2b(_SUMS.pack(*self.sums), digest_size=8).hexdigest()
        return self._root

    def leaf(self, leaf: int) -> Collection[Held]:
        """Return the entries of one leaf of the tree, those included that do not count in its sum."""
        return self._leaves[leaf].values()

    # -- what time does -------------------------------------------------------------------------------------

    def is_over(self, entry: Entry, now_ms: int) -> bool:
        """Say whether this is a tombstone whose time is over: it takes no part in comparing any more."""
        return entry.value is None and self._is_old(entry, now_ms)

    def age(self, now_ms: int) -> None:
        """Take tombstones out of the tree whose time is over. Every node does so, sooner or later alike."""
        for at in self._tombstones:
            held = self._held[at]
            if held.counts == self.is_over(held.entry, now_ms):
                held.counts = not held.counts
                self._count(held)

    def over(self, now_ms: int, *, synced_ms: int) -> list[Key]:
        """Return the tombstones that can go: old, here for long, and this node has compared with others since."""
        before_ms = now_ms - self._limits.tombstone_ms
        return [
            at
            for at in self._tombstones
            if self.is_over(entry := self._held[at].entry, now_ms)
            and entry.held_ms < before_ms
            and (entry.held_ms < synced_ms or not synced_ms)
        ]

    def is_ahead(self, now_ms: int) -> bool:
        """Say whether this node holds a stamp of an impossible future: some clock was wrong, its own or another's."""
        return written_ms_of(self.clock.last) > now_ms + self._limits.registry_ahead_ms_max

    def repaired(self, now_ms: int) -> tuple[list[Entry], list[Key]]:
        """Return entries to write anew with a stamp of now, and keys to drop, so that no such stamp is left.

        Keys that another node owns are dropped: it, or whoever has them with a possible stamp, sends them again.
        """
        ceiling_ms = now_ms + self._limits.registry_ahead_ms_max
        ahead = [entry for entry in self if entry.written_ms > ceiling_ms]
        self.clock = HybridClock(max((e.stamp for e in self if e.written_ms <= ceiling_ms), default=0))
        kept = [entry for entry in ahead if entry.owner in (None, self._me)]
        rewritten = [
            replace(entry, stamp=self.clock.next(now_ms), origin=self._me, held_ms=now_ms) for entry in kept
        ]
        return rewritten, [entry.at for entry in ahead if entry.owner not in (None, self._me)]

    def _is_old(self, entry: Entry, now_ms: int) -> bool:
        return entry.written_ms < now_ms - self._limits.tombstone_ms

    # -- inside ---------------------------------------------------------------------------------------------

    def _put(self, entry: Entry) -> None:
        self._remove(entry.at)
        raw = blake2b(entry.text().encode(), digest_size=8).digest()
        counts = not self.is_over(entry, entry.held_ms)  # as of now for one that has just arrived
        held = Held(entry, int.from_bytes(raw, "big"), hash_of(entry.at), counts)
        self._held[entry.at] = held
        self._leaves[held.hash % LEAVES][entry.at] = held
        if counts:
            self._count(held)
        self._sizes[_size_key(*entry.at)] += 1
        if entry.value is None:
            self._tombstones.add(entry.at)

    def _remove(self, at: Key) -> None:
        held = self._held.pop(at, None)
        if held is None:
            return
        del self._leaves[held.hash % LEAVES][at]
        if held.counts:
            self._count(held)
        size_key = _size_key(*at)
        self._sizes[size_key] -= 1
        if not self._sizes[size_key]:
            del self._sizes[size_key]
        self._tombstones.discard(at)

    def _count(self, held: Held) -> None:
        """Put a digest into the sum of its leaf, or take it out: the same with XOR."""
        self.sums[held.hash % LEAVES] ^= held.digest
        self._root = ""


def _beats(one: Entry, other: Entry) -> bool:
    """Order of two entries of one key. The text decides between two of one stamp, which only a broken node makes."""
    if (one.stamp, one.origin) != (other.stamp, other.origin):
        return (one.stamp, one.origin) > (other.stamp, other.origin)
    return one.text() > other.text()


def hash_of(at: Key) -> int:
    """Place a key in the tree: 64 bits, the same on every node."""
    return int.from_bytes(blake2b("\0".join(at).encode(errors="replace"), digest_size=8).digest(), "big")


# Entries <-> frame bodies ------------------------------------------------------------------------------------


def encode(entries: Iterable[Entry], limits: Limits) -> Iterator[bytes]:
    """Yield frame bodies, each a JSON list of [bucket, key, value, stamp, origin]."""
    batch: list[str] = []
    size = 0
    for entry in entries:
        text = entry.text()
        if batch and (
            size + len(text) >= limits.registry_frame_bytes_max
            or len(batch) >= limits.registry_frame_entries_max
        ):
            yield f"[{','.join(batch)}]".encode()
            batch, size = [], 0
        batch.append(text)
        size += len(text) + 1
    if batch:
        yield f"[{','.join(batch)}]".encode()


def decode(body: bytes, limits: Limits) -> list[Entry]:
    """Read a frame body. Raises InvalidInput for what no node of this version with these limits sends."""
    rows = _loaded(body, limits, depth=2)
    if not isinstance(rows, list):
        raise InvalidInput("a registry frame that is not a list")
    if len(rows) > limits.registry_frame_entries_max:
        raise TooLarge(
            f"a registry frame of {len(rows)} entries; the limit is {limits.registry_frame_entries_max}"
        )
    return [_decoded(row, limits) for row in rows]


def _loaded(raw: bytes, limits: Limits, *, depth: int) -> Any:  # Any: JSON, checked by the caller
    """Read JSON as any node reads it; `depth` is how deep a value lies in it."""
    # A single entry may be longer than a frame that is being filled.
    bytes_max = (
        limits.registry_frame_bytes_max + limits.registry_value_bytes_max + 4 * limits.registry_name_chars_max
    )
    return load_json(raw, depth_max=limits.json_depth_max + depth, bytes_max=bytes_max)


def _decoded(row: object, limits: Limits) -> Entry:
    match row:
        case [str(bucket), str(key), dict() | None as value, int(stamp), str(origin)]:
            pass
        case _:
            raise InvalidInput("a registry entry of the wrong shape")
    if not 0 < max(len(bucket), len(key), len(origin)) <= limits.registry_name_chars_max:
        raise TooLarge("a registry entry with names over the limit")
    if type(stamp) is not int or not 0 < stamp < _STAMP_END:
        raise InvalidInput("a registry entry with a stamp that is none")
    size = 0 if value is None else len(json.dumps(value))
    if size > limits.registry_value_bytes_max:
        raise TooLarge("a registry entry with a value over the limit")
    return Entry(bucket=bucket, key=key, value=value, stamp=stamp, origin=origin)
