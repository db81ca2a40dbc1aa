"""Several stores over one PostgreSQL database, as of several processes: leases, fencing, races, notifications."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from runtime_service.errors import StoreUnavailable
from runtime_service.runs import RunStatus
from runtime_service.store import postgres_listener, postgres_writes
from runtime_service.store.base import ATTEMPT_BEGINS, Change, Outcome, TurnLost
from runtime_service.store.postgres import PostgresStore
from tests.postgres import session_server
from tests.stores import PostgresStores
from tests.support import (
    ALL,
    LIMIT_SECONDS,
    ORGANIZATION,
    SERVER,
    cancel_of,
    contents,
    eventually,
    key_of,
    log_of,
    new_run,
    next_turn,
    run_async,
    running,
    said,
)

COMPLETED = Outcome(RunStatus.COMPLETED, "done")
ADDRESSES = ("127.0.0.1:1001", "127.0.0.1:1002", "127.0.0.1:1003", "127.0.0.1:1004")
# The rows that a run consists of; the last column of a row says which version of it this is.
ROWS = """
SELECT md5(string_agg(t, ';' ORDER BY t)) FROM (
    SELECT r.*::text || r.xmin AS t FROM acp.runs r UNION ALL SELECT t.*::text || t.xmin FROM acp.turns t
    UNION ALL SELECT e.*::text || e.xmin FROM acp.events e UNION ALL SELECT q.*::text || q.xmin FROM acp.requests q
) AS all_rows
"""


class Heard:
    """A StoreListener that remembers what it was told."""

    def __init__(self, store: PostgresStore) -> None:
        self.runs: list[str] = []
        self.polls = 0
        self.waits = 0
        self.losses = 0
        store.listen(self)

    def runs_changed(self, run_ids: Sequence[str]) -> None:
        """Remember which."""
        self.runs += run_ids
        self.polls += not run_ids

    def turns_wait(self) -> None:
        """Remember that."""
        self.waits += 1

    def held_lost(self) -> None:
        """Remember that."""
        self.losses += 1


@pytest.fixture
def stores() -> PostgresStores:
    """A database."""
    return PostgresStores()


@asynccontextmanager
async def replicas(stores: PostgresStores, count: int = 2) -> AsyncIterator[list[PostgresStore]]:
    """Stores over one database, each with an address of its own."""
    opened: list[PostgresStore] = []
    try:
        for address in ADDRESSES[:count]:
            opened.append(await stores.connect(address=address))  # noqa: PERF401 - closed also when one fails
        yield opened
    finally:
        for store in opened:
            await store.close()


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Return once `fact()` holds; fails after the limit."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while not await fact():  # noqa: ASYNC110 - another process's doing, told by nobody
            await asyncio.sleep(0.01)


def expire(stores: PostgresStores, address: str) -> None:
    """Let the lease of a replica run out."""
    stores.execute(f"UPDATE acp.replicas SET lease = '0', lease_until = '-infinity' WHERE address = '{address}'")


def cut(stores: PostgresStores, query: str) -> None:
    """End the sessions whose last query is like this."""
    stores.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '{query}'"
    )


# Leases


def test_turn_is_held_by_the_replica_that_claimed_it(stores: PostgresStores) -> None:
    """Others see where it is executed, whichever turn is shown; its holder does not, and nobody once it is over."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            run = await running(one)
            for store, holder in ((one, None), (other, ADDRESSES[0])):
                assert (await store.get_run(ORGANIZATION, SERVER, run.id)).holder == holder
                page = await store.list_runs(ORGANIZATION, SERVER, status=RunStatus.RUNNING, token=None, limit=ALL)
                assert [each.holder for each in page.runs] == [holder]
            queued = (await other.continue_run(next_turn(run), claim=True)).run
            assert (queued.status, queued.holder) == (RunStatus.QUEUED, ADDRESSES[0])
            for write in (
                other.append_events(key_of(run), said("x")),
                other.finish_turn(key_of(run), said("x"), COMPLETED),
                other.release_turn(key_of(run), said("x")),
            ):
                with pytest.raises(TurnLost):
                    await write
            await other.save_draft(key_of(run), "x")
            await one.finish_turn(key_of(run), said("mine"), COMPLETED)
            assert (await other.get_run(ORGANIZATION, SERVER, run.id, 1)).holder is None
            assert contents(await log_of(other, run.id)) == ["hello", "more", "mine"]

    run_async(main())


def test_recover_takes_only_what_nobody_holds(stores: PostgresStores) -> None:
    """Neither one's own turns nor a living replica's, and those of one that left at once."""

    async def main() -> None:
        async with replicas(stores, 3) as (one, other, leaving):
            kept = [await running(store) for store in (one, other)]
            left = await running(leaving)
            await leaving.save_draft(key_of(left), "half")
            assert await one.recover(3, lambda _: True) == []
            await leaving.close()
            changes = await asyncio.gather(*(store.recover(3, lambda _: True) for store in (one, other)))
            (change,) = changes[0] + changes[1]
            assert (change.run.id, change.run.status, contents(change.events)) == (left.id, RunStatus.QUEUED, ["half"])
            for run, store in zip(kept, (one, other), strict=True):
                await store.append_events(key_of(run), said("goes on"))

    run_async(main())


@pytest.mark.parametrize("taken", ["epoch = epoch + 2", "holder = 'another'"])
def test_turn_that_was_taken_is_not_written_to(stores: PostgresStores, taken: str) -> None:
    """The database itself compares holder and epoch, whatever a replica takes for its own."""

    async def main() -> None:
        async with replicas(stores) as (one, _):
            run = await running(one)
            released = await running(one)
            stores.execute(f"UPDATE acp.turns SET {taken}")
            before = stores.execute(ROWS)
            await one.save_draft(key_of(run), "late")
            for late in (
                one.append_events(key_of(run), said("late")),
                one.finish_turn(key_of(run), said("late"), COMPLETED),
                one.release_turn(key_of(released), said("late")),
            ):
                with pytest.raises(TurnLost):
                    await late
            assert stores.execute(ROWS) == before

    run_async(main())


def test_orphan_that_was_claimed_meanwhile_is_left_alone(stores: PostgresStores) -> None:
    """Of two that find it, the second comes when a third executes it: he keeps it."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            leaving = await stores.connect(address=ADDRESSES[2])
            found = await running(leaving)
            await leaving.close()
            await one.recover(3, lambda _: True)
            (claimed,) = await one.claim_turns(1)
            before = stores.execute(ROWS)
            for settle in (postgres_writes.requeue_orphan, postgres_writes.fail_orphan):
                assert await other._writer.submit(settle(found)) is None
            assert stores.execute(ROWS) == before
            await one.finish_turn(key_of(claimed.run), said("mine"), COMPLETED)

    run_async(main())


@pytest.mark.parametrize("swept", [False, True])
def test_replica_whose_lease_ran_out_writes_nothing(stores: PostgresStores, swept: bool) -> None:
    """Whether or not another one has seen it: not a row changes, it is told so, and goes on under another name."""

    async def main() -> None:
        async with replicas(stores) as (paused, other):
            heard = Heard(paused)
            runs = [await running(paused, str(n)) for n in range(4)]
            await paused.save_draft(key_of(runs[0]), "half")
            expire(stores, ADDRESSES[0])
            if swept:
                changes = await other.recover(3, lambda _: True)
                assert {change.run.id for change in changes} == {run.id for run in runs}
                claimed = await other.claim_turns(2)
            before = stores.execute(ROWS)
            late: list[Awaitable[object]] = [
                paused.append_events(key_of(runs[0]), said("late")),
                paused.save_draft(key_of(runs[0]), "late"),
                paused.finish_turn(key_of(runs[1]), said("late"), COMPLETED),
                paused.release_turn(key_of(runs[2]), said("late")),
                paused.append_events(key_of(runs[3]), []),
            ]
            results = await asyncio.gather(*late, return_exceptions=True)
            assert [type(result) for result in results] == [TurnLost, type(None), TurnLost, TurnLost, TurnLost]
            assert stores.execute(ROWS) == before
            assert heard.losses == 1
            # The rest is lost, too, without being asked for.
            if swept:
                assert [change.run.turn.epoch for change in claimed] == [3, 3]
                await other.finish_turn(key_of(claimed[0].run), said("ours"), COMPLETED)
            else:
                assert len(await other.recover(3, lambda _: True)) == 4
            mine = await running(paused, "new")
            await paused.finish_turn(key_of(mine), said("end"), COMPLETED)
            assert (await other.get_run(ORGANIZATION, SERVER, mine.id)).status is RunStatus.COMPLETED
            assert heard.losses == 1

    run_async(main())


def test_replica_whose_lease_ran_out_accepts_under_another_name(stores: PostgresStores) -> None:
    """What it is asked for at that moment is done, with all that comes behind it in the same batch."""

    async def main() -> None:
        async with replicas(stores) as (paused, other):
            run = await running(paused)
            waiting = (await paused.start_run(new_run("waits"), claim=False)).run
            expire(stores, ADDRESSES[0])
            new = new_run("new", request_id="once")
            started, resumed, claimed, cancelled = await asyncio.gather(
                paused.start_run(new, claim=True),
                paused.continue_run(next_turn(run, "next"), claim=True),
                paused.claim_turns(10),
                paused.cancel_run(cancel_of(run), said("x"), "x"),
            )
            assert (started.replayed, started.run.status) == (False, RunStatus.RUNNING)
            assert (resumed.run.turn.number, resumed.run.status) == (2, RunStatus.QUEUED)
            assert [change.run.id for change in claimed] == [waiting.id]
            assert cancelled.run.status is RunStatus.CANCELLED
            await paused.finish_turn(key_of(started.run), [], COMPLETED)
            await paused.finish_turn(key_of(claimed[0].run), [], COMPLETED)
            assert (await other.start_run(new, claim=True)).replayed
            assert stores.execute("SELECT count(*) FROM acp.replicas") == "2"

    run_async(main())


def test_lease_is_renewed_by_writes_and_by_asking(stores: PostgresStores) -> None:
    """By the clock of the database; without either it runs out."""

    async def main() -> None:
        until_when = "SELECT lease_until FROM acp.replicas"
        async with stores.open() as opened:
            assert isinstance(opened, PostgresStore)
            times = [stores.execute(until_when)]
            await opened.renew()
            times.append(stores.execute(until_when))
            run = await running(opened)
            times.append(stores.execute(until_when))
            await opened.append_events(key_of(run), [])
            times.append(stores.execute(until_when))
            assert sorted(set(times)) == times
            assert stores.execute("SELECT lease_until > now() + '29 s' FROM acp.replicas") == "t"
        short = await stores.connect(lease_seconds=0.05)
        heard = Heard(short)
        run = await running(short)
        held = "SELECT acp.is_held(lease_until, lease) FROM acp.replicas"
        await eventually(lambda: stores.execute(held) == "f")
        with pytest.raises(TurnLost):
            await short.append_events(key_of(run), said("late"))
        assert heard.losses == 1
        await short.close()
        assert stores.execute("SELECT count(*) FROM acp.replicas") == "0"

    run_async(main())


def test_lease_counts_from_the_start_of_the_server(stores: PostgresStores) -> None:
    """While the database was away nobody could renew, and nobody loses by it."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            run = await running(one)
            stores.execute("UPDATE acp.replicas SET lease = '100 days', lease_until = '-infinity'")
            assert await other.recover(3, lambda _: True) == []
            await one.append_events(key_of(run), said("goes on"))

    run_async(main())


def test_renewing_finds_turns_that_were_taken_away(stores: PostgresStores) -> None:
    """Also where nobody heard of it; those that are held, or over, are none of them."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            taken, kept, over = [await running(one, str(n)) for n in range(3)]
            await one.finish_turn(key_of(over), [], COMPLETED)
            heard = Heard(one)
            await other.cancel_run(cancel_of(taken), [], None)
            await eventually(lambda: heard.runs == [taken.id])
            await one.renew()
            assert heard.runs == [taken.id, taken.id]
            await one.renew()
            assert heard.runs == [taken.id, taken.id]
            await one.append_events(key_of(kept), said("goes on"))

    run_async(main())


# Races


def test_queued_turns_are_claimed_once(stores: PostgresStores) -> None:
    """By four replicas at once, a few at a time, while more are accepted and others end."""

    async def main() -> None:
        async with replicas(stores, 4) as four:
            claimed: Counter[tuple[str, int, int]] = Counter()
            choice = random.Random(1)
            count = 600

            async def accept(store: PostgresStore) -> None:
                for n in range(count // 4):
                    await store.start_run(new_run(str(n)), claim=False)

            async def execute(store: PostgresStore) -> None:
                while claimed.total() < count:
                    changes = await store.claim_turns(choice.choice((1, 1, 7)))
                    claimed.update(key_of(change.run) for change in changes)
                    for change in changes:
                        await store.finish_turn(key_of(change.run), said("x"), COMPLETED)

            await asyncio.gather(*(accept(store) for store in four), *(execute(store) for store in four))
            assert set(claimed.values()) == {1}
            assert {epoch for _, _, epoch in claimed} == {1}
            assert len(claimed) == count
            assert stores.execute("SELECT count(*) FROM acp.turns WHERE status <> 'completed'") == "0"

    run_async(main())


@pytest.mark.parametrize("how", ["start", "continue", "cancel"])
def test_one_of_many_same_requests_is_done(stores: PostgresStores, how: str) -> None:
    """Wherever they arrive: the rest is answered as it, or refused where they ask for something else."""

    async def main() -> None:
        async with replicas(stores, 3) as three:
            run = await running(three[0])
            for n in range(20):
                request_id = str(n)
                asked: list[Awaitable[Change]] = []
                for store in three * 5:
                    match how:
                        case "start":
                            asked.append(store.start_run(new_run("same", request_id=request_id), claim=True))
                        case "continue":
                            asked.append(store.continue_run(next_turn(run, request_id=request_id), claim=False))
                        case "cancel":
                            asked.append(store.cancel_run(cancel_of(run, request_id=request_id), [], None))
                changes = await asyncio.gather(*asked)
                assert sum(not change.replayed for change in changes) == 1
                assert len({(change.run.id, change.run.turn.number) for change in changes}) == 1
            assert stores.execute("SELECT count(*) FROM acp.requests") == "20"
            expected = {"start": "21|1", "continue": "1|21", "cancel": "1|1"}[how]
            assert stores.execute("SELECT count(*), max(last_turn) FROM acp.runs") == expected

    run_async(main())


def test_writes_of_the_same_runs_never_wait_in_a_circle(stores: PostgresStores) -> None:
    """Many replicas write to the same runs in any order, with requests; none is refused, and no log has a gap."""

    async def main() -> None:
        async with replicas(stores, 4) as four:
            runs = [await running(four[n % 4], str(n)) for n in range(12)]

            async def write(n: int, store: PostgresStore) -> None:
                for turn in range(15):
                    mine = runs[n::4]
                    order = runs[turn % 12 :] + runs[: turn % 12]
                    await asyncio.gather(
                        *(store.append_events(key_of(run), said("x")) for run in mine),
                        *(
                            store.continue_run(next_turn(run, request_id=f"{run.id}-{turn}"), claim=False)
                            for run in (order if n % 2 else order[::-1])
                        ),
                    )

            await asyncio.gather(*(write(n, store) for n, store in enumerate(four)))
            for run in runs:
                assert len(await log_of(four[0], run.id)) == 1 + 15 + 15
            assert "deadlock detected" not in session_server().log

    run_async(main())


def test_same_requests_never_wait_in_a_circle(stores: PostgresStores) -> None:
    """Many of them come to several replicas in any order, each many in a batch."""

    async def main() -> None:
        async with replicas(stores, 3) as three:
            for round_ in range(4):
                names = [f"{round_}-{n}" for n in range(300)]
                asked: list[Awaitable[Change]] = []
                for n, store in enumerate(three):
                    random.Random(n).shuffle(names)
                    asked += [store.start_run(new_run("same", request_id=name), claim=True) for name in names]
                changes = await asyncio.gather(*asked)
                assert sum(not change.replayed for change in changes) == 300
            assert stores.execute("SELECT count(*) FROM acp.runs") == "1200"
            assert "deadlock detected" not in session_server().log

    run_async(main())


def test_cancel_and_completion_race_to_one_outcome(stores: PostgresStores) -> None:
    """Each answer tells the one that is stored."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            outcomes: Counter[RunStatus] = Counter()
            for n in range(60):
                run = await running(one)
                if n % 2:
                    finish = asyncio.ensure_future(one.finish_turn(key_of(run), said("end"), COMPLETED))
                    cancelled = await other.cancel_run(cancel_of(run), [], None)
                else:
                    cancelling = asyncio.ensure_future(other.cancel_run(cancel_of(run), [], None))
                    await asyncio.sleep(0)
                    finish = asyncio.ensure_future(one.finish_turn(key_of(run), said("end"), COMPLETED))
                    cancelled = await cancelling
                (finished,) = await asyncio.gather(finish, return_exceptions=True)
                stored = await one.get_run(ORGANIZATION, SERVER, run.id)
                assert cancelled.run.turn == stored.turn
                if stored.status is RunStatus.CANCELLED:
                    assert isinstance(finished, TurnLost)
                else:
                    assert isinstance(finished, Change)
                    assert finished.run.turn == stored.turn
                outcomes[stored.status] += 1
            assert set(outcomes) <= {RunStatus.CANCELLED, RunStatus.COMPLETED}
            assert outcomes.total() == 60

    run_async(main())


# Notifications


def test_others_hear_what_they_cannot_learn_otherwise(stores: PostgresStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that anybody but their holder writes to, and of turns that wait; not of what the holder tells itself."""
    monkeypatch.setattr(postgres_listener, "_POLL_SECONDS", 10 * LIMIT_SECONDS)  # what is heard is not what is polled

    async def main() -> None:
        async with replicas(stores) as (one, other):
            heard, own = Heard(other), Heard(one)
            await eventually(lambda: not other._others.is_deaf)
            polls = heard.waits

            run = await running(one)
            await one.append_events(key_of(run), said("a"))
            queued = (await one.continue_run(next_turn(run), claim=True)).run
            await eventually(lambda: heard.runs == [run.id])
            assert heard.waits == polls
            await one.finish_turn(key_of(run), said("b"), COMPLETED)
            await eventually(lambda: heard.waits > polls)
            (claimed,) = await one.claim_turns(1)
            assert key_of(claimed.run) == (run.id, queued.turn.number, 1)
            await eventually(lambda: heard.runs == [run.id] * 2)
            waits = heard.waits
            await one.release_turn(key_of(claimed.run), [])
            await eventually(lambda: heard.runs == [run.id] * 3 and heard.waits > waits)
            await one.cancel_run(cancel_of(run), [], None)
            await eventually(lambda: heard.runs == [run.id] * 4)
            # What changes nothing is not worth a word: it would come before this one.
            asked = next_turn(run, request_id="once")
            await one.cancel_run(cancel_of(run), [], None)
            await one.recover(3, lambda _: True)
            await one.continue_run(asked, claim=True)
            await eventually(lambda: heard.runs == [run.id] * 5)
            await one.continue_run(asked, claim=True)
            waits = heard.waits
            await one.start_run(new_run(), claim=False)
            await eventually(lambda: heard.waits > waits)
            assert heard.runs == [run.id] * 5
            done = await running(one)
            await one.finish_turn(key_of(done), [], COMPLETED)
            waits = heard.waits
            await one.continue_run(next_turn(done), claim=False)
            await eventually(lambda: heard.waits > waits)
            assert own.runs == []

    run_async(main())


def test_others_hear_of_turns_that_nobody_holds(stores: PostgresStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is queued again, and of one that waited behind one that failed."""
    monkeypatch.setattr(postgres_listener, "_POLL_SECONDS", 10 * LIMIT_SECONDS)  # what is heard is not what is polled

    async def main() -> None:
        async with replicas(stores) as (one, other):
            heard = Heard(other)
            await eventually(lambda: not other._others.is_deaf)

            async def recovered(attempts: int) -> None:
                leaving = await stores.connect(address=ADDRESSES[2])
                run = await running(leaving)
                if attempts == 1:
                    await leaving.continue_run(next_turn(run), claim=False)
                await leaving.close()
                waits = heard.waits
                assert len(await one.recover(attempts, lambda _: True)) == 1
                await eventually(lambda: run.id in heard.runs and heard.waits > waits)

            await recovered(attempts=3)
            await recovered(attempts=1)

    run_async(main())


def test_many_runs_are_told_by_one_word(stores: PostgresStores) -> None:
    """A notification has no room for the names of all of them."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            heard = Heard(other)
            await eventually(lambda: not other._others.is_deaf and heard.polls == 1)
            await asyncio.gather(*(one.start_run(new_run(), claim=False) for _ in range(400)))
            assert len(await one.claim_turns(400)) == 400
            await eventually(lambda: heard.polls == 2)
            assert heard.runs == []

    run_async(main())


def test_lost_notifications_are_made_up_for(stores: PostgresStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the connection is cut, and where nothing is heard at all, it is asked now and then."""
    monkeypatch.setattr(postgres_listener, "_DEAF_POLL_SECONDS", 0.02)
    monkeypatch.setattr(postgres_listener, "_HEAR_SECONDS", 0.02)
    monkeypatch.setattr(postgres_listener, "_RETRY_SECONDS", 0.02)

    async def main() -> None:
        async with replicas(stores) as (one, other):
            heard = Heard(other)
            await eventually(lambda: not other._others.is_deaf)
            polls, waits = heard.polls, heard.waits
            cut(stores, "SELECT EXISTS%")
            await eventually(lambda: heard.polls > polls)
            # Whoever shares the connection with others hears nothing of what was meant for it.
            monkeypatch.setattr(postgres_listener, "CHANNEL", "elsewhere")
            cut(stores, "SELECT EXISTS%")
            await eventually(lambda: other._others.is_deaf)
            await one.start_run(new_run(), claim=False)
            await eventually(lambda: heard.waits > waits)

    run_async(main())


def test_stores_behind_a_pooler_poll(stores: PostgresStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told in the URL that connections are shared asks in transactions, and for news instead of listening."""
    monkeypatch.setattr(postgres_listener, "_DEAF_POLL_SECONDS", 0.02)

    async def main() -> None:
        url = stores.url + "?pooler=transaction&application_name=behind"
        one = await PostgresStore.open(url, address=ADDRESSES[0])
        other = await PostgresStore.open(url, address=ADDRESSES[1])
        heard = Heard(other)
        run = await running(one)
        assert stores.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'") == "0"
        assert stores.execute("SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'behind'") == "t"
        with pytest.raises(TurnLost):
            await other.append_events(key_of(run), said("x"))
        with pytest.raises(StoreUnavailable):
            await one.continue_run(next_turn(run, "\0"), claim=True)
        await one.release_turn(key_of(run), said("a"))
        await eventually(lambda: heard.waits > 0 and heard.polls > 0)
        (claimed,) = await other.claim_turns(1)
        await other.finish_turn(key_of(claimed.run), said("b"), COMPLETED)
        assert contents(await log_of(one, run.id)) == ["hello", "a", ATTEMPT_BEGINS.format(attempt=1), "b"]
        for store in (one, other):
            await store.close()

    run_async(main())
