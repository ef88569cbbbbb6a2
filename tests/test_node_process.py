"""The node's process: one a home, started by whoever needs it, stopped cleanly, and no worse off when killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from broker_free.client import DoorClient
from broker_free.errors import NodeInUse, Refused
from tests.conftest import ROOT, Zmail
from zmail import __version__, mailbox
from zmail.node import FieldFormatter, listen_endpoint
from zmail.paths import Home

Env = Callable[..., dict[str, str]]
Eventually = Callable[..., None]


def pid_of(home: Path) -> int:
    pid = Home.resolve({"ZMAIL_HOME": str(home)}).holder()
    assert pid
    return pid


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ── start, stop, status ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_is_started_seen_and_stopped(zmail: Zmail, home: Path) -> None:
    assert (zmail("node", "status").stdout, zmail("node", "status").code) == ("Stopped\n", 0)
    assert zmail("node", "status", "--json").json == {"state": "Stopped", "pid": None, "version": None}
    started = zmail("node", "start")
    assert (started.code, started.stdout) == (0, "Running\n")
    pid = pid_of(home)
    assert zmail("node", "status").stdout == "Running\n"
    assert zmail("node", "status", "--json").json == {"state": "Running", "pid": pid, "version": __version__}
    again = zmail("node", "start")
    assert (again.code, pid_of(home)) == (0, pid)
    stopped = zmail("node", "stop")
    assert (stopped.code, stopped.stdout) == (0, "Stopped\n")
    assert not runs(pid)
    assert (zmail("node", "stop").code, zmail("node", "stop").stdout) == (0, "Stopped\n")


def test_restart_replaces_the_process_and_starts_one_where_there_is_none(zmail: Zmail, home: Path) -> None:
    assert zmail("node", "restart").stdout == "Running\n"
    first = pid_of(home)
    assert zmail("node", "restart").stdout == "Running\n"
    assert pid_of(home) != first
    assert not runs(first)


def test_asking_for_the_state_or_stopping_does_not_start_a_node(zmail: Zmail, home: Path) -> None:
    zmail("node", "status")
    zmail("node", "stop")
    assert not list(home.iterdir())


def test_starting_by_hand_works_where_autostart_is_forbidden(zmail: Zmail) -> None:
    assert zmail("node", "start", env={"ZMAIL_AUTOSTART": "0"}).stdout == "Running\n"
    assert zmail("--as", "alpha", "check", env={"ZMAIL_AUTOSTART": "0"}).code == 0


def test_a_second_node_on_the_same_home_is_refused_and_told_the_pid(zmail: Zmail, home: Path) -> None:
    zmail("node", "start")
    run = zmail("node", "run")
    assert run.code == 1
    assert f"error: already running, pid {pid_of(home)}\n" in run.stderr
    assert zmail("node", "run", "--json").error["code"] == "already-running"
    assert zmail("node", "status").stdout == "Running\n"


def test_any_command_that_needs_the_node_starts_it(zmail: Zmail, home: Path) -> None:
    assert zmail("--as", "alpha", "check").code == 0
    assert pid_of(home)


def test_a_started_node_belongs_to_no_terminal_and_knows_nothing_of_the_session_that_started_it(
    zmail: Zmail, home: Path
) -> None:
    zmail(
        "node",
        "start",
        env={"CLAUDECODE": "1", "CLAUDE_CODE_MESSAGING_TOKEN": "secret", "ZMAIL_CALLSIGN": "x"},
    )
    pid = pid_of(home)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1)} == {"/dev/null"}
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert not [word for word in (b"CLAUDE", b"secret", b"ZMAIL_CALLSIGN") if word in environment]


def test_what_the_node_leaves_in_its_home_is_its_owners_alone(zmail: Zmail, home: Path) -> None:
    zmail("node", "start")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()}
    assert {"home.lock", "home.log", "door.sock"} <= modes.keys()
    assert not [name for name, mode in modes.items() if mode & 0o077]


def test_callers_at_once_end_with_one_node_and_are_all_served(zmail: Zmail, home: Path) -> None:
    with ThreadPoolExecutor(6) as callers:
        runs_ = list(callers.map(lambda number: zmail("--as", f"caller-{number}", "check"), range(6)))
    assert [run.code for run in runs_] == [0] * 6, [run.stderr for run in runs_]
    assert (home / "home.log").read_text().count(" ready ") == 1


def test_a_relative_home_is_the_same_home_for_the_node(zmail: Zmail, home: Path) -> None:
    relative = os.path.relpath(home, ROOT)
    assert zmail("node", "start", env={"ZMAIL_HOME": relative}).stdout == "Running\n"
    assert pid_of(home)


# ── stopping, dying ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_a_signal_stops_a_node_in_a_terminal_cleanly(
    zmail_env: Env, home: Path, eventually: Eventually, number: signal.Signals, status: int
) -> None:
    node = subprocess.Popen(
        [sys.executable, "-m", "zmail", "node", "run"], env=zmail_env(), cwd=ROOT, stderr=subprocess.PIPE
    )
    eventually((home / "door.sock").exists, 10)
    node.send_signal(number)
    _, said = node.communicate(timeout=40)
    assert node.returncode == status
    assert b"Traceback" not in said
    assert not (home / "door.sock").exists()
    log = (home / "home.log").read_text()
    assert f"stopping why={number.name}\n" in log
    assert f"stopped status={status}\n" in log
    assert "Traceback" not in log


def test_a_killed_node_loses_nothing_it_acknowledged_and_its_door_is_replaced(
    zmail: Zmail, home: Path
) -> None:
    zmail("--as", "bravo", "check")
    sent = zmail("--as", "alpha", "send", "bravo", "-m", "kept", "--json").json["id"]
    killed = pid_of(home)
    os.kill(killed, signal.SIGKILL)
    _wait_for_its_end(killed)
    assert stat.S_ISSOCK((home / "door.sock").stat().st_mode), "a killed node cannot take its door along"
    assert zmail("node", "status").stdout == "Stopped\n"
    assert [brief["id"] for brief in zmail("--as", "bravo", "inbox", "--json").json["briefs"]] == [sent]
    assert pid_of(home) != killed


def _wait_for_its_end(pid: int) -> None:
    deadline = time.monotonic() + 40
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ── what keeps a node from starting ─────────────────────────────────────────────────────────────────────────────


def test_a_port_in_use_is_named_with_the_way_to_choose_another(zmail: Zmail) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        env = {"ZMAIL_LISTEN": f"tcp://127.0.0.1:{port}"}
        for args in (["--as", "alpha", "check"], ["node", "start"], ["node", "run"]):
            run = zmail(*args, "--json", env=env)
            assert (run.code, run.error["code"]) == (1, "address-in-use")
            assert str(port) in run.error["message"]
            assert "ZMAIL_LISTEN" in run.error["hint"]


def test_a_node_that_dies_before_it_can_say_why_is_reported_with_its_last_words(
    zmail: Zmail, home: Path
) -> None:
    broken = home / "broken"
    broken.mkdir()
    (broken / "zmq.py").write_text("raise RuntimeError('no zmq on this machine')")
    run = zmail("node", "start", env={"PYTHONPATH": f"{broken}{os.pathsep}{ROOT}"})
    assert run.code == 1
    assert "ended with status 1 while starting: RuntimeError: no zmq on this machine" in run.stderr
    assert f"hint: its log: {home}/home.log" in run.stderr


def test_something_that_is_no_door_is_not_removed(zmail: Zmail, home: Path) -> None:
    (home / "door.sock").write_text("mine")
    run = zmail("node", "start", "--json")
    assert (run.code, run.error["code"]) == (1, "unsuitable-home")
    assert (home / "door.sock").read_text() == "mine"


def test_a_starter_that_only_lost_the_race_is_told_so_and_one_that_failed_is_told_why(home: Path) -> None:
    ours = Home.resolve({"ZMAIL_HOME": str(home)})
    in_use = json.dumps(
        {"error": {"code": "already-running", "message": "already running, pid 7", "hint": None}}
    )
    failed = json.dumps({"error": {"code": "address-in-use", "message": "port 1 is taken", "hint": "h"}})
    Path(ours.log_path).write_text(f"of an earlier start\n{in_use}\n")
    assert isinstance(mailbox._failure(ours, 20, 1), NodeInUse)
    Path(ours.log_path).write_text(f"of an earlier start\n{failed}\n{in_use}\n")
    told = mailbox._failure(ours, 20, 1)
    assert isinstance(told, Refused)
    assert (told.code, told.message, told.hint) == ("address-in-use", "port 1 is taken", "h")


# ── port 0 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_any_free_port_stays_the_same_over_restarts(zmail: Zmail) -> None:
    first = zmail("--as", "alpha", "status", "--json").json["node"]["endpoints"]
    zmail("node", "restart")
    assert zmail("--as", "alpha", "status", "--json").json["node"]["endpoints"] == first
    assert not first[0].endswith(":0")


def test_a_remembered_port_that_is_taken_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert listen_endpoint("tcp://127.0.0.1:0", port) == "tcp://127.0.0.1:0"
    assert listen_endpoint("tcp://127.0.0.1:0", port) == f"tcp://127.0.0.1:{port}"


@pytest.mark.parametrize("remembered", ["", "rubbish", "99999999"])
def test_a_remembered_port_that_makes_no_sense_is_ignored(remembered: str) -> None:
    assert listen_endpoint("tcp://*:0", remembered) == "tcp://*:0"


def test_a_port_that_is_given_is_kept() -> None:
    assert listen_endpoint("tcp://*:7420", "7421") == "tcp://*:7420"


# ── callers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_verb_is_refused_and_the_connection_goes_on(zmail: Zmail, home: Path) -> None:
    zmail("node", "start")
    with DoorClient(home / "door.sock") as door:
        with pytest.raises(Refused) as refused:
            door.call("no-such-verb", hints={"as": "alpha"})
        assert refused.value.code == "invalid"
        assert door.call("node-status")["version"] == __version__


# ── log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def line_of(message: str, *args: object, **extra: object) -> str:
    record = logging.LogRecord("zmail.x", logging.INFO, "f", 1, message, args, None)
    record.created, record.msecs = 1_774_347_300.25, 250.0
    vars(record).update(extra)
    return FieldFormatter().format(record)


def test_a_log_line_has_time_level_logger_message_and_fields() -> None:
    assert line_of("sent %d", 3, id="9c41", peer="server2") == (
        "2026-03-24T10:15:00.250Z INFO zmail.x sent 3 id=9c41 peer=server2"
    )


def test_what_came_from_outside_cannot_forge_a_line_or_a_field() -> None:
    line = line_of(
        "got\n2026 INFO zmail.x forged", name_="a b", why="x\ny=\x1b[31m", empty="", wide="\x9b31m"
    )
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert "\x9b" not in line
    assert 'name_="a b"' in line
    assert 'empty=""' in line


def test_a_log_line_keeps_the_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("zmail.x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    text = FieldFormatter().format(record)
    assert text.splitlines()[0].endswith("ERROR zmail.x failed")
    assert text.splitlines()[-1] == "ValueError: why"


def test_a_log_is_rotated_and_what_it_keeps_is_bounded(home: Path) -> None:
    code = (
        "import logging, sys; from zmail import node; node.LOG_BYTES_MAX = 10_000\n"
        "node.configure_logging(sys.argv[1]); logging.basicConfig(filename='/nowhere/x')\n"
        "for n in range(2000): logging.getLogger('x').info('line', extra={'n': n})"
    )
    run = subprocess.run([sys.executable, "-c", code, str(home / "home.log")], cwd=ROOT, capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")
    kept = sorted(home.iterdir())
    assert [path.name for path in kept] == ["home.log", "home.log.1", "home.log.2", "home.log.3"]
    assert all(path.stat().st_size <= 10_000 for path in kept)
    assert (home / "home.log").read_text().endswith("n=1999\n")
