"""The local door, server and client, over real Unix sockets and, where the kernel's word matters, real processes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker_free.client import DoorClient
from broker_free.door import PATH_BYTES_MAX, Door, DoorConnection, DoorLimits, encode, unknown_verb
from broker_free.errors import NodeInUse, NodeUnreachable, Refused, TimedOut, UnknownPeer, UnsuitableHome
from tests.conftest import need_root

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="zm-"))
    yield path
    shutil.rmtree(path)


class Verbs:
    """What the tests' door serves. `let` releases every "wait"."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.waiting = 0
        self.cancelled: list[int] = []
        self.connections: list[DoorConnection] = []

    async def __call__(
        self, connection: DoorConnection, verb: str, args: dict[str, Any], hints: dict[str, Any]
    ) -> dict[str, Any]:
        match verb:
            case "echo":
                return {"args": args, "hints": hints}
            case "whoami":
                return {
                    "pid": connection.caller.pid,
                    "uid": connection.caller.uid,
                    "gid": connection.caller.gid,
                }
            case "wait":
                return await self._wait(int(args.get("n", 0)))
            case "count":
                connection.state["n"] = connection.state.get("n", 0) + 1
                return {"n": connection.state["n"]}
            case "refuse":
                raise UnknownPeer("no peer named 'bop'", hint="did you mean 'bob'?")
            case "break":
                raise ZeroDivisionError("a secret")
            case "tell":
                await connection.send(encode({"event": "told", "text": args["text"]}))
                return {}
            case "fill":
                return {"text": "x" * int(args["bytes"])}
        raise unknown_verb(verb)

    async def _wait(self, number: int) -> dict[str, Any]:
        self.waiting += 1
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        finally:
            self.waiting -= 1
        return {"n": number}

    async def repeat_lines(
        self, connection: DoorConnection, args: dict[str, Any], hints: dict[str, Any]
    ) -> None:
        """An upgrade: every further line comes back turned around."""
        if args.get("refuse"):
            raise UnknownPeer("not today")
        await connection.answer({"ready": True})
        while (line := await connection.receive()) is not None:
            await connection.send(line[::-1])


class Served:
    """A door on a loop in its own thread, so that blocking clients can be used against it."""

    def __init__(self, door: Door, verbs: Verbs, loop: asyncio.AbstractEventLoop) -> None:
        self.door, self.verbs, self.loop = door, verbs, loop

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.verbs.let.set)


@contextmanager
def served(path: Path, *, limits: DoorLimits | None = None, log_path: Path | None = None) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def opened() -> Served:
        verbs = Verbs()
        door = Door(
            path,
            handle=verbs,
            upgrades={"repeat": verbs.repeat_lines},
            on_accept=verbs.connections.append,
            limits=limits,
            log_path=log_path,
        )
        await door.open()
        return Served(door, verbs, loop)

    try:
        here = asyncio.run_coroutine_threadsafe(opened(), loop).result(5)
        yield here
        asyncio.run_coroutine_threadsafe(here.door.close(), loop).result(5)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


@pytest.fixture
def door(folder: Path) -> Iterator[Served]:
    with served(folder / "door") as here:
        yield here


class Lines:
    """A caller that speaks raw lines."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rb")

    def say(self, line: dict[str, Any] | bytes) -> None:
        self.socket.sendall((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")

    def hear(self) -> Any:
        """The next line as an object; None at the end."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self._file.close()
        self.socket.close()


# ── requests and answers ────────────────────────────────────────────────────────────────────────────────────────


def test_a_call_is_answered_with_what_the_handler_returns(door: Served) -> None:
    with DoorClient(door.door.path) as client:
        answer = client.call("echo", {"text": "gr\u00fc\u00df\u2028 \ud800"}, hints={"kind": "cli"})
    assert answer == {"args": {"text": "gr\u00fc\u00df\u2028 \ud800"}, "hints": {"kind": "cli"}}


def test_several_requests_are_in_flight_and_each_answer_carries_its_id(
    door: Served, eventually: Callable[..., None]
) -> None:
    caller = Lines(door.door.path)
    caller.say({"id": "slow", "verb": "wait"})
    caller.say({"id": 2, "verb": "echo"})
    assert caller.hear()["id"] == 2
    door.release()
    assert caller.hear() == {"id": "slow", "result": {"n": 0}}


def test_more_requests_than_fit_in_flight_are_all_answered_in_the_end(
    folder: Path, eventually: Callable[..., None]
) -> None:
    with served(folder / "door", limits=DoorLimits(requests_max=4)) as door:
        caller = Lines(door.door.path)
        for number in range(20):
            caller.say({"id": number, "verb": "wait", "args": {"n": number}})
        eventually(lambda: door.verbs.waiting == 4)
        door.release()
        assert {caller.hear()["id"] for _ in range(20)} == set(range(20))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"[1]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"id":7}',
        b'{"id":7,"verb":"echo","args":[]}',
    ],
)
def test_a_malformed_line_is_answered_and_the_connection_stays(door: Served, line: bytes) -> None:
    caller = Lines(door.door.path)
    caller.say(line)
    answer = caller.hear()
    caller.say({"id": 8, "verb": "echo"})
    assert (answer["error"]["code"], answer["id"]) == ("invalid", 7 if b"7" in line else None)
    assert caller.hear()["id"] == 8


def test_an_unknown_verb_has_a_code_of_its_own(door: Served) -> None:
    with DoorClient(door.door.path) as client, pytest.raises(Refused) as refused:
        client.call("teleport")
    assert (refused.value.code, "teleport" in refused.value.message) == ("unknown-verb", True)


def test_an_error_of_ours_arrives_with_its_code_its_message_and_its_hint(door: Served) -> None:
    with DoorClient(door.door.path) as client, pytest.raises(Refused) as refused:
        client.call("refuse")
    error = refused.value
    assert (error.code, error.message, error.hint) == (
        "unknown-peer",
        "no peer named 'bop'",
        "did you mean 'bob'?",
    )


def test_an_error_nobody_foresaw_names_the_log_and_is_logged_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_path = folder / "node.log"
    with (
        served(folder / "door", log_path=log_path) as door,
        DoorClient(door.door.path) as client,
        caplog.at_level(logging.ERROR),
        pytest.raises(Refused) as refused,
    ):
        client.call("break")
    assert (refused.value.code, refused.value.message) == (
        "internal",
        f"the node failed; see its log: {log_path}",
    )
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_a_line_beyond_the_limit_is_refused_by_name(folder: Path) -> None:
    with served(folder / "door", limits=DoorLimits(line_bytes_max=1_000)) as door:
        caller = Lines(door.door.path)
        caller.say(b"x" * 5_000)
        assert (caller.hear()["error"]["code"], caller.hear()) == ("too-large", None)


def test_a_line_just_within_the_limit_is_served(door: Served) -> None:
    text = "x" * (DoorLimits().line_bytes_max - 100)
    with DoorClient(door.door.path) as client:
        assert client.call("echo", {"text": text})["args"]["text"] == text


def test_state_lives_as_long_as_the_connection(door: Served) -> None:
    with DoorClient(door.door.path) as client:
        assert [client.call("count")["n"] for _ in range(2)] == [1, 2]
    with DoorClient(door.door.path) as client:
        assert client.call("count")["n"] == 1


# ── who calls ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_caller_is_the_process_that_calls_not_what_it_says(door: Served) -> None:
    script = (
        "import json, os, sys; from broker_free.client import DoorClient; c = DoorClient(sys.argv[1]);"
        "print(json.dumps([os.getpid(), c.call('whoami', {'pid': 1}, hints={'pid': 1})]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(door.door.path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=30,
    )
    pid, caller = json.loads(done.stdout)
    assert caller == {"pid": pid, "uid": os.getuid(), "gid": os.getgid()}


def test_the_caller_is_looked_at_before_its_first_line_is_read(
    door: Served, eventually: Callable[..., None]
) -> None:
    caller = Lines(door.door.path)  # says nothing
    eventually(lambda: door.verbs.connections)
    assert door.verbs.connections[0].caller.pid == os.getpid()
    caller.close()


def test_another_user_is_refused_even_where_the_file_modes_let_them_in(door: Served) -> None:
    need_root()
    os.chmod(door.door.path.parent, 0o755)
    os.chmod(door.door.path, 0o666)
    script = (
        "import os, sys; from broker_free.client import DoorClient; from broker_free.errors import Refused\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: print(DoorClient(sys.argv[1]).call('whoami'))\n"
        "except Refused as error: print(error.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(door.door.path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == "other-user"
    assert door.verbs.connections == []


# ── callers that leave or do not read ───────────────────────────────────────────────────────────────────────────


def test_a_caller_that_leaves_has_its_handlers_cancelled_and_nobody_elses(
    door: Served, eventually: Callable[..., None]
) -> None:
    leaving, staying = Lines(door.door.path), Lines(door.door.path)
    leaving.say({"id": 1, "verb": "wait", "args": {"n": 1}})
    leaving.say({"id": 2, "verb": "wait", "args": {"n": 2}})
    staying.say({"id": 3, "verb": "wait", "args": {"n": 3}})
    eventually(lambda: door.verbs.waiting == 3)
    leaving.close()
    eventually(lambda: sorted(door.verbs.cancelled) == [1, 2])
    door.release()
    assert staying.hear() == {"id": 3, "result": {"n": 3}}


def test_a_caller_that_does_not_read_is_cut_off_and_the_others_are_served(
    folder: Path, eventually: Callable[..., None]
) -> None:
    with served(folder / "door", limits=DoorLimits(stall_s=0.1)) as door:
        deaf = Lines(door.door.path)
        deaf.say({"id": 1, "verb": "fill", "args": {"bytes": 8_000_000}})
        eventually(lambda: door.verbs.connections and door.verbs.connections[0].closed.is_set())
        with DoorClient(door.door.path) as client:
            assert client.call("echo", {"n": 1})["args"] == {"n": 1}
        deaf.close()


def test_closing_the_door_cancels_what_runs_and_ends_every_connection(
    folder: Path, eventually: Callable[..., None]
) -> None:
    with served(folder / "door") as door:
        caller = Lines(door.door.path)
        caller.say({"id": 1, "verb": "wait", "args": {"n": 9}})
        eventually(lambda: door.verbs.waiting == 1)
    assert (caller.hear(), door.verbs.cancelled, (folder / "door").exists()) == (None, [9], False)


# ── an upgrade ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_upgrade_answers_its_request_and_then_owns_the_lines(door: Served) -> None:
    caller = Lines(door.door.path)
    caller.say({"id": 5, "verb": "repeat"})
    assert caller.hear() == {"id": 5, "result": {"ready": True}}
    caller.say(b'"cba"')
    assert caller.hear() == "abc"


def test_an_upgrade_that_refuses_leaves_the_connection_as_it_was(door: Served) -> None:
    caller = Lines(door.door.path)
    caller.say({"id": 5, "verb": "repeat", "args": {"refuse": True}})
    refusal = caller.hear()
    caller.say({"id": 6, "verb": "echo"})
    assert (refusal["id"], refusal["error"]["code"], caller.hear()["id"]) == (5, "unknown-peer", 6)


# ── the place it listens at ─────────────────────────────────────────────────────────────────────────────────────


def test_the_folder_and_the_socket_are_private(folder: Path) -> None:
    with served(folder / "new" / "door") as door:
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (door.door.path.parent, door.door.path)]
    assert modes == [0o700, 0o600]


def test_a_socket_left_by_a_dead_node_is_replaced(folder: Path) -> None:
    path = folder / "door"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    with served(path), DoorClient(path) as client:
        assert client.call("echo")["args"] == {}


def test_a_live_node_is_not_pushed_aside(door: Served) -> None:
    with pytest.raises(NodeInUse) as in_use:
        asyncio.run(Door(door.door.path, handle=Verbs()).open())
    assert in_use.value.pid == os.getpid()
    with DoorClient(door.door.path) as client:
        assert client.call("echo")["args"] == {}


def test_an_unsuitable_place_is_refused_with_the_reason(folder: Path) -> None:
    (folder / "file").write_text("precious")
    (folder / "open").mkdir()
    (folder / "open").chmod(0o755)
    places = {
        folder / "file": "not a socket",
        folder / "open" / "door": "open to other users",
        folder / ("x" * PATH_BYTES_MAX): "longer than",
    }
    for path, reason in places.items():
        with pytest.raises(UnsuitableHome, match=reason):
            asyncio.run(Door(path, handle=Verbs()).open())
    assert (folder / "file").read_text() == "precious"


# ── the client ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_client_imports_the_standard_library_only() -> None:
    script = (
        "import sys; before = set(sys.modules); import broker_free.client;"
        "heavy = {'zmq', 'peewee', 'click', 'mcp', 'psutil', 'asyncio', 'yaml', 'pydantic', 'anyio', 'dataclasses'};"
        "new = set(sys.modules) - before;"
        "print(sorted(heavy & new), sorted(m for m in new if m.startswith('broker_free')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "[] ['broker_free', 'broker_free.client', 'broker_free.errors']"


def test_no_node_is_said_plainly(folder: Path) -> None:
    with pytest.raises(NodeUnreachable, match="no node answers at"):
        DoorClient(folder / "door").call("echo")


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(
    door: Served, eventually: Callable[..., None]
) -> None:
    with DoorClient(door.door.path) as client:
        with pytest.raises(TimedOut):
            client.call("wait", {"n": 1}, timeout_s=0.05)
        door.release()
        assert client.call("wait", {"n": 2}) == {"n": 2}


def test_a_node_that_goes_away_during_a_call_is_told_from_one_that_refuses(
    folder: Path, eventually: Callable[..., None]
) -> None:
    failures: list[Exception] = []

    def call() -> None:
        with DoorClient(folder / "door") as client:
            try:
                client.call("wait")
            except NodeUnreachable as error:
                failures.append(error)

    with served(folder / "door") as door:
        caller = threading.Thread(target=call)
        caller.start()
        eventually(lambda: door.verbs.waiting == 1)
    caller.join(5)
    assert "may or may not have happened" in str(failures[0])


def test_the_client_finds_the_next_node_by_itself(folder: Path) -> None:
    client = DoorClient(folder / "door")
    with served(folder / "door"):
        assert client.call("count")["n"] == 1
    with served(folder / "door"):
        assert client.call("count")["n"] == 1
    client.close()


def test_events_are_kept_for_whoever_asks_for_them(door: Served) -> None:
    with DoorClient(door.door.path) as client:
        client.call("tell", {"text": "one"})
        client.call("tell", {"text": "two"})
        assert [event["text"] for event in client.events(timeout_s=0.01)] == ["one", "two"]
