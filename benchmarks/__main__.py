"""The command line: measure, print the table, keep it in RESULTS.md."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import report
from benchmarks.effort import QUICK, THOROUGH, Effort
from benchmarks.fairness import measure_fairness
from benchmarks.first_byte import measure_first_byte
from benchmarks.flat import measure_event_cost, measure_stored_runs
from benchmarks.follower import measure_follower
from benchmarks.idle import measure_idle
from benchmarks.many_followers import measure_many_followers
from benchmarks.overload import measure_overload
from benchmarks.postgresql import measure_postgresql
from benchmarks.processes import open_many_files
from benchmarks.profile import measure_profile
from benchmarks.queue import measure_queue
from benchmarks.slow_followers import measure_slow_followers
from benchmarks.start import measure_start
from benchmarks.sync import measure_sync

_RESULTS = Path(__file__).with_name("RESULTS.md")

_Measure = Callable[[Path, Effort], report.Section]
_BENCHMARKS: dict[str, tuple[_Measure, ...]] = {
    "sync": (measure_sync,),
    "postgresql": (measure_postgresql,),
    "queue": (measure_queue,),
    "follower": (measure_follower,),
    "many-followers": (measure_many_followers,),
    "idle": (measure_idle,),
    "slow-followers": (measure_slow_followers,),
    "fairness": (measure_fairness,),
    "overload": (measure_overload,),
    "first-byte": (measure_first_byte,),
    "start": (measure_start,),
    "flat": (measure_event_cost, measure_stored_runs),
    "profile": (measure_profile,),
}
_NOT_IN_ALL = {"profile"}


def main() -> int:
    """Run what was asked for; 1 when something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*_BENCHMARKS, "all"])
    parser.add_argument("--quick", action="store_true", help="small and inexact, to see that all of it works")
    parser.add_argument("--full", action="store_true", help="flat: up to 10^6 stored runs")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of those that take turns")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="write the report here (default: RESULTS.md for all, unless quick)",
    )
    options = parser.parse_args()
    effort = QUICK if options.quick else THOROUGH
    if options.full:
        effort = replace(effort, stored_runs=(*effort.stored_runs, 1_000_000))
    if options.rounds:
        effort = replace(effort, rounds=options.rounds)

    open_many_files()
    names = [options.benchmark] if options.benchmark != "all" else [n for n in _BENCHMARKS if n not in _NOT_IN_ALL]
    sections: list[report.Section] = []
    failed = False
    for name in names:
        for measure in _BENCHMARKS[name]:
            title = measure.__name__.removeprefix("measure_").replace("_", " ")
            print(f"measuring: {title} …", file=sys.stderr, flush=True)
            try:
                sections.append(_measured(measure, effort))
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


def _measured(measure: _Measure, effort: Effort) -> report.Section:
    """One measurement with servers and a store of its own, so that none inherits what another left behind."""
    with tempfile.TemporaryDirectory(prefix="acp-bench-") as name:
        return measure(Path(name), effort)


if __name__ == "__main__":
    sys.exit(main())
