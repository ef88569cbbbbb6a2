"""Runs one foreign command and ends it when our input ends: no server outlives a harness that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import NoReturn

from benchmarks.workers import say

STOP_S = 4.0  # less than the harness gives us


def main() -> None:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr)
    signal.signal(signal.SIGTERM, lambda number, frame: _end(child))

    def follow() -> NoReturn:
        os._exit(
            child.wait() or 1
        )  # a server that ends by itself has failed: the harness sees our pipe close

    threading.Thread(target=follow, daemon=True).start()
    say({"pid": child.pid})
    sys.stdin.read()
    _end(child)


def _end(child: subprocess.Popen[bytes]) -> NoReturn:
    child.terminate()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    os._exit(0)


if __name__ == "__main__":
    main()
