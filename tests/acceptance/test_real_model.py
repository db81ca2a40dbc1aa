"""The built-in servers as `make run` starts them: a real model that says real text, through both programs."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.acceptance.processes import LIMIT_SECONDS, Up, children, clean_environment, is_alive, until, up

HELLO = "Say hello to Bob."
LONG = "Write a long story about a ship on the sea."


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Both programs over the built-in servers."""
    with up(tmp_path_factory.mktemp("model"), "--drain-seconds", "1", servers=None) as started:
        yield started


def test_model_answers_a_sync_start(shared: Up) -> None:
    """A sync start answers 201 with the model's text, and with what it cost in the event's metadata."""
    answer = shared.start("assistant", HELLO)
    assert answer.status_code == 201
    run, events = answer.json()["run"], answer.json()["events"]
    assert run["status"] == "completed", run
    assert run["output"].strip()
    assert run["sessionProtocol"] == "openai-chat-completions"
    assert [event["role"] for event in events] == ["user", "assistant"]
    assert events[1]["content"] == run["output"]
    assert events[1]["metadata"]["usage"]["completion_tokens"] > 0


def test_model_streams_its_tokens(shared: Up) -> None:
    """An SSE start brings the text in many deltas, before the event that holds it whole."""
    documents = list(shared.documents("/v1/servers/assistant/runs", {"content": HELLO}))
    assert documents[-1]["type"] == "stream.completed"
    deltas = [document for document in documents if document["type"] == "run.delta"]
    text = ""
    for delta in deltas:
        assert delta["offset"] == len(text)
        text += delta["text"]
    assert len(deltas) > 2
    output = documents[-1]["run"]["output"]
    assert output.startswith(text)
    last = [document["event"] for document in documents if document["type"] == "run.event"][-1]
    assert (last["role"], last["content"]) == ("assistant", output)


def test_model_is_told_the_history(shared: Up) -> None:
    """A continue sends the earlier messages along: its prompt is longer than the same one alone."""
    started = shared.start("assistant", HELLO)
    path = started.headers["Location"]
    answer = shared.http.post(path + "/input", json={"content": HELLO})
    assert answer.status_code == 200
    assert answer.json()["run"]["status"] == "completed"
    tokens = [each.json()["events"][-1]["metadata"]["usage"]["prompt_tokens"] for each in (started, answer)]
    assert tokens[1] > tokens[0]
    assert [event["sequence"] for event in shared.get(path)["events"]] == [1, 2, 3, 4]


def test_model_is_stopped_by_a_cancel(shared: Up) -> None:
    """A cancel in the middle of the text ends the run; what was said by then is kept; the model answers the next."""
    path = shared.start_async("assistant", LONG)
    for document in shared.documents(path + "/events", None):
        if document["type"] == "run.delta":
            cancelled = shared.http.post(path + "/cancel", json={}).json()
            assert cancelled["run"]["status"] == "cancelled"
        last = document
    assert (last["type"], last["run"]["status"]) == ("stream.completed", "cancelled")
    document = shared.get(path)
    assert document["run"]["output"]
    assert [event.get("logType") for event in document["events"]] == [None, "incomplete", "cancelled"]
    assert shared.start("assistant", HELLO).json()["run"]["status"] == "completed"


def test_model_answers_through_a_bound_resource(shared: Up) -> None:
    """`storefront` is a web app bound to `assistant`: start, continue, events, list and cancel of its family."""
    path = "/v1/servers/storefront/runtime/agent/runs"
    started = shared.http.post(path, json={"content": HELLO})
    assert started.status_code == 201
    document = started.json()
    assert (document["serverId"], document["agentRuntimeId"]) == ("storefront", "assistant")
    assert document["run"]["serverId"] == "assistant"
    assert document["run"]["output"].strip()
    run_path = started.headers["Location"]
    assert run_path == f"{path}/{document['run']['id']}"
    continued = shared.http.post(run_path + "/input", json={"prompt": HELLO, "mode": "async"})
    assert continued.status_code == 202
    last = list(shared.documents(run_path + "/events", None))[-1]
    assert (last["type"], last["run"]["status"]) == ("stream.completed", "completed")
    assert shared.http.get(path).json()["runs"][0]["id"] == document["run"]["id"]
    assert shared.http.post(run_path + "/cancel").json()["run"]["status"] == "completed"


def test_printed_curl_line_works_as_it_is(shared: Up) -> None:
    """The line of the banner, pasted into a shell, starts a run and shows what the model says."""
    banner = until(lambda: shared.program.stdout)
    line = banner[banner.index("  curl ") : banner.index("Ctrl-C")]
    ended = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True, env=clean_environment()
    )
    run = json.loads(ended.stdout)["run"]
    assert (run["serverId"], run["status"]) == ("assistant", "completed")
    assert run["output"].strip()


def test_model_is_loaded_again_after_a_kill(shared: Up) -> None:
    """After kill -9 of the runtime the model's process ends by itself, and the turn is executed by a new one."""
    path = shared.start_async("assistant", HELLO)
    shared.until_said(path, "run.delta")
    killed = shared.runtime_pid
    models = children(killed)
    assert len(models) == 1
    os.kill(killed, signal.SIGKILL)
    document = shared.until_ended(path)
    assert document["run"]["status"] == "completed"
    assert document["run"]["output"].strip()
    until(lambda: not is_alive(models[0]), "the end of the model that was left")
    assert shared.runtime_pid != killed


def test_model_ends_with_the_programs(shared: Up) -> None:
    """SIGTERM ends the model's process, too, in the middle of its work, and leaves nothing behind."""
    path = shared.start_async("assistant", LONG)
    next(document for document in shared.documents(path + "/events", None) if document["type"] == "run.delta")
    pids = [shared.pid, *children(shared.pid)]
    assert len(pids) == 3
    begun = time.monotonic()
    assert shared.program.end() == 0
    assert time.monotonic() - begun < LIMIT_SECONDS
    until(lambda: not any(is_alive(pid) for pid in pids), "the end of all processes")
