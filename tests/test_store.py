"""The store's promises, on a real file."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import peewee as pw
import pytest

from broker_free.errors import InvalidInput, OutboxFull, StoreFailed, UnsuitableHome
from broker_free.limits import DAY_MS, Limits
from broker_free.membership import Member
from broker_free.message import Message, id_to_bytes, metadata_of, new_id
from broker_free.schema import SCHEMA_VERSION
from broker_free.store import Reader, Store

NOW = 1_700_000_000_000
PEER, OTHER = "p" * 32, "q" * 32


def message(body: bytes = b"text", message_id: str | None = None) -> Message:
    return Message(id=message_id or new_id(NOW), subject="a.b", body=body)


def record(one: Message) -> tuple[bytes, bytes]:
    return metadata_of(one), one.body


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store(path, me="m" * 32, limits=Limits())
    opened.open()
    yield opened
    opened.close()


def reopened(store: Store, path: Path) -> Store:
    store.close()
    again = Store(path, me="m" * 32, limits=Limits())
    again.open()
    return again


def enqueue(store: Store, one: Message, *peers: str, ttl_ms: int | None = None) -> list[tuple[str, int]]:
    store.begin()
    rows = store.enqueue(one, metadata_of(one), peers, ttl_ms=ttl_ms, now_ms=NOW)
    store.commit()
    return rows


def accept(store: Store, *messages: Message, now_ms: int = NOW) -> list[tuple[int, bool, str | None]]:
    store.begin()
    accepted = store.accept(PEER, 0, [record(one) for one in messages], now_ms)
    store.commit()
    return [(one.row, one.envelope is not None, one.refused) for one in accepted]


def ids_queued(store: Store) -> list[str]:
    return [message_id for message_id, _ in store.in_doubt(PEER, 10)]


def test_it_writes_ahead_and_syncs_every_commit(store: Store, path: Path) -> None:
    settings = {
        name: store._conn.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
    }
    assert settings == {"journal_mode": "wal", "synchronous": 2}
    assert path.stat().st_mode & 0o077 == 0


def test_what_is_committed_is_there_after_a_restart_and_what_is_not_is_gone(store: Store, path: Path) -> None:
    kept = message()
    enqueue(store, kept, PEER)
    store.begin()
    lost = message()
    store.enqueue(lost, metadata_of(lost), [PEER], ttl_ms=None, now_ms=NOW)
    store.rollback()
    again = reopened(store, path)
    assert ids_queued(again) == [kept.id]
    again.close()


def test_a_row_number_is_never_given_to_a_second_message(store: Store, path: Path) -> None:
    (_, sent), *_ = enqueue(store, message(), PEER)
    ((arrived, _, _),) = accept(store, message())
    store.begin()
    store.mark_delivered([(PEER, sent)], NOW)
    store.settle(arrived)
    store.commit()
    store.begin()
    store.prune(NOW + 30 * DAY_MS)
    store.commit()
    again = reopened(store, path)
    (_, sent_next), *_ = enqueue(again, message(), PEER)
    ((arrived_next, _, _),) = accept(again, message())
    assert sent_next > sent
    assert arrived_next > arrived
    again.close()


def test_a_fan_out_stores_the_body_once(store: Store) -> None:
    one = message(b"x" * 1000)
    rows = enqueue(store, one, PEER, OTHER)
    assert [peer for peer, _ in rows] == [PEER, OTHER]
    assert store._conn.execute("SELECT count(*), sum(refs) FROM message").fetchone() == (1, 2)
    assert [queued.body for queued in store.queued_after(OTHER, 0, messages=9, size=9)] == [one.body]


def test_a_retry_under_the_same_id_is_queued_only_where_it_is_missing(store: Store) -> None:
    one = message()
    enqueue(store, one, PEER)
    assert [peer for peer, _ in enqueue(store, one, PEER, OTHER)] == [OTHER]
    assert enqueue(store, one, PEER, OTHER) == []
    assert len(store.in_doubt(PEER, 10)) == 1


def test_a_duplicate_is_recognised_and_keeps_the_row_of_the_first(store: Store) -> None:
    one = message()
    ((row, _, _),) = accept(store, one)
    assert accept(store, one, message()) == [(row, False, None), (row + 1, True, None)]


def test_another_text_under_a_known_id_is_refused(store: Store) -> None:
    one = message()
    accept(store, one)
    ((row, is_new, refused),) = accept(store, message(b"forged", one.id))
    assert (row, is_new, refused) == (0, False, "conflict: another message has this id")


def test_a_record_that_is_no_message_is_refused_and_its_neighbours_are_kept(store: Store) -> None:
    good = message()
    store.begin()
    accepted = store.accept(PEER, 0, [(b"{}", b""), record(good)], NOW)
    store.commit()
    assert accepted[0].refused
    assert accepted[1].envelope
    assert accepted[1].envelope.id == good.id


def test_a_savepoint_that_raises_undoes_only_itself(store: Store) -> None:
    kept, lost = message(), message()
    store.begin()
    store.enqueue(kept, metadata_of(kept), [PEER], ttl_ms=None, now_ms=NOW)
    with contextlib.suppress(RuntimeError), store.savepoint():
        store.enqueue(lost, metadata_of(lost), [PEER], ttl_ms=None, now_ms=NOW)
        raise RuntimeError
    store.commit()
    assert ids_queued(store) == [kept.id]


def test_a_peer_whose_queue_is_full_refuses_more_until_it_drains(path: Path) -> None:
    store = Store(path, me="m" * 32, limits=Limits(outbox_messages_max=2))
    store.open()
    rows = enqueue(store, message(), PEER) + enqueue(store, message(), PEER)
    store.begin()
    third = message()
    with pytest.raises(OutboxFull, match="2 messages"):
        store.enqueue(third, metadata_of(third), [PEER], ttl_ms=None, now_ms=NOW)
    store.mark_delivered(rows, NOW)
    assert store.enqueue(third, metadata_of(third), [PEER], ttl_ms=None, now_ms=NOW)
    store.commit()
    store.close()


def test_a_full_queue_is_counted_after_a_change_and_not_at_each_refusal(path: Path) -> None:
    """Counting at each refusal took a second a tick with 10,000 waiting: the node held everybody up, and they it."""
    store = Store(path, me="m" * 32, limits=Limits(outbox_messages_max=2))
    store.open()
    rows = enqueue(store, message(), PEER) + enqueue(store, message(), PEER)
    counted: list[str] = []
    store._conn.set_trace_callback(lambda sql: counted.append(sql) if "count(*)" in sql else None)
    store.begin()
    for _ in range(50):
        refused = message()
        with pytest.raises(OutboxFull):
            store.enqueue(refused, metadata_of(refused), [PEER], ttl_ms=None, now_ms=NOW)
    assert counted == []
    store.mark_delivered(rows[:1], NOW)
    another = message()
    assert store.enqueue(another, metadata_of(another), [PEER], ttl_ms=None, now_ms=NOW)
    with pytest.raises(OutboxFull):
        store.enqueue(refused, metadata_of(refused), [PEER], ttl_ms=None, now_ms=NOW)
    assert len(counted) == 1
    store.commit()
    store.close()


def test_a_store_that_lost_an_acked_message_is_found_out(store: Store) -> None:
    one = message()
    ((row, _, _),) = accept(store, one)
    assert not store.lacks(PEER, one.id, row)
    assert store.lacks(PEER, one.id, row + 1), "known, but under another row: written again after a rollback"
    assert store.lacks(PEER, new_id(NOW), row + 1)


def test_a_regressed_peer_gets_the_retained_window_again(store: Store) -> None:
    old, recent = message(), message()
    rows = enqueue(store, old, PEER) + enqueue(store, recent, PEER)
    store.begin()
    store.save_member(Member(node_id=PEER, name="p", public_key=b"k", endpoints=()), NOW)
    store.mark_delivered(rows[:1], NOW - 2 * DAY_MS)
    store.mark_delivered(rows[1:], NOW)
    store.note_acked(PEER, recent.id, 7)
    store.commit()
    assert store.last_acked(PEER) == (recent.id, 7)
    store.begin()
    assert store.requeue(PEER, NOW) == 1
    store.commit()
    assert (ids_queued(store), store.last_acked(PEER)) == ([recent.id], None)


def test_what_was_delivered_and_is_over_does_not_expire_after_a_regression(store: Store) -> None:
    """It was told to be delivered; whoever asks for it again has no use for it."""
    rows = enqueue(store, message(), PEER, ttl_ms=1_000)
    lasting = message()
    rows += enqueue(store, lasting, PEER, ttl_ms=DAY_MS)
    store.begin()
    store.mark_delivered(rows, NOW)
    store.expire_inbox(NOW + DAY_MS // 2)
    store.commit()
    store.begin()
    assert store.requeue(PEER, NOW + 2_000) == 1
    store.commit()
    assert ids_queued(store) == [lasting.id]
    assert store.next_expiry_ms == NOW + DAY_MS, "house-keeping comes back for it"


def test_what_is_being_withdrawn_from_a_peer_that_is_removed_is_dead_too(store: Store) -> None:
    one = message()
    ((_, row),) = enqueue(store, one, PEER)
    store.begin()
    store.mark_revoking(row)
    assert store.drop_member(PEER, reason="removed", now_ms=NOW) == [one.id]
    store.expire_inbox(NOW)
    store.commit()
    assert store.outbox_of(one.id) == [(PEER, row, "dead", True)]
    assert store.next_expiry_ms is None, "nothing is left that house-keeping would wake up for"


def test_a_late_copy_of_a_pruned_message_is_still_a_duplicate(store: Store, path: Path) -> None:
    one, newest = message(), message()
    (row, _, _), (last, _, _) = accept(store, one, newest)
    store.begin()
    store.settle(row)
    store.settle(last)
    store.commit()
    store.begin()
    store.prune(NOW + 15 * DAY_MS)
    store.commit()
    assert store._conn.execute("SELECT row FROM inbox").fetchall() == [(last,)]
    again = reopened(store, path)
    assert accept(again, one) == [(row, False, None)]
    assert not again.lacks(PEER, one.id, row)
    again.close()


def test_expiry_takes_what_has_not_left_and_nothing_that_may_be_on_the_wire(store: Store) -> None:
    sent, waiting, fresh = message(), message(), message()
    ((_, sent_row),) = enqueue(store, sent, PEER, ttl_ms=1_000)
    enqueue(store, waiting, PEER, ttl_ms=1_000)
    enqueue(store, fresh, PEER, ttl_ms=DAY_MS)
    store.begin()
    expired = store.expire(PEER, beyond_row=sent_row, now_ms=NOW + 1_000)
    store.commit()
    assert expired == [waiting.id]
    assert ids_queued(store) == [sent.id, fresh.id]


def test_a_new_consumer_is_given_what_nobody_has_claimed_and_its_acks_last(store: Store, path: Path) -> None:
    first, second = message(), message()
    accept(store, first)
    store.begin()
    number = store.consumer_open("billing", "a.*")
    store.commit()
    accept(store, second)
    jobs = store.jobs(number, now_ms=NOW, limit=10, leave_out=set())
    assert [envelope.id for envelope, _ in jobs] == [first.id, second.id]
    store.begin()
    store.job_done(number, jobs[0][0].row, NOW)
    store.job_again(number, jobs[1][0].row, NOW + 500)
    store.commit()
    again = reopened(store, path)
    assert again.jobs(number, now_ms=NOW, limit=10, leave_out=set()) == []
    assert [
        (e.id, attempts) for e, attempts in again.jobs(number, now_ms=NOW + 500, limit=10, leave_out=set())
    ] == [(second.id, 1)]
    again.close()


def test_a_job_that_is_given_back_too_often_is_a_dead_letter_and_an_event(path: Path) -> None:
    store = Store(path, me="m" * 32, limits=Limits(deliveries_max=2))
    store.open()
    poison, other = message(), message()
    store.begin()
    number = store.consumer_open("billing", "a.*")
    store.commit()
    for one in (poison, other):
        accept(store, one)
    (row, _) = (envelope.row for envelope, _ in store.jobs(number, now_ms=NOW, limit=10, leave_out=set()))
    for _ in range(2):
        store.begin()
        store.job_again(number, row, NOW)
        store.commit()
    left = store.jobs(number, now_ms=NOW, limit=10, leave_out=set())
    assert [envelope.id for envelope, _ in left] == [other.id]
    assert store.backlog == 1
    (detail,) = store._conn.execute("SELECT detail FROM event WHERE kind = 'dead-letter'").fetchone()
    assert detail == f"inbox row {row}, given back 2 times by 'billing'"
    store.close()


def test_a_durable_name_keeps_its_pattern(store: Store) -> None:
    store.begin()
    store.consumer_open("billing", "a.*")
    with pytest.raises(InvalidInput, match="listens to 'a"):
        store.consumer_open("billing", "b.*")
    store.commit()


def test_an_effect_that_keeps_failing_is_tried_again_and_dead_in_the_end(store: Store) -> None:
    ((row, _, _),) = accept(store, message())
    now_ms = NOW
    tries = 0
    while True:
        store.begin()
        store.failed(row, "boom", now_ms)
        store.commit()
        tries += 1
        now_ms += 600_000
        if not store.has_due(now_ms):
            break
        store.begin()
        assert [envelope.row for envelope in store.due(now_ms, 10)] == [row]
        store.commit()
    assert tries == 10
    assert store._conn.execute("SELECT state, reason FROM inbox").fetchone() == (3, "boom")


def test_a_store_of_a_newer_version_is_left_alone(store: Store, path: Path) -> None:
    store.close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(UnsuitableHome, match="newer version"):
        Store(path, me="m" * 32, limits=Limits()).open()
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA user_version").fetchone() == (99,)
        other.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    store.open()  # for the fixture's close


def test_a_file_that_is_no_store_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"not a database, but somebody's file" * 100)
    with pytest.raises(StoreFailed, match="cannot open the store"):
        Store(path, me="m" * 32, limits=Limits()).open()
    assert path.read_bytes().startswith(b"not a database")


class Note(pw.Model):
    text = pw.TextField()


def test_models_share_the_transaction_and_no_other_thread_can_touch_them(path: Path) -> None:
    store = Store(path, me="m" * 32, limits=Limits(), models=[Note])
    store.open()
    store.begin()
    Note.create(text="kept")
    store.commit()
    store.begin()
    Note.create(text="undone")
    store.rollback()
    found: list[object] = []

    def elsewhere() -> None:
        try:
            found.append(Note.select().count())
        except pw.InterfaceError as error:
            found.append(str(error))

    def reading() -> None:
        reader = Reader(path)
        reader.open()
        found.append([note.text for note in Note.select()])
        try:
            Note.create(text="forbidden")
        except pw.OperationalError as error:
            found.append(str(error))
        reader.discard()

    for target in (elsewhere, reading):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    store.close()
    assert "no database" in str(found[0])
    assert found[1:] == [["kept"], "attempt to write a readonly database"]


def test_ids_are_kept_in_sixteen_bytes(store: Store) -> None:
    one = message()
    enqueue(store, one, PEER)
    assert store._conn.execute("SELECT msg_id FROM outbox").fetchone() == (id_to_bytes(one.id),)
