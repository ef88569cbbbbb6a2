"""What every command has: the options accepted before and after the verb, and how an answer is shown."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import click

from zmail.mailbox import Mailbox
from zmail.paths import Home

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@dataclass(kw_only=True)
class Options:
    """Filled in by click while it parses: the same option counts before the verb and after it."""

    as_name: str | None = None
    config: str | None = None
    json: bool = False
    quiet: bool = False
    no_color: bool = False

    @cached_property
    def env(self) -> Mapping[str, str]:
        """The environment, in which an option has replaced the variable of the same meaning."""
        return {**os.environ, "ZMAIL_CONFIG": self.config} if self.config else dict(os.environ)

    @cached_property
    def home(self) -> Home:
        return Home.resolve(self.env)

    @property
    def mailbox(self) -> Mailbox:
        self.check_config()
        return Mailbox(self.home, as_name=self.as_name, env=self.env)

    def check_config(self) -> None:
        """Refuse a configuration that was named and is wrong, also when the node that runs has read another."""
        if self.env.get("ZMAIL_CONFIG"):
            from zmail.config import load

            load(self.home, self.env)

    def answer(self, result: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> None:
        """Write the answer to stdout: the JSON shape with --json, else what `text` makes of it."""
        # ASCII only: no character of a brief reaches the terminal as a control code.
        shown = json.dumps(result, indent=2) if self.json else text(result)
        click.echo(shown, nl=not shown.endswith("\n"), color=self.may_colour)

    def talk(self, text: str) -> None:
        """Say something that is not the answer, on stderr."""
        if not self.quiet:
            click.echo(text, err=True, color=self.may_colour)

    @property
    def colour(self) -> bool:
        """Whether the answer goes to a terminal that is to have colours."""
        return sys.stdout.isatty() and self.may_colour is None

    @property
    def may_colour(self) -> bool | None:
        """In click's words: False never, None wherever it is a terminal that gets the text."""
        return False if self.no_color or os.environ.get("NO_COLOR") else None


def _keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value == "":  # of `--as "$NAME"` with NAME unset: nobody is meant, least of all the default
        raise click.BadParameter("it must not be empty")
    if value:  # an option left out after the verb does not undo the one before it
        setattr(context.ensure_object(Options), str(parameter.name), value)


def _everywhere(*, hidden: bool) -> list[click.Parameter]:
    def option(*names: str, help: str, **how: Any) -> click.Option:  # Any: click's own parameters
        return click.Option(names, help=help, hidden=hidden, expose_value=False, callback=_keep, **how)

    return [
        option("--as", "as_name", metavar="NAME", help="Act as NAME, a mailbox of this node."),
        option("--json", is_flag=True, help="Answer in JSON; errors too, on stderr."),
        option("--config", metavar="PATH", help="Use this zmail.toml when the node is started."),
        option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
        option("--no-color", is_flag=True, help="No colours; NO_COLOR does the same."),
    ]


_SHOWN = _everywhere(hidden=False)
_HIDDEN = _everywhere(hidden=True)


class Verb(click.Command):
    """A command that takes the options of every command, which the help of `zmail` itself explains."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *_HIDDEN]


class Verbs(click.Group):
    """Commands in the order in which they are defined, with the options of every command before them."""

    command_class = Verb

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*(_SHOWN if ctx.parent is None else _HIDDEN), *super().get_params(ctx)]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def now_ms() -> int:
    """The time that ages in an answer are counted to."""
    return time.time_ns() // 1_000_000
