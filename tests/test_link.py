"""Two links, frame by frame: who may say what, and when."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from broker_free import frames, link
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.link import Link, Queued
from broker_free.message import Message, metadata_of
from broker_free.testing import SimJournal

A, B = "a" * 32, "b" * 32
LIMITS = Limits(credit_messages=4)
CONN = 7
ROW_4 = {"row": 4, "at": 4}


def make(me: str, peer: str, *, journal: SimJournal | None = None, boot: int = 1) -> Link:
    return Link(
        me=me,
        boot=boot,
        peer=peer,
        about=lambda: {"name": me[0]},
        ledger=journal or SimJournal(me),
        limits=LIMITS,
        random=Random(1),
    )


def sent(actions: Sequence[link.Action]) -> list[Frame]:
    return [action.frame for action in actions if isinstance(action, link.Send)]


def kinds(actions: Sequence[link.Action]) -> list[str]:
    return [
        frames.NAMES[action.frame.kind] if isinstance(action, link.Send) else type(action).__name__
        for action in actions
    ]


def opened(dialler: Link, listener: Link, conn: int = CONN) -> None:
    dialler.dialling(conn, 0)
    (hello,) = sent(dialler.on_connected(conn, 0))
    (hello_ok,) = sent(listener.on_frame(conn, hello, 0))
    (ready,) = sent(dialler.on_frame(conn, hello_ok, 0))
    listener.on_frame(conn, ready, 0)
    for each in (dialler, listener):
        each.pump()
        assert each.is_open


def queued(row: int) -> Queued:
    return Queued(row=row, id=f"{row:08x}-0000-7000-8000-000000000000", meta=b"{}", body=b"x")


def queue(journal: SimJournal, peer: str, row: int) -> str:
    """Commit one message for `peer` to an outbox; its row will be `row` when called in order."""
    message = Message(id=queued(row).id, subject="a.b", body=b"x")
    journal.begin()
    journal.enqueue(message, metadata_of(message), [peer], ttl_ms=None, now_ms=0)
    journal.commit()
    return message.id


def take(journal: SimJournal, sender: str, *message_ids: str) -> None:
    """Commit messages to an inbox, from row 1 on."""
    messages = [Message(id=one, subject="a.b", body=b"x") for one in message_ids]
    journal.begin()
    journal.accept(sender, 0, [(metadata_of(one), one.body) for one in messages], 0)
    journal.commit()


def put(dialler: Link, *rows: int) -> list[Frame]:
    for row in rows:
        assert dialler.offer(queued(row))
    return sent(dialler.flush())


def test_a_session_opens_after_hello_hello_ok_and_ready() -> None:
    one, two = make(A, B), make(B, A)
    one.dialling(CONN, 0)
    hello = one.on_connected(CONN, 0)
    assert kinds(hello) == ["HELLO"]
    answer = two.on_frame(CONN, sent(hello)[0], 0)
    assert kinds(answer) == ["HELLO_OK"]
    assert not two.is_open, "the listener waits for READY: only that proves that the dialler is there now"
    ready = one.on_frame(CONN, sent(answer)[0], 0)
    assert kinds(ready) == ["READY", "Opened"]
    assert kinds(two.on_frame(CONN, sent(ready)[0], 0)) == ["Opened"]


def test_data_is_acked_by_session_and_only_once_it_is_committed() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    (data,) = put(one, 1, 2)
    (arrived,) = two.on_frame(CONN, data, 0)
    assert isinstance(arrived, link.Arrived)
    assert (arrived.seq, len(arrived.records)) == (2, 2)
    (ack,) = sent(two.committed(session=arrived.session, seq=2, row=9, at=2))
    (acked,) = one.on_frame(CONN, ack, 0)
    assert isinstance(acked, link.Acked)
    assert (acked.rows, acked.last) == (((1, queued(1).id), (2, queued(2).id)), (queued(2).id, 9))
    assert two.committed(session=arrived.session + 1, seq=2, row=9, at=2) == []


def test_credit_bounds_what_is_on_the_wire() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    assert [one.offer(queued(row)) for row in range(1, 7)] == [True] * 4 + [False] * 2
    assert one.in_flight == LIMITS.credit_messages


def test_a_gap_ends_the_session() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    put(one, 1)
    (second,) = put(one, 2)
    assert kinds(two.on_frame(CONN, second, 0)) == ["BYE", "Close", "Lost"]


def test_frames_and_acks_of_another_session_are_answered_with_bye_and_change_nothing() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    put(one, 1)
    stale = Frame(kind=frames.ACK, session=99, seq=1, credit_messages=9, meta={"row": 1, "at": 1})
    answer = one.on_frame(CONN, stale, 0)
    assert (kinds(answer), sent(answer)[0].session) == (["BYE"], 99)
    assert (one.in_flight, one.is_open) == (1, True)


def test_when_both_dial_the_link_of_the_smaller_id_stays() -> None:
    small, large = make(A, B), make(B, A)
    small.dialling(1, 0)
    large.dialling(2, 0)
    (from_small,) = sent(small.on_connected(1, 0))
    (from_large,) = sent(large.on_connected(2, 0))
    refusal = small.on_frame(2, from_large, 0)
    assert (kinds(refusal), sent(refusal)[0].meta["reason"]) == (["BYE"], "duplicate")
    assert kinds(large.on_frame(1, from_small, 0)) == ["Close", "HELLO_OK"]


def test_a_peer_that_has_started_again_is_not_taken_for_a_duplicate() -> None:
    small, large = make(A, B), make(B, A, boot=1)
    opened(small, large)
    again = make(B, A, boot=2)
    again.dialling(8, 0)
    (hello,) = sent(again.on_connected(8, 0))
    assert kinds(small.on_frame(8, hello, 0)) == ["Close", "Lost", "HELLO_OK"]


def test_a_hello_in_anothers_name_is_refused() -> None:
    two, liar = make(B, A), make("c" * 32, B)
    liar.dialling(CONN, 0)
    (hello,) = sent(liar.on_connected(CONN, 0))
    assert kinds(two.on_frame(CONN, hello, 0)) == ["BYE", "Close"]
    assert two.conn is None


def test_bye_ends_only_the_session_it_names() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    assert one.on_frame(CONN, Frame(kind=frames.BYE, session=99), 0) == []
    (data,) = put(one, 1)
    assert kinds(one.on_frame(CONN, Frame(kind=frames.BYE, session=data.session), 0)) == ["Close", "Lost"]


def test_silence_is_asked_about_and_ends_the_session_when_nobody_answers() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    put(one, 1)
    assert one.on_tick(LIMITS.ack_silence_ms - 1) == []
    asked = one.on_tick(LIMITS.ack_silence_ms)
    assert kinds(asked) == ["PING"]
    (pong,) = sent(two.on_frame(CONN, sent(asked)[0], 0))
    one.on_frame(CONN, pong, LIMITS.ack_silence_ms)
    assert one.is_open
    asked_again_ms = 2 * LIMITS.ack_silence_ms
    assert kinds(one.on_tick(asked_again_ms)) == ["PING"]
    assert kinds(one.on_tick(asked_again_ms + LIMITS.pong_timeout_ms)) == ["BYE", "Close", "Lost"]


def test_a_listener_does_not_wait_for_ready_for_ever() -> None:
    one, two = make(A, B), make(B, A)
    one.dialling(CONN, 0)
    two.on_frame(CONN, sent(one.on_connected(CONN, 0))[0], 0)
    assert two.on_tick(LIMITS.hello_timeout_ms - 1) == []
    assert kinds(two.on_tick(LIMITS.hello_timeout_ms)) == ["BYE", "Close", "Lost"]


def test_redialling_waits_longer_each_time_and_not_at_all_when_there_is_reason_to_hope() -> None:
    one = make(A, B)
    for attempt in range(12):
        one.dialling(attempt, 0)
        one.on_closed(attempt, "unreachable", 0)
        latest = min(LIMITS.redial_ms_max, LIMITS.redial_ms_min << attempt)
        assert one.wants_dial(latest)
        assert one.next_wake_ms(0) <= latest
    one.redial_now()
    assert one.wants_dial(0)


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"node_id": A},
        {"node_id": A, "boot": 1, "in_doubt": [1]},
        {"node_id": A, "boot": 1, "in_doubt": [], "last_acked": ["x"]},
        {"node_id": A, "boot": 1, "in_doubt": [], "have": [[0]]},
        {"node_id": A, "boot": 1, "in_doubt": [], "about": 3},
    ],
)
def test_a_malformed_hello_is_refused(meta: dict[str, object]) -> None:
    two = make(B, A)
    assert kinds(two.on_frame(CONN, Frame(kind=frames.HELLO, session=1, meta=meta), 0)) == ["BYE", "Close"]


def test_a_resync_asks_by_id_and_learns_exactly_what_the_peer_holds() -> None:
    mine, theirs = SimJournal(A), SimJournal(B)
    ids = [queue(mine, B, row) for row in (1, 2, 3)]
    take(theirs, A, ids[0], ids[2])
    one, two = make(A, B, journal=mine), make(B, A, journal=theirs)
    one.dialling(CONN, 0)
    (hello,) = sent(one.on_connected(CONN, 0))
    assert hello.meta["in_doubt"] == ids
    (hello_ok,) = sent(two.on_frame(CONN, hello, 0))
    assert hello_ok.meta["have"] == [(0, 1), (2, 2)], "what is held is no prefix of what was sent"
    learned = one.on_frame(CONN, hello_ok, 0)[0]
    assert learned == link.AckedIds((ids[0], ids[2]), (ids[2], 2))


def test_the_listener_asks_too_and_is_answered_by_ready() -> None:
    mine, theirs = SimJournal(A), SimJournal(B)
    message_id = queue(theirs, A, 1)
    take(mine, B, message_id)
    one, two = make(A, B, journal=mine), make(B, A, journal=theirs)
    one.dialling(CONN, 0)
    (hello_ok,) = sent(two.on_frame(CONN, sent(one.on_connected(CONN, 0))[0], 0))
    (ready,) = sent(one.on_frame(CONN, hello_ok, 0))
    assert two.on_frame(CONN, ready, 0)[0] == link.AckedIds((message_id,), (message_id, 1))


@pytest.mark.parametrize("row_there", [None, 2])
def test_a_peer_that_lacks_the_last_acked_message_under_its_row_has_gone_back(row_there: int | None) -> None:
    mine, theirs = SimJournal(A), SimJournal(B)
    message_id = queue(mine, B, 1)
    if row_there:
        take(theirs, A, queued(9).id, message_id)  # it is there, but not under row 1
    mine.begin()
    mine.mark_delivered([(B, 1)], 0)
    mine.note_acked(B, message_id, 1)
    mine.commit()
    one, two = make(A, B, journal=mine), make(B, A, journal=theirs)
    one.dialling(CONN, 0)
    (hello_ok,) = sent(two.on_frame(CONN, sent(one.on_connected(CONN, 0))[0], 0))
    assert one.on_frame(CONN, hello_ok, 0)[0] == link.Regressed()


def test_a_ready_without_the_nonce_ends_the_session() -> None:
    one, two = make(A, B), make(B, A)
    one.dialling(CONN, 0)
    (hello_ok,) = sent(two.on_frame(CONN, sent(one.on_connected(CONN, 0))[0], 0))
    replayed = Frame(kind=frames.READY, session=hello_ok.session, meta={"nonce": 1, "have": []})
    assert kinds(two.on_frame(CONN, replayed, 0)) == ["BYE", "Close", "Lost"]


def test_data_before_ready_ends_the_session() -> None:
    one, two = make(A, B), make(B, A)
    one.dialling(CONN, 0)
    (hello_ok,) = sent(two.on_frame(CONN, sent(one.on_connected(CONN, 0))[0], 0))
    data = frames.data_frame(session=hello_ok.session, seq=1, lane=0, records=[(b"{}", b"")])
    assert kinds(two.on_frame(CONN, data, 0)) == ["BYE", "Close", "Lost"]


def test_only_the_session_of_the_last_hello_carries_data() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    (late,) = put(one, 1)
    one.on_closed(CONN, "cut", 0)
    opened(one, two, conn=8)
    assert kinds(two.on_frame(CONN, late, 0)) == ["BYE"]
    assert two.conn == 8


def test_an_ack_for_what_was_never_sent_ends_the_session() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    (data,) = put(one, 1)
    for seq, at in ((2, 1), (1, 7)):
        invented = Frame(kind=frames.ACK, session=data.session, seq=seq, meta={"row": 1, "at": at})
        assert kinds(one.on_frame(CONN, invented, 0)) == ["BYE", "Close", "Lost"]
        opened(one, two)
        (data,) = put(one, 1)


def test_an_ack_gives_room_for_what_waited() -> None:
    journal = SimJournal(A)
    ids = [queue(journal, B, row) for row in range(1, 7)]
    one, two = make(A, B, journal=journal), make(B, A)
    one.dialling(CONN, 0)
    (hello_ok,) = sent(two.on_frame(CONN, sent(one.on_connected(CONN, 0))[0], 0))
    one.on_frame(CONN, hello_ok, 0)
    (data,) = sent(one.pump())
    assert len(list(frames.records_of(data))) == LIMITS.credit_messages
    assert one.pump() == []
    ack = Frame(kind=frames.ACK, session=data.session, seq=4, credit_messages=4, credit_kib=1, meta=ROW_4)
    (acked,) = one.on_frame(CONN, ack, 0)
    assert isinstance(acked, link.Acked)
    assert [message_id for _, message_id in acked.rows] == ids[:4]
    (rest,) = sent(one.pump())
    assert (rest.seq, len(list(frames.records_of(rest)))) == (5, 2)


def test_a_peer_with_no_credit_to_give_is_left_alone() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    (data,) = put(one, 1)
    full = Frame(kind=frames.ACK, session=data.session, seq=1, credit_messages=0, meta={"row": 1, "at": 1})
    one.on_frame(CONN, full, 0)
    assert not one.offer(queued(2))
    assert one.pump() == []


def test_a_new_row_does_not_overtake_what_waits() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    one.hold_back()
    assert not one.offer(queued(2))


def test_a_rejected_record_counts_as_settled() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    (data,) = put(one, 1, 2)
    (refusal,) = sent(two.reject(session=data.session, seq=2, reason="too large"))
    assert one.on_frame(CONN, refusal, 0) == [link.Rejected(2, queued(2).id, "too large")]
    assert one.in_flight == 1
