"""The command line: measure, print the table, keep it in RESULTS.md."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import measures, report
from benchmarks.first_byte import measure_first_byte
from benchmarks.floor import floor
from benchmarks.processes import Server
from benchmarks.product import product

_RESULTS = Path(__file__).with_name("RESULTS.md")


def _sync(bare: Server, whole: Server, effort: measures.Effort) -> list[report.Section]:
    return [report.sync_section(measures.measure_sync(bare, whole, effort))]


def _follower(_: Server, whole: Server, effort: measures.Effort) -> list[report.Section]:
    return [report.follower_section(measures.measure_follower(whole, effort))]


def _idle(_: Server, whole: Server, effort: measures.Effort) -> list[report.Section]:
    return [report.idle_section(measures.measure_idle(whole, effort))]


def _first_byte(bare: Server, whole: Server, effort: measures.Effort) -> list[report.Section]:
    medians = measure_first_byte(bare, whole, effort.first_bytes)
    return [report.first_byte_section(medians.grpc_ms, medians.sse_ms)]


def _flat_runs(_: Server, __: Server, effort: measures.Effort) -> list[report.Section]:
    return [report.stored_runs_section(measures.measure_stored_runs(effort))]


def _flat_events(_: Server, whole: Server, effort: measures.Effort) -> list[report.Section]:
    return [report.event_cost_section(measures.measure_event_cost(whole, effort))]


_Measure = Callable[[Server, Server, measures.Effort], list[report.Section]]
_BENCHMARKS: dict[str, tuple[_Measure, ...]] = {
    "sync": (_sync,),
    "follower": (_follower,),
    "idle": (_idle,),
    "first-byte": (_first_byte,),
    "flat": (_flat_events, _flat_runs),
}


def main() -> int:
    """Run what was asked for; 1 when something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*_BENCHMARKS, "all"])
    parser.add_argument("--quick", action="store_true", help="small and inexact, to see that all of it works")
    parser.add_argument("--full", action="store_true", help="flat: up to 10^6 stored runs")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of floor and product in turns")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="write the report here (default: RESULTS.md for all, unless quick)",
    )
    options = parser.parse_args()
    effort = measures.QUICK if options.quick else measures.THOROUGH
    if options.full:
        effort = replace(effort, stored_runs=(*effort.stored_runs, 1_000_000))
    if options.rounds:
        effort = replace(effort, rounds=options.rounds)

    names = list(_BENCHMARKS) if options.benchmark == "all" else [options.benchmark]
    sections: list[report.Section] = []
    failed = False
    for name in names:
        for measure in _BENCHMARKS[name]:
            title = measure.__name__.strip("_").replace("_", " ")
            print(f"measuring: {title} …", file=sys.stderr, flush=True)
            try:
                sections += _measured(measure, effort)
            except (OSError, RuntimeError) as error:
                print(f"{title}: {error}", file=sys.stderr)
                sections.append(report.failed_section(title, error))
                failed = True
    arguments = " ".join(argument for argument in sys.argv[1:] if "/" not in argument)
    document = report.report(sections, arguments)
    print(document)
    output = options.output or (_RESULTS if options.benchmark == "all" and not options.quick else None)
    if output:
        output.write_text(document)
    return int(failed)


def _measured(measure: _Measure, effort: measures.Effort) -> list[report.Section]:
    """One measurement with servers and a store of its own, so that none inherits what another left behind."""
    with tempfile.TemporaryDirectory(prefix="acp-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        bare = stack.enter_context(floor(directory))
        whole = stack.enter_context(product(directory))
        return measure(bare, whole, effort)


if __name__ == "__main__":
    sys.exit(main())
