"""`zmail demo` does what it says, and leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folder for temporary files of one demo, short because sockets are made in it."""
    made = Path(tempfile.mkdtemp(prefix="zm-"))
    yield made
    shutil.rmtree(made)


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "zmail", "demo", *args],
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Find what still runs with a home in that folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.environ().get("ZMAIL_HOME", ""):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_the_demo_delivers_everything_once_and_leaves_nothing(folder: Path) -> None:
    demo = start(folder, "--json")
    stdout, stderr = demo.communicate(timeout=60)
    assert demo.returncode == 0, stderr
    result = json.loads(stdout)
    assert (result["lost"], result["duplicated"]) == (0, 0)
    assert result["sent"] == result["delivered"] == 32
    assert all(check["holds"] for check in result["checks"])
    assert all(route["p50"] > 0 for route in result["latency_ms"].values())
    assert stderr == "", "progress is for terminals"
    assert (processes_of(folder), list(folder.iterdir())) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(
    folder: Path, number: signal.Signals, eventually: Callable[..., None]
) -> None:
    demo = start(folder)
    eventually(lambda: len(processes_of(folder)) >= 3, 30)
    demo.send_signal(number)
    _, stderr = demo.communicate(timeout=30)
    assert demo.returncode == 130, stderr
    assert "Traceback" not in stderr
    eventually(lambda: processes_of(folder) == [])
    assert list(folder.iterdir()) == []
