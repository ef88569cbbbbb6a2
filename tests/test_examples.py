"""The examples run as they stand and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PRINTS = {
    "two_nodes.py": [
        "on disk in the shop",
        "on disk in the warehouse",
        "filed: ['three chairs']",
    ],
    "simulated.py": ["20 schedules: every order confirmed once"],
    "work_queue.py": [
        "not now: order 0",
        "billed: order 1 (try 1)",
        "billed: order 2 (try 1)",
        "billed: order 0 (try 2)",
    ],
}


def test_every_example_is_run_here() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(PRINTS)


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_the_example_prints_what_it_promises(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.splitlines(), done.returncode) == (PRINTS[name], 0), done.stderr
