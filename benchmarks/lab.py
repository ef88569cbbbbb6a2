"""The harness's side of child processes: started in their own session, asked over pipes, ended by pid.

A worker reads one JSON command a line on stdin and answers one JSON line on stdout. It ends when its stdin
ends, so that nothing is left behind even if the harness itself is killed. This file knows no system under test.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.machine import REPOSITORY

ANSWER_S = 120.0  # the longest command is a throughput round on a slow disk
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 3.0  # to notice the end of the input; a worker in the middle of a command does not
STOP_S = 6.0  # after SIGTERM; a guard gives its own child less


class WorkerFailed(Exception):
    """A child process died, answered with an error, or did not answer in time."""


class Worker:
    """One child process running a module of `benchmarks.workers`."""

    def __init__(self, module: str, *arguments: str, folder: Path, env: dict[str, str]) -> None:
        self._name = " ".join([module, *arguments[:1]])
        self._complaints = folder / f"stderr-{module}-{time.monotonic_ns()}"
        self._buffer = b""
        with self._complaints.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.workers.{module}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=REPOSITORY,
                env=env,
                start_new_session=True,  # the terminal's Ctrl-C is for the harness, which ends its workers
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:  # the answer's shape belongs to the worker
        """Give one command and wait for its answer."""
        self.begin(do, **arguments)
        return self.answer()

    def begin(self, do: str, **arguments: Any) -> None:
        """Give one command without waiting, so that two workers can act at the same time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"{self._name} has ended\n{self.last_words()}") from None

    def answer(self, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The next answer; the first one, before any command, says that the worker is ready."""
        line = self._read_line(time.monotonic() + timeout_s)
        parsed: dict[str, Any] = json.loads(line)
        return parsed

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def cpu_s(self) -> float:
        """Processor time used so far by this process and the processes below it."""
        process = psutil.Process(self._process.pid)
        used = 0.0
        for one in [process, *process.children(recursive=True)]:
            times = one.cpu_times()
            used += times.user + times.system
        return used

    def close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self, deadline: float) -> bool:
        """Whether the process has ended by `deadline`, on the monotonic clock."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close_output(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise WorkerFailed(f"{self._name} did not answer in time\n{self.last_words()}")
            arrived = os.read(descriptor, 1 << 20)
            if not arrived:
                raise WorkerFailed(f"{self._name} ended without an answer\n{self.last_words()}")
            self._buffer += arrived
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def last_words(self) -> str:
        """The end of what the process wrote to stderr."""
        with contextlib.suppress(OSError):
            return self._complaints.read_text(errors="replace")[-4000:]
        return ""


class Lab:
    """A temporary folder and the workers of one run. Leaving it ends every worker and removes every file."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._workers: list[Worker] = []
        self._folders = 0

    def __enter__(self) -> Lab:
        # A short name: the Unix sockets below it may have 103 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="zb-", dir=self._parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _without_interrupts():
            self._end_workers()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _end_workers(self) -> None:
        """End them all: by the end of their input, else by SIGTERM, else by SIGKILL. Waits for every one."""
        for worker in self._workers:
            worker.close_input()
        deadline = time.monotonic() + GRACE_S
        busy = [worker for worker in self._workers if not worker.wait(deadline)]
        for worker in busy:
            worker.terminate()
        deadline = time.monotonic() + STOP_S
        for worker in busy:
            if not worker.wait(deadline):
                worker.kill()
        for worker in self._workers:
            worker.close_output()

    def cpu_s(self) -> float:
        """Processor time used so far by the harness and all workers."""
        own = psutil.Process().cpu_times()
        return own.user + own.system + sum(worker.cpu_s() for worker in self._workers if worker.is_alive())

    def new_folder(self) -> Path:
        self._folders += 1
        folder = self.folder / str(self._folders)
        folder.mkdir(mode=0o700)
        return folder

    def worker(self, module: str, *arguments: str, env: dict[str, str] | None = None) -> Worker:
        """Start a worker; its first answer says that it is ready."""
        worker = Worker(module, *arguments, folder=self.folder, env={**clean_environment(), **(env or {})})
        self._workers.append(worker)
        return worker


def clean_environment() -> dict[str, str]:
    """This process's environment without what would let a session or a real mailbox into a measurement."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ZMAIL_", "CLAUDE", "PYTHON", "XDG_"))
    }
    return {**kept, "PYTHONPATH": str(REPOSITORY)}


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A second Ctrl-C must not stop the cleaning up that the first one caused. It is bounded by GRACE_S and STOP_S."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
