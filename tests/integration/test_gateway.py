"""The six operations in their three families, through the real gateway and the real runtime service."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service import server
from runtime_service.executor import ExecutorLimits
from tests.integration.stack import GATES, TERMINAL, TOKEN, Stack, runs, serving, until
from tests.support import run_async

CONNECTED = "/v1/servers/storefront/runtime/agent/runs"
FAMILIES = {
    "servers": "/v1/servers/echo/runs",
    "connected": CONNECTED,
    "agent-runtimes": "/v1/agent-runtimes/echo/runs",
}

CALLER = (("authorization", f"Bearer {TOKEN}"), ("x-acp-organization", "default"))
"""The metadata of a gRPC caller of the organization "default"."""

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def check_run(run: dict[str, Any], server: str = "echo") -> None:
    """A run has the fields that it always has, in the form that they always have."""
    assert re.fullmatch(r"run_\w+", run["id"])
    assert re.fullmatch(r"thread_\w+", run["threadId"])
    assert run["serverId"] == server
    assert run["mode"] in ("sync", "async")
    assert run["status"] in ("queued", "running", *TERMINAL)
    assert run["threadBacked"] is True
    assert TIME.fullmatch(run["createdAt"])
    assert ("completedAt" in run) == (run["status"] in TERMINAL)
    assert ("error" in run) == (run["status"] == "failed")
    assert run["sessionProtocol"] == "in-process"
    assert None not in run.values()


def check_envelope(document: dict[str, Any], family: str, *, events: bool = True) -> None:
    """An envelope holds what its family says, and its parts fit each other."""
    connected = family == "connected"
    parts = (
        {"serverId", "run", "thread"} | ({"agentRuntimeId"} if connected else set()) | ({"events"} if events else set())
    )
    assert document.keys() == parts
    assert document["serverId"] == ("storefront" if connected else "echo")
    assert document.get("agentRuntimeId") == ("echo" if connected else None)
    run, thread = document["run"], document["thread"]
    check_run(run)
    assert thread["id"] == run["threadId"]
    assert thread["status"] == run["threadStatus"]
    assert thread.get("title") == run.get("threadTitle") == run.get("title")
    assert TIME.fullmatch(thread["createdAt"])
    assert TIME.fullmatch(thread["updatedAt"])
    for event in document.get("events", ()):
        assert event.keys() >= {"id", "sequence", "role", "content", "createdAt"}
        assert re.fullmatch(r"event_\w+", event["id"])
        assert TIME.fullmatch(event["createdAt"])


def said(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Who said what."""
    return [(event["role"], event["content"]) for event in events]


def sequences(events: list[dict[str, Any]]) -> list[int]:
    """The events' places in the log."""
    return [event["sequence"] for event in events]


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_serve_a_whole_life(family: str, tmp_path: Path) -> None:
    """All six operations of a family answer as documented, from start to cancel."""
    path = FAMILIES[family]

    async def main() -> None:
        async with serving(tmp_path) as stack:
            started = await stack.call("POST", path, {"content": "one two", "title": "My run"})
            assert started.status == 201
            check_envelope(started.json, family)
            assert started.run["status"] == "completed"
            assert started.run["output"] == "one two"
            assert started.run["title"] == "My run"
            assert said(started.events) == [("user", "one two"), ("assistant", "one two")]
            run_path = f"{path}/{started.run['id']}"
            assert started.headers["Location"] == run_path

            got = await stack.call("GET", run_path)
            assert got.status == 200
            check_envelope(got.json, family, events=False)
            assert got.run == started.run

            continued = await stack.call("POST", f"{run_path}/input", {"prompt": "three"})
            assert continued.status == 200
            check_envelope(continued.json, family)
            assert continued.headers["Location"] == run_path
            assert said(continued.events) == [("user", "three"), ("assistant", "three")]
            assert continued.run["input"] == continued.run["output"] == "three"
            assert continued.json["thread"]["messageCount"] == 4

            events = await stack.call("GET", f"{run_path}/events")
            assert events.status == 200
            assert events.json["has_more"] is False
            check_envelope({k: v for k, v in events.json.items() if k != "has_more"}, family)
            assert events.events == [*started.events, *continued.events]
            assert sequences(events.events) == [1, 2, 3, 4]

            listed = (await stack.call("GET", path)).json
            assert listed.keys() - {"agentRuntimeId"} == {"serverId", "object", "data", "runs", "has_more"}
            assert listed.get("agentRuntimeId") == ("echo" if family == "connected" else None)
            assert listed["object"] == "list"
            assert listed["data"] == listed["runs"] == [continued.run]

            cancelled = await stack.call("POST", f"{run_path}/cancel", {})
            assert cancelled.status == 200
            check_envelope(cancelled.json, family)
            assert cancelled.run == continued.run
            assert cancelled.events == []

    run_async(main())


def test_connected_run_is_the_runtimes_own(tmp_path: Path) -> None:
    """A run that was started through a bound resource is there in both families of its agent runtime."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            run = (await stack.call("POST", CONNECTED, {"content": "hello"})).run
            for path in FAMILIES.values():
                assert (await stack.call("GET", f"{path}/{run['id']}")).run == run
                assert [run["id"]] == [each["id"] for each in (await stack.call("GET", path)).json["runs"]]

    run_async(main())


def test_resource_is_no_agent_runtime(tmp_path: Path) -> None:
    """A bound resource has no runs of its own; the answer says which family to use."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start("storefront")
            assert answer.status == 404
            assert answer.json["code"] == "SERVER_NOT_FOUND"
            assert "/v1/servers/storefront/runtime/agent/runs" in answer.json["message"]

    run_async(main())


def test_ids_are_percent_decoded(tmp_path: Path) -> None:
    """`runtime%2Fone` is the server `runtime/one`, and the Location leads back to its run."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start("runtime%2Fone")
            assert answer.status == 201
            assert answer.json["serverId"] == answer.run["serverId"] == "runtime/one"
            location = answer.headers["Location"]
            assert location == f"/v1/servers/runtime%2Fone/runs/{answer.run['id']}"
            assert (await stack.call("GET", location.replace("run_", "%72un%5F"))).run == answer.run
            assert (await stack.start("runtime/one")).status == 404

    run_async(main())


def test_agents_are_found_beside_the_servers_file(tmp_path: Path) -> None:
    """An agent of one's own is a module next to servers.toml."""
    (tmp_path / "agents_beside.py").write_text("def shout(turn):\n    return turn.input.upper()\n")
    servers = '[servers.mine]\nkind="agent_runtime"\nagent="python"\noptions={entrypoint="agents_beside:shout"}\n'

    async def main() -> None:
        async with serving(tmp_path, servers=servers) as stack:
            assert (await stack.start("mine", "quiet")).run["output"] == "QUIET"

    run_async(main())


# -- What is asked and what is shown -------------------------------------------------------------------


def test_input_is_the_prompt_then_the_content(tmp_path: Path) -> None:
    """With both, a blank line stands between them."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.call("POST", runs("echo"), {"content": "C", "prompt": "P"})
            assert answer.run["input"] == answer.run["output"] == "P\n\nC"

    run_async(main())


METADATA = '{"big": 123456789012345678901234567890,"z":{"b":null,"a":[{},[]]},  "e":1.0E+2,"ü":"\\u00fc\\/"}'


def test_metadata_comes_back_exactly(tmp_path: Path) -> None:
    """Big integers, key order, nulls, blanks and escapes are returned as they were sent, by every operation."""
    body = f'{{"content":"x","metadata":{METADATA}}}'.encode()
    expected = f'"metadata":{METADATA}'.encode()

    async def main() -> None:
        async with serving(tmp_path) as stack:
            started = await stack.call("POST", runs("echo"), body)
            path = started.headers["Location"]
            answers = [
                started,
                await stack.call("GET", path),
                await stack.call("GET", path + "/events"),
                await stack.call("GET", runs("echo")),
                await stack.call("POST", path + "/cancel"),
            ]
            for answer in answers:
                assert expected in answer.body
            async with stack.stream("GET", path + "/events") as stream:
                assert expected in await stream.response.read()

    run_async(main())


def test_continue_keeps_or_replaces_metadata(tmp_path: Path) -> None:
    """A continue without metadata keeps the run's; with metadata the turn has its own, and the agent sees it."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = (await stack.start("counting", metadata={"n": 1})).headers["Location"]
            kept = await stack.call("POST", path + "/input", {"content": "b"})
            replaced = await stack.call("POST", path + "/input", {"content": "c", "metadata": {"n": 2}})
            assert json.loads(kept.run["output"])["metadata"] == kept.run["metadata"] == {"n": 1}
            assert json.loads(replaced.run["output"])["metadata"] == replaced.run["metadata"] == {"n": 2}
            assert json.loads(replaced.run["output"])["turn"] == 3
            assert json.loads(kept.run["output"])["history"][0] == "user: hello"

    run_async(main())


def test_fields_without_a_value_are_left_out(tmp_path: Path) -> None:
    """A plain run has no title, error or metadata; its events neither log fields nor metadata."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start()
            always = {
                "id",
                "serverId",
                "threadId",
                "input",
                "mode",
                "status",
                "createdAt",
                "threadBacked",
                "threadStatus",
            }
            assert answer.run.keys() == always | {"output", "completedAt", "sessionProtocol"}
            assert answer.json["thread"].keys() == {"id", "status", "messageCount", "createdAt", "updatedAt"}
            for event in answer.events:
                assert event.keys() == {"id", "sequence", "role", "content", "createdAt"}

    run_async(main())


def test_events_show_all_that_an_agent_says(tmp_path: Path) -> None:
    """Logs, tool calls and messages come with role, type, level and metadata; deltas leave no event of their own."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start("talkative")
            shown = [
                (event["role"], event["content"], event.get("logType"), event.get("logLevel"), event.get("metadata"))
                for event in answer.events
            ]
            log = "execution_log"
            assert shown == [
                ("user", "hello", None, None, None),
                (log, "thinking", "thought", "warn", {"depth": 2}),
                (log, "search", "tool_call", "info", {"name": "search", "arguments": {"query": "ü"}, "id": "call_1"}),
                (log, "nothing", "tool_result", "success", {"name": "search", "id": "call_1"}),
                (log, "no network", "tool_result", "error", {"name": "search", "id": "call_2"}),
                *((log, level, None, level, None) for level in ("info", "warn", "error", "success", "warning")),
                ("assistant", "Hello", None, None, {"usage": {"total_tokens": 2**60}, "none": None}),
            ]
            assert answer.run["output"] == "Hello"

    run_async(main())


def test_failing_agent_is_data(tmp_path: Path) -> None:
    """An agent that fails is a 201 with status failed and its reason, and the reads say the same."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start("failing")
            assert answer.status == 201
            assert answer.run["status"] == answer.json["thread"]["status"] == "failed"
            assert answer.run["error"] == "The disk is full."
            assert answer.run["errorCode"] == "DISK_FULL"
            assert answer.run["output"] == "I try."
            last = answer.events[-1]
            assert (last["role"], last["logType"], last["logLevel"]) == ("execution_log", "error", "error")
            path = answer.headers["Location"]
            assert (await stack.call("GET", path)).run == answer.run
            again = await stack.call("POST", path + "/input", {"content": "again"})
            assert (again.status, again.run["status"]) == (200, "failed")

    run_async(main())


def test_broken_agent_tells_no_secret(tmp_path: Path) -> None:
    """An agent's unforeseen exception names its type, not what it said; what was half said is kept as incomplete."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start("broken")
            assert answer.run["errorCode"] == "AGENT_FAILED"
            assert "RuntimeError" in answer.run["error"]
            assert b"inner secret" not in answer.body
            assert [event.get("logType") for event in answer.events] == [None, "incomplete", "error"]
            assert answer.run["output"] == answer.events[1]["content"] == "half a se"

    run_async(main())


# -- Modes ---------------------------------------------------------------------------------------------


def test_async_start_answers_at_once(tmp_path: Path) -> None:
    """202 with the running run, the user's message and its Location, while the agent has not said a word."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start("gated", "async start", mode="async")
            assert answer.status == 202
            assert answer.run["status"] == "running"
            assert answer.run["mode"] == "async"
            assert said(answer.events)[0] == ("user", "async start")
            location = answer.headers["Location"]
            assert location == f"/v1/servers/gated/runs/{answer.run['id']}"
            assert (await stack.call("GET", location)).run["status"] == "running"
            GATES["async start"].open.set()
            assert (await stack.until_status(location))["output"] == "async start"

    run_async(main())


def test_async_answer_is_never_settled(tmp_path: Path) -> None:
    """However quick the agent: the status of a 202 to a request for async is queued or running."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for server in ("echo", "talkative"):
                started = await stack.start(server, mode="async")
                assert started.status == 202
                assert started.run["status"] in ("queued", "running")
                await stack.until_status(started.headers["Location"])
                path = started.headers["Location"] + "/input"
                continued = await stack.call("POST", path, {"content": "b", "mode": "async"})
                assert continued.status == 202
                assert continued.run["status"] in ("queued", "running")
                assert said(continued.events)[0] == ("user", "b")

    run_async(main())


def test_sync_wait_has_a_limit(tmp_path: Path) -> None:
    """Past the limit a start and a continue answer the 202 of an async one, and the run goes on."""

    async def main() -> None:
        async with serving(tmp_path, wait_limit_seconds=0.4) as stack:
            path = runs("gated")
            for name in ("limit one", "limit two"):
                answer = await stack.call("POST", path, {"content": name})
                assert answer.status == 202
                assert answer.run["status"] == "running"
                assert said(answer.events) == [("user", name), ("assistant", "waiting")]
                location = answer.headers["Location"]
                GATES[name].open.set()
                assert (await stack.until_status(location))["output"] == name
                path = location + "/input"

    run_async(main())


def test_sync_failure_of_the_wait_changes_nothing(tmp_path: Path) -> None:
    """A client that gives up waiting does not end the run that it started."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            waiting = asyncio.create_task(stack.start("gated", "given up"))
            await GATES["given up"].reached.wait()
            waiting.cancel()
            await asyncio.wait([waiting])
            run = (await stack.call("GET", runs("gated"))).json["runs"][0]
            assert run["status"] == "running"
            GATES["given up"].open.set()
            run = await stack.until_status(f"{runs('gated')}/{run['id']}")
            assert (run["status"], run["output"]) == ("completed", "given up")

    run_async(main())


@pytest.mark.parametrize(
    ("mode", "prefer", "status", "applied"),
    [
        (None, [], 201, None),
        (None, ["respond-async"], 202, "respond-async"),
        (None, ["Respond-Async; x=y"], 202, "respond-async"),
        (None, ["wait=0"], 202, "wait=0"),
        (None, ["wait=10"], 201, "wait=10"),
        (None, ["wait=600"], 201, None),
        (None, ["respond-async, wait=10"], 201, "respond-async, wait=10"),
        (None, ["wait=10", "respond-async"], 201, "respond-async, wait=10"),
        (None, ["return=minimal"], 201, None),
        ("sync", ["respond-async"], 201, None),
        ("sync", ["wait=10"], 201, "wait=10"),
        ("async", ["wait=10"], 202, None),
        ("async", ["respond-async"], 202, "respond-async"),
    ],
)
def test_prefer_is_honoured_and_told(
    mode: str | None, prefer: list[str], status: int, applied: str | None, tmp_path: Path
) -> None:
    """RFC 7240: respond-async and wait=N decide where the body does not; what was applied is told."""
    body = json.dumps({"content": "x"} | ({"mode": mode} if mode else {}))

    async def main() -> None:
        async with serving(tmp_path) as stack:
            headers = [
                ("Authorization", f"Bearer {stack.key}"),
                ("Content-Type", "application/json"),
                *(("Prefer", value) for value in prefer),
            ]
            path = runs("echo")
            for expected in (status, 200 if status == 201 else 202):
                async with stack.http.post(stack.url(path), data=body, headers=headers) as response:
                    assert response.status == expected
                    assert response.headers.get("Preference-Applied") == applied
                    assert (await response.json())["run"]["mode"] == ("async" if expected == 202 else "sync")
                    path = response.headers["Location"] + "/input"

    run_async(main())


def test_prefer_wait_ends_the_wait(tmp_path: Path) -> None:
    """`wait=1` answers 202 after a second although the limit is longer."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            headers = {"Prefer": "respond-async, wait=1"}
            answer = await stack.call("POST", runs("gated"), {"content": "one second"}, headers=headers)
            assert answer.status == 202
            assert answer.headers["Preference-Applied"] == "respond-async, wait=1"
            assert answer.run["status"] == "running"
            GATES["one second"].open.set()
            await stack.until_status(answer.headers["Location"], "completed")

    run_async(main())


def test_continue_of_a_running_run_waits_its_turn(tmp_path: Path) -> None:
    """Input to a running run is queued; a sync continue answers with the events of its own turn only."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("gated", "turn one")
            queued = await stack.call("POST", path + "/input", {"content": "turn two", "mode": "async"})
            assert queued.status == 202
            assert queued.run["status"] == "queued"
            assert queued.json["thread"]["status"] == "active"
            assert said(queued.events) == [("user", "turn two")]
            third = asyncio.create_task(stack.call("POST", path + "/input", {"content": "turn three"}))
            for name in ("turn one", "turn two", "turn three"):
                await GATES[name].reached.wait()
                GATES[name].open.set()
            answer = await third
            assert answer.status == 200
            assert answer.run["output"] == "turn three"
            assert said(answer.events) == [
                ("user", "turn three"),
                ("assistant", "waiting"),
                ("assistant", "turn three"),
            ]
            log = await stack.call("GET", path + "/events")
            assert sequences(log.events) == list(range(1, 10))

    run_async(main())


# -- Reads ---------------------------------------------------------------------------------------------


def test_get_leaves_out_events_unless_asked(tmp_path: Path) -> None:
    """`?include=events` adds the whole log to a get."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.start()
            path = answer.headers["Location"]
            assert "events" not in (await stack.call("GET", path)).json
            assert (await stack.call("GET", path + "?include=events")).events == answer.events

    run_async(main())


def test_list_is_paged_newest_first(tmp_path: Path) -> None:
    """Pages of `limit` runs follow each other by `pageToken` without gap or repetition, also while runs are added."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            ids = [(await stack.start(content=str(number))).run["id"] for number in range(5)]
            ids.reverse()
            page = (await stack.call("GET", runs("echo") + "?limit=2")).json
            assert [run["id"] for run in page["runs"]] == ids[:2]
            assert page["has_more"] is True
            await stack.start(content="newer")
            seen = ids[:2]
            while page["has_more"]:
                page = (await stack.call("GET", f"{runs('echo')}?limit=2&pageToken={page['nextPageToken']}")).json
                assert page["data"] == page["runs"]
                seen += [run["id"] for run in page["runs"]]
            assert seen == ids
            assert "nextPageToken" not in page
            whole = (await stack.call("GET", runs("echo") + "?limit=9999")).json
            assert [run["id"] for run in whole["runs"]][1:] == ids
            for run in whole["runs"]:
                check_run(run)

    run_async(main())


def test_list_of_a_server_without_runs_is_empty(tmp_path: Path) -> None:
    """There are two empty arrays and no more pages; runs of other servers do not show."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            await stack.start("talkative")
            listed = (await stack.call("GET", runs("echo"))).json
            assert listed == {"serverId": "echo", "object": "list", "data": [], "runs": [], "has_more": False}

    run_async(main())


def test_list_is_filtered_by_status(tmp_path: Path) -> None:
    """`?status=` shows the runs whose latest turn has it."""

    async def main() -> None:
        async with serving(tmp_path, ExecutorLimits(max_turns=1, cancel_grace_seconds=0.2)) as stack:
            ids = {}
            for status in ("completed", "cancelled", "running", "queued"):
                path = await stack.start_async("gated", f"filter {status}")
                ids[status] = path.rpartition("/")[2]
                if status == "completed":
                    GATES["filter completed"].open.set()
                    await stack.until_status(path)
                elif status == "cancelled":
                    await stack.call("POST", path + "/cancel")
                else:
                    await stack.until_status(path, status)
            for status, run_id in ids.items():
                listed = (await stack.call("GET", f"{runs('gated')}?status={status}")).json
                assert [run["id"] for run in listed["runs"]] == [run_id]
                assert listed["runs"][0]["status"] == status
            assert (await stack.call("GET", f"{runs('gated')}?status=failed")).json["runs"] == []

    run_async(main())


# -- Cancel --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, {}, b" {} "])
def test_cancel_ends_a_running_run_for_good(body: object, tmp_path: Path) -> None:
    """A cancel answers the cancelled run with what it logged; the agent is stopped; asked again, it adds nothing."""
    name = f"cancel {body!r}"

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("gated", name)
            await GATES[name].reached.wait()
            answer = await stack.call("POST", path + "/cancel", body)
            assert answer.status == 200
            assert answer.run["status"] == answer.json["thread"]["status"] == "cancelled"
            assert answer.run["output"] == "waiting"
            assert answer.events[-1]["logType"] == "cancelled"
            await GATES[name].left.wait()
            again = await stack.call("POST", path + "/cancel", body)
            assert (again.status, again.run, again.events) == (200, answer.run, [])
            assert (await stack.call("GET", path)).run == answer.run

    run_async(main())


def test_cancel_reaches_queued_turns(tmp_path: Path) -> None:
    """All open turns of a run are cancelled; the run can be continued afterwards."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("gated", "open one")
            waiting = asyncio.create_task(stack.call("POST", path + "/input", {"content": "open two"}))
            await stack.until_status(path, "queued")
            assert (await stack.call("POST", path + "/cancel")).run["status"] == "cancelled"
            second = await waiting
            assert (second.status, second.run["status"], second.run["input"]) == (200, "cancelled", "open two")
            GATES["open three"].open.set()
            third = await stack.call("POST", path + "/input", {"content": "open three"})
            assert (third.status, third.run["status"]) == (200, "completed")
            assert not GATES["open two"].reached.is_set()

    run_async(main())


def test_cancel_wakes_a_sync_start(tmp_path: Path) -> None:
    """A start that waits for its turn is answered when that is cancelled: 201, status cancelled."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            waiting = asyncio.create_task(stack.start("gated", "to be cancelled"))
            await GATES["to be cancelled"].reached.wait()
            run = (await stack.call("GET", runs("gated"))).json["runs"][0]
            await stack.call("POST", f"{runs('gated')}/{run['id']}/cancel")
            answer = await waiting
            assert (answer.status, answer.run["status"]) == (201, "cancelled")

    run_async(main())


# -- Refusals that need a state of things --------------------------------------------------------------


def test_full_queue_is_told(tmp_path: Path) -> None:
    """When no more turns may wait: 429 CAPACITY_EXCEEDED with Retry-After, nothing stored; later there is room."""

    async def main() -> None:
        async with serving(tmp_path, ExecutorLimits(max_turns=1, max_queued=1, cancel_grace_seconds=0.2)) as stack:
            running = await stack.start_async("gated", "full one")
            queued = await stack.start_async("echo", "full two")
            for fields in ({}, {"mode": "async"}):
                answer = await stack.start("echo", "full three", **fields)
                assert answer.status == 429
                assert answer.json["code"] == "CAPACITY_EXCEEDED"
                assert answer.json["error"] == "Too Many Requests"
                assert int(answer.headers["Retry-After"]) >= 1
            assert len((await stack.call("GET", runs("echo"))).json["runs"]) == 1
            GATES["full one"].open.set()
            await stack.until_status(running)
            await stack.until_status(queued)
            assert (await stack.start("echo", "full three")).status == 201

    run_async(main())


def test_answer_that_is_too_large_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """502 ANSWER_TOO_LARGE to who asked for it; a call that is under way beside it goes on."""
    monkeypatch.setattr(server, "MAX_MESSAGE_BYTES", 1 << 20)

    async def main() -> None:
        async with serving(tmp_path, max_body_bytes=1 << 20) as stack:
            waiting = asyncio.create_task(stack.start("gated", "beside a large one"))
            await GATES["beside a large one"].reached.wait()
            started = await stack.start("echo", "x" * 300_000)
            listed = await stack.call("GET", runs("echo"))
            for answer in (started, listed):
                assert (answer.status, answer.json["code"]) == (502, "ANSWER_TOO_LARGE")
            GATES["beside a large one"].open.set()
            assert (await waiting).run["status"] == "completed"

    run_async(main())


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_agent_that_cannot_run_is_told(accept: str, tmp_path: Path) -> None:
    """A server whose agent is not installed answers 503 AGENT_UNAVAILABLE with what to do, also to a stream."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.call("POST", runs("absent"), {"content": "x"}, headers={"Accept": accept})
            assert answer.status == 503
            assert answer.json["code"] == "AGENT_UNAVAILABLE"
            assert "no-such-file.gguf" in answer.json["message"]
            assert answer.headers["Retry-After"]
            assert (await stack.call("GET", runs("absent"))).json["runs"] == []

    run_async(main())


async def _reason(stack: Stack, server: str, run_id: str | None, text: str) -> str:
    """The one ErrorInfo's reason that a gRPC caller gets."""
    reference = rpc.ServerReference(id=server)
    async with grpc.aio.insecure_channel(stack.target) as channel:
        stub = run_service_pb2_grpc.RunServiceStub(channel)
        started = rpc.StartRunRequest(server=reference, input=text)
        got = rpc.GetRunRequest(server=reference, run_id=run_id or "")
        call = stub.GetRun(got, metadata=CALLER) if run_id else stub.StartRun(started, metadata=CALLER).read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    return reason_of(caught.value)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in the one ErrorInfo of an error."""
    trailer = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(trailer, bytes)
    details = status_pb2.Status.FromString(trailer).details
    (packed,) = (detail for detail in details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR))
    info = error_details_pb2.ErrorInfo()
    packed.Unpack(info)
    reason: str = info.reason
    return reason


def test_codes_are_the_reasons_of_grpc(tmp_path: Path) -> None:
    """What REST calls `code` is what gRPC callers get in ErrorInfo.reason."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            cases = [
                (await stack.start("nowhere"), await _reason(stack, "nowhere", None, "x")),
                (await stack.start("absent"), await _reason(stack, "absent", None, "x")),
                (await stack.start("echo", " "), await _reason(stack, "echo", None, " ")),
                (await stack.call("GET", runs("echo") + "/run_x"), await _reason(stack, "echo", "run_x", "")),
            ]
            assert [(answer.json["code"], reason) for answer, reason in cases] == [
                (code, code) for code in ("SERVER_NOT_FOUND", "AGENT_UNAVAILABLE", "VALIDATION_FAILED", "RUN_NOT_FOUND")
            ]

    run_async(main())


def test_many_runs_at_once_stay_apart(tmp_path: Path) -> None:
    """A hundred sync starts at once each get their own run, log and answer."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answers = await asyncio.gather(*(stack.start(content=f"run {number}") for number in range(100)))
            assert [answer.run["output"] for answer in answers] == [f"run {number}" for number in range(100)]
            assert len({answer.run["id"] for answer in answers}) == 100

            async def counted() -> bool:
                name = 'acp_gateway_runs_total{operation="start",status="completed"}'
                return await stack.metric(name) == 100

            await until(counted)

    run_async(main())
