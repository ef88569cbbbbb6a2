"""Carries chunks between the sessions of a node and its disk.

The rules are in `blob.py`, the files in `blobfiles.py`; this joins them. Everything here runs in the owner thread,
in `turn`, after the mail of a tick, except for the disk work, which has threads of its own: no read, write, hash or
sync of a blob is ever waited for by a letter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Final, Protocol, TypeVar

from broker_free.blob import (
    DAMAGED,
    MALFORMED,
    UNKNOWN,
    UNREADABLE,
    Downloads,
    Fetch,
    Manifest,
    Serving,
    Taken,
    Wanted,
    digest_of,
)
from broker_free.blobfiles import Blob, BlobFiles, Unfinished
from broker_free.errors import BlobFailed, BrokerFreeError, InvalidInput, UnknownBlob
from broker_free.frames import BLOBS, CHUNK, CHUNK_GET, Frame
from broker_free.futures import fail, succeed
from broker_free.limits import Limits

log = logging.getLogger("broker_free")

T = TypeVar("T")

LANE: Final = 1
_THREADS: Final = 2  # one may be waiting for a sync while the other reads for a peer
_READS_MAX: Final = 8  # under way at once, all peers together; their pieces are the memory this takes
_PROGRESS_BYTES: Final = 1 << 20  # between two calls of on_progress

Progress = Callable[[int, int], None]


class Rows(Protocol):
    """What the store knows of blobs."""

    def has_blob(self, blob_id: str) -> bool: ...
    def may_fetch_blob(self, blob_id: str, peer: str) -> bool: ...


class Sessions(Protocol):
    """The open sessions, as chunks need them."""

    def session(self, peer: str) -> int | None:
        """Return the id of the open session with a peer."""
        ...

    def speaks(self, peer: str, feature: str) -> bool: ...

    def tell(
        self, peer: str, kind: int, *, seq: int, lane: int, meta: Mapping[str, Any], body: bytes = b""
    ) -> None:
        """Send a frame over the open session, if there is one."""
        ...


@dataclass(eq=False, slots=True)
class Waiter:
    """One caller of `fetch_blob`, on the event loop."""

    future: asyncio.Future[Blob]
    on_progress: Progress | None = None


@dataclass(slots=True)
class _Fetching:
    fetch: Fetch
    waiters: list[Waiter] = field(default_factory=list)
    told_bytes: int = 0


class Carrier:
    """One for each node. All but the disk's threads is the owner thread's."""

    def __init__(
        self,
        *,
        files: BlobFiles,
        sessions: Sessions,
        rows: Rows,
        wake: Callable[[], None],
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        random: Random,
    ) -> None:
        """`wake` lets the owner thread have a turn soon; any thread calls it."""
        self.refused: Counter[str] = (
            Counter()
        )  # what peers were not given, and what they should not have sent
        self._files = files
        self._sessions = sessions
        self._rows = rows
        self._wake = wake
        self._loop = loop
        self._limits = limits
        self._random = random
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="bf-blob")  # started by the first job
        self._done: deque[Callable[[], object]] = deque()  # what the disk's threads have finished
        self._downloads = Downloads(limits)
        self._fetching: dict[str, _Fetching] = {}
        self._serving: dict[str, Serving] = {}
        self._waiting: dict[str, deque[Wanted]] = {}  # requests by peer; the peers take turns
        self._reads = 0
        self._ready: deque[tuple[Wanted, bytes]] = deque()  # read, to be sent

    def close(self) -> None:
        """Wait for the disk work that is under way; drop what has not begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def abandon(self, error: BrokerFreeError) -> None:
        """Fail every fetch: the node goes on without its store."""
        for fetching in list(self._fetching.values()):
            fetching.fetch.fail(error)
            self._end(fetching.fetch)

    def counts(self) -> Counter[str]:
        return self.refused + self._downloads.refused

    # -- called by the owner --------------------------------------------------------------------------------

    def fetch(self, blob_id: str, peer: str, waiter: Waiter) -> None:
        """Begin to fetch a blob from a peer, or join those who wait for it already."""
        fetch, is_new = self._downloads.start(blob_id, peer)
        if is_new:
            self._fetching[blob_id] = _Fetching(fetch)
            self._do(partial(self._files.look, blob_id), partial(self._looked, fetch), fetch.fail)
        self._fetching[blob_id].waiters.append(waiter)

    def leave(self, blob_id: str, waiter: Waiter) -> None:
        """A caller waits no more. When it was the last, the fetch ends; what is on disk stays for the next."""
        fetching = self._fetching.get(blob_id)
        if fetching is None or waiter not in fetching.waiters:
            return
        fetching.waiters.remove(waiter)
        if not fetching.waiters and fetching.fetch.stage != "finishing":
            self._end(fetching.fetch)

    def on_frame(self, peer: str, frame: Frame, now_ms: int) -> None:
        """Take in a CHUNK_GET or CHUNK of the open session."""
        if frame.kind == CHUNK_GET:
            self._on_get(peer, frame)
            return
        taken = self._downloads.on_chunk(
            peer, frame.session, seq=frame.seq, meta=frame.meta, body=frame.body, now_ms=now_ms
        )
        if taken is not None:
            self._do(
                partial(self._check_and_keep, taken),
                partial(self._kept, taken),
                partial(self._not_kept, taken),
            )

    def turn(self, now_ms: int) -> bool:
        """Do what there is to do after the mail of a tick. Returns whether more could be done at once."""
        if not (self._done or self._fetching or self._serving):
            return False
        while self._done:
            self._done.popleft()()
        self._follow()
        self._begin_reads()
        self._send_slice()
        for peer in self._downloads.peers():
            session = self._sessions.session(peer)
            if session is not None and not self._sessions.speaks(peer, BLOBS):
                self._downloads.cannot(peer)
                continue
            for ask in self._downloads.asks(peer, session, now_ms):
                self._sessions.tell(peer, CHUNK_GET, seq=ask.seq, lane=LANE, meta=ask.meta)
        return bool(self._ready)

    def next_wake_ms(self, now_ms: int) -> int | None:
        return self._downloads.next_wake_ms(now_ms) if self._fetching else None

    # -- fetching -------------------------------------------------------------------------------------------

    def _looked(self, fetch: Fetch, found: Blob | Unfinished | None) -> None:
        if isinstance(found, Blob):
            self._succeed(fetch, found)
        elif found is None:
            fetch.found_nothing()
        else:
            fetch.fill(found.manifest, found.missing)

    def _check_and_keep(self, taken: Taken) -> bool:
        """Runs in a thread of the disk."""
        if digest_of(taken.piece.kind, taken.body) != taken.digest:
            return False
        if taken.piece.kind == "chunk":
            self._files.keep(taken.fetch.id, taken.piece.at, taken.body)
        return True

    def _kept(self, taken: Taken, is_match: bool) -> None:
        self._downloads.kept(taken, is_match=is_match)
        if not is_match:
            log.warning(
                "chunk does not match",
                extra={
                    "peer": taken.peer,
                    "blob": taken.fetch.id,
                    "part": taken.piece.kind,
                    "at": taken.piece.at,
                },
            )

    def _not_kept(self, taken: Taken, error: BrokerFreeError) -> None:
        self._downloads.dropped(taken)
        taken.fetch.fail(error)

    def _follow(self) -> None:
        """Take each fetch a step further: to the disk, to its end, or tell how far it is."""
        for fetching in list(self._fetching.values()):
            fetch = fetching.fetch
            if fetch.failure is not None:
                self._end(fetch)
                continue
            step = fetch.step()
            if step is not None:
                manifest = fetch.manifest
                assert manifest is not None, "no step without a manifest"
                self._take_step(fetch, step, manifest)
            self._tell_progress(fetching)

    def _take_step(self, fetch: Fetch, step: str, manifest: Manifest) -> None:
        if step == "begin":
            every = range(manifest.root.chunks)
            self._do(partial(self._files.begin, manifest), lambda _: fetch.fill(manifest, every), fetch.fail)
        else:
            self._do(partial(self._files.finish, manifest), partial(self._succeed, fetch), fetch.fail)

    def _tell_progress(self, fetching: _Fetching) -> None:
        fetch = fetching.fetch
        size = fetch.size
        if size is None or fetch.stage not in ("filling", "finishing"):
            return
        if (
            fetch.bytes_kept - fetching.told_bytes >= _PROGRESS_BYTES
            or fetching.told_bytes < fetch.bytes_kept == size
        ):
            fetching.told_bytes = fetch.bytes_kept
            for waiter in fetching.waiters:
                if waiter.on_progress is not None:
                    self._tell_loop(waiter.on_progress, fetch.bytes_kept, size)

    def _succeed(self, fetch: Fetch, blob: Blob) -> None:
        for waiter in self._forget(fetch):
            self._tell_loop(succeed, waiter.future, blob)

    def _end(self, fetch: Fetch) -> None:
        """End a fetch that has failed, or that nobody waits for."""
        for waiter in self._forget(fetch):
            assert fetch.failure is not None, "a fetch that somebody waits for ends by a failure"
            self._tell_loop(fail, waiter.future, fetch.failure)

    def _forget(self, fetch: Fetch) -> list[Waiter]:
        """Take a fetch out. Returns who waits for it: nobody if it has ended before."""
        fetching = self._fetching.get(fetch.id)
        if fetching is None or fetching.fetch is not fetch:
            return []
        del self._fetching[fetch.id]
        self._downloads.end(fetch)
        return fetching.waiters

    # -- serving --------------------------------------------------------------------------------------------

    def _on_get(self, peer: str, frame: Frame) -> None:
        serving = self._serving.get(peer)
        if serving is None or serving.session != frame.session:
            serving = self._serving[peer] = Serving(frame.session, self._limits, self._random)
            self._waiting.pop(peer, None)
        wanted = serving.check(peer, frame.seq, frame.meta)
        if isinstance(wanted, str):
            self._refuse(peer, frame.seq, wanted)
        elif not self._is_granted(serving, wanted):
            self._refuse(peer, frame.seq, UNKNOWN)
        else:
            serving.reserve()
            self._waiting.setdefault(peer, deque()).append(wanted)

    def _is_granted(self, serving: Serving, wanted: Wanted) -> bool:
        if wanted.blob_id not in serving.grants:
            if not self._rows.may_fetch_blob(wanted.blob_id, wanted.peer):
                return False
            serving.grant(wanted.blob_id)
        return True

    def _refuse(self, peer: str, seq: int, reason: str) -> None:
        self.refused[f"chunk-{reason}"] += 1
        self._sessions.tell(peer, CHUNK, seq=seq, lane=LANE, meta={"error": reason})

    def _begin_reads(self) -> None:
        while self._waiting and self._reads < _READS_MAX:
            peer = next(iter(self._waiting))
            queue = self._waiting.pop(peer)
            wanted = queue.popleft()
            if queue:
                self._waiting[peer] = queue  # to the end: peers take turns
            self._reads += 1
            self._do(
                partial(self._read, wanted),
                partial(self._have_read, wanted),
                partial(self._have_read_nothing, wanted),
            )

    def _read(self, wanted: Wanted) -> bytes | str:
        """Runs in a thread of the disk. Returns the piece, or the reason why there is none."""
        try:
            return self._files.read(wanted.blob_id, wanted.piece, is_checked=wanted.is_again)
        except UnknownBlob:
            return UNKNOWN
        except InvalidInput:
            return MALFORMED
        except BlobFailed as error:
            log.error("blob damaged", extra={"blob": wanted.blob_id, "reason": error.message})
            return DAMAGED
        except OSError as error:
            log.error("blob unreadable", extra={"blob": wanted.blob_id, "reason": str(error)})
            return UNREADABLE

    def _have_read_nothing(self, wanted: Wanted, error: BrokerFreeError) -> None:
        self._have_read(wanted, UNREADABLE)

    def _have_read(self, wanted: Wanted, read: bytes | str) -> None:
        self._reads -= 1
        serving = self._serving.get(wanted.peer)
        if serving is None or serving.session != wanted.session:
            return
        if isinstance(read, str):
            serving.release()
            self._refuse(wanted.peer, wanted.seq, read)
        else:
            self._ready.append((wanted, read))

    def _send_slice(self) -> None:
        """Send a bounded number of bytes: the next tick begins with mail again."""
        room = self._limits.blob_slice_bytes
        while self._ready and room > 0:
            wanted, piece = self._ready.popleft()
            serving = self._serving.get(wanted.peer)
            if serving is None or not (
                self._sessions.session(wanted.peer) == wanted.session == serving.session
            ):
                continue
            token = serving.sent(len(piece))
            self._sessions.tell(
                wanted.peer, CHUNK, seq=wanted.seq, lane=LANE, meta={"token": token}, body=piece
            )
            room -= len(piece)

    # -- house-keeping --------------------------------------------------------------------------------------

    def drop(self, blob_ids: Iterable[str]) -> None:
        """Remove the files of blobs whose rows are gone, except where one has come back meanwhile."""
        hidden = [
            path for one in blob_ids if not self._rows.has_blob(one) for path in self._files.retire(one)
        ]
        self._do(partial(self._files.remove, hidden), _ignore, _ignore)

    def sweep(self, older_than_s: float) -> None:
        """Remove files that a crash has left without a row, and what nobody goes on fetching."""
        self._do(partial(self._files.strays, older_than_s=older_than_s), self._swept, _ignore)

    def _swept(self, strays: tuple[list[str], list[str]]) -> None:
        complete, unfinished = strays
        self.drop(complete)
        for blob_id in unfinished:
            if blob_id not in self._fetching:
                self._do(partial(self._files.discard_part, blob_id), _ignore, _ignore)

    # -- the disk's threads ---------------------------------------------------------------------------------

    def _do(
        self, fn: Callable[[], T], then: Callable[[T], object], failed: Callable[[BrokerFreeError], object]
    ) -> None:
        """Run `fn` in a thread, then `then(result)` or `failed(error)` in the owner's."""
        self._threads.submit(self._work, fn, then, failed)

    def _work(
        self, fn: Callable[[], T], then: Callable[[T], object], failed: Callable[[BrokerFreeError], object]
    ) -> None:
        try:
            result = fn()
        except BrokerFreeError as error:
            self._come_back(partial(failed, error))
        except Exception as error:
            log.exception("disk work of a blob failed")
            failure = BlobFailed(f"the disk work failed: {error}", hint="see the log")
            self._come_back(partial(failed, failure))
        else:
            self._come_back(partial(then, result))

    def _come_back(self, fn: Callable[[], object]) -> None:
        self._done.append(fn)
        self._wake()

    def _tell_loop(self, fn: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(fn, *args)


def _ignore(_: object) -> None:
    """Nothing follows."""
