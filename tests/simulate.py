"""Run random fault schedules through the protocol core until one breaks a promise.

    python -m tests.simulate --seeds 20000              plain: crashes, cuts, failing commits, partitions, clocks
    python -m tests.simulate --seeds 20000 --rollback   and stores that go back in time
    python -m tests.simulate --seed 4711                one schedule, with a line for all that happens
    python -m tests.simulate --bug no-dedup             break the code on purpose: how many seeds until it shows?

The seed also draws the kind of schedule (PROFILES). Most are small (two or three nodes, some four operations and as
many faults, a second of simulated time), because a bug that needs a long one nearly always shows in a short one too,
and short ones are read with less pain; some have five to seven nodes, two ways between them, or stores that are put
back one after another.
`--profile` asks for one kind. Exit 1: a promise was broken; the seed and the invariant are printed, and `--seed`
replays it (with the same `--rollback`, `--profile`, `--bug`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from random import Random
from typing import Any

from broker_free import frames
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.link import Action, Held, Link, Queued
from broker_free.message import Envelope, Message, check_message
from broker_free.testing import SMALL, Cluster, Faults, SimJournal, Violation
from broker_free.tick import Accepted, Tick

# Bounds of every kind: a resync that lists one id or all, credit that is always or never used up, packs of one.
ONE_BY_ONE = replace(SMALL, credit_messages=1, pack_messages_max=1)
LIMITS = (
    SMALL,
    replace(SMALL, in_doubt_max=256),
    replace(SMALL, in_doubt_max=1, credit_messages=2, pack_messages_max=1),
    ONE_BY_ONE,
    Limits(),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A kind of schedule. What hides one bug shows another, so a seed also draws which kind it is."""

    name: str
    weight: int
    weight_rollback: int  # with stores that go back in time
    nodes: tuple[int, ...]
    ms: tuple[int, int]
    operations: tuple[int, int]
    faults: Faults = field(default_factory=Faults)
    limits: tuple[Limits, ...] = LIMITS
    in_bursts: bool = True


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="bursts",
            weight=94,
            weight_rollback=74,
            nodes=(2, 2, 2, 3),
            ms=(200, 1_200),
            operations=(2, 6),
        ),
        Profile(
            name="mesh",
            weight=2,
            weight_rollback=2,
            nodes=(5, 5, 5, 6, 7),
            ms=(500, 3_000),
            operations=(10, 25),
        ),
        Profile(
            name="paths",
            weight=4,
            weight_rollback=4,
            nodes=(2, 3),
            ms=(5_000, 20_000),
            operations=(8, 16),
            faults=Faults(detour=0.3, silence=0.1, cut=0.05, crash=0.05, ambush=0.05, part=0.0),
            in_bursts=False,
        ),
        Profile(
            name="restores",
            weight=0,
            weight_rollback=20,
            nodes=(2,),
            ms=(8_000, 20_000),
            operations=(2, 3),
            limits=(ONE_BY_ONE,),
            faults=Faults(
                crash=0.0,
                stop=0.0,
                silence=0.0,
                corrupt=0.0,
                part=0.0,
                detour=0.0,
                commit=0.0,
                hold=0.0,
                clock=0.0,
                doubt=2.0,
                backup=2.0,
                rollback=0.5,
                disaster=0.5,
            ),
            in_bursts=False,
        ),
    )
}


def run_seed(
    seed: int,
    *,
    rollback: bool = False,
    bug: Bug | None = None,
    profile: Profile | None = None,
    trace: Callable[[str], None] | None = None,
) -> Cluster:
    """Run one schedule and check it. Without a profile the seed draws one."""
    shape = Random(seed)
    kinds = list(PROFILES.values())
    weights = [kind.weight_rollback if rollback else kind.weight for kind in kinds]
    drawn = shape.choices(kinds, weights)[0]
    kind = profile or drawn
    faults = kind.faults
    if rollback and not faults.rollback:
        faults = replace(faults, rollback=0.2, backup=0.2, disaster=0.2)
    cluster = Cluster(
        seed,
        nodes=shape.choice(kind.nodes),
        limits=shape.choice(kind.limits),
        faults=faults,
        tick=bug.tick if bug else Tick,
        journal=bug.journal if bug else SimJournal,
        trace=trace,
    )
    cluster.chaos(
        ms=shape.randint(*kind.ms), operations=shape.randint(*kind.operations), in_bursts=kind.in_bursts
    )
    cluster.heal()
    cluster.check()
    return cluster


@dataclass(frozen=True, slots=True)
class Found:
    seed: int
    what: str


def search(
    start: int,
    seeds: int,
    *,
    rollback: bool = False,
    bug: Bug | None = None,
    profile: Profile | None = None,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Found | None:
    """Return the first seed that breaks a promise, or an assertion of the code itself.

    With several processes it is the same one: slices of the seeds are looked at in order. `progress` hears how many
    are done.
    """
    slices = [
        (first, min(_SLICE, start + seeds - first), rollback, bug and bug.name, profile and profile.name)
        for first in range(start, start + seeds, _SLICE)
    ]
    done = 0
    with contextlib.ExitStack() as stack:
        found: Iterable[Found | None] = map(_search_slice, slices)
        if processes > 1:
            pool = stack.enter_context(get_context("spawn").Pool(processes))
            found = pool.imap(_search_slice, slices)  # leaving the pool ends its processes
        for one, (_, number, *_) in zip(found, slices, strict=True):
            if one is not None:
                return one
            done += number
            if progress is not None:
                progress(done)
    return None


_SLICE = 100
_Slice = tuple[
    int, int, bool, str | None, str | None
]  # first seed, number, rollback, names of bug and profile


def _search_slice(asked: _Slice) -> Found | None:
    start, seeds, rollback, bug_name, profile_name = asked
    bug = BUGS[bug_name] if bug_name else None
    profile = PROFILES[profile_name] if profile_name else None
    with quiet(), without_gc():
        for seed in range(start, start + seeds):
            try:
                run_seed(seed, rollback=rollback, bug=bug, profile=profile).close()
            except Violation as violation:
                return Found(seed, str(violation))
            except AssertionError as error:
                return Found(seed, f"assertion: {error}")
    return None


@contextmanager
def without_gc() -> Iterator[None]:
    """Collect what clusters leave behind at the end of a slice, and not a hundred times within it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        if was:
            gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log of simulated disasters off the terminal; formatting it is also half the time of a run."""
    log = logging.getLogger("broker_free")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


# Bugs on purpose: each is a rule of the protocol, left out ------------------------------------------------------


class _NoDedup(SimJournal):
    def accept(
        self,
        sender: str,
        lane: int,
        records: Sequence[tuple[bytes, bytes]],
        now_ms: int,
        ttls: Sequence[int] = (),
    ) -> list[Accepted]:
        for meta, _ in records:
            self._delete(self.known, (sender, meta[7:43].decode()))
        return super().accept(sender, lane, records, now_ms, ttls)


class _NoRegressionCheck(SimJournal):
    def lacks(self, peer: str, message_id: str, row: int) -> bool:
        return False


class _IdWithoutRow(SimJournal):
    def lacks(self, peer: str, message_id: str, row: int) -> bool:
        return (peer, message_id) not in self.known


class _LastAckNotHighest(SimJournal):
    def note_acked(self, peer: str, message_id: str, row: int) -> None:
        self._set(self.acked, peer, (message_id, row))


class _PrefixResync(SimJournal):
    """Answer "all up to here" in place of "these"."""

    def held(self, peer: str, ids: Sequence[str], digests: Sequence[bytes]) -> Held:
        have = super().held(peer, ids, digests).have
        return Held([(index, have[-1][1]) for index in range(have[-1][0] + 1)] if have else [], [])


class _StaleAckLink(Link):
    def on_frame(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        if frame.kind == frames.ACK and self._session is not None:
            conn, frame = self._session.conn, replace(frame, session=self._session.id)
        return super().on_frame(conn, frame, now_ms)


class _NoGapCheckLink(Link):
    def _on_data(self, session: Any, frame: Frame, now_ms: int) -> list[Action]:  # Any: private to link
        session.expected_seq = frame.seq
        return super()._on_data(session, frame, now_ms)


class _TwoSessionsLink(Link):
    """Leave a superseded session open, so that its late DATA still counts."""

    def __init__(self, **arguments: Any) -> None:  # Any: Link's own
        super().__init__(**arguments)
        self.older: dict[int, Any] = {}

    def on_frame(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        older = self.older.get(frame.session)
        if frame.kind == frames.DATA and older is not None and frame.seq == older.expected_seq:
            return self._on_data(older, frame, now_ms)
        return super().on_frame(conn, frame, now_ms)

    def _end(self, reason: str, now_ms: int, *, say_bye: bool = True, close: bool = True) -> list[Action]:
        is_left_open = reason == "superseded"
        if is_left_open and self._session is not None:
            self.older[self._session.id] = self._session
        return super()._end(reason, now_ms, say_bye=say_bye, close=close and not is_left_open)


class _NewBeforeBacklogLink(Link):
    def offer(self, queued: Queued) -> bool:
        if not self._has_room():
            return False
        self._stage(queued)
        return True


class _StaleAck(Tick):
    link_type = _StaleAckLink


class _NoGapCheck(Tick):
    link_type = _NoGapCheckLink


class _TwoSessions(Tick):
    link_type = _TwoSessionsLink


class _NewBeforeBacklog(Tick):
    link_type = _NewBeforeBacklogLink


class _CancelWithoutAsking(Tick):
    """Call a message cancelled though it may be on its way."""

    def _may_have_left(self, peer: str, row: int) -> bool:
        return False


class _AnswerBeforeArrivals(Tick):
    """Say what is here before what came in front of the question is."""

    def _on_revoke(self, peer: str, frame: Frame) -> None:
        super()._on_revoke(peer, frame)
        for asked in self._inputs.asked:
            asked.held = self._journal.held(asked.peer, asked.ids, asked.digests)
        self._answer_asked(self._inputs)
        self._inputs.asked.clear()


class _AckBeforeCommit(Tick):
    def _write_inputs(self, inputs: Any, outcome: Any) -> None:  # Any: private to tick
        super()._write_inputs(inputs, outcome)
        self._acknowledge(inputs)


class _EarlyFromInside(Tick):
    """Let what a transaction publishes leave before its commit, as a plain publish may."""

    def queue(
        self, message: Message, recipients: Sequence[str] | None, ttl_ms: int | None, *, may_repeat: bool
    ) -> tuple[list[tuple[str, int]], list[Envelope]]:
        meta = check_message(message, self._limits)
        rows, arrivals = self._queue(message, meta, recipients, ttl_ms, may_repeat=may_repeat)
        for peer, row in rows:
            link = self.links[peer]
            if link.offer(Queued(row=row, id=message.id, meta=meta, body=message.body)):
                self._do(peer, link.flush())
        return rows, arrivals


class _MarksOutliveSession(Tick):
    def _forget_marks(self, peer: str) -> None:
        """Keep acks of a lost session and write them later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    name: str
    needs_rollback: bool = False
    tick: type[Tick] = Tick
    journal: type[SimJournal] = SimJournal
    profile: Profile | None = None  # where it shows most


BUGS = {
    bug.name: bug
    for bug in (
        Bug(name="no-dedup", journal=_NoDedup),
        Bug(name="stale-ack", tick=_StaleAck, profile=PROFILES["paths"]),
        Bug(name="no-gap-check", tick=_NoGapCheck),
        Bug(name="prefix-resync", journal=_PrefixResync),
        Bug(name="ack-before-commit", tick=_AckBeforeCommit),
        Bug(name="two-sessions", tick=_TwoSessions, profile=PROFILES["paths"]),
        Bug(name="early-from-inside", tick=_EarlyFromInside),
        Bug(name="new-before-backlog", tick=_NewBeforeBacklog),
        Bug(name="cancel-without-asking", tick=_CancelWithoutAsking),
        Bug(name="answer-before-arrivals", tick=_AnswerBeforeArrivals),
        Bug(name="no-regression-check", journal=_NoRegressionCheck, needs_rollback=True),
        Bug(name="id-without-row", journal=_IdWithoutRow, needs_rollback=True, profile=PROFILES["restores"]),
        Bug(
            name="marks-outlive-session",
            tick=_MarksOutliveSession,
            needs_rollback=True,
            profile=PROFILES["restores"],
        ),
        Bug(
            name="last-ack-not-highest",
            journal=_LastAckNotHighest,
            needs_rollback=True,
            profile=PROFILES["restores"],
        ),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="tests.simulate"
    )
    parser.add_argument("--seeds", type=int, default=2_000, help="how many schedules (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--rollback", action="store_true", help="let stores go back in time")
    parser.add_argument("--seed", type=int, help="run this one, telling all that happens")
    parser.add_argument("--profile", choices=PROFILES, help="only this kind of schedule")
    parser.add_argument("--bug", choices=BUGS, help="leave a rule of the protocol out")
    parser.add_argument("--processes", type=int, default=1, help="how many at once (default %(default)s)")
    asked = parser.parse_args(arguments)
    bug = BUGS[asked.bug] if asked.bug else None
    profile = PROFILES[asked.profile] if asked.profile else (bug and bug.profile)
    rollback = asked.rollback or (bug is not None and bug.needs_rollback)
    if asked.seed is not None:
        return _replay(asked.seed, rollback=rollback, bug=bug, profile=profile)
    began = time.perf_counter()

    def progress(done: int) -> None:
        rate = done / (time.perf_counter() - began)
        print(f"\r{done} of {asked.seeds}, {rate:.0f} a second ", end="", file=sys.stderr, flush=True)

    is_watched = sys.stderr.isatty()
    found = search(
        asked.start,
        asked.seeds,
        rollback=rollback,
        bug=bug,
        profile=profile,
        processes=asked.processes,
        progress=progress if is_watched else None,
    )
    if is_watched:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    done = found.seed - asked.start + 1 if found else asked.seeds
    taken = time.perf_counter() - began
    print(f"{done} schedules in {taken:.1f} s, {done / taken:.0f} a second")
    if found is None:
        return 0
    options = [
        f"--seed {found.seed}",
        "--rollback" if asked.rollback else "",
        f"--profile {asked.profile}" if asked.profile else "",
        f"--bug {asked.bug}" if asked.bug else "",
    ]
    print(f"seed {found.seed}: {found.what}")
    print(f"replay: python -m tests.simulate {' '.join(filter(None, options))}")
    return 1


def _replay(seed: int, *, rollback: bool, bug: Bug | None, profile: Profile | None) -> int:
    with quiet():
        try:
            cluster = run_seed(seed, rollback=rollback, bug=bug, profile=profile, trace=print)
        except AssertionError as error:
            print(error)
            return 1
    print(
        "what happened:",
        ", ".join(f"{what} {count}" for what, count in cluster.counts.most_common() if count),
    )
    print(f"every promise held; healed after {cluster.healed_ms} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
