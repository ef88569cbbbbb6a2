"""The registry as an application sees it: buckets to read, to write and to watch. Lives on the event loop.

`Mirror` holds the live entries as of the last tick that the loop was told of; `Bucket` is one name in it. Reading is a
look-up in memory; writing is a transaction of the owner thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakSet

from broker_free.errors import InvalidInput
from broker_free.registry import Entry
from broker_free.subject import matches


class _Tx(Protocol):
    def registry_put(self, bucket: str, key: str, value: Mapping[str, Any] | None) -> Entry: ...


class Mirror:
    """What the owner thread's registry holds, without tombstones."""

    def __init__(self) -> None:
        self._shelves: dict[str, _Shelf] = {}

    def shelf(self, bucket: str) -> _Shelf:
        return self._shelves.setdefault(bucket, _Shelf())

    def load(self, entries: Iterable[Entry]) -> None:
        self._shelves.clear()
        for entry in entries:
            if entry.value is not None:
                self.shelf(entry.bucket).entries[entry.key] = entry

    def take(self, entries: Iterable[Entry]) -> None:
        """Follow what a tick has committed, in its order. An entry without a value is gone."""
        for entry in entries:
            self.shelf(entry.bucket).take(entry)

    def close(self) -> None:
        """End every watch: nothing more will come."""
        for shelf in self._shelves.values():
            for watch in list(shelf.watches):
                watch.close()


class _Shelf:
    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.watches: WeakSet[Watch] = WeakSet()

    def take(self, entry: Entry) -> None:
        self.revision += 1
        if entry.value is None:
            self.entries.pop(entry.key, None)
        else:
            self.entries[entry.key] = entry
        for watch in self.watches:
            watch.take(entry)


class Bucket:
    """One bucket of the replicated registry. Cheap: make one wherever it is needed."""

    def __init__(self, name: str, mirror: Mirror, transact: Callable[..., Awaitable[Entry]]) -> None:
        self.name = name
        self._shelf = mirror.shelf(name)
        self._transact = transact

    async def put(self, key: str, value: Mapping[str, Any]) -> Entry:
        """Write a JSON object and return once it is on disk here; the other nodes follow.

        Raises InvalidInput (TooLarge, NotOwner), RegistryFull, StoreFailed.
        """
        if not isinstance(value, Mapping):
            raise InvalidInput("a registry value is a JSON object", hint="to remove a key: delete")
        return await self._transact(_put, self.name, key, value)

    async def delete(self, key: str) -> None:
        """Remove a key everywhere. Returns once that is on disk here."""
        await self._transact(_put, self.name, key, None)

    def get(self, key: str) -> Mapping[str, Any] | None:
        """Return a key's value as this node knows it now, None when there is none."""
        entry = self._shelf.entries.get(key)
        return entry.value if entry else None

    def keys(self, pattern: str = ">") -> list[str]:
        """Return the keys that a subject pattern covers (`*` one token, `>` the rest), in order."""
        return sorted(key for key in self._shelf.entries if matches(pattern, key))

    def entries(self, pattern: str = ">") -> list[Entry]:
        """Return the entries that a subject pattern covers, by key."""
        return [self._shelf.entries[key] for key in self.keys(pattern)]

    @property
    def revision(self) -> int:
        """A number that is another one whenever the bucket has changed. It counts from the start of the node."""
        return self._shelf.revision

    def watch(self, pattern: str = ">") -> Watch:
        """Iterate over the entries of a pattern: first the present ones, then each change from this call on.

            async with bucket.watch("orders.*") as changes:
                async for entry in changes:     # entry.value is None for a key that was deleted

        The last value of every key always comes. A watcher that is slower than the writers does not see each value
        in between: what waits for it is bounded by the number of keys.
        """
        watch = Watch(pattern, self.entries(pattern))
        self._shelf.watches.add(watch)
        return watch


class Watch:
    """An async iterator over the changes of a bucket. It ends when it is closed, or its node is."""

    def __init__(self, pattern: str, present: Iterable[Entry]) -> None:
        self._pattern = pattern
        self._pending = {entry.key: entry for entry in present}
        self._wake = asyncio.Event()
        self._is_closed = False

    def take(self, entry: Entry) -> None:
        if matches(self._pattern, entry.key):
            self._pending[entry.key] = entry
            self._wake.set()

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Entry:
        while not self._pending:
            if self._is_closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._pending.pop(next(iter(self._pending)))

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _put(tx: _Tx, bucket: str, key: str, value: Mapping[str, Any] | None) -> Entry:
    return tx.registry_put(bucket, key, value)
