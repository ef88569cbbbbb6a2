"""Power loss, at any moment: what was promised is on the disk, whatever became of what was not synced.

Two real nodes work while every write and sync below their homes is recorded (`tests/faults/recorder.c`). Then the disk
is rebuilt as it may have been at some moment (`tests/power_loss.py`), opened with the real store, and compared with
what had been promised until then. A kill cannot show this: the kernel keeps what a dead process wrote.

pytest -m soak tests/test_power_loss.py       ten times as many moments
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from broker_free.errors import StoreFailed
from broker_free.limits import Limits
from broker_free.message import digest_of, id_from_bytes, id_to_bytes
from broker_free.security import load_or_create_keys, node_id_of
from broker_free.store import Store
from tests.conftest import ROOT, cannot, need_program
from tests.power_loss import Disk, How, Record, read_log

MESSAGES = 160  # that each node publishes, besides those from inside transactions
HOWS: tuple[How, ...] = ("nothing", "everything", "prefix", "any")


class Recording:
    """What two nodes did, and how it ended."""

    def __init__(self, folder: Path, *, synchronous: str, messages: int = MESSAGES) -> None:
        if sys.platform != "linux":
            cannot("the recorder is written for Linux")
        library, self.root, log = folder / "recorder.so", folder / "homes", folder / "log"
        subprocess.run(
            [
                need_program("gcc"),
                "-O2",
                "-shared",
                "-fPIC",
                "-o",
                library,
                ROOT / "tests/faults/recorder.c",
                "-ldl",
            ],
            check=True,
        )
        self.root.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "tests.power_loss_worker", self.root, str(messages), synchronous],
            cwd=ROOT,
            env={
                **os.environ,
                "LD_PRELOAD": str(library),
                "RECORDER_ROOT": str(self.root),
                "RECORDER_LOG": str(log),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.records = [one for one in read_log(log.read_bytes()) if not one.path.endswith("-shm")]
        self.node_ids: dict[str, str] = {}
        self.rows: dict[str, dict[int, bytes]] = {}  # by node: inbox row -> message id, as it was in the end
        for name in ("a", "b"):
            with closing(sqlite3.connect(self.root / name / "store.db")) as store:
                self.rows[name] = dict(store.execute("SELECT row, msg_id FROM inbox").fetchall())
            self.node_ids[name] = _keys_in(self.root / name)


def _keys_in(home: Path) -> str:
    def none() -> None:
        raise AssertionError("the keys are gone")

    return node_id_of(load_or_create_keys(home / "node.keys", none).public)  # type: ignore[arg-type]  # never makes any


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording(tmp_path_factory.mktemp("full"), synchronous="FULL")


def moments(records: list[Record], count: int, random: Random) -> Iterator[int]:
    """Choose after which records the power goes: half of them right after a promise, the rest anywhere."""
    promised = [at for at, record in enumerate(records, start=1) if record.kind == "M"]
    for number in range(count):
        yield random.choice(promised) if number % 2 else random.randint(1, len(records))


def lose_power(recording: Recording, folder: Path, *, count: int, seed: int) -> Counter[str]:
    """Lose the power `count` times; count what is wrong afterwards, by invariant, and what was looked at."""
    random, disk, found = Random(seed), Disk(), Counter[str]()
    taken = 0
    for number, moment in enumerate(sorted(moments(recording.records, count, random))):
        for record in recording.records[taken:moment]:
            disk.take(record)
        taken = moment
        how = random.choice(HOWS)
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in disk.after_power_loss(how, random).items():
            rebuilt = folder / Path(path).relative_to(recording.root)
            rebuilt.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            rebuilt.write_bytes(content)
            rebuilt.chmod(0o600)
        for name in ("a", "b"):
            if (folder / name).exists():
                for wrong in look(recording, folder / name, name, disk.marks, found):
                    found[wrong.split(":")[0]] += 1
                    found[f"{wrong} (seed {seed}, power loss {number} after record {moment}, {how})"] += 1
        found["moments"] += 1
    return found


def look(recording: Recording, home: Path, name: str, marks: list[str], found: Counter[str]) -> Iterator[str]:
    """Open a home after the power loss and yield what is wrong with it."""
    returned = {words[2] for mark in marks if (words := mark.split())[:2] == ["returned", name]}
    acked = max(
        (int(words[2]) for mark in marks if (words := mark.split())[:2] == ["acked", name]), default=0
    )
    if (home / "node.keys").exists() and _keys_in(home) != recording.node_ids[name]:
        yield "keys: another node came back"
    if not (home / "store.db").exists():
        if returned or acked:
            yield "I1: the store is gone"
        return
    store = Store(home / "store.db", me=recording.node_ids[name], limits=Limits())
    try:
        store.open()
    except StoreFailed as error:
        yield f"I9: {error.message}"
        return
    ask = store._conn.execute
    try:
        if ask("PRAGMA integrity_check").fetchall() != [("ok",)]:
            yield "I9: integrity_check"
        outbox = {id_from_bytes(one) for (one,) in ask("SELECT msg_id FROM outbox WHERE state IN (0, 1)")}
        found["promises"] += len(returned)
        for lost in returned - outbox:
            yield f"I1: {lost} had been published"
        inbox = ask(
            "SELECT p.node_id, i.row, i.msg_id, i.lane, i.meta, i.body, i.digest FROM inbox i"
            " JOIN peer p ON p.id = i.peer ORDER BY i.row"
        ).fetchall()
        found["acks"] += acked
        held = {row: raw_id for _, row, raw_id, *_ in inbox}
        for row, raw_id in recording.rows[name].items():
            if row <= acked and held.get(row) != raw_id:
                yield f"I4: row {row} had been acked"
        if len(set(held.values())) != len(held):
            yield "I2: a message twice"
        if list(held) != sorted(recording.rows[name])[: len(held)]:
            yield "I3: what is there is not the beginning of what arrived"
        for sender, row, _, lane, meta, body, digest in inbox:
            if digest_of(sender=sender, lane=lane, meta=meta, body=body) != digest:
                yield f"I5: row {row} is not what was sent"
        yield from _effects(store, inbox)
    finally:
        store.close()


def _effects(store: Store, inbox: list[tuple[str, int, bytes, int, bytes, bytes, bytes]]) -> Iterator[str]:
    """An effect, a job and a transaction are on disk with the row they belong to, or neither is."""
    ask = store._conn.execute
    if not ask("SELECT 1 FROM sqlite_schema WHERE name = 'filed'").fetchone():
        return
    filed: dict[str, list[bytes]] = {"effect": [], "job": [], "sent": []}
    for message_id, how in ask("SELECT message, how FROM filed ORDER BY id"):
        filed[how].append(id_to_bytes(message_id))
    mail = [raw_id for _, _, raw_id, _, meta, _, _ in inbox if json.loads(meta)["subject"] == "mail"]
    if filed["effect"] != mail:
        yield "effects: not once for each message"
    done = ask(
        "SELECT i.msg_id FROM inbox i WHERE i.state <> 0 AND bf_subject(i.meta) = 'task'"
        " AND NOT EXISTS (SELECT 1 FROM job WHERE job.row = i.row)"
    ).fetchall()
    if sorted(filed["job"]) != sorted(raw_id for (raw_id,) in done):
        yield "jobs: what is settled is not what was written"
    queued = {raw_id for (raw_id,) in ask("SELECT msg_id FROM outbox")}
    if not set(filed["sent"]) <= queued:
        yield "transactions: a row without the message published beside it"


def assert_sound(found: Counter[str], *, moments: int) -> None:
    wrong = [what for what in found if ":" in what]
    assert not wrong, "\n".join(wrong[:20])
    assert found["moments"] == moments
    assert found["promises"] > 10 * moments, "there was much to be lost"
    assert found["acks"] > 10 * moments


def test_what_was_promised_survives_a_power_loss_at_any_moment(
    recording: Recording, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kinds = Counter(record.kind + record.path.rpartition("store.db")[2] for record in recording.records)
    assert kinds["S"] > 5, "checkpoints happen on the way: power is lost in them too"
    assert kinds["U-wal"] >= 4, "so does the end of a log, with a new one after it"
    assert_sound(lose_power(recording, tmp_path / "after", count=500, seed=1), moments=500)
    record_property("faults", 500)


@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
def test_the_same_look_finds_what_is_lost_without_a_sync_at_each_commit(
    tmp_path: Path, synchronous: str
) -> None:
    """That the test above can fail, and why `FULL` is not a matter of taste."""
    recording = Recording(tmp_path, synchronous=synchronous, messages=60)
    found = lose_power(recording, tmp_path / "after", count=40, seed=1)
    print(f"{synchronous}: {found['I1']} publishes, {found['I4']} acked rows, {found['I9']} stores lost")
    if synchronous == "NORMAL":
        assert found["I1"] > 40
        assert found["I4"] > 40
    else:  # not even the file is sound
        assert found["I1"] > 40
        assert found["I9"] > 0


@pytest.mark.soak
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("seed", range(10))
def test_what_was_promised_survives_ten_times_as_many(
    tmp_path: Path, record_property: Callable[[str, object], None], seed: int
) -> None:
    recording = Recording(tmp_path, synchronous="FULL", messages=2 * MESSAGES)
    assert_sound(lose_power(recording, tmp_path / "after", count=500, seed=seed), moments=500)
    record_property("faults", 500)
