"""Which TCP connection of this process was sent how much, and cutting one. Asks the kernel; knows nothing of ZeroMQ.

libzmq bounds the size of a frame and the number of messages that wait, but not the number of frames of a message: one
that never ends grows in its pipe, out of the reader's sight. The kernel counts what a connection has received, so what
was received and never read stands out; and shutting the descriptor down ends that one connection, which libzmq itself
has no way to do. Linux only: elsewhere nothing is found, and only the frame limit holds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

Address = tuple[str, int]

_INFO_BYTES: Final = 136
_RECEIVED_AT: Final = 128  # tcpi_bytes_received of struct tcp_info, since Linux 4.1
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Connection:
    """One established TCP connection, held by a descriptor of its own until `close`."""

    here: Address
    there: Address
    received: int  # bytes, since it was opened
    _socket: socket.socket

    def cut(self) -> None:
        with contextlib.suppress(OSError):  # it has just ended by itself
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def resident_bytes() -> int:
    """Return how much memory this process has in use, 0 where that is not known."""
    if sys.platform != "linux":
        return 0
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:  # out of descriptors: no reason for a node to end
        return 0


def address_of(fd: int) -> Address | None:
    """Return the far end of a descriptor's connection, None when there is none."""
    with contextlib.suppress(OSError):
        one = socket.socket(fileno=os.dup(fd))
        try:
            return _plain(one.getpeername())
        finally:
            one.close()
    return None


def connections() -> Iterator[Connection]:
    """Yield the established TCP connections of this process. Each is closed once the next is asked for."""
    if sys.platform != "linux":
        return
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:  # out of descriptors
        return
    for name in names:
        found = _connection(int(name))
        if found is not None:
            try:
                yield found
            finally:
                found.close()


def _connection(fd: int) -> Connection | None:
    # Duplicated first: the number may be given to another file at any moment, what the copy stands for is not.
    try:
        copy = os.dup(fd)
    except OSError:
        return None
    try:
        one = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)  # no socket
        return None
    try:
        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        (received,) = struct.unpack_from("=Q", info, _RECEIVED_AT)
        return Connection(_plain(one.getsockname()), _plain(one.getpeername()), received, one)
    except (OSError, struct.error):
        one.close()  # not TCP, or not connected
        return None


def _plain(address: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return address[0].removeprefix("::ffff:"), address[1]
