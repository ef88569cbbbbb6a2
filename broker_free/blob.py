"""Large bodies: how a blob is cut, named and checked, and which piece is asked of whom next. Pure.

A message is at most `Limits.body_bytes_max` long. What is larger is a blob: the message carries its id, and whoever
wants the content pulls it from a peer that has it, in pieces small enough that mail never waits long behind one.

    chunk   65,536 bytes of the content (the last one: what is left)
    page    digests of up to 2,048 chunks, 32 bytes each
    root    "BFB1"  size:u64  chunk_bytes:u32  then the digest of each page       (big endian)
    id      digest of the root, as 64 hex digits

Every digest is BLAKE2b-256, personalised by what it names, so that a page can never pass for a chunk. A node that
knows the id can therefore check every piece from anybody, alone and in any order. A root of at most one chunk names
up to 256 GiB.

On the wire, lane 1 of the open session:

    CHUNK_GET   seq = number of the request   F2 {"blob": id, "part": "root"|"page"|"chunk", "at": index,
                                                  "seen": token of the newest piece that arrived,
                                                  "again": true when an earlier answer did not match}
    CHUNK       seq = that number             F2 {"token": n}, F3 = the piece      or F2 {"error": reason}

Who asks holds at most a window of bytes that are asked for and not yet on its disk, and so no more than a window
ever lies in front of a letter. The window shrinks to one chunk while answers take longer than the line itself
explains (as LEDBAT does, RFC 6817). Who answers counts what it sent until `seen` proves it read: the token
is a random number in the piece itself, so a peer that asks and never reads cannot make this node queue without end.
"""

from __future__ import annotations

import re
import struct
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from typing import Any, Final, Literal, NamedTuple

from broker_free.errors import BlobDamaged, BlobFailed, BrokerFreeError, InvalidInput, TooLarge, UnknownBlob
from broker_free.limits import KIB, Limits

CHUNK_BYTES: Final = 64 * KIB
DIGEST_BYTES: Final = 32
PAGE_CHUNKS: Final = CHUNK_BYTES // DIGEST_BYTES
PAGE_BYTES: Final = PAGE_CHUNKS * DIGEST_BYTES

Kind = Literal["root", "page", "chunk"]

_PERSON: Final[Mapping[Kind, bytes]] = {
    "root": b"bf-blob-root",
    "page": b"bf-blob-page",
    "chunk": b"bf-blob-chunk",
}
_HEAD: Final = struct.Struct(">4sQI")
_MAGIC: Final = b"BFB1"
_ID: Final = re.compile(r"[0-9a-f]{64}")

# Reasons of a CHUNK that carries no piece.
UNKNOWN: Final = "unknown"  # not here, or not for this peer: the two look the same from outside
MALFORMED: Final = "malformed"
BUSY: Final = "busy"  # more asked for than the window
DAMAGED: Final = "damaged"  # what is on disk does not match its digest
UNREADABLE: Final = "unreadable"  # the disk said no

MISMATCHES_MAX: Final = 3  # of one source for one blob, then it is asked no more
BUSY_PAUSE_MS: Final = 100
# Waiting behind own chunks that a letter may see on a short line; RFC 6817 would allow 100.
DELAY_MS_MAX: Final = 10
GRANTS_REMEMBERED: Final = 1_000  # of one session


class Piece(NamedTuple):
    kind: Kind
    at: int = 0


ROOT: Final = Piece("root")


def digest_of(kind: Kind, body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST_BYTES, person=_PERSON[kind]).digest()


def check_id(blob_id: object) -> str:
    """Return a blob id that came from outside, or raise InvalidInput."""
    if not isinstance(blob_id, str) or not _ID.fullmatch(blob_id):
        raise InvalidInput(f"{blob_id!r} is not a blob id", hint="an id is 64 hex digits, from put_blob")
    return blob_id


def check_size(size: int, limits: Limits) -> None:
    if size > limits.blob_bytes_max:
        raise TooLarge(
            f"a blob of {size} bytes; the limit is {limits.blob_bytes_max}",
            hint="raise Limits.blob_bytes_max on both sides, or split it",
        )


@dataclass(frozen=True, slots=True)
class Root:
    """The size of a blob and the digests of its pages."""

    size: int
    page_digests: bytes

    @property
    def chunks(self) -> int:
        return -(-self.size // CHUNK_BYTES)

    @property
    def pages(self) -> int:
        return -(-self.chunks // PAGE_CHUNKS)

    def encode(self) -> bytes:
        return _HEAD.pack(_MAGIC, self.size, CHUNK_BYTES) + self.page_digests

    @property
    def id(self) -> str:
        return digest_of("root", self.encode()).hex()

    @classmethod
    def decode(cls, raw: bytes) -> Root:
        if len(raw) < _HEAD.size:
            raise InvalidInput("a blob's root that is cut short")
        magic, size, chunk_bytes = _HEAD.unpack_from(raw)
        root = cls(size, raw[_HEAD.size :])
        if (
            magic != _MAGIC
            or chunk_bytes != CHUNK_BYTES
            or len(root.page_digests) != root.pages * DIGEST_BYTES
        ):
            raise InvalidInput("not the root of a blob", hint="run the same version on both sides")
        return root

    def length_of(self, piece: Piece) -> int:
        """Return how many bytes a piece has. Raises InvalidInput when the blob has no such piece."""
        match piece.kind:
            case "root":
                count, whole = 1, _HEAD.size + len(self.page_digests)
            case "page":
                count, whole = self.pages, self.chunks * DIGEST_BYTES
            case "chunk":
                count, whole = self.chunks, self.size
        if not 0 <= piece.at < count:
            raise InvalidInput(f"this blob has no {piece.kind} {piece.at}")
        return whole if piece.kind == "root" else min(CHUNK_BYTES, whole - piece.at * CHUNK_BYTES)


ROOT_HEAD_BYTES: Final = _HEAD.size


def root_bytes(head: bytes) -> int:
    """Return how long the root is that begins with these `ROOT_HEAD_BYTES`."""
    return _HEAD.size + Root(_HEAD.unpack(head)[1], b"").pages * DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Manifest:
    """A root with all its chunk digests: 32 bytes for each 64 KiB, 512 KiB for 1 GiB."""

    root: Root
    digests: bytes

    @classmethod
    def of(cls, size: int, digests: bytes) -> Manifest:
        pages = [digests[at : at + PAGE_BYTES] for at in range(0, len(digests), PAGE_BYTES)]
        return cls(Root(size, b"".join(digest_of("page", page) for page in pages)), digests)

    @classmethod
    def decode(cls, raw: bytes) -> Manifest:
        """Read what `encode` wrote, checking all of it."""
        if len(raw) < ROOT_HEAD_BYTES:
            raise InvalidInput("a manifest that is cut short")
        end = root_bytes(raw[:ROOT_HEAD_BYTES])
        read = cls(Root.decode(raw[:end]), raw[end:])
        if (
            cls.of(read.root.size, read.digests) != read
            or len(read.digests) != read.root.chunks * DIGEST_BYTES
        ):
            raise InvalidInput("a manifest whose parts do not match")
        return read

    def encode(self) -> bytes:
        return self.root.encode() + self.digests

    def digest_of_chunk(self, index: int) -> bytes:
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


# ── Who asks ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Taken:
    """A piece that arrived: to be checked against `digest` and kept, then told to `Downloads.kept`."""

    fetch: Fetch
    piece: Piece
    body: bytes
    digest: bytes
    peer: str
    session: int


# looking: is any of it on this disk already?  →  mapping: the root, then its pages, are asked for
# →  beginning: there is room for it, and its manifest is written  →  filling: chunks  →  finishing: synced, renamed
Stage = Literal["looking", "mapping", "beginning", "filling", "finishing"]


class Fetch:
    """One blob on its way here: what is known of it, what is missing, who may be asked."""

    def __init__(self, blob_id: str, limits: Limits) -> None:
        self.id = blob_id
        self.sources: dict[str, None] = {}  # a set that keeps its order
        self.manifest: Manifest | None = None
        self.failure: BrokerFreeError | None = None
        self.stage: Stage = "looking"
        self.bytes_kept = 0
        self.chunks_fetched = 0  # over the wire, in this try
        self._limits = limits
        self._root: Root | None = None
        self._pages: dict[int, bytes] = {}
        self._wanted: deque[Piece] = deque([ROOT])
        self._under_way = 0  # asked for, or being checked and written
        self._mismatches: Counter[str] = Counter()
        self._in_doubt: set[Piece] = set()  # did not match once

    @property
    def size(self) -> int | None:
        return self._root.size if self._root else None

    def found_nothing(self) -> None:
        """No earlier try has left anything on disk: begin with the root."""
        self.stage = "mapping"

    def fill(self, manifest: Manifest, missing: Sequence[int]) -> None:
        """The manifest is on disk; these are the indexes of the chunks that are not."""
        self.manifest, self._root = manifest, manifest.root
        self._wanted = deque(Piece("chunk", index) for index in missing)
        self.bytes_kept = manifest.root.size - sum(self.length_of(piece) for piece in self._wanted)
        self.stage = "filling"

    def step(self) -> Literal["begin", "finish"] | None:
        """Return what the disk has to do next, once for each."""
        if self.stage == "mapping" and self.manifest is not None:
            self.stage = "beginning"
            return "begin"
        if self.stage == "filling" and not self._wanted and not self._under_way:
            self.stage = "finishing"
            return "finish"
        return None

    def fail(self, error: BrokerFreeError) -> None:
        self.failure = self.failure or error

    def next_piece(self, peer: str) -> Piece | None:
        """Take the next piece to ask `peer` for, if any is wanted."""
        if self.failure or self.stage not in ("mapping", "filling") or peer not in self.sources:
            return None
        if not self._wanted:
            return None
        self._under_way += 1
        return self._wanted.popleft()

    def length_of(self, piece: Piece) -> int:
        return self._root.length_of(piece) if self._root else CHUNK_BYTES  # of a root: at most

    def put_back(self, piece: Piece) -> None:
        self._under_way -= 1
        self._wanted.appendleft(piece)

    def is_in_doubt(self, piece: Piece) -> bool:
        return piece in self._in_doubt

    def digest_of(self, piece: Piece) -> bytes:
        match piece.kind:
            case "root":
                return bytes.fromhex(self.id)
            case "page":
                assert self._root, "pages are asked for once the root is known"
                return self._root.page_digests[piece.at * DIGEST_BYTES : (piece.at + 1) * DIGEST_BYTES]
            case "chunk":
                assert self.manifest, "chunks are asked for once all pages are known"
                return self.manifest.digest_of_chunk(piece.at)

    def kept(self, taken: Taken) -> None:
        """A piece matched its digest; a chunk is on its way to the disk."""
        self._under_way -= 1
        self._in_doubt.discard(taken.piece)
        match taken.piece.kind:
            case "root":
                self._on_root(taken.body)
            case "page":
                self._pages[taken.piece.at] = taken.body
                self._join_pages()
            case "chunk":
                self.bytes_kept += len(taken.body)
                self.chunks_fetched += 1

    def _on_root(self, body: bytes) -> None:
        try:
            self._root = Root.decode(body)
            check_size(self._root.size, self._limits)
        except InvalidInput as error:
            self.fail(error)
            return
        self._wanted.extend(Piece("page", index) for index in range(self._root.pages))
        self._join_pages()

    def _join_pages(self) -> None:
        root = self._root
        assert root, "pages come after the root"
        if len(self._pages) == root.pages:
            self.manifest = Manifest(root, b"".join(self._pages[index] for index in range(root.pages)))
            self._pages.clear()

    def mismatched(self, taken: Taken) -> None:
        """What `peer` sent is not what was asked for: ask again, of somebody else when it happens too often."""
        self._in_doubt.add(taken.piece)
        self.put_back(taken.piece)
        self._mismatches[taken.peer] += 1
        if self._mismatches[taken.peer] >= MISMATCHES_MAX:
            self.drop_source(
                taken.peer,
                BlobDamaged(
                    f"{taken.peer} sent {taken.piece.kind} {taken.piece.at} of {self.id[:12]} wrong"
                    f" {MISMATCHES_MAX} times",
                    hint="put the blob again there, or fetch it from another peer",
                ),
            )

    def drop_source(self, peer: str, error: BrokerFreeError) -> None:
        """Ask `peer` no more; without anybody left, that is why the fetch fails."""
        self.sources.pop(peer, None)
        if not self.sources:
            self.fail(error)


@dataclass(frozen=True, slots=True)
class Ask:
    """One CHUNK_GET to send."""

    seq: int
    meta: Mapping[str, Any]  # JSON


@dataclass(slots=True)
class _Asked:
    fetch: Fetch
    piece: Piece
    at_ms: int


@dataclass(slots=True)
class _Source:
    """What is under way from one peer in one session."""

    session: int
    window: int = CHUNK_BYTES
    window_max: int = CHUNK_BYTES
    asked: dict[int, _Asked] = field(default_factory=dict)  # by seq, oldest first
    bytes_keeping: int = 0  # arrived, not yet written
    next_seq: int = 1
    seen: int | None = None
    base_ms: int | None = None  # the shortest answer of this session
    paused_until_ms: int = 0
    quick_answers: int = 0  # in a row

    def room(self) -> int:
        return self.window - self.bytes_keeping - CHUNK_BYTES * len(self.asked)  # as the other side counts

    def adapt(self, took_ms: int) -> None:
        """Widen the window while answers come as fast as the line allows, narrow it when they queue."""
        base_ms = self.base_ms = took_ms if self.base_ms is None else min(took_ms, self.base_ms)
        if took_ms - base_ms > max(DELAY_MS_MAX, base_ms):
            self.quick_answers = 0
            self.window = max(CHUNK_BYTES, self.window - CHUNK_BYTES)
            return
        self.quick_answers += 1
        if self.quick_answers * CHUNK_BYTES >= self.window:  # a whole window of them
            self.quick_answers = 0
            self.window = min(self.window_max, self.window + CHUNK_BYTES)


class Downloads:
    """Every fetch of a node: shares out each peer's window fairly among the blobs that come from it."""

    def __init__(self, limits: Limits) -> None:
        self.fetches: dict[str, Fetch] = {}
        self.refused: Counter[str] = Counter()
        self._limits = limits
        self._sources: dict[str, _Source] = {}

    def start(self, blob_id: str, peer: str) -> tuple[Fetch, bool]:
        """Begin a fetch, or join the one that is under way. Returns it and whether it is new."""
        fetch = self.fetches.get(blob_id)
        is_new = fetch is None
        if fetch is None:
            if len(self.fetches) >= self._limits.blob_fetches_max:
                raise TooLarge(
                    f"{len(self.fetches)} blobs are being fetched; the limit is {self._limits.blob_fetches_max}",
                    hint="wait for one of them, then try again",
                )
            fetch = self.fetches[blob_id] = Fetch(blob_id, self._limits)
        fetch.sources[peer] = None
        return fetch, is_new

    def end(self, fetch: Fetch) -> None:
        """Forget a fetch that is complete, has failed, or that nobody waits for any more."""
        if self.fetches.get(fetch.id) is fetch:
            del self.fetches[fetch.id]

    def peers(self) -> set[str]:
        """Return whom anything is wanted of, or was asked."""
        wanted = {peer for fetch in self.fetches.values() for peer in fetch.sources}
        return wanted.union(peer for peer, source in self._sources.items() if source.asked)

    def asks(self, peer: str, session: int | None, now_ms: int) -> list[Ask]:
        """Return what to ask `peer` for now. `session` is the open one, None when there is none."""
        if session is None:
            self._leave_session(peer, unless=None)
            return []
        source = self._source(peer, session)
        self._give_up_late(peer, source, now_ms)
        asks: list[Ask] = []
        turns = deque(fetch for fetch in self.fetches.values() if peer in fetch.sources)
        while turns and now_ms >= source.paused_until_ms and source.room() >= CHUNK_BYTES:
            fetch = turns.popleft()
            piece = fetch.next_piece(peer)
            if piece is None:
                continue
            asks.append(self._ask(source, fetch, piece, now_ms))
            turns.append(fetch)
            self._to_the_end(fetch)
        return asks

    def _to_the_end(self, fetch: Fetch) -> None:
        """The next window begins with another fetch: none starves, whatever their sizes."""
        self.fetches[fetch.id] = self.fetches.pop(fetch.id)

    def _ask(self, source: _Source, fetch: Fetch, piece: Piece, now_ms: int) -> Ask:
        seq, source.next_seq = source.next_seq, source.next_seq + 1
        source.asked[seq] = _Asked(fetch, piece, now_ms)
        meta: dict[str, object] = {"blob": fetch.id, "part": piece.kind, "at": piece.at}
        if source.seen is not None:
            meta["seen"] = source.seen
        if fetch.is_in_doubt(piece):
            meta["again"] = True
        return Ask(seq, meta)

    def _source(self, peer: str, session: int) -> _Source:
        """Return the state of the open session. What an earlier one left unanswered is asked for again."""
        self._leave_session(peer, unless=session)
        if peer not in self._sources:
            window = max(self._limits.blob_window_bytes, CHUNK_BYTES)
            self._sources[peer] = _Source(session, window_max=window)
        return self._sources[peer]

    def _leave_session(self, peer: str, *, unless: int | None) -> None:
        source = self._sources.get(peer)
        if source is not None and source.session != unless:
            del self._sources[peer]
            for one in reversed(source.asked.values()):
                one.fetch.put_back(one.piece)

    def _give_up_late(self, peer: str, source: _Source, now_ms: int) -> None:
        for seq, one in list(source.asked.items()):
            if now_ms - one.at_ms < self._limits.blob_answer_ms:
                break
            del source.asked[seq]
            one.fetch.put_back(one.piece)
            source.window = CHUNK_BYTES
            self.refused["chunk-late"] += 1

    def cannot(self, peer: str) -> None:
        """The peer's version does not know large bodies."""
        for fetch in self.fetches.values():
            if peer in fetch.sources:
                error = BlobFailed(f"{peer} cannot send large bodies", hint="upgrade that node")
                fetch.drop_source(peer, error)

    def next_wake_ms(self, now_ms: int) -> int | None:
        """Return when `asks` has something to do though nothing arrives."""
        times = [
            one.at_ms + self._limits.blob_answer_ms
            for source in self._sources.values()
            for one in list(source.asked.values())[:1]
        ]
        times += [s.paused_until_ms for s in self._sources.values() if s.paused_until_ms > now_ms]
        return min(times, default=None)

    def on_chunk(
        self, peer: str, session: int, *, seq: int, meta: Mapping[str, Any], body: bytes, now_ms: int
    ) -> Taken | None:
        """Take an answer in. Returns the piece to be checked and kept, if there is one."""
        source, token = self._source(peer, session), meta.get("token")
        if isinstance(token, int):
            source.seen = token  # of what nobody waits for too: the other side counts it until then
        asked = source.asked.pop(seq, None)
        if asked is None:
            self.refused["chunk-unasked"] += 1
            return None
        fetch = asked.fetch
        if self.fetches.get(fetch.id) is not fetch:
            return None  # nobody waits for it any more
        if "error" in meta:
            fetch.put_back(asked.piece)
            self._on_refusal(peer, source, asked, str(meta["error"])[:100], now_ms)
            return None
        if not isinstance(token, int) or len(body) > fetch.length_of(asked.piece):
            fetch.put_back(asked.piece)
            self.refused["chunk-malformed"] += 1
            fetch.drop_source(peer, BlobFailed(f"{peer} sent a malformed CHUNK"))
            return None
        source.adapt(now_ms - asked.at_ms)
        source.bytes_keeping += len(body)
        return Taken(fetch, asked.piece, body, fetch.digest_of(asked.piece), peer, session)

    def _on_refusal(self, peer: str, source: _Source, asked: _Asked, reason: str, now_ms: int) -> None:
        fetch, short = asked.fetch, asked.fetch.id[:12]
        match reason:
            case "busy":
                source.window = CHUNK_BYTES
                source.paused_until_ms = now_ms + BUSY_PAUSE_MS
            case "unknown":
                fetch.drop_source(
                    peer,
                    UnknownBlob(
                        f"{peer} has no blob {short} for this node",
                        hint="a blob is kept for those it was published to, for a limited time; ask for it again",
                    ),
                )
            case "damaged":
                fetch.drop_source(
                    peer,
                    BlobDamaged(
                        f"{asked.piece.kind} {asked.piece.at} of {short} is damaged on the disk of {peer}",
                        hint="put the blob again there, or fetch it from another peer",
                    ),
                )
            case _:
                fetch.drop_source(
                    peer, BlobFailed(f"{peer} could not send {short}: {reason}", hint="see its log")
                )

    def dropped(self, taken: Taken) -> None:
        """The disk has done with a piece: there is room for another."""
        source = self._sources.get(taken.peer)
        if source is not None and source.session == taken.session:
            source.bytes_keeping -= len(taken.body)

    def kept(self, taken: Taken, *, is_match: bool) -> None:
        """A piece has been compared with its digest, and written if it is right."""
        self.dropped(taken)
        if is_match:
            taken.fetch.kept(taken)
        else:
            self.refused["chunk-mismatch"] += 1
            taken.fetch.mismatched(taken)


# ── Who answers ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that has passed: read the piece and answer it."""

    peer: str
    session: int
    seq: int
    blob_id: str
    piece: Piece
    is_again: bool


class Serving:
    """What one peer has asked for in one session, and what it has not proven to have read."""

    def __init__(self, session: int, limits: Limits, random: Random) -> None:
        self.session = session
        self.grants: set[str] = set()  # blob ids that the store has allowed
        self._window = max(limits.blob_window_bytes, CHUNK_BYTES)
        self._random = random
        self._unproven: deque[tuple[int, int]] = deque()  # token, bytes
        self._bytes = 0  # asked for and not answered, or not proven

    def check(self, peer: str, seq: int, meta: Mapping[str, Any]) -> Wanted | str:
        """Return the request if it may be looked at, or the reason why not."""
        self._note_seen(meta.get("seen"))
        kind, index = meta.get("part"), meta.get("at")
        if kind not in ("root", "page", "chunk") or not isinstance(index, int) or isinstance(index, bool):
            return MALFORMED
        try:
            blob_id = check_id(meta.get("blob"))
        except InvalidInput:
            return MALFORMED
        if index < 0:
            return MALFORMED
        if self._bytes + CHUNK_BYTES > self._window:
            return BUSY
        return Wanted(peer, self.session, seq, blob_id, Piece(kind, index), meta.get("again") is True)

    def grant(self, blob_id: str) -> None:
        """Remember the store's word for the rest of this session."""
        if len(self.grants) >= GRANTS_REMEMBERED:
            self.grants.clear()
        self.grants.add(blob_id)

    def _note_seen(self, token: object) -> None:
        if any(sent == token for sent, _ in self._unproven):
            while self._unproven:
                sent, size = self._unproven.popleft()
                self._bytes -= size
                if sent == token:
                    break

    def reserve(self) -> None:
        """A request is taken on. Its piece is at most a chunk."""
        self._bytes += CHUNK_BYTES

    def release(self) -> None:
        """A request is answered by a reason: nothing of it stays."""
        self._bytes -= CHUNK_BYTES

    def sent(self, size: int) -> int:
        """A piece leaves now. Returns the token to send with it."""
        token = self._random.getrandbits(53)  # survives JSON readers that know only doubles
        self._bytes += size - CHUNK_BYTES
        self._unproven.append((token, size))
        return token
