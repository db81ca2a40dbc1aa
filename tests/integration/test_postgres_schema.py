"""Preparing a PostgreSQL database: what is applied, and what a store says of a database that it cannot use."""

import asyncio
import traceback

import pytest

from runtime_service.errors import StoreUnavailable
from runtime_service.runs import Question, RunStatus
from runtime_service.store import postgres_schema
from runtime_service.store.base import Outcome
from runtime_service.store.postgres import PostgresStore
from runtime_service.store.postgres_schema import migrate
from tests.postgres import empty_database, session_server
from tests.stores import PostgresStores
from tests.support import (
    OPTIONS,
    ORGANIZATION,
    SERVER,
    answer_to,
    key_of,
    new_run,
    question,
    run_async,
    running,
    said,
)

COMPLETED = Outcome(RunStatus.COMPLETED, "done")

MIGRATIONS = [
    "0001_tables",
    "0002_turns",
    "0003_other_writes",
    "0004_deletions",
    "0005_apply",
    "0006_question_of_runs",
    "0007_questions",
]


def open_store(url: str) -> PostgresStore:
    """Open and close a store."""

    async def main() -> PostgresStore:
        store = await PostgresStore.open(url, address="127.0.0.1:1")
        await store.close()
        return store

    return run_async(main())


def test_migrate_prepares_an_empty_database_once() -> None:
    """The second time there is nothing to do, and everything made is in a schema of its own."""
    database = empty_database()
    url = session_server().url(database)
    assert run_async(migrate(url)) == MIGRATIONS
    assert run_async(migrate(url)) == []
    rows = session_server().execute("SELECT version, name FROM acp.migrations ORDER BY version", database)
    assert rows.splitlines() == [f"{number}|{name}" for number, name in enumerate(MIGRATIONS, 1)]
    made = "SELECT DISTINCT relnamespace::regnamespace FROM pg_class WHERE oid >= 16384 AND relkind IN ('r', 'v', 'S')"
    assert session_server().execute(made, database) == "acp"
    open_store(url)


def test_migrate_is_done_once_by_two_at_once() -> None:
    """One applies what the other waits for."""
    url = session_server().url(empty_database())

    async def main() -> list[list[str]]:
        return await asyncio.gather(*(migrate(url) for _ in range(4)))

    done = run_async(main())
    assert sorted(name for names in done for name in names) == MIGRATIONS


def test_migrate_keeps_what_the_database_holds() -> None:
    """Also when the last step has to be made again: it is applied whole or not at all."""
    stores = PostgresStores()
    new = new_run()

    async def start() -> None:
        async with stores.open() as store:
            await store.start_run(new, claim=False)

    run_async(start())
    stores.execute("DELETE FROM acp.migrations WHERE version >= 6")
    with pytest.raises(StoreUnavailable, match="already exists"):
        run_async(migrate(stores.url))
    assert stores.execute("SELECT max(version) FROM acp.migrations") == "5"
    assert stores.execute("SELECT id FROM acp.runs") == new.id


def test_migrate_to_questions_leaves_those_at_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What version 5 holds is there; a turn that runs meanwhile goes on over the same session, and can ask."""
    url = session_server().url(empty_database())

    async def main() -> None:
        with monkeypatch.context() as before:
            before.setattr(postgres_schema, "_MIGRATIONS", postgres_schema._MIGRATIONS[:5])
            before.setattr(postgres_schema, "_KNOWN_VERSION", 5)
            assert await migrate(url) == MIGRATIONS[:5]
            store = await PostgresStore.open(url, address="127.0.0.1:1")
        try:
            run, done = await running(store), await running(store)
            for _ in range(6):  # until the session keeps its plans
                await store.append_events(key_of(run), said("before"))
            await store.finish_turn(key_of(done), said("end"), COMPLETED)
            assert await migrate(url) == MIGRATIONS[5:]
            assert (await store.append_events(key_of(run), said("behind"))).run.last_sequence == 8
            assert (await store.get_run(ORGANIZATION, SERVER, done.id)).turn.output == "done"
            asked = (await store.ask_question(key_of(run), [question()], OPTIONS)).run
            assert asked.question == Question(9, options=OPTIONS)
            assert (await store.append_events(key_of(run), said("meanwhile"))).run.question == asked.question
            await store.answer_question(answer_to(asked))
            finished = await store.finish_turn(key_of(run), said("end"), COMPLETED)
            assert await store.get_run(ORGANIZATION, SERVER, run.id) == finished.run
        finally:
            await store.close()

    run_async(main())


@pytest.mark.parametrize("how", ["empty", "older", "newer"])
def test_store_refuses_another_schema_and_says_what_to_do(how: str) -> None:
    """At the opening, and without touching anything."""
    if how == "empty":
        url, words = session_server().url(empty_database()), "holds no runs yet.*python -m runtime_service migrate"
    else:
        stores = PostgresStores()
        url = stores.url
        if how == "older":
            stores.execute("DELETE FROM acp.migrations WHERE version >= 6")
            words = "schema version 5; this program needs version 7.*python -m runtime_service migrate"
        else:
            stores.execute("INSERT INTO acp.migrations (version, name) VALUES (9, '0009_later')")
            words = "schema version 9; this program knows version 7.*another database"
    with pytest.raises(StoreUnavailable, match=words):
        open_store(url)
    if how == "newer":
        with pytest.raises(StoreUnavailable, match=words):
            run_async(migrate(url))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://somebody:hunter2@127.0.0.1:1/nowhere",  # nobody listens
        "postgresql://somebody:hunter2@{server}/nowhere",  # no such role
        "postgresql://somebody:hunter2@{server}:x/nowhere",  # no port
        "mysql://somebody:hunter2@127.0.0.1/nowhere",
        "postgresql://somebody:of?/@hunter2@127.0.0.1:1/nowhere",
        "postgresql:somebody:hunter2@127.0.0.1:1/nowhere",
        "hunter2",
    ],
)
def test_database_that_is_not_there_is_store_unavailable(url: str) -> None:
    """The message names the place, and never the password."""
    url = url.format(server=session_server().url().rpartition("@")[2].partition("/")[0])
    for attempt in (migrate(url), PostgresStore.open(url, address="127.0.0.1:1")):
        with pytest.raises(StoreUnavailable, match=r"PostgreSQL at .* cannot be used") as caught:
            run_async(attempt)
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
