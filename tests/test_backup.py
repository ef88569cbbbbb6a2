"""Backup and restore, looking in from outside, and stores that go back in time (F11), with real nodes."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from broker_free import Node
from broker_free.errors import InvalidInput, NodeInUse, StoreFailed, UnsuitableHome
from broker_free.storefile import looking_into, restore
from tests.conftest import Zmail, need_root
from tests.nodes import run, until

BACKUP = "copy.db"


class Machine:
    """A node that may be stopped and started again at the same address, and what has arrived at it."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.home = name, home
        self.listen = "tcp://127.0.0.1:0"
        self.arrived: list[int] = []
        self.node: Node

    async def start(self) -> Node:
        self.node = Node(self.name, home=self.home, listen=self.listen)
        self.node.effect("n", lambda tx, one: tx.after_commit(lambda: self.arrived.append(int(one.body))))
        await self.node.start()
        self.listen = self.node.endpoints[0]
        return self.node

    async def stop(self) -> None:
        await self.node.close()

    @property
    def store(self) -> Path:
        return self.home / "store.db"


async def paired(tmp_path: Path) -> tuple[Machine, Machine]:
    a, b = Machine("a", tmp_path / "a"), Machine("b", tmp_path / "b")
    await a.start()
    await b.start()
    await meet(a, b)
    return a, b


async def meet(a: Machine, b: Machine) -> None:
    await b.node.join((await a.node.invite()).encode())
    await until(lambda: all(peer.link == "open" for one in (a, b) for peer in one.node.peers()))


async def send(a: Machine, b: Machine, *numbers: int) -> None:
    for number in numbers:
        receipt = await a.node.publish("n", str(number).encode(), to=[b.node.node_id])
        await receipt.delivered(30)


async def event(machine: Machine, kind: str) -> str:
    async with asyncio.timeout(30):
        while not (found := await machine.node.events(kind=kind)):
            await asyncio.sleep(0.05)
    return found[0].detail


# ── backup ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_backup_is_consistent_private_and_made_while_mail_flows(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = await paired(tmp_path)
        for _ in range(20):  # some megabytes, so that it takes several steps
            await a.node.publish("big", os.urandom(500_000), to=[a.node.node_id])
        copying = asyncio.ensure_future(a.node.backup(tmp_path / BACKUP))
        number = 0
        while not copying.done() or number < 20:
            await send(a, b, number)
            number += 1
        assert await copying == (tmp_path / BACKUP).stat().st_size > 9_000_000
        assert stat.S_IMODE((tmp_path / BACKUP).stat().st_mode) == 0o600
        with closing(sqlite3.connect(tmp_path / BACKUP)) as copy:
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert copy.execute("SELECT count(*) FROM inbox").fetchone() == (20,)
        assert {each.name for each in tmp_path.iterdir()} == {"a", "b", BACKUP}, "no companions, no draft"
        await a.stop()
        await b.stop()

    run(main())


def test_a_backup_overwrites_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            (tmp_path / BACKUP).write_text("precious")
            with pytest.raises(InvalidInput, match="overwrites nothing"):
                await a.backup(tmp_path / BACKUP)
            with pytest.raises(InvalidInput, match="no folder"):
                await a.backup(tmp_path / "nowhere" / BACKUP)
            assert (tmp_path / BACKUP).read_text() == "precious"

    run(main())


def test_a_restore_is_refused_while_a_node_has_the_home_and_for_what_is_no_backup(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            await a.backup(tmp_path / BACKUP)
            with pytest.raises(NodeInUse):
                restore(tmp_path / "a", tmp_path / BACKUP, now_ms=1)
        before = (tmp_path / "a" / "store.db").read_bytes()
        data = (tmp_path / BACKUP).read_bytes()
        other, cut, newer = tmp_path / "other.db", tmp_path / "cut.db", tmp_path / "newer.db"
        with closing(sqlite3.connect(other)) as made:
            made.execute("CREATE TABLE shopping (item TEXT)")
        cut.write_bytes(data[: len(data) // 2])
        newer.write_bytes(data[:60] + (99).to_bytes(4, "big") + data[64:])  # user_version
        for path, error in ((other, InvalidInput), (cut, StoreFailed), (newer, UnsuitableHome)):
            with pytest.raises(error):
                restore(tmp_path / "a", path, now_ms=1)
        with pytest.raises(InvalidInput, match="no store"):
            restore(tmp_path / "a", tmp_path / "nothing", now_ms=1)
        assert (tmp_path / "a" / "store.db").read_bytes() == before
        assert not [each for each in (tmp_path / "a").iterdir() if each.name.startswith(".store")]

    run(main())


def test_the_replaced_store_is_kept_with_its_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            await a.backup(tmp_path / BACKUP)
            await a.publish("n", b"1", to=[a.node_id])
            for name in ("store.db", "store.db-wal", "store.db.open"):  # as a killed node leaves them
                shutil.copy(tmp_path / "a" / name, tmp_path / name)
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        for name in ("store.db", "store.db-wal", "store.db.open"):
            shutil.move(tmp_path / name, home / name)
        kept = restore(home, tmp_path / BACKUP, now_ms=7)
        assert kept == home / "store.db.replaced-7"
        for path, count in ((home / "store.db", 0), (kept, 1)):
            with looking_into(path) as conn:
                assert conn.execute("SELECT count(*) FROM inbox").fetchone() == (count,)

    run(main())


def test_the_commands_save_refuse_restore_and_keep_what_they_replace(
    zmail: Zmail, home: Path, tmp_path: Path
) -> None:
    zmail("--as", "bravo", "check")
    zmail("--as", "alpha", "send", "bravo", "-m", "before")
    saved = zmail("backup", tmp_path / BACKUP)
    assert (saved.code, saved.stdout.split()[0]) == (0, "saved")
    assert "keys are not in it" in saved.stderr
    zmail("--as", "alpha", "send", "bravo", "-m", "after")
    again = zmail("backup", tmp_path / BACKUP, "--json")
    assert (again.code, again.error["code"]) == (2, "invalid")
    running = zmail("restore", tmp_path / BACKUP)
    assert running.code == 1
    assert "already running" in running.stderr
    assert "zmail node stop" in running.stderr
    zmail("node", "stop")
    restored = zmail("restore", tmp_path / BACKUP, "--json")
    assert restored.code == 0, restored.stderr
    assert Path(restored.json["kept"]).exists()
    assert [one["title"] for one in zmail("--as", "bravo", "inbox", "--json").json["briefs"]] == ["before"]
    assert zmail("--as", "bravo", "status", "--json").json["store"]["state"] == "ok"


# ── a store that goes back in time ──────────────────────────────────────────────────────────────────────────────


def test_a_receiver_restored_from_an_old_backup_is_sent_again_what_it_lost(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = await paired(tmp_path)
        await send(a, b, 1, 2, 3)
        await b.node.backup(tmp_path / BACKUP)
        await send(a, b, 4, 5, 6)
        await b.stop()
        restore(b.home, tmp_path / BACKUP, now_ms=1)
        b.arrived.clear()
        await b.start()
        await until(lambda: len(b.arrived) == 3)
        assert b.arrived == [4, 5, 6]
        assert "sent again" in await event(a, "regression")
        await send(a, b, 7)
        await until(lambda: b.arrived == [4, 5, 6, 7])
        await a.stop()
        await b.stop()

    run(main())


def test_a_sender_restored_from_an_old_backup_sends_nothing_twice(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = await paired(tmp_path)
        await send(a, b, 1)
        await b.stop()
        await a.node.publish("n", b"2", to=[b.node.node_id])
        await a.node.backup(tmp_path / BACKUP)  # 2 still waits in it
        await b.start()
        await until(lambda: b.arrived == [1, 2])
        await send(a, b, 3)
        await a.stop()
        restore(a.home, tmp_path / BACKUP, now_ms=1)
        await a.start()
        await send(a, b, 4)
        await until(lambda: b.arrived[-1] == 4)
        assert b.arrived == [1, 2, 3, 4]
        await a.stop()
        await b.stop()

    run(main())


def test_a_receiver_whose_store_is_gone_says_so_and_gets_the_window_again_once_it_is_paired(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        a, b = await paired(tmp_path)
        await send(a, b, 1, 2, 3)
        await b.stop()
        for each in b.home.glob("store.db*"):
            each.unlink()
        b.arrived.clear()
        node = await b.start()
        assert "no store" in await event(b, "store-missing")
        assert node.peers() == []
        await meet(a, b)
        await until(lambda: len(b.arrived) == 3)
        assert b.arrived == [1, 2, 3]
        assert "delivered messages are sent again" in await event(a, "regression")
        await a.stop()
        await b.stop()

    run(main())


# ── looking in from outside ─────────────────────────────────────────────────────────────────────────────────────


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        each.name: (each.stat().st_mtime_ns, each.stat().st_mode, each.read_bytes())
        for each in folder.iterdir()
        if each.is_file() and not each.name.endswith("-shm")  # whose locks are in it
    }


def test_an_outsider_reads_a_store_in_use_and_leaves_no_trace(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            await a.publish("n", b"1", to=[a.node_id])
            before = snapshot(tmp_path / "a")
            with looking_into(tmp_path / "a" / "store.db") as conn:
                assert conn.execute("SELECT body FROM inbox").fetchall() == [(b"1",)]
                with pytest.raises(sqlite3.OperationalError, match="readonly"):
                    conn.execute("DELETE FROM inbox")
            assert snapshot(tmp_path / "a") == before
            await a.publish("n", b"2", to=[a.node_id])

    run(main())


@pytest.mark.parametrize("left", [["store.db"], ["store.db", "store.db-wal", "store.db.open"]])
def test_an_outsider_reads_a_store_that_nobody_has(tmp_path: Path, left: list[str]) -> None:
    async def main() -> None:
        dead = tmp_path / "dead"
        dead.mkdir()
        async with Node("a", home=tmp_path / "a") as a:
            await a.publish("n", b"1", to=[a.node_id])
            if len(left) > 1:
                for name in left:
                    shutil.copy(tmp_path / "a" / name, dead / name)
        if len(left) == 1:
            shutil.copy(tmp_path / "a" / "store.db", dead / "store.db")
        before = snapshot(dead)
        with looking_into(dead / "store.db") as conn:
            assert conn.execute("SELECT body FROM inbox").fetchall() == [(b"1",)]
            assert snapshot(dead) == before
        assert snapshot(dead) == before
        assert sorted(each.name for each in dead.iterdir()) == sorted(left)

    run(main())


@pytest.mark.parametrize("is_clean", [True, False])
def test_an_outsider_reads_a_store_on_a_disk_that_cannot_be_written(tmp_path: Path, is_clean: bool) -> None:
    need_root()

    async def main() -> None:
        dead, seen = tmp_path / "dead", tmp_path / "seen"
        dead.mkdir()
        seen.mkdir()
        async with Node("a", home=tmp_path / "a") as a:
            await a.publish("n", b"1", to=[a.node_id])
            if not is_clean:
                for name in ("store.db", "store.db-wal", "store.db-shm"):
                    shutil.copy(tmp_path / "a" / name, dead / name)
        if is_clean:
            shutil.copy(tmp_path / "a" / "store.db", dead / "store.db")
        subprocess.run(["mount", "--bind", dead, seen], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", seen], check=True)
            with looking_into(seen / "store.db") as conn:
                assert conn.execute("SELECT body FROM inbox").fetchall() == [(b"1",)]
        finally:
            subprocess.run(["umount", "-l", seen], check=True)

    run(main())


def test_an_outsider_is_told_politely_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with pytest.raises(InvalidInput, match="no store"), looking_into(path):
        pass
    with closing(sqlite3.connect(path)) as made:
        made.execute("PRAGMA user_version = 99")
    with pytest.raises(UnsuitableHome, match="newer version"), looking_into(path):
        pass
    path.write_bytes(b"text" * 1_000)
    with pytest.raises(StoreFailed, match="cannot read"), looking_into(path):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["store.db"]
