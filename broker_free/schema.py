"""The tables, as numbered steps. Knows SQL; knows neither peewee nor what the rows mean (`store.py` does).

A file carries the number of its schema in `PRAGMA user_version`. A new file runs every step and an older one those it
lacks, all in one transaction, so that both end with the very same tables and a crash leaves the file as it was. A step
that was released is never edited: what it made is on somebody's disk. New statements go into the newest step, until
that one is released too.

Applications keep their own tables in the same file, with numbers of their own: see `Migrations`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from broker_free.errors import UnsuitableHome

STEPS: Final[tuple[tuple[str, ...], ...]] = (
    (  # 0 → 1
        """CREATE TABLE peer (id INTEGER PRIMARY KEY, node_id TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
        public_key BLOB NOT NULL, endpoints TEXT NOT NULL, beat_endpoint TEXT NOT NULL, interests TEXT NOT NULL,
        acked_id BLOB, acked_row INTEGER, pruned_row INTEGER NOT NULL, is_member INTEGER NOT NULL,
        added_ms INTEGER NOT NULL, seen_ms INTEGER NOT NULL)""",
        """CREATE TABLE message (id INTEGER PRIMARY KEY, msg_id BLOB NOT NULL, meta BLOB NOT NULL,
        body BLOB NOT NULL, digest BLOB NOT NULL, refs INTEGER NOT NULL)""",
        """CREATE TABLE outbox (row INTEGER PRIMARY KEY, peer INTEGER NOT NULL, msg_id BLOB NOT NULL,
        message INTEGER NOT NULL, state INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL,
        queued_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL, settled_ms INTEGER, reason TEXT)""",
        "CREATE UNIQUE INDEX outbox_key ON outbox (peer, msg_id)",
        "CREATE INDEX outbox_queued ON outbox (peer, row) WHERE state = 0",
        """CREATE TABLE inbox (row INTEGER PRIMARY KEY, peer INTEGER NOT NULL, msg_id BLOB NOT NULL,
        lane INTEGER NOT NULL, meta BLOB NOT NULL, body BLOB NOT NULL, digest BLOB NOT NULL,
        state INTEGER NOT NULL DEFAULT 0, arrived_ms INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
        due_ms INTEGER, reason TEXT)""",
        "CREATE UNIQUE INDEX inbox_key ON inbox (peer, msg_id)",
        "CREATE INDEX inbox_due ON inbox (due_ms) WHERE due_ms IS NOT NULL",
        """CREATE TABLE seen (peer INTEGER NOT NULL, msg_id BLOB NOT NULL, row INTEGER NOT NULL,
        digest BLOB NOT NULL, at_ms INTEGER NOT NULL, PRIMARY KEY (peer, msg_id)) WITHOUT ROWID""",
        "CREATE TABLE consumer (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, pattern TEXT NOT NULL)",
        """CREATE TABLE job (consumer INTEGER NOT NULL, row INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
        due_ms INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (consumer, row)) WITHOUT ROWID""",
        """CREATE TABLE registry (bucket TEXT NOT NULL, key TEXT NOT NULL, origin TEXT NOT NULL, value TEXT,
        stamp INTEGER NOT NULL, PRIMARY KEY (bucket, key, origin)) WITHOUT ROWID""",
        """CREATE TABLE invitation (public_key BLOB PRIMARY KEY, expires_ms INTEGER NOT NULL) WITHOUT ROWID""",
    ),
    (  # 1 → 2
        # -- store: what happened, append-only and bounded; and the schemas of applications
        """CREATE TABLE event (id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, peer TEXT NOT NULL,
        detail TEXT NOT NULL)""",
        # (state 5 and 4: quarantined; both indexes are empty, nearly always)
        "CREATE INDEX outbox_quarantined ON outbox (row) WHERE state = 5",
        "CREATE INDEX inbox_quarantined ON inbox (row) WHERE state = 4",
        "CREATE TABLE application (name TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID",
        # -- link: lifetimes of what is in the inbox, the steady clock they count in, receipts on their way back
        "CREATE INDEX outbox_revoking ON outbox (peer, row) WHERE state = 6",
        "ALTER TABLE outbox ADD COLUMN is_timed INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE outbox ADD COLUMN receipt TEXT",
        """CREATE TABLE receipt (peer INTEGER NOT NULL, msg_id BLOB NOT NULL, state TEXT NOT NULL,
        at_ms INTEGER NOT NULL, PRIMARY KEY (peer, msg_id)) WITHOUT ROWID""",
        "ALTER TABLE outbox ADD COLUMN may_repeat INTEGER NOT NULL DEFAULT 1",
        "CREATE TABLE lifetime (row INTEGER PRIMARY KEY, expires_ms INTEGER NOT NULL)",
        """CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 1), machine_boot TEXT NOT NULL,
        offset_ms INTEGER NOT NULL, ahead_ms INTEGER NOT NULL, at_ms INTEGER NOT NULL)""",
        # -- blob: large bodies on this node's disk, and which messages to whom name them
        "CREATE TABLE blob (id BLOB PRIMARY KEY, bytes INTEGER NOT NULL, used_ms INTEGER NOT NULL) WITHOUT ROWID",
        """CREATE TABLE blob_ref (blob BLOB NOT NULL, peer INTEGER NOT NULL, msg_id BLOB NOT NULL,
        PRIMARY KEY (blob, peer, msg_id)) WITHOUT ROWID""",
        # -- registry: one row a key. Until now an entry belonged to its writer, and owned buckets keep that.
        """CREATE TABLE entry (bucket TEXT NOT NULL, key TEXT NOT NULL, value TEXT, stamp INTEGER NOT NULL,
        origin TEXT NOT NULL, held_ms INTEGER NOT NULL, PRIMARY KEY (bucket, key)) WITHOUT ROWID""",
        """INSERT INTO entry (bucket, key, value, stamp, origin, held_ms)
        SELECT 'own.' || bucket, origin || '.' || key, value, stamp, origin,
        CAST(strftime('%s', 'now') AS INTEGER) * 1000 FROM registry""",
        "DROP TABLE registry",
        "CREATE TABLE registry_note (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
        # -- security: codes used here whose maker has not answered yet
        """CREATE TABLE joining (server_key BLOB PRIMARY KEY, endpoints TEXT NOT NULL, expires_ms INTEGER NOT NULL)
        WITHOUT ROWID""",
        # -- presence
    ),
)
SCHEMA_VERSION: Final = len(STEPS)

# A step of an application: SQL, or a function of the connection for what SQL alone cannot do.
Step = str | Callable[[sqlite3.Connection], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrations:
    """How an application's own tables came to be what its models say.

    `steps[0]` leads from version 1 to version 2, and so on. A new store gets its tables from the models and the newest
    number; tables that were made before an application had migrations count as version 1.
    """

    application: str
    steps: tuple[tuple[Step, ...], ...] = ()

    @property
    def version(self) -> int:
        return 1 + len(self.steps)


def version_of(conn: sqlite3.Connection) -> int:
    """Return the schema number of a file, 0 for a new one. Raises UnsuitableHome for a number of the future."""
    version = int(conn.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise UnsuitableHome(
            f"the store was written by a newer version (schema {version}; this one knows up to {SCHEMA_VERSION})",
            hint="upgrade this installation",
        )
    return version


def upgrade(conn: sqlite3.Connection, version: int) -> None:
    """Run the steps that a file of `version` lacks, inside the caller's transaction."""
    for step in STEPS[version:]:
        for statement in step:
            conn.execute(statement)
    conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def application_version(
    conn: sqlite3.Connection, migrations: Migrations, tables: Sequence[str]
) -> int | None:
    """Return the number of an application's tables, None when it has none yet. Never of the future, as above."""
    has_numbers = conn.execute("SELECT 1 FROM sqlite_schema WHERE name = 'application'").fetchone()
    found = (
        has_numbers
        and conn.execute(
            "SELECT version FROM application WHERE name = ?", (migrations.application,)
        ).fetchone()
    )
    if found:
        version = int(found[0])
        if version > migrations.version:
            raise UnsuitableHome(
                f"the tables of {migrations.application} were written by a newer version"
                f" (number {version}; this one knows up to {migrations.version})",
                hint="upgrade this installation",
            )
        return version
    marks = ",".join("?" * len(tables))
    sql = f"SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name IN ({marks})"
    return 1 if conn.execute(sql, tuple(tables)).fetchone() else None


def upgrade_application(conn: sqlite3.Connection, migrations: Migrations, version: int | None) -> None:
    """Run the steps that an application's tables lack and record the number, inside the caller's transaction."""
    if version is not None:
        for step in migrations.steps[version - 1 :]:
            for statement in step:
                if isinstance(statement, str):
                    conn.execute(statement)
                else:
                    statement(conn)
    conn.execute(
        "INSERT OR REPLACE INTO application (name, version) VALUES (?, ?)",
        (migrations.application, migrations.version),
    )
