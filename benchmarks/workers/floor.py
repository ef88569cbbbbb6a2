"""The least that a durable hand-over can cost: a round trip between two processes and a sync at the far end.

Over tcp with pyzmq (what the nodes use between them) and over a Unix stream socket (what a session and its
node use). Nothing is parsed, stored for later or acknowledged twice; whoever is faster than this does not sync.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import zmq

from benchmarks.workers import Answer, end_with_input, paced, say, serve

BLOCK = b"\0" * 4096  # one SQLite page
FILE_BLOCKS = 1024  # 4 MiB, written before: an overwrite, as in a write-ahead log that has been reset
SYNC = b"s"  # first byte of a request that wants to be on disk before its answer
PLAIN = b"p"
ANSWER = b"a" * 25  # as long as an ack's four small frames


class SyncedFile:
    """Overwrites one block after the other, each on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._next = 0
        os.write(self._descriptor, BLOCK * FILE_BLOCKS)
        os.fsync(self._descriptor)

    def write(self) -> None:
        os.pwrite(self._descriptor, BLOCK, self._next % FILE_BLOCKS * len(BLOCK))
        self._next += 1
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync does not reach the disk, and SQLite is told the same
            fcntl.fcntl(self._descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(self._descriptor)


def respond_tcp(folder: Path) -> NoReturn:
    file = SyncedFile(folder / "floor-tcp")
    router = zmq.Context().socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    end_with_input()
    say({"endpoint": f"tcp://127.0.0.1:{port}"})
    while True:
        sender, request = router.recv_multipart()
        if request.startswith(SYNC):
            file.write()
        router.send_multipart([sender, ANSWER])


def respond_unix(folder: Path) -> NoReturn:
    file = SyncedFile(folder / "floor-unix")
    path = str(folder / "floor.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        end_with_input()
        say({"endpoint": path})
        connection, _ = listener.accept()
    while True:
        request = connection.recv(65536)
        if not request:
            os._exit(0)
        while not request.endswith(b"\n"):
            request += connection.recv(65536)
        if request.startswith(SYNC):
            file.write()
        connection.sendall(ANSWER + b"\n")


def probe_tcp(endpoint: str) -> None:
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(endpoint)

    def exchange(request: bytes) -> None:
        dealer.send(request)
        dealer.recv()

    serve({"measure": _measuring(exchange)}, ready={})
    dealer.context.destroy(linger=0)


def probe_unix(endpoint: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(endpoint)

        def exchange(request: bytes) -> None:
            connection.sendall(request)
            while not connection.recv(65536).endswith(b"\n"):
                pass

        serve({"measure": _measuring(exchange)}, ready={})


def _measuring(exchange: Callable[[bytes], None]) -> Callable[..., Answer]:
    def measure(*, count: int, gap_ms: float, body_bytes: int, sync: bool) -> Answer:
        request = (SYNC if sync else PLAIN) + b"x" * (body_bytes - 2) + b"\n"
        samples = []
        for _ in paced(count, gap_ms):
            begun = time.monotonic_ns()
            exchange(request)
            samples.append(time.monotonic_ns() - begun)
        return {"samples_ns": samples}

    return measure


def main() -> None:
    role, where = sys.argv[1:]
    if role == "respond-tcp":
        respond_tcp(Path(where))
    elif role == "respond-unix":
        respond_unix(Path(where))
    elif role == "probe-tcp":
        probe_tcp(where)
    else:
        probe_unix(where)


if __name__ == "__main__":
    main()
