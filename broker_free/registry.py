"""The replicated registry: the latest entry of each writer wins, by hybrid logical clock. Pure.

Each entry carries the stamp of its writer's clock and the writer's node id. Merging keeps, for each writer, the
greater stamp, so it may be repeated, reordered and mixed in any way and every node ends up with the same.
A deleted key stays as a tombstone (value None), because forgetting it would let an older copy come back.

This version replicates by hand-over: a node sends its own entries to every peer when a session opens and after
each change, and accepts from a peer only what that peer wrote itself, so nobody speaks in another node's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from broker_free.errors import InvalidInput
from broker_free.limits import KIB

KEY_CHARS_MAX = 200
VALUE_BYTES_MAX = 16 * KIB
_FRAME_BYTES_MAX = 256 * KIB
_COUNTER_BITS = 16
# A stamp further ahead than this is a broken clock, not a newer value: it would win for ever.
_AHEAD_MS_MAX = 24 * 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    bucket: str
    key: str
    value: Mapping[str, Any] | None  # JSON object; None is a tombstone
    stamp: int  # milliseconds UTC << 16 | counter
    origin: str  # node id of the writer

    @property
    def order(self) -> tuple[int, str]:
        return self.stamp, self.origin


class HybridClock:
    """Stamps that never go back and stay near the wall clock (Kulkarni et al., 2014)."""

    def __init__(self, last: int = 0) -> None:
        self._last = last

    def next(self, now_ms: int) -> int:
        self._last = max(self._last + 1, now_ms << _COUNTER_BITS)
        return self._last

    def observe(self, stamp: int) -> None:
        self._last = max(self._last, stamp)


class Registry:
    """The merged view in memory. The store holds the same entries; the tick keeps the two in step."""

    def __init__(self, me: str, entries: Iterable[Entry] = ()) -> None:
        self._me = me
        self._clock = HybridClock()
        self._entries: dict[tuple[str, str, str], Entry] = {}
        self.apply(entries)

    def make(self, bucket: str, key: str, value: Mapping[str, Any] | None, *, now_ms: int) -> Entry:
        """Stamp a new entry of this node. It counts once `apply` is called, after its commit."""
        if not key or len(key) > KEY_CHARS_MAX or not bucket or len(bucket) > KEY_CHARS_MAX:
            raise InvalidInput(f"registry names have 1 to {KEY_CHARS_MAX} characters")
        if value is not None and len(json.dumps(dict(value))) > VALUE_BYTES_MAX:
            raise InvalidInput(f"a registry value holds at most {VALUE_BYTES_MAX} bytes")
        return Entry(bucket=bucket, key=key, value=value, stamp=self._clock.next(now_ms), origin=self._me)

    def newer(self, entries: Iterable[Entry], *, now_ms: int) -> list[Entry]:
        """Return those that win over what is known, leaving out stamps from an impossible future."""
        ceiling = (now_ms + _AHEAD_MS_MAX) << _COUNTER_BITS
        return [
            entry
            for entry in entries
            if entry.stamp <= ceiling
            and ((known := self._entries.get(_key(entry))) is None or known.order < entry.order)
        ]

    def apply(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._clock.observe(entry.stamp)
            known = self._entries.get(_key(entry))
            if known is None or known.order < entry.order:
                self._entries[_key(entry)] = entry

    def bucket(self, bucket: str) -> list[Entry]:
        """Return the live entries of a bucket, one for each (key, origin), by key."""
        found = [e for e in self._entries.values() if e.bucket == bucket and e.value is not None]
        return sorted(found, key=lambda entry: (entry.key, entry.origin))

    def own(self) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.origin == self._me]


def _key(entry: Entry) -> tuple[str, str, str]:
    return entry.bucket, entry.key, entry.origin


def encode(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield frame bodies, each a JSON list of [bucket, key, value, stamp]; the origin is the sender."""
    batch: list[str] = []
    size = 0
    for entry in entries:
        value = None if entry.value is None else dict(entry.value)
        text = json.dumps([entry.bucket, entry.key, value, entry.stamp], separators=(",", ":"))
        if batch and size + len(text) > _FRAME_BYTES_MAX:
            yield f"[{','.join(batch)}]".encode()
            batch, size = [], 0
        batch.append(text)
        size += len(text) + 1
    if batch:
        yield f"[{','.join(batch)}]".encode()


def decode(body: bytes, *, origin: str) -> list[Entry]:
    """Read a frame body. Raises InvalidInput; a peer's entries are believed only as its own."""
    try:
        rows = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInput("a registry frame that is not JSON") from None
    if not isinstance(rows, list):
        raise InvalidInput("a registry frame that is not a list")
    entries = []
    for row in rows:
        if not (isinstance(row, list) and len(row) == 4):
            raise InvalidInput("a registry entry of the wrong shape")
        bucket, key, value, stamp = row
        if not (isinstance(bucket, str) and isinstance(key, str) and isinstance(stamp, int)):
            raise InvalidInput("a registry entry of the wrong types")
        if not (value is None or isinstance(value, dict)) or max(len(bucket), len(key)) > KEY_CHARS_MAX:
            raise InvalidInput("a registry entry of the wrong types")
        entries.append(Entry(bucket=bucket, key=key, value=value, stamp=stamp, origin=origin))
    return entries
