"""Restarts in order, one process after the other, while clients work: none of them notices."""

from pathlib import Path

from tests.acceptance.stage import Figures, prove, stage


async def restart_in_turn(folder: Path, seed: int, rounds: int) -> Figures:
    """Stop each replica and each gateway by SIGTERM, and start it again, under load."""
    async with stage(
        folder,
        seed,
        postgres=True,
        runtimes=2,
        settings={"ACP_DRAIN_SECONDS": "0.5"},
        gateway_settings={"ACP_DRAIN_DELAY_SECONDS": "1", "ACP_DRAIN_SECONDS": "20"},
        drained=True,
    ) as played:

        async def restart() -> None:
            for _ in range(rounds):
                for node in played.cluster.nodes:
                    await played.pause(0.1, 0.5)
                    if (code := await node.end()) != 0:
                        played.findings.append(f"{node.name} ended with {code}")
                    await node.start()
            await played.pause(0.1, 0.5)

        await played.under_load(restart, longest_seconds=1.5)
        requests = played.history.requests
        failed = [each for each in requests if not each.refused and each.status not in (200, 201, 202)]
        played.findings.extend(f"failed: {each}" for each in failed)
        await played.come_to_rest()
        notes = f"{len(requests)} requests, {len(failed)} failed"
        return played.figures("rolling restart of 2 replicas, 2 gateways", 4 * rounds, notes)


def test_rolling_restart_fails_no_request(tmp_path: Path) -> None:
    """Nothing but refused connections, streams go on without a gap."""
    prove(restart_in_turn, tmp_path, rounds=1)
