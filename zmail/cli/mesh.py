"""Commands about who is there: roster, status, peers, invite, join."""

from __future__ import annotations

from functools import partial

import click

from zmail import render
from zmail.cli.options import Options, Verb, Verbs, now_ms


@click.command(cls=Verb)
@click.pass_obj
def roster(options: Options) -> None:
    """List who can be written to, on every node, and who is there now.

    \b
    Example:
      zmail roster
    """
    options.answer(
        options.mailbox.roster(), partial(render.roster_text, now_ms=now_ms(), colour=options.colour)
    )


@click.command(cls=Verb)
@click.pass_obj
def status(options: Options) -> None:
    """Show this mailbox, its node, the store, the peers, the settings.

    \b
    Example:
      zmail status
    """
    options.answer(options.mailbox.status(), partial(render.status_text, colour=options.colour))


@click.group(cls=Verbs, invoke_without_command=True)
@click.pass_context
def peers(context: click.Context) -> None:
    """List the other nodes and their state, or remove one.

    \b
    Example:
      zmail peers
    """
    if context.invoked_subcommand is None:
        options: Options = context.obj
        options.answer(options.mailbox.peers(), partial(render.peers_text, colour=options.colour))


@peers.command()
@click.argument("node")
@click.pass_obj
def remove(options: Options, *, node: str) -> None:
    """Remove a node from the mesh: its key is refused everywhere from now on.

    \b
    Example:
      zmail peers remove server2
    """
    options.answer(options.mailbox.remove_peer(node), render.removed_text)


@click.command(cls=Verb)
@click.option("--ttl", metavar="T", help="How long the code is good: 15m unless given.")
@click.option("--address", metavar="HOST:PORT", help="Where the other machine can reach this node.")
@click.pass_obj
def invite(options: Options, *, ttl: str | None, address: str | None) -> None:
    """Print a code with which one other machine may join.

    \b
    Example:
      zmail invite
    """
    made = options.mailbox.invite(ttl=ttl, address=address)
    options.answer(made, lambda answer: str(answer["code"]))
    options.talk(
        f"on the other machine: zmail join CODE (one machine, until {made['expires_at']}; keep it secret)"
    )


@click.command(cls=Verb)
@click.argument("code")
@click.pass_obj
def join(options: Options, *, code: str) -> None:
    """Join the machine that printed CODE with `zmail invite`.

    \b
    Example:
      zmail join CODE
    """
    options.answer(
        options.mailbox.join(code),
        lambda answer: f"joined {answer['node']}\n{render.peers_text(answer, colour=options.colour)}",
    )


COMMANDS = (roster, status, peers, invite, join)
