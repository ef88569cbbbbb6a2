"""Large bodies: how they are cut and asked for, and what becomes of them between real nodes and real disks."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from broker_free import Node, Tx
from broker_free.blob import (
    BUSY,
    CHUNK_BYTES,
    MALFORMED,
    PAGE_CHUNKS,
    Downloads,
    Fetch,
    Manifest,
    Piece,
    Root,
    Serving,
    Taken,
    Wanted,
    digest_of,
)
from broker_free.carrier import Carrier
from broker_free.errors import (
    BlobDamaged,
    BlobFailed,
    DiskLow,
    InvalidInput,
    NodeClosed,
    TimedOut,
    TooLarge,
    UnknownBlob,
    UnknownPeer,
)
from broker_free.frames import CHUNK, CHUNK_GET
from broker_free.limits import MIB, Limits
from broker_free.message import Envelope
from tests.conftest import need_root
from tests.node_worker import content
from tests.nodes import Worker, pair, run, until

PEER, OTHER = "p" * 32, "o" * 32


async def offer(node: Node, to: Node, body: bytes) -> str:
    """Put a blob and publish it to a peer. Returns its id."""
    blob = await node.put_blob(body)
    await node.publish("take.it", b"", to=[to.node_id], blobs=[blob.id])
    return blob.id


# -- the format ---------------------------------------------------------------------------------------------------


def manifest_of(body: bytes) -> Manifest:
    chunks = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)]
    return Manifest.of(len(body), b"".join(digest_of("chunk", chunk) for chunk in chunks))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 7])
def test_a_manifest_names_every_byte_once_and_reads_back(size: int) -> None:
    manifest = manifest_of(content(1, size))
    root = manifest.root
    assert Manifest.decode(manifest.encode()) == manifest
    assert Root.decode(root.encode()) == root
    assert sum(root.length_of(Piece("chunk", at)) for at in range(root.chunks)) == size
    for beyond in (Piece("chunk", root.chunks), Piece("page", root.pages), Piece("chunk", -1)):
        with pytest.raises(InvalidInput):
            root.length_of(beyond)


def test_the_format_reaches_four_gibibytes_with_a_root_of_a_few_kilobytes() -> None:
    size = 4 << 30
    manifest = Manifest.of(size, bytes(32) * (size // CHUNK_BYTES))
    assert manifest.root.pages == size // CHUNK_BYTES // PAGE_CHUNKS == 32
    assert len(manifest.root.encode()) < 2_048
    assert Manifest.decode(manifest.encode()) == manifest


def test_a_page_can_not_pass_for_a_chunk_nor_one_blob_for_another() -> None:
    assert digest_of("page", b"same") != digest_of("chunk", b"same") != digest_of("root", b"same")
    assert manifest_of(b"a" * 100).root.id != manifest_of(b"a" * 101).root.id
    manifest = manifest_of(content(1, 3 * CHUNK_BYTES))
    with pytest.raises(InvalidInput):
        Manifest.decode(manifest.encode()[:-1] + b"x")
    with pytest.raises(InvalidInput):
        Root.decode(manifest.root.encode() + bytes(32))


# -- who asks whom for what -----------------------------------------------------------------------------------------


class Served:
    """Peers that hold blobs, and the disk of the one that fetches: what carrier.py does, without threads."""

    def __init__(self, *bodies: bytes, limits: Limits | None = None, seed: int = 1) -> None:
        self.limits = limits or Limits()
        self.random = random.Random(seed)
        self.manifests = {
            manifest.root.id: (manifest, body) for body in bodies for manifest in [manifest_of(body)]
        }
        self.downloads = Downloads(self.limits)
        self.sessions = {PEER: 1, OTHER: 2}
        self.serving = {
            peer: Serving(session, self.limits, self.random) for peer, session in self.sessions.items()
        }
        self.requests: list[tuple[str, Piece]] = []
        self.answers: deque[tuple[str, int, int, dict[str, Any], bytes]] = deque()
        self.disk: dict[tuple[str, int], bytes] = {}
        self.keeping: list[Taken] = []
        self.now_ms = 0

    def start(self, blob_id: str, *peers: str) -> Fetch:
        for peer in peers:
            fetch, is_new = self.downloads.start(blob_id, peer)
            if is_new:
                fetch.found_nothing()
        return fetch

    def piece(self, blob_id: str, piece: Piece) -> bytes:
        manifest, body = self.manifests[blob_id]
        match piece.kind:
            case "root":
                return manifest.root.encode()
            case "page":
                return manifest.digests[piece.at * CHUNK_BYTES : (piece.at + 1) * CHUNK_BYTES]
            case "chunk":
                return body[piece.at * CHUNK_BYTES : (piece.at + 1) * CHUNK_BYTES]

    def ask(self) -> None:
        for peer in sorted(self.downloads.peers()):
            session = self.sessions.get(peer)
            for ask in self.downloads.asks(peer, session, self.now_ms):
                assert session is not None
                self.serve(peer, session, ask.seq, json.loads(json.dumps(ask.meta)))

    def serve(self, peer: str, session: int, seq: int, meta: dict[str, Any]) -> None:
        wanted = self.serving[peer].check(peer, seq, meta)
        assert isinstance(wanted, Wanted), "who keeps to the window is never refused"
        self.serving[peer].reserve()
        self.requests.append((wanted.blob_id, wanted.piece))
        body = self.piece(wanted.blob_id, wanted.piece)
        self.answers.append((peer, session, seq, {"token": self.serving[peer].sent(len(body))}, body))

    def answer(self, spoil: bool = False) -> None:
        peer, session, seq, meta, body = self.answers.popleft()
        if session != self.sessions.get(peer):
            return  # lost with its session
        if spoil:
            body = bytes(len(body))
        taken = self.downloads.on_chunk(peer, session, seq=seq, meta=meta, body=body, now_ms=self.now_ms)
        if taken is not None:
            self.keeping.append(taken)

    def keep(self) -> None:
        taken = self.keeping.pop(self.random.randrange(len(self.keeping)))
        is_match = digest_of(taken.piece.kind, taken.body) == taken.digest
        if is_match and taken.piece.kind == "chunk":
            self.disk[taken.fetch.id, taken.piece.at] = taken.body
        self.downloads.kept(taken, is_match=is_match)

    def step(self, fetch: Fetch) -> bool:
        """Take the steps of the disk. Returns whether the blob is complete."""
        step = fetch.step()
        if step == "begin":
            assert fetch.manifest
            fetch.fill(fetch.manifest, range(fetch.manifest.root.chunks))
            step = fetch.step()
        return step == "finish"

    def new_session(self, peer: str) -> None:
        self.sessions[peer] = self.random.getrandbits(32)
        self.serving[peer] = Serving(self.sessions[peer], self.limits, self.random)

    def fetched(self, fetch: Fetch) -> bytes:
        assert fetch.manifest
        return b"".join(self.disk[fetch.id, at] for at in range(fetch.manifest.root.chunks))


@pytest.mark.parametrize("seed", range(40))
def test_a_blob_arrives_whole_through_lost_sessions_and_wrong_answers(seed: int) -> None:
    world = Served(content(seed, random.Random(seed).randrange(12 * CHUNK_BYTES)), seed=seed)
    rng = random.Random(seed)
    (blob_id,) = world.manifests
    fetch = world.start(blob_id, PEER, OTHER)
    spoiled = dict.fromkeys((PEER, OTHER), 0)
    for _ in range(5_000):
        world.now_ms += rng.randrange(20)
        if world.step(fetch):
            break
        match rng.randrange(8):
            case 0 if rng.random() < 0.1:
                world.new_session(rng.choice((PEER, OTHER)))
            case 1 | 2 | 3 if world.answers:
                peer = world.answers[0][0]
                spoil = spoiled[peer] < 2 and rng.random() < 0.1
                spoiled[peer] += spoil
                world.answer(spoil)
            case 4 | 5 if world.keeping:
                world.keep()
            case _:
                world.ask()
    assert fetch.failure is None
    assert world.fetched(fetch) == world.manifests[blob_id][1]


def test_only_a_window_is_ever_asked_for_and_it_opens_while_answers_come_quickly() -> None:
    world = Served(content(1, 40 * CHUNK_BYTES))
    (blob_id,) = world.manifests
    fetch = world.start(blob_id, PEER)
    widest = 0
    while not world.step(fetch):
        world.ask()
        widest = max(widest, len(world.answers))
        assert (len(world.answers) + len(world.keeping)) * CHUNK_BYTES <= world.limits.blob_window_bytes
        world.answer()
        world.keep()
    assert widest * CHUNK_BYTES == world.limits.blob_window_bytes


def test_answers_that_queue_narrow_the_window_to_one_chunk() -> None:
    world = Served(content(1, 60 * CHUNK_BYTES))
    (blob_id,) = world.manifests
    fetch = world.start(blob_id, PEER)
    chunk_ms = 40  # a chunk takes so long on this line: a window of four would hold up a letter for 160 ms
    at_once: list[int] = []
    while not world.step(fetch):
        world.ask()
        at_once.append(len(world.answers))
        world.now_ms += round(chunk_ms * len(world.answers[0][-1]) / CHUNK_BYTES)
        world.answer()
        world.keep()
    assert max(at_once[10:]) == 1


def test_fetches_of_one_peer_take_turns() -> None:
    big, small = content(1, 60 * CHUNK_BYTES), content(2, 9 * CHUNK_BYTES)
    world = Served(big, small)
    first, second = world.manifests
    fetch = world.start(first, PEER)
    for _ in range(10):
        world.step(fetch)
        world.ask()
        world.answer()
        world.keep()
    late = world.start(second, PEER)
    before = len(world.requests)
    while not world.step(late):
        world.step(fetch)
        world.ask()
        world.answer()
        world.keep()
    since = [(blob_id, piece) for blob_id, piece in world.requests[before:] if piece.kind == "chunk"]
    small_ones = [at for at, (blob_id, _) in enumerate(since) if blob_id == second]
    between = [blob_id for blob_id, _ in since[small_ones[0] : small_ones[-1] + 1]]
    assert abs(between.count(first) - between.count(second)) <= 1


def test_an_unanswered_request_is_made_again_and_counted() -> None:
    world = Served(content(1, 10))
    (blob_id,) = world.manifests
    world.start(blob_id, PEER)
    world.ask()
    world.answers.clear()
    world.serving[PEER] = Serving(1, world.limits, world.random)
    world.ask()
    assert len(world.requests) == 1
    world.now_ms = world.downloads.next_wake_ms(0) or 0
    world.ask()
    assert [piece.kind for _, piece in world.requests] == ["root", "root"]
    assert world.downloads.refused["chunk-late"] == 1


def get(
    at: object = 0, *, blob: object = "ab" * 32, part: object = "chunk", **more: object
) -> dict[str, object]:
    return {"blob": blob, "part": part, "at": at, **more}


def test_a_peer_that_does_not_prove_what_it_read_gets_no_more_than_a_window() -> None:
    limits = Limits()
    serving = Serving(1, limits, random.Random(1))
    tokens = []
    for at in range(limits.blob_window_bytes // CHUNK_BYTES):
        assert isinstance(serving.check(PEER, at, get(at)), Wanted)
        serving.reserve()
        tokens.append(serving.sent(CHUNK_BYTES))
    assert serving.check(PEER, 9, get(9)) == BUSY
    assert serving.check(PEER, 10, get(9, seen=tokens[0] ^ 1)) == BUSY, "a guess frees nothing"
    assert isinstance(serving.check(PEER, 11, get(9, seen=tokens[1])), Wanted)
    for _ in range(2):
        serving.reserve()
    assert serving.check(PEER, 12, get(9, seen=tokens[1])) == BUSY, "a token counts once"


@pytest.mark.parametrize(
    "meta",
    [
        {},
        get(-1),
        get("1"),
        get(True),
        get(1.0),
        get(part="secret"),
        get(part=["chunk"]),
        get(blob="../../etc/passwd"),
        get(blob="AB" * 32),
        get(blob=None),
        get(part=None, seen=[1, 2]),
    ],
)
def test_a_malformed_request_is_refused(meta: dict[str, object]) -> None:
    assert Serving(1, Limits(), random.Random(1)).check(PEER, 1, meta) == MALFORMED


# -- between nodes --------------------------------------------------------------------------------------------------


def test_a_published_blob_is_fetched_whole_and_kept_private(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        arrived: list[Envelope] = []
        b.effect("take.it", lambda tx, envelope: tx.after_commit(lambda: arrived.append(envelope)))
        async with a, b:
            await pair(a, b)
            body = content(7, 3 * MIB + 5)
            source = tmp_path / "source"
            source.write_bytes(body)
            blob = await a.put_blob(source)
            assert (await a.put_blob(body)).id == blob.id
            await a.publish("take.it", b"", to=[b.node_id], blobs=[blob.id])
            await until(lambda: arrived)
            assert arrived[0].blobs == (blob.id,)
            seen: list[tuple[int, int]] = []
            path = await b.fetch_blob(
                blob.id, peer=a.node_id, on_progress=lambda here, size: seen.append((here, size))
            )
            assert path.read_bytes() == body
            assert seen[-1] == (len(body), len(body))
            assert seen == sorted(seen)
            modes = [oct(one.stat().st_mode & 0o777) for one in (path, path.parent)]
            assert modes == ["0o600", "0o700"]
            assert sorted(one.name for one in path.parent.iterdir()) == [blob.id, f"{blob.id}.map"]
        async with Node("b", home=tmp_path / "b") as b:  # the other node is gone: it is here
            assert await b.fetch_blob(blob.id, peer=a.node_id, timeout=30) == path

    run(main())


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES])
def test_the_smallest_blobs_are_blobs_too(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            await pair(a, b)
            blob_id = await offer(a, b, content(1, size))
            assert (await b.fetch_blob(blob_id, peer=a.node_id)).read_bytes() == content(1, size)

    run(main())


def test_letters_pass_a_large_transfer_in_both_directions(tmp_path: Path) -> None:
    """Order of events, not time: each of six letters is delivered while most of the blob is still to come."""

    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        for node in (a, b):
            node.effect("letter", lambda tx, envelope: None)
        async with a, b:
            await pair(a, b)
            size = 50 * MIB
            blob_id = await offer(a, b, bytes(size))
            here = 0

            def note(bytes_here: int, _: int) -> None:
                nonlocal here
                here = bytes_here

            fetching = asyncio.ensure_future(b.fetch_blob(blob_id, peer=a.node_id, on_progress=note))
            await until(lambda: here)
            delivered_at: list[int] = []
            for sender, recipient in [(a, b), (b, a)] * 3:
                receipt = await sender.publish("letter", b"x" * 1_024, to=[recipient.node_id])
                await receipt.delivered(30)
                delivered_at.append(here)
            assert not fetching.done()
            assert delivered_at[-1] < size / 2, "six letters in a row took half of the transfer"
            assert (await fetching).stat().st_size == size

    run(main())


def test_letters_pass_while_the_disk_of_the_blobs_hangs_on_both_sides(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        for node in (a, b):
            node.effect("letter", lambda tx, envelope: None)
        async with a, b:
            await pair(a, b)
            body = content(1, 2 * MIB)
            blob_id = await offer(a, b, body)
            reading, writing, goes_on = threading.Event(), threading.Event(), threading.Event()
            assert a._owner is not None
            assert b._owner is not None
            read, keep = a._owner.blobs.read, b._owner.blobs.keep

            def slow_read(blob_id: str, piece: Piece, **more: bool) -> bytes:
                if piece.at == 5:
                    reading.set()
                    goes_on.wait(60)
                return read(blob_id, piece, **more)

            def slow_keep(blob_id: str, index: int, chunk: bytes) -> None:
                if index == 2:
                    writing.set()
                    goes_on.wait(60)
                keep(blob_id, index, chunk)

            a._owner.blobs.read = slow_read  # type: ignore[method-assign]  # a disk that hangs
            b._owner.blobs.keep = slow_keep  # type: ignore[method-assign]
            fetching = asyncio.ensure_future(b.fetch_blob(blob_id, peer=a.node_id))
            await until(lambda: reading.is_set() and writing.is_set())
            for sender, recipient in ((a, b), (b, a)):
                receipt = await sender.publish("letter", b"", to=[recipient.node_id])
                await receipt.delivered(30)
            assert not fetching.done()
            goes_on.set()
            assert (await fetching).read_bytes() == body

    run(main())


def test_a_peer_of_a_version_without_large_bodies_is_not_asked(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            await pair(a, b)
            blob_id = await offer(a, b, b"content")
            assert b._owner is not None
            b._owner._tick.speaks = lambda peer, feature: False  # type: ignore[method-assign]  # as its greeting says
            with pytest.raises(BlobFailed, match="cannot send large bodies"):
                await b.fetch_blob(blob_id, peer=a.node_id)

    run(main())


def test_a_small_blob_overtakes_a_large_one_of_the_same_peer(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            await pair(a, b)
            large, small = await offer(a, b, content(1, 24 * MIB)), await offer(a, b, content(2, MIB))
            has_begun = asyncio.Event()
            first = asyncio.ensure_future(
                b.fetch_blob(large, peer=a.node_id, on_progress=lambda *_: has_begun.set())
            )
            await has_begun.wait()
            await b.fetch_blob(small, peer=a.node_id)
            assert not first.done()
            assert (await first).read_bytes() == content(1, 24 * MIB)

    run(main())


def test_two_callers_share_one_fetch_and_one_may_leave(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            await pair(a, b)
            blob_id = await offer(a, b, content(1, 8 * MIB))
            has_begun = asyncio.Event()
            one = asyncio.ensure_future(
                b.fetch_blob(blob_id, peer=a.node_id, on_progress=lambda *_: has_begun.set())
            )
            two = asyncio.ensure_future(b.fetch_blob(blob_id, peer=a.node_id))
            await has_begun.wait()
            one.cancel()
            assert (await two).read_bytes() == content(1, 8 * MIB)
            with pytest.raises(asyncio.CancelledError):
                await one

    run(main())


def test_a_fetch_waits_for_its_peer_and_says_when_the_time_is_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("b", home=tmp_path / "b") as b:
            async with Node("a", home=tmp_path / "a") as a:
                await pair(a, b)
                blob_id = await offer(a, b, content(1, MIB))
                listen, peer = a.endpoints[0], a.node_id
            with pytest.raises(TimedOut, match="has not come"):
                await b.fetch_blob(blob_id, peer=peer, timeout=0.05)
            waiting = asyncio.ensure_future(b.fetch_blob(blob_id, peer=peer))
            async with Node("a", home=tmp_path / "a", listen=listen):
                assert (await waiting).read_bytes() == content(1, MIB)
            other = asyncio.ensure_future(b.fetch_blob("ab" * 32, peer=peer))
            await until(lambda: b._waiters)
        with pytest.raises(NodeClosed):
            await other

    run(main())


def test_a_blob_is_for_those_it_was_published_to_and_everything_else_is_refused_and_counted(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        a, b, c = (Node(name, home=tmp_path / name) for name in "abc")
        async with a, b, c:
            await pair(a, b)
            await pair(a, c)
            blob_id = await offer(a, b, content(1, MIB))
            with pytest.raises(UnknownBlob):
                await c.fetch_blob(blob_id, peer=a.node_id)
            with pytest.raises(UnknownBlob):
                await b.fetch_blob("ab" * 32, peer=a.node_id)
            assert (await a.refused())["chunk-unknown"] == 2
            with pytest.raises(UnknownPeer):
                await b.fetch_blob(blob_id, peer="s" * 32)
            with pytest.raises(InvalidInput, match="not a blob id"):
                await b.fetch_blob("../x", peer=a.node_id)
            with pytest.raises(UnknownBlob):
                await b.fetch_blob(blob_id, peer=b.node_id)
            with pytest.raises(UnknownBlob):
                await b.publish("x", b"", to=[a.node_id], blobs=[blob_id])

    run(main())


def test_hostile_requests_cost_the_server_nothing_and_honest_ones_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            await pair(a, b)
            blob_id = await offer(a, b, content(1, 2 * MIB))
            owner = b._owner
            assert owner is not None
            rude = [
                get(at, blob=blob_id) for at in [-1, 32, 10**30, None, True] for _ in range(3)
            ]  # 32: one beyond the last
            rude += [get(0, blob=blob_id, again=at) for at in range(40)]  # far beyond the window
            sent = [
                await owner.ask(
                    lambda seq=seq, meta=meta: owner._tick.tell(  # type: ignore[misc]  # mypy cannot infer it
                        a.node_id, CHUNK_GET, seq=seq, lane=1, meta=meta
                    )
                )
                for seq, meta in enumerate(rude, start=1_000_000)
            ]
            await owner.ask(
                lambda: owner._tick.tell(a.node_id, CHUNK, seq=5, lane=1, meta={"token": 1}, body=b"unasked")
            )
            assert len(sent) == 55
            counts: dict[str, int] = {}

            async def count() -> bool:
                counts.update(await a.refused())
                return counts.get("chunk-malformed", 0) > 9 and counts.get("chunk-unasked", 0) >= 1

            async with asyncio.timeout(30):
                while not await count():
                    await asyncio.sleep(0.01)
            assert counts["chunk-busy"] >= 30
            assert (await b.fetch_blob(blob_id, peer=a.node_id)).read_bytes() == content(1, 2 * MIB)

    run(main())


def test_a_chunk_that_is_damaged_at_the_server_is_found_and_named_and_can_be_mended(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            await pair(a, b)
            body = content(1, 2 * MIB)
            blob_id = await offer(a, b, body)
            with (tmp_path / "a" / "blobs" / blob_id).open("r+b") as file:
                file.seek(17 * CHUNK_BYTES + 9)
                file.write(bytes([body[17 * CHUNK_BYTES + 9] ^ 1]))
            with pytest.raises(BlobDamaged, match=f"chunk 17 of {blob_id[:12]} is damaged on the disk of"):
                await b.fetch_blob(blob_id, peer=a.node_id)
            assert (await b.refused())["chunk-mismatch"] == 1
            assert (await a.refused())["chunk-damaged"] == 1
            await a.put_blob(body)
            assert (await b.fetch_blob(blob_id, peer=a.node_id)).read_bytes() == body

    run(main())


def test_what_is_over_a_limit_of_the_receiver_is_refused_by_type(tmp_path: Path) -> None:
    async def main() -> None:
        small = Limits(blob_bytes_max=MIB)
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b", limits=small) as b:
            await pair(a, b)
            blob_id = await offer(a, b, content(1, MIB + 1))
            with pytest.raises(TooLarge, match="the limit is 1048576"):
                await b.fetch_blob(blob_id, peer=a.node_id)
            with pytest.raises(TooLarge):
                await b.put_blob(bytes(MIB + 1))
            with pytest.raises(TooLarge) as raised:
                await a.publish("x", bytes(MIB + 1), to=[])
            assert "put_blob" in str(raised.value.hint)
            with pytest.raises(TooLarge, match="blobs in one message"):
                await a.publish("x", b"", to=[b.node_id], blobs=[blob_id] * 65)
            with pytest.raises(InvalidInput, match="cannot read"):
                await a.put_blob(tmp_path / "nothing")
        for limits, error in [
            (Limits(blobs_bytes_max=MIB), TooLarge),
            (Limits(disk_free_bytes_min=1 << 60), DiskLow),
            (Limits(blob_fetches_max=0), TooLarge),
        ]:
            async with (
                Node("a", home=tmp_path / "a", listen=a.endpoints[0]) as a,
                Node("b", home=tmp_path / "b", limits=limits) as b,
            ):
                with pytest.raises(error):
                    await b.fetch_blob(blob_id, peer=a.node_id, timeout=30)
                assert list((tmp_path / "b" / "blobs").iterdir()) == []

    run(main())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A home whose blobs lie on a disk of 4 MiB."""
    need_root()
    home = tmp_path / "tiny"
    home.mkdir(mode=0o700)
    disk = home / "blobs"
    disk.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(disk)], check=True)
    yield home
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_on_the_way_is_an_error_by_type_and_gets_its_room_back(
    tmp_path: Path, tiny_disk: Path
) -> None:
    async def main() -> None:
        limits = Limits(disk_free_bytes_min=0)
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tiny_disk, limits=limits) as b:
            await pair(a, b)
            blob_id = await offer(a, b, content(1, 3 * MIB))
            ballast = tiny_disk / "blobs" / ".ballast"

            def fill(*_: object) -> None:
                if not ballast.exists():
                    ballast.write_bytes(bytes(os.statvfs(tiny_disk / "blobs").f_bavail * 4_096 - 256 * 1_024))

            with pytest.raises(DiskLow):
                await b.fetch_blob(blob_id, peer=a.node_id, on_progress=fill)
            assert (tiny_disk / "blobs" / f"{blob_id}.part").stat().st_blocks * 512 < MIB
            ballast.unlink()
            assert (await b.fetch_blob(blob_id, peer=a.node_id)).read_bytes() == content(1, 3 * MIB)
            with pytest.raises(DiskLow):
                await b.put_blob(bytes(2 * MIB))

    run(main())


def test_a_blob_is_kept_while_a_message_waits_with_it_and_dropped_long_after_its_last_use(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        limits = Limits(retained_ms=1, blob_retained_ms=1_000)
        async with Node("a", home=tmp_path / "a", limits=limits) as a:
            async with Node("b", home=tmp_path / "b") as b:
                await pair(a, b)
            waiting = await offer(a, b, b"waits with its message")
            unused = (await a.put_blob(b"named by nobody")).id
            folder = tmp_path / "a" / "blobs"
            stray, half = folder / ("cd" * 32), folder / f"{'ef' * 32}.part"
            for path in (stray, half):
                path.touch()
                os.utime(path, (1, 1))

            def prune(tx: Tx) -> None:
                assert a._owner is not None
                tx.steady_ms += 2_000
                a._owner._prune_blobs(tx)

            await a.transact(prune)
            await until(lambda: not (folder / unused).exists() and not stray.exists() and not half.exists())
            assert (folder / waiting).read_bytes() == b"waits with its message"
            assert (await a.put_blob(b"named by nobody")).path.exists(), "it may come back"

    run(main())


# -- killed processes -----------------------------------------------------------------------------------------------


SIZE = 16 * MIB
BODY = content(5, SIZE)


def paired(tmp_path: Path) -> tuple[Path, Path, str, str]:
    """Return the homes of a server and of one who fetches that know each other, the id of the latter and
    the endpoint of the former."""
    serving, fetching = tmp_path / "s", tmp_path / "f"
    host = Worker(serving, "receiver")
    guest = Worker(fetching, "join", host.read()["code"])
    assert guest.read_until("joined") == host.node_id
    guest.wait()
    host.stop()
    return serving, fetching, guest.node_id, host.endpoint


def read_progress(fetching: Worker, share: float) -> None:
    while (said := fetching.read())["here"] < share * said["size"]:
        pass


def asked_of(server: Worker) -> list[int]:
    """End a server. Returns the chunks that it was asked for."""
    return list(server.stop()[-1]["asked"])


def missing_in(part: Path) -> set[int]:
    """Find by itself which chunks of BODY are not in a partial file."""
    held = part.read_bytes() if part.exists() else b""
    places = range(0, SIZE, CHUNK_BYTES)
    return {at // CHUNK_BYTES for at in places if held[at : at + CHUNK_BYTES] != BODY[at : at + CHUNK_BYTES]}


def test_a_receiver_killed_on_the_way_fetches_only_what_is_missing(tmp_path: Path) -> None:
    serving, fetching, guest_id, listen = paired(tmp_path)
    server = Worker(serving, "serve", guest_id, "5", str(SIZE), LISTEN=listen)
    blob_id = server.read_until("blob")
    dying = Worker(fetching, "fetch", server.node_id, blob_id)
    read_progress(dying, 0.4)
    dying.kill()
    before = asked_of(server)
    part = fetching / "blobs" / f"{blob_id}.part"
    with part.open("r+b") as file:  # as after a power loss: the length is there, the content is not
        file.seek(3 * CHUNK_BYTES)
        file.write(bytes(CHUNK_BYTES))
    missing = missing_in(part)
    assert 3 in missing
    assert 0 < len(missing) < 0.7 * SIZE / CHUNK_BYTES
    again = Worker(serving, "serve", guest_id, "5", str(SIZE), LISTEN=listen)
    again.read_until("blob")
    alive = Worker(fetching, "fetch", server.node_id, blob_id)
    assert Path(alive.read_until("path")).read_bytes() == BODY
    asked = asked_of(again)
    assert sorted(asked) == sorted(missing), (
        f"{len(asked)} asked for, {len(missing)} missing, {len(before)} before"
    )


def test_a_server_killed_on_the_way_is_asked_only_for_what_is_missing_when_it_is_back(tmp_path: Path) -> None:
    serving, fetching, guest_id, listen = paired(tmp_path)
    server = Worker(serving, "serve", guest_id, "5", str(SIZE), LISTEN=listen)
    blob_id = server.read_until("blob")
    client = Worker(fetching, "fetch", server.node_id, blob_id)
    read_progress(client, 0.4)
    server.kill()
    again = Worker(serving, "serve", guest_id, "5", str(SIZE), LISTEN=listen)
    assert Path(client.read_until("path")).read_bytes() == BODY
    asked = asked_of(again)
    assert len(asked) == len(set(asked)), "nothing is asked for twice"
    assert 0 < len(asked) <= 0.7 * SIZE / CHUNK_BYTES


def test_the_store_knows_who_may_fetch_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("b", home=tmp_path / "b") as b:
            async with Node("a", home=tmp_path / "a") as a:
                await pair(a, b)
                blob_id = await offer(a, b, b"content")
                listen = a.endpoints[0]
            async with Node("a", home=tmp_path / "a", listen=listen) as a:
                assert (await b.fetch_blob(blob_id, peer=a.node_id)).read_bytes() == b"content"

    run(main())


def test_a_piece_that_was_read_for_a_session_that_is_over_does_not_leave_in_the_next() -> None:
    told: list[int] = []
    sessions = SimpleNamespace(
        session=lambda peer: 2, tell=lambda peer, kind, **said: told.append(said["seq"])
    )
    nothing: Any = None
    carrier = Carrier(
        files=nothing,
        sessions=sessions,  # type: ignore[arg-type]  # what sending uses
        rows=nothing,
        wake=nothing,
        loop=nothing,
        limits=Limits(),
        random=random.Random(1),
    )
    carrier._serving[PEER] = Serving(
        1, Limits(), random.Random(1)
    )  # it has asked for nothing in session 2 yet
    carrier._ready.append((Wanted(PEER, 1, 7, "0" * 64, Piece("root"), False), b"root"))
    carrier._send_slice()
    assert told == []
