"""Two links, frame by frame: who may say what, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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


def make(
    me: str,
    peer: str,
    *,
    journal: SimJournal | None = None,
    boot: int = 1,
    limits: Limits = LIMITS,
    seed: int = 1,
    steady: Callable[[], int] = lambda: 0,
) -> Link:
    return Link(
        me=me,
        boot=boot,
        peer=peer,
        about=lambda: {"name": me[0]},
        ledger=journal or SimJournal(me),
        limits=limits,
        random=Random(seed),
        steady=steady,
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
    hello_ok = sent(listener.on_frame(conn, hello, 0))[-1]  # after the BYE to a former session
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
    assert kinds(small.on_frame(8, hello, 0)) == ["BYE", "Close", "Lost", "HELLO_OK"]


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
    (refusal,) = sent(two.reject(session=data.session, seq=2, reason="too-large: x"))
    assert one.on_frame(CONN, refusal, 0) == [link.Rejected(queued(2).id, "too-large: x")]
    assert one.in_flight == 1


# -- versions ---------------------------------------------------------------------------------------------------


def greeted(dialler: Link, listener: Link, conn: int = CONN) -> list[link.Action]:
    """Dial and greet; return what the listener answers."""
    dialler.dialling(conn, 0)
    (hello,) = sent(dialler.on_connected(conn, 0))
    return listener.on_frame(conn, hello, 0)


def test_a_greeting_leaves_in_the_lowest_version_and_the_session_runs_in_the_highest_common_one() -> None:
    one, two = make(A, B), make(B, A)
    one.dialling(CONN, 0)
    (hello,) = sent(one.on_connected(CONN, 0))
    assert (hello.version, hello.meta["protocol"], hello.meta["features"]) == (
        1,
        [1, 2],
        sorted(frames.FEATURES),
    )
    (hello_ok,) = sent(two.on_frame(CONN, hello, 0))
    (ready,) = sent(one.on_frame(CONN, hello_ok, 0))
    two.on_frame(CONN, ready, 0)
    one.pump()
    (data,) = put(one, 1)
    assert (hello_ok.version, ready.version, data.version) == (1, 2, 2)


def test_a_peer_of_the_version_before_gets_frames_of_that_version() -> None:
    two = make(B, A)
    hello = Frame(
        kind=frames.HELLO,
        session=9,
        credit_messages=9,
        credit_kib=9,
        meta={"node_id": A, "boot": 1, "in_doubt": []},
    )
    (hello_ok,) = sent(two.on_frame(CONN, hello, 0))
    ready = Frame(
        kind=frames.READY, session=9, credit_messages=9, credit_kib=9, meta={"nonce": hello_ok.meta["nonce"]}
    )
    assert kinds(two.on_frame(CONN, ready, 0)) == ["Opened"]
    two.pump()
    (data,) = put(two, 1)
    assert (two.version, data.version, two.has(frames.CREDITS)) == (1, 1, False)


@pytest.mark.parametrize("protocol", [[3, 4], [0, 0]])
def test_without_a_common_version_both_sides_say_so_and_do_not_dial_again_soon(protocol: list[int]) -> None:
    one, two = make(A, B), make(B, A)
    two.dialling(CONN, 0)
    (hello,) = sent(two.on_connected(CONN, 0))
    strange = replace(hello, meta={**hello.meta, "protocol": protocol})
    answer = one.on_frame(CONN, strange, 0)
    assert kinds(answer) == ["BYE", "Raised", "Close"]
    (bye,) = sent(answer)
    assert (bye.meta["code"], bye.version) == ("version", 1)
    told = two.on_frame(CONN, bye, 0)
    assert kinds(told) == ["Close", "Raised"]
    two.redial_now()
    assert not two.wants_dial(LIMITS.redial_ms_max - 1), "a beat that is heard is no reason to try again"
    assert two.wants_dial(LIMITS.redial_ms_max)


def test_a_listener_of_a_strange_version_is_refused_by_the_dialler() -> None:
    one, two = make(A, B), make(B, A)
    (hello_ok,) = sent(greeted(one, two))
    strange = replace(hello_ok, meta={**hello_ok.meta, "protocol": [3, 3]})
    assert kinds(one.on_frame(CONN, strange, 0)) == ["BYE", "Raised", "Close"]
    one.redial_now()
    assert not one.wants_dial(LIMITS.redial_ms_max - 1)


# -- what a peer takes ------------------------------------------------------------------------------------------


def test_a_message_that_the_peer_never_takes_is_refused_here_and_the_next_one_leaves() -> None:
    journal = SimJournal(A)
    small = Limits(body_bytes_max=3, metadata_bytes_max=200)
    journal.begin()
    for number, (body, headers) in enumerate([(b"xxxx", {}), (b"x", {"h": "x" * 200}), (b"xxx", {})]):
        message = Message(id=queued(number).id, subject="a.b", body=body, headers=headers)
        journal.enqueue(message, metadata_of(message), [B], ttl_ms=None, now_ms=0)
    journal.commit()
    one, two = make(A, B, journal=journal), make(B, A, limits=small)
    (hello_ok,) = sent(greeted(one, two))
    one.on_frame(CONN, hello_ok, 0)
    actions = one.pump()
    assert kinds(actions) == ["Rejected", "Rejected", "DATA"]
    reasons = [action.reason for action in actions if isinstance(action, link.Rejected)]
    assert reasons[0] == "too-large: a body of 4 bytes; the peer takes 3"
    assert reasons[1].startswith("too-large: metadata of")
    too_large = replace(queued(9), body=b"xxxx")
    assert not one.offer(too_large), "nor does a new one leave before its commit"


def test_packs_are_no_larger_than_the_peer_takes() -> None:
    one, two = make(A, B), make(B, A, limits=Limits(credit_messages=9, pack_messages_max=2, pack_bytes_max=5))
    opened(one, two)
    packs = put(one, 1, 2, 3)
    assert [len(list(frames.records_of(pack))) for pack in packs] == [1, 1, 1], (
        "two of three bytes each are six"
    )
    one, two = make(A, B), make(B, A, limits=Limits(credit_messages=9, pack_messages_max=2))
    opened(one, two)
    assert [len(list(frames.records_of(pack))) for pack in put(one, 1, 2, 3)] == [2, 1]


# -- an id used twice -------------------------------------------------------------------------------------------


def test_an_id_that_the_peer_holds_for_another_message_is_a_conflict_and_not_a_delivery() -> None:
    mine, theirs = SimJournal(A), SimJournal(B)
    message_id = queue(mine, B, 1)
    other = Message(id=message_id, subject="a.b", body=b"other content")
    theirs.begin()
    theirs.accept(A, 0, [(metadata_of(other), other.body)], 0)
    theirs.commit()
    one, two = make(A, B, journal=mine), make(B, A, journal=theirs)
    answer = greeted(one, two)
    assert kinds(answer) == ["HELLO_OK", "Raised"]
    hello_ok = sent(answer)[0]
    assert (hello_ok.meta["have"], hello_ok.meta["conflicts"]) == ([], [0])
    (conflict, *_) = one.on_frame(CONN, hello_ok, 0)
    assert isinstance(conflict, link.Rejected)
    assert (conflict.id, conflict.reason.split(":")[0]) == (message_id, "conflict")


# -- two live boots of one node id ------------------------------------------------------------------------------


def reach(one: Link, two: Link, conn: int, now_ms: int = 0) -> list[list[link.Action]]:
    """Let `one` dial and greet, and carry frames both ways until nobody answers; return what each step gave."""
    one.dialling(conn, now_ms)
    steps = [one.on_connected(conn, now_ms)]
    side = [two, one]
    turn = 0
    while answers := [frame for frame in sent(steps[-1]) if frame.kind not in (frames.PING, frames.ALARM)]:
        steps.append([action for frame in answers for action in side[turn % 2].on_frame(conn, frame, now_ms)])
        turn += 1
    return steps


def raised(steps: list[list[link.Action]]) -> list[str]:
    return [action.kind for step in steps for action in step if isinstance(action, link.Raised)]


def test_a_copy_of_a_node_takes_its_place_once_and_the_original_does_not_get_it_back() -> None:
    hub, original, copy = make(B, A), make(A, B, boot=1, seed=2), make(A, B, boot=2, seed=3)
    assert raised(reach(original, hub, 1)) == []
    assert raised(reach(copy, hub, 2)) == [], "it may have been started again: nothing says that it was not"
    original.on_frame(1, Frame(kind=frames.BYE, session=original._session.id), 0)  # type: ignore[union-attr]  # it is open
    assert raised(reach(original, hub, 3)) == ["clone"], "the original learns that another boot is connected"
    assert (hub.conn, copy.is_open, original.is_open) == (2, True, False)
    original.redial_now()
    assert not original.wants_dial(LIMITS.redial_ms_max - 1), "no war"
    later_ms = LIMITS.redial_ms_max
    steps = reach(original, hub, 4, later_ms)
    assert raised(steps) == ["clone", "clone"], "by now it has proved to be alive: the hub knows too"
    assert hub.conn == 2
    (alarm,) = [frame for step in steps for frame in sent(step) if frame.kind == frames.ALARM]
    assert copy.on_frame(2, alarm, later_ms) == [link.Control(alarm)], "and tells the copy"


def test_a_late_greeting_of_a_former_boot_is_refused_without_an_alarm_at_the_peer() -> None:
    hub, former, present = make(B, A), make(A, B, boot=1, seed=2), make(A, B, boot=2, seed=3)
    former.dialling(1, 0)
    (late,) = sent(former.on_connected(1, 0))
    reach(former_again := make(A, B, boot=1, seed=4), hub, 2)
    assert former_again.is_open
    reach(present, hub, 3)
    answer = hub.on_frame(1, late, 0)
    assert kinds(answer) == ["BYE", "PING"]
    assert (hub.conn, sent(answer)[0].meta["code"]) == (3, "clone")


def test_a_former_boot_is_taken_when_the_present_one_is_gone_and_that_is_an_alarm() -> None:
    hub, original, copy = make(B, A), make(A, B, boot=1, seed=2), make(A, B, boot=2, seed=3)
    reach(original, hub, 1)
    reach(copy, hub, 2)
    original.on_closed(1, "cut", 0)
    hub.on_closed(2, "cut", 0)
    assert raised(reach(original, hub, 3)) == ["clone"]
    assert (hub.conn, original.is_open) == (3, True)


# -- backpressure -----------------------------------------------------------------------------------------------


def test_a_window_that_changes_is_told_at_once_and_what_waited_leaves() -> None:
    journal = SimJournal(A)
    queue(journal, B, 1)
    one, two = make(A, B, journal=journal), make(B, A)
    assert two.grant(0, 0) == [], "nobody to tell yet: the greeting will"
    reach(one, two, CONN)
    assert (one.is_blocked, one.credit, one.pump()) == (True, (0, 0), [])
    (credit,) = sent(two.grant(2, 4))
    assert (credit.kind, two.grant(2, 4)) == (frames.CREDIT, [])
    assert one.on_frame(CONN, credit, 0) == [link.Blocked(False)]
    assert kinds(one.pump()) == ["DATA"]
    (credit,) = sent(two.grant(2, 0))
    assert one.on_frame(CONN, credit, 0) == [link.Blocked(True)], "no bytes, no messages"


def test_a_blocked_sender_asks_from_time_to_time_and_the_answer_carries_the_window() -> None:
    one, two = make(A, B), make(B, A)
    two.grant(0, 0)
    reach(one, two, CONN)
    (ping,) = sent(one.on_tick(LIMITS.ack_silence_ms))
    two.grant(4, 4)  # suppose that this CREDIT is lost
    (pong,) = sent(two.on_frame(CONN, ping, 0))
    assert one.on_frame(CONN, pong, 0) == [link.Blocked(False)]


def test_a_lost_session_forgets_the_window() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    one.on_frame(CONN, sent(two.grant(0, 0))[0], 0)
    assert one.is_blocked
    one.on_closed(CONN, "cut", 0)
    assert (one.is_blocked, one.credit) == (False, (0, 0))


def test_a_greeting_that_cannot_be_sent_is_noticed_at_once() -> None:
    one = make(A, B)
    one.dialling(CONN, 0)
    one.on_connected(CONN, 0)
    assert kinds(one.on_unsent(CONN, 0)) == ["Close"]
    assert one.next_wake_ms(0) <= LIMITS.redial_ms_min


def test_a_frame_of_a_later_version_is_counted_and_changes_nothing() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    session = one._session.id  # type: ignore[union-attr]  # it is open
    assert one.on_frame(CONN, Frame(kind=99, session=session), 0) == [link.Ignored("frame-type")]
    assert one.is_open


# -- lifetimes --------------------------------------------------------------------------------------------------


def queue_timed(journal: SimJournal, number: int, ttl_ms: int | None) -> str:
    message = Message(id=queued(number).id, subject="a.b", body=b"x")
    journal.begin()
    journal.enqueue(message, metadata_of(message), [B], ttl_ms=ttl_ms, now_ms=0)
    journal.commit()
    return message.id


def test_what_remains_of_a_lifetime_travels_and_what_is_over_does_not_leave() -> None:
    journal = SimJournal(A)
    over = queue_timed(journal, 1, 1_000)
    queue_timed(journal, 2, 5_000)
    queue_timed(journal, 3, None)
    one, two = make(A, B, journal=journal, steady=lambda: 1_000), make(B, A)
    reach(one, two, CONN)
    expired, data = one.pump()
    assert expired == link.Expired(over)
    assert isinstance(data, link.Send)
    (arrived,) = two.on_frame(CONN, data.frame, 0)
    assert isinstance(arrived, link.Arrived)
    assert arrived.ttls == (4_000, 0), "a bound of the queue is not a lifetime of the message"


def test_a_frame_without_lifetimes_is_laid_out_as_ever() -> None:
    one, two = make(A, B), make(B, A)
    opened(one, two)
    (data,) = put(one, 1, 2)
    assert data.flags == frames.FLAG_PACK
    (arrived,) = two.on_frame(CONN, data, 0)
    assert isinstance(arrived, link.Arrived)
    assert arrived.ttls == ()


def test_a_peer_of_version_1_is_told_its_window_by_an_ack_of_nothing() -> None:
    two = make(B, A)
    meta = {"node_id": A, "boot": 1, "in_doubt": []}
    (hello_ok,) = sent(two.on_frame(CONN, Frame(kind=frames.HELLO, session=9, meta=meta), 0))
    nonce = hello_ok.meta["nonce"]
    two.on_frame(CONN, Frame(kind=frames.READY, session=9, meta={"nonce": nonce}), 0)
    (told,) = sent(two.grant(2, 4))
    assert (told.kind, told.seq, told.credit_messages, told.version) == (frames.ACK, 0, 2, 1)
