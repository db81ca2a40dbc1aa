"""Questions to the caller while processes are killed."""

import os
import signal
from pathlib import Path
from typing import Any

from tests.acceptance.processes import Up, until, up


def question_of(started: Up, path: str, after: int = 0) -> dict[str, Any]:
    """The question that a run asks, once its event comes behind a sequence."""

    def asked() -> dict[str, Any] | None:
        answer = started.http.get(path, params={"include": "events"})
        if answer.status_code == 503:
            return None
        document = answer.raise_for_status().json()
        asking = [event for event in document["events"] if event.get("logType") == "permission_request"]
        is_open = document["run"]["threadStatus"] == "permission_asked"
        return asking[-1] if is_open and asking and asking[-1]["sequence"] > after else None

    found = until(asked, "a question")
    assert found is not None
    return found


def test_question_outlives_the_gateway_and_is_asked_again_by_a_new_runtime(tmp_path: Path) -> None:
    """A killed runtime's turn begins again and asks again; after a kill of everything, too; the answer then counts."""
    with up(tmp_path) as started:
        path = started.start_async("asking", "a.txt")
        first = question_of(started, path)
        os.kill(started.runtime_pid, signal.SIGKILL)
        second = question_of(started, path, first["sequence"])
        # Both programs: the gateway is the parent, which takes the runtime along.
        started.program.kill()
    with up(tmp_path) as started:
        question_of(started, path, second["sequence"])
        answered = started.http.post(f"{path}/input", json={"content": "allow"}).raise_for_status().json()
        assert (answered["run"]["status"], answered["run"]["output"]) == ("completed", "allow: a.txt")
        answers = [event for event in started.get(path)["events"] if event.get("logType") == "permission_response"]
        assert [event["content"] for event in answers] == ["allow"]
