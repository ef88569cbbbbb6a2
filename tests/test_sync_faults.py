"""Syncs that fail or take long (F8): what fails is never taken for done, and a slow disk is only slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, cannot, need_program

SHIM = Path(__file__).with_name("faults") / "shim.c"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not sys.platform.startswith("linux"):
        cannot("needs LD_PRELOAD as Linux has it")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [need_program("gcc"), "-shared", "-fPIC", "-O1", "-Wall", "-o", library, SHIM, "-ldl"]
    subprocess.run(command, check=True)
    return library


def run_cases(shim: Path, folder: Path, *cases: str) -> list[dict[str, Any]]:
    control = folder / "control"
    child = subprocess.run(
        [sys.executable, "-m", "tests.sync_worker", str(folder), str(control), *cases],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": str(shim),
            "SHIM_CONTROL": str(control),
            "SHIM_FOLDER": str(folder),
        },
        cwd=ROOT,
        capture_output=True,
        timeout=110,
    )
    assert child.returncode == 0, child.stderr.decode()[-3_000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_sync_that_fails_stops_the_node_and_loses_nothing_it_said_was_done(
    shim: Path, tmp_path: Path, record_property: Callable[[str, object], None], who: str
) -> None:
    results = run_cases(shim, tmp_path, *(f"{who}:{number}" for number in range(1, 10)))
    assert len(results) == 9
    record_property("faults", 9)
    for result in results:
        accepted, arrived = result["accepted"], result["arrived"]
        assert set(accepted) <= set(arrived), result
        assert arrived == sorted(set(arrived)), f"in order, each once: {result}"
        assert result["syncs"] == "f", f"no sync is tried again on the connection that failed: {result}"
        assert (result["refused"], result["readable"], result["link"]) == ("store-broken", True, "closed")
        assert "restart the node" in result["hint"]
        assert (result["after"], result["event"]) == ("ok", "quick check: ok")
        if who == "sender":
            assert result["errors"][0] in ("store-broken", "outcome-unknown")
            assert set(result["errors"][1:]) <= {"store-broken"}
        else:
            assert result["arrived before"] == int(result["case"].partition(":")[2]), (
                "not acked, not handed on"
            )
            assert accepted == list(range(12)), "the sender has nothing to do with it"


def test_a_slow_disk_is_slow_and_nothing_else(
    shim: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    results = run_cases(shim, tmp_path, "slow:50", "slow:500")
    assert len(results) == 2
    record_property("faults", 2)
    for result in results:
        assert result["arrived"] == list(range(12))
        assert result["states"] in ([], ["alive"]), "heartbeats go on beside a sync of half a second"
        assert result["health"] == "ok"
        assert result["took"] >= 12 * int(result["case"].partition(":")[2]), "the syncs did take that long"
