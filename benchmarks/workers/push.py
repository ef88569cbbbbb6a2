"""A sender at the local door of a node, and sessions that are told: from the send to the line in their inbox socket.

A session is a real `zmail mcp` relay with a Unix socket in the place of Claude Code's inbox. Each round takes a new
one: a node posts at most 30 notices in a row into one session, because Claude Code would drop the rest.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from benchmarks.workers import Answer, serve
from broker_free.client import DoorClient
from zmail.paths import Home

NOTICE_S = 10.0
SENDER = "sender"
UNTIMED = 3  # the first notices of a session find cold caches

_HELLO = (
    {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "benchmarks", "version": "1"},
        },
    },
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
)


class Session:
    """One `zmail mcp` process and the inbox socket that it posts into."""

    def __init__(self, name: str, folder: Path) -> None:
        self._notices: queue.SimpleQueue[int] = queue.SimpleQueue()
        inbox = folder / f"{name}.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(inbox))
        self._listener.listen()
        threading.Thread(target=self._listen, daemon=True).start()
        self._relay = subprocess.Popen(
            [sys.executable, "-m", "zmail", "--as", name, "mcp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "CLAUDE_CODE_MESSAGING_SOCKET": str(inbox)},
        )

    def __enter__(self) -> Session:
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        for line in _HELLO:
            self._relay.stdin.write(json.dumps(line).encode() + b"\n")
        self._relay.stdin.flush()
        if "result" not in json.loads(self._relay.stdout.readline()):
            raise RuntimeError("the relay refused the handshake")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.close()
        self._relay.wait(NOTICE_S)
        self._relay.stdout.close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def next_notice_ns(self) -> int:
        """When the next notice was read, on the monotonic clock."""
        return self._notices.get(timeout=NOTICE_S)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with connection, connection.makefile("rb") as lines:
                for line in lines:
                    read = time.monotonic_ns()
                    if json.loads(line)["type"] == "user":
                        self._notices.put(read)


class Sender:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._door = DoorClient(Home.resolve(os.environ).door_path)
        self._sessions = 0

    def measure(self, *, count: int, gap_ms: float, body_bytes: int) -> Answer:
        """Send one brief after the other to a new session, each once the notice of the one before was read."""
        self._sessions += 1
        name = f"session{self._sessions}"
        sent: list[int] = []
        noticed: list[int] = []
        with Session(name, self._folder) as session:
            for number in range(UNTIMED + count):
                time.sleep(gap_ms / 1000)  # the load's own pace; nothing is waited for
                begun = time.monotonic_ns()
                self._door.call(
                    "send",
                    {"to": [name], "title": f"brief {number}", "body": "x" * body_bytes},
                    hints={"kind": "cli", "as": SENDER},
                )
                sent.append(time.monotonic_ns() - begun)
                noticed.append(session.next_notice_ns() - begun)
        return {"sent_ns": sent[UNTIMED:], "noticed_ns": noticed[UNTIMED:]}


def main() -> None:
    serve({"measure": Sender(Path(sys.argv[1])).measure}, ready={})


if __name__ == "__main__":
    main()
