"""Named points at which a test may hold or kill a node. Does nothing unless armed; costs one dictionary look-up.

Across processes: `BROKER_FREE_FAULT="before-commit:kill"` or `"before-commit:hold=/path"`, where the point waits as
long as that file exists and says that it was reached by making `/path.reached`. In one process: `hold(point)`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

POINTS = ("before-commit", "after-commit")

_armed: dict[str, Callable[[], None]] = {}


def reach(point: str) -> None:
    """Pass a point. Called by the owner thread."""
    act = _armed.get(point)
    if act is not None:
        act()


def arm_from(env: Mapping[str, str]) -> None:
    """Arm what `BROKER_FREE_FAULT` says: `point:kill` or `point:hold=PATH`, separated by semicolons."""
    for clause in filter(None, env.get("BROKER_FREE_FAULT", "").split(";")):
        point, _, action = clause.partition(":")
        if point not in POINTS:
            raise ValueError(f"no fault point {point!r}; there are {', '.join(POINTS)}")
        if action == "kill":
            _armed[point] = _kill
        elif action.startswith("hold="):
            _armed[point] = _holder(action.removeprefix("hold="))
        else:
            raise ValueError(f"no fault action {action!r}; there are kill and hold=PATH")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _holder(path: str) -> Callable[[], None]:
    def wait() -> None:
        if os.path.exists(path):
            with open(f"{path}.reached", "w"):
                pass
            while os.path.exists(path):
                time.sleep(0.002)

    return wait


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
    assert point in POINTS, point
    held = Hold()
    _armed[point] = held.wait
    try:
        yield held
    finally:
        _armed.pop(point, None)
        held.release()
