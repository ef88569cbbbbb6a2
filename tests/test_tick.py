"""The order of a tick, seen from the wire and from the journal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from broker_free import frames
from broker_free.errors import Conflict, OutcomeUnknown, UnknownPeer
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.link import Action, Link
from broker_free.message import Envelope, Message, digest_of, new_id
from broker_free.registry import Registry
from broker_free.testing import SimJournal
from broker_free.tick import Outcome, Publish, Tick, Transact, Tx

ME, PEER = "m" * 32, "p" * 32
NOW, UTC = 1_000, 1_700_000_000_000
CONN = 1


class RecordingWire:
    """Takes every frame, and the commits of a journal, in one list: what came before what."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.frames: list[Frame] = []

    def send(self, conn: int, frame: Frame) -> bool:
        self.log.append(frames.NAMES[frame.kind])
        self.frames.append(frame)
        return True

    def close(self, conn: int) -> None:
        self.log.append("close")

    def dial(self, peer: str) -> int | None:
        return CONN


class Node:
    """A tick with one open session to PEER, whose side the test plays."""

    def __init__(self) -> None:
        self.wire = RecordingWire()
        self.journal = SimJournal(ME, limits=Limits())
        self.journal.before_commit = lambda: self.wire.log.append("commit")
        self.tick = Tick(
            me=ME,
            boot=1,
            about=lambda: {"name": "me", "endpoints": [], "beat": ""},
            journal=self.journal,
            wire=self.wire,
            limits=Limits(),
            random=Random(1),
            registry=Registry(ME),
        )

    def open(self) -> None:
        self.tick.add_peer(PEER)
        self.run()
        self._greet(version=2)
        self.wire.log.clear()
        self.wire.frames.clear()

    def open_again(self, *, version: int = 2) -> None:
        """Dial and greet once more after a lost session."""
        self.wire.frames.clear()
        self.tick.redial_now(PEER)
        self.run()
        self._greet(version=version)

    def _greet(self, *, version: int) -> None:
        self.tick.connected(CONN)
        (hello,) = self.wire.frames
        answer: dict[str, Any] = {"node_id": PEER, "boot": 1, "in_doubt": [], "nonce": 5, "have": []}
        if version > 1:
            answer |= {"protocol": [1, version], "features": sorted(frames.FEATURES)}
        self.session = hello.session
        self.receive(Frame(kind=frames.HELLO_OK, meta=answer, credit_messages=9, credit_kib=99))
        self.run()

    def receive(self, frame: Frame) -> None:
        stamped = replace(frame, session=self.session)
        self.tick.frame(PEER, CONN, stamped)

    def run(self, *work: Publish | Transact, now_ms: int = NOW, steady_ms: int | None = None) -> Outcome:
        self.tick.start(now_ms=now_ms, utc_ms=UTC, steady_ms=steady_ms)
        return self.tick.run(work)

    def deliver(self, seq: int, subject: str, body: bytes = b"") -> str:
        message_id = new_id(UTC)
        meta = f'{{"id":"{message_id}","subject":"{subject}"}}'.encode()
        self.receive(Frame(kind=frames.DATA, seq=seq, raw_meta=meta, body=body))
        return message_id


def node() -> Node:
    made = Node()
    made.open()
    return made


def plain(*to: str) -> Publish:
    return Publish(message=Message(id=new_id(UTC), subject="a.b", body=b"x"), recipients=to)


def publishing(*to: str) -> Callable[[Tx], str]:
    return lambda tx: tx.publish("a.b", b"x", to=to)


def test_a_plain_publish_is_on_the_wire_while_its_own_commit_runs() -> None:
    one = node()
    one.run(plain(PEER))
    assert one.wire.log == ["DATA", "commit"]


def test_what_a_transaction_publishes_leaves_only_after_its_commit() -> None:
    one = node()
    one.run(Transact(fn=publishing(PEER)))
    assert one.wire.log == ["commit", "DATA"]


def test_a_plain_publish_waits_behind_what_a_transaction_published_before_it() -> None:
    one = node()
    one.run(Transact(fn=publishing(PEER)), plain(PEER))
    assert one.wire.log == ["commit", "DATA"]
    assert len(list(frames.records_of(one.wire.frames[0]))) == 2


def test_an_ack_leaves_after_the_commit() -> None:
    one = node()
    one.deliver(1, "a.b")
    one.deliver(2, "a.b")
    one.run()
    assert one.wire.log == ["commit", "ACK"]
    assert (one.wire.frames[0].seq, dict(one.wire.frames[0].meta)) == (2, {"row": 2, "at": 2})


def test_a_record_that_is_no_message_is_rejected_before_the_ack_that_covers_it() -> None:
    one = node()
    one.receive(Frame(kind=frames.DATA, seq=1, raw_meta=b"{}"))
    one.deliver(2, "a.b")
    one.run()
    assert one.wire.log == ["commit", "REJECT", "ACK"]
    assert one.wire.frames[0].seq == 1


def test_a_commit_that_fails_after_the_wire_was_used_leaves_the_outcome_open_and_ends_the_session() -> None:
    one = node()
    one.journal.fail = "commit"
    work = plain(PEER)
    outcome = one.run(work)
    ((failed, error),) = outcome.failures
    assert failed is work
    assert isinstance(error, OutcomeUnknown)
    assert outcome.lost == [(PEER, "commit failed")]
    assert one.journal.outbox == {}


def test_a_commit_that_fails_before_anything_left_is_a_plain_failure_and_acks_nothing() -> None:
    one = node()
    one.deliver(1, "a.b")
    one.journal.fail = "commit"
    outcome = one.run(Transact(fn=publishing(PEER)))
    ((_, error),) = outcome.failures
    assert not isinstance(error, OutcomeUnknown)
    assert "ACK" not in one.wire.log
    assert outcome.arrivals == []


def test_an_effect_that_raises_keeps_its_message_and_its_neighbours() -> None:
    one = node()
    filed: list[str] = []

    def effect(tx: Tx, envelope: Envelope) -> None:
        if envelope.body == b"poison":
            raise ValueError("poison")
        filed.append(envelope.id)

    one.tick.add_effect("a.*", effect)
    poison = one.deliver(1, "a.b", b"poison")
    good = one.deliver(2, "a.b")
    one.run()
    assert filed[-1] == good
    assert one.wire.frames[-1].seq == 2, "both are on disk, so both are acked"
    states = {row.id: row.state for row in one.journal.inbox.values()}
    assert states == {poison: "new", good: "done"}


def test_work_that_raises_does_not_hurt_the_work_beside_it() -> None:
    one = node()

    def bad(tx: Tx) -> None:
        tx.publish("a.b", b"", to=[PEER])
        raise ValueError

    work: list[Any] = [Transact(fn=bad), plain("z" * 32), Transact(fn=publishing(PEER))]
    outcome = one.run(*work)
    assert [(failed, type(error)) for failed, error in outcome.failures] == [
        (work[0], ValueError),
        (work[1], UnknownPeer),
    ]
    assert [done for done, _ in outcome.results] == [work[2]]
    assert len(one.journal.outbox) == 1


def test_a_message_to_this_node_itself_runs_its_effect_in_the_same_transaction() -> None:
    one = node()
    seen: list[bytes] = []
    one.tick.add_effect("a.*", lambda tx, envelope: seen.append(envelope.body))
    outcome = one.run(Transact(fn=publishing(ME)))
    assert seen == [b"x"]
    assert one.wire.log == ["commit"]
    assert [envelope.sender for envelope in outcome.arrivals] == [ME]


def test_acks_seen_ride_on_the_next_commit() -> None:
    one = node()
    work = plain(PEER)
    one.run(work)
    one.receive(Frame(kind=frames.ACK, seq=1, credit_messages=9, credit_kib=99, meta={"row": 4, "at": 1}))
    one.wire.log.clear()
    outcome = one.run()
    assert outcome.delivered == [(work.message.id, PEER)]
    assert one.wire.log == [], "nobody waits for the mark: no sync of its own"
    assert one.tick.next_wake_ms() <= NOW + Limits().marks_delay_ms
    one.run(Transact(fn=lambda tx: None))
    assert [row.state for row in one.journal.outbox.values()] == ["delivered"]


def test_an_ack_whose_session_is_lost_before_it_is_written_is_asked_for_again() -> None:
    one = node()
    one.run(plain(PEER))
    one.receive(Frame(kind=frames.ACK, seq=1, credit_messages=9, credit_kib=99, meta={"row": 4, "at": 1}))
    one.receive(Frame(kind=frames.BYE))
    one.run(Transact(fn=lambda tx: None))
    assert [row.state for row in one.journal.outbox.values()] == ["queued"], "the resync will tell"


def test_a_failing_commit_is_not_tried_again_without_pause() -> None:
    one = node()
    one.run(plain(PEER))
    one.receive(Frame(kind=frames.ACK, seq=1, credit_messages=9, credit_kib=99, meta={"row": 4, "at": 1}))
    one.journal.fail = "commit"
    one.run(Transact(fn=lambda tx: None))
    one.wire.log.clear()
    for _ in range(3):
        one.run()
    assert "commit" not in one.wire.log


def test_an_ack_names_the_highest_row_it_covers_not_that_of_a_duplicate() -> None:
    one = node()
    first = one.deliver(1, "a.b")
    one.run()
    one.deliver(2, "a.b")
    again = f'{{"id":"{first}","subject":"a.b"}}'.encode()
    one.receive(Frame(kind=frames.DATA, seq=3, raw_meta=again))
    one.run()
    ack = one.wire.frames[-1]
    assert (ack.seq, dict(ack.meta)) == (3, {"row": 2, "at": 2})


def test_a_session_that_cannot_take_a_frame_is_over() -> None:
    one = node()
    one.wire.send = lambda conn, frame: False  # type: ignore[method-assign]  # a full pipe
    outcome = one.run(plain(PEER))
    assert outcome.lost == [(PEER, "could not send")]
    assert [row.state for row in one.journal.outbox.values()] == ["queued"]
    assert len(outcome.results) == 1, "it is on disk and will leave with the next session"


def test_an_idle_tick_visits_no_link_and_the_right_one_wakes_when_its_time_has_come() -> None:
    visits: list[str] = []

    class Watched(Link):
        def on_tick(self, now_ms: int) -> list[Action]:
            visits.append(self.peer)
            return super().on_tick(now_ms)

        def pump(self) -> list[Action]:
            visits.append(self.peer)
            return super().pump()

    class WatchedTick(Tick):
        link_type = Watched

    class Deaf(RecordingWire):
        def dial(self, peer: str) -> int | None:
            return None

    limits = Limits(redial_ms_min=1 << 20, redial_ms_max=1 << 20)
    tick = WatchedTick(
        me=ME,
        boot=1,
        about=dict,
        journal=SimJournal(ME, limits=limits),
        wire=Deaf(),
        limits=limits,
        random=Random(1),
        registry=Registry(ME),
    )
    peers = [f"p{number}" for number in range(63)]
    for peer in peers:
        tick.add_peer(peer)

    def run(now_ms: int) -> list[str]:
        visits.clear()
        tick.start(now_ms=now_ms, utc_ms=UTC)
        tick.run(())
        return visits

    assert list(dict.fromkeys(run(NOW))) == peers
    due = {peer: link.next_wake_ms(NOW) for peer, link in tick.links.items()}
    first, second = sorted(due, key=due.__getitem__)[:2]
    assert tick.next_wake_ms() == due[first]
    assert run(due[first] - 1) == []
    assert set(run(due[first])) == {first}
    assert tick.next_wake_ms() == min(due[second], tick.links[first].next_wake_ms(due[first]))
    tick.redial_now("p7")
    tick.remove_peer(second)
    assert set(run(due[first] + 1)) == {"p7"}
    assert second not in run(1 << 30)


# -- backpressure, alarms, what is counted ----------------------------------------------------------------------


def windows(one: Node) -> list[int]:
    return [frame.credit_messages for frame in one.wire.frames if frame.kind == frames.CREDIT]


def test_a_node_that_takes_no_messages_says_so_at_once_and_takes_them_again() -> None:
    one = node()
    one.tick.hold("low disk")
    one.tick.hold("slow store", for_ms=50)
    one.run()
    one.tick.release("low disk")
    assert (one.tick.holds, windows(one)) == (("slow store",), [0]), "each reason counts"
    assert one.tick.next_wake_ms() <= NOW + 50
    one.run(now_ms=NOW + 50)
    assert (one.tick.holds, windows(one)) == ((), [0, Limits().credit_messages])


def test_what_is_under_way_when_a_node_takes_no_more_is_committed_and_acked() -> None:
    one = node()
    one.tick.hold("low disk")
    one.deliver(1, "a.b")
    one.run()
    assert one.wire.log == ["CREDIT", "commit", "ACK"]
    assert one.wire.frames[-1].credit_messages == 0


def test_consumers_that_lag_stop_the_peers_until_half_is_done() -> None:
    one = node()

    def poison(tx: Tx, envelope: Envelope) -> None:
        raise ValueError("not now")

    one.tick.add_effect("a.*", poison)
    most = one.tick._limits.backlog_messages_max
    one.journal._due.update({-number: UTC + 1_000_000 for number in range(1, most)})
    one.deliver(1, "a.b")
    one.run()
    assert windows(one) == [0]
    for number in range(1, most // 2):
        del one.journal._due[-number]
    one.run()
    assert windows(one) == [0], "one more than half"
    del one.journal._due[1 - most]
    one.run()
    assert windows(one) == [0, Limits().credit_messages]


def test_an_id_used_for_another_message_is_rejected_with_an_alarm() -> None:
    one = node()
    message_id = one.deliver(1, "a.b", b"one")
    meta = f'{{"id":"{message_id}","subject":"a.b"}}'.encode()
    one.receive(Frame(kind=frames.DATA, seq=2, raw_meta=meta, body=b"another"))
    outcome = one.run()
    assert one.wire.log == ["commit", "REJECT", "ACK"]
    assert one.wire.frames[0].meta["reason"] == "conflict: another message has this id"
    assert [(alarm.kind, alarm.peer) for alarm in outcome.alarms] == [("conflict", PEER)]


def test_a_rejected_message_is_dead_and_a_conflict_is_an_alarm_here_too() -> None:
    one = node()
    works = [plain(PEER), plain(PEER)]
    one.run(*works)
    one.receive(Frame(kind=frames.REJECT, seq=1, meta={"reason": "conflict: another message has this id"}))
    one.receive(Frame(kind=frames.REJECT, seq=2, meta={"reason": "too-large: far too large"}))
    outcome = one.run()
    assert [dead[0] for dead in outcome.dead] == [work.message.id for work in works]
    assert [row.state for row in one.journal.outbox.values()] == ["dead", "dead"]
    assert [alarm.kind for alarm in outcome.alarms] == ["conflict"]


def test_an_alarm_that_repeats_is_counted_each_time_and_told_once_in_a_while() -> None:
    one = node()
    told = Frame(kind=frames.ALARM, meta={"kind": "clone", "detail": "x"})
    one.receive(told)
    one.receive(told)
    assert [alarm.kind for alarm in one.run().alarms] == ["clone"]
    assert one.tick.alarms == {"clone": 2}
    one.run(now_ms=NOW + Limits().alarm_repeat_ms)
    one.receive(told)
    assert [alarm.kind for alarm in one.run(now_ms=NOW + Limits().alarm_repeat_ms).alarms] == ["clone"]


def test_a_publish_under_an_id_that_names_another_message_is_refused() -> None:
    one = node()
    first = plain(PEER)
    one.run(first)
    other = Publish(message=Message(id=first.message.id, subject="a.b", body=b"y"), recipients=[PEER])
    ((_, error),) = one.run(other).failures
    assert isinstance(error, Conflict)
    assert len(one.journal.outbox) == 1


def test_a_greeting_that_cannot_be_sent_ends_the_dial_in_the_same_tick() -> None:
    one = Node()
    one.tick.add_peer(PEER)
    one.run()
    one.wire.send = lambda conn, frame: False  # type: ignore[method-assign]  # a full pipe
    one.tick.connected(CONN)
    one.run()
    assert one.wire.log == ["close"]
    assert one.tick.next_wake_ms() <= NOW + Limits().redial_ms_min


def test_frames_that_mean_nothing_are_counted_by_reason() -> None:
    one = node()
    one.receive(Frame(kind=99))
    one.receive(Frame(kind=frames.DATA, seq=1, flags=frames.FLAG_PACK, body=b"xx"))
    one.run()
    assert one.tick.refused == {"frame-type": 1, "frame-pack": 1}


# -- lifetimes --------------------------------------------------------------------------------------------------


def test_a_lifetime_starts_whole_and_is_over_by_the_steady_clock_alone() -> None:
    one = node()
    work = plain(PEER)
    work.ttl_ms = 1_000
    one.run(work)
    assert frames.ttls_of(one.wire.frames[-1]) == (1_000,)
    held = plain(PEER)
    held.ttl_ms = 1_000
    one.receive(Frame(kind=frames.CREDIT))
    one.run(held)
    one.receive(Frame(kind=frames.CREDIT, credit_messages=9, credit_kib=9))
    outcomes = [one.run(steady_ms=UTC + 1_000), one.run(steady_ms=UTC + 1_000)]
    assert [dead for outcome in outcomes for dead in outcome.dead] == [(held.message.id, PEER, "expired")]
    assert one.wire.log.count("DATA") == 1


def test_an_effect_that_failed_is_not_tried_again_after_the_lifetime_of_its_message() -> None:
    one = node()
    seen: list[int | None] = []

    def not_now(tx: Tx, envelope: Envelope) -> None:
        seen.append(envelope.ttl_ms)
        raise ValueError("not now")

    one.tick.add_effect("a.*", not_now)
    meta = f'{{"id":"{new_id(UTC)}","subject":"a.b"}}'.encode()
    one.receive(
        Frame(kind=frames.DATA, seq=1, version=2, flags=frames.FLAG_TTL, credit_kib=3_000, raw_meta=meta)
    )
    one.run()
    assert seen[0] == 3_000
    tries = len(seen)
    one.run(steady_ms=UTC + 2_999)
    assert len(seen) == tries + 2, "once with its batch, once alone"
    one.run(steady_ms=UTC + 1_000_000)
    assert len(seen) == tries + 2
    assert [row.state for row in one.journal.inbox.values()] == ["dead"]


# -- withdrawing a message --------------------------------------------------------------------------------------


def cancel(one: Node, message_id: str) -> dict[str, str]:
    ((_, (states, _)),) = one.run(Transact(fn=one.tick.cancel, args=(message_id,))).results
    return states  # type: ignore[no-any-return]  # as cancel says


def fresh(*to: str) -> Publish:
    """A publish under an id that was just made."""
    work = plain(*to)
    work.may_repeat = False
    return work


def questions(one: Node) -> list[Frame]:
    return [frame for frame in one.wire.frames if frame.kind == frames.REVOKE and not frame.flags]


def test_what_has_never_left_is_cancelled_at_once() -> None:
    one = node()
    one.receive(Frame(kind=frames.CREDIT))
    work = fresh(PEER)
    one.run(work)
    assert cancel(one, work.message.id) == {PEER: "cancelled"}
    one.receive(Frame(kind=frames.CREDIT, credit_messages=9, credit_kib=9))
    one.run()
    assert "DATA" not in one.wire.log
    assert [row.state for row in one.journal.outbox.values()] == ["cancelled"]


def test_what_may_have_left_is_asked_about_and_not_sent_again_before_the_answer() -> None:
    one = node()
    works = [fresh(PEER), fresh(PEER)]
    one.run(*works)
    for work in works:
        assert cancel(one, work.message.id) == {PEER: "revoking"}
    question = questions(one)[-1]
    ids = [work.message.id for work in works]
    assert (question.meta["ids"], len(question.body)) == (ids, 32)
    answer = Frame(kind=frames.REVOKE, flags=frames.FLAG_ANSWER, meta={"ids": ids, "have": [[1, 7]]})
    one.receive(answer)
    outcome = one.run()
    assert outcome.delivered == [(ids[1], PEER)]
    assert outcome.dead == [(ids[0], PEER, "cancelled")]
    assert [row.state for row in one.journal.outbox.values()] == ["cancelled", "delivered"]


def test_a_message_that_was_tried_before_under_its_own_id_is_asked_about() -> None:
    one = node()
    one.receive(Frame(kind=frames.CREDIT))
    work = plain(PEER)
    one.run(work)
    assert cancel(one, work.message.id) == {PEER: "revoking"}, (
        "an earlier try may have left before its commit failed"
    )


def test_a_node_that_is_asked_answers_after_its_commit_and_counts_what_came_before_the_question() -> None:
    one = node()
    message_id = one.deliver(1, "a.b")
    digest = digest_of(
        sender=PEER, lane=0, meta=f'{{"id":"{message_id}","subject":"a.b"}}'.encode(), body=b""
    )
    other = new_id(UTC)
    one.receive(Frame(kind=frames.REVOKE, meta={"ids": [message_id, other]}, body=digest * 2))
    one.run()
    assert one.wire.log == ["commit", "ACK", "REVOKE"]
    answer = one.wire.frames[-1]
    assert (answer.flags, answer.meta) == (frames.FLAG_ANSWER, {"ids": [message_id, other], "have": [(0, 1)]})


def test_a_failed_commit_answers_no_question() -> None:
    one = node()
    one.receive(Frame(kind=frames.REVOKE, meta={"ids": [new_id(UTC)]}, body=b"x" * 16))
    one.journal.fail = "commit"
    one.run()
    assert "REVOKE" not in one.wire.log


def test_what_is_to_be_withdrawn_is_asked_about_again_in_the_next_session() -> None:
    one = node()
    work = fresh(PEER)
    one.run(work)
    one.receive(Frame(kind=frames.BYE))
    assert cancel(one, work.message.id) == {PEER: "revoking"}
    assert questions(one) == []
    one.open_again()
    assert [question.meta["ids"] for question in questions(one)] == [[work.message.id]]
    assert "DATA" not in one.wire.log[-4:]


def test_a_peer_of_version_1_cannot_be_asked_and_gets_the_message() -> None:
    one = node()
    work = fresh(PEER)
    one.run(work)
    one.receive(Frame(kind=frames.BYE))
    cancel(one, work.message.id)
    one.open_again(version=1)
    assert questions(one) == []
    assert one.wire.log[-1] == "DATA"
    assert cancel(one, work.message.id) == {PEER: "queued"}


# -- messages that are never stored, and receipts ------------------------------------------------------------------


def listening(one: Node, *patterns: str) -> None:
    body = json.dumps(patterns).encode()
    one.receive(Frame(kind=frames.INTEREST, flags=frames.FLAG_EPHEMERAL, body=body))


def test_a_message_that_is_never_stored_goes_to_connected_listeners_without_a_commit() -> None:
    one = node()
    listening(one, "a.*")
    message = Message(id=new_id(UTC), subject="a.b", body=b"x")
    assert one.tick.send(message, None) == [PEER]
    assert one.tick.send(replace(message, subject="c.d"), None) == []
    assert one.wire.log == ["EPHEMERAL"]
    one.run()
    assert one.journal.outbox == {}
    one.receive(Frame(kind=frames.BYE))
    assert one.tick.send(message, None) == [], "who listens is forgotten with the session"
    assert one.tick.send(message, [PEER]) == []


def test_a_full_pipe_loses_such_a_message_and_not_the_session() -> None:
    one = node()
    one.wire.send = lambda conn, frame: False  # type: ignore[method-assign]  # a full pipe
    assert one.tick.send(Message(id=new_id(UTC), subject="a.b", body=b""), [PEER]) == []
    assert one.run().lost == []


def test_such_a_message_is_told_and_neither_stored_nor_acked() -> None:
    one = node()
    meta = f'{{"id":"{new_id(UTC)}","subject":"a.b"}}'.encode()
    one.receive(Frame(kind=frames.EPHEMERAL, raw_meta=meta, body=b"x"))
    one.receive(Frame(kind=frames.EPHEMERAL, raw_meta=b"{}", body=b"x"))
    outcome = one.run()
    assert [(e.sender, e.subject, e.row) for e in outcome.ephemerals] == [(PEER, "a.b", 0)]
    assert (one.wire.log, one.journal.inbox) == ([], {})
    assert one.tick.refused["ephemeral-malformed"] == 1


def deliver_wanting_receipt(one: Node, seq: int) -> str:
    message_id = new_id(UTC)
    meta = f'{{"id":"{message_id}","subject":"a.b","receipt":true}}'.encode()
    one.receive(Frame(kind=frames.DATA, seq=seq, raw_meta=meta))
    return message_id


def test_a_receipt_leaves_after_the_commit_in_which_the_message_was_done_with() -> None:
    one = node()
    one.tick.add_effect("a.*", lambda tx, envelope: None)
    wanting = deliver_wanting_receipt(one, 1)
    one.deliver(2, "a.b")
    one.run()
    assert one.wire.log == ["commit", "ACK", "RECEIPT"]
    receipt = one.wire.frames[-1]
    assert receipt.meta == {"ids": [wanting], "states": ["done"]}
    one.receive(Frame(kind=frames.BYE))
    one.open_again()
    told = [frame.meta for frame in one.wire.frames if frame.kind == frames.RECEIPT]
    assert told == [receipt.meta], "again, because it was not confirmed"
    one.receive(Frame(kind=frames.RECEIPT, flags=frames.FLAG_ANSWER, meta={"ids": [wanting]}))
    one.run()
    assert one.journal.receipts_due == {}


def test_a_message_given_up_on_earns_a_receipt_that_says_so() -> None:
    one = node()

    def poison(tx: Tx, envelope: Envelope) -> None:
        raise ValueError("never")

    one.tick.add_effect("a.*", poison)
    wanting = deliver_wanting_receipt(one, 1)
    for tries in range(12):
        one.run(steady_ms=UTC + tries * 1_000_000)
    receipt = next(frame for frame in one.wire.frames if frame.kind == frames.RECEIPT)
    assert receipt.meta == {"ids": [wanting], "states": ["dead"]}


@pytest.mark.parametrize("states", [None, [], ["lost"], [["done"]], [{}], ["done", "done"]])
def test_a_receipt_of_the_wrong_shape_ends_the_session_and_is_counted(states: object) -> None:
    one = node()
    one.receive(Frame(kind=frames.RECEIPT, meta={"ids": [new_id(UTC)], "states": states}))
    assert one.tick.refused["frame-metadata"] == 1
    assert one.run().receipts == []


def test_a_receipt_is_told_once_and_one_for_an_unknown_message_is_counted() -> None:
    one = node()
    work = plain(PEER)
    one.run(work)
    unknown = new_id(UTC)
    told = Frame(kind=frames.RECEIPT, meta={"ids": [work.message.id, unknown], "states": ["done", "done"]})
    one.wire.log.clear()
    one.receive(told)
    assert one.run().receipts == [(work.message.id, PEER, "done")]
    assert one.wire.log == ["commit", "RECEIPT"]
    assert one.wire.frames[-1].flags == frames.FLAG_ANSWER
    assert one.tick.refused["receipt-unknown"] == 1
    one.receive(told)
    assert one.run().receipts == []
