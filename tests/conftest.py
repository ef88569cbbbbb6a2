"""What every test file may use: a private home, the real command line in it, and waiting for a condition."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import psutil
import pytest

from tests.nodes import PATIENCE_S, ROOT, Worker


@dataclass(frozen=True, slots=True)
class Run:
    """How one command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error(self) -> Any:
        """The error object that `--json` leaves on stderr."""
        return json.loads(self.stderr.splitlines()[-1])["error"]


class Zmail(Protocol):
    """Run `zmail ARGS` to its end, in `home` if given, else in the test's own."""

    def __call__(
        self,
        *args: str | Path,
        home: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str | bytes = "",
        timeout: float = 60,
    ) -> Run: ...


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    Worker.end_all()


@pytest.fixture
def home() -> Iterator[Path]:
    """A private folder for ZMAIL_HOME, short enough for a socket; its node is stopped at the end."""
    folder = Path(tempfile.mkdtemp(prefix="zm-"))
    yield folder
    stop_node(folder)
    shutil.rmtree(folder)


@pytest.fixture
def zmail_env(home: Path, tmp_path: Path) -> Callable[[Path | None], dict[str, str]]:
    """Make the environment of a user whose only zmail is the one in `home`."""

    def env(other: Path | None = None) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": str(ROOT),
            "LANG": "C.UTF-8",
            "USER": "tester",
            "HOME": str(tmp_path),
            "ZMAIL_HOME": str(other or home),
            "ZMAIL_LISTEN": "tcp://127.0.0.1:0",
        }

    return env


@pytest.fixture
def zmail(zmail_env: Callable[[Path | None], dict[str, str]]) -> Iterator[Zmail]:
    """The command line as users run it: another process, a clean environment."""
    homes: set[Path] = set()

    def run(
        *args: str | Path,
        home: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str | bytes = "",
        timeout: float = 60,
    ) -> Run:
        if home is not None:
            homes.add(home)
        done = subprocess.run(
            [sys.executable, "-m", "zmail", *map(str, args)],
            env={**zmail_env(home), **(env or {})},
            cwd=ROOT,
            input=input.encode() if isinstance(input, str) else input,
            capture_output=True,
            timeout=timeout,
        )
        return Run(done.returncode, done.stdout.decode(), done.stderr.decode())

    yield run
    for each in homes:
        stop_node(each)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds, and fail when it does not in time."""

    def wait(predicate: Callable[[], object], timeout: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.01)

    return wait


def cannot(reason: str) -> NoReturn:
    """Skip a test whose fault cannot be made on this machine; where all of them must run, fail instead."""
    if os.environ.get("ZMAIL_REQUIRE_ROOT_FAULTS") == "1":
        pytest.fail(f"must not be skipped here (ZMAIL_REQUIRE_ROOT_FAULTS=1): {reason}")
    pytest.skip(reason)


def need_root() -> None:
    """For tests that mount file systems, make network namespaces, or act as another user."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        cannot("needs root on Linux")


def need_program(name: str) -> str:
    """For tests that call a program of the system. Returns its path."""
    return shutil.which(name) or cannot(f"needs {name}")


def stop_node(folder: Path, *, timeout: float = 5) -> None:
    """Stop every node process of a home and wait until it has gone.

    There may be more than the one that holds it: one that is still starting takes the home over from it.
    """
    deadline = time.monotonic() + timeout
    asked: set[int] = set()
    while nodes := node_processes(folder):
        for node in nodes:
            with contextlib.suppress(psutil.Error):  # it has just ended by itself
                if time.monotonic() > deadline:
                    node.kill()
                elif node.pid not in asked:
                    node.terminate()
                    asked.add(node.pid)
        time.sleep(0.01)


def node_processes(folder: Path) -> list[psutil.Process]:
    """Find the node processes of a home by their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and process.environ().get("ZMAIL_HOME") == str(folder) and "run" in process.cmdline():
                found.append(process)
    return found
