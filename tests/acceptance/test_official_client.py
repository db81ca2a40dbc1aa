"""The official Python client, unmodified, against the two real processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from computer_agents import ApiClientError, ComputerAgentsClient

from tests.acceptance.processes import TERMINAL, Up, until, up


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Both programs, shared by the tests of this module."""
    with up(tmp_path_factory.mktemp("official")) as started:
        yield started


@pytest.fixture
def client(gateway: Up) -> Iterator[ComputerAgentsClient]:
    """The official client as its documentation makes it."""
    made = ComputerAgentsClient(api_key=gateway.key, base_url=gateway.url)
    yield made
    made.api.close()


def said(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Who said what."""
    return [(event["role"], event["content"]) for event in events]


def test_resources_live_a_whole_run(client: ComputerAgentsClient) -> None:
    """ResourcesResource: start, get, send input, get events, list and cancel on an agent runtime."""
    resources = client.resources
    started = resources.start_run("echo", content="hello", title="Greeting", metadata={"n": 2**70, "x": None})
    run = started["run"]
    assert (run["status"], run["output"], run["title"]) == ("completed", "hello", "Greeting")
    assert run["metadata"] == {"n": 2**70, "x": None}
    assert said(started["events"]) == [("user", "hello"), ("assistant", "hello")]
    assert started["serverId"] == "echo"
    assert "agentRuntimeId" not in started
    assert resources.get_run("echo", run["id"])["run"] == run

    continued = resources.send_run_input("echo", run["id"], prompt="more")
    assert continued["run"]["output"] == "more"
    events = resources.get_run_events("echo", run["id"])
    assert [event["sequence"] for event in events["events"]] == [1, 2, 3, 4]
    assert resources.cancel_run("echo", run["id"])["run"]["status"] == "completed"

    listed = resources.list_runs("echo", limit=1)
    assert [each["id"] for each in listed["runs"]] == [each["id"] for each in listed["data"]] == [run["id"]]
    assert resources.list_runs("echo", status="failed")["runs"] == []


def test_resources_follow_an_async_run(client: ComputerAgentsClient, tmp_path: Path) -> None:
    """ResourcesResource: an async start answers at once, polling sees the end, cancel ends another."""
    resources = client.resources
    started = resources.start_run("gated", content=str(tmp_path / "gate"), mode="async")
    assert started["run"]["status"] in ("queued", "running")
    assert said(started["events"])[0][0] == "user"
    run_id = started["run"]["id"]
    second = resources.send_run_input("gated", run_id, content=str(tmp_path / "never"), mode="async")
    assert second["run"]["status"] == "queued"
    (tmp_path / "gate").touch()
    until(lambda: resources.get_run("gated", run_id)["run"]["status"] == "running")
    cancelled = resources.cancel_run("gated", run_id)
    assert cancelled["run"]["status"] == cancelled["thread"]["status"] == "cancelled"
    assert resources.cancel_run("gated", run_id)["run"] == cancelled["run"]
    assert ("assistant", "open") in said(resources.get_run_events("gated", run_id)["events"])


def test_resources_run_a_bound_agent(client: ComputerAgentsClient) -> None:
    """ResourcesResource: the runtime_agent family on a web app that is bound to an agent runtime."""
    resources = client.resources
    started = resources.start_runtime_agent_run("storefront", content="hello")
    run_id = started["run"]["id"]
    answers = [
        started,
        resources.get_runtime_agent_run("storefront", run_id),
        resources.send_runtime_agent_run_input("storefront", run_id, content="more"),
        resources.get_runtime_agent_run_events("storefront", run_id),
        resources.cancel_runtime_agent_run("storefront", run_id),
        resources.list_runtime_agent_runs("storefront", limit=5),
    ]
    for answer in answers:
        assert (answer["serverId"], answer["agentRuntimeId"]) == ("storefront", "echo")
    assert [event["content"] for event in answers[3]["events"]] == ["hello", "hello", "more", "more"]
    assert answers[5]["runs"][0]["id"] == run_id
    assert resources.get_run("echo", run_id)["run"] == resources.get_runtime_agent_run("storefront", run_id)["run"]


def test_resources_cancel_a_bound_agents_run(client: ComputerAgentsClient, tmp_path: Path) -> None:
    """ResourcesResource: a running run of the connected family is cancelled."""
    resources = client.resources
    started = resources.start_runtime_agent_run("gatehouse", content=str(tmp_path / "never"), mode="async")
    cancelled = resources.cancel_runtime_agent_run("gatehouse", started["run"]["id"])
    assert cancelled["run"]["status"] == "cancelled"
    assert cancelled["agentRuntimeId"] == "gated"


def test_agent_runtimes_live_a_whole_run(client: ComputerAgentsClient) -> None:
    """AgentRuntimesResource: every method for runs, on an id that has to be percent-encoded."""
    runtimes: Any = client.agent_runtimes
    started = runtimes.start_run("runtime/one", content="C", prompt="P", title="T", metadata={"a": [1]})
    run = started["run"]
    assert (run["serverId"], run["output"], run["title"], run["metadata"]) == ("runtime/one", "P\n\nC", "T", {"a": [1]})
    assert runtimes.get_run("runtime/one", run["id"])["run"] == run
    continued = runtimes.send_input("runtime/one", run["id"], content="more", metadata={"b": 2})
    assert (continued["run"]["output"], continued["run"]["metadata"]) == ("more", {"b": 2})
    events = runtimes.get_events("runtime/one", run["id"])
    assert [event["content"] for event in events] == ["P\n\nC", "P\n\nC", "more", "more"]
    assert runtimes.cancel_run("runtime/one", run["id"])["run"]["status"] == "completed"
    assert [each["id"] for each in runtimes.list_runs("runtime/one")] == [run["id"]]
    assert len(runtimes.list_runs("runtime/one", limit=1)) == 1


def test_agent_runtimes_follow_an_async_run(client: ComputerAgentsClient) -> None:
    """AgentRuntimesResource: mode async on start and input; polling sees the end."""
    runtimes: Any = client.agent_runtimes
    run_id = runtimes.start_run("slow", content="one two three", mode="async")["run"]["id"]
    assert runtimes.send_input("slow", run_id, prompt="four", mode="async")["run"]["mode"] == "async"
    until(lambda: runtimes.get_run("slow", run_id)["run"]["status"] in TERMINAL)
    assert [event["content"] for event in runtimes.get_events("slow", run_id) if event["role"] == "assistant"] == [
        "one two three",
        "four",
    ]


def test_question_is_seen_and_answered(client: ComputerAgentsClient) -> None:
    """A start that asks is answered with the question; the next input is the answer, if it names an option."""
    resources = client.resources
    asked = resources.start_run("asking", content="a.txt")
    run_id = asked["run"]["id"]
    assert (asked["run"]["status"], asked["thread"]["status"]) == ("running", "permission_asked")
    assert asked["events"][-1]["logType"] == "permission_request"
    assert [option["id"] for option in asked["events"][-1]["metadata"]["options"]] == ["allow", "reject"]
    with pytest.raises(ApiClientError) as wrong:
        resources.send_run_input("asking", run_id, content="maybe")
    assert wrong.value.status == 400
    assert "allow, reject" in str(wrong.value)
    answered = resources.send_run_input("asking", run_id, content="reject")
    assert (answered["run"]["status"], answered["run"]["output"]) == ("completed", "reject: a.txt")


def test_stream_of_events_is_followed_live(client: ComputerAgentsClient, tmp_path: Path) -> None:
    """request_stream on the events URL: what is there, deltas and events as they come, stream.completed at the end."""
    gate = tmp_path / "gate"
    run_id = client.resources.start_run("typing", content=str(gate), mode="async")["run"]["id"]
    documents = []
    for document in client.api.request_stream("GET", f"/servers/typing/runs/{run_id}/events"):
        documents.append(document)
        if document["type"] == "run.delta":
            gate.touch()
    types = [document["type"] for document in documents]
    assert types[0] == "run.updated"
    assert types[-1] == "stream.completed"
    assert {"type": "run.delta", "sequence": 2, "offset": 0, "text": "half "} in documents
    events = [document["event"] for document in documents if document["type"] == "run.event"]
    assert said(events) == [("user", str(gate)), ("assistant", "half and half")]
    assert documents[-1]["run"] == client.resources.get_run("typing", run_id)["run"]


def test_stream_resumes_where_it_was(client: ComputerAgentsClient) -> None:
    """request_stream with `after` or Last-Event-ID goes on behind a sequence."""
    run_id = client.resources.start_run("echo", content="hello")["run"]["id"]
    path = f"/servers/echo/runs/{run_id}/events"
    for options in ({"query": {"after": 1}}, {"headers": {"Last-Event-ID": "1"}}):
        documents = list(client.api.request_stream("GET", path, **options))
        assert [document["event"]["sequence"] for document in documents if document["type"] == "run.event"] == [2]
        assert documents[-1]["type"] == "stream.completed"


@pytest.mark.parametrize(
    "path", ["/servers/slow/runs", "/agent-runtimes/slow/runs", "/servers/storefront/runtime/agent/runs"]
)
def test_stream_of_a_start_and_a_continue(client: ComputerAgentsClient, path: str) -> None:
    """request_stream on start and on input streams that turn."""
    documents = list(client.api.request_stream("POST", path, body={"content": "one two three four"}))
    assert documents[-1]["type"] == "stream.completed"
    run = documents[-1]["run"]
    assert (run["status"], run["output"]) == ("completed", "one two three four")
    documents = list(client.api.request_stream("POST", f"{path}/{run['id']}/input", body={"prompt": "five"}))
    events = [document["event"] for document in documents if document["type"] == "run.event"]
    assert said(events) == [("user", "five"), ("assistant", "five")]


def test_stream_survives_every_line_break(client: ComputerAgentsClient) -> None:
    """The client's parser splits at everything that Unicode calls a line break; it loses no document for it."""
    content = "a\nb\r\nc\u2028d\u2029e\x85f\x0bg\x0ch\x1ci data: {} \U0001f600"
    documents = list(
        client.api.request_stream(
            "POST", "/servers/echo/runs", body={"content": content, "metadata": {"\u2028": "\x85"}}
        )
    )
    events = [document["event"] for document in documents if document["type"] == "run.event"]
    assert said(events) == [("user", content), ("assistant", content)]
    assert documents[-1]["run"]["metadata"] == {"\u2028": "\x85"}


def test_failed_run_is_data(client: ComputerAgentsClient) -> None:
    """An agent that fails raises nothing: the run says failed and why."""
    run = client.resources.start_run("failing", content="x")["run"]
    assert (run["status"], run["error"], run["errorCode"]) == ("failed", "The disk is full.", "DISK_FULL")


def test_errors_surface_whole(client: ComputerAgentsClient, gateway: Up) -> None:
    """ApiClientError carries message, status, code and details, on requests and on streams."""
    with pytest.raises(ApiClientError) as invalid:
        client.resources.start_run("echo", content="x", mode="later")
    assert (invalid.value.status, invalid.value.code) == (400, "VALIDATION_FAILED")
    details: Any = invalid.value.details
    assert details == [{"field": "mode", "message": 'must be "sync" or "async"'}]
    assert invalid.value.message == 'mode must be "sync" or "async"'

    with pytest.raises(ApiClientError) as unknown:
        client.agent_runtimes.get_run("echo", "run_x")
    assert (unknown.value.status, unknown.value.code) == (404, "RUN_NOT_FOUND")
    assert "run_x" in unknown.value.message

    with pytest.raises(ApiClientError) as nowhere:
        list(client.api.request_stream("POST", "/servers/nowhere/runs", body={"content": "x"}))
    assert (nowhere.value.status, nowhere.value.code) == (404, "SERVER_NOT_FOUND")

    with pytest.raises(ApiClientError) as unsupported:
        client.resources.get("echo")
    assert (unsupported.value.status, unsupported.value.code) == (404, "NOT_FOUND")

    stranger = ComputerAgentsClient(api_key="acp_" + "0" * 77, base_url=gateway.url)
    with pytest.raises(ApiClientError) as unauthenticated:
        stranger.resources.list_runs("echo")
    stranger.api.close()
    assert (unauthenticated.value.status, unauthenticated.value.code) == (401, "UNAUTHENTICATED")


def test_organization_is_checked(gateway: Up) -> None:
    """`organization_id` of the key's organization works; another one is a 403."""
    with ComputerAgentsClient(gateway.key, base_url=gateway.url, organization_id="default").api as api:
        assert api.get("/servers/echo/runs")["object"] == "list"
    with (
        ComputerAgentsClient(gateway.key, base_url=gateway.url, organization_id="other").api as api,
        pytest.raises(ApiClientError) as mismatch,
    ):
        api.get("/servers/echo/runs")
    assert (mismatch.value.status, mismatch.value.code) == (403, "ORGANIZATION_MISMATCH")


def test_base_url_may_end_with_v1(gateway: Up) -> None:
    """The client takes the base URL with and without `/v1`."""
    with ComputerAgentsClient(gateway.key, base_url=gateway.url + "/v1").api as api:
        assert api.get("/servers/echo/runs")["object"] == "list"
