"""Fork workers from a process that has imported everything: a node is up in milliseconds instead of half a second.

The zygote opens nothing and starts no thread, so a fork of it is as clean as a new process. It reads one JSON spec a
message from the socket on descriptor 0, with the worker's own socket attached, and answers with the pid. It reaps a
child only when asked to: until then the pid is a zombie, so no kill can ever meet a stranger.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SPEC_BYTES_MAX = 1 << 16


class Zygote:
    """The parent of all workers of this process. Used under a lock: fleets may run in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote"],
                stdin=theirs.fileno(),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,  # a Ctrl-C is for the tests, which end their workers themselves
            )

    def fork(self, spec: dict[str, Any], channel: socket.socket) -> int:
        """Start a worker that talks over `channel`; return its pid."""
        return int(self._ask(spec, [channel.fileno()])["pid"])

    def reap(self, pid: int) -> int | None:
        """Return how a worker ended (negative: the signal), or None while it lives. Its pid is free after that."""
        status: int | None = self._ask({"reap": pid}, [])["status"]
        return status

    def _ask(self, question: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(question).encode()], fds)
            answer: dict[str, Any] = json.loads(self._socket.recv(_SPEC_BYTES_MAX))
            return answer


@functools.cache
def zygote() -> Zygote:
    """The zygote of this process; it ends, with every worker, when this process does."""
    return Zygote()


def main() -> None:
    from tests.faults import worker

    asked = socket.socket(fileno=os.dup(0))
    children: set[int] = set()
    while True:
        data, fds, _, _ = socket.recv_fds(asked, _SPEC_BYTES_MAX, 1)
        if not data:
            break
        question = json.loads(data)
        if "reap" in question:
            pid, status = os.waitpid(question["reap"], os.WNOHANG)
            children.discard(pid)
            asked.send(json.dumps({"status": os.waitstatus_to_exitcode(status) if pid else None}).encode())
            continue
        pid = os.fork()
        if pid == 0:
            asked.close()
            worker.run(question, fds[0])
        os.close(fds[0])
        children.add(pid)
        asked.send(json.dumps({"pid": pid}).encode())
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
