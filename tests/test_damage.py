"""A damaged store (F10): what is damaged is found and kept apart, the rest is delivered, nothing is made up."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from broker_free import Node
from broker_free.errors import StoreBroken, StoreFailed
from broker_free.limits import DAY_MS, Limits
from broker_free.message import Message, metadata_of, new_id
from broker_free.store import DAMAGED, INBOX_QUARANTINED, QUARANTINED, Store
from broker_free.storefile import wal_of
from tests.nodes import run, until

NOW = 1_700_000_000_000
ME, PEER = "m" * 32, "p" * 32


def opened(path: Path, limits: Limits | None = None) -> Store:
    store = Store(path, me=ME, limits=limits or Limits())
    store.open()
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    made = opened(path)
    yield made
    made.close()


def text(number: int, size: int = 300) -> Message:
    body = (f"<{number}>".encode() * size)[:size]
    return Message(id=new_id(NOW + number), subject="a.b", body=body, headers={"number": str(number)})


def enqueue(store: Store, *messages: Message) -> None:
    store.begin()
    for one in messages:
        store.enqueue(one, metadata_of(one), [PEER], ttl_ms=None, now_ms=NOW)
    store.commit()


def accept(store: Store, *messages: Message) -> None:
    store.begin()
    store.accept(PEER, 0, [(metadata_of(one), one.body) for one in messages], NOW)
    store.commit()


def write_notes(store: Store) -> list[tuple[str, str]]:
    store.begin()
    dead = store.write_notes(NOW)
    store.commit()
    return dead


def events(store: Store) -> list[tuple[str, str]]:
    return store._conn.execute("SELECT kind, detail FROM event ORDER BY id").fetchall()


def spoil(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as other, other:
        assert other.execute(statement, values).rowcount == 1


def test_a_damaged_message_is_not_sent_and_those_behind_it_are(store: Store, path: Path) -> None:
    first, second, third = text(1), text(2), text(3)
    enqueue(store, first, second, third)
    spoil(path, "UPDATE message SET body = X'00' || substr(body, 2) WHERE id = 1")
    assert [one.id for one in store.queued_after(PEER, 0, messages=1, size=10**6)] == [second.id]
    assert [message_id for message_id, _ in store.in_doubt(PEER, 10)] == [second.id, third.id]
    assert write_notes(store) == [(first.id, PEER)]
    assert store._conn.execute("SELECT state, count(*) FROM outbox GROUP BY state").fetchall() == [
        (0, 2),
        (QUARANTINED, 1),
    ]
    assert store.quarantined == 1
    assert not store.has_notes
    assert [kind for kind, _ in events(store)] == ["quarantine"]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE message SET meta = '{}' WHERE id = 2",
        "UPDATE message SET body = 'text' WHERE id = 2",
        "UPDATE message SET digest = X'00' WHERE id = 2",
        "UPDATE message SET id = 77 WHERE id = 2",
        "DELETE FROM message WHERE id = 2",
    ],
)
def test_whatever_a_row_has_become_only_it_is_held_back(store: Store, path: Path, damage: str) -> None:
    sound = [text(number) for number in range(4)]
    enqueue(store, *sound)
    spoil(path, damage)
    queued = store.queued_after(PEER, 0, messages=100, size=10**6)
    assert [one.id for one in queued] == [one.id for one in sound if one is not sound[1]]
    assert queued == store.queued_after(PEER, 0, messages=100, size=10**6)
    assert store.quarantined == 1, "found once, however often it is looked at"


def test_quarantine_outlives_a_restart_and_pruning(store: Store, path: Path) -> None:
    enqueue(store, text(1), text(2))
    accept(store, text(3), text(4))
    spoil(path, "UPDATE message SET body = X'00' WHERE id = 1")
    spoil(path, "UPDATE inbox SET body = X'00' WHERE row = 1")
    store.begin()
    consumer = store.consumer_open("all", ">")
    store.commit()
    store.queued_after(PEER, 0, messages=9, size=9)
    assert [e.headers for e, _ in store.jobs(consumer, now_ms=NOW, limit=9, leave_out=set())] == [
        {"number": "4"}
    ]
    write_notes(store)
    store.close()
    store.open()
    store.begin()
    store.prune(NOW + 40 * DAY_MS)
    store.commit()
    assert store.quarantined == 2
    assert [e.headers for e, _ in store.jobs(consumer, now_ms=NOW, limit=9, leave_out=set())] == [
        {"number": "4"}
    ]
    assert store._conn.execute("SELECT state FROM inbox WHERE row = 1").fetchone() == (INBOX_QUARANTINED,)


def test_an_effect_is_not_tried_again_on_a_damaged_message(store: Store, path: Path) -> None:
    accept(store, text(1), text(2))
    store.begin()
    store.failed(1, "boom", NOW)
    store.failed(2, "boom", NOW)
    store.commit()
    spoil(path, "UPDATE inbox SET meta = X'00' WHERE row = 1")
    store.begin()
    assert [one.row for one in store.due(NOW + DAY_MS, 10)] == [2]
    store.write_notes(NOW)
    store.commit()
    assert store.quarantined == 1


def test_what_was_found_is_written_again_when_the_commit_fails(store: Store, path: Path) -> None:
    enqueue(store, text(1))
    spoil(path, "UPDATE message SET body = X'00' WHERE id = 1")
    assert store.queued_after(PEER, 0, messages=9, size=9) == []
    store.begin()
    store.write_notes(NOW)
    store.rollback()
    assert store.has_notes
    assert store.queued_after(PEER, 0, messages=9, size=9) == []
    write_notes(store)
    assert len(events(store)) == 1


def test_events_are_bounded_and_a_flood_of_notes_is_counted(path: Path) -> None:
    store = opened(path, Limits(events_max=120))
    for number in range(300):
        store.note("refused", str(number))
    write_notes(store)
    assert len(events(store)) == 101
    assert events(store)[-1] == ("events-lost", "200 more at that time")
    for number in range(50):
        store.note("refused", f"again {number}")
    write_notes(store)
    assert len(events(store)) == 120
    assert events(store)[-1] == ("refused", "again 49")
    store.close()


# ── starts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def leave_open(path: Path, tmp_path: Path, *messages: Message) -> Path:
    """Copy a store as a killed process leaves it: with its log, its index and the mark of being open."""
    store = opened(path)
    enqueue(store, *messages)
    left = tmp_path / "left"
    left.mkdir()
    for each in (path, wal_of(path), path.with_name("store.db-shm"), path.with_name("store.db.open")):
        shutil.copy(each, left / each.name)
    store.close()
    return left / "store.db"


def test_a_store_that_was_closed_starts_without_a_word(store: Store, path: Path) -> None:
    store.close()
    assert [each.name for each in path.parent.iterdir()] == ["store.db"]
    store.open()
    assert not store.has_notes


def test_a_store_that_was_not_closed_is_checked_and_its_log_is_moved(path: Path, tmp_path: Path) -> None:
    store = opened(leave_open(path, tmp_path, text(1)))
    write_notes(store)
    assert events(store) == [("unclean-start", "quick check: ok")]
    assert len(store.in_doubt(PEER, 10)) == 1
    store.close()


def test_a_check_that_takes_too_long_is_given_up_and_said(path: Path, tmp_path: Path) -> None:
    left = leave_open(path, tmp_path, *(text(number, 2_000) for number in range(2_000)))
    store = opened(left, Limits(check_ms_max=0))
    write_notes(store)
    assert events(store) == [("unclean-start", "quick check: not finished in 0 ms")]
    store.close()


def test_a_missing_log_is_noticed(path: Path, tmp_path: Path) -> None:
    left = leave_open(path, tmp_path, text(1))
    wal_of(left).unlink()
    left.with_name("store.db-shm").unlink()
    store = None
    try:
        store = opened(left)
    except StoreBroken:
        return  # the file alone is no store: said so
    write_notes(store)
    assert [kind for kind, _ in events(store)] == ["unclean-start", "log-missing"]
    store.close()


@pytest.mark.parametrize("header", [b"\x00" * 100, b"SQLite format 3\x00" + b"\xff" * 84])
def test_a_store_with_a_garbage_header_is_refused_with_the_way_out(
    store: Store, path: Path, header: bytes
) -> None:
    enqueue(store, text(1))
    store.close()
    data = path.read_bytes()
    path.write_bytes(header + data[100:])
    with pytest.raises(StoreFailed, match="cannot open the store") as refused:
        opened(path)
    assert "restore a backup" in str(refused.value.hint)
    assert path.read_bytes() == header + data[100:], "nothing was written to it"
    path.write_bytes(data)
    store.open()
    assert len(store.in_doubt(PEER, 10)) == 1


# ── fifty damaged files ─────────────────────────────────────────────────────────────────────────────────────────

SENT = [text(number, size=40 * number) for number in range(60)]
ARRIVED = [text(100 + number, size=40 * number) for number in range(60)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store with mail in both directions, killed; and as it was closed: under the name "closed"."""
    folder = tmp_path_factory.mktemp("sound")
    path = folder / "store.db"
    store = opened(path)
    store.begin()
    store.consumer_open("all", ">")
    store.commit()
    enqueue(store, *SENT[:30])
    accept(store, *ARRIVED[:30])
    store._conn.execute("PRAGMA wal_checkpoint(truncate)")
    enqueue(store, *SENT[30:])
    accept(store, *ARRIVED[30:])
    files = {each.name: each.read_bytes() for each in folder.iterdir() if not each.name.endswith("-shm")}
    store.close()
    return {**files, "closed": path.read_bytes()}


def pages_of(path: Path, *tables: str) -> list[int]:
    with closing(sqlite3.connect(path)) as other:
        marks = ",".join("?" * len(tables))
        sql = f"SELECT pageno FROM dbstat WHERE name IN ({marks})"
        return [number for (number,) in other.execute(sql, tables)]


def damage(path: Path, sound: dict[str, bytes], seed: int) -> str:
    """Write a damaged copy of the files to `path`; return what was done."""
    chosen = random.Random(seed)
    kind = ["bits", "bits", "bits", "bits", "bits", "bits", "truncated", "log cut", "log missing", "header"][
        seed % 10
    ]
    if kind.startswith("log"):
        for name in ("store.db", "store.db-wal", "store.db.open"):
            path.with_name(name).write_bytes(sound[name])
        wal = wal_of(path)
        if kind == "log missing":
            wal.unlink()
        else:
            wal.write_bytes(wal.read_bytes()[: chosen.randrange(len(sound["store.db-wal"]))])
        return kind
    path.write_bytes(sound["closed"])
    data = bytearray(sound["closed"])
    if kind == "bits":
        page_bytes = int.from_bytes(data[16:18], "big")
        pages = pages_of(path, "message", "inbox")
        for _ in range(chosen.randint(1, 4)):
            at = (chosen.choice(pages) - 1) * page_bytes + chosen.randrange(page_bytes)
            data[at] ^= 1 << chosen.randrange(8)
    elif kind == "truncated":
        del data[chosen.randrange(1, len(data)) :]
    else:
        data[:16] = chosen.randbytes(16)
    path.write_bytes(data)
    return kind


def drain(store: Store) -> tuple[list[bytes], list[bytes]]:
    """Take out what waits, as a link and a consumer do."""
    sent, row = [], 0
    while queued := store.queued_after(PEER, row, messages=7, size=10**6):
        sent += [one.meta + one.body for one in queued]
        row = queued[-1].row
    handed = []
    for envelope, _ in store.jobs(1, now_ms=NOW, limit=1_000, leave_out=set()):
        one = Message(id=envelope.id, subject=envelope.subject, body=envelope.body, headers=envelope.headers)
        handed.append(metadata_of(one) + one.body)
    return sent, handed


@pytest.mark.parametrize("seed", range(50))
def test_damage_is_found_or_harmless_and_the_rest_is_delivered(
    path: Path, sound: dict[str, bytes], seed: int
) -> None:
    kind = damage(path, sound, seed)
    before = path.read_bytes()
    store = Store(path, me=ME, limits=Limits())
    try:
        store.open()
    except StoreFailed:
        assert kind != "log cut", "a log that ends anywhere is what a crash leaves: no reason to refuse"
        assert path.read_bytes() == before, "a file that is refused is not touched"
        return
    try:
        sent, handed = drain(store)
        missing = len(SENT) + len(ARRIVED) - len(sent) - len(handed)
        assert sent == [each for each in map(whole, SENT) if each in set(sent)], "unchanged, once, in order"
        assert handed == [each for each in map(whole, ARRIVED) if each in set(handed)]
        write_notes(store)
        noted = {name for name, _ in events(store)}
        if kind == "bits":
            assert missing == store.quarantined, f"{missing} are missing"
        elif kind == "log cut":
            assert missing == 0 or "unclean-start" in noted
        else:
            assert missing in (0, store.quarantined) or "log-missing" in noted
    except StoreBroken:
        pass  # found while reading: the node stops accepting and says so
    finally:
        store.abandon()


def whole(message: Message) -> bytes:
    return metadata_of(message) + message.body


# ── through real nodes ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_delivers_what_is_sound_and_shows_what_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        dead: list[tuple[str, str, str]] = []
        async with Node("a", home=tmp_path / "a") as a:
            async with Node("b", home=tmp_path / "b") as b:
                await b.join((await a.invite()).encode())
                peer = b.node_id
            receipts = [await a.publish("t.x", str(number).encode() * 50, to=[peer]) for number in range(5)]
        spoil(tmp_path / "a" / "store.db", "UPDATE message SET body = X'00' WHERE body = ?", b"2" * 50)

        arrived: list[bytes] = []
        there = Node("b", home=tmp_path / "b")
        there.effect("t.x", lambda tx, one: tx.after_commit(lambda: arrived.append(one.body)))
        node = Node("a", home=tmp_path / "a")
        node.on_dead(dead.extend)
        async with node as a, there as b:
            await b.join((await a.invite()).encode())  # both listen somewhere else now
            await until(lambda: len(arrived) == 4)
            await until(lambda: a.health.quarantined == 1)
            await until(lambda: dead)
            assert arrived == [str(number).encode() * 50 for number in (0, 1, 3, 4)]
            assert dead == [(receipts[2].id, peer, DAMAGED)]
            (event,) = await a.events(kind="quarantine")
            assert receipts[2].id in event.detail
            assert (event.peer, a.health.state) == (peer, "ok")

    run(main())
