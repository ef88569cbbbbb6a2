"""The command `zmail`: its verbs, and how every error ends in one line, a hint and an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import click

from broker_free.errors import BrokerFreeError
from zmail import __version__
from zmail.cli import mail, mesh, node, store
from zmail.cli.options import HELP, Options, Verbs
from zmail.errors import exit_code

EXIT_USAGE = exit_code("invalid")
EXIT_INTERRUPTED = exit_code("interrupted")


@click.group(
    cls=Verbs,
    context_settings=HELP,
    epilog="Options of every command stand before or after it. Its own help: zmail COMMAND -h",
)
@click.version_option(__version__, message="zmail %(version)s")
def app() -> None:
    """Mail between Claude Code sessions, and you.

    \b
    Example:
      zmail demo
    """


@app.command()
@click.pass_obj
def demo(options: Options) -> int:
    """See it work: two nodes, three sessions and their mail.

    \b
    Example:
      zmail demo
    """
    from zmail.demo import main

    return main(json=options.json)


for command in (*mail.COMMANDS, *mesh.COMMANDS, *store.COMMANDS, node.group):
    app.add_command(command)


@app.command()
@click.pass_obj
def mcp(options: Options) -> int:
    """Be the MCP server of a Claude Code session, on stdin and stdout.

    \b
    Example:
      claude mcp add --scope user zmail -- zmail mcp
    """
    from zmail import relay

    return relay.run(as_name=options.as_name, config=options.config)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status. Nothing but a bug leaves here as an exception."""
    options = Options()
    try:
        with app.make_context("zmail", list(argv), obj=options) as context:
            status = app.invoke(context)  # a command returns a status of its own, or None
        sys.stdout.flush()
        return status or 0
    except click.exceptions.Exit as end:  # after -h
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True, color=options.may_colour)
        return EXIT_USAGE
    except click.ClickException as error:
        # What was parsed before the mistake says nothing of a --json after it.
        options.json = options.json or "--json" in argv
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "zmail"
        _complain(options, "invalid", _sentence(error.format_message()), f"how it is used: {where} -h")
        return EXIT_USAGE
    except BrokerFreeError as error:
        _complain(options, error.code, error.message, error.hint)
        return exit_code(error.code)
    except BrokenPipeError:
        # Whoever read the answer wanted no more of it (`zmail inbox | head -1`); what was asked is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED


def _complain(options: Options, code: str, message: str, hint: str | None) -> None:
    if options.json:
        click.echo(json.dumps({"error": {"code": code, "message": message, "hint": hint}}), err=True)
        return
    click.echo(click.style("error:", fg="red") + f" {message}", err=True, color=options.may_colour)
    if hint:
        click.echo(click.style("hint:", fg="cyan") + f" {hint}", err=True, color=options.may_colour)


def _sentence(text: str) -> str:
    """Make click's sentence fit after `error:`."""
    return text[:1].lower() + text[1:].rstrip(".")
