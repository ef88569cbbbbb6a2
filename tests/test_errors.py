"""Every error has a code, and every code an exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import zmail
from broker_free.errors import BrokerFreeError, Refused
from zmail.errors import EXIT_CODES, InvalidAddress, NoIdentity, UnknownAddress, exit_code


def _tree(root: type[BrokerFreeError]) -> Iterator[type[BrokerFreeError]]:
    yield root
    for branch in root.__subclasses__():
        yield from _tree(branch)


def test_every_error_of_both_trees_has_an_exit_status() -> None:
    missing = {error.code for error in _tree(BrokerFreeError) if error is not Refused} - EXIT_CODES.keys()
    assert missing == set()


def test_the_exit_status_says_what_kind_of_error_it_was() -> None:
    codes = [UnknownAddress.code, InvalidAddress.code, NoIdentity.code, "timed-out", "never-heard-of"]
    assert [exit_code(code) for code in codes] == [3, 2, 5, 4, 1]


def test_the_errors_load_nothing_but_the_standard_library() -> None:
    script = "import sys, zmail.errors; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-S", "-c", script]  # -S: site-packages cannot be imported at all
    root = Path(zmail.__file__).parents[1]
    loaded = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name not in sys.stdlib_module_names} <= {
        "zmail",
        "broker_free",
        "__main__",
    }
