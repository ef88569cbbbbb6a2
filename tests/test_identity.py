"""Who is calling, shown on real processes: chains of them below an executable named claude, detached from whatever
runs the tests (which may itself be a child of Claude Code)."""

from __future__ import annotations

import json
import os
import pty
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import zmail
from zmail import identity, naming
from zmail.identity import ALIVE, DEAD, UNKNOWN, Holder, Identity, Process

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/stat"), reason="reads the process table of Linux"
)

PYTHON = os.path.realpath(sys.executable)
PLAIN = [PYTHON, "-I", "-S"]
# Every link of a chain says its pid, then starts the next; the last one stays until its input ends.
LINK = "import os, subprocess, sys; print(os.getpid(), flush=True); subprocess.call(sys.argv[1:])"
LEAF = [*PLAIN, "-c", "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"]
DETACH = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
if sys.argv[1]:
    os.open(sys.argv[1], os.O_RDWR)  # a session's first terminal becomes its own
os.execv(sys.argv[2], sys.argv[2:])
"""

Start = Callable[..., list[int]]


@pytest.fixture
def here(tmp_path: Path) -> Identity:
    return Identity(home=str(tmp_path / "home"))


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a chain of programs that hangs under init, and give the pids that it says."""
    started: list[tuple[subprocess.Popen[str], list[int]]] = []

    def run(command: Sequence[str], *, says: int, terminal: str = "") -> list[int]:
        launcher = [*PLAIN, "-c", DETACH, terminal, *command]
        process = subprocess.Popen(launcher, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(says)]
        assert process.wait(timeout=40) == 0
        started.append((process, pids))
        return pids

    yield run
    for process, pids in started:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def claude(tmp_path: Path) -> str:
    return named(tmp_path, "claude")


def named(folder: Path, name: str) -> str:
    """A link to Python under another name, which the kernel then reports as the name of the process."""
    link = folder / name
    link.symlink_to(PYTHON)
    return str(link)


def link(program: str) -> list[str]:
    return [program, "-I", "-S", "-c", LINK]


def through_shell(command: Sequence[str]) -> list[str]:
    return [
        "/bin/sh",
        "-c",
        '"$@"; true',
        "sh",
        *command,
    ]  # more than one command: the shell stays in the chain


def start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def register(home: str, pid: int, /, **changes: object) -> Path:
    entry = {
        "pid": pid,
        "sessionId": "0469cd76-1",
        "cwd": "/src/shop",
        "procStart": str(start_ticks(pid)),
        "status": "idle",
    }
    file = Path(home, ".claude", "sessions", f"{pid}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entry | {"messagingSocketPath": "/tmp/s.sock", "name": "shop-8b"} | changes))
    return file


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- the Claude process among the ancestors ----


@pytest.mark.parametrize("wrappers", [0, 1, 3])
def test_a_child_of_claude_is_an_agent_however_many_shells_are_between(
    here: Identity, start: Start, claude: str, wrappers: int
) -> None:
    command = LEAF
    for _ in range(wrappers):
        command = through_shell(command)
    session, leaf = start([*link(claude), *command], says=2)

    found = here.resolve(leaf, {})

    assert found.holder == Holder(boot_id=here.boot_id, pid=session, start_ticks=start_ticks(session))
    assert found.caller == Holder(boot_id=here.boot_id, pid=leaf, start_ticks=start_ticks(leaf))
    assert (found.sender_class, found.evidence) == ("agent", "executable")


@pytest.mark.parametrize("path", ["bin/claude", "bin/claude.exe", "share/claude/versions/2.1.329"])
def test_the_executable_is_known_under_each_of_its_names(
    here: Identity, start: Start, tmp_path: Path, path: str
) -> None:
    program = tmp_path / path
    program.parent.mkdir(parents=True)
    shutil.copy(shutil.which("sh") or "/bin/sh", program)
    (leaf,) = start([str(program), "-c", '"$@"; true', "sh", *LEAF], says=1)
    found = here.resolve(leaf, {})
    assert found.holder is not None
    assert found.holder.pid == psutil.Process(leaf).ppid()


def test_an_executable_that_was_updated_under_its_session_is_still_known(
    here: Identity, start: Start, tmp_path: Path
) -> None:
    program = tmp_path / "claude" / "2.1.329"
    program.parent.mkdir()
    shutil.copy(shutil.which("sh") or "/bin/sh", program)
    (leaf,) = start([str(program), "-c", '"$@"; true', "sh", *LEAF], says=1)
    program.unlink()
    assert here.resolve(leaf, {}).sender_class == "agent"


def test_a_shell_script_called_claude_is_not_claude(here: Identity, start: Start, tmp_path: Path) -> None:
    script = tmp_path / "claude"
    script.write_text('#!/bin/sh\n"$@"; true\n')
    script.chmod(0o755)
    (leaf,) = start([str(script), *LEAF], says=1)
    assert here.resolve(leaf, {}).sender_class == "script"


def test_the_nearest_of_two_sessions_is_the_callers(here: Identity, start: Start, claude: str) -> None:
    outer, inner, leaf = start([*link(claude), *through_shell([*link(claude), *LEAF])], says=3)
    found = here.resolve(leaf, {"claude_pid": outer})  # inherited from the outer session's environment
    assert found.holder is not None
    assert found.holder.pid == inner != outer


def test_a_registered_process_is_claude_under_any_name(here: Identity, start: Start, tmp_path: Path) -> None:
    session, leaf = start([*link(named(tmp_path, "nodejs")), *through_shell(LEAF)], says=2)
    register(str(tmp_path / "home"), session)

    found = here.resolve(leaf, {})

    assert found.evidence == "registry"
    assert found.session == identity.Session(
        session_id="0469cd76-1",
        cwd="/src/shop",
        messaging_socket="/tmp/s.sock",
        name="shop-8b",
        status="idle",
    )
    assert found.config_dir == str(tmp_path / "home" / ".claude")


def test_the_callers_own_configuration_folder_is_looked_at_first(
    here: Identity, start: Start, claude: str, tmp_path: Path
) -> None:
    session, leaf = start([*link(claude), *LEAF], says=2)
    register(str(tmp_path / "home"), session, sessionId="default")
    register(str(tmp_path / "other"), session, sessionId="other")
    found = here.resolve(leaf, {"config_dir": str(tmp_path / "other" / ".claude")})
    assert found.session is not None
    assert found.session.session_id == "other"


def test_a_registry_file_of_an_earlier_process_with_that_pid_is_no_evidence(
    here: Identity, start: Start, tmp_path: Path
) -> None:
    session, leaf = start([*link(PYTHON), *LEAF], says=2)
    for changes in ({"procStart": str(start_ticks(session) - 1)}, {"procStart": None}, {"pid": 1}):
        register(str(tmp_path / "home"), session, **changes)
        assert here.resolve(leaf, {}).holder is None


@pytest.mark.parametrize("content", ["", '{"pid":', "[]", "null", "\xff", "[" * 100_000, " " * 70_000 + "{}"])
def test_a_registry_file_that_is_none_is_passed_over(
    here: Identity, start: Start, claude: str, tmp_path: Path, content: str
) -> None:
    session, leaf = start([*link(claude), *LEAF], says=2)
    register(str(tmp_path / "home"), session).write_text(content, encoding="latin-1")
    found = here.resolve(leaf, {})
    assert (found.evidence, found.session) == ("executable", None)


def test_a_pipe_in_place_of_a_registry_file_does_not_block(
    here: Identity, start: Start, claude: str, tmp_path: Path
) -> None:
    session, leaf = start([*link(claude), *LEAF], says=2)
    file = register(str(tmp_path / "home"), session)
    file.unlink()
    os.mkfifo(file)
    assert here.resolve(leaf, {}).evidence == "executable"


def test_fields_of_the_registry_that_are_not_what_they_should_be_are_left_out(
    here: Identity, start: Start, claude: str, tmp_path: Path
) -> None:
    session, leaf = start([*link(claude), *LEAF], says=2)
    register(
        str(tmp_path / "home"),
        session,
        sessionId=7,
        cwd="relative",
        messagingSocketPath="/a\nb",
        name="x" * 5_000,
    )
    found = here.resolve(leaf, {}).session
    assert found is not None
    assert (found.session_id, found.cwd, found.messaging_socket, found.name) == (None, None, None, None)


def test_the_session_id_is_read_anew_after_clear_and_nothing_after_the_end(
    here: Identity, start: Start, claude: str, tmp_path: Path
) -> None:
    session, leaf = start([*link(claude), *LEAF], says=2)
    register(str(tmp_path / "home"), session)
    holder = here.resolve(leaf, {}).holder
    assert holder is not None
    register(str(tmp_path / "home"), session, sessionId="after-clear")
    now = here.session(holder)
    assert now is not None
    assert now.session_id == "after-clear"
    assert here.session(replace(holder, start_ticks=holder.start_ticks - 1)) is None
    os.kill(session, signal.SIGKILL)
    wait_until(lambda: here.liveness(holder) is DEAD)
    assert here.session(holder) is None


# ---- CLAUDE_PID and other hints ----


def test_claude_pid_counts_for_an_ancestor(here: Identity, start: Start) -> None:
    session, leaf = start([*link(PYTHON), *through_shell(LEAF)], says=2)
    found = here.resolve(leaf, {"claude_pid": str(session)})
    assert found.holder is not None
    assert (found.holder.pid, found.evidence) == (session, "claude-pid")


def namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def test_an_orphan_is_unresolved_until_it_names_a_living_claude(
    here: Identity, start: Start, claude: str
) -> None:
    # The shell ends at once and leaves the leaf to init.
    orphaned = ["/bin/sh", "-c", '"$@" <&3 3<&- & exit', "sh", *LEAF]
    keep_input = ["/bin/sh", "-c", 'exec 3<&0; "$@"; exec cat <&3 >/dev/null', "sh", *orphaned]
    session, leaf = start([*link(claude), *keep_input], says=2)
    wait_until(lambda: session not in {each.pid for each in psutil.Process(leaf).parents()})

    assert here.resolve(leaf, {}).sender_class == "script"
    named_it = here.resolve(leaf, {"claude_pid": session, "pid_ns": namespace()})

    assert named_it.holder is not None
    assert (named_it.holder.pid, named_it.evidence) == (session, "hint")


def test_a_hint_from_another_pid_namespace_or_none_is_ignored(
    here: Identity, start: Start, claude: str
) -> None:
    (session, _) = start([*link(claude), *LEAF], says=2)
    (stranger,) = start(LEAF, says=1)
    others: list[object] = [namespace() + 1, None, "", [], True]
    for pid_ns in others:
        assert here.resolve(stranger, {"claude_pid": session, "pid_ns": pid_ns}).holder is None


def test_a_hint_names_no_process_that_is_not_claude_not_alive_or_not_ours(
    here: Identity, start: Start, claude: str
) -> None:
    other, stranger = (start(LEAF, says=1)[0] for _ in range(2))
    dead = subprocess.Popen(["true"])
    dead.wait()
    for claude_pid in (other, dead.pid, 0, -1, "x", "²", 10**12, None, True):
        assert here.resolve(stranger, {"claude_pid": claude_pid, "pid_ns": namespace()}).holder is None
    (session, _) = start([*link(claude), *LEAF], says=2)
    hints = {"claude_pid": session, "pid_ns": namespace()}
    assert here.resolve(stranger, hints, uid=os.getuid() + 1).holder is None
    assert here.resolve(stranger, hints).holder is not None


def test_a_caller_out_of_sight_or_gone_is_a_script(here: Identity) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (0, -1, dead.pid, 2**22 + 1):
        found = here.resolve(pid, {})
        assert (found.sender_class, found.caller, found.holder) == ("script", None, None)


def test_a_caller_that_has_ended_but_was_not_waited_for_is_gone(here: Identity) -> None:
    zombie = subprocess.Popen(["true"])
    wait_until(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    assert here.resolve(zombie.pid, {}).caller is None
    zombie.wait()


def test_callers_that_vanish_at_any_moment_never_raise(here: Identity) -> None:
    for _ in range(40):
        burst = [subprocess.Popen(["/bin/sh", "-c", "true; true"]) for _ in range(3)]
        for process in burst:
            while process.poll() is None:
                here.resolve(process.pid, {"claude_pid": process.pid, "pid_ns": namespace()})


# ---- people and scripts ----


@pytest.fixture
def terminal() -> Iterator[str]:
    controller, slave = pty.openpty()
    yield os.ttyname(slave)
    os.close(slave)
    os.close(controller)


def test_a_command_at_a_terminal_is_the_human(here: Identity, start: Start, terminal: str) -> None:
    leader, leaf = start([*link(PYTHON), *LEAF], says=2, terminal=terminal)
    for pid in (leader, leaf):
        found = here.resolve(pid, {})
        assert (found.sender_class, found.is_human) == ("human", True)
        assert found.user == naming.slug(pwd.getpwuid(os.getuid()).pw_name)


def test_a_session_at_a_terminal_is_still_an_agent(
    here: Identity, start: Start, terminal: str, claude: str
) -> None:
    _, leaf = start([*link(claude), *LEAF], says=2, terminal=terminal)
    assert here.resolve(leaf, {}).sender_class == "agent"


def test_an_orphan_that_kept_its_terminal_is_nobody(here: Identity, start: Start, terminal: str) -> None:
    orphaned = ["/bin/sh", "-c", '"$@" <&3 3<&- & exit', "sh", *LEAF]
    keep_input = ["/bin/sh", "-c", 'exec 3<&0; "$@"; exec cat <&3 >/dev/null', "sh", *orphaned]
    leader, leaf = start([*link(PYTHON), *keep_input], says=2, terminal=terminal)
    wait_until(lambda: leader not in {each.pid for each in psutil.Process(leaf).parents()})
    assert psutil.Process(leaf).terminal() == terminal
    assert here.resolve(leaf, {}).sender_class == "script"


def test_a_process_without_a_terminal_is_a_script(here: Identity, start: Start) -> None:
    (leaf,) = start(through_shell(LEAF), says=1)
    found = here.resolve(leaf, {})
    assert (found.sender_class, found.holder) == ("script", None)
    assert found.caller is not None


# ---- the life of a holder ----


def test_a_holder_lives_until_its_process_ends(here: Identity) -> None:
    process = subprocess.Popen(["sleep", "60"])
    holder = Holder(boot_id=here.boot_id, pid=process.pid, start_ticks=start_ticks(process.pid))
    assert here.liveness(holder) is ALIVE
    process.kill()
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert here.liveness(holder) is DEAD  # before anybody has waited for it
    process.wait()
    assert here.liveness(holder) is DEAD


def test_another_process_with_the_same_pid_is_not_the_holder(here: Identity) -> None:
    me = Holder(boot_id=here.boot_id, pid=os.getpid(), start_ticks=start_ticks(os.getpid()))
    assert here.liveness(me) is ALIVE
    assert here.liveness(replace(me, start_ticks=me.start_ticks + 1)) is DEAD
    assert here.liveness(replace(me, boot_id="another boot")) is DEAD


def test_a_holder_without_a_pid_is_unknown(here: Identity) -> None:
    assert here.liveness(Holder(boot_id=here.boot_id, pid=0, start_ticks=0)) is UNKNOWN


def test_a_process_that_cannot_be_looked_at_is_unknown_not_dead() -> None:
    script = """
import os, resource
from zmail.identity import Holder, Identity
here = Identity()
me = Holder(boot_id=here.boot_id, pid=os.getpid(), start_ticks=here._read(os.getpid()).start_ticks)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # the table of open files is full
print(here.liveness(me), here.resolve(os.getpid(), {}).caller)
"""
    root = Path(zmail.__file__).parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["unknown", "None"]


# ---- the process table ----


def table(*processes: Process) -> Callable[[int], Process]:
    rows = {each.pid: each for each in processes}

    def read(pid: int) -> Process:
        if pid not in rows:
            raise ProcessLookupError(pid)
        return rows[pid]

    return read


def a_process(pid: int, *, parent: int, start_ticks: int) -> Process:
    return Process(
        pid=pid, parent=parent, name="x", state="S", start_ticks=start_ticks, terminal=0, session=1
    )


def test_the_walk_ends_at_a_parent_that_is_younger_than_its_child() -> None:
    caller = a_process(30, parent=20, start_ticks=300)
    recycled = a_process(20, parent=10, start_ticks=301)
    real = replace(recycled, start_ticks=300)
    top = a_process(10, parent=0, start_ticks=5)
    assert identity.ancestors(30, table(caller, recycled, top)) == [caller]
    assert identity.ancestors(30, table(caller, real, top)) == [caller, real, top]


def test_the_walk_is_bounded() -> None:
    endless = [a_process(pid, parent=pid - 1, start_ticks=1) for pid in range(1, 1_000)]
    assert len(identity.ancestors(999, table(*endless))) == identity.ANCESTORS_MAX


def test_a_name_full_of_brackets_and_spaces_does_not_move_the_fields(start: Start, tmp_path: Path) -> None:
    name = "a) S 1 (b"
    pid, leaf = start([*link(named(tmp_path, name)), *LEAF], says=2)
    process = identity._from_proc(pid)
    assert (process.name, process.start_ticks) == (name, start_ticks(pid))
    assert identity._from_proc(leaf).parent == pid


def test_psutil_sees_the_same_process_where_there_is_no_proc(start: Start, claude: str) -> None:
    session, leaf = start([*link(claude), *LEAF], says=2)
    for pid in (session, leaf):
        ours, theirs = identity._from_proc(pid), identity._from_psutil(pid)
        same = replace(theirs, start_ticks=ours.start_ticks, state=ours.state)
        assert same == ours
    assert identity._from_psutil(session).start_ticks <= identity._from_psutil(leaf).start_ticks
    with pytest.raises(ProcessLookupError):
        identity._from_psutil(2**22 + 1)


# ---- the project ----


def test_the_project_is_named_after_the_git_root(tmp_path: Path) -> None:
    deep = tmp_path / "My Shop" / "api" / "v1"
    deep.mkdir(parents=True)
    assert identity.project_of(str(deep)) == "v1"
    (tmp_path / "My Shop" / ".git").write_text("gitdir: elsewhere")  # a worktree
    assert identity.project_of(str(deep)) == "my-shop"
    assert identity.project_of(str(deep / "is" / "gone")) == "my-shop"
    assert identity.project_of("not/absolute") == "absolute"
    assert identity.project_of(None) == "claude"
    assert identity.project_of("/a\0b") == "a-b"
