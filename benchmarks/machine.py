"""What a figure is worth nothing without: the machine, the versions and the commit it was measured on."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent


def describe_machine(folder: Path) -> dict[str, str | int]:
    """The hardware and kernel, and the file system that holds `folder`, where every store of a run lies."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "kernel": f"{platform.system()} {platform.release()}",
        "disk": file_system_of(folder),
    }


class Bystanders:
    """How busy the processors were with anything but this run: what spoils a measurement without being seen."""

    def __init__(self, own_cpu_s: float) -> None:
        self._own_s = own_cpu_s
        self._busy_s, self._all_s = _processors()

    def share(self, own_cpu_s: float) -> float:
        """Return the part of all processor time since the start that went to others, between 0 and 1."""
        busy_s, all_s = _processors()
        others_s = busy_s - self._busy_s - (own_cpu_s - self._own_s)
        return max(0.0, others_s / max(all_s - self._all_s, 0.01))


def describe_versions() -> dict[str, str]:
    """Versions of everything whose speed is part of a figure; "absent" where it is not installed."""
    import zmq

    return {
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "sqlite": sqlite3.sqlite_version,
        "peewee": _distribution_version("peewee"),
        "redis-py": _distribution_version("redis"),
        "hiredis": _distribution_version("hiredis"),
        "redis-server": _redis_server_version(),
    }


def describe_commit() -> str:
    """The commit of this tree, with "+changes" when files differ from it; "unknown" outside a repository."""
    commit = _output("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    # Without optional locks: a benchmark must not touch the index of the tree that it measures. Its own
    # results are left out: writing them does not change what was measured.
    changes = _output(
        *("git", "--no-optional-locks", "-C", str(REPOSITORY), "status", "--porcelain", "--"),
        *(".", ":!benchmarks/results", ":!benchmarks/RESULTS.md"),
    )
    return f"{commit}+changes" if changes else commit


def file_system_of(folder: Path) -> str:
    """The type of the file system under `folder`, such as "ext4"; "unknown" where no one tells."""
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/self/mounts").read_text()
    except OSError:
        return _output("stat", "-f", "-c", "%T", str(folder)) or kind
    resolved = str(folder.resolve())
    for line in mounts.splitlines():
        point, found = line.split()[1:3]
        inside = point in {"/", resolved} or resolved.startswith(point + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind


def folder_on_a_disk() -> Path:
    """Where stores go: the temporary folder, unless that is memory, on which a sync costs nothing."""
    usual = Path(tempfile.gettempdir())
    lasting = Path("/var/tmp")
    if file_system_of(usual) in {"tmpfs", "ramfs"} and lasting.is_dir():
        return lasting
    return usual


def _processors() -> tuple[float, float]:
    """Seconds that all processors together were busy, and that there were, since boot."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    # Time of guests is counted in user time already.
    all_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return all_s - idle_s, all_s


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the next line knows
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def _distribution_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _redis_server_version() -> str:
    # "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=…"
    for word in _output("redis-server", "--version").split():
        if word.startswith("v="):
            return word[2:]
    return "absent"


def _output(*command: str) -> str:
    """What a command prints, or nothing if it fails: a missing description never stops a measurement."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
