"""Faults from the command line.

python -m tests.faults                                  the whole matrix, once
python -m tests.faults matrix F4 F15 --times 10         some rows, ten times as much
python -m tests.faults matrix --write                   and keep the results: MATRIX.md
python -m tests.faults soak --messages 1000000 --seed 7 a long run under everything
python -m tests.faults run kills --seed 7               one scenario, under the seed that a failure printed
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe_commit, describe_machine, folder_on_a_disk
from tests.faults import matrix, scenarios
from tests.faults.fleet import Violated
from tests.faults.soak import progress_on_a_terminal, soak

SCENARIOS = (
    *(scenarios.kills, scenarios.pause, scenarios.bad_network, scenarios.partition, scenarios.one_way),
    *(scenarios.dial_only, scenarios.slow_consumer, scenarios.poison, scenarios.clock_jumps),
    *(scenarios.few_descriptors, scenarios.blocked_loop, scenarios.cancelled, scenarios.forked),
    scenarios.terminated,
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.command == "soak":
        return _soak(options)
    if options.command == "run":
        return _scenario(options)
    known = {row.key for row in matrix.ROWS} | {row.key.split()[0] for row in matrix.ROWS}
    if unknown := set(options.rows) - known:
        print(
            f"error: no row {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}",
            file=sys.stderr,
        )
        return 2
    has_passed = matrix.run(options.rows, times=options.times, write=options.write, say=_say)
    return 0 if has_passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command="matrix", rows=[], times=1, write=False)
    commands = parser.add_subparsers(dest="command")
    table = commands.add_parser("matrix", help="run the rows of the matrix")
    table.add_argument("rows", nargs="*", metavar="F4", help="which (default: all)")
    table.add_argument("--times", type=int, choices=[1, 10], default=1, help="how much (default 1)")
    table.add_argument("--write", action="store_true", help="keep the results in matrix.json and MATRIX.md")
    long = commands.add_parser("soak", help="stream under random faults until enough is acknowledged")
    long.add_argument("--messages", type=int, default=1_000_000)
    long.add_argument("--seed", type=int)
    long.add_argument("--folder", type=Path, help="where homes and trace go (default: a temporary folder)")
    long.add_argument("--write", action="store_true", help="keep the result in matrix.json and MATRIX.md")
    one = commands.add_parser("run", help="run one scenario")
    one.add_argument("scenario", choices=[scenario.__name__ for scenario in SCENARIOS])
    one.add_argument("--seed", type=int)
    one.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    options.command = options.command or "matrix"
    return options


def _soak(options: argparse.Namespace) -> int:
    os.nice(5)
    folder, is_ours = _folder(options)
    try:
        result = soak(folder, messages=options.messages, seed=options.seed, progress=progress_on_a_terminal)
    except Violated as violated:
        print(f"FAILED: {violated}", file=sys.stderr)
        return 1
    progress_on_a_terminal("")
    now = datetime.datetime.now(datetime.UTC)
    result |= {
        "command": f"python -m tests.faults soak --messages {options.messages} --seed {result['seed']}",
        "date": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "commit": describe_commit(),
        "machine": describe_machine(folder_on_a_disk()),
    }
    print(json.dumps(result, indent=1))
    if options.write:
        matrix.keep("soak", result)
    if is_ours:
        shutil.rmtree(folder)
    return 0


def _scenario(options: argparse.Namespace) -> int:
    scenario = {one.__name__: one for one in SCENARIOS}[options.scenario]
    folder, is_ours = _folder(options)
    try:
        print(json.dumps(scenario(folder, seed=options.seed), indent=1))
    except Violated as violated:
        print(f"FAILED: {violated}", file=sys.stderr)
        return 1
    if is_ours:
        shutil.rmtree(folder)
    return 0


def _folder(options: argparse.Namespace) -> tuple[Path, bool]:
    """Where a run leaves its traces: kept when it fails, or when the caller named the folder."""
    if options.folder is not None:
        return options.folder, False
    return Path(tempfile.mkdtemp(prefix="faults-", dir=folder_on_a_disk())), True


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
