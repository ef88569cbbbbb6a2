"""Named points at which a test may kill, hold or watch a node. Does nothing unless armed; costs one dictionary look-up.

Across processes `BROKER_FREE_FAULT` says what happens at which point, clauses separated by semicolons:

    before-commit:kill          SIGKILL to itself when the point is passed
    before-commit:kill@3        at the third time
    early-data-sent:kill@3+50   50 ms after the third time, so that what was handed to the sockets has left
    before-commit:hold=/path    wait as long as that file exists; say by making `/path.reached` that it was reached

In one process: `hold(point)`, `watch(point, fn)`. A process arms itself by `arm_from(os.environ)`; nothing else does.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

# Each with the state of things at that moment. "On disk" is what a kill leaves; all else is gone.
POINTS: Final = {
    "key-draft-written": "the node's new keys are in a synced draft that has no name yet",
    "key-file-named": "the key file has its name; the folder is not synced",
    "in-migration": "the schema of a new or older store is written, not committed",
    "checkpointed": "after an unclean start the log is moved into the file, nothing else was written",
    "copy-drafted": "a backup, or the copy before an upgrade, is in a synced draft that has no name yet",
    "before-begin": "frames were taken in, nothing was written",
    "after-begin": "an empty transaction is open",
    "effect-applied": "an effect has written, its transaction is open",
    "early-data-sent": "DATA of plain publishes has left, its rows are not on disk",
    "before-commit": "every statement of a tick has run",
    "after-commit": "the tick is on disk, nobody was told",
    "before-ack": "arrivals are on disk, none is acknowledged",
    "after-ack": "acknowledged; who waits here was not told",
    "hello-sent": "this side has greeted",
    "hello-ok-sent": "this side has answered a greeting",
    "ready-sent": "the session is open here and opens there",
    "in-resync": "what a greeting said of messages in doubt is written, not committed",
    "in-requeue": "the retained window of a peer that went back in time is queued again, not committed",
    "registry-saved": "registry entries are written, not committed",
    "whereabouts-saved": "a peer's new name or addresses are written, not committed",
    "member-saved": "a member who joins is written and its one-time key struck, not committed",
    "member-admitted": "the member is on disk; its JOIN is not answered",
    "join-sent": "this side has asked to join",
    "inviter-saved": "the answer has come; the inviter is written, not committed",
    "inviter-admitted": "the inviter is on disk and may be dialled; the caller was not told",
    "keys-replaced": "the key file names this node's next key; it still uses the one before",
    "key-saved": "a peer's next key is written, not committed",
    "job-done": "a job is settled and its function has run, not committed",
    "pruned": "one slice of old rows is deleted, not committed",
}

_CLAUSE: Final = re.compile(r"([\w-]+):(?:kill(?:@([1-9]\d*))?(?:\+(\d+))?|hold=(.+))")

_armed: dict[str, Callable[[], None]] = {}


def reach(point: str) -> None:
    """Pass a point."""
    act = _armed.get(point)
    if act is not None:
        act()


def arm_from(env: Mapping[str, str]) -> None:
    """Arm what `BROKER_FREE_FAULT` says. Raises ValueError for a point or an action that does not exist."""
    for clause in filter(None, env.get("BROKER_FREE_FAULT", "").split(";")):
        read = _CLAUSE.fullmatch(clause)
        if read is None:
            raise ValueError(f"no fault {clause!r}; write POINT:kill, POINT:kill@N+MS or POINT:hold=PATH")
        point, passing, later_ms, path = read.groups()
        _check(point)
        _armed[point] = _holder(path) if path else _killer(int(passing or 1), int(later_ms or 0))


def _check(point: str) -> None:
    if point not in POINTS:
        raise ValueError(f"no fault point {point!r}; there are {', '.join(POINTS)}")


def _killer(passing: int, later_ms: int) -> Callable[[], None]:
    passed = 0

    def die() -> None:
        nonlocal passed
        passed += 1
        if passed == passing:
            time.sleep(later_ms / 1_000)
            os.kill(os.getpid(), signal.SIGKILL)

    return die


def _holder(path: str) -> Callable[[], None]:
    def wait() -> None:
        if os.path.exists(path):
            with open(f"{path}.reached", "w"):
                pass
            while os.path.exists(path):
                time.sleep(0.002)

    return wait


@contextmanager
def watch(point: str, fn: Callable[[], None]) -> Iterator[None]:
    """Call `fn` in every thread that passes `point`, until the end of the block."""
    _check(point)
    _armed[point] = fn
    try:
        yield
    finally:
        _armed.pop(point, None)


@dataclass(slots=True)
class Hold:
    reached: threading.Event = field(default_factory=threading.Event)
    _released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        self._released.set()

    def wait(self) -> None:
        self.reached.set()
        self._released.wait(30)


@contextmanager
def hold(point: str) -> Iterator[Hold]:
    """Hold every thread that reaches `point` until `release()` or the end of the block."""
    held = Hold()
    try:
        with watch(point, held.wait):
            yield held
    finally:
        held.release()
