"""Percentiles, medians and spreads. Pure: numbers in, numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What one metric did over the rounds of a run."""

    median: float
    low: float
    high: float


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: always a value that was really measured."""
    ordered = sorted(samples)
    rank = max(1, -(-len(ordered) * percent // 100))  # ceiling division
    return ordered[int(rank) - 1]


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def latency(prefix: str, samples_ns: Sequence[int]) -> dict[str, float]:
    """One round's samples as the metrics `<prefix>.p50` and `<prefix>.p99`, in microseconds."""
    return {
        f"{prefix}.p50": percentile(samples_ns, 50) / 1000,
        f"{prefix}.p99": percentile(samples_ns, 99) / 1000,
    }
