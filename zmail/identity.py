"""Which Claude process is calling, and whether the process that holds a callsign still lives.

The kernel gives the door the caller's pid; everything else follows from its ancestors, never from what it says. This
module resolves and judges; who may act as whom is the post office's to decide. The only importer of psutil.

    caller's pid ─► ancestors, nearest first ─► the first with evidence of being Claude Code ─► agent, `holder`
                      │                           1. the session registry knows this pid with this start time
                      │                           2. its executable
                      │                           3. the caller's CLAUDE_PID names it
                      └ none of them ─► CLAUDE_PID names another living Claude process of this user, same pid
                                        namespace ─► agent;  else a terminal ─► human;  else script

A pid is reused, so a process is (boot id, pid, start time). Start times are raw ticks since boot: a clock may be set.
Processes vanish between any two reads; that makes the answer "unresolved", never an exception.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Literal, TypeAlias

import psutil

from zmail import naming

SenderClass: TypeAlias = Literal["agent", "subagent", "human", "script"]

ANCESTORS_MAX = 64  # wrappers add a few; a chain longer than this is not a session's child
REGISTRY_BYTES_MAX = 64 * 1024  # a session's file has about 600 bytes
TEXT_CHARS_MAX = 4096  # of a path or a name in it

_CLAUDE = frozenset({"claude", "claude.exe"})
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+.*")  # the native installer links a version's file by this name
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish", "busybox"})  # run scripts called `claude`
_PROC_STAT = "/proc/self/stat"
_LEEWAY_TICKS = 200  # of `_from_psutil`: two seconds, for rounding on both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One process, so that no other ever equals it."""

    boot_id: str
    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"{self.boot_id}:{self.pid}:{self.start_ticks}"


class Liveness(StrEnum):
    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # never frees a lease


ALIVE, DEAD, UNKNOWN = Liveness.ALIVE, Liveness.DEAD, Liveness.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What Claude Code's registry says of a live session. A hint: the format is not documented."""

    session_id: str | None  # follows /clear and /resume; two live processes may share one
    cwd: str | None
    messaging_socket: str | None
    name: str | None
    status: str | None  # idle | busy | waiting | shell


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """Who a caller is, as far as its processes say."""

    holder: Holder | None  # the Claude process; None for a human or a script
    evidence: str | None  # registry | executable | claude-pid | hint
    caller: Holder | None  # the calling process itself; None when it is gone or out of sight
    session: Session | None
    config_dir: str | None  # where `session` was found, to look again
    is_human: bool
    user: str  # the caller's user name, as a callsign

    @property
    def sender_class(self) -> SenderClass:
        if self.holder is not None:
            return "agent"
        return "human" if self.is_human else "script"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """On whose behalf a verb runs: what every use-case is told."""

    callsign: str
    sender_class: SenderClass
    holder: Holder | None
    session_id: str | None
    project: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    name: str  # the last part of the path it was started by, at most 15 bytes on Linux
    state: str  # Linux's letter; Z is a zombie
    start_ticks: int
    terminal: int  # 0: none
    session: int  # pid of its session's leader

    @property
    def is_gone(self) -> bool:
        return self.state in ("Z", "X", "x")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claude:
    """A process that is taken for Claude Code, and why."""

    process: Process
    evidence: str
    session: Session | None = None
    config_dir: str | None = None


class Identity:
    """Resolves callers and judges holders for one node. Keeps nothing between calls; safe from any thread."""

    def __init__(self, *, home: str | None = None) -> None:
        self.boot_id = _boot_id()
        self._home = home or os.path.expanduser("~")  # sessions register in its .claude unless they say where
        self._pid_namespace = _pid_namespace()
        self._read: Callable[[int], Process] = _from_proc if os.path.exists(_PROC_STAT) else _from_psutil

    def resolve(self, pid: int, hints: Mapping[str, object], *, uid: int | None = None) -> Resolution:
        """Find the Claude process behind `pid`, which the kernel vouched for. `hints` are the caller's own words."""
        uid = os.getuid() if uid is None else uid
        claimed = _pid_hint(hints)
        chain = ancestors(pid, self._read)
        if chain and not self._still_is(chain[0]):
            chain = []  # it left during the walk: its pid may already be another's
        found = self._claude_among(chain, claimed, hints)
        if found is None and claimed is not None and self._same_namespace(hints):
            found = self._claude_claimed(claimed, hints, uid=uid)
        return Resolution(
            holder=self._holder(found.process) if found else None,
            evidence=found.evidence if found else None,
            caller=self._holder(chain[0]) if chain else None,
            session=found.session if found else None,
            config_dir=found.config_dir if found else None,
            is_human=found is None and _is_at_terminal(chain),
            user=_user(uid),
        )

    def liveness(self, holder: Holder) -> Liveness:
        """Whether that very process runs. Only what proves its end is DEAD."""
        if holder.boot_id != self.boot_id:
            return DEAD
        if holder.pid <= 0:
            return UNKNOWN
        try:
            process = self._read(holder.pid)
        except ProcessLookupError:
            return _presence(holder.pid)
        except (OSError, ValueError):
            return UNKNOWN
        return DEAD if process.is_gone or process.start_ticks != holder.start_ticks else ALIVE

    def session(self, holder: Holder, *, config_dir: str | None = None) -> Session | None:
        """What the registry says of a holder now; its session id changes with /clear and /resume."""
        try:
            process = self._read(holder.pid)
        except (OSError, ValueError):
            return None
        if process.is_gone or self._holder(process) != holder:
            return None
        registered = self._registered(process, {"config_dir": config_dir})
        return registered.session if registered else None

    def _holder(self, process: Process) -> Holder:
        return Holder(boot_id=self.boot_id, pid=process.pid, start_ticks=process.start_ticks)

    def _still_is(self, process: Process) -> bool:
        return self.liveness(self._holder(process)) is ALIVE

    def _claude_among(
        self, chain: Sequence[Process], claimed: int | None, hints: Mapping[str, object]
    ) -> _Claude | None:
        """The nearest ancestor with evidence. A farther one would be the session that started this session."""
        for process in chain:
            found = self._recognised(process, hints)
            if found is None and process.pid == claimed:
                found = _Claude(process=process, evidence="claude-pid")
            if found and self._is_confirmed(process):
                return found
        return None

    def _claude_claimed(self, pid: int, hints: Mapping[str, object], *, uid: int) -> _Claude | None:
        """The process a caller names without descending from it: only a living Claude process of the same user."""
        try:
            process = self._read(pid)
            if psutil.Process(pid).uids().real != uid:
                return None
        except (psutil.Error, OSError, ValueError):
            return None
        found = self._recognised(process, hints)
        return replace(found, evidence="hint") if found and self._is_confirmed(process) else None

    def _is_confirmed(self, process: Process) -> bool:
        """A second opinion on what is about to hold a callsign: psutil's, and our own once more."""
        try:
            if psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.AccessDenied:
            pass  # there, and not ours to look at
        except psutil.Error:
            return False
        return self._still_is(process)

    def _same_namespace(self, hints: Mapping[str, object]) -> bool:
        """Whether the caller counts pids as we do. Where there are no namespaces, neither side names one."""
        said = hints.get("pid_ns")
        return (str(said) if said else None) == self._pid_namespace

    def _recognised(self, process: Process, hints: Mapping[str, object]) -> _Claude | None:
        if registered := self._registered(process, hints):
            return registered
        return _Claude(process=process, evidence="executable") if _is_claude(process) else None

    def _registered(self, process: Process, hints: Mapping[str, object]) -> _Claude | None:
        for config_dir in (hints.get("config_dir"), os.path.join(self._home, ".claude")):
            if not isinstance(config_dir, str) or not os.path.isabs(config_dir):
                continue
            entry = read_registry(config_dir, process.pid)
            if entry is not None and self._fits(entry, process):
                session = _session(entry)
                return _Claude(process=process, evidence="registry", session=session, config_dir=config_dir)
        return None

    def _fits(self, entry: Mapping[str, object], process: Process) -> bool:
        """Whether a registry file speaks of this process, and not of an earlier one with its pid."""
        if str(entry.get("pid")) != str(process.pid):
            return False
        if self._read is _from_proc:
            return str(entry.get("procStart")) == str(process.start_ticks)
        # procStart has no known form elsewhere; a file written after the start will do.
        started_ms = entry.get("startedAt")
        return isinstance(started_ms, int) and started_ms >= (process.start_ticks - _LEEWAY_TICKS) * 10


def ancestors(pid: int, read: Callable[[int], Process]) -> list[Process]:
    """The process and its ancestors, nearest first, as far as they are certain; empty when it has left."""
    chain: list[Process] = []
    while pid > 0 and len(chain) < ANCESTORS_MAX:
        try:
            process = read(pid)
        except (OSError, ValueError):
            break
        # Younger than its child: the real parent is gone and another process has its pid.
        if process.is_gone or (chain and process.start_ticks > chain[-1].start_ticks):
            break
        chain.append(process)
        pid = process.parent
    return chain


def project_of(cwd: str | None) -> str:
    """The project a folder belongs to. Looks for the git root on disk; the folder need not exist."""
    return naming.project_name(git_root=git_root(cwd) if cwd else None, cwd=cwd)


def git_root(cwd: str) -> str | None:
    """The nearest folder from `cwd` upwards that has a `.git` (a folder, or the file of a worktree)."""
    folder = os.path.normpath(cwd)
    while os.path.isabs(folder):
        if os.path.lexists(os.path.join(folder, ".git")):
            return folder
        above = os.path.dirname(folder)
        if above == folder:
            break
        folder = above
    return None


def read_registry(config_dir: str, pid: int) -> dict[str, object] | None:
    """One session file, or None for whatever is not one: missing, half written, a pipe, too long."""
    path = os.path.join(config_dir, "sessions", f"{pid}.json")
    for _ in range(2):  # it is rewritten in place: what is half written now is whole a moment later
        try:
            entry = json.loads(_bounded(path))
        except OSError:
            return None
        except (ValueError, RecursionError):
            continue
        return entry if isinstance(entry, dict) else None
    return None


def _bounded(path: str) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block us
    file = os.open(path, flags)
    try:
        about = os.fstat(file)
        is_ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid()
        if not is_ours or about.st_size > REGISTRY_BYTES_MAX:
            raise OSError(f"not a session file: {path}")
        return os.read(file, REGISTRY_BYTES_MAX)
    finally:
        os.close(file)


def _session(entry: Mapping[str, object]) -> Session:
    return Session(
        session_id=_text(entry.get("sessionId")),
        cwd=_path(entry.get("cwd")),
        messaging_socket=_path(entry.get("messagingSocketPath")),
        name=_text(entry.get("name")),
        status=_text(entry.get("status")),
    )


def _text(value: object) -> str | None:
    is_fit = isinstance(value, str) and 0 < len(value) <= TEXT_CHARS_MAX and value.isprintable()
    return str(value) if is_fit else None


def _path(value: object) -> str | None:
    path = _text(value)
    return path if path and os.path.isabs(path) else None


def _is_claude(process: Process) -> bool:
    """Whether the executable is Claude Code's, by the name it was started by or its own."""
    try:
        executable = os.readlink(f"/proc/{process.pid}/exe")
    except OSError:
        executable = ""
    # An update replaces the file under a running session.
    own_name = os.path.basename(executable.removesuffix(" (deleted)"))
    if process.name in _CLAUDE:
        return own_name not in _SHELLS
    if own_name in _CLAUDE:
        return True
    return "claude" in executable and any(_VERSION.fullmatch(name) for name in (process.name, own_name))


def _is_at_terminal(chain: Sequence[Process]) -> bool:
    """Whether a person can be behind the process: a terminal, and a parent on it or a session of its own.

    A child whose Claude process died keeps the terminal but hangs under init: that is nobody.
    """
    if not chain or not chain[0].terminal:
        return False
    return chain[0].session == chain[0].pid or (len(chain) > 1 and chain[1].terminal == chain[0].terminal)


def _pid_hint(hints: Mapping[str, object]) -> int | None:
    said = str(hints.get("claude_pid"))
    return int(said) if said.isascii() and said.isdecimal() and 1 <= len(said) <= 9 else None


@lru_cache(maxsize=64)  # a look-up may ask a directory service
def _user(uid: int) -> str:
    try:
        import pwd

        return naming.slug(pwd.getpwuid(uid).pw_name) or f"uid{uid}"
    except (ImportError, KeyError):  # Windows, or a container's bare number
        return f"uid{uid}"


# ---- the process table ----


def _from_proc(pid: int) -> Process:
    """Read /proc/PID/stat: `pid (name) state ppid pgrp session tty_nr … starttime …`; the name may hold anything.

    ProcessLookupError when there is no such process, another OSError when it cannot be read.
    """
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            line = os.read(file, 4096)
        finally:
            os.close(file)
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    opening, closing = line.index(b"("), line.rindex(b")")
    rest = line[closing + 2 :].split()
    return Process(
        pid=pid,
        parent=int(rest[1]),
        name=line[opening + 1 : closing].decode(errors="replace"),
        state=rest[0].decode(),
        start_ticks=int(rest[19]),
        terminal=int(rest[4]),
        session=int(rest[3]),
    )


def _from_psutil(pid: int) -> Process:
    """The same where there is no /proc. Ticks are hundredths of a second of the recorded start time."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return Process(
                pid=pid,
                parent=process.ppid(),
                name=process.name(),
                state="Z" if process.status() == psutil.STATUS_ZOMBIE else "R",
                start_ticks=round(process.create_time() * 100),
                terminal=1 if process.terminal() else 0,
                session=os.getsid(pid),
            )
    except psutil.AccessDenied as error:
        raise PermissionError(pid) from error
    except psutil.Error as error:  # gone, or a zombie that only its parent knows
        raise ProcessLookupError(pid) from error


def _presence(pid: int) -> Liveness:
    """A second look at a pid that the process table does not show, as /proc can hide what is not ours."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return DEAD
    except OSError:
        pass  # there, and not ours
    return UNKNOWN


def _boot_id() -> str:
    """What changes with every boot and with nothing else."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        pass
    try:
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return answer.stdout.strip().lower()
    except (OSError, subprocess.SubprocessError):
        return f"boot-{round(psutil.boot_time() / 60)}"  # the last resort: moves when the clock is set by a minute


def _pid_namespace() -> str | None:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return None
