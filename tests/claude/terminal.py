"""A program in a terminal of its own: a private tmux server, keys in, screen out.

Knows nothing of Claude Code. The tmux server has its own socket and no configuration of the user's.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.claude.processes import end
from tests.claude.waiting import until

WIDTH, HEIGHT = 180, 50

# A program that ends leaves its last screen to be read; an escape is passed on at once.
TMUX_SETTINGS = """\
set -g remain-on-exit on
set -g status off
set -s escape-time 0
set -g default-terminal tmux-256color
"""


class NotOnScreen(AssertionError):
    """The screen did not show in time what a test waits for; the message holds the screen."""


class Terminal:
    """Starts `command` with exactly `env`; ends it, and the tmux server, on close. `folder` must be short."""

    def __init__(
        self, tmux: Path, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, folder: Path
    ) -> None:
        settings = folder / "tmux.conf"
        settings.write_text(TMUX_SETTINGS)
        self._tmux = [str(tmux), "-u", "-S", str(folder / "tmux.sock"), "-f", str(settings)]
        self._env = dict(env)
        # tmux would add TMUX and TERM to the environment: `env -i` gives the program exactly what was asked for.
        exact = ["env", "-i", *(f"{name}={value}" for name, value in env.items())]
        size = ["-x", str(WIDTH), "-y", str(HEIGHT)]
        self._run("new-session", "-d", *size, "-c", str(cwd), "--", *exact, *command)
        server, program = self._run("display-message", "-p", "#{pid} #{pane_pid}").split()
        self._server = psutil.Process(int(server))
        self.program = psutil.Process(int(program))

    def type_line(self, text: str) -> None:
        """Type one line of text and press Enter once the program shows it."""
        self._run("send-keys", "-l", "--", text)
        end_of_it = _without_spaces(text)[-40:]  # a long line is wrapped: breaks and spaces are not compared
        self.wait_for(lambda screen: end_of_it in _without_spaces(screen), timeout_s=5)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names: "Enter", "Down", "Escape", "C-c", "y"."""
        self._run("send-keys", *keys)

    def screen(self) -> str:
        return self._run("capture-pane", "-p", "-J")

    def wait_for(self, shown: str | Callable[[str], bool], *, timeout_s: float = 15.0) -> str:
        """Return the first screen that contains `shown`, or for which it holds. Raises NotOnScreen."""
        fits = (lambda screen: shown in screen) if isinstance(shown, str) else shown
        found = until(lambda: [screen for screen in [self.screen()] if fits(screen)], timeout_s=timeout_s)
        if not found:
            wanted = repr(shown) if isinstance(shown, str) else "what was waited for"
            raise NotOnScreen(
                f"{wanted} was not on the screen within {timeout_s} s:\n{self.screen().rstrip()}"
            )
        return found[0]

    def close(self) -> None:
        end(self.program)
        end(self._server)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            [*self._tmux, *command], env=self._env, capture_output=True, text=True, check=False, timeout=10
        )
        if done.returncode != 0:
            raise RuntimeError(f"tmux {command[0]} failed: {done.stderr.strip()}")
        return done.stdout


def _without_spaces(text: str) -> str:
    return re.sub(r"\s", "", text)
