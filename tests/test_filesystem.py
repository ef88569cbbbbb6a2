"""Where a store must not be: told by the table of mounts, and by trying."""

from __future__ import annotations

import asyncio
import errno
import mmap
import subprocess
from pathlib import Path

import pytest

from broker_free import Node
from broker_free.errors import UnsuitableHome
from broker_free.filesystem import check_suitable, file_system_of, probe
from tests.conftest import need_root

MACOS = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
devfs on /dev (devfs, local, nobrowse)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse)
//guest@nas/Shared%20Files on /Volumes/Shared Files (smbfs, nodev, nosuid, mounted by ann)
nas:/export (old) on /Volumes/old (nfs) (nfs, nodev)
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/Users/ann/state", "apfs"),
        ("/Volumes/Shared Files", "smbfs"),
        ("/Volumes/Shared Files/state", "smbfs"),
        ("/Volumes/Shared Files too", "apfs"),
        ("/Volumes/old (nfs)/state", "nfs"),
        ("/dev/x", "devfs"),
    ],
)
def test_the_mounts_of_macos_are_read_as_mount_prints_them(path: str, kind: str) -> None:
    assert file_system_of(path, MACOS) == kind


@pytest.mark.parametrize(
    "kind", ["nfs4", "cifs", "9p", "fuse.sshfs", "virtiofs", "vboxsf", "fuse.vmhgfs-fuse", "drvfs", "ceph"]
)
def test_a_network_file_system_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    mounts = f"36 1 0:50 / {tmp_path.resolve()} rw - {kind} far:/x rw"
    with pytest.raises(UnsuitableHome, match=f"network file system \\({kind}\\)") as refused:
        check_suitable(str(tmp_path / "home"), mountinfo=mounts)
    assert "local disk" in str(refused.value.hint)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs"])
def test_a_local_one_is_accepted(tmp_path: Path, kind: str) -> None:
    check_suitable(str(tmp_path), mountinfo=f"36 1 0:50 / {tmp_path.resolve()} rw - {kind} x rw")
    assert list(tmp_path.iterdir()) == []


def test_the_disk_of_this_test_and_a_real_tmpfs_are_accepted(tmp_path: Path) -> None:
    need_root()
    check_suitable(str(tmp_path))
    at = tmp_path / "memory"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", at], check=True)
    try:
        check_suitable(str(at))
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def test_a_file_system_without_shared_memory_is_refused_by_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such_device(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")  # what a kernel answers for files that cannot be mapped

    monkeypatch.setattr(mmap, "mmap", no_such_device)
    with pytest.raises(UnsuitableHome, match="without locks or shared memory"):
        probe(str(tmp_path))
    assert list(tmp_path.iterdir()) == []

    async def start() -> None:
        await Node("a", home=tmp_path / "a").start()

    with pytest.raises(UnsuitableHome, match="without locks or shared memory"):
        asyncio.run(start())
    assert not (tmp_path / "a" / "store.db").exists()
