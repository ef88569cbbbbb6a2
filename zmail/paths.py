"""Where a home keeps its state, its configuration and its door; who holds it; what makes a folder unfit to be one.

`zmail mcp` imports this at the start of every session, so it stays with `os`: paths are kept as text,
and pathlib loads only for those who ask for a `Path`. It knows nothing of what is stored in the files.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING

from broker_free.errors import NodeInUse, UnsuitableHome
from broker_free.filesystem import check_suitable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# sun_path holds 104 bytes on macOS and 108 on Linux, one of them the closing zero.
DOOR_BYTES_MAX = 103
DOOR_NAME = "door.sock"
DOOR_LINK = "door"  # in the state folder, to a door that is elsewhere

_ELSEWHERE = "choose another folder with ZMAIL_HOME"

# `Home.holder` takes the lock for an instant: a start that meets it must not take it for a node.
_HOLD_TRY_S = 0.3


class Home:
    """One set of files that one node at a time may hold. Immutable; resolving creates nothing."""

    __slots__ = ("config_dir", "door_path", "state_dir")

    config_dir: str
    door_path: str
    state_dir: str

    def __init__(self, *, state_dir: str, config_dir: str, door_path: str) -> None:
        set_once = object.__setattr__
        set_once(self, "state_dir", state_dir)
        set_once(self, "config_dir", config_dir)
        set_once(self, "door_path", door_path)

    def __setattr__(self, name: str, _value: object) -> None:
        raise AttributeError(f"a home does not change: {name}")

    def __repr__(self) -> str:
        return f"Home(state={self.state_dir!r}, config={self.config_dir!r}, door={self.door_path!r})"

    @classmethod
    def resolve(cls, env: Mapping[str, str]) -> Home:
        """Find the home that `env` names: $ZMAIL_HOME for everything, else the XDG folders."""
        if home := env.get("ZMAIL_HOME"):
            state_dir = config_dir = os.path.abspath(_expanded(home, env))
        else:
            state_dir = _xdg(env, "XDG_STATE_HOME", ".local/state")
            config_dir = _xdg(env, "XDG_CONFIG_HOME", ".config")
        return cls(state_dir=state_dir, config_dir=config_dir, door_path=_door_path(state_dir, env))

    @property
    def state(self) -> Path:
        """The folder of the store, the keys, the log and the lock."""
        return _path(self.state_dir)

    @property
    def config(self) -> Path:
        """The folder where this home's own zmail.toml would be."""
        return _path(self.config_dir)

    @property
    def door(self) -> Path:
        """The Unix socket on which the node answers."""
        return _path(self.door_path)

    @property
    def log(self) -> Path:
        """What the node has done, newest last; older parts are in home.log.1 and on."""
        return _path(self.log_path)

    @property
    def port(self) -> Path:
        """Remembers which port "any free one" was."""
        return _path(os.path.join(self.state_dir, "port"))

    @property
    def lock_path(self) -> str:
        return os.path.join(self.state_dir, "home.lock")

    @property
    def log_path(self) -> str:
        return os.path.join(self.state_dir, "home.log")

    def hold(self) -> int:
        """Take this home for this process and write its pid into the lock: NodeInUse while another one has it.

        Returns the open lock. The kernel lets go of it when the process ends, however it ends.
        """
        lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _HOLD_TRY_S
        while not _locked(lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                pid = _pid_in(lock)
                os.close(lock)
                raise NodeInUse(
                    f"already running, pid {pid}", pid=pid or None, hint="see it: zmail node status"
                )
            time.sleep(0.01)
        os.pwrite(lock, b"%-10d\n" % os.getpid(), 0)  # one width, so that no reader sees half of two pids
        return lock

    def holder(self) -> int | None:
        """The pid of the node that holds this home; None when none does, 0 while it has not said yet."""
        try:
            lock = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return None if _locked(lock, fcntl.LOCK_SH) else _pid_in(lock)
        finally:
            os.close(lock)

    def prepare(self, *, mountinfo: str | None = None) -> None:
        """Create the folders of state and door, and refuse those that cannot keep the promises: UnsuitableHome.

        `mountinfo` is the text of /proc/self/mountinfo, for tests.
        """
        state_dir = os.path.realpath(self.state_dir)
        _make_private(state_dir)
        check_suitable(state_dir, mountinfo=mountinfo)
        if not os.access(state_dir, os.W_OK):
            raise UnsuitableHome(f"cannot write to {self.state_dir}", hint=_ELSEWHERE)
        door_dir = os.path.dirname(self.door_path)
        if door_dir != self.state_dir:
            _make_private(door_dir)
            self._point_at_door()

    def _point_at_door(self) -> None:
        """Leave a link to the door, for clients whose environment names another runtime folder."""
        link = os.path.join(self.state_dir, DOOR_LINK)
        fresh = f"{link}.{os.getpid()}"
        os.symlink(self.door_path, fresh)
        os.replace(fresh, link)


def _locked(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid_in(lock: int) -> int:
    written = os.pread(lock, 16, 0).strip()
    return int(written) if written.isdigit() else 0


def _make_private(folder: str) -> None:
    """Create `folder` for its owner alone, or insist that it is so already."""
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
    except OSError as error:
        raise UnsuitableHome(f"cannot create {folder}: {error.strerror}", hint=_ELSEWHERE) from error
    if (why := _unfit(folder)) is not None:
        raise UnsuitableHome(f"{folder} {why[0]}", hint=why[1])


def _unfit(folder: str) -> tuple[str, str] | None:
    """Say what is wrong with a folder that must be a private one, and what to do; None when nothing is."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder", "move it away, or choose another folder with ZMAIL_HOME"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}", "choose a folder of your own with ZMAIL_HOME"
    if status.st_mode & 0o077:
        return "is open to other users", f"make it private: chmod 700 {folder}"
    return None


def _door_path(state_dir: str, env: Mapping[str, str]) -> str:
    """Choose the door's path: in the state folder, or, where that is too long for a socket, in a runtime folder."""
    natural = os.path.join(state_dir, DOOR_NAME)
    if len(os.fsencode(natural)) <= DOOR_BYTES_MAX:
        return natural
    # A running node's choice wins: a client without $XDG_RUNTIME_DIR (cron, sudo) must knock at the same door.
    try:
        linked = os.readlink(os.path.join(state_dir, DOOR_LINK))
    except OSError:
        linked = ""
    if linked and _is_private(os.path.dirname(linked)):
        return linked
    from hashlib import blake2b

    # Of the real path, so that a home reached through a link has the same door.
    name = blake2b(os.fsencode(os.path.realpath(state_dir)), digest_size=8).hexdigest() + ".sock"
    runtime = env.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        in_runtime = os.path.join(runtime, f"zmail-{name}")
        if len(os.fsencode(in_runtime)) <= DOOR_BYTES_MAX and _is_private(runtime):
            return in_runtime
    shared = f"/tmp/zmail-{os.geteuid()}"
    if os.path.lexists(shared) and (why := _unfit(shared)) is not None:
        # Anyone may have made it first, to answer in our node's name.
        raise UnsuitableHome(f"{shared} {why[0]}", hint="choose a shorter ZMAIL_HOME, at most 93 bytes long")
    return os.path.join(shared, name)


def _is_private(folder: str) -> bool:
    try:
        return _unfit(folder) is None
    except OSError:
        return False


def _xdg(env: Mapping[str, str], variable: str, default: str) -> str:
    """Find zmail's folder under an XDG base folder; a relative one is ignored, as the specification asks."""
    base = env.get(variable, "")
    if not os.path.isabs(base):
        base = os.path.join(_user_home(env), default)
    return os.path.join(base, "zmail")


def _expanded(path: str, env: Mapping[str, str]) -> str:
    """Expand a leading `~`, which reaches us when the variable was set by a settings file and not by a shell."""
    if path == "~" or path.startswith("~/"):
        return _user_home(env) + path[1:]
    return path


def _user_home(env: Mapping[str, str]) -> str:
    if (home := env.get("HOME", "")) and os.path.isabs(home):
        return home
    import pwd

    return pwd.getpwuid(os.getuid()).pw_dir


def _path(text: str) -> Path:
    from pathlib import Path

    return Path(text)
