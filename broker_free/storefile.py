"""A store's file as a whole: copied, checked, looked into from outside, and what SQLite's errors say about it.

Knows SQLite and the disk, but no table beyond the schema's number, and no peewee.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from broker_free import faults
from broker_free.errors import DiskLow, InvalidInput, StoreBroken, StoreFailed
from broker_free.home import lock, unlock
from broker_free.schema import version_of

BEFORE_UPGRADE: Final = ".before-upgrade"  # the one older file that is kept beside the store

STORE: Final = "store.db"
OPEN_MARK: Final = ".open"  # exists beside the store while a node has it, and after one that did not close it

_BACKUP_CHECK_MS: Final = 60_000
_COPY_PAGES: Final = 256  # a step of a copy: the interpreter's lock is free meanwhile
_CHECK_STEPS: Final = 10_000  # of SQLite's machine between two looks at the clock
_PROBE_BYTES: Final = 128 * 1024

_SHM_SIZE: Final = (
    19 << 8 | sqlite3.SQLITE_IOERR
)  # SQLITE_IOERR_SHMSIZE: no room for the shared index of the log
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OF_THE_DISK: Final = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


# -- what an error means --------------------------------------------------------------------------------------


def sqlite_error_of(error: BaseException | None) -> sqlite3.Error | None:
    """Find SQLite's own error in what an object-relational layer or an application made of it."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__ or error.__context__
    return error


def is_of_the_disk(error: BaseException) -> bool:
    """Say whether an error is the disk's and not the fault of whoever ran the statement."""
    found = sqlite_error_of(error)
    code = getattr(found, "sqlite_errorcode", 0) & 0xFF
    return code == sqlite3.SQLITE_FULL or code in _OF_THE_DISK


def failure_of(error: BaseException, path: Path) -> StoreFailed:
    """Name what went wrong with the store at `path`: DiskLow, StoreBroken, or a StoreFailed that may pass."""
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return _disk_full(path, error.strerror or "no room")
        return StoreFailed(f"the store failed: {error}", hint=f"see the disk that holds {path}")
    found = sqlite_error_of(error)
    code = getattr(found, "sqlite_errorcode", 0)
    name = getattr(found, "sqlite_errorname", "")
    text = f"{error} ({name})" if name else str(error)
    if code & 0xFF == sqlite3.SQLITE_FULL or code == _SHM_SIZE:
        return _disk_full(path, text)
    if code == sqlite3.SQLITE_IOERR_WRITE and (why := no_room(path)):
        return _disk_full(path, why)
    if code & 0xFF in _OF_THE_DISK:
        return StoreBroken(
            f"the store cannot be trusted any more: {text}",
            hint=f"look at the disk that holds {path}, then restart the node; if that does not help, restore a backup",
        )
    return StoreFailed(f"the store failed: {text}", hint=f"see the disk that holds {path}")


def _disk_full(path: Path, text: str) -> DiskLow:
    return DiskLow(
        f"the disk is full: {text}", hint=f"free some space where {path.parent} is; nothing was accepted"
    )


def no_room(path: Path) -> str:
    """Say why files beside `path` cannot grow, or nothing when they can. SQLite knows the full disk alone."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with contextlib.suppress(OSError):
        largest = max((each.stat().st_size for each in (path, wal_of(path)) if each.exists()), default=0)
        if limit != resource.RLIM_INFINITY and largest + _PROBE_BYTES > limit:
            return f"the size limit of this process's files ({limit} bytes, ulimit -f)"
    probe = path.with_name(f".{path.name}.probe")
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(_PROBE_BYTES))
        finally:
            os.close(fd)
    except OSError as error:
        return error.strerror or "no room" if error.errno in _FULL else ""
    finally:
        probe.unlink(missing_ok=True)
    return ""


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _shm_of(path: Path) -> Path:
    return path.with_name(path.name + "-shm")


# -- copies ---------------------------------------------------------------------------------------------------


def copy_to(conn: sqlite3.Connection, path: Path, *, replace: bool) -> None:
    """Write a consistent copy of a store, whole or not at all: mode 0600, on disk when this returns.

    Raises FileExistsError unless it may `replace` what is there. The snapshot is held for as long as it takes, so
    that no commit starts the copy over; other connections go on meanwhile.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        copy = sqlite3.connect(draft, isolation_level=None)
        try:
            conn.execute("BEGIN")
            conn.execute("SELECT 1 FROM sqlite_schema").fetchone()
            conn.backup(copy, pages=_COPY_PAGES)
            # One plain file: a copy in WAL mode would grow companions as soon as somebody looks into it.
            copy.execute("PRAGMA journal_mode = delete")
        finally:
            copy.close()
            if conn.in_transaction:
                conn.execute("ROLLBACK")
        os.fsync(fd)
        faults.reach("copy-drafted")
        if replace:
            os.replace(draft, path)
        else:
            os.link(draft, path)
        sync_folder(path.parent)
    finally:
        os.close(fd)
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in a folder survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def backup(store: Path, target: Path) -> int:
    """Copy a store that may be in use to `target`, and check the copy; return its bytes. Never overwrites.

    The copy holds messages, members, the registry and the application's tables, and neither the node's keys nor its
    settings: it is of use only with them, and it makes nobody this node who does not have them.
    """
    if target.exists():
        raise InvalidInput(f"{target} exists; a backup overwrites nothing", hint="choose another name")
    if not target.parent.is_dir():
        raise InvalidInput(f"there is no folder {target.parent}", hint="make it first")
    try:
        with contextlib.closing(_reading(store)) as conn:
            copy_to(conn, target, replace=False)
        with contextlib.closing(_reading(target)) as conn:
            said = check(conn, ms_max=_BACKUP_CHECK_MS)
    except FileExistsError:
        raise InvalidInput(
            f"{target} exists; a backup overwrites nothing", hint="choose another name"
        ) from None
    except (OSError, sqlite3.Error) as error:
        failure = failure_of(error, target)
        raise type(failure)(f"no backup was made: {failure.message}", hint=failure.hint) from error
    if said not in ("ok", None):
        target.unlink()
        raise StoreBroken(
            f"the store is damaged, so no backup was made: {said}", hint="restore an older backup"
        )
    return target.stat().st_size


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None, timeout=5)


def restore(home: Path, copy: Path, *, now_ms: int) -> Path | None:
    """Put a backup in the place of the store of `home`; return where the replaced one is kept, if there was one.

    Refuses while a node has the home (NodeInUse), and a copy that is damaged, newer than this version or no store.
    Peers notice that this store went back in time and send again what they delivered of late.
    """
    store = home / STORE
    held = lock(home / "node.lock")
    try:
        with looking_into(copy) as conn:
            if not conn.execute("SELECT 1 FROM sqlite_schema WHERE name = 'outbox'").fetchone():
                raise InvalidInput(f"{copy} is a database, but not a store of a node")
            said = check(conn, ms_max=_BACKUP_CHECK_MS)
            if said not in ("ok", None):
                raise StoreBroken(f"{copy} is damaged: {said}", hint="restore another backup")
            draft = store.with_name(f".{STORE}.{secrets.token_hex(8)}")
            try:
                copy_to(conn, draft, replace=True)
                return _replace_store(store, draft, now_ms)
            finally:
                draft.unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        failure = failure_of(error, store)
        raise type(failure)(f"nothing was restored: {failure.message}", hint=failure.hint) from error
    finally:
        unlock(held)


def _replace_store(store: Path, draft: Path, now_ms: int) -> Path | None:
    """Swap the files. The log goes aside first: beside another file it would be replayed into that one."""
    kept = None
    if store.exists():
        kept = store.with_name(f"{STORE}.replaced-{now_ms}")
        os.link(store, kept)
        if wal_of(store).exists():
            os.rename(wal_of(store), wal_of(kept))
        _shm_of(store).unlink(missing_ok=True)
    os.replace(draft, store)
    store.with_name(store.name + OPEN_MARK).unlink(missing_ok=True)
    sync_folder(store.parent)
    return kept


# -- checks ---------------------------------------------------------------------------------------------------


def check(conn: sqlite3.Connection, *, ms_max: int) -> str | None:
    """Run SQLite's quick check for at most so long. Returns "ok", what is wrong, or None when time was up."""
    deadline = time.monotonic() + ms_max / 1_000
    conn.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
    try:
        rows = conn.execute("PRAGMA quick_check(3)").fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_INTERRUPT:
            return None
        raise
    finally:
        conn.set_progress_handler(None, 0)
    return "; ".join(" ".join(text.split()) for (text,) in rows)


# -- looking from outside -------------------------------------------------------------------------------------


@contextlib.contextmanager
def looking_into(path: Path) -> Iterator[sqlite3.Connection]:
    """Read a store that is not this process's own, in use or not, and leave no trace: nothing is created or changed.

    Raises InvalidInput where there is no store, UnsuitableHome for one of a newer version, StoreFailed for one that
    cannot be read.
    """
    if not path.exists():
        raise InvalidInput(f"there is no store at {path}")
    with contextlib.ExitStack() as opened:
        try:
            conn = _open_without_trace(path, opened)
            conn.execute("SELECT 1 FROM sqlite_schema").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise StoreFailed(f"cannot read the store {path}: {error}", hint="restore a backup") from error
        version_of(conn)
        yield conn


def _open_without_trace(path: Path, opened: contextlib.ExitStack) -> sqlite3.Connection:
    """Choose how: SQLite makes a log and its index even for a reader, unless it is told that nobody writes."""
    how = "mode=ro&readonly_shm=1"
    if not wal_of(path).exists():
        how = "mode=ro&immutable=1"  # closed cleanly: all there is, is in the one file
    elif not _shm_of(path).exists():
        # The log of a node that was killed, and no index to read it by: where there is none, one may be made.
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="broker-free-")))
        for each in (path, wal_of(path)):
            shutil.copyfile(each, folder / each.name)
        path = folder / path.name
        how = "mode=rw"
    conn = sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True, isolation_level=None)
    opened.callback(conn.close)
    conn.execute("PRAGMA query_only = on")
    return conn
