"""Wall time of imports: fresh interpreters, start included, every program in turn.

The yardstick is `import opentelemetry.trace`, the one import that a traced loop cannot do without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from statistics import median
from time import perf_counter

import click

YARDSTICK = "import opentelemetry.trace"
LOOP = "from looplet import composable_loop, LoopConfig, DefaultState, tool, tools_from"
RUN = f"""{LOOP}, MockLLMBackend
list(composable_loop(MockLLMBackend(), tools=tools_from([], include_done=True)))"""
PROGRAMS = ("pass", "import looplet", YARDSTICK, LOOP, RUN)
MOST = {"import looplet": 1.3, LOOP: 2.0}
"""program → how many times the yardstick it may take"""


def seconds(program: str, bytecode: str) -> float:
    """Return the wall time of a fresh interpreter that runs `program`; `bytecode` is the folder of compiled files."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    return perf_counter() - began


def measure(runs: int) -> dict[str, list[float]]:
    """Return the seconds of each run of each program; the programs take turns, so that the machine's mood is shared."""
    times: dict[str, list[float]] = {program: [] for program in PROGRAMS}
    with tempfile.TemporaryDirectory() as bytecode:
        for program in PROGRAMS:  # once to compile, as an installed package is
            seconds(program, bytecode)
        for number in range(runs):
            print(f"\rround {number + 1}/{runs} ", end="", file=sys.stderr)
            for program in PROGRAMS:
                times[program].append(seconds(program, bytecode))
    print("\r" + " " * 20, end="\r", file=sys.stderr)
    return times


def report(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return for each program its median time, and the medians of its ratios within a round."""

    def ratio(program: str, to: str) -> float:
        return median(a / b for a, b in zip(times[program], times[to], strict=True))

    return {
        program: {
            "ms": median(times[program]) * 1000,
            "times_empty": ratio(program, "pass"),
            "times_opentelemetry": ratio(program, YARDSTICK),
        }
        for program in PROGRAMS
    }


def print_table(found: dict[str, dict[str, float]]) -> None:
    """Print the report for people."""
    print(f"{'ms':>7} {'x empty':>8} {'x otel':>7}  program")
    for program, row in found.items():
        target = f"  at most {MOST[program]:.1f}: {verdict(program, row)}" if program in MOST else ""
        name = "... and a run of one step" if program == RUN else program
        print(f"{row['ms']:7.1f} {row['times_empty']:8.2f} {row['times_opentelemetry']:7.2f}  {name}{target}")


def verdict(program: str, row: dict[str, float]) -> str:
    """Say whether the target is met."""
    return "ok" if row["times_opentelemetry"] <= MOST[program] else "MISSED"


@click.command(help=__doc__.splitlines()[0])
@click.option("--runs", default=15, show_default=True, type=click.IntRange(1), help="runs of each program")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def main(runs: int, as_json: bool) -> None:
    """Measure and print."""
    found = report(measure(runs))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_table(found)


if __name__ == "__main__":
    main()
