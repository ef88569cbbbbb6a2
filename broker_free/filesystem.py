"""Which file systems cannot keep a store: those of networks, and any where files cannot be shared or locked.

With `os` alone: short-lived commands import this. Two looks, because neither is enough. The type, from the table of
mounts, tells file systems whose locks or shared memory work on one machine and lie to a second. A probe tells those
that fail here and now, whatever they are called.
"""

from __future__ import annotations

import os

from broker_free.errors import UnsuitableHome

# File locks and SQLite's shared memory do not hold between the clients of these.
_NETWORK = (
    "9p afp afpfs afs beegfs ceph cifs davfs drvfs fuse.ceph fuse.davfs2 fuse.gcsfuse fuse.glusterfs fuse.rclone"
    " fuse.s3fs fuse.sshfs fuse.vmhgfs-fuse glusterfs gpfs lustre macfuse ncpfs nfs nfs4 orangefs osxfuse prl_fs"
    " smb2 smb3 smbfs sshfs vboxsf virtiofs webdav"
)
NETWORK_FILE_SYSTEMS = frozenset(_NETWORK.split())


def check_suitable(folder: str, *, mountinfo: str | None = None) -> None:
    """Raise UnsuitableHome when `folder`, an existing one, is where a store would not keep its promises.

    `mountinfo` is the text of /proc/self/mountinfo, or what `mount` prints on macOS and BSD.
    """
    real = os.path.realpath(folder)
    kind = file_system_of(real, _mounts() if mountinfo is None else mountinfo)
    if kind in NETWORK_FILE_SYSTEMS:
        raise UnsuitableHome(
            f"{folder} is on a network file system ({kind}), where locks and commits do not hold",
            hint="keep the state on a local disk: choose a folder there (zmail: export ZMAIL_HOME=/a/local/folder)",
        )
    probe(folder)


def probe(folder: str) -> None:
    """Try what SQLite's write-ahead log needs: a lock, and memory that two openings of one file share."""
    import fcntl
    import mmap

    path = os.path.join(folder, f".probe.{os.getpid()}")
    try:
        first = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.ftruncate(first, mmap.PAGESIZE)
                fcntl.lockf(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with mmap.mmap(first, mmap.PAGESIZE) as one, mmap.mmap(second, mmap.PAGESIZE) as two:
                    one[0:5] = b"probe"
                    is_shared = two[0:5] == b"probe"
            finally:
                os.close(second)
        finally:
            os.close(first)
            os.unlink(path)
    except OSError as error:
        if error.errno in _FULL_OR_FORBIDDEN:
            return  # of a full disk, or a folder that cannot be written, others know more to say
        raise UnsuitableHome(
            f"{folder} is on a file system without locks or shared memory ({error.strerror})",
            hint="keep the state on a local disk",
        ) from error
    if not is_shared:
        raise UnsuitableHome(
            f"{folder} is on a file system that does not share memory between openings of a file",
            hint="keep the state on a local disk",
        )


def _errnos() -> frozenset[int]:
    import errno

    return frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})


_FULL_OR_FORBIDDEN = _errnos()


def file_system_of(path: str, mounts: str) -> str | None:
    """Name the type of the file system that holds `path` (absolute, links resolved); None when nothing fits.

    A line of Linux is `36 35 98:0 /root /mount/point options [tags] - type source options` (proc(5)), one of macOS and
    BSD `source on /mount/point (type, options)` (mount(8)).
    """
    kind, longest = None, -1
    for line in mounts.splitlines():
        mount_point, its_kind = _linux(line) if " - " in line else _bsd(line)
        inside = mount_point in ("/", path) or path.startswith(mount_point + "/")
        # Not `>`: of two mounts on one point the later one hides the earlier.
        if its_kind and inside and len(mount_point) >= longest:
            kind, longest = its_kind, len(mount_point)
    return kind


def _linux(line: str) -> tuple[str, str]:
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    return (_unescaped(fields[4]), after.split(" ", 1)[0]) if len(fields) >= 5 else ("", "")


def _bsd(line: str) -> tuple[str, str]:
    before, paren, options = line.rpartition(" (")
    _, on, mount_point = before.partition(" on ")
    return (mount_point, options.rstrip(")").split(",", 1)[0]) if paren and on else ("", "")


def _unescaped(field: str) -> str:
    """Undo the kernel's octal escapes for space, tab, newline and backslash."""
    head, *rest = field.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def _mounts() -> str:
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        pass  # not Linux
    import subprocess

    try:
        return subprocess.run(
            ["/sbin/mount"], capture_output=True, timeout=5, check=True, text=True, errors="surrogateescape"
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""  # the probe is what is left
