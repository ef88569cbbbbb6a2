"""A state folder: private to its user, and held by one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from broker_free.errors import NodeInUse, UnsuitableHome

_locks: set[int] = set()  # descriptors of the homes that this process holds


def make_private(home: Path) -> None:
    """Make the folder, or refuse one that others could read or change."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.stat()
    except OSError as error:
        raise UnsuitableHome(f"cannot use {home}: {error.strerror}", hint="choose another folder") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UnsuitableHome(
            f"{home} is not private (mode {status.st_mode & 0o777:o}, owner {status.st_uid})",
            hint=f"chmod 700 {home}",
        )


def lock(path: Path) -> int:
    """Take the home for this process. The kernel gives the lock back when the process ends, however it ends.

    A child that the host application forks shares the lock's open file, and would keep the home from the next
    node for as long as it lives; it lets go of it at once.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        pid = int(text) if text.isdigit() else None
        raise NodeInUse(f"already running, pid {pid or 'unknown'}", pid=pid) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    _locks.add(fd)
    return fd


def unlock(fd: int) -> None:
    """Give the home back."""
    _locks.discard(fd)
    os.close(fd)


def _let_go() -> None:
    for fd in _locks:
        os.close(fd)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)
