"""Remote agents for the tests: A2A servers made of the official library's own server classes, over real HTTP."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvicorn
from a2a.helpers.proto_helpers import new_task_from_user_message, new_text_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes, create_rest_routes
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, Message
from starlette.applications import Starlette
from starlette.routing import BaseRoute

Script = Callable[["Remote", RequestContext, TaskUpdater], Awaitable[None]]


class Remote(AgentExecutor):
    """A remote agent that does as a test says: `script`, once for each message.

    `heard` are the messages; `done` are the tasks whose script has ended, `cancelled` those whose cancel came, by id.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self.heard: list[Message] = []
        self.done: list[str] = []
        self.cancelled: list[str] = []
        self.queue: EventQueue | None = None

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Do as the test says."""
        assert context.message is not None
        assert context.task_id is not None
        assert context.context_id is not None
        self.heard.append(context.message)
        self.queue = event_queue
        await self._script(self, context, TaskUpdater(event_queue, context.task_id, context.context_id))
        self.done.append(context.task_id)

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Note the cancel, and confirm it."""
        assert context.task_id is not None
        assert context.context_id is not None
        self.cancelled.append(context.task_id)
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()

    async def begin_task(self, context: RequestContext) -> None:
        """Make the message a task, unless it belongs to one."""
        assert self.queue is not None
        assert context.message is not None
        if context.current_task is None:
            task = new_task_from_user_message(context.message)
            task.id, task.context_id = str(context.task_id), str(context.context_id)
            await self.queue.enqueue_event(task)

    async def say_only(self, text: str, context: RequestContext) -> None:
        """Answer with a message, without a task."""
        assert self.queue is not None
        await self.queue.enqueue_event(new_text_message(text, context_id=context.context_id))


def card_at(url: str, *, streaming: bool, binding: str, version: str) -> AgentCard:
    """The card of an agent at this address."""
    return AgentCard(
        name="remote",
        description="does as a test says",
        version="1",
        capabilities=AgentCapabilities(streaming=streaming),
        supported_interfaces=[AgentInterface(url=url, protocol_binding=binding, protocol_version=version)],
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
    )


@asynccontextmanager
async def serving(
    remote: Remote, *, streaming: bool = True, binding: str = "JSONRPC", version: str = "1.0"
) -> AsyncIterator[str]:
    """Serve the agent; gives its base URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    card = card_at(f"{url}/a2a", streaming=streaming, binding=binding, version=version)
    handler = DefaultRequestHandler(remote, InMemoryTaskStore(), card)
    if binding == "JSONRPC":
        calls: list[BaseRoute] = [*create_jsonrpc_routes(handler, "/a2a", enable_v0_3_compat=True)]
    else:
        calls = [*create_rest_routes(handler, path_prefix="/a2a", enable_v0_3_compat=True)]
    app = Starlette(routes=[*create_agent_card_routes(card), *calls])
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    try:
        yield url
    finally:
        server.should_exit = True
        await serving
        await handler.aclose()
        listening.close()
