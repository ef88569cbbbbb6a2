"""A state folder: private to its user, and held by one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import stat
from pathlib import Path
from typing import Final

from broker_free.errors import NodeInUse, UnsuitableHome

log = logging.getLogger("broker_free")

_OURS: Final = ("store.db", "node.", "blobs", "ballast")  # what the names of a node's files begin with

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


def check_files(home: Path) -> None:
    """Refuse files of a node that others may have written, and close those that others could read.

    The folder is private, so nobody can reach them now; whether that was so all the time, their modes tell.
    """
    found = [one for one in home.iterdir() if one.name.startswith(_OURS)]
    found += [one for folder in found if folder.is_dir() for one in folder.iterdir()]
    for path in found:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # a draft that its writer has just renamed
        if stat.S_ISLNK(status.st_mode):
            raise UnsuitableHome(f"{path} is a symbolic link", hint="put the file itself in its place")
        if status.st_uid != os.geteuid():
            raise UnsuitableHome(
                f"{path} belongs to another user (uid {status.st_uid})", hint="use a folder of your own"
            )
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o022:
            raise UnsuitableHome(
                f"{path} could be written by other users (mode {mode:04o})",
                hint=f"if you trust what is in it: chmod go-rwx {shlex.quote(str(path))}",
            )
        if mode & 0o077:
            path.chmod(mode & 0o700)
            log.warning("a file was open to other users", extra={"path": str(path), "mode": f"{mode:04o}"})


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
