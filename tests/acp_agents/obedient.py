"""An agent on the SDK's agent side that does as its prompts say: each is a JSON list of steps, or a text to repeat.

Options by its command line: --load, --break-load, --resume, --modes, --models, --login, --no-stop.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from acp import PROTOCOL_VERSION, RequestError, run_agent, update_agent_message_text
from acp.schema import (
    AgentCapabilities,
    AuthMethodAgent,
    EnvVariable,
    Implementation,
    InitializeResponse,
    LoadSessionResponse,
    NewSessionResponse,
    PermissionOption,
    PromptResponse,
    ResumeSessionResponse,
    SessionCapabilities,
    SessionConfigOptionSelect,
    SessionConfigSelectOption,
    SessionMode,
    SessionModeState,
    SessionNotification,
    SessionResumeCapabilities,
    SetSessionConfigOptionResponse,
    SetSessionModeResponse,
    ToolCallUpdate,
    Usage,
)


class ObedientAgent:
    """Its sessions live in files beside the working directories where it can load them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._client: Any = None
        self._cwd = Path()
        self._said: list[str] = []
        self._mode = "ask"
        self._model = "small"
        self._is_cancelled = asyncio.Event()
        self._logged_in = False
        self._servers: list[Any] = []

    def on_connect(self, conn: Any) -> None:
        """Keep the connection."""
        self._client = conn

    async def initialize(self, protocol_version: int, **_: Any) -> InitializeResponse:
        """Tell what it can."""
        arguments = self._arguments
        resume = SessionResumeCapabilities() if arguments.resume else None
        methods = [AuthMethodAgent(id="browser", name="Log in with a browser")] if arguments.login else []
        return InitializeResponse(
            protocol_version=arguments.version,
            agent_capabilities=AgentCapabilities(
                load_session=arguments.load, session_capabilities=SessionCapabilities(resume=resume)
            ),
            auth_methods=[*methods],
            agent_info=Implementation(name="obedient", title="Obedient Agent", version="1.2.3"),
        )

    async def authenticate(self, method_id: str, **_: Any) -> None:
        """Log in."""
        self._logged_in = True

    async def new_session(self, cwd: str, mcp_servers: Any = None, **_: Any) -> NewSessionResponse:
        """Open a session, if nobody has to log in before."""
        if self._arguments.login and not self._logged_in:
            raise RequestError.auth_required()
        self._cwd = Path(cwd)
        self._servers = mcp_servers or []
        return NewSessionResponse(session_id=f"session-{os.getpid()}", **self._offers())

    async def load_session(self, cwd: str, session_id: str, **_: Any) -> LoadSessionResponse:
        """Say again what was said before."""
        if self._arguments.break_load:
            os._exit(3)
        await self._reopen(cwd, session_id)
        for text in self._said:
            await self._client.session_update(session_id, update_agent_message_text(text))
        return LoadSessionResponse(**self._offers())

    async def resume_session(self, cwd: str, session_id: str, **_: Any) -> ResumeSessionResponse:
        """Go on without saying it again."""
        await self._reopen(cwd, session_id)
        return ResumeSessionResponse(**self._offers())

    async def set_session_mode(self, session_id: str, mode_id: str, **_: Any) -> SetSessionModeResponse:
        """Set the mode."""
        self._mode = mode_id
        return SetSessionModeResponse()

    async def set_config_option(
        self, session_id: str, config_id: str, value: str | bool, **_: Any
    ) -> SetSessionConfigOptionResponse:
        """Set the model."""
        self._model = str(value)
        return SetSessionConfigOptionResponse(config_options=[])

    async def cancel(self, session_id: str, **_: Any) -> None:
        """Stop, if it stops."""
        if not self._arguments.no_stop:
            self._is_cancelled.set()

    async def prompt(self, session_id: str, prompt: list[Any], **_: Any) -> PromptResponse:
        """Do what the last text says."""
        self._is_cancelled.clear()
        texts = [block.text for block in prompt]
        self._said.append(texts[-1])
        if self._arguments.load or self._arguments.resume:
            self._memory(session_id).write_text(json.dumps(self._said))
        steps = json.loads(texts[-1]) if texts[-1].startswith("[") else [{"do": "say", "texts": [texts[-1]]}]
        stop_reason: Any = "end_turn"
        usage = None
        for step in steps:
            match step["do"]:
                case "stop":
                    stop_reason = step["reason"]
                case "usage":
                    usage = Usage(total_tokens=7, input_tokens=4, output_tokens=3)
                case "wait":
                    await self._say(session_id, "waiting")
                    await self._is_cancelled.wait()
                    if step.get("fails"):
                        raise RequestError.internal_error()
                    return PromptResponse(stop_reason="cancelled")
                case "context":
                    await self._say(session_id, "|".join(texts))
                case _:
                    await self._do(session_id, step)
        return PromptResponse(stop_reason=stop_reason, usage=usage)

    async def _do(self, session_id: str, step: dict[str, Any]) -> None:
        match step["do"]:
            case "say":
                for text in step["texts"]:
                    await self._say(session_id, text)
            case "update":
                for update in step["updates"]:
                    params = {"sessionId": session_id, "update": update}
                    if not step.get("wrong"):
                        SessionNotification.model_validate(params)
                    await self._client._conn.send_notification("session/update", params)
            case "flood":
                for number in range(step["count"]):
                    await self._say(session_id, f"{number} ")
            case "tell":
                facts = {
                    "mode": self._mode,
                    "model": self._model,
                    "cwd": str(self._cwd),
                    "pid": os.getpid(),
                    "said": self._said,
                    "env": dict(os.environ),
                    "servers": [server.name for server in self._servers],
                }
                await self._say(session_id, json.dumps(facts[step["what"]]))
            case "permission":
                options = [
                    PermissionOption(option_id="yes", name="Yes", kind="allow_once"),
                    PermissionOption(option_id="no", name="No", kind="reject_once"),
                ]
                call = ToolCallUpdate(
                    tool_call_id=step.get("id", "call-1"),
                    title=step.get("title"),
                    kind=step.get("kind"),
                    raw_input=step.get("input"),
                )
                answer = await self._client.request_permission(session_id=session_id, tool_call=call, options=options)
                await self._say(session_id, getattr(answer.outcome, "option_id", answer.outcome.outcome))
            case "request":
                try:
                    result = await self._client._conn.send_request(
                        step["method"], {"sessionId": session_id} | step["params"]
                    )
                except RequestError as error:
                    result = {"code": error.code, "message": str(error)}
                await self._say(session_id, json.dumps(result))
            case "terminal":
                await self._run_in_terminal(session_id, step)
            case "start terminal":
                await self._client.create_terminal(session_id=session_id, command=step["command"], args=step["args"])
            case "error":
                raise RequestError(step["code"], step["message"], step.get("data"))
            case "exit":
                sys.stderr.write(step.get("last", ""))
                sys.stderr.flush()
                os._exit(step["status"])
            case "signal":
                os.kill(os.getpid(), step["number"])
            case "hang":
                await self._say(session_id, "…")
                await asyncio.Event().wait()
            case unknown:
                raise ValueError(unknown)

    async def _run_in_terminal(self, session_id: str, step: dict[str, Any]) -> None:
        variables = [EnvVariable(name=name, value=value) for name, value in step.get("env", {}).items()]
        created = await self._client.create_terminal(
            session_id=session_id,
            command=step["command"],
            args=step.get("args"),
            env=variables,
            output_byte_limit=step.get("limit"),
        )
        terminal_id = created.terminal_id
        if step.get("kill"):
            await self._client.kill_terminal(session_id=session_id, terminal_id=terminal_id)
        ended = await self._client.wait_for_terminal_exit(session_id=session_id, terminal_id=terminal_id)
        shown = await self._client.terminal_output(session_id=session_id, terminal_id=terminal_id)
        facts = [ended.exit_code, ended.signal, shown.output, shown.truncated]
        if step.get("call"):
            content = [{"type": "terminal", "terminalId": terminal_id}]
            update = {"sessionUpdate": "tool_call", "toolCallId": "t", "title": "Run", "content": content}
            await self._do(session_id, {"do": "update", "updates": [update]})
        await self._client.release_terminal(session_id=session_id, terminal_id=terminal_id)
        await self._say(session_id, json.dumps(facts))

    async def _say(self, session_id: str, text: str) -> None:
        await self._client.session_update(session_id, update_agent_message_text(text))

    async def _reopen(self, cwd: str, session_id: str) -> None:
        self._cwd = Path(cwd)
        if not self._memory(session_id).exists():
            raise RequestError.resource_not_found(session_id)
        self._said = json.loads(self._memory(session_id).read_text())

    def _memory(self, session_id: str) -> Path:
        return self._cwd.parent / f"{session_id}.json"

    def _offers(self) -> dict[str, Any]:
        offers: dict[str, Any] = {}
        if self._arguments.modes:
            modes = [SessionMode(id="ask", name="Ask"), SessionMode(id="code", name="Write code")]
            offers["modes"] = SessionModeState(current_mode_id="ask", available_modes=modes)
        if self._arguments.models:
            values = [SessionConfigSelectOption(value=value, name=value.title()) for value in ("small", "large")]
            offers["config_options"] = [
                SessionConfigOptionSelect(
                    id="m", name="Model", category="model", type="select", current_value="small", options=values
                )
            ]
        return offers


def main() -> None:
    """Serve stdin and stdout."""
    parser = argparse.ArgumentParser()
    for name in ("load", "break-load", "resume", "modes", "models", "login", "no-stop"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--version", type=int, default=PROTOCOL_VERSION)
    asyncio.run(run_agent(ObedientAgent(parser.parse_args()), use_unstable_protocol=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
