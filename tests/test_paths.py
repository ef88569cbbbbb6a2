"""Where a home's files are, which folders are refused, and that looking costs little."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker_free.errors import NodeInUse, UnsuitableHome
from broker_free.filesystem import file_system_of
from tests.conftest import need_root
from zmail.paths import DOOR_BYTES_MAX, Home

ROOT = Path(__file__).resolve().parents[1]

MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:21 / /home rw,nosuid shared:5 master:2 - nfs4 nas:/home rw,vers=4.2
31 30 254:1 / /home/ann/fast rw - xfs /dev/vdb rw
32 22 0:44 / /mnt/my\040disk rw - fuse.sshfs box:/ rw
33 22 0:45 / /mnt/odd\134name rw - cifs //box/x rw
34 22 254:2 / /srv rw - ext4 /dev/vdc rw
35 34 0:46 / /srv rw - 9p host rw
a line of another kind
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/var/lib/x", "ext4"),
        ("/home", "nfs4"),
        ("/home/ann", "nfs4"),
        ("/homes/ann", "ext4"),
        ("/home/ann/fast/x", "xfs"),
        ("/mnt/my disk/x", "fuse.sshfs"),
        ("/mnt/odd\\name", "cifs"),
        ("/srv/x", "9p"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_longest_and_latest_mount(path: str, kind: str) -> None:
    assert file_system_of(path, MOUNTS) == kind


def test_nothing_is_known_of_file_systems_without_mountinfo() -> None:
    assert file_system_of("/var", "") is None


def test_zmail_home_holds_everything() -> None:
    home = Home.resolve({"ZMAIL_HOME": "/h", "XDG_STATE_HOME": "/x", "HOME": "/home/ann"})
    assert (home.state, home.config, home.door) == (Path("/h"), Path("/h"), Path("/h/door.sock"))


def test_a_relative_zmail_home_is_made_absolute_and_a_tilde_expanded() -> None:
    assert Home.resolve({"ZMAIL_HOME": "h"}).state == Path.cwd() / "h"
    assert Home.resolve({"ZMAIL_HOME": "~/h", "HOME": "/home/ann"}).state == Path("/home/ann/h")


def test_without_zmail_home_the_xdg_folders_are_used() -> None:
    home = Home.resolve({"HOME": "/home/ann", "XDG_STATE_HOME": "/s", "XDG_CONFIG_HOME": "/c"})
    assert (home.state, home.config) == (Path("/s/zmail"), Path("/c/zmail"))


def test_missing_and_relative_xdg_folders_fall_back_to_their_defaults() -> None:
    home = Home.resolve({"HOME": "/home/ann", "XDG_STATE_HOME": "not/absolute"})
    assert home.state == Path("/home/ann/.local/state/zmail")
    assert home.config == Path("/home/ann/.config/zmail")


def test_a_home_does_not_change() -> None:
    with pytest.raises(AttributeError):
        Home.resolve({"ZMAIL_HOME": "/h"}).door_path = "/elsewhere"


def test_the_longest_door_that_fits_a_socket_stays_in_its_home() -> None:
    fits = "/" + "h" * (DOOR_BYTES_MAX - len("//door.sock"))
    assert Home.resolve({"ZMAIL_HOME": fits}).door == Path(fits) / "door.sock"
    assert Home.resolve({"ZMAIL_HOME": fits + "h"}).door.name != "door.sock"


def test_the_length_of_a_door_counts_bytes_not_characters() -> None:
    assert Home.resolve({"ZMAIL_HOME": "/" + "ü" * 60}).door.name != "door.sock"


def test_a_door_too_long_for_a_socket_moves_to_the_runtime_folder(home: Path) -> None:
    runtime = _private(home / "run")
    env = {"ZMAIL_HOME": f"{home}/{'h' * 120}", "XDG_RUNTIME_DIR": str(runtime)}
    door = Home.resolve(env).door
    assert door.parent == runtime
    assert door.name.startswith("zmail-")
    assert len(os.fsencode(door)) <= DOOR_BYTES_MAX
    assert Home.resolve(env).door == door
    assert Home.resolve({**env, "ZMAIL_HOME": f"{home}/{'i' * 120}"}).door != door


def test_a_runtime_folder_open_to_others_is_not_used(home: Path) -> None:
    runtime = _private(home / "run")
    runtime.chmod(0o755)
    env = {"ZMAIL_HOME": f"{home}/{'h' * 120}", "XDG_RUNTIME_DIR": str(runtime)}
    assert Home.resolve(env).door.parent == Path(f"/tmp/zmail-{os.geteuid()}")


def test_a_client_without_a_runtime_folder_finds_the_door_that_the_node_chose(home: Path) -> None:
    env = {"ZMAIL_HOME": f"{home}/{'h' * 120}", "XDG_RUNTIME_DIR": str(_private(home / "run"))}
    chosen = Home.resolve(env)
    chosen.prepare()
    assert Home.resolve({"ZMAIL_HOME": env["ZMAIL_HOME"]}).door == chosen.door


def test_preparing_creates_a_private_state_folder(home: Path) -> None:
    Home.resolve({"ZMAIL_HOME": f"{home}/a/b"}).prepare()
    assert (home / "a/b").stat().st_mode & 0o777 == 0o700


def test_a_state_folder_open_to_others_is_refused_with_the_command_that_helps(home: Path) -> None:
    home.chmod(0o750)
    with pytest.raises(UnsuitableHome) as refused:
        Home.resolve({"ZMAIL_HOME": str(home)}).prepare()
    assert "open to other users" in refused.value.message
    assert refused.value.hint == f"make it private: chmod 700 {home}"


def test_a_state_folder_of_another_user_is_refused(home: Path) -> None:
    need_root()
    os.chown(home, 12345, 12345)
    with pytest.raises(UnsuitableHome, match="belongs to user 12345"):
        Home.resolve({"ZMAIL_HOME": str(home)}).prepare()


def test_a_state_folder_that_is_a_file_or_below_one_is_refused(home: Path) -> None:
    (home / "f").touch()
    for place in (f"{home}/f", f"{home}/f/h", f"{home}/f/g/h"):
        with pytest.raises(UnsuitableHome, match=f"cannot create {home}/f"):
            Home.resolve({"ZMAIL_HOME": place}).prepare()


def test_a_state_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(UnsuitableHome, match="cannot create /proc/none/h: "):
        Home.resolve({"ZMAIL_HOME": "/proc/none/h"}).prepare()


def test_a_state_folder_on_a_network_file_system_is_refused(home: Path) -> None:
    mountinfo = rf"36 1 0:50 / {os.path.realpath(home)} rw - nfs4 nas:/x rw"
    with pytest.raises(UnsuitableHome, match=r"network file system.*nfs4") as refused:
        Home.resolve({"ZMAIL_HOME": f"{home}/h"}).prepare(mountinfo=mountinfo)
    assert "ZMAIL_HOME" in (refused.value.hint or "")


def test_a_link_to_a_network_file_system_is_refused_too(home: Path) -> None:
    (home / "far").mkdir()
    (home / "link").symlink_to(home / "far")
    mountinfo = rf"36 1 0:50 / {os.path.realpath(home)}/far rw - cifs //box/x rw"
    with pytest.raises(UnsuitableHome, match="cifs"):
        Home.resolve({"ZMAIL_HOME": f"{home}/link/h"}).prepare(mountinfo=mountinfo)


def test_one_process_at_a_time_holds_a_home_and_a_killed_one_lets_go(home: Path) -> None:
    ours = Home.resolve({"ZMAIL_HOME": str(home)})
    assert ours.holder() is None
    other = _process_that_holds(home)
    try:
        assert ours.holder() == other.pid
        with pytest.raises(NodeInUse, match=f"already running, pid {other.pid}") as refused:
            ours.hold()
        assert refused.value.pid == other.pid
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert ours.holder() is None
    os.close(ours.hold())


def test_looking_who_holds_a_home_does_not_keep_a_node_from_taking_it(home: Path) -> None:
    """A look takes the lock for an instant; a start that meets it tries again."""
    ours = Home.resolve({"ZMAIL_HOME": str(home)})
    os.close(ours.hold())
    code = (
        "import sys; from zmail.paths import Home; h = Home.resolve({'ZMAIL_HOME': sys.argv[1]})\n"
        "while True: h.holder()"
    )
    looker = subprocess.Popen([sys.executable, "-c", code, str(home)], cwd=ROOT)
    try:
        for _ in range(50):
            os.close(ours.hold())
    finally:
        looker.kill()
        looker.communicate()


def test_resolving_a_home_imports_no_pathlib_and_nothing_outside_the_standard_library() -> None:
    code = (
        "import json, sys; before = set(sys.modules); import zmail.paths as p;"
        "p.Home.resolve({'ZMAIL_HOME': '/h'}).door_path;"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    # -S: site itself may import pathlib for the sake of editable installs.
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = set(json.loads(run.stdout))
    assert not imported & {"pathlib", "subprocess", "dataclasses", "asyncio"}
    assert imported <= set(sys.stdlib_module_names) | {"zmail", "broker_free"}


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


def _process_that_holds(home: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from zmail.paths import Home; lock = Home.resolve({'ZMAIL_HOME': sys.argv[1]}).hold();"
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(home)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process
