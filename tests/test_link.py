"""Two links, frame by frame: who may say what, and when."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from broker_free import frames, link
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.link import Link, Queued
from broker_free.testing import SimJournal

A, B = "a" * 32, "b" * 32
LIMITS = Limits(credit_messages=4)
CONN = 7


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
