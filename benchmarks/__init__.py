"""Measurements beside their physical floor and beside other systems: `python -m benchmarks run`.

Rounds are interleaved and the result is the median of per-round ratios: this makes figures from a noisy
machine comparable, where two absolute times from two runs are not. The measured packages never import this.
"""
