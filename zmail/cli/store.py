"""Commands about the store as a file: backup, restore."""

from __future__ import annotations

from pathlib import Path

import click

from zmail.cli.options import Options, Verb, now_ms


@click.command(cls=Verb)
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def backup(options: Options, *, file: str) -> None:
    """Copy all mail to FILE, a new file, while the node goes on. The node's keys are not in it.

    \b
    Example:
      zmail backup mail.backup
    """
    options.answer(
        options.mailbox.backup(file), lambda answer: f"saved {answer['bytes']} bytes to {answer['path']}"
    )
    options.talk("the node's keys are not in it: keep node.keys of the state folder somewhere safe, too")


@click.command(cls=Verb)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_obj
def restore(options: Options, *, file: Path) -> None:
    """Put a backup in the place of the store. The node must be stopped; what is replaced is kept.

    \b
    Example:
      zmail node stop && zmail restore mail.backup
    """
    from broker_free.errors import NodeInUse
    from broker_free.storefile import restore as restore_store

    options.home.prepare()
    try:
        options.home.hold()
    except NodeInUse as error:
        raise NodeInUse(error.message, pid=error.pid, hint="stop it first: zmail node stop") from None
    kept = restore_store(options.home.state, file, now_ms=now_ms())
    options.answer(
        {"restored": str(file), "kept": str(kept) if kept else None},
        lambda answer: (
            f"restored {answer['restored']}"
            + (f"; what was there is kept as {answer['kept']}" if answer["kept"] else "")
        ),
    )


COMMANDS = (backup, restore)
