"""Find and end the processes of one laboratory run, and only those, by pid.

Every process of a run inherits HOME, which is a folder made for that run alone: that is how it is known. psutil
compares start times, so a pid that was given to somebody else meanwhile is never touched.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from tests.claude.waiting import until


def living_in(home: Path) -> list[psutil.Process]:
    """Return the processes that were started with this HOME and still run."""
    return [process for process in psutil.process_iter() if _home_of(process) == str(home)]


def end(process: psutil.Process, *, patience_s: float = 5.0) -> None:
    """Ask the process to end, insist after `patience_s`, and return when it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        if not until(lambda: _is_gone(process), timeout_s=patience_s):
            process.kill()
            until(lambda: _is_gone(process), timeout_s=patience_s)


def _home_of(process: psutil.Process) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get("HOME")
    except (psutil.Error, OSError):  # gone meanwhile, or another user's
        return None


def _is_gone(process: psutil.Process) -> bool:
    try:
        return (
            not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        )  # ended, not yet collected
    except psutil.NoSuchProcess:
        return True
