"""Network namespaces around one router: machines with cables that can be pulled. Needs root and iproute2 on Linux."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from types import TracebackType

_numbers = itertools.count()


def can_be_made() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") is not None


class Lan:
    """A router in a namespace of its own, and one more namespace for each machine: 10.99.1.2, 10.99.2.2, …

    Nothing of it touches the host's own network; everything is gone at the end.
    """

    def __init__(self, machines: int) -> None:
        self._stem = f"bf{os.getpid()}x{next(_numbers)}"
        self._hub = f"{self._stem}h"
        self.namespaces = [f"{self._stem}n{number}" for number in range(1, machines + 1)]
        self.addresses = [f"10.99.{number}.2" for number in range(1, machines + 1)]

    def __enter__(self) -> Lan:
        try:
            self._ip("netns", "add", self._hub)
            forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
            self._ip("netns", "exec", self._hub, "sh", "-c", forward)
            for number, (namespace, address) in enumerate(zip(self.namespaces, self.addresses, strict=True)):
                subnet = address.rpartition(".")[0]
                self._ip("netns", "add", namespace)
                self._ip(
                    *("-n", self._hub, "link", "add", f"p{number}", "type", "veth"),
                    *("peer", "name", "eth", "netns", namespace),
                )
                self._ip("-n", self._hub, "addr", "add", f"{subnet}.1/24", "dev", f"p{number}")
                self._ip("-n", self._hub, "link", "set", f"p{number}", "up")
                # Without a cable packets vanish; nobody is told that there is no way, as on a real network.
                self._ip("-n", self._hub, "route", "add", "blackhole", f"{subnet}.0/24", "metric", "1000")
                self._ip("-n", namespace, "link", "set", "lo", "up")
                self._ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth")
                self._ip("-n", namespace, "link", "set", "eth", "up")
                self._ip("-n", namespace, "route", "add", "default", "via", f"{subnet}.1")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def unplug(self, machine: int) -> None:
        """Pull the cable of machine 0, 1, … at the router."""
        self._ip("-n", self._hub, "link", "set", f"p{machine}", "down")

    def plug(self, machine: int) -> None:
        self._ip("-n", self._hub, "link", "set", f"p{machine}", "up")

    def lose(self, machine: int, *, to: int) -> None:
        """Drop what one machine sends to another; what comes back the other way still arrives."""
        self._ip("-n", self.namespaces[machine], "route", "add", "blackhole", f"{self.addresses[to]}/32")

    def find(self, machine: int, *, to: int) -> None:
        self._ip("-n", self.namespaces[machine], "route", "del", "blackhole", f"{self.addresses[to]}/32")

    def _remove(self) -> None:
        for namespace in (*self.namespaces, self._hub):
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                self._ip("netns", "del", namespace)

    @staticmethod
    def _ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, ["ip", *arguments], done.stdout, done.stderr)
