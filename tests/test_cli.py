"""The command line as its users meet it: a subprocess, its exit code, its two outputs."""

from __future__ import annotations

import fcntl
import json
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Zmail
from zmail import __version__
from zmail.__main__ import relay_options

VERBS = [
    "demo",
    "send",
    "reply",
    "check",
    "inbox",
    "read",
    "roster",
    "status",
    "peers",
    "invite",
    "join",
    "backup",
    "restore",
    "node",
    "mcp",
]
NODE_VERBS = ["run", "start", "stop", "restart", "status", "rotate-key"]

Env = Callable[..., dict[str, str]]


# ── help ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_help_lists_every_command_in_order_and_the_options_of_all(zmail: Zmail) -> None:
    run = zmail("-h")
    listed = run.stdout[run.stdout.index("Commands:") :].splitlines()[1 : len(VERBS) + 1]
    assert run.code == 0
    assert [line.split()[0] for line in listed] == VERBS
    assert all("..." not in line for line in listed), "every one-line help fits its line"
    assert all(option in run.stdout for option in ("--as", "--json", "--config", "--quiet", "--no-color"))


@pytest.mark.parametrize("command", [*VERBS, "peers remove", *(f"node {verb}" for verb in NODE_VERBS)])
def test_the_help_of_a_command_is_one_line_and_an_example_of_that_command(zmail: Zmail, command: str) -> None:
    run = zmail(*command.split(), "-h")
    assert (run.code, run.stderr) == (0, "")
    assert "\n  Example:\n    " in run.stdout
    example = run.stdout.split("Example:\n")[1].splitlines()[0].strip()
    assert f"zmail {command}" in example


def test_zmail_alone_shows_the_help_on_stderr_and_is_a_usage_error(zmail: Zmail) -> None:
    run = zmail()
    assert (run.code, run.stdout) == (2, "")
    assert "Commands:" in run.stderr


def test_the_examples_work_when_pasted_into_a_terminal(zmail: Zmail, zmail_env: Env) -> None:
    """As a person at a terminal, who needs no --as. The id in an example stands for one of a listing."""
    zmail("--as", "bravo", "check")
    person = subprocess.run(
        [sys.executable, "-c", IN_A_TERMINAL, "check", "--json"],
        env=zmail_env(),
        cwd=ROOT,
        capture_output=True,
    )
    name = json.loads(person.stdout)["callsign"]
    brief = zmail("--as", "bravo", "send", name, "-m", "hello", "--json").json["id"]
    for command in (
        "send",
        "check",
        "inbox",
        "reply",
        "read",
        "roster",
        "status",
        "peers",
        "invite",
        "node start",
    ):
        help_ = zmail(*command.split(), "-h").stdout
        example = help_.split("Example:\n")[1].splitlines()[0].replace("5f8a01c2", brief[-8:])
        _, *words = shlex.split(example)
        run = subprocess.run(
            [sys.executable, "-c", IN_A_TERMINAL, *words], env=zmail_env(), cwd=ROOT, capture_output=True
        )
        assert run.returncode == 0, (example, run.stdout)


IN_A_TERMINAL = (
    "import os, pty, sys;"
    "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'zmail', *sys.argv[1:]])))"
)


# ── usage errors ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["inbxo"], "no such command 'inbxo'"),
        (["check", "--bogus"], "no such option"),
        (["read"], "missing argument 'ID'"),
        (["inbox", "-n", "-1"], "invalid value for '-n'"),
        (["inbox", "-n", "many"], "invalid value for '-n'"),
        (["send", "bravo"], "give the text with -m TEXT or with -f FILE"),
        (["send", "bravo", "-m", "x", "-f", "y"], "give the text with -m TEXT or with -f FILE"),
        (["send", "bravo", "-m", "x", "--timeout", "3s"], "--timeout is of no use without --wait"),
        (["send", "bravo", "-m", "x", "--wait", "done"], "invalid value for '--wait'"),
        (["send", "bravo", "-f", "/nowhere/x.md"], "cannot read /nowhere/x.md: No such file"),
        (["--as", "", "check"], "invalid value for '--as'"),
        (["check", "--as="], "invalid value for '--as'"),
        (["mcp", "--as", ""], "invalid value for '--as'"),
        (["node", "status", "extra"], "got unexpected extra argument"),
        (["check", "--config", "/nowhere/zmail.toml"], "there is no configuration file /nowhere/zmail.toml"),
    ],
)
def test_wrong_usage_ends_with_2_and_starts_nothing(
    zmail: Zmail, home: Path, args: list[str], said: str
) -> None:
    run = zmail(*args)
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ")
    assert said.lower() in run.stderr.lower()
    assert not list(home.iterdir())


def test_an_error_names_the_help_of_the_command(zmail: Zmail) -> None:
    assert zmail("read").stderr.splitlines()[1:] == ["hint: how it is used: zmail read -h"]


def test_with_json_a_usage_error_is_an_object_on_stderr_wherever_the_option_stands(zmail: Zmail) -> None:
    for args in (["--json", "read"], ["read", "--bogus", "--json"]):
        run = zmail(*args)
        assert (run.code, run.stdout) == (2, "")
        assert run.error["code"] == "invalid"
        assert run.error["message"]
        assert run.error["hint"] == "how it is used: zmail read -h"


def test_a_text_that_is_not_utf8_is_refused(zmail: Zmail) -> None:
    run = zmail("send", "bravo", "-f", "-", input=b"\xff\xfe\x00")
    assert (run.code, run.stderr) == (2, "error: stdin is not UTF-8 text (byte 0)\n")


def test_a_file_larger_than_a_brief_is_not_read_to_its_end(zmail: Zmail, tmp_path: Path) -> None:
    large = tmp_path / "large.md"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    run = zmail("send", "bravo", "-f", large, "--json")
    assert (run.code, run.error["code"]) == (2, "too-large")
    assert str(large) in run.error["message"]


# ── autostart forbidden, unsuitable homes ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["check", "inbox", "roster", "status", "peers", "invite"])
def test_without_a_node_and_with_autostart_forbidden_a_command_fails_with_a_hint(
    zmail: Zmail, home: Path, verb: str
) -> None:
    run = zmail("--as", "alpha", verb, env={"ZMAIL_AUTOSTART": "0"})
    assert (run.code, run.stdout) == (1, "")
    assert "ZMAIL_AUTOSTART=0" in run.stderr
    assert "hint: start it: zmail node start\n" in run.stderr
    assert not list(home.iterdir())


def test_a_state_folder_open_to_others_is_refused_by_whatever_would_start_the_node(
    zmail: Zmail, home: Path
) -> None:
    home.chmod(0o755)
    for args in (["--as", "alpha", "check"], ["node", "start"], ["node", "run"]):
        run = zmail(*args, "--json")
        assert (run.code, run.error["code"]) == (1, "unsuitable-home")
        assert run.error["hint"] == f"make it private: chmod 700 {home}"


def test_a_wrong_configuration_keeps_the_node_from_starting_and_is_told_in_full(
    zmail: Zmail, home: Path
) -> None:
    (home / "zmail.toml").write_text('[node]\nnmae = "x"\n')
    for args in (["--as", "alpha", "check"], ["node", "start"], ["node", "run"]):
        run = zmail(*args, "--json")
        assert (run.code, run.error["code"]) == (2, "invalid-config")
        assert run.error["message"] == f"{home}/zmail.toml:2: unknown key 'node.nmae'"
        assert run.error["hint"] == "did you mean 'node.name'?"


# ── what loads ──────────────────────────────────────────────────────────────────────────────────────────────────


def _loaded_by(zmail_env: Env, *argv: str) -> set[str]:
    """The modules that `zmail ARGV` leaves loaded, run to its end with nothing on stdin."""
    code = (
        "import json, sys\n"
        f"sys.argv = ['zmail', *{list(argv)!r}]\n"
        "from zmail.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    )
    env = {**zmail_env(), "ZMAIL_AUTOSTART": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, input="", capture_output=True, text=True, timeout=60
    )
    return set(json.loads(run.stderr.splitlines()[-1]))


@pytest.mark.parametrize("argv", [["mcp"], ["--as", "alpha", "mcp"], ["mcp", "--as=alpha", "-q"]])
def test_mcp_imports_nothing_outside_the_standard_library(zmail_env: Env, argv: list[str]) -> None:
    loaded = _loaded_by(zmail_env, *argv)
    assert "zmail.relay" in loaded
    heavy = {"click", "zmq", "peewee", "mcp", "psutil", "yaml", "asyncio", "dataclasses", "tomllib"}
    assert not loaded & heavy
    outside = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"__main__"}
    assert {name for name in outside if not name.startswith(("_", "distutils"))} == {"zmail", "broker_free"}


def test_a_command_imports_only_click_besides_the_standard_library(zmail_env: Env) -> None:
    assert not _loaded_by(zmail_env, "--as", "alpha", "check") & {"zmq", "peewee", "mcp", "psutil", "asyncio"}


def test_importing_the_packages_imports_nothing_heavy(zmail_env: Env) -> None:
    code = "import sys, zmail, broker_free; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=zmail_env(), capture_output=True, text=True
    )
    assert not set(run.stdout.split()) & {"click", "zmq", "peewee", "mcp", "psutil", "yaml", "asyncio"}


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["mcp"], {}),
        (["--as", "alpha", "mcp"], {"--as": "alpha"}),
        (["mcp", "--as=alpha", "--config", "x"], {"--as": "alpha", "--config": "x"}),
        (["--json", "mcp", "-q"], {}),
        (["mcp", "-h"], None),
        (["mcp", "--as"], None),
        (["mcp", "--as="], None),
        (["mcp", "--bogus"], None),
        (["--as", "mcp"], None),
        (["--as", "mcp", "check"], None),
        (["send", "mcp", "-m", "x"], None),
        ([], None),
    ],
)
def test_only_a_plain_mcp_goes_past_click(argv: list[str], options: dict[str, str] | None) -> None:
    assert relay_options(argv) == options


# ── signals and pipes ───────────────────────────────────────────────────────────────────────────────────────────


def test_ctrl_c_ends_a_command_with_130_and_no_traceback(
    zmail_env: Env, eventually: Callable[..., None]
) -> None:
    waiting = subprocess.Popen(
        [sys.executable, "-m", "zmail", "send", "bravo", "-f", "-"],
        cwd=ROOT,
        env=zmail_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert waiting.stdin is not None
    waiting.stdin.write(b"x")
    waiting.stdin.flush()
    eventually(lambda: _unread_bytes(waiting.stdin.fileno()) == 0, 10)  # it has loaded, and waits for more
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=40)
    assert (waiting.returncode, out, err) == (130, b"", b"")


def _unread_bytes(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_reader_that_has_had_enough_is_no_error(zmail_env: Env) -> None:
    command = f"{sys.executable} -m zmail -h | head -c 1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, env=zmail_env(), capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout == "U0\n"


# ── mail ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def send(zmail: Zmail) -> Callable[..., dict[str, Any]]:
    """Send a brief from alpha to bravo, both of this node, and return the answer."""
    assert zmail("--as", "bravo", "check").code == 0  # opens the mailbox

    def send(*args: str, **how: Any) -> dict[str, Any]:
        run = zmail("--as", "alpha", "send", *args, "--json", **how)
        assert run.code == 0, run.stderr
        answer: dict[str, Any] = run.json
        return answer

    return send


def test_a_brief_is_sent_listed_and_read(zmail: Zmail, send: Callable[..., dict[str, Any]]) -> None:
    sent = send("bravo", "-s", "Deploy blocked", "-m", "Migration 42 fails.", "--action", "Review it")
    node = zmail("--as", "bravo", "status", "--json").json["node"]["name"]
    assert [each["address"] for each in sent["recipients"]] == [f"bravo@{node}"]

    check = zmail("--as", "bravo", "check", "--json").json
    assert (check["callsign"], check["unread"], check["by_sender"]) == ("bravo", 1, {f"alpha@{node}": 1})
    listed = zmail("--as", "bravo", "inbox", "--json").json
    assert (listed["total"], [brief["id"] for brief in listed["briefs"]]) == (1, [sent["id"]])
    assert "body" not in listed["briefs"][0]

    shown = zmail("--as", "bravo", "read", sent["id"])
    assert shown.code == 0
    assert "Migration 42 fails." in shown.stdout
    assert "Review it" in shown.stdout
    assert zmail("--as", "bravo", "check", "--json").json["unread"] == 0
    assert zmail("--as", "bravo", "inbox", "--json").json["briefs"] == []
    assert len(zmail("--as", "bravo", "inbox", "--all", "--json").json["briefs"]) == 1


def test_a_brief_comes_from_a_file_with_its_frontmatter_and_goes_back_into_one(
    zmail: Zmail, send: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    text = "---\ntitle: a: b\nto: bravo\npriority: high\naction: Look\n---\nThe *text*.\n"
    (tmp_path / "brief.md").write_text(text)
    for sent in (send("-f", str(tmp_path / "brief.md")), send("-f", "-", input=text)):
        raw = zmail("--as", "bravo", "read", "--raw", sent["id"][-8:]).stdout
        assert raw.startswith("---\n")
        assert "priority: high\n" in raw
        assert raw.endswith("---\nThe *text*.\n")
        assert send("bravo", "-f", "-", input=raw)["id"] != sent["id"]


def test_an_option_overrides_the_frontmatter(zmail: Zmail, send: Callable[..., dict[str, Any]]) -> None:
    sent = send("bravo", "-s", "Mine", "-f", "-", input="---\ntitle: Theirs\nto: nobody\n---\nx")
    assert zmail("--as", "bravo", "read", sent["id"], "--json").json["title"] == "Mine"


def test_peeking_leaves_a_brief_unread(zmail: Zmail, send: Callable[..., dict[str, Any]]) -> None:
    sent = send("bravo", "-m", "x")
    assert zmail("--as", "bravo", "read", "--peek", sent["id"]).code == 0
    assert zmail("--as", "bravo", "check", "--json").json["unread"] == 1


def test_a_reply_stays_in_the_thread(zmail: Zmail, send: Callable[..., dict[str, Any]]) -> None:
    sent = send("bravo", "-m", "question")
    for args, text in ((["-m", "answer"], ""), (["-f", "-"], "answer from stdin")):
        reply = zmail("--as", "bravo", "reply", sent["id"], *args, "--json", input=text).json
        assert reply["thread"] == sent["thread"]
        assert zmail("--as", "alpha", "read", reply["id"], "--json").json["reply_to"] == sent["id"]


def test_a_listing_is_as_long_as_asked_newest_first_and_counts_all(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    ids = [send("bravo", "-m", f"number {number}")["id"] for number in range(3)]
    for limit, shown in (("2", ids[:0:-1]), ("0", ids[::-1]), ("9", ids[::-1])):
        listed = zmail("--as", "bravo", "inbox", "-n", limit, "--json").json
        assert (listed["total"], [brief["id"] for brief in listed["briefs"]]) == (3, shown)


def test_a_listing_can_be_narrowed(zmail: Zmail, send: Callable[..., dict[str, Any]]) -> None:
    sent = send("bravo", "-m", "x")["id"]
    for args, found in (
        (["--from", "alpha"], [sent]),
        (["--from", "charlie"], []),
        (["--since", "1h"], [sent]),
        (["--since", "2100-01-01"], []),
    ):
        listed = zmail("--as", "bravo", "inbox", *args, "--json").json["briefs"]
        assert [brief["id"] for brief in listed] == found


def test_everybody_gets_what_is_sent_to_all_but_the_sender(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    zmail("--as", "charlie", "check")
    callsigns = {each["address"].partition("@")[0] for each in send("all", "-m", "hear")["recipients"]}
    assert {"bravo", "charlie"} <= callsigns
    assert "alpha" not in callsigns


def test_the_answer_is_on_stdout_and_quiet_silences_what_is_not_an_error(zmail: Zmail) -> None:
    talkative, quiet = zmail("invite", "--as", "alpha"), zmail("invite", "--as", "alpha", "-q")
    assert talkative.stdout.startswith("zm1-")
    assert len(talkative.stdout.split()) == 1
    assert "zmail join" in talkative.stderr
    assert quiet.stdout.startswith("zm1-")
    assert quiet.stderr == ""


def test_the_wait_for_delivery_is_over_at_once_on_the_same_node(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    answer = send("bravo", "-m", "x", "--wait", "delivered")
    assert [each["state"] for each in answer["recipients"]] == ["delivered"]


def test_a_wait_that_is_over_too_early_ends_with_4_and_still_says_what_was_sent(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    run = zmail("--as", "alpha", "send", "bravo", "-m", "x", "--wait", "read", "--timeout", "1s")
    assert run.code == 4
    assert run.stdout.startswith("sent ")
    assert run.stderr.startswith("error: ")
    assert zmail("--as", "bravo", "check", "--json").json["unread"] == 1


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_recipient_ends_with_3_the_nearest_names_and_nothing_sent(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    run = zmail("--as", "alpha", "send", "bravo", "brvo", "-m", "x")
    assert (run.code, run.stdout) == (3, "")
    assert run.stderr.startswith("error: nobody is called 'brvo'\nhint: did you mean 'bravo'?")
    assert zmail("--as", "bravo", "check", "--json").json["unread"] == 0


def test_an_unknown_name_at_a_known_node_is_taken_and_one_at_an_unknown_node_is_not(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    node = zmail("--as", "alpha", "status", "--json").json["node"]["name"]
    assert send(f"later@{node}", "-m", "x")["recipients"][0]["address"] == f"later@{node}"
    run = zmail("--as", "alpha", "send", "later@no-such-node", "-m", "x", "--json")
    assert (run.code, run.error["code"]) == (3, "unknown-address")


CANNOT_BE_SENT: list[tuple[list[str], str, str]] = [  # arguments, stdin, what is said
    (["bravo", "-f", "-"], "x" * (1 << 20), "at most"),
    (["bravo", "-f", "-"], "---\n- a list\n---\nx", "frontmatter"),
    (["bravo", "-f", "-"], "---\npriority: extreme\n---\nx", "priority"),
    (["bravo", "-f", "-"], "---\ntitle:\n---\nx", "the title is empty"),
    (["bravo", "-s", "", "-m", "x"], "", "the title is empty"),
    (["bravo", "-s", "  ", "-m", "x"], "", "the title is empty"),
    (["bravo", "-m", ""], "", "neither a title nor a text"),
    (["bra vo!", "-m", "x"], "", "malformed callsign name"),
    (["bravo@@", "-m", "x"], "", "malformed"),
    (["bravo", "-m", "x", "--priority", "extreme"], "", "priority"),
    (["bravo", "-m", "x", "--intent", "shout"], "", "no such intent"),
    (["bravo", "-m", "x", "--ttl", "soon"], "", "not a duration"),
    (["bravo", "-m", "x", "--due", "tomorrow"], "", "due"),
    (["bravo", "-m", "x", "--wait", "read", "--timeout", "soon"], "", "not a duration"),
    (["-m", "x"], "", "recipient"),
]


def test_a_brief_that_cannot_be_sent_ends_with_2_the_reason_and_nothing_sent(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    for args, text, said in CANNOT_BE_SENT:
        run = zmail("--as", "alpha", "send", *args, input=text)
        assert (run.code, run.stdout) == (2, ""), args
        assert run.stderr.startswith("error: "), args
        assert said in run.stderr, args
    assert zmail("--as", "bravo", "check", "--json").json["unread"] == 0


def test_an_id_that_fits_nothing_ends_with_3_and_one_that_fits_several_with_2(
    zmail: Zmail, send: Callable[..., dict[str, Any]]
) -> None:
    send("bravo", "-m", "x")
    missing = zmail("--as", "bravo", "read", "zzzzzzzz", "--json")
    assert (missing.code, missing.error["code"]) == (3, "not-found")
    foreign = zmail("--as", "charlie", "read", send("bravo", "-m", "y")["id"], "--json")
    assert (foreign.code, foreign.error["code"]) == (3, "not-found")


def test_a_script_that_does_not_say_who_it_is_ends_with_5(zmail: Zmail) -> None:
    run = zmail("check", "--json")
    assert (run.code, run.error["code"]) == (5, "no-identity")
    assert "--as" in run.error["hint"]


def test_a_name_held_by_another_live_process_ends_with_5(zmail: Zmail, zmail_env: Env) -> None:
    zmail("node", "start")
    session = subprocess.Popen(
        [sys.executable, "-m", "zmail", "--as", "alpha", "mcp"],
        cwd=ROOT,
        env=zmail_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert session.stdin is not None
    assert session.stdout is not None
    session.stdin.write(INITIALIZE)
    session.stdin.flush()
    assert session.stdout.readline()
    try:
        run = zmail("--as", "alpha", "check", "--json")
        assert (run.code, run.error["code"]) == (5, "callsign-taken")
    finally:
        session.communicate(timeout=40)
    assert zmail("--as", "alpha", "check").code == 0


INITIALIZE = (
    b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25",'
    b'"capabilities":{},"clientInfo":{"name":"test","version":"1"}}}\n'
)


# ── pairing ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def other(home: Path) -> Path:
    """The home of a second node."""
    folder = home / "b"
    folder.mkdir(mode=0o700)
    return folder


def test_two_nodes_are_paired_by_one_command_on_each_side(
    zmail: Zmail, other: Path, eventually: Callable[..., None]
) -> None:
    zmail("--as", "alpha", "check")
    zmail("--as", "bravo", "check", home=other, env=NAMED_B)
    code = zmail("--as", "alpha", "invite").stdout.strip()
    joined = zmail("--as", "bravo", "join", code, "--json", home=other, env=NAMED_B)
    assert joined.code == 0, joined.stderr
    assert [peer["name"] for peer in zmail("--as", "alpha", "peers", "--json").json["peers"]] == ["node-b"]
    eventually(lambda: zmail("--as", "alpha", "send", "bravo", "-m", "x").code == 0, 10)
    eventually(lambda: zmail("--as", "bravo", "check", "--json", home=other).json["unread"] == 1, 10)
    waited = zmail("--as", "alpha", "send", "bravo@node-b", "-m", "x", "--wait", "delivered", "--json")
    assert (waited.code, waited.json["recipients"][0]["state"]) == (0, "delivered")

    third = other.parent / "c"
    third.mkdir(mode=0o700)
    again = zmail("--as", "cora", "join", code, "--json", home=third)
    assert (again.code, again.error["code"]) == (1, "pairing-refused"), "a code is good for one node, once"
    status = zmail("--as", "alpha", "status", "--json").json
    assert status["refused"]["unknown-key"] >= 1


def test_a_node_gets_another_key_and_is_removed_by_one_command_each(
    zmail: Zmail, other: Path, eventually: Callable[..., None]
) -> None:
    zmail("--as", "alpha", "check")
    zmail("--as", "bravo", "check", home=other, env=NAMED_B)
    zmail("join", zmail("invite").stdout.strip(), home=other, env=NAMED_B)
    rotated = zmail("node", "rotate-key", "--json", home=other)
    assert rotated.code == 0, rotated.stderr
    eventually(
        lambda: zmail("--as", "alpha", "send", "bravo", "-m", "x", "--wait", "delivered").code == 0, 20
    )
    missing = zmail("peers", "remove", "node-x", "--json")
    assert (missing.code, missing.error["code"]) == (3, "unknown-address")
    removed = zmail("peers", "remove", "NODE-B")
    assert removed.code == 0, removed.stderr
    assert "mail that waits for it is dead" in removed.stdout
    assert zmail("peers", "--json").json["peers"] == []
    assert [each["callsign"] for each in zmail("roster", "--json").json["callsigns"]] == ["alpha"]
    eventually(lambda: zmail("status", "--json", home=other).json["node"]["removed_by"] is not None, 20)
    assert "removed from the mesh by" in zmail("status", home=other).stdout


NAMED_B = {"ZMAIL_NODE_NAME": "node-b"}


def test_what_is_no_code_is_refused_with_the_reason(zmail: Zmail) -> None:
    for code in ("", "x", "zm1-", "zm1-AAAA", "zm2-" + "A" * 80):
        run = zmail("--as", "alpha", "join", code, "--json")
        assert (run.code, run.error["code"]) == (2, "invalid"), code
        assert run.error["message"]
    assert zmail("--as", "alpha", "peers", "--json").json["peers"] == []


def test_a_code_with_a_typing_error_is_refused(zmail: Zmail, other: Path) -> None:
    code = zmail("--as", "alpha", "invite").stdout.strip()
    swapped = code[:-2] + code[-1] + code[-2] if code[-1] != code[-2] else code[:-1]
    run = zmail("--as", "bravo", "join", swapped, "--json", home=other)
    assert (run.code, run.error["code"]) == (2, "invalid")


def test_a_code_that_is_over_is_refused_on_both_sides_logged_and_changes_nothing(
    zmail: Zmail, home: Path, other: Path, eventually: Callable[..., None]
) -> None:
    zmail("--as", "bravo", "check", home=other)
    invited = zmail("--as", "alpha", "invite", "--ttl", "1s", "--json").json
    over = datetime.fromisoformat(invited["expires_at"])
    eventually(lambda: datetime.now(UTC) > over + timedelta(milliseconds=50))
    run = zmail("--as", "bravo", "join", invited["code"], "--json", home=other)
    assert (run.code, run.error["code"]) == (1, "pairing-refused")
    for each in (home, other):
        assert zmail("--as", "alpha", "peers", "--json", home=each).json["peers"] == []
    assert "refused verb=join code=pairing-refused" in (other / "home.log").read_text()


# ── a home whose door is elsewhere ──────────────────────────────────────────────────────────────────────────────


def test_a_home_with_a_long_path_works_through_a_door_in_the_runtime_folder(zmail: Zmail, home: Path) -> None:
    runtime = home / "run"
    runtime.mkdir(mode=0o700)
    long = home / ("h" * 120)
    assert zmail("--as", "alpha", "check", home=long, env={"XDG_RUNTIME_DIR": str(runtime)}).code == 0
    assert [path.suffix for path in runtime.iterdir()] == [".sock"]
    assert zmail("--as", "alpha", "check", home=long, env={"ZMAIL_AUTOSTART": "0"}).code == 0


def test_the_version_is_said(zmail: Zmail) -> None:
    done = zmail("--version")
    assert (done.code, done.stdout) == (0, f"zmail {__version__}\n")
