"""The scenarios in their long form, one after the other, and a table of what came of them.

`python -m tests.acceptance.soak [WORD …] [--seed N] [--share S]`: those whose name holds a word, or all; S of the
faults, such as 0.1. Exit code 1 when a promise was broken.
"""

import argparse
import asyncio
import secrets
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.acceptance.stage import Figures
from tests.acceptance.test_cancels import race_to_the_end
from tests.acceptance.test_claims import race_for_queue
from tests.acceptance.test_keys import repeat_in_parallel
from tests.acceptance.test_kills import (
    kill_gateways,
    kill_replicas,
    kill_replicas_by_default,
    kill_runtime_over_sqlite,
)
from tests.acceptance.test_outages import take_postgres_away
from tests.acceptance.test_pauses import pause_replicas
from tests.acceptance.test_restarts import restart_in_turn
from tests.acceptance.test_wires import spoil_wires, swallow_on_wires

_COLUMNS = "{:46} {:>6} {:>7} {:>5} {:>6} {:>8} {:>8}  {}"
_SHOWN_FINDINGS = 20


class Scenario(NamedTuple):
    """A scenario in its long form. `size` is the argument that says how long."""

    play: Callable[..., Coroutine[Any, Any, Figures]]
    size: str
    length: int
    others: Mapping[str, Any] = MappingProxyType({})


SCENARIOS = {
    "kill-replicas": Scenario(kill_replicas, "faults", 300),
    "kill-replicas-lease-30": Scenario(kill_replicas_by_default, "faults", 4),
    "kill-sqlite": Scenario(kill_runtime_over_sqlite, "faults", 100),
    "kill-gateways": Scenario(kill_gateways, "faults", 300),
    "pause": Scenario(pause_replicas, "faults", 50),
    "claims": Scenario(race_for_queue, "turns", 10_000),
    "keys-sqlite": Scenario(repeat_in_parallel, "keys", 100, {"repeats": 50, "postgres": False}),
    "keys-postgres": Scenario(repeat_in_parallel, "keys", 100, {"repeats": 50, "postgres": True}),
    "cancels-sqlite": Scenario(race_to_the_end, "races", 5_000, {"postgres": False}),
    "cancels-postgres": Scenario(race_to_the_end, "races", 5_000, {"postgres": True}),
    "restarts": Scenario(restart_in_turn, "rounds", 20),
    "outages": Scenario(take_postgres_away, "faults", 20),
    "wires": Scenario(spoil_wires, "faults", 100),
    "swallow": Scenario(swallow_on_wires, "faults", 5),
}


def main(arguments: Sequence[str]) -> int:
    """Play, print a line a scenario as it ends, then what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.soak")
    parser.add_argument("words", nargs="*", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--share", type=float, default=1.0)
    options = parser.parse_args(arguments)
    chosen = [name for name in SCENARIOS if not options.words or any(word in name for word in options.words)]
    if not chosen:
        parser.error(f"no scenario is called like {options.words}")
    print(f"seed {options.seed}\n")
    print(_COLUMNS.format("scenario", "faults", "runs", "lost", "stuck", "rescue s", "seconds", "notes"), flush=True)
    broken = False
    for name in chosen:
        play, size, length, others = SCENARIOS[name]
        with tempfile.TemporaryDirectory(prefix="acp-soak-") as folder:
            played = play(Path(folder), options.seed, **{size: max(1, round(length * options.share))}, **others)
            figures = asyncio.run(played)
        _print(figures)
        broken = broken or bool(figures.findings)
    return 1 if broken else 0


def _print(figures: Figures) -> None:
    seconds = (f"{figures.longest_rescue_seconds:.1f}", f"{figures.seconds:.0f}")
    counts = (figures.faults, figures.runs, figures.lost, figures.stuck)
    print(_COLUMNS.format(figures.scenario, *counts, *seconds, figures.notes), flush=True)
    for finding in figures.findings[:_SHOWN_FINDINGS]:
        print(f"    {finding}", flush=True)
    if len(figures.findings) > _SHOWN_FINDINGS:
        print(f"    … and {len(figures.findings) - _SHOWN_FINDINGS} more", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
