"""The console script. Sends `mcp`, which starts with every Claude Code session, past click to its own module.

Knows of the command line only how to find the verb; everything else is cli/.
"""

from __future__ import annotations

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
        from zmail import relay

        return relay.run(as_name=options.get("--as"), config=options.get("--config"))
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
            if not given:
                return None  # click says what is missing
            options[name] = given
        elif word not in _FLAGS:
            verbs.append(word)
    return options if verbs == ["mcp"] else None


if __name__ == "__main__":
    main()
