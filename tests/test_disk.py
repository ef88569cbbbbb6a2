"""A full disk (F9): new mail is refused before anything is written, nothing accepted is lost, it passes by itself."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker_free import Node, Tx
from broker_free.disk import BALLAST, Disk, free_bytes
from broker_free.errors import DiskFloor, DiskLow
from broker_free.limits import KIB, MIB, Limits
from broker_free.store import CURRENT
from tests.conftest import ROOT, need_root
from tests.nodes import pair, run, until

# Scaled down to a disk of 8 MiB. The floor still holds the log and what is moved from it into the file, 1 MiB each.
FLOOR = 2_500 * KIB
SMALL = Limits(disk_free_bytes_min=FLOOR, ballast_bytes=1_500 * KIB, heartbeat_ms=200)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    need_root()
    at = tmp_path / "small"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Take all room but `leave` bytes, as another program would."""
    junk = folder / "junk"
    with open(junk, "ab", buffering=0) as file:
        try:
            while (room := free_bytes(folder) - leave) > 0:
                file.write(bytes(min(room, 64 * KIB)))
        except OSError:
            pass
    return junk


def collecting(node: Node) -> list[bytes]:
    arrived: list[bytes] = []
    node.effect("t.>", lambda tx, envelope: tx.after_commit(lambda: arrived.append(envelope.body)))
    return arrived


# ── the rule ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_room_is_asked_for_once_a_second_and_refused_below_the_floor_until_there_is_plenty(
    tmp_path: Path,
) -> None:
    free = 10 * MIB
    asked = 0

    def ask(folder: Path) -> int:
        nonlocal asked
        asked += 1
        return free

    disk = Disk(tmp_path / "store.db", SMALL, free=ask)
    assert not disk.look(0)
    for _ in range(200):
        disk.admit(100)
    assert not disk.look(999)
    assert asked == 1
    free = FLOOR - 1
    assert disk.look(1_000)
    with pytest.raises(DiskFloor, match="nearly full"):
        disk.admit(1)
    free = FLOOR + 1  # on the line: not yet
    assert not disk.look(2_000)
    free = FLOOR + FLOOR // 8
    assert disk.look(3_000)
    disk.admit(1)


def test_a_burst_is_noticed_before_the_second_is_over(tmp_path: Path) -> None:
    free = 4 * MIB
    disk = Disk(tmp_path / "store.db", SMALL, free=lambda _: free)
    disk.look(0)
    free = 0
    admitted: list[int] = []
    with pytest.raises(DiskFloor):  # noqa: PT012  any of them may be the one
        for _ in range(100):
            disk.admit(100 * KIB)
            admitted.append(1)
    assert len(admitted) < 20


def test_the_ballast_takes_real_room_and_is_given_up_only_when_the_disk_is_full(tmp_path: Path) -> None:
    free = 10 * MIB
    disk = Disk(tmp_path / "store.db", SMALL, free=lambda _: free)
    ballast = tmp_path / BALLAST
    disk.look(0)
    assert ballast.stat().st_blocks * 512 >= SMALL.ballast_bytes
    assert ballast.stat().st_mode & 0o777 == 0o600
    free = FLOOR - 1  # low, not full
    disk.look(1_000)
    assert ballast.exists()
    disk.filled()
    assert not ballast.exists()
    free = 10 * MIB
    assert disk.look(2_000)
    assert ballast.exists()


def test_a_disk_without_room_for_it_gets_no_ballast(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "store.db", SMALL, free=lambda _: FLOOR + 1)
    disk.look(0)
    assert not disk.is_low
    assert not (tmp_path / BALLAST).exists()


# ── a sender whose disk fills ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [100, 4_000, 60_000, 300_000])
def test_a_sender_on_a_full_disk_refuses_keeps_what_it_accepted_and_resumes(
    small_disk: Path, tmp_path: Path, size: int
) -> None:
    async def main() -> None:
        accepted: list[bytes] = []
        b = Node("b", home=tmp_path / "b")
        arrived = collecting(b)
        async with Node("a", home=small_disk / "a", limits=SMALL) as a:
            async with Node("b", home=tmp_path / "b") as first:
                await pair(a, first)
                peer = first.node_id

            async def send(number: int) -> None:
                body = f"{number} ".encode().ljust(size, b".")
                await a.publish("t.x", body, to=[peer])
                accepted.append(body)

            ballast = small_disk / "a" / BALLAST
            assert ballast.exists()
            # Room for some messages: the floor is what stops them, not the disk.
            junk = fill(small_disk, leave=FLOOR + 600 * KIB)
            with pytest.raises(DiskLow):  # noqa: PT012  any of them may be the one
                for number in range(10_000):
                    await send(number)
            assert accepted
            assert free_bytes(small_disk) > 0
            await until(lambda: a.health.state == "disk-low")
            assert "free some space" in a.health.hint

            # Now somebody else takes all the rest: reading, settling and pruning go on.
            fill(small_disk)
            assert await a.read(lambda db: db.execute_sql("SELECT count(*) FROM outbox").fetchone()) == (
                len(accepted),
            )
            with pytest.raises(DiskLow):
                await send(10_001)
            settled = 0
            while ballast.exists() and settled < 300:  # until SQLite itself fails, for once
                settled += await settle(a)
            assert not ballast.exists()
            settled += await settle(a)

            junk.unlink()
            await until(lambda: a.health.state == "ok")
            await until(ballast.exists)
            await send(10_002)
            assert await a.read(lambda db: db.execute_sql(_REASON).fetchone()) == (str(settled),)
            if size == 100:  # they are written with the next house-keeping, some seconds later
                kinds = [event.kind for event in reversed(await events(a, at_least=2))]
                assert kinds[:2] == ["disk-low", "disk-room"]
            async with b:
                await until(lambda: len(arrived) == len(accepted))
                assert arrived == accepted

    run(main())


_REASON = "SELECT reason FROM outbox ORDER BY row LIMIT 1"


async def settle(node: Node) -> int:
    """Write something small on a full disk, as settling a job does."""

    def count(tx: Tx) -> int:
        sql = "UPDATE outbox SET reason = coalesce(reason, 0) + 1 WHERE row = (SELECT min(row) FROM outbox)"
        return int(CURRENT.execute_sql(sql).rowcount)

    for _ in range(5):  # the one that finds the disk full is refused; it makes the room for those after it
        try:
            return await node.transact(count)
        except DiskLow:
            continue
    raise AssertionError("nothing can be settled on a full disk")


async def events(node: Node, *, at_least: int) -> list[Any]:
    async with asyncio.timeout(30):
        while len(found := await node.events()) < at_least:
            await asyncio.sleep(0.05)
    return found


# ── a receiver whose disk fills ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1_000, 200_000])
def test_a_receiver_on_a_full_disk_makes_its_peer_wait_and_loses_nothing(
    small_disk: Path, tmp_path: Path, size: int
) -> None:
    async def main() -> None:
        b = Node("b", home=small_disk / "b", limits=SMALL)
        arrived = collecting(b)
        async with Node("a", home=tmp_path / "a") as a, b:
            await pair(a, b)
            junk = fill(small_disk, leave=FLOOR - 64 * KIB)
            await until(lambda: b.health.state == "disk-low")
            await until(lambda: a.peers()[0].is_blocked)
            # Twice their bytes, in the log and in the file, must fit above the floor: else it is low again for good.
            count = min(20, MIB // size)
            bodies = [f"{number} ".encode().ljust(size, b".") for number in range(count)]
            receipts = [await a.publish("t.x", body, to=[b.node_id]) for body in bodies]
            fill(small_disk)
            assert arrived == []
            junk.unlink()
            for receipt in receipts:
                await receipt.delivered(30)
            await until(lambda: len(arrived) == len(bodies))
            assert arrived == bodies

    run(main())


def test_what_arrives_on_a_disk_that_is_full_to_the_brim_is_not_acknowledged(
    small_disk: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        # No floor: only SQLite's own "full" is left to stop it.
        limits = Limits(disk_free_bytes_min=0, ballast_bytes=64 * KIB)
        b = Node("b", home=small_disk / "b", limits=limits)
        arrived = collecting(b)
        async with Node("a", home=tmp_path / "a") as a, b:
            await pair(a, b)
            junk = fill(small_disk)
            bodies = [bytes([number]) * 100_000 for number in range(30)]
            receipts = [await a.publish("t.x", body, to=[b.node_id]) for body in bodies]
            await until(lambda: b.health.state == "disk-low")
            junk.unlink()
            for receipt in receipts:
                await receipt.delivered(30)
            await until(lambda: len(arrived) == len(bodies))
            assert arrived == bodies

    run(main())


# ── a limit of the process ──────────────────────────────────────────────────────────────────────────────────────

_CHILD = """
import asyncio, json, resource, sys
from broker_free import Node
from broker_free.errors import DiskLow
from broker_free.limits import Limits

async def main(home, size):
    async with Node("a", home=home, limits=Limits(disk_free_bytes_min=0, ballast_bytes=0)) as a:
        consumer = a.subscribe("t.>", durable="all")
        await consumer.__aenter__()
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.RLIM_INFINITY))
        accepted = 0
        try:
            for number in range(5_000):
                await a.publish("t.x", bytes(size), to=[a.node_id])
                accepted += 1
        except DiskLow as error:
            print(json.dumps({"refused": error.code, "message": error.message}), flush=True)
        (count,) = await a.read(lambda db: db.execute_sql("SELECT count(*) FROM inbox").fetchone())
        while a.health.state != "disk-low":
            await asyncio.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        while a.health.state != "ok":
            await asyncio.sleep(0.01)
        await a.publish("t.x", b"after", to=[a.node_id])
        (after,) = await a.read(lambda db: db.execute_sql("SELECT count(*) FROM inbox").fetchone())
        print(json.dumps({"accepted": accepted, "kept": count, "after": after}), flush=True)

asyncio.run(asyncio.wait_for(main(sys.argv[1], int(sys.argv[2])), 60))
"""


@pytest.mark.parametrize("size", [500, 30_000, 250_000])
def test_a_process_whose_files_may_not_grow_refuses_and_resumes(tmp_path: Path, size: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "a"), str(size)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=90,
    )
    assert child.returncode == 0, child.stderr.decode()[-2_000:]
    refused, result = map(json.loads, child.stdout.splitlines())
    assert refused["refused"] == "disk-low"
    assert "size limit" in refused["message"]
    assert result["kept"] == result["accepted"] > 0
    assert result["after"] == result["kept"] + 1
