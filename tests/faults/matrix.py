"""The matrix of faults: which test makes which fault, and how it went when it was last measured here.

A row is one command. Running it gives a result, a duration and how many faults were made: what a test records under
`faults`, or else the number of tests. Results are kept in matrix.json, from which MATRIX.md is written, so that one
row can be measured anew without the others.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from benchmarks.machine import describe_commit, describe_machine, folder_on_a_disk

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
KEPT: Final = HERE / "matrix.json"
TABLE: Final = HERE / "MATRIX.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault of the protocol's list."""

    key: str
    fault: str
    means: str
    checks: str
    wanted: str  # how many, in CI
    pytest: tuple[str, ...] = ()  # arguments
    simulate: tuple[str, ...] = ()  # arguments


PROCESSES: Final = "tests/faults/test_processes.py"
NETWORKS: Final = "tests/faults/test_networks.py"

ROWS: Final = (
    Row(
        key="F1",
        fault="protocol schedules",
        means="seeded simulator on the pure core",
        checks="I1-3, 5, 6, 10",
        wanted="20,000 seeds",
        simulate=("--seeds", "20000"),
    ),
    Row(
        key="F1 rollback",
        fault="the same, and stores that go back in time",
        means="seeded simulator on the pure core",
        checks="I1, 2, 5, 6, 10",
        wanted="20,000 seeds",
        simulate=("--seeds", "20000", "--rollback"),
    ),
    Row(
        key="F2",
        fault="rules left out on purpose",
        means="the same simulator, one switch a rule",
        checks="each is caught",
        wanted="all",
        pytest=("tests/test_simulation.py", "-k", "left_out"),
    ),
    Row(
        key="F3",
        fault="sequences of API calls",
        means="Hypothesis state machine beside a dictionary, with restarts",
        checks="I1-3, 9, 10",
        wanted="300 × 40",
        pytest=("tests/test_store_machine.py",),
    ),
    Row(
        key="F4",
        fault="kill -9 of receiver, sender, both",
        means="own processes, random moments of a continuous stream",
        checks="I1-6, 9, 10",
        wanted="60",
        pytest=(PROCESSES, "-k", "killed"),
    ),
    Row(
        key="F5",
        fault="labelled crash points",
        means="environment variable → SIGKILL to self",
        checks="I1-6",
        wanted="14 × 3",
        pytest=("tests/test_crash_points.py",),
    ),
    Row(
        key="F6",
        fault="power loss",
        means="recorder of writes and syncs, replaying prefixes",
        checks="I1-5, 9",
        wanted="500 moments",
        pytest=("tests/test_power_loss.py",),
    ),
    Row(
        key="F8",
        fault="fsync error, slow fsync",
        means="LD_PRELOAD shim",
        checks="degraded, no ack",
        wanted="20",
        pytest=("tests/test_sync_faults.py",),
    ),
    Row(
        key="F9",
        fault="disk full, then freed",
        means="8 MiB tmpfs, RLIMIT_FSIZE",
        checks="typed error, recovery",
        wanted="10",
        pytest=("tests/test_disk.py",),
    ),
    Row(
        key="F10",
        fault="bit flips, truncation, missing log",
        means="edit the file while the node is down",
        checks="detected, quarantined, the rest delivered",
        wanted="50",
        pytest=("tests/test_damage.py",),
    ),
    Row(
        key="F11",
        fault="store deleted, restored old, cloned live",
        means="copy files",
        checks="regression event, window replayed, clone alarm",
        wanted="6",
        pytest=("tests/test_backup.py",),
    ),
    Row(
        key="F12",
        fault="partition",
        means="network namespaces, link of a veth pair down",
        checks="I1-3, 6, 8-10",
        wanted="3",
        pytest=(NETWORKS, "-k", "partition_is_seen"),
    ),
    Row(
        key="F13",
        fault="one-way partition",
        means="blackhole route in one namespace",
        checks="I1-3, 6, 9, 10; no flapping",
        wanted="2",
        pytest=(NETWORKS, "-k", "one_way"),
    ),
    Row(
        key="F13 dial-out",
        fault="a peer that can only dial out",
        means="namespaces, a listener on its own loopback",
        checks="I1-3, 6, 8-10",
        wanted="",
        pytest=(NETWORKS, "-k", "dial_out"),
    ),
    Row(
        key="F15",
        fault="latency, resets, half-close, corrupt bytes",
        means="TCP proxy in userspace",
        checks="I1-3, 6, 9, 10",
        wanted="10 of each",
        pytest=(NETWORKS, "-k", "half_closes"),
    ),
    Row(
        key="F16",
        fault="process pause",
        means="SIGSTOP, SIGCONT",
        checks="I1-3, 6, 8-10; nobody else flaps",
        wanted="5",
        pytest=(PROCESSES, "-k", "paused"),
    ),
    Row(
        key="F17",
        fault="clock jumps of up to a day",
        means="injected clock",
        checks="lifetimes exact within 1 s; I1-3, 9, 10",
        wanted="10",
        pytest=(PROCESSES, "-k", "clock"),
    ),
    Row(
        key="F18",
        fault="descriptor exhaustion",
        means="ulimit -n 64, files and strangers' connections",
        checks="survives, recovers; I1-3, 6, 9, 10",
        wanted="3",
        pytest=(PROCESSES, "-k", "descriptors"),
    ),
    Row(
        key="F19",
        fault="hostile: floods, slowloris, wrong key, oversize, endless multipart, fuzzed frames",
        means="raw ZMTP client, Hypothesis bytes",
        checks="RSS bounded, other peers < 2 × latency",
        wanted="30 s",
        pytest=("tests/test_hostile.py",),
    ),
    Row(
        key="F20",
        fault="allow, revoke, allow again",
        means="peers remove, a new invitation",
        checks="ignored ≤ 1 s, back ≤ 35 s",
        wanted="5",
        pytest=("tests/test_mesh.py", "-k", "removed or allowed"),
    ),
    Row(
        key="F21",
        fault="slow consumer, poison message",
        means="a handler that sleeps, that raises",
        checks="credit bounds the sender, dead letter, FIFO goes on",
        wanted="3",
        pytest=(PROCESSES, "-k", "handler"),
    ),
    Row(
        key="F24",
        fault="host application: fork, blocked loop, cancelled awaits, SIGTERM while sending",
        means="in the node's own process",
        checks="no hang, no loss: I1-3, 6, 8-10",
        wanted="all",
        pytest=(PROCESSES, "-k", "careless"),
    ),
)


def measure(row: Row, *, times: int) -> dict[str, Any]:
    """Run one row's command to its end."""
    began = time.monotonic()
    done, made, result = _simulate(row, times) if row.simulate else _pytest(row, times)
    return {
        "result": result,
        "made": made,
        "duration_s": round(time.monotonic() - began, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "commit": describe_commit(),
        "machine": describe_machine(folder_on_a_disk()),
        "times": times,
        "said": "" if result == "passed" else done.stdout[-3_000:] + done.stderr[-1_000:],
    }


def _simulate(row: Row, times: int) -> tuple[subprocess.CompletedProcess[str], str, str]:
    arguments = [str(int(one) * times) if one.isdigit() else one for one in row.simulate]
    done = _run("-m", "tests.simulate", *arguments)
    found = re.search(r"(\d+) schedules in", done.stdout)
    return done, f"{int(found[1]):,} schedules" if found else "", _result(done.returncode)


def _pytest(row: Row, times: int) -> tuple[subprocess.CompletedProcess[str], str, str]:
    if not (ROOT / row.pytest[0]).exists():
        missing = subprocess.CompletedProcess([], 4, "", f"{row.pytest[0]} is not there")
        return missing, "", "not there"
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        common = ("-q", "-p", "no:cacheprovider", f"--junitxml={report.name}", "-o", "junit_family=xunit1")
        which = ("-m", "soak" if times > 1 else "not soak")
        done = _run("-m", "pytest", *common, *which, *row.pytest)
        if times > 1 and done.returncode == 5:  # no test of this row has a longer form
            done = _run("-m", "pytest", *common, "-m", "not soak", *row.pytest)
        tests, made, skipped = _count(Path(report.name))
    result = _result(done.returncode)
    if skipped:
        result = f"{result}, {skipped} skipped"
    return done, f"{made:,} in {tests} tests" if made else f"{tests} tests", result


def _count(report: Path) -> tuple[int, int, int]:
    """Tests that ran, faults they say that they made, and tests that were skipped."""
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except ElementTree.ParseError:
        return 0, 0, 0
    skipped = sum(case.find("skipped") is not None for case in cases)
    made = sum(
        int(one.get("value", "0"))
        for case in cases
        for one in case.iter("property")
        if one.get("name") == "faults"
    )
    return len(cases) - skipped, made, skipped


def _result(code: int) -> str:
    return "passed" if code == 0 else "FAILED"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=7_200, check=False
    )


# -- what is kept -------------------------------------------------------------------------------------------


def keep(key: str, result: dict[str, Any]) -> None:
    """Replace one result and write the table anew."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept[key] = {name: value for name, value in result.items() if name != "said"}
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table(kept))


def table(kept: dict[str, Any]) -> str:
    """The whole of MATRIX.md."""
    lines = [
        "# Faults, as last measured",
        "",
        "Written by `python -m tests.faults matrix --write` and `python -m tests.faults soak --write`; do not edit.",
        "The number of a fault stays when others come or go; `oracle.py` explains I1 to I10.",
        "",
        "| # | fault | means | checks | wanted | made | result | duration | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        one = kept.get(row.key)
        measured = (
            (one["made"], one["result"], f"{one['duration_s']:.0f} s", _when(one)) if one else ("",) * 4
        )
        lines.append(
            "| " + " | ".join((row.key, row.fault, row.means, row.checks, row.wanted, *measured)) + " |"
        )
    machines = sorted({_machine(one) for one in kept.values()})
    lines += ["", "Measured on: " + "; ".join(machines) + "."]
    if (soak := kept.get("soak")) is not None:
        lines += ["", "## The long run", "", *_soak_lines(soak)]
    return "\n".join(lines) + "\n"


def _soak_lines(soak: dict[str, Any]) -> list[str]:
    faults = ", ".join(f"{count} × {kind}" for kind, count in sorted(soak["faults"].items()))
    rss = [size >> 20 for size in soak["rss_by_time"]]
    return [
        f"`{soak['command']}` ({_when(soak)}): **{soak['messages']:,} acknowledged messages, {soak['violations']}"
        f" violations** in {soak['duration_s']} s through {soak['nodes']} nodes, each sending to each, under {faults}.",
        f"The outboxes were empty {soak['drain_s']} s after the last fault. The most that one node used:"
        f" {soak['peak']['rss_bytes'] >> 20} MiB of memory, {soak['peak']['wal_bytes'] / (1 << 20):.1f} MiB of"
        f" write-ahead log, {soak['peak']['descriptors']} descriptors. The largest memory of a node over time, in MiB:"
        f" {', '.join(map(str, rss[:: max(1, len(rss) // 12)]))}.",
    ]


def _when(one: dict[str, Any]) -> str:
    return f"{one['date'][:10]}, {one['commit']}"


def _machine(one: dict[str, Any]) -> str:
    machine = one["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['disk']}"


def run(keys: Sequence[str], *, times: int, write: bool, say: Callable[[str], None]) -> bool:
    """Measure these rows (all, when none is named). Returns whether all passed."""
    chosen = [row for row in ROWS if not keys or row.key in keys or row.key.split()[0] in keys]
    has_passed = True
    for row in chosen:
        result = measure(row, times=times)
        say(
            f"{row.key:12} {result['result']:18} {result['made']:22} {result['duration_s']:7.1f} s  {row.fault}"
        )
        if result["result"] != "passed":
            has_passed = False
            say(result["said"])
        if write:
            keep(row.key, result)
    return has_passed
