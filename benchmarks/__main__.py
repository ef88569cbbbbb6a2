"""`python -m benchmarks run [SUITE]`: parse, run the suites, store and print. Measures nothing itself."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import blob, latency, links, mesh, report, throughput
from benchmarks.lab import ENDING_SIGNALS, Lab, WorkerFailed
from benchmarks.machine import file_system_of, folder_on_a_disk
from benchmarks.suite import Suite, run

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (latency.SUITE, throughput.SUITE, blob.SUITE, links.SUITE, mesh.SUITE)
}
KEPT_ROUNDS = 7  # a quick look with fewer must not replace a stored result
HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    for number in ENDING_SIGNALS:
        signal.signal(number, _interrupted)
    chosen = list(SUITES.values()) if options.suite == "all" else [SUITES[options.suite]]
    results = []
    try:
        for suite in chosen:
            with Lab(options.stores) as lab:
                result = run(suite, rounds=options.rounds, lab=lab, progress=_progress)
            if options.out is not None:
                _store(result, options.out)
            results.append(result)
            if not options.json:
                _progress("")
                print(report.plain(result), end="\n\n")
    except WorkerFailed as failed:
        _progress("")
        print(f"error: {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _progress("")
        print("interrupted; nothing was left running", file=sys.stderr)
        return 130
    _progress("")
    if options.json:
        print(json.dumps(results if options.suite == "all" else results[0], indent=2))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "run",
        help="measure, store the result as JSON and renew RESULTS.md",
        epilog="example: python -m benchmarks run latency --rounds 1",
    )
    command.add_argument("suite", nargs="?", default="all", choices=[*SUITES, "all"])
    command.add_argument(
        "--rounds", type=_positive, default=KEPT_ROUNDS, help="interleaved rounds (default %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    command.add_argument(
        "--out",
        type=Path,
        help="folder for results/<suite>.json and RESULTS.md "
        f"(default: benchmarks/ from {KEPT_ROUNDS} rounds on, else they are only printed)",
    )
    command.add_argument(
        "--stores",
        type=Path,
        default=folder_on_a_disk(),
        help="folder on the disk to measure, for temporary stores (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not options.stores.is_dir():
        parser.error(f"--stores {options.stores}: no such folder")
    if options.out is None and options.rounds >= KEPT_ROUNDS:
        options.out = HERE
    if file_system_of(options.stores) in {"tmpfs", "ramfs"}:
        print("warning: the stores lie in memory, where a sync costs nothing; see --stores", file=sys.stderr)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _store(result: dict[str, Any], out: Path) -> None:
    """Keep this result and write RESULTS.md anew from all results that are kept."""
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['suite']}.json").write_text(json.dumps(result, indent=2) + "\n")
    kept = [folder / f"{name}.json" for name in SUITES]
    results = [json.loads(path.read_text()) for path in kept if path.exists()]
    (out / "RESULTS.md").write_text(report.markdown(results))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
