"""Stores of earlier versions: opened, brought up to date, and everything in them still works.

`tests/data/version1` holds two homes of zmail as version 1 left them, as SQL: north was written a brief by south, has
one for south that still waits, and one to itself; south has read one and noted its action.
"""

from __future__ import annotations

import shutil
import socket
import sqlite3
import time
from pathlib import Path

import peewee as pw
import pytest

from broker_free.errors import StoreFailed, UnsuitableHome
from broker_free.limits import Limits
from broker_free.schema import SCHEMA_VERSION, STEPS, Migrations
from broker_free.store import Store
from broker_free.storefile import BEFORE_UPGRADE
from tests.conftest import Zmail

DATA = Path(__file__).with_name("data") / "version1"
ME = "m" * 32


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def restore_version_1(which: str, path: Path, ports: dict[str, int]) -> None:
    """Write one of the homes' stores to `path`, with its times moved to now: mail that waits has a lifetime."""
    text = (DATA / f"{which}.sql").read_text()
    for name, port in ports.items():
        text = text.replace(f"@{name.upper()}@", str(port))
    with sqlite3.connect(path) as made:
        made.executescript(text)
        newest_ms = made.execute("SELECT max(queued_ms) FROM outbox").fetchone()[0]
        for (table,) in made.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
            for _, column, *_ in made.execute(f"PRAGMA table_info({table})").fetchall():
                if column.endswith("_ms"):
                    made.execute(
                        f"UPDATE {table} SET {column} = {column} + ? WHERE {column} > 1000000000000",
                        (time.time_ns() // 1_000_000 - newest_ms,),
                    )
        made.execute("PRAGMA user_version = 1")
    made.close()
    path.chmod(0o600)


def tables_of(path: Path) -> set[tuple[str, ...]]:
    found = sqlite3.connect(path)
    rows = found.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    found.close()
    return set(rows)


def rows_of(path: Path) -> dict[str, list[tuple[object, ...]]]:
    found = sqlite3.connect(path)
    names = [name for (name,) in found.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    rows = {name: found.execute(f"SELECT * FROM {name}").fetchall() for name in names}
    found.close()
    return rows


def opened(path: Path, **more: object) -> Store:
    store = Store(path, me=ME, limits=Limits(), **more)  # type: ignore[arg-type]  # handed through
    store.open()
    return store


def test_an_upgraded_file_has_the_tables_of_a_new_one_and_keeps_every_row(tmp_path: Path) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    restore_version_1("north", old, {})
    before = rows_of(old)
    opened(old).close()
    opened(new).close()
    ours = {one for one in tables_of(old) if one[2] in {name for _, _, name, _ in tables_of(new)}}
    assert ours == tables_of(new)
    after = rows_of(old)
    kept = [
        (f"own.{b}", f"{origin}.{key}", value, stamp, origin)
        for b, key, origin, value, stamp in before["registry"]
    ]
    assert sorted(kept) == sorted(row[:5] for row in after["entry"])
    assert kept
    del before["registry"]
    for name, rows in before.items():
        assert [row[: len(rows[0])] for row in after[name]] == rows if rows else after[name] == []
    assert sqlite3.connect(old).execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_the_older_file_is_kept_once_beside_the_upgraded_one(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    restore_version_1("north", path, {})
    before = rows_of(path)
    kept = path.with_name("store.db" + BEFORE_UPGRADE)
    kept.write_text("of an upgrade before")
    opened(path).close()
    assert rows_of(kept) == before
    assert kept.stat().st_mode & 0o777 == 0o600
    opened(path).close()
    assert {each.name for each in tmp_path.iterdir()} == {"store.db", kept.name}


def test_two_homes_of_version_1_find_each_other_again_and_deliver_what_waited(
    zmail: Zmail, tmp_path: Path
) -> None:
    ports = {"north": free_port(), "south": free_port()}
    homes = {name: tmp_path / name for name in ports}
    for name, home in homes.items():
        home.mkdir(mode=0o700)
        restore_version_1(name, home / "store.db", ports)
        shutil.copy(DATA / f"{name}.keys", home / "node.keys")
        (home / "node.keys").chmod(0o600)
        env = {"ZMAIL_LISTEN": f"tcp://127.0.0.1:{ports[name]}", "ZMAIL_NODE_NAME": name}
        assert zmail("node", "start", home=home, env=env).code == 0
    found = zmail("--as", "bravo", "inbox", "--json", home=homes["south"]).json["briefs"]
    deadline = time.monotonic() + 30
    while [brief["title"] for brief in found] != ["Waiting"] and time.monotonic() < deadline:
        found = zmail("--as", "bravo", "inbox", "--json", home=homes["south"]).json["briefs"]
    assert [brief["title"] for brief in found] == ["Waiting"]
    everything = zmail("--as", "bravo", "inbox", "--all", "--json", home=homes["south"]).json["briefs"]
    assert [brief["title"] for brief in everything] == ["Waiting", "First"]
    assert {
        brief["title"]
        for brief in zmail("--as", "alpha", "inbox", "--json", home=homes["north"]).json["briefs"]
    } == {"Local", "Back"}
    assert zmail("--as", "bravo", "reply", found[0]["id"], "-m", "here", home=homes["south"]).code == 0


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.db"
    restore_version_1("north", path, {})
    before = tables_of(path), rows_of(path)
    broken = (*STEPS[:-1], (*STEPS[-1], "CREATE TABLE peer (again INTEGER)"))
    monkeypatch.setattr("broker_free.schema.STEPS", broken)
    with pytest.raises(StoreFailed, match="already exists"):
        opened(path)
    assert (tables_of(path), rows_of(path)) == before
    monkeypatch.undo()
    opened(path).close()


# ── an application's own tables ─────────────────────────────────────────────────────────────────────────────────


class Parcel(pw.Model):
    """As the newest release of an application has it."""

    label = pw.TextField()
    grams = pw.IntegerField(default=0)

    class Meta:
        table_name = "parcel"


def weigh(conn: sqlite3.Connection) -> None:
    for number, label in conn.execute("SELECT id, label FROM parcel").fetchall():
        conn.execute("UPDATE parcel SET grams = ? WHERE id = ?", (len(label), number))


PARCELS = Migrations(
    application="parcels",
    steps=(("ALTER TABLE parcel ADD COLUMN grams INTEGER NOT NULL DEFAULT 0",), (weigh,)),
)


def parcels_of_version_1(path: Path) -> None:
    opened(path).close()
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE parcel (id INTEGER NOT NULL PRIMARY KEY, label TEXT NOT NULL)")
        made.execute("INSERT INTO parcel (label) VALUES ('box'), ('crate')")
    made.close()


def test_an_applications_tables_go_through_its_own_steps_once(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    parcels_of_version_1(path)
    for _ in range(2):
        store = opened(path, models=[Parcel], migrations=PARCELS)
        assert [(one.label, one.grams) for one in Parcel.select()] == [("box", 3), ("crate", 5)]
        Parcel.update(grams=Parcel.grams).execute()
        store.close()
    assert rows_of(path)["application"] == [("parcels", 3)]


def test_a_new_store_gets_an_applications_tables_as_they_are_now(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    opened(path, models=[Parcel], migrations=PARCELS).close()
    assert rows_of(path)["application"] == [("parcels", 3)]
    assert rows_of(path)["parcel"] == []


def test_an_applications_tables_of_the_future_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    opened(path, models=[Parcel], migrations=PARCELS).close()
    before = rows_of(path)
    with pytest.raises(UnsuitableHome, match="parcels were written by a newer version"):
        opened(path, models=[Parcel], migrations=Migrations(application="parcels"))
    assert rows_of(path) == before


def test_a_step_that_raises_undoes_this_packages_steps_too(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    restore_version_1("north", path, {})
    before = tables_of(path)

    def refuse(conn: sqlite3.Connection) -> None:
        raise RuntimeError("this step has a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        opened(path, models=[MailboxOfThen], migrations=Migrations(application="zmail", steps=((refuse,),)))
    assert tables_of(path) == before


class MailboxOfThen(pw.Model):
    callsign = pw.TextField(primary_key=True)

    class Meta:
        table_name = "mailbox"
