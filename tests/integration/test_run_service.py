"""RunService, the same through both doors: what runs, turns and their updates are to a caller."""

import asyncio
import re
from typing import Any

import grpc
import pytest

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service.runs import Run, RunStatus
from runtime_service.store.sqlite import SQLiteStore
from tests.integration.doors import (
    METADATA,
    SECRET,
    Client,
    Service,
    contents_of,
    continue_request,
    events_of,
    gate,
    reference,
    refusal,
    start_request,
    watch_request,
)

# StartRun and ContinueRun


def test_start_in_mode_sync_follows_to_the_end(service: Service) -> None:
    """The first update shows the accepted run, the last the outcome; every event comes once."""

    async def check(client: Client) -> None:
        request = start_request("hello world", title="A title", metadata_json=METADATA)
        updates = await client.updates("StartRun", request)
        run, thread = updates[-1].run, updates[-1].thread
        assert re.fullmatch(r"run_[0-9a-f]{32}", run.id)
        assert run.thread_id == thread.id == "thread_" + run.id[4:]
        assert (run.server_id, run.title, run.input, run.output) == ("echo", "A title", "hello world", "hello world")
        assert (run.status, run.mode, run.turn) == (pb.RUN_STATUS_COMPLETED, pb.RUN_MODE_SYNC, 1)
        assert (run.error, run.error_code, run.session_protocol) == ("", "", "in-process")
        assert (run.metadata_json, thread.metadata_json) == (METADATA, METADATA)
        assert (run.last_sequence, run.turn_first_sequence, thread.message_count) == (2, 1, 2)
        assert thread.status == pb.THREAD_STATUS_COMPLETED
        assert run.created_at_unix_ms <= run.completed_at_unix_ms <= thread.updated_at_unix_ms
        assert all(update.run.id == run.id for update in updates if update.HasField("run"))
        assert updates[0].HasField("run")
        user, assistant = events_of(updates)
        assert (user.sequence, user.role, user.content) == (1, pb.EVENT_ROLE_USER, "hello world")
        assert (assistant.sequence, assistant.role, assistant.turn) == (2, pb.EVENT_ROLE_ASSISTANT, 1)
        assert (user.metadata_json, assistant.metadata_json) == (METADATA, b"")
        assert [event.id for event in (user, assistant)] == [f"event_{run.id[4:]}_{n}" for n in (1, 2)]
        assert (await client.get(run)) == run

    service.run(check)


def test_start_in_mode_async_ends_with_the_accepted_run(service: Service) -> None:
    """One message, with the user's event; the run goes on by itself."""

    async def check(client: Client) -> None:
        request = start_request("hi", "gated", mode=pb.RUN_MODE_ASYNC, stream={"wait_ms": 3_600_000})
        (update,) = await client.updates("StartRun", request)
        assert update.run.status in (pb.RUN_STATUS_QUEUED, pb.RUN_STATUS_RUNNING)
        assert (update.run.mode, update.run.completed_at_unix_ms) == (pb.RUN_MODE_ASYNC, 0)
        assert [event.content for event in update.events] == ["hi"]
        gate[-1].set()
        updates = await client.watch(update.run, after_sequence=1)
        assert contents_of(updates) == ["one", "re: hi"]
        assert updates[-1].run.output == "re: hi"

    service.run(check)


def test_collect_sends_one_message(service: Service) -> None:
    """With the run as it is at the end and its turn's events; no deltas, although asked for."""

    async def check(client: Client) -> None:
        (update,) = await client.updates("StartRun", start_request(stream={"collect": True, "deltas": True}))
        assert update.run.status == pb.RUN_STATUS_COMPLETED
        assert [event.sequence for event in update.events] == [1, 2]
        request = continue_request(update.run, "again", stream={"collect": True})
        (update,) = await client.updates("ContinueRun", request)
        assert (update.run.turn, update.run.turn_first_sequence, update.run.last_sequence) == (2, 3, 4)
        assert [(event.sequence, event.turn) for event in update.events] == [(3, 2), (4, 2)]

    service.run(check)


def test_deltas_come_only_to_who_asks(service: Service) -> None:
    """They add up to the text of the event that takes their place."""

    async def check(client: Client) -> None:
        text = "Grüß Gott, \U0001f600 wie geht's"
        updates = await client.updates("StartRun", start_request(text, stream={"deltas": True}))
        streamed = ""
        for update in updates:
            if update.HasField("delta"):
                assert (update.delta.sequence, update.delta.offset) == (2, len(streamed))
                streamed += update.delta.text
        assert text.startswith(streamed)
        assert contents_of(updates) == [text, text]
        plain = await client.updates("StartRun", start_request(text))
        assert not any(update.HasField("delta") for update in plain)

        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        call = client.call("WatchRun", watch_request(run, after_sequence=2, stream={"deltas": True}))
        async for response in call:
            if response.update.HasField("delta"):
                assert response.update.delta == rpc.ContentDelta(sequence=3, offset=0, text="half")
                break
        call.cancel()

    service.run(check)


def test_wait_ms_ends_a_stream_and_not_the_run(service: Service) -> None:
    """Of a start, a continue and a watch; the last update shows the run as it is then."""

    async def check(client: Client) -> None:
        updates = await client.updates("StartRun", start_request("hi", "gated", stream={"wait_ms": 50}))
        run = updates[-1].run
        assert run.status == pb.RUN_STATUS_RUNNING
        assert contents_of(updates) == ["hi", "one"]
        (update,) = await client.updates("ContinueRun", continue_request(run, stream={"wait_ms": 50, "collect": True}))
        assert (update.run.status, update.run.turn) == (pb.RUN_STATUS_QUEUED, 2)
        updates = await client.watch(run, after_sequence=3, stream={"wait_ms": 50})
        assert updates[-1].run.status == pb.RUN_STATUS_QUEUED
        gate[-1].set()
        updates = await client.watch(run)
        assert contents_of(updates) == ["hi", "one", "more", "re: hi", "one", "re: more"]

    service.run(check)


def test_continue_opens_a_turn_also_of_a_running_run(service: Service) -> None:
    """It waits its turn; the sequence has no gap; without metadata it keeps the run's."""

    async def check(client: Client) -> None:
        run = await client.start("first", "gated", metadata_json=METADATA)
        await client.until_said(run, 2)
        following = asyncio.ensure_future(client.updates("ContinueRun", continue_request(run, "second")))
        await client.until_said(run, 3)
        assert (await client.get(run)).status == pb.RUN_STATUS_QUEUED
        own = continue_request(run, "third", mode=pb.RUN_MODE_ASYNC, metadata_json=b"{}")
        (accepted,) = await client.updates("ContinueRun", own)
        assert (accepted.run.turn, accepted.run.status) == (3, pb.RUN_STATUS_QUEUED)
        gate[-1].set()
        updates = await following
        last = updates[-1].run
        assert (last.turn, last.status, last.output) == (2, pb.RUN_STATUS_COMPLETED, "re: second")
        assert last.metadata_json == METADATA
        whole = events_of(await client.watch(run))
        assert [event.sequence for event in whole] == list(range(1, 10))
        assert [event.content for event in whole if event.turn == 2] == ["second", "one", "re: second"]
        assert [event.metadata_json for event in whole][:2] == [METADATA, b'{"tokens":3}']
        assert (await client.get(run)).metadata_json == b"{}"

    service.run(check)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("AgentError", "MODEL_AWAY", "The model is away; try again."),
        ("other", "AGENT_FAILED", "The agent raised RuntimeError"),
    ],
)
def test_agents_failure_is_no_error_of_the_call(service: Service, text: str, code: str, message: str) -> None:
    """The stream ends well with a failed run; no secret is in it."""

    async def check(client: Client) -> None:
        updates = await client.updates("StartRun", start_request(text, "failing"))
        run, thread = updates[-1].run, updates[-1].thread
        assert (run.status, thread.status) == (pb.RUN_STATUS_FAILED, pb.THREAD_STATUS_FAILED)
        assert run.error_code == code
        assert run.error.startswith(message)
        assert run.output == "so far"
        last = events_of(updates)[-1]
        assert (last.role, last.log_type) == (pb.EVENT_ROLE_EXECUTION_LOG, "error")
        assert last.log_level == pb.LOG_LEVEL_ERROR
        assert SECRET not in str(updates)

    service.run(check)


def test_caller_that_goes_away_cancels_nothing(service: Service) -> None:
    """The run of a call that was cancelled in the middle is executed to its end."""

    async def check(client: Client) -> None:
        call = client.call("StartRun", start_request("hi", "gated"))
        run = (await call.read()).update.run
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED
        gate[-1].set()
        assert (await client.watch(run))[-1].run.output == "re: hi"

    service.run(check)


def test_connected_resource_names_its_agent_runtime(service: Service) -> None:
    """Runs belong to the runtime, whichever way they came."""

    async def check(client: Client) -> None:
        connected = reference("storefront", connected=True)
        request = rpc.StartRunRequest(server=connected, input="hi")
        run = (await client.updates("StartRun", request))[-1].run
        assert run.server_id == "echo"
        for server in (connected, reference("echo"), reference("echo", connected=True)):
            got = await client.call("GetRun", rpc.GetRunRequest(server=server, run_id=run.id))
            assert got.run == run
            listed = await client.call("ListRuns", rpc.ListRunsRequest(server=server))
            assert [each.id for each in listed.runs] == [run.id]
            assert listed.agent_runtime_id == "echo"
        bare = await refusal(client.call("GetRun", rpc.GetRunRequest(server=reference("storefront"), run_id=run.id)))
        assert (bare.code, bare.reason) == (grpc.StatusCode.NOT_FOUND, "SERVER_NOT_FOUND")
        assert "bound to 'echo'" in bare.message

    service.run(check)


# WatchRun and the reads


def test_watch_replays_then_follows_to_the_end_of_the_run(service: Service) -> None:
    """From any sequence; of a settled run it ends at once; of one turn, with that."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        (await client.updates("ContinueRun", continue_request(run, "second", mode=pb.RUN_MODE_ASYNC)))
        whole = asyncio.ensure_future(client.watch(run))
        first = asyncio.ensure_future(client.watch(run, turn=1))
        late = asyncio.ensure_future(client.watch(run, after_sequence=3))
        gate[-1].set()
        assert [event.sequence for event in events_of(await whole)] == [1, 2, 3, 4, 5, 6]
        assert [event.sequence for event in events_of(await late)] == [4, 5, 6]
        of_first = await first
        assert (of_first[-1].run.turn, of_first[-1].run.status) == (1, pb.RUN_STATUS_COMPLETED)
        (replayed,) = await client.watch(run)
        assert replayed.run == await client.get(run)
        (nothing,) = await client.watch(run, after_sequence=1_000)
        assert (len(nothing.events), nothing.run.status) == (0, pb.RUN_STATUS_COMPLETED)

    service.run(check)


def test_list_runs_pages_newest_first(service: Service) -> None:
    """Runs and their threads, by token and by status."""

    async def check(client: Client) -> None:
        runs = [await client.start(str(n)) for n in range(5)]
        for run in runs:
            await client.watch(run)
        seen: list[str] = []
        token = ""
        while True:
            request = rpc.ListRunsRequest(server=reference("echo"), page_size=2, page_token=token)
            page = await client.call("ListRuns", request)
            assert [thread.id for thread in page.threads] == [run.thread_id for run in page.runs]
            seen += [run.id for run in page.runs]
            token = page.next_page_token
            if not token:
                break
        assert seen == [run.id for run in runs][::-1]
        for status, count in ((pb.RUN_STATUS_COMPLETED, 5), (pb.RUN_STATUS_QUEUED, 0), (pb.RUN_STATUS_RUNNING, 0)):
            page = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo"), status=status))
            assert len(page.runs) == count
        huge = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo"), page_size=2**31 - 1))
        assert len(huge.runs) == 5

    service.run(check)


def test_list_run_events_pages_and_tells_whether_there_is_more(service: Service) -> None:
    """Oldest first; the run comes with each page."""

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        for n in range(3):
            await client.updates("ContinueRun", continue_request(run, str(n)))
        page = await client.events(run, page_size=3)
        assert [event.sequence for event in page.events] == [1, 2, 3]
        assert page.has_more
        assert page.run == await client.get(run)
        page = await client.events(run, page_size=5, after_sequence=3)
        assert [event.sequence for event in page.events] == [4, 5, 6, 7, 8]
        assert not page.has_more
        page = await client.events(run, after_sequence=8, wait_ms=3_600_000)
        assert (len(page.events), page.has_more) == (0, False)

    service.run(check)


def test_list_run_events_waits_for_the_next_one(service: Service) -> None:
    """As long as a turn is open and the wait lasts; an event that is there already is not waited for."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        page = await client.events(run, after_sequence=1, wait_ms=3_600_000)
        assert [event.content for event in page.events] == ["one"]
        page = await client.events(run, after_sequence=2, wait_ms=30)
        assert (len(page.events), page.run.status) == (0, pb.RUN_STATUS_RUNNING)
        waiting = asyncio.ensure_future(client.events(run, after_sequence=2, wait_ms=3_600_000))
        gate[-1].set()
        page = await waiting
        assert [event.content for event in page.events] == ["re: hi"]
        assert page.run.last_sequence >= 3

    service.run(check)


def test_page_of_events_does_not_run_ahead_of_its_run(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that are stored between reading the run and reading its log are left to the next page."""
    get_run = SQLiteStore.get_run

    async def overtaken(store: SQLiteStore, *names: Any) -> Run:
        before = await get_run(store, *names)
        gate[-1].set()
        while (await get_run(store, *names)).status is RunStatus.RUNNING:  # noqa: ASYNC110 - told by nobody
            await asyncio.sleep(0)
        return before

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "get_run", overtaken)
            page = await client.events(run)
        assert (page.run.status, page.run.last_sequence, page.has_more) == (pb.RUN_STATUS_RUNNING, 2, False)
        assert [event.sequence for event in page.events] == [1, 2]
        page = await client.events(run, after_sequence=2)
        assert [event.sequence for event in page.events] == [3]

    service.run(check)


def test_pages_stay_within_the_size_of_a_message(service: Service) -> None:
    """Large events of many bytes a character are paged and streamed whole, within gRPC's default limits."""

    async def check(client: Client) -> None:
        text = "\U0001f600" * 200_000
        run = await client.start(text)
        await client.watch(run)
        for _ in range(4):
            await client.updates("ContinueRun", continue_request(run, text))
        sequences: list[int] = []
        while True:
            page = await client.events(run, after_sequence=sequences[-1] if sequences else 0)
            assert page.ByteSize() < 4 << 20
            sequences += [event.sequence for event in page.events]
            if not page.has_more:
                break
        assert sequences == list(range(1, 11))
        updates = await client.watch(run)
        assert contents_of(updates) == [text] * 10

    service.run(check)


# CancelRun


def test_cancel_settles_every_open_turn_and_is_idempotent(service: Service) -> None:
    """The answer shows what the cancel added; a second one adds nothing; followers see the end."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        await client.updates("ContinueRun", continue_request(run, "waits", mode=pb.RUN_MODE_ASYNC))
        watching = asyncio.ensure_future(client.watch(run))
        cancelled = await client.cancel(run)
        assert (cancelled.run.turn, cancelled.run.status) == (2, pb.RUN_STATUS_CANCELLED)
        assert cancelled.thread.status == pb.THREAD_STATUS_CANCELLED
        assert [(event.content, event.log_type) for event in cancelled.events] == [
            ("half", "incomplete"),
            ("The run was cancelled.", "cancelled"),
        ]
        again = await client.cancel(run)
        assert (again.run, len(again.events)) == (cancelled.run, 0)
        updates = await watching
        assert updates[-1].run == cancelled.run
        assert contents_of(updates) == ["hi", "one", "waits", "half", "The run was cancelled."]
        assert await client.get(run) == cancelled.run
        gate[-1].set()
        resumed = await client.updates("ContinueRun", continue_request(run, "third"))
        assert (resumed[-1].run.turn, resumed[-1].run.output) == (3, "re: third")

    service.run(check)


def test_cancel_of_a_completed_run_shows_its_outcome(service: Service) -> None:
    """Nothing changes."""

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        cancelled = await client.cancel(run)
        assert (cancelled.run, len(cancelled.events)) == (run, 0)

    service.run(check)


# Many


def test_many_callers_share_one_service(service: Service) -> None:
    """A hundred sync runs at once over one channel, each answered with its own events."""

    async def check(client: Client) -> None:
        async def one(n: int) -> None:
            updates = await client.updates("StartRun", start_request(f"run {n}", stream={"collect": True}))
            assert contents_of(updates) == [f"run {n}"] * 2

        await asyncio.gather(*(one(n) for n in range(100)))

    service.run(check)
