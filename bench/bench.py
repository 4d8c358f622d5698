#!/usr/bin/env python3
"""Compares Postern with nginx, HAProxy and Envoy on this machine and prints one table.

Every subject gets one worker on one core and the same job. What counts is the CPU time of its process tree per
request, as a ratio to another subject in the same round; the rounds are interleaved and the first one is thrown
away. Absolute figures of a loopback on a shared machine say little; differences under 10 % are not resolved.
"""

import argparse
import os
import sys
import tempfile

from measure import Cores
from scenarios import NEED_POSTERN, SCENARIOS, Bench
from subjects import Certificates, Upstream

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def options():
    parser = argparse.ArgumentParser(description="Compare Postern with its peers.")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds that count (default 5)")
    parser.add_argument("--seconds", type=int, default=5, help="seconds of load per subject and round (default 5)")
    parser.add_argument("--only", default="", help=f"comma-separated scenarios: {','.join(SCENARIOS)}")
    parser.add_argument("--without", default="", help="comma-separated subjects to leave out: haproxy,envoy,postern")
    parser.add_argument("--routes", type=int, default=100_000, help="routes of the scenario `routes`")
    parser.add_argument("--postern", default=os.path.join(ROOT, "target/release/postern"))
    parser.add_argument("--load", default=os.path.join(ROOT, "target/release/examples/load"))
    parser.add_argument("--envoy", default=os.path.join(ROOT, ".cache/venv/bin/envoy"))
    chosen = parser.parse_args()
    chosen.only = [name for name in chosen.only.split(",") if name] or list(SCENARIOS)
    chosen.without = [name for name in chosen.without.split(",") if name]
    unknown = [name for name in chosen.only if name not in SCENARIOS]
    if unknown:
        parser.error(f"no such scenario: {', '.join(unknown)}")
    if "postern" in chosen.without:
        chosen.only = [name for name in chosen.only if name not in NEED_POSTERN]
    return chosen


def number(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(rows):
    lines = [("scenario", "figure", "median", "goal", "", "rounds")]
    for row in rows:
        goal = f"≤ {row.goal:g}{row.unit}" if row.goal is not None else ""
        rounds = " ".join(number(value) for value in row.values[:10])
        lines.append((row.scenario, row.figure, number(row.median) + row.unit, goal, row.verdict, rounds))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    lines.insert(1, tuple("-" * width for width in widths) + ("------",))
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0])).rstrip() for line in lines)


def main():
    chosen = options()
    cores = Cores()

    def say(text):
        print(text, file=sys.stderr, flush=True)

    rows = []
    with tempfile.TemporaryDirectory(prefix="postern-bench-") as folder:
        os.chmod(folder, 0o755)  # nginx's worker is another user
        certificates = Certificates(folder)
        upstream = Upstream(folder, cores.upstream)
        bench = Bench(chosen, cores, folder, upstream, certificates, say)
        try:
            for name in chosen.only:
                rows += SCENARIOS[name](bench)
        finally:
            for subject in [*bench.running.values(), upstream]:
                subject.stop()
    print(f"\n{cores}; {chosen.rounds} rounds of {chosen.seconds} s; CPU µs per request or handshake\n")
    print(table(rows))
    return 1 if any(row.verdict == "MISSED" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
