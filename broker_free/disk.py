"""Room on the disk: a floor below which nothing new is accepted, and a ballast that is thrown off when it is full.

On a full disk SQLite cannot even delete. So a file of some size lies beside the store; without it there is room again
to settle and to prune, and it comes back when there is plenty. Knows files and limits, no tables and no sockets.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from broker_free.errors import DiskFloor
from broker_free.limits import KIB, MIB, Limits
from broker_free.storefile import no_room

log = logging.getLogger("broker_free")

BALLAST: Final = "ballast"
_LOOK_MS: Final = 1_000
_WRITTEN_MAX: Final = 4  # a message is written to the log, to the file, and in parts to indexes of both
_PAGES_BYTES: Final = 8 * KIB  # the smallest takes some pages


class Disk:
    """Says whether there is room for more. One owner; asks the system once a second, not in every tick."""

    def __init__(self, store: Path, limits: Limits, *, free: Callable[[Path], int] | None = None) -> None:
        self._store = store
        self._limits = limits
        self._free = free or free_bytes
        self._ballast = store.with_name(BALLAST)
        self._look_at_ms = 0
        self._taken = 0  # bytes accepted since the last look
        self._headroom = 0  # above the floor at the last look
        self._is_full = False  # SQLite said so: free bytes alone do not prove the contrary
        self.is_low = False

    def admit(self, size: int) -> None:
        """Refuse a new message while room is low. Called for each: compares two numbers, nearly always."""
        self._taken += size + _PAGES_BYTES
        if self._taken * _WRITTEN_MAX > self._headroom and not self.is_low:
            self._look()
        if self.is_low:
            raise self.refusal()

    def refusal(self) -> DiskFloor:
        return DiskFloor(
            f"the disk that holds {self._store.parent} is nearly full:"
            f" {self._free(self._store.parent) // MIB} MiB are free",
            hint=f"free some space; sending resumes by itself at {self._resume_bytes() // MIB + 1} MiB",
        )

    def filled(self) -> None:
        """SQLite found no room: throw off the ballast, so that what makes room can be written."""
        self._is_full = self.is_low = True
        self._throw_off()

    def look(self, now_ms: int) -> bool:
        """Look again when it is time. Returns whether `is_low` has changed since the last call."""
        if now_ms < self._look_at_ms:
            return False
        self._look_at_ms = now_ms + _LOOK_MS
        return self._look()

    def _look(self) -> bool:
        was_low = self.is_low
        free = self._free(self._store.parent)
        self._taken = 0
        self._headroom = free - self._limits.disk_free_bytes_min
        if self.is_low:
            self.is_low = free < self._resume_bytes() or (self._is_full and no_room(self._store) != "")
        else:
            self.is_low = self._headroom < 0
        if not self.is_low:
            self._is_full = False
            self._take_on(free)
        return self.is_low != was_low

    def _resume_bytes(self) -> int:
        """An eighth above the floor, and the ballast: who sits on the line does not change sides all the time."""
        floor = self._limits.disk_free_bytes_min
        return floor + floor // 8 + (0 if self._ballast.exists() else self._limits.ballast_bytes)

    def _throw_off(self) -> None:
        try:
            self._ballast.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            log.error("cannot remove the ballast", extra={"reason": error.strerror})
            return
        log.warning("the disk is full: ballast removed", extra={"bytes": self._limits.ballast_bytes})

    def _take_on(self, free: int) -> None:
        size = self._limits.ballast_bytes
        if self._ballast.exists() or free - size < self._limits.disk_free_bytes_min:
            return
        draft = self._ballast.with_name(f".{BALLAST}")
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _reserve(fd, size)
            finally:
                os.close(fd)
            os.replace(draft, self._ballast)
        except OSError as error:
            draft.unlink(missing_ok=True)
            log.warning("cannot keep a ballast", extra={"reason": error.strerror})


def free_bytes(folder: Path) -> int:
    """Return what this user may still write."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _reserve(fd: int, size: int) -> None:
    """Give a file real blocks; a length alone takes none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    for _ in range(size // MIB or 1):  # macOS has no such call
        os.write(fd, bytes(min(size, MIB)))
