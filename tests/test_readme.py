"""What the README says is true: its transcript, its example, its tables."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, Zmail
from zmail.cli.app import app
from zmail.errors import EXIT_CODES

README = (ROOT / "README.md").read_text()

# What differs from run to run. Each stands for itself wherever the transcript mentions it again.
_VARYING = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"), "<id>"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "<mark>"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z"), "<time>"),
    (re.compile(r"\b[0-9a-f]{8}\b"), "<short>"),
    (re.compile(r"just now|\d+ s ago"), "<ago>"),
)


def transcript() -> list[tuple[str, str]]:
    """Return (command, output) of the README's console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    steps = []
    for block in blocks:
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            steps.append((command, output))
    return steps


def normalised(text: str) -> str:
    for pattern, name in _VARYING:
        text = pattern.sub(name, text)
    return text


def test_the_transcript_of_the_readme_is_what_happens(zmail: Zmail) -> None:
    said_by_readme: list[str] = []
    said_here: list[str] = []
    steps = transcript()
    assert len(steps) >= 7
    for command, expected in steps:
        words = [_here(word, said_by_readme, said_here) for word in shlex.split(command)[1:]]
        done = zmail(*words, env={"ZMAIL_NODE_NAME": "server1"})
        output = done.stdout + done.stderr
        assert normalised(output) == normalised(expected), command
        said_by_readme += re.findall(r"\b[0-9a-f]{8}\b(?!-)", expected)
        said_here += re.findall(r"\b[0-9a-f]{8}\b(?!-)", output)


def _here(word: str, by_readme: list[str], here: list[str]) -> str:
    """Put the id that this run showed in the place of the one in the README."""
    return here[by_readme.index(word)] if word in by_readme else word


def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("orders.created b'order 1'\n", 0), done.stderr


def test_every_command_is_in_the_readme() -> None:
    missing = [name for name in app.commands if f"`zmail {name}" not in README]
    assert missing == []


def test_every_error_code_is_in_the_readme_with_its_exit_status() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (`.*`) \|$", README, re.MULTILINE))
    for code, status in EXIT_CODES.items():
        assert f"`{code}`" in rows[str(status)], code
