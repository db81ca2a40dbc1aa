"""Runtime services that stand still for longer than their lease, and wake: what was theirs is another's by then."""

from pathlib import Path

from tests.acceptance.checker import check
from tests.acceptance.cluster import Node
from tests.acceptance.stage import QUICK, Figures, Stage, comes_true, prove, stage
from tests.acceptance.stored import read_turns

_LONGEST_SECONDS = 30.0


async def pause_replicas(folder: Path, seed: int, faults: int) -> Figures:
    """Stop one of two runtime services until nothing is its own any more, then let it go on."""
    async with stage(folder, seed, postgres=True, runtimes=2, settings=QUICK) as played:
        taken = 0

        async def pause() -> None:
            nonlocal taken
            for _ in range(faults):
                await played.pause(0.2, 1.0)
                taken += await _pause(played, played.random.choice(played.cluster.runtimes))
                # What it still had to say, it says now.
                await played.pause(0.2, 1.0)
                await played.sample()

        await played.under_load(pause, longest_seconds=2.0)
        await played.come_to_rest()
        late = sum(finding.rule == "fenced" for finding in check(played.history, played.rules))
        notes = f"{taken} turns taken away, {late} rows written by who had lost them"
        return played.figures("SIGSTOP beyond the lease, SIGCONT", faults, notes)


async def _pause(played: Stage, node: Node) -> int:
    """Stop a process until its turns are another's or have ended; return how many there were."""
    node.pause()
    try:
        held = {(each.run_id, each.turn, each.attempt) for each in played.cluster.begun() if each.pid == node.pid}
        running = {
            (turn.run_id, turn.number): turn.epoch
            for turn in await read_turns(played.select)
            if turn.shown.status == "running" and (turn.run_id, turn.number, turn.attempt) in held
        }

        async def taken() -> bool:
            return not any(
                turn.shown.status == "running" and running.get((turn.run_id, turn.number)) == turn.epoch
                for turn in await read_turns(played.select)
            )

        if not await comes_true(taken, _LONGEST_SECONDS):
            played.findings.append(f"{node.name} stood still, and what it held stayed its own")
        return len(running)
    finally:
        node.resume()


def test_paused_replica_writes_nothing_of_what_it_lost(tmp_path: Path) -> None:
    """The log holds no word of an attempt behind the beginning of the next."""
    prove(pause_replicas, tmp_path, faults=2)
