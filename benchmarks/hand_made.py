"""The hand-made app: the same run and the same answer as a team would write them by hand, in one process.

FastAPI on uvicorn (uvloop, httptools, no access log), pydantic models for request and answer, an agent that says
its input back. No gRPC, no key, nothing stored: the second reference beside the floor.

    python -m benchmarks.hand_made READY_FILE
"""

import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from benchmarks.environment import EVENTS
from benchmarks.processes import Server, read_when_written, running

app = FastAPI()


class _Document(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class StartRun(_Document):
    """The body of a start."""

    content: str = Field(min_length=1)
    title: str | None = Field(default=None, max_length=256)
    mode: Literal["sync", "async"] = "sync"
    metadata: dict[str, Any] | None = None


class Run(_Document):
    """A run, as it stands at its end."""

    id: str
    server_id: str
    thread_id: str
    input: str
    mode: Literal["sync", "async"]
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    created_at: datetime
    thread_backed: bool
    thread_status: Literal["active", "running", "completed", "failed", "cancelled"]
    title: str | None = None
    output: str | None = None
    metadata: dict[str, Any] | None = None
    completed_at: datetime | None = None
    session_protocol: str | None = None
    thread_title: str | None = None


class Thread(_Document):
    """A run's thread."""

    id: str
    status: Literal["active", "running", "completed", "failed", "cancelled"]
    message_count: int
    created_at: datetime
    updated_at: datetime
    title: str | None = None
    metadata: dict[str, Any] | None = None


class Event(_Document):
    """One entry of a run's log."""

    id: str
    sequence: int
    role: Literal["user", "assistant", "system", "execution_log"]
    content: str
    created_at: datetime


class RunAnswer(_Document):
    """The answer to a start."""

    server_id: str
    run: Run
    thread: Thread
    events: list[Event]


async def echo(text: str) -> AsyncIterator[str]:
    """The agent: says the input back."""
    for _ in range(EVENTS):
        yield text


@app.post("/v1/servers/{server_id}/runs", status_code=201, response_model=RunAnswer, response_model_exclude_none=True)
async def start_run(server_id: str, request: StartRun) -> RunAnswer:
    """Execute a run and answer with its log."""
    key = uuid4().hex
    created_at = datetime.now(UTC)
    events = [Event(id=f"event_{key}_1", sequence=1, role="user", content=request.content, created_at=created_at)]
    async for message in echo(request.content):
        sequence = len(events) + 1
        events.append(
            Event(
                id=f"event_{key}_{sequence}",
                sequence=sequence,
                role="assistant",
                content=message,
                created_at=datetime.now(UTC),
            )
        )
    completed_at = datetime.now(UTC)
    run = Run(
        id=f"run_{key}",
        server_id=server_id,
        thread_id=f"thread_{key}",
        input=request.content,
        mode=request.mode,
        status="completed",
        created_at=created_at,
        thread_backed=True,
        thread_status="completed",
        title=request.title,
        output=events[-1].content,
        metadata=request.metadata,
        completed_at=completed_at,
        session_protocol="in-process",
        thread_title=request.title,
    )
    thread = Thread(
        id=f"thread_{key}",
        status="completed",
        message_count=len(events),
        created_at=created_at,
        updated_at=completed_at,
        title=request.title,
        metadata=request.metadata,
    )
    return RunAnswer(server_id=server_id, run=run, thread=thread, events=events)


@contextmanager
def hand_made(directory: Path) -> Iterator[Server]:
    """The process, ready; `directory` takes its log."""
    ready, log = directory / "hand-made.json", directory / "hand-made.log"
    with running(["-m", "benchmarks.hand_made", str(ready)], log=log) as process:
        yield Server("127.0.0.1", read_when_written(ready, process, log)["port"], (process.pid,))


def _serve(ready: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    ready.write_text(json.dumps({"port": listener.getsockname()[1]}))
    config = uvicorn.Config(app, loop="uvloop", http="httptools", access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
