"""Commands about the node: run, start, stop, restart, status, rotate-key."""

from __future__ import annotations

import click

from zmail import mailbox, render
from zmail.cli.options import Options, Verbs


@click.group(cls=Verbs, name="node")
def group() -> None:
    """Run, start, stop and see the node. Commands that need it start it by themselves.

    \b
    Example:
      zmail node status
    """


@group.command()
@click.pass_obj
def run(options: Options) -> int:
    """Be the node, in this terminal, until Ctrl-C.

    \b
    Example:
      zmail node run
    """
    from zmail.node import run as run_node

    return run_node(options.home, options.env, say=options.talk)


@group.command()
@click.pass_obj
def start(options: Options) -> None:
    """Start the node in the background; nothing happens when it runs already.

    \b
    Example:
      zmail node start
    """
    options.check_config()
    mailbox.start_node(options.home, options.env)
    _answer_state(options)


@group.command()
@click.pass_obj
def stop(options: Options) -> None:
    """Stop the node and wait until it is gone. Mail waits; the next command starts it again.

    \b
    Example:
      zmail node stop
    """
    mailbox.stop_node(options.home)
    _answer_state(options)


@group.command()
@click.pass_obj
def restart(options: Options) -> None:
    """Stop the node, if it runs, and start it.

    \b
    Example:
      zmail node restart
    """
    options.check_config()
    mailbox.stop_node(options.home)
    mailbox.start_node(options.home, options.env)
    _answer_state(options)


@group.command()
@click.pass_obj
def status(options: Options) -> None:
    """Print Running or Stopped.

    \b
    Example:
      zmail node status
    """
    _answer_state(options)


@group.command(name="rotate-key")
@click.pass_obj
def rotate_key(options: Options) -> None:
    """Give this node another key. Its id, its mail and its place in the mesh stay.

    \b
    Example:
      zmail node rotate-key
    """
    options.answer(options.mailbox.rotate_key(), render.rotated_text)


def _answer_state(options: Options) -> None:
    state = mailbox.node_state(options.home)
    options.answer(state, lambda answer: str(answer["state"]))
    if state["pid"]:
        version = state["version"] or "of unknown version"
        options.talk(f"pid {state['pid']}, zmail {version}, log {options.home.log_path}")
