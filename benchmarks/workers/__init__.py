"""The child processes of a measurement. Here: their side of the pipe to the harness (see benchmarks/lab.py)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

Answer = dict[str, Any]  # JSON; its shape belongs to the command


def say(answer: Answer) -> None:
    """One line to the harness. The first one says that this worker is ready."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def serve(commands: Mapping[str, Callable[..., Answer]], *, ready: Answer) -> None:
    """Answer commands until the harness closes our input."""
    say(ready)
    for line in sys.stdin:
        arguments = json.loads(line)
        say(commands[arguments.pop("do")](**arguments))


def end_with_input() -> None:
    """For a worker that only responds: leave as soon as the harness closes our input."""

    def wait() -> NoReturn:
        sys.stdin.read()
        os._exit(0)  # the main thread is inside a blocking receive and holds nothing worth keeping

    threading.Thread(target=wait, daemon=True).start()


def paced(count: int, gap_ms: float) -> Iterator[None]:
    """`count` turns: without a gap one right after the other, else starting one each `gap_ms`."""
    due = time.monotonic()
    for _ in range(count):
        if gap_ms:
            due = max(due + gap_ms / 1000, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
        yield
