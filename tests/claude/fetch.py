"""Where the pinned Claude Code client comes from: npm, once, into a cache outside the tree.

`python -m tests.claude.fetch` fetches it ahead of the tests. Several processes may ask at once: one fetches, the
others wait for it; a fetch that was killed leaves nothing that looks finished. The program itself needs no Node.js.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.claude.waiting import until

VERSION = "2.1.329"
PACKAGE = "@anthropic-ai/claude-code"
FETCH_S_MAX = 280  # 380 MB; below the time limit of the tests that wait for it


class ClientUnavailable(Exception):
    """The client cannot be had on this machine now; the text says why."""


def claude_program() -> Path:
    """Return the path of the client's native program, fetching it first if this machine has not got it yet."""
    cache = _cache()
    folder = cache / f"claude-code-{VERSION}"
    found = _program_in(folder)
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{folder.name}.lock"):
            found = _program_in(folder) or _fetch_into(folder)
    return found


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zmail-tests"


def _program_in(folder: Path) -> Path | None:
    """npm picks the package of this machine's system and processor; its name ends in them."""
    return next(folder.glob(f"node_modules/{PACKAGE}-*/claude"), None)


def _fetch_into(folder: Path) -> Path:
    """Install beside `folder` and rename, so that what is there is always whole."""
    npm = shutil.which("npm")
    if npm is None:
        raise ClientUnavailable("npm is not installed, so the Claude Code client cannot be fetched")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    for stale in (unfinished, folder):
        shutil.rmtree(stale, ignore_errors=True)
    unfinished.mkdir()
    # Its scripts would only link the same program into a second place.
    quietly = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--prefer-offline"]
    retries = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000"]
    command = [npm, "install", "--prefix", str(unfinished), *quietly, *retries, f"{PACKAGE}@{VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FETCH_S_MAX)
        if done.returncode != 0:
            raise ClientUnavailable(f"npm could not fetch {PACKAGE}@{VERSION}: {done.stderr.strip()[:600]}")
        program = _program_in(unfinished)
        if program is None:
            raise ClientUnavailable(f"{PACKAGE}@{VERSION} has no program for this system and processor")
        unfinished.rename(folder)
        return folder / program.relative_to(unfinished)
    except subprocess.TimeoutExpired:
        raise ClientUnavailable(f"npm did not fetch {PACKAGE}@{VERSION} within {FETCH_S_MAX} s") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        if not until(lambda: _is_locked_by_us(file), timeout_s=FETCH_S_MAX, every_s=0.2):
            raise ClientUnavailable(f"another process has held {lock} for {FETCH_S_MAX} s")
        yield  # closing the file frees the lock, and so does dying


def _is_locked_by_us(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    try:
        print(claude_program())
    except ClientUnavailable as why:
        sys.exit(f"error: {why}")
