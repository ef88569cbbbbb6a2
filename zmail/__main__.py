"""The console script. Sends `mcp`, which starts with every Claude Code session, past click to its own module.

Knows of the command line only how to find the verb; everything else is cli/.
"""

from __future__ import annotations

import os
import sys

_FLAGS = ("--json", "-q", "--quiet", "--no-color")
_WITH_VALUE = ("--as", "--config")


def main() -> None:
    """Run the command line of this process and exit with its status."""
    try:
        sys.exit(_status(sys.argv[1:]))
    except KeyboardInterrupt:  # while modules were still loading
        sys.exit(130)


def _status(argv: list[str]) -> int:
    if (options := relay_options(argv)) is not None:
        return relay(as_name=options.get("--as"), config=options.get("--config"))
    from zmail.cli import run

    return run(argv)


def relay_options(argv: list[str]) -> dict[str, str] | None:
    """Return the options of a plain `zmail [OPTION]… mcp [OPTION]…`, and None for every other command line."""
    options: dict[str, str] = {}
    verbs: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _WITH_VALUE:
            given = value if equals else next(words, None)
            if given is None:
                return None  # click says what is missing
            options[name] = given
        elif word not in _FLAGS:
            verbs.append(word)
    return options if verbs == ["mcp"] else None


def relay(*, as_name: str | None, config: str | None) -> int:
    """Be the MCP server of a session: a pipe to the node, until stdin ends."""
    from broker_free.errors import BrokerFreeError
    from zmail import mailbox
    from zmail import relay as pipe
    from zmail.errors import exit_code
    from zmail.paths import Home

    env = {**os.environ, "ZMAIL_CONFIG": config} if config else os.environ
    try:
        home = Home.resolve(env)
        return pipe.main(
            home.door_path, ensure_node=lambda: mailbox.ensure_node(home, env), as_name=as_name, env=env
        )
    except BrokerFreeError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        sys.stderr.write(f"error: {error.message}{hint}\n")
        return exit_code(error.code)


if __name__ == "__main__":
    main()
