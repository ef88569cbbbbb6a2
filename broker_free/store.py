"""The store: SQLite through peewee, the only truth of a node. The only importer of peewee in this package.

One process, one thread, one connection writes. Reads elsewhere go through `Reader`, which is read-only.

    peer      members of the mesh, this node included; what each last acked; what each is interested in
    message   metadata and body, once for all its recipients
    outbox    one row a recipient:  queued → delivered | expired | cancelled | dead
              ("in flight" is memory only, so a crash queues again by construction)
    inbox     one row a message that arrived:  new → claimed → done | dead
    seen      ids whose inbox row is gone, so that a late copy is still recognised
    job       an inbox row that waits for one durable consumer
    entry     of the replicated registry        invitation  one-time keys

Hot paths use constant SQL on peewee's connection (0.9 of raw sqlite3, where Model.create is 0.15); models do the
rest. Row numbers are given out here, not by SQLite, so that a batch goes through `executemany`. The newest row of
inbox and outbox is never pruned, so that no number is given to a second message: one that came back would break
order and the regression check. (AUTOINCREMENT does that too, for one page more in every commit.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import quote

import peewee as pw

from broker_free import faults
from broker_free.clock import Anchor, utc_ms
from broker_free.errors import (
    Conflict,
    DiskLow,
    InvalidInput,
    OutboxFull,
    StoreBroken,
    StoreFailed,
    UnknownBlob,
    UnsuitableHome,
)
from broker_free.limits import MIB, Limits
from broker_free.link import Held, Queued
from broker_free.membership import Member
from broker_free.message import (
    CONFLICT,
    Envelope,
    Message,
    digest_of,
    id_from_bytes,
    id_to_bytes,
    parse_metadata,
    refusal_of,
)
from broker_free.registry import Entry
from broker_free.schema import (
    SCHEMA_VERSION,
    Migrations,
    application_version,
    upgrade,
    upgrade_application,
    version_of,
)
from broker_free.storefile import (
    BEFORE_UPGRADE,
    OPEN_MARK,
    check,
    copy_to,
    failure_of,
    is_of_the_disk,
    sync_folder,
    wal_of,
)
from broker_free.subject import matches
from broker_free.tick import Accepted

QUEUED, DELIVERED, EXPIRED, CANCELLED, DEAD, QUARANTINED, REVOKING = range(7)
OUTBOX_STATES: Final = ("queued", "delivered", "expired", "cancelled", "dead", "quarantined", "revoking")
NEW, CLAIMED, DONE, INBOX_DEAD, INBOX_QUARANTINED = range(5)

DAMAGED: Final = "damaged on this node's disk"  # the reason of what is quarantined
_NOTES_MAX: Final = 100  # events waiting for the next house-keeping; what floods is counted, not kept
_PRUNE_SLICE: Final = 500  # rows a tick: long work is done in small slices
_IDS_A_QUERY: Final = 256
_WANTS_RECEIPT: Final = b'"receipt":true'  # in metadata; inside a text its quotes would be escaped
_LOOK_AGAIN_MS: Final = 1_000


class ThreadDatabase(pw.DatabaseProxy):
    """The database of the current thread: the owner's connection, or a read-only one in a reading thread.

    Models are bound to this for good, so two nodes in one process do not take each other's, and a model touched
    from any other thread is an error, not a silent second connection.
    """

    __slots__ = ()
    _local = threading.local()

    def __setattr__(self, name: str, value: Any) -> None:  # the parent's accepts only names in its own slots
        object.__setattr__(self, name, value)

    @property
    def obj(self) -> pw.Database | None:
        return getattr(self._local, "database", None)

    @obj.setter
    def obj(self, database: pw.Database | None) -> None:
        self._local.database = database

    def __getattr__(self, name: str) -> Any:  # peewee's own attribute
        database = self.obj
        if database is None:
            raise pw.InterfaceError(
                "this thread has no database: use models only inside node.transact, an effect or node.read"
            )
        return getattr(database, name)


log = logging.getLogger("broker_free")

CURRENT = ThreadDatabase()


class _Table(pw.Model):
    class Meta:
        database = CURRENT


class Peer(_Table):
    id = pw.AutoField()
    node_id = pw.TextField(unique=True)
    name = pw.TextField(default="")
    public_key = pw.BlobField(default=b"")
    endpoints = pw.TextField(default="[]")
    beat_endpoint = pw.TextField(default="")
    interests = pw.TextField(default="[]")
    acked_id = pw.BlobField(null=True)
    acked_row = pw.IntegerField(null=True)
    pruned_row = pw.IntegerField(default=0)
    is_member = pw.BooleanField(default=False)
    added_ms = pw.IntegerField(default=0)
    seen_ms = pw.IntegerField(default=0)

    class Meta:
        table_name = "peer"


_PRAGMAS: Final = (
    ("journal_mode", "wal"),
    ("synchronous", "full"),  # the only setting that keeps an acknowledged row through a power loss
    ("busy_timeout", 5_000),
    ("foreign_keys", "on"),
    ("trusted_schema", "off"),
    ("journal_size_limit", 64 * MIB),
    ("wal_autocheckpoint", 250),  # short stalls: p99 of a commit grows with the pages a checkpoint moves
    ("fullfsync", 1),  # macOS: a plain fsync there does not reach the platter
    ("checkpoint_fullfsync", 1),
)

_INSERT_INBOX: Final = """INSERT INTO inbox
    (row, peer, msg_id, lane, meta, body, digest, state, arrived_ms) VALUES (?,?,?,?,?,?,?,?,?)"""
_INSERT_MESSAGE: Final = "INSERT INTO message (id, msg_id, meta, body, digest, refs) VALUES (?,?,?,?,?,?)"
_INSERT_OUTBOX: Final = """INSERT INTO outbox
    (row, peer, msg_id, message, bytes, queued_ms, expires_ms, is_timed, may_repeat)
    VALUES (?,?,?,?,?,?,?,?,?)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to this node and that its owner may want to know later."""

    id: int  # grows
    at_ms: int  # UTC
    kind: str
    peer: str  # node id, or empty
    detail: str


@dataclass(slots=True)
class _Count:
    """Queued messages and bytes of one peer, never too low; counted again when a limit seems reached."""

    messages: int = 0
    size: int = 0
    settled: int = -1  # what `Store._settlements` was when they were counted


class _Translating:
    """A block whose errors of SQLite and of the disk become this package's.

    A class, and one object for all blocks: a generator costs four times as much, five times in each transaction.
    """

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, sqlite3.Error | pw.PeeweeException | OSError):
            raise failure_of(error, self._path) from error


class Store:
    """The writing side. Opened, used and closed by the owner thread alone."""

    def __init__(
        self,
        path: Path,
        *,
        me: str,
        limits: Limits,
        models: Sequence[type[pw.Model]] = (),
        migrations: Migrations | None = None,
    ) -> None:
        self._path = path
        self._translating = _Translating(path)
        self._me = me
        self._limits = limits
        self._models = tuple(models)
        self._migrations = migrations
        self._db = pw.SqliteDatabase(str(path), pragmas=_PRAGMAS, autoconnect=False, lock_type="IMMEDIATE")
        self._conn: sqlite3.Connection
        self._txn: Any = None  # peewee's transaction object has no public type
        self._peer_ids: dict[str, int] = {}
        self._peer_names: dict[int, str] = {}
        self._consumers: list[tuple[int, str]] = []
        self._counts: dict[int, _Count] = {}
        self._total = _Count(size=limits.outboxes_bytes_max)
        self._settlements = 0  # grows when outbox rows may have left the queue
        self._settled: list[int] = []
        self._new_messages: list[tuple[object, ...]] = []  # taken by enqueue, not yet inserted
        self._new_outbox: list[tuple[object, ...]] = []
        self._born_done: set[int] = set()
        self.has_effect: Callable[[str], object] = lambda subject: (
            False
        )  # the tick's effects, once there is one
        self._next_inbox = self._next_outbox = self._next_message = 1
        self._next_due_ms: int | None = None
        self._has_seen = False
        self.backlog = 0
        self.receipt_peers: set[str] = set()  # whom to tell of receipts once this transaction is on disk
        # Steady; when `expire` may have something to do, never too late.
        self.next_expiry_ms: int | None = None
        self._notes: list[tuple[int, str, str, str]] = []  # events to be written with the next house-keeping
        self._notes_lost = 0
        self._notes_written = 0  # of them, in the transaction that is open
        self._bad_outbox: dict[int, tuple[str, str]] = {}  # row -> (message id, peer): found, not written yet
        self._bad_inbox: set[int] = set()
        self._bad_written: tuple[list[int], list[int]] = ([], [])
        self.quarantined = 0

    # -- life -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open or create the file, check it, and bind this thread's models to it."""
        mark = self._path.with_name(self._path.name + OPEN_MARK)
        was_open = mark.exists()
        had_log = wal_of(self._path).exists()
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            os.close(os.open(mark, os.O_CREAT | os.O_RDWR, 0o600))
            sync_folder(self._path.parent)
            self._db.connect()
            self._conn = self._db.connection()  # type: ignore[no-untyped-call]  # the stubs leave it out
            self._conn.create_function("bf_subject", 1, _subject_of, deterministic=True)
        except (OSError, sqlite3.Error, pw.PeeweeException) as error:
            raise self._unopenable(error) from error
        CURRENT.obj = self._db
        try:
            with self._translating:
                version_of(self._conn)
                self._check(was_open=was_open, had_log=had_log)
                self._upgrade()
                self._load()
        except StoreBroken as error:
            self.abandon()
            raise self._unopenable(error) from error
        except UnsuitableHome as error:
            self.close()
            raise UnsuitableHome(f"{self._path}: {error.message}", hint=error.hint) from None
        except BaseException:
            self.close()
            raise

    def _unopenable(self, error: Exception) -> StoreFailed:
        failure = failure_of(error, self._path)
        if isinstance(failure, DiskLow):
            return failure
        return StoreBroken(
            f"cannot open the store {self._path}: {error}",
            hint="restore a backup (it keeps this file aside), or move the file away: peers send again what"
            " they delivered of late",
        )

    def _check(self, *, was_open: bool, had_log: bool) -> None:
        """Look at the file before anything is written to it: longer when it was not closed in order."""
        limits = self._limits
        said = check(self._conn, ms_max=limits.check_ms_max if was_open else limits.check_ms_max_clean)
        if said not in (None, "ok"):
            raise StoreBroken(f"the check found damage: {said}")
        if not was_open:
            return
        # After a sync that failed, parts of the log may be in memory alone: move all of it into the file, anew.
        self._conn.execute("PRAGMA wal_checkpoint(truncate)")
        faults.reach("checkpointed")
        self.note("unclean-start", f"quick check: {said or f'not finished in {limits.check_ms_max} ms'}")
        log.warning("the store was not closed in order", extra={"check": said or "unfinished"})
        if not had_log:
            self.note("log-missing", "the store's log (-wal) is gone: what was committed last may be, too")

    def _upgrade(self) -> None:
        """Bring the tables of this package and of the application up to date, in one transaction."""
        for model in self._models:
            model._meta.set_database(CURRENT)
        version = version_of(self._conn)
        names = [model._meta.table_name for model in self._models]
        known = application_version(self._conn, self._migrations, names) if self._migrations else None
        is_old = version < SCHEMA_VERSION or (
            self._migrations is not None and known is not None and known < self._migrations.version
        )
        if is_old and version > 0:
            log.info("upgrading the store", extra={"schema": version, "to": SCHEMA_VERSION})
            copy_to(self._conn, self._path.with_name(self._path.name + BEFORE_UPGRADE), replace=True)
        with self._db.atomic():
            if version < SCHEMA_VERSION:
                upgrade(self._conn, version)
                faults.reach("in-migration")
            if self._migrations is not None and known != self._migrations.version:
                upgrade_application(self._conn, self._migrations, known)
            if self._models:
                self._db.create_tables(self._models, safe=True)

    def close(self) -> None:
        """Close in order: SQLite moves its log into the file, and the next start finds everything in one place."""
        CURRENT.obj = None
        self._db.close()
        self._path.with_name(self._path.name + OPEN_MARK).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Let go of a file that failed without touching it again: no sync is tried twice, no log is moved.

        The next start finds the mark of a store that was not closed, checks the file and recovers its log.
        """
        CURRENT.obj = None
        if not hasattr(self, "_conn"):
            self._db.close()
            return
        # SQLite moves the log when the last connection closes. This one cannot, so the writer is not the last.
        with contextlib.suppress(sqlite3.Error):
            last = sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True, isolation_level=None)
            with contextlib.suppress(sqlite3.Error):
                last.execute("SELECT 1 FROM sqlite_schema").fetchone()
            self._conn.close()
            last.close()

    def _load(self) -> None:
        """Read into memory what would otherwise be asked for in every tick."""
        one = self._conn.execute
        self._next_inbox = one("SELECT coalesce(max(row), 0) + 1 FROM inbox").fetchone()[0]
        self._next_outbox = one("SELECT coalesce(max(row), 0) + 1 FROM outbox").fetchone()[0]
        self._next_message = one("SELECT coalesce(max(id), 0) + 1 FROM message").fetchone()[0]
        self._peer_ids = dict(one("SELECT node_id, id FROM peer").fetchall())
        self._peer_names = {number: node_id for node_id, number in self._peer_ids.items()}
        self._consumers = one("SELECT id, pattern FROM consumer").fetchall()
        self._has_seen = one("SELECT EXISTS (SELECT 1 FROM seen)").fetchone()[0] == 1
        self._recount_waiting()
        self._find_next_expiry()
        self._counts = {}
        self._total = _Count(size=self._limits.outboxes_bytes_max)
        self._settled = []
        self._forget_queued()
        self._born_done = set()
        self._notes_written = 0
        self._bad_written = ([], [])
        self.quarantined = one(
            f"SELECT (SELECT count(*) FROM inbox WHERE state = {INBOX_QUARANTINED})"
            f" + (SELECT count(*) FROM outbox WHERE state = {QUARANTINED})"
        ).fetchone()[0]

    @property
    def newest_row(self) -> int:
        """The newest inbox row."""
        return self._next_inbox - 1

    def _find_next_expiry(self) -> None:
        self.next_expiry_ms = self._conn.execute(
            f"SELECT min(at) FROM (SELECT min(expires_ms) AS at FROM outbox WHERE state = {QUEUED}"
            f" UNION ALL SELECT min(expires_ms) FROM outbox WHERE state = {REVOKING}"
            " UNION ALL SELECT min(expires_ms) FROM lifetime)"
        ).fetchone()[0]

    # -- transactions ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        faults.reach("before-begin")
        with self._translating:
            self._conn.execute("BEGIN IMMEDIATE")
            self._txn = self._db.transaction()
            self._db.push_transaction(self._txn)  # an application's atomic() is a savepoint inside this one
        faults.reach("after-begin")

    def commit(self) -> None:
        """Make the transaction durable: when this returns, its rows survive a power loss."""
        with self._translating:
            self.write_queued()
            if self._settled:
                self._conn.executemany(
                    f"UPDATE inbox SET state = {DONE}, due_ms = NULL WHERE row = ?"
                    " AND NOT EXISTS (SELECT 1 FROM job WHERE job.row = inbox.row)",
                    [(row,) for row in self._settled],
                )
                self._settled = []
            self._born_done.clear()
            faults.reach("before-commit")
            self._conn.execute("COMMIT")
            self._txn = None
            self._db.pop_transaction()  # type: ignore[no-untyped-call]  # the stubs leave its types out
            if self._notes_written:
                self._forget_notes()
            faults.reach("after-commit")

    def rollback(self) -> None:
        """Undo the transaction, if one is open, and forget what memory took from it."""
        transaction, self._txn = self._txn, None
        try:
            if transaction is not None:
                self._db.pop_transaction()  # type: ignore[no-untyped-call]  # the stubs leave its types out
                if self._conn.in_transaction:  # some errors end it by themselves
                    self._conn.execute("ROLLBACK")
            with self._translating:
                self._load()
        except (pw.PeeweeException, sqlite3.Error, StoreFailed) as error:
            raise StoreBroken(f"the store cannot roll back: {error}", hint="restart the node") from error

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what the block wrote if it raises, and nothing else."""
        self.write_queued()
        with self._translating:
            self._conn.execute("SAVEPOINT bf")  # nests: the innermost of a name is meant
        settled, backlog = len(self._settled), self.backlog
        try:
            yield
        except BaseException as error:
            with self._translating:
                self._conn.execute("ROLLBACK TO bf")
                self._conn.execute("RELEASE bf")
            del self._settled[settled:]
            self.backlog = backlog
            self._forget_queued()
            self._counts = {}
            self._total = _Count(size=self._limits.outboxes_bytes_max)
            if isinstance(error, Exception) and is_of_the_disk(error):
                # Not the caller's fault: the whole transaction fails.
                raise failure_of(error, self._path) from error
            raise
        self.write_queued()
        with self._translating:
            self._conn.execute("RELEASE bf")

    # -- events and what is quarantined ---------------------------------------------------------------------

    def record(self, kind: str, detail: str, *, now_ms: int, peer: str = "") -> None:
        """Write an event in the transaction that is open."""
        self._record([(now_ms, kind, peer, detail[:500])])

    def note(self, kind: str, detail: str, *, peer: str = "") -> None:
        """Write an event with the next house-keeping. For what happens outside a transaction, or floods."""
        if len(self._notes) >= _NOTES_MAX:
            self._notes_lost += 1
            return
        self._notes.append((utc_ms(), kind, peer, detail[:500]))

    @property
    def has_notes(self) -> bool:
        return bool(self._notes or self._bad_outbox or self._bad_inbox)

    def write_notes(self, now_ms: int) -> list[tuple[str, str]]:
        """Write what was noted and quarantined meanwhile; return (message id, peer) of what will never leave."""
        notes = list(self._notes)
        if self._notes_lost:
            notes.append((now_ms, "events-lost", "", f"{self._notes_lost} more at that time"))
        self._notes_written = max(len(self._notes), 1)
        self._bad_written = (list(self._bad_outbox), list(self._bad_inbox))
        with self._translating:
            self._conn.executemany(
                f"UPDATE outbox SET state = {QUARANTINED}, reason = ? WHERE row = ?",
                [(DAMAGED, row) for row in self._bad_outbox],
            )
            self._conn.executemany(
                f"UPDATE inbox SET state = {INBOX_QUARANTINED}, due_ms = NULL, reason = ? WHERE row = ?",
                [(DAMAGED, row) for row in self._bad_inbox],
            )
        self._record(notes)
        return list(self._bad_outbox.values())

    def _record(self, events: Sequence[tuple[int, str, str, str]]) -> None:
        with self._translating:
            self._conn.executemany("INSERT INTO event (at_ms, kind, peer, detail) VALUES (?,?,?,?)", events)
            self._conn.execute(
                "DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - ?", (self._limits.events_max,)
            )

    def _forget_notes(self) -> None:
        """What was noted is on disk."""
        del self._notes[: self._notes_written]
        self._notes_written = self._notes_lost = 0
        for row in self._bad_written[0]:
            self._bad_outbox.pop(row, None)
        self._bad_inbox.difference_update(self._bad_written[1])
        self._bad_written = ([], [])

    def _quarantine(self, box: str, row: int, message_id: str, peer: str) -> None:
        """Hand a damaged message to nobody from now on. Its row stays: somebody may want to look at it."""
        if box == "outbox":
            self._bad_outbox[row] = (message_id, peer)
        else:
            self._bad_inbox.add(row)
        self.quarantined += 1
        log.error("message quarantined", extra={"box": box, "row": row, "id": message_id, "peer": peer})
        self.note("quarantine", f"{box} row {row}, message {message_id}: {DAMAGED}", peer=peer)

    # -- the inbox ------------------------------------------------------------------------------------------

    def accept(
        self,
        sender: str,
        lane: int,
        records: Sequence[tuple[bytes, bytes]],
        now_ms: int,
        ttls: Sequence[int] = (),
    ) -> list[Accepted]:
        peer = self._peer_id(sender)
        parsed: list[tuple[bytes, bytes, bytes, Message] | str] = []
        for meta, body in records:
            try:
                message = parse_metadata(meta, body, self._limits)
            except InvalidInput as error:
                parsed.append(refusal_of(error))
                continue
            digest = digest_of(sender=sender, lane=lane, meta=meta, body=body)
            parsed.append((id_to_bytes(message.id), meta, digest, message))
        # All are new, nearly always: insert, and look for those that were here only when one was.
        ids = [one[0] for one in parsed if not isinstance(one, str)]
        known = self._known(peer, ids) if self._has_seen else {}
        first = self._next_inbox
        accepted = self._insert(sender, peer, lane=lane, parsed=parsed, known=known, now_ms=now_ms)
        if accepted is None:
            self._next_inbox = first
            accepted = self._insert(
                sender, peer, lane=lane, parsed=parsed, known=self._known(peer, ids), now_ms=now_ms
            )
            assert accepted is not None, "what is not known can be inserted"
        if ttls:
            self._limit_lives(accepted, ttls, now_ms)
        return accepted

    def _limit_lives(self, accepted: Sequence[Accepted], ttls: Sequence[int], now_ms: int) -> None:
        """Write down until when new messages may be handed out, and tell their effects what remains."""
        limited: list[tuple[int, int]] = []
        for one, ttl_ms in zip(accepted, ttls, strict=True):
            if ttl_ms and one.envelope is not None:
                one.envelope = replace(one.envelope, ttl_ms=ttl_ms)
                limited.append((one.row, now_ms + ttl_ms))
                self._expect_expiry(now_ms + ttl_ms)
        with self._translating:
            self._conn.executemany("INSERT INTO lifetime (row, expires_ms) VALUES (?, ?)", limited)

    def _expect_expiry(self, at_ms: int) -> None:
        if self.next_expiry_ms is None or at_ms < self.next_expiry_ms:
            self.next_expiry_ms = at_ms

    def _insert(
        self,
        sender: str,
        peer: int,
        *,
        lane: int,
        parsed: Sequence[tuple[bytes, bytes, bytes, Message] | str],
        known: dict[bytes, tuple[int, bytes]],
        now_ms: int,
    ) -> list[Accepted] | None:
        """Insert what is not `known`. None, and nothing changed, when one of them was here all the same."""
        first_row = self._next_inbox
        rows: list[tuple[object, ...]] = []
        jobs: list[tuple[int, int]] = []
        accepted: list[Accepted] = []
        for one in parsed:
            if isinstance(one, str):
                accepted.append(Accepted(refused=one))
                continue
            raw_id, meta, digest, message = one
            copy = known.get(raw_id)
            if copy is not None:
                same = copy[1] == digest
                accepted.append(Accepted(row=copy[0]) if same else Accepted(refused=CONFLICT))
                continue
            row = self._next_inbox
            self._next_inbox += 1
            known[raw_id] = (row, digest)
            state = NEW
            for number, pattern in self._consumers:
                if matches(pattern, message.subject):
                    jobs.append((number, row))
                    state = CLAIMED
            if state == NEW and self.has_effect(message.subject):
                state = DONE  # its effect runs in this very transaction
                self._born_done.add(row)
            rows.append((row, peer, raw_id, lane, meta, message.body, digest, state, now_ms))
            accepted.append(Accepted(row=row, envelope=_envelope(row, sender, message)))
        with self._translating:
            try:
                self._conn.executemany(_INSERT_INBOX, rows)
            except sqlite3.IntegrityError:
                self._conn.execute("DELETE FROM inbox WHERE row >= ?", (first_row,))  # those before it are in
                self._born_done.difference_update(range(first_row, self._next_inbox))
                return None
            if jobs:
                self._conn.executemany("INSERT INTO job (consumer, row) VALUES (?, ?)", jobs)
                self.backlog += len(jobs)
        return accepted

    def _known(self, peer: int, ids: Sequence[bytes]) -> dict[bytes, tuple[int, bytes]]:
        """Return (row, digest) of those ids that are here or were here."""
        known: dict[bytes, tuple[int, bytes]] = {}
        for table in ("inbox", "seen") if self._has_seen else ("inbox",):
            for at in range(0, len(ids), _IDS_A_QUERY):
                some = ids[at : at + _IDS_A_QUERY]
                marks = ",".join("?" * len(some))
                sql = f"SELECT msg_id, row, digest FROM {table} WHERE peer = ? AND msg_id IN ({marks})"
                with self._translating:
                    found = self._conn.execute(sql, (peer, *some)).fetchall()
                known.update({raw_id: (row, digest) for raw_id, row, digest in found})
        return known

    def settle(self, row: int) -> None:
        if row not in self._born_done:
            self._settled.append(row)

    def failed(self, row: int, reason: str, now_ms: int) -> None:
        with self._translating:
            (attempts,) = self._conn.execute(
                "SELECT attempts + 1 FROM inbox WHERE row = ?", (row,)
            ).fetchone()
            is_dead = attempts >= self._limits.deliveries_max
            due_ms = None if is_dead else now_ms + min(1_000 << attempts, 300_000)
            self._conn.execute(
                "UPDATE inbox SET state = ?, attempts = ?, due_ms = ?, reason = ? WHERE row = ?",
                (INBOX_DEAD if is_dead else NEW, attempts, due_ms, reason, row),
            )
        if is_dead:
            self._record([(utc_ms(), "dead-letter", "", f"inbox row {row}, {attempts} tries: {reason}")])
            self.note_receipt(row, "dead", now_ms)
        if due_ms is not None:
            self.backlog += 1
            self._next_due_ms = min(due_ms, self._next_due_ms or due_ms)

    def has_due(self, now_ms: int) -> bool:
        return self._next_due_ms is not None and now_ms >= self._next_due_ms

    def due(self, now_ms: int, limit: int) -> list[Envelope]:
        if not self.has_due(now_ms):
            return []
        with self._translating:
            over = self._conn.execute(
                f"UPDATE inbox SET state = {INBOX_DEAD}, due_ms = NULL, reason = 'expired' WHERE due_ms <= ?"
                " AND row IN (SELECT row FROM lifetime WHERE expires_ms <= ?)",
                (now_ms, now_ms),
            )
            self.backlog -= over.rowcount
            rows = self._conn.execute(
                "SELECT row, peer, meta, body, lane, digest, msg_id FROM inbox WHERE due_ms <= ?"
                " ORDER BY row LIMIT ?",
                (now_ms, limit),
            ).fetchall()
            self._conn.executemany(
                "UPDATE inbox SET due_ms = NULL WHERE row = ?", [(row[0],) for row in rows]
            )
            self.backlog -= len(rows)
            self._next_due_ms = self._conn.execute(
                "SELECT min(due_ms) FROM inbox WHERE due_ms IS NOT NULL"
            ).fetchone()[0]
        return [envelope for envelope in map(self._read_envelope, rows) if envelope]

    def _read_envelope(self, found: Sequence[Any]) -> Envelope | None:  # Any: columns of a row
        """Make of a row what is handed over. None for a damaged one: pages have no checksums, so messages do."""
        row, peer, meta, body, lane, digest, raw_id = found
        sender = self._peer_names.get(peer, "")
        if _is_sound(digest, sender=sender, lane=lane, meta=meta, body=body):
            return _envelope(row, sender, parse_metadata(meta, body, self._limits))
        if row not in self._bad_inbox:
            self._quarantine("inbox", row, _shown_id(raw_id), sender)
        return None

    # -- durable consumers ----------------------------------------------------------------------------------

    def consumer_open(self, name: str, pattern: str) -> int:
        """Make or find a durable consumer. A new one is given what has arrived and nobody has claimed."""
        with self._translating:
            found = self._conn.execute("SELECT id, pattern FROM consumer WHERE name = ?", (name,)).fetchone()
            if found is not None:
                if found[1] != pattern:
                    raise InvalidInput(
                        f"the durable {name!r} listens to {found[1]!r}, not {pattern!r}",
                        hint="take another durable name",
                    )
                return int(found[0])
            number = self._conn.execute(
                "INSERT INTO consumer (name, pattern) VALUES (?, ?) RETURNING id", (name, pattern)
            ).fetchone()[0]
            unclaimed = self._conn.execute(
                f"SELECT row, bf_subject(meta) FROM inbox WHERE state = {NEW} AND due_ms IS NULL"
            ).fetchall()
            rows = [row for row, subject in unclaimed if matches(pattern, subject)]
            self._conn.executemany(
                "INSERT INTO job (consumer, row) VALUES (?, ?)", [(number, row) for row in rows]
            )
            self._conn.executemany(
                f"UPDATE inbox SET state = {CLAIMED} WHERE row = ?", [(row,) for row in rows]
            )
            self.backlog += len(rows)
        self._consumers.append((number, pattern))
        return int(number)

    def patterns(self) -> list[str]:
        """Return what the durable consumers listen to, whether or not anybody consumes just now."""
        return [pattern for _, pattern in self._consumers]

    def jobs(
        self, consumer: int, *, now_ms: int, limit: int, leave_out: set[int]
    ) -> list[tuple[Envelope, int]]:
        """Return (envelope, attempts so far) of jobs that are due, oldest first, without those in `leave_out`."""
        with self._translating:
            rows = self._conn.execute(
                "SELECT j.row, i.peer, i.meta, i.body, i.lane, i.digest, i.msg_id, j.attempts"
                " FROM job j LEFT JOIN inbox i ON i.row = j.row"
                f" WHERE j.consumer = ? AND j.due_ms <= ? AND i.state IS NOT {INBOX_QUARANTINED}"
                " AND NOT EXISTS (SELECT 1 FROM lifetime WHERE lifetime.row = j.row AND expires_ms <= ?)"
                " ORDER BY j.row LIMIT ?",
                (consumer, now_ms, now_ms, limit + len(leave_out) + len(self._bad_inbox)),
            ).fetchall()
        found: list[tuple[Envelope, int]] = []
        for row in rows:
            if len(found) < limit and row[0] not in leave_out:
                envelope = self._read_envelope(row[:7])
                if envelope is not None:
                    found.append((envelope, row[7]))
        return found

    def job_done(self, consumer: int, row: int, now_ms: int) -> bool:
        """Settle a job. Returns whether it was still there to be settled."""
        with self._translating:
            found = self._conn.execute("DELETE FROM job WHERE consumer = ? AND row = ?", (consumer, row))
            self.backlog -= found.rowcount
            self._conn.execute(
                f"UPDATE inbox SET state = {DONE} WHERE row = ? AND NOT EXISTS (SELECT 1 FROM job WHERE row = ?)",
                (row, row),
            )
        if found.rowcount == 1:
            self.note_receipt(row, "done", now_ms)
        return found.rowcount == 1

    def job_again(self, consumer: int, row: int, due_ms: int) -> None:
        """Hand the job out again at `due_ms`, or never more when this was the last try: a dead letter."""
        with self._translating:
            (attempts,) = self._conn.execute(
                "UPDATE job SET attempts = attempts + 1, due_ms = ? WHERE consumer = ? AND row = ? RETURNING attempts",
                (due_ms, consumer, row),
            ).fetchone() or (0,)
            if attempts < self._limits.deliveries_max:
                return
            self._conn.execute("DELETE FROM job WHERE consumer = ? AND row = ?", (consumer, row))
            self._conn.execute(
                f"UPDATE inbox SET state = {INBOX_DEAD}, reason = ? WHERE row = ?"
                " AND NOT EXISTS (SELECT 1 FROM job WHERE row = ?)",
                (f"given back {attempts} times", row, row),
            )
            (name,) = self._conn.execute("SELECT name FROM consumer WHERE id = ?", (consumer,)).fetchone()
        self.backlog -= 1
        self._record(
            [(utc_ms(), "dead-letter", "", f"inbox row {row}, given back {attempts} times by {name!r}")]
        )

    # -- the outbox -----------------------------------------------------------------------------------------

    def enqueue(
        self,
        message: Message,
        meta: bytes,
        recipients: Sequence[str],
        *,
        ttl_ms: int | None,
        now_ms: int,
        may_repeat: bool = True,
    ) -> list[tuple[str, int]]:
        raw_id = id_to_bytes(message.id)
        digest = digest_of(sender=self._me, lane=0, meta=meta, body=message.body)
        if may_repeat:
            recipients = [peer for peer in recipients if not self._has_queued(peer, raw_id, digest)]
        if not recipients:
            return []
        size = len(meta) + len(message.body)
        self._check_total(size)
        for peer in recipients:
            self._check_room(peer, size)
        self._total.size += size
        if message.blobs:
            self._refer(message.blobs, recipients, raw_id, now_ms)
        number, self._next_message = self._next_message, self._next_message + 1
        self._new_messages.append((number, raw_id, meta, message.body, digest, len(recipients)))
        expires_ms = now_ms + (ttl_ms or self._limits.ttl_ms_default)
        self._expect_expiry(expires_ms)
        queued: list[tuple[str, int]] = []
        for peer in recipients:
            row, self._next_outbox = self._next_outbox, self._next_outbox + 1
            self._new_outbox.append(
                (
                    row,
                    self._peer_id(peer),
                    raw_id,
                    number,
                    size,
                    now_ms,
                    expires_ms,
                    ttl_ms is not None,
                    may_repeat,
                )
            )
            queued.append((peer, row))
        return queued

    def _has_queued(self, peer: str, raw_id: bytes, digest: bytes) -> bool:
        """Say whether this message is in the outbox for `peer`. Raises Conflict when another one has its id."""
        self.write_queued()
        with self._translating:
            found = self._conn.execute(
                "SELECT m.digest FROM outbox o JOIN message m ON m.id = o.message WHERE o.peer = ? AND o.msg_id = ?",
                (self._peer_id(peer), raw_id),
            ).fetchone()
        if found is not None and found[0] != digest:
            raise Conflict(
                f"the id {id_from_bytes(raw_id)} was used before, for another message to {peer}",
                hint="give each message an id of its own",
            )
        return found is not None

    def write_queued(self) -> None:
        """Insert what `enqueue` has taken. Two statements a tick instead of two a message: each lets go of the GIL."""
        if self._new_messages:
            with self._translating:
                self._conn.executemany(_INSERT_MESSAGE, self._new_messages)
                self._conn.executemany(_INSERT_OUTBOX, self._new_outbox)
            self._forget_queued()

    def _forget_queued(self) -> None:
        self._new_messages.clear()
        self._new_outbox.clear()

    def _check_total(self, size: int) -> None:
        """As `_check_room`, for all peers together."""
        total, most = self._total, self._limits.outboxes_bytes_max
        if total.size + size > most and total.settled != self._settlements:
            self.write_queued()
            with self._translating:
                total.size = self._conn.execute(
                    "SELECT coalesce(sum(size), 0) FROM (SELECT max(bytes) AS size FROM outbox"
                    f" WHERE state = {QUEUED} GROUP BY message)"
                ).fetchone()[0]
            total.settled = self._settlements
        if total.size + size > most:
            raise OutboxFull(
                f"messages of {total.size} bytes already wait for all peers together; the limit is {most}",
                hint="some peers have been unreachable for long: see zmail peers, or node.peers()",
            )

    def _check_room(self, peer: str, size: int) -> None:
        number = self._peer_id(peer)
        limits = self._limits
        count = self._counts.setdefault(number, _Count(limits.outbox_messages_max))
        if count.messages >= limits.outbox_messages_max or count.size + size > limits.outbox_bytes_max:
            # Counting 10,000 rows takes milliseconds: once after each change, not for every publish that is refused.
            if count.settled != self._settlements:
                self.write_queued()
                with self._translating:
                    count.messages, count.size = self._conn.execute(
                        "SELECT count(*), coalesce(sum(bytes), 0) FROM outbox"
                        f" WHERE peer = ? AND state = {QUEUED}",
                        (number,),
                    ).fetchone()
                count.settled = self._settlements
            if count.messages >= limits.outbox_messages_max or count.size + size > limits.outbox_bytes_max:
                raise OutboxFull(
                    f"{count.messages} messages ({count.size} bytes) already wait for {peer}",
                    hint="it has been unreachable for long: remove the peer, or wait until it is back",
                )
        count.messages += 1
        count.size += size

    def mark_delivered(self, rows: Sequence[tuple[str, int]], now_ms: int) -> None:
        self._settlements += 1
        with self._translating:
            self._conn.executemany(
                f"UPDATE outbox SET state = {DELIVERED}, settled_ms = ?"
                f" WHERE row = ? AND state IN ({QUEUED}, {REVOKING})",
                [(now_ms, row) for _, row in rows],
            )

    def mark_delivered_ids(self, peer: str, ids: Sequence[str], now_ms: int) -> None:
        number = self._peer_id(peer)
        self._settlements += 1
        with self._translating:
            self._conn.executemany(
                f"UPDATE outbox SET state = {DELIVERED}, settled_ms = ?"
                f" WHERE peer = ? AND msg_id = ? AND state IN ({QUEUED}, {REVOKING})",
                [(now_ms, number, id_to_bytes(one)) for one in ids],
            )

    def mark_dead(self, peer: str, message_id: str, reason: str, now_ms: int) -> bool:
        return self._end(peer, message_id, DEAD, reason, now_ms)

    def mark_expired(self, peer: str, message_id: str, now_ms: int) -> bool:
        return self._end(peer, message_id, EXPIRED, None, now_ms)

    def _end(self, peer: str, message_id: str, state: int, reason: str | None, now_ms: int) -> bool:
        """End a message that is still queued, or was to be withdrawn."""
        self._settlements += 1
        with self._translating:
            cursor = self._conn.execute(
                "UPDATE outbox SET state = ?, settled_ms = ?, reason = ?"
                f" WHERE peer = ? AND msg_id = ? AND state IN ({QUEUED}, {REVOKING})",
                (state, now_ms, reason, self._peer_id(peer), id_to_bytes(message_id)),
            )
        return cursor.rowcount == 1

    # -- receipts -------------------------------------------------------------------------------------------

    def note_receipt(self, row: int, state: str, now_ms: int) -> None:
        with self._translating:
            noted = self._conn.execute(
                "INSERT OR REPLACE INTO receipt (peer, msg_id, state, at_ms) SELECT peer, msg_id, ?, ? FROM inbox"
                " WHERE row = ? AND peer <> ? AND instr(meta, ?) > 0"
                " AND NOT EXISTS (SELECT 1 FROM job WHERE job.row = inbox.row) RETURNING peer",
                (state, now_ms, row, self._peer_ids.get(self._me, 0), _WANTS_RECEIPT),
            ).fetchall()
        self.receipt_peers.update(self._peer_names[peer] for (peer,) in noted)

    def receipts(self, peer: str, limit: int) -> list[tuple[str, str]]:
        with self._translating:
            rows = self._conn.execute(
                "SELECT msg_id, state FROM receipt WHERE peer = ? ORDER BY msg_id LIMIT ?",
                (self._peer_id(peer), limit),
            ).fetchall()
        return [(id_from_bytes(raw_id), state) for raw_id, state in rows]

    def drop_receipts(self, peer: str, ids: Sequence[str]) -> None:
        with self._translating:
            self._conn.executemany(
                "DELETE FROM receipt WHERE peer = ? AND msg_id = ?",
                [(self._peer_id(peer), id_to_bytes(one)) for one in ids],
            )

    def take_receipts(self, peer: str, receipts: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
        number = self._peer_id(peer)
        new: list[str] = []
        unknown: list[str] = []
        with self._translating:
            for message_id, state in receipts:
                key = (number, id_to_bytes(message_id))
                found = self._conn.execute(
                    "SELECT receipt FROM outbox WHERE peer = ? AND msg_id = ?", key
                ).fetchone()
                if found is None:
                    unknown.append(message_id)
                elif found[0] is None:
                    self._conn.execute(
                        "UPDATE outbox SET receipt = ? WHERE peer = ? AND msg_id = ?", (state, *key)
                    )
                    new.append(message_id)
        return new, unknown

    # -- withdrawing a message ------------------------------------------------------------------------------

    @property
    def newest_outbox_row(self) -> int:
        return self._next_outbox - 1

    def outbox_of(self, message_id: str) -> list[tuple[str, int, str, bool]]:
        self.write_queued()
        with self._translating:
            rows = self._conn.execute(
                "SELECT o.peer, o.row, o.state, o.may_repeat FROM message m JOIN outbox o ON o.message = m.id"
                " WHERE m.msg_id = ? ORDER BY o.row",
                (id_to_bytes(message_id),),
            ).fetchall()
        return [
            (self._peer_names[peer], row, OUTBOX_STATES[state], bool(may_repeat))
            for peer, row, state, may_repeat in rows
        ]

    def mark_cancelled(self, row: int, now_ms: int) -> None:
        self._settlements += 1
        with self._translating:
            self._conn.execute(
                f"UPDATE outbox SET state = {CANCELLED}, settled_ms = ? WHERE row = ? AND state = {QUEUED}",
                (now_ms, row),
            )

    def mark_revoking(self, row: int) -> None:
        with self._translating:
            self._conn.execute(
                f"UPDATE outbox SET state = {REVOKING} WHERE row = ? AND state = {QUEUED}", (row,)
            )

    def revoking(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        with self._translating:
            rows = self._conn.execute(
                "SELECT o.msg_id, m.digest FROM outbox o JOIN message m ON m.id = o.message"
                f" WHERE o.peer = ? AND o.state = {REVOKING} ORDER BY o.row LIMIT ?",
                (self._peer_id(peer), limit),
            ).fetchall()
        return [(id_from_bytes(raw_id), digest) for raw_id, digest in rows]

    def settle_revoked(
        self, peer: str, *, held: Sequence[str], free: Sequence[str], now_ms: int
    ) -> tuple[list[str], list[str]]:
        self._settlements += 1
        number, sql = (
            self._peer_id(peer),
            (
                "UPDATE outbox SET state = ?, settled_ms = ?"
                f" WHERE peer = ? AND msg_id = ? AND state = {REVOKING} RETURNING row"
            ),
        )
        with self._translating:
            return tuple(  # type: ignore[return-value]  # two lists, as promised
                [
                    one
                    for one in ids
                    if self._conn.execute(sql, (state, now_ms, number, id_to_bytes(one))).fetchall()
                ]
                for state, ids in ((DELIVERED, held), (CANCELLED, free))
            )

    def unrevoke(self, peer: str) -> None:
        self._counts.pop(self._peer_id(peer), None)
        self._total = _Count(size=self._limits.outboxes_bytes_max)  # counted again
        with self._translating:
            self._conn.execute(
                f"UPDATE outbox SET state = {QUEUED} WHERE peer = ? AND state = {REVOKING}",
                (self._peer_id(peer),),
            )

    def note_acked(self, peer: str, message_id: str, row: int) -> None:
        with self._translating:
            self._conn.execute(
                "UPDATE peer SET acked_id = ?, acked_row = ? WHERE node_id = ? AND coalesce(acked_row, 0) < ?",
                (id_to_bytes(message_id), row, peer, row),
            )

    def requeue(self, peer: str, now_ms: int) -> int:
        number = self._peer_id(peer)
        self._counts.pop(number, None)
        self._total = _Count(size=self._limits.outboxes_bytes_max)  # counted again
        with self._translating:
            self._conn.execute("UPDATE peer SET acked_id = NULL, acked_row = NULL WHERE id = ?", (number,))
            cursor = self._conn.execute(
                f"UPDATE outbox SET state = {QUEUED}, settled_ms = NULL WHERE row IN (SELECT row FROM outbox"
                f" WHERE peer = ? AND state = {DELIVERED} AND settled_ms > ? AND expires_ms > ?"
                " ORDER BY row DESC LIMIT ?)",
                (number, now_ms - self._limits.retained_ms, now_ms, self._limits.retained_messages),
            )
            self._find_next_expiry()
        self.record(
            "regression", f"{cursor.rowcount} delivered messages are sent again", now_ms=now_ms, peer=peer
        )
        return cursor.rowcount

    # -- large bodies ---------------------------------------------------------------------------------------

    def add_blob(self, blob_id: str, size: int, now_ms: int) -> None:
        """A blob is complete on this disk, or has been used again."""
        with self._translating:
            self._conn.execute(
                "INSERT INTO blob (id, bytes, used_ms) VALUES (?,?,?)"
                " ON CONFLICT (id) DO UPDATE SET used_ms = excluded.used_ms",
                (bytes.fromhex(blob_id), size, now_ms),
            )

    def has_blob(self, blob_id: str) -> bool:
        with self._translating:
            return (
                self._conn.execute("SELECT 1 FROM blob WHERE id = ?", (bytes.fromhex(blob_id),)).fetchone()
                is not None
            )

    def may_fetch_blob(self, blob_id: str, peer: str) -> bool:
        """Say whether a message to `peer` names this blob: that is what gives the right to it."""
        with self._translating:
            return (
                self._conn.execute(
                    "SELECT 1 FROM blob_ref WHERE blob = ? AND peer = ? LIMIT 1",
                    (bytes.fromhex(blob_id), self._peer_id(peer)),
                ).fetchone()
                is not None
            )

    def _refer(self, blobs: Sequence[str], recipients: Sequence[str], raw_id: bytes, now_ms: int) -> None:
        raw_blobs = [bytes.fromhex(blob_id) for blob_id in blobs]
        for blob_id in blobs:
            if not self.has_blob(blob_id):
                raise UnknownBlob(
                    f"no blob {blob_id[:12]} on this node", hint="put_blob or fetch_blob it first"
                )
        with self._translating:
            self._conn.executemany(
                "INSERT OR IGNORE INTO blob_ref (blob, peer, msg_id) VALUES (?,?,?)",
                [(blob, self._peer_id(peer), raw_id) for blob in raw_blobs for peer in recipients],
            )
            self._conn.executemany(
                "UPDATE blob SET used_ms = ? WHERE id = ?", [(now_ms, blob) for blob in raw_blobs]
            )

    def drop_unused_blobs(self, now_ms: int) -> list[str]:
        """Forget one slice of the blobs that nothing has used for long and no outbox row names. Returns their ids."""
        with self._translating:
            unused = self._conn.execute(
                "SELECT id FROM blob WHERE used_ms < ? AND NOT EXISTS (SELECT 1 FROM blob_ref r JOIN outbox o"
                " ON o.peer = r.peer AND o.msg_id = r.msg_id WHERE r.blob = blob.id)"
                f" LIMIT {_PRUNE_SLICE}",
                (now_ms - self._limits.blob_retained_ms,),
            ).fetchall()
            self._conn.executemany("DELETE FROM blob_ref WHERE blob = ?", unused)
            self._conn.executemany("DELETE FROM blob WHERE id = ?", unused)
        return [raw_id.hex() for (raw_id,) in unused]

    # -- what the link reads (committed, because it reads between transactions) -----------------------------

    def in_doubt(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        with self._translating:
            rows = self._conn.execute(
                "SELECT o.msg_id, m.digest, o.row FROM outbox o JOIN message m ON m.id = o.message"
                f" WHERE o.peer = ? AND o.state = {QUEUED} ORDER BY o.row LIMIT ?",
                (self._peer_id(peer), limit),
            ).fetchall()
        return [
            (id_from_bytes(raw_id), digest)
            for raw_id, digest, row in rows
            if row not in self._bad_outbox and isinstance(digest, bytes)
        ]

    def queued_after(self, peer: str, row: int, *, messages: int, size: int) -> list[Queued]:
        queued: list[Queued] = []
        while not queued:  # damaged ones are passed over, and there may be sound ones behind them
            with self._translating:
                cursor = self._conn.execute(
                    "SELECT o.row, o.msg_id, m.meta, m.body, m.digest, o.expires_ms, o.is_timed"
                    " FROM outbox o LEFT JOIN message m ON m.id = o.message"
                    f" WHERE o.peer = ? AND o.state = {QUEUED} AND o.row > ? ORDER BY o.row LIMIT ?",
                    (self._peer_id(peer), row, messages),
                )
                read = 0
                for number, raw_id, meta, body, digest, expires_ms, is_timed in cursor:
                    read, row = read + 1, number
                    if number in self._bad_outbox:
                        continue
                    if not _is_sound(digest, sender=self._me, lane=0, meta=meta, body=body):
                        self._quarantine("outbox", number, _shown_id(raw_id), peer)
                        continue
                    queued.append(
                        Queued(
                            row=number,
                            id=id_from_bytes(raw_id),
                            meta=meta,
                            body=body,
                            expires_ms=expires_ms,
                            is_timed=bool(is_timed),
                        )
                    )
                    size -= len(meta) + len(body)
                    if size <= 0:
                        break
                cursor.close()
            if read < messages:
                break
        return queued

    def held(self, peer: str, ids: Sequence[str], digests: Sequence[bytes]) -> Held:
        raw_ids = []
        for one in ids:
            try:
                raw_ids.append(id_to_bytes(one))
            except InvalidInput:
                raw_ids.append(b"")  # keeps the indexes; no row has it
        known = self._known(self._peer_id(peer), raw_ids)
        held = Held([], [])
        for index, raw_id in enumerate(raw_ids):
            if raw_id in known:
                row, digest = known[raw_id]
                if not digests or digests[index] == digest:
                    held.have.append((index, row))
                else:
                    held.conflicts.append(index)
        return held

    def last_acked(self, peer: str) -> tuple[str, int] | None:
        with self._translating:
            found = self._conn.execute(
                "SELECT acked_id, acked_row FROM peer WHERE node_id = ?", (peer,)
            ).fetchone()
        return (id_from_bytes(found[0]), found[1]) if found and found[0] is not None else None

    def lacks(self, peer: str, message_id: str, row: int) -> bool:
        number = self._peer_id(peer)
        try:
            raw_id = id_to_bytes(message_id)
        except InvalidInput:
            return False
        known = self._known(number, [raw_id]).get(raw_id)
        if known is not None:
            return known[0] != row
        with self._translating:
            (pruned,) = self._conn.execute("SELECT pruned_row FROM peer WHERE id = ?", (number,)).fetchone()
        return bool(row > pruned)

    # -- house-keeping --------------------------------------------------------------------------------------

    def expire(self, peer: str, *, beyond_row: int, now_ms: int) -> list[str]:
        """Expire queued rows past their time that are not on the wire (their row is beyond `beyond_row`)."""
        self._settlements += 1
        with self._translating:
            rows = self._conn.execute(
                f"UPDATE outbox SET state = {EXPIRED}, settled_ms = ? WHERE row IN (SELECT row FROM outbox WHERE"
                f" peer = ? AND state = {QUEUED} AND row > ? AND expires_ms <= ? LIMIT {_PRUNE_SLICE})"
                " RETURNING msg_id",
                (now_ms, self._peer_id(peer), beyond_row, now_ms),
            ).fetchall()
            rows += self._conn.execute(
                f"UPDATE outbox SET state = {EXPIRED}, settled_ms = ? WHERE peer = ? AND state = {REVOKING}"
                " AND expires_ms <= ? RETURNING msg_id",
                (now_ms, self._peer_id(peer), now_ms),
            ).fetchall()
        return [id_from_bytes(raw_id) for (raw_id,) in rows]

    def expire_inbox(self, now_ms: int, *, leave_out: Set[int] = frozenset()) -> int:
        """End what nobody began to work on in its lifetime; return how many. `leave_out`: rows that are leased."""
        with self._translating:
            found = self._conn.execute("SELECT row FROM lifetime WHERE expires_ms <= ?", (now_ms,)).fetchall()
            over = [(row,) for (row,) in found if row not in leave_out][:_PRUNE_SLICE]
            ended = 0
            if over:
                self._conn.executemany("DELETE FROM lifetime WHERE row = ?", over)
                self._conn.executemany("DELETE FROM job WHERE row = ?", over)
                ended = self._conn.executemany(
                    f"UPDATE inbox SET state = {INBOX_DEAD}, due_ms = NULL, reason = 'expired'"
                    f" WHERE row = ? AND state IN ({NEW}, {CLAIMED})",
                    over,
                ).rowcount
                self._recount_waiting()
            self._find_next_expiry()
        if self.next_expiry_ms is not None and self.next_expiry_ms <= now_ms:
            self.next_expiry_ms = (
                now_ms + _LOOK_AGAIN_MS
            )  # on the wire, or leased: what becomes of it is not known
        return ended

    def _recount_waiting(self) -> None:
        self.backlog, self._next_due_ms = self._conn.execute(
            "SELECT (SELECT count(*) FROM job) + (SELECT count(*) FROM inbox WHERE due_ms IS NOT NULL),"
            " (SELECT min(due_ms) FROM inbox WHERE due_ms IS NOT NULL)"
        ).fetchone()

    def anchor(self) -> Anchor | None:
        with self._translating:
            found = self._conn.execute(
                "SELECT machine_boot, offset_ms, ahead_ms, at_ms FROM clock"
            ).fetchone()
        if found is None:
            return None
        return Anchor(machine_boot=found[0], offset_ms=found[1], ahead_ms=found[2], at_ms=found[3])

    def save_anchor(self, anchor: Anchor) -> None:
        """Write the steady clock's anchor down, in the caller's transaction or in one of its own."""
        with self._translating, self._db.atomic():
            self._conn.execute(
                "INSERT OR REPLACE INTO clock (id, machine_boot, offset_ms, ahead_ms, at_ms) VALUES (1,?,?,?,?)",
                (anchor.machine_boot, anchor.offset_ms, anchor.ahead_ms, anchor.at_ms),
            )

    def prune(self, now_ms: int) -> bool:
        """Drop one slice of what nobody needs any more. Returns whether there may be more.

        Settled outbox rows go after the retained window; finished inbox rows after the longest lifetime, leaving
        their id in `seen` for that long again, so that no copy still under way is taken for new.
        """
        limits = self._limits
        with self._translating:
            gone = self._conn.execute(
                f"DELETE FROM outbox WHERE row IN (SELECT row FROM outbox WHERE state <> {QUEUED} AND settled_ms < ?"
                f" AND row < (SELECT max(row) FROM outbox) LIMIT {_PRUNE_SLICE}) RETURNING message",
                (now_ms - limits.retained_ms,),
            ).fetchall()
            self._conn.executemany("UPDATE message SET refs = refs - 1 WHERE id = ?", gone)
            self._conn.executemany("DELETE FROM message WHERE id = ? AND refs <= 0", gone)
            old = self._conn.execute(
                "DELETE FROM inbox WHERE row IN (SELECT row FROM inbox WHERE"
                f" (state = {DONE} OR state = {INBOX_DEAD} AND reason = 'expired') AND arrived_ms < ?"
                f" AND row < (SELECT max(row) FROM inbox) ORDER BY row LIMIT {_PRUNE_SLICE})"
                " RETURNING peer, msg_id, row, digest",
                (now_ms - limits.ttl_ms_max,),
            ).fetchall()
            self._conn.executemany(
                "INSERT OR REPLACE INTO seen (peer, msg_id, row, digest, at_ms) VALUES (?,?,?,?,?)",
                [(*row, now_ms) for row in old],
            )
            late = self._conn.execute(
                "DELETE FROM seen WHERE (peer, msg_id) IN (SELECT peer, msg_id FROM seen WHERE at_ms < ?"
                f" LIMIT {_PRUNE_SLICE}) RETURNING row, peer",
                (now_ms - limits.ttl_ms_max,),
            ).fetchall()
            # Whoever has not taken its receipts by then has dropped the messages they are about.
            self._conn.execute("DELETE FROM receipt WHERE at_ms < ?", (now_ms - limits.ttl_ms_max,))
            self._conn.executemany("UPDATE peer SET pruned_row = max(pruned_row, ?) WHERE id = ?", late)
        faults.reach("pruned")
        self._has_seen = self._has_seen or bool(old)
        return max(len(gone), len(old), len(late)) >= _PRUNE_SLICE

    # -- members, invitations, registry ---------------------------------------------------------------------

    def _peer_id(self, node_id: str) -> int:
        number = self._peer_ids.get(node_id)
        if number is None:
            with self._translating:
                number = int(Peer.insert(node_id=node_id).execute())
            self._peer_ids[node_id] = number
            self._peer_names[number] = node_id
        return number

    def save_member(self, member: Member, now_ms: int) -> None:
        with self._translating:
            self._peer_id(member.node_id)
            Peer.update(
                name=member.name,
                public_key=member.public_key,
                endpoints=json.dumps(member.endpoints),
                beat_endpoint=member.beat_endpoint,
                is_member=True,
                added_ms=now_ms,
            ).where(Peer.node_id == member.node_id).execute()

    def drop_member(self, node_id: str, *, reason: str, now_ms: int) -> list[str]:
        """Make a peer a member no more. What waits for it is dead, kept with the reason; returns those ids."""
        with self._translating:
            Peer.update(is_member=False, interests="[]").where(Peer.node_id == node_id).execute()
            rows = self._conn.execute(
                f"UPDATE outbox SET state = {DEAD}, settled_ms = ?, reason = ? WHERE peer = ?"
                f" AND state IN ({QUEUED}, {REVOKING}) RETURNING msg_id",
                (now_ms, reason, self._peer_id(node_id)),
            ).fetchall()
        return [id_from_bytes(raw_id) for (raw_id,) in rows]

    def members(self) -> list[Member]:
        with self._translating:
            return [
                Member(
                    node_id=row.node_id,
                    name=row.name,
                    public_key=bytes(row.public_key),
                    endpoints=tuple(json.loads(row.endpoints)),
                    beat_endpoint=row.beat_endpoint,
                    interests=tuple(json.loads(row.interests)),
                    seen_ms=row.seen_ms,
                )
                for row in Peer.select().where(Peer.is_member)
            ]

    def save_seen(self, peer: str, now_ms: int) -> None:
        with self._translating:
            Peer.update(seen_ms=now_ms).where(Peer.node_id == peer).execute()

    def save_interest(self, peer: str, patterns: Sequence[str]) -> None:
        with self._translating:
            Peer.update(interests=json.dumps(list(patterns))).where(Peer.node_id == peer).execute()

    def save_invitation(self, public_key: bytes, expires_ms: int) -> None:
        with self._translating:
            self._conn.execute("INSERT INTO invitation VALUES (?, ?)", (public_key, expires_ms))

    def strike_invitation(self, public_key: bytes) -> bool:
        """Use an invitation up. Returns whether it was there."""
        with self._translating:
            return (
                self._conn.execute("DELETE FROM invitation WHERE public_key = ?", (public_key,)).rowcount == 1
            )

    def invitations(self) -> dict[bytes, int]:
        with self._translating:
            return dict(self._conn.execute("SELECT public_key, expires_ms FROM invitation").fetchall())

    def save_joining(self, server_key: bytes, endpoints: Sequence[str], expires_ms: int) -> None:
        """Remember that this node asked to be let in, until it knows the answer."""
        with self._translating:
            self._conn.execute(
                "INSERT OR REPLACE INTO joining VALUES (?, ?, ?)",
                (server_key, json.dumps(list(endpoints)), expires_ms),
            )

    def end_joining(self, server_key: bytes) -> None:
        with self._translating:
            self._conn.execute("DELETE FROM joining WHERE server_key = ?", (server_key,))

    def joinings(self) -> list[tuple[bytes, tuple[str, ...], int]]:
        """Return (server key, endpoints, expiry) of what this node asked and never heard the answer to."""
        with self._translating:
            rows = self._conn.execute("SELECT server_key, endpoints, expires_ms FROM joining").fetchall()
        return [(key, tuple(json.loads(endpoints)), expires_ms) for key, endpoints, expires_ms in rows]

    def registry_save(self, entries: Sequence[Entry]) -> None:
        with self._translating:
            self._conn.executemany(
                "INSERT OR REPLACE INTO entry (bucket, key, origin, value, stamp, held_ms) VALUES (?,?,?,?,?,?)",
                [
                    (
                        e.bucket,
                        e.key,
                        e.origin,
                        None if e.value is None else json.dumps(dict(e.value)),
                        e.stamp,
                        e.held_ms,
                    )
                    for e in entries
                ],
            )
        faults.reach("registry-saved")

    def registry_drop(self, keys: Sequence[tuple[str, str]]) -> None:
        with self._translating:
            self._conn.executemany("DELETE FROM entry WHERE bucket = ? AND key = ?", keys)

    def registry_note(self, name: str, value: int) -> None:
        with self._translating:
            self._conn.execute("INSERT OR REPLACE INTO registry_note VALUES (?, ?)", (name, value))

    def registry_notes(self) -> dict[str, int]:
        with self._translating:
            return dict(self._conn.execute("SELECT name, value FROM registry_note").fetchall())

    def registry_load(self) -> list[Entry]:
        with self._translating:
            rows = self._conn.execute(
                "SELECT bucket, key, origin, value, stamp, held_ms FROM entry"
            ).fetchall()
        return [
            Entry(
                bucket=bucket,
                key=key,
                origin=origin,
                value=None if value is None else json.loads(value),
                stamp=stamp,
                held_ms=held_ms,
            )
            for bucket, key, origin, value, stamp, held_ms in rows
        ]


def read_events(db: pw.Database, limit: int, kind: str | None) -> list[Event]:
    """Return the newest events first, of one kind or of all."""
    sql = "SELECT id, at_ms, kind, peer, detail FROM event WHERE ?1 IS NULL OR kind = ?1 ORDER BY id DESC LIMIT ?2"
    rows = db.execute_sql(sql, (kind, limit)).fetchall()  # type: ignore[no-untyped-call]  # not in the stubs
    return [
        Event(id=id_, at_ms=at, kind=what, peer=peer, detail=detail) for id_, at, what, peer, detail in rows
    ]


class Reader:
    """A read-only view of a store for one thread; sees what is committed."""

    def __init__(self, path: Path) -> None:
        self._db = pw.SqliteDatabase(
            f"file:{quote(str(path))}?mode=ro",
            pragmas=(("query_only", 1),),
            uri=True,
            autoconnect=False,
            check_same_thread=False,  # only so that it can be closed after its thread has ended
        )

    def open(self) -> pw.SqliteDatabase:
        """Connect in the calling thread and let its models read through this."""
        self._db.connect()
        self._conn: sqlite3.Connection = self._db.connection()  # type: ignore[no-untyped-call]  # not in the stubs
        CURRENT.obj = self._db
        return self._db

    def discard(self) -> None:
        """Close the connection. Its thread has ended."""
        self._conn.close()


def _envelope(row: int, sender: str, message: Message) -> Envelope:
    return Envelope(
        row=row,
        sender=sender,
        id=message.id,
        subject=message.subject,
        body=message.body,
        headers=message.headers,
        reply_to=message.reply_to,
        blobs=message.blobs,
        wants_receipt=message.wants_receipt,
    )


def _is_sound(digest: bytes | None, *, sender: str, lane: int, meta: object, body: object) -> bool:
    """Say whether a message is what was stored. A damaged row may hold anything, text and nothing included."""
    if not isinstance(meta, bytes) or not isinstance(body, bytes):
        return False
    return digest_of(sender=sender, lane=lane, meta=meta, body=body) == digest


def _shown_id(raw_id: object) -> str:
    return id_from_bytes(raw_id) if isinstance(raw_id, bytes) else "?"


def _subject_of(meta: bytes) -> str:
    """Read the subject for SQL; of damaged metadata none, which no pattern matches."""
    try:
        return str(json.loads(meta)["subject"])
    except (ValueError, TypeError, KeyError):
        return ""
