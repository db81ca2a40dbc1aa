"""The `python` agent: a function of one's own, `package.module:name`, called once a turn.

Async functions run on the event loop. Blocking ones get a daemon thread each, so that one which never returns
holds up neither other turns nor the end of the process.
"""

import asyncio
import contextvars
import inspect
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from importlib import import_module
from typing import Annotated, Any, TypeVar

import msgspec

from runtime_service.agents.base import (
    Agent,
    AgentError,
    AgentOutput,
    AgentSays,
    Answer,
    HistoryMessage,
    Log,
    Message,
    Option,
    TurnContext,
)

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_OUTPUTS_AHEAD = 64
"""How many outputs a blocking agent may be ahead of the one who reads them."""


class PythonOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`entrypoint`: the function; `repeatable`: whether a turn whose runtime was lost may be begun again."""

    entrypoint: Annotated[str, msgspec.Meta(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]
    repeatable: bool = True


class BlockingTurnContext(TurnContext):
    """What a blocking agent gets: a `TurnContext` that can be asked without `await`.

    Only in the agent's own thread: the event loop would wait forever.
    """

    __slots__ = ("_loop",)

    def __init__(self, turn: TurnContext, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            input=turn.input,
            metadata=turn.metadata,
            run_id=turn.run_id,
            thread_id=turn.thread_id,
            server_id=turn.server_id,
            turn=turn.turn,
            attempt=turn.attempt,
            surroundings=turn.surroundings,
        )
        self._loop = loop

    def blocking_history(self) -> list[HistoryMessage]:
        """Return what `history()` does."""
        return self._wait_for(self.history())

    def blocking_latest_log(self, log_type: str) -> Log | None:
        """Return what `latest_log()` does."""
        return self._wait_for(self.latest_log(log_type))

    def blocking_ask(
        self,
        question: str,
        options: Sequence[Option] = (),
        *,
        tool_kind: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Ask as `ask()` does."""
        return self._wait_for(self.ask(question, options, tool_kind=tool_kind, metadata=metadata))

    def _wait_for(self, asked: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result()


class PythonAgent(Agent):
    """Calls the entrypoint with the turn, and says what it yields or returns.

    A plain string is a `Message`; a tuple is several outputs at once, which costs less than one by one.
    The entrypoint is an async generator function, an async function, a generator function or a plain one.
    It is imported when the agent is made; ValueError then says what is wrong with it.
    """

    Options = PythonOptions

    def __init__(self, options: PythonOptions) -> None:
        self.repeatable = options.repeatable
        self._entrypoint = options.entrypoint
        self._function = _load(options.entrypoint)
        # An object with an async `__call__` is no async function itself.
        self._called = self._function if inspect.isroutine(self._function) else type(self._function).__call__

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentSays]:
        """Say what the entrypoint says. A cancelled blocking one is closed at its next `yield`."""
        try:
            async with aclosing(self._call(turn)) as outputs:
                async for output in outputs:
                    yield self._checked(output)
        except SystemExit as error:
            # Let through, it would end the whole service.
            raise AgentError(f"The agent {self._entrypoint} called sys.exit().") from error

    async def _call(self, turn: TurnContext) -> AsyncGenerator[object]:
        if _is(inspect.isasyncgenfunction, self._function, self._called):
            async with aclosing(self._function(turn)) as outputs:
                async for output in outputs:
                    yield output
        elif _is(inspect.iscoroutinefunction, self._function, self._called):
            if (output := await self._function(turn)) is not None:
                yield output
        else:
            call = _BlockingCall(self._entrypoint, self._function, turn)
            async with aclosing(call.outputs()) as outputs:
                async for output in outputs:
                    yield output

    def _checked(self, said: object) -> AgentSays:
        return tuple(self._output(each) for each in said) if isinstance(said, tuple) else self._output(said)

    def _output(self, output: object) -> AgentOutput:
        if isinstance(output, str):
            return Message(output)
        if isinstance(output, AgentOutput):
            return output
        raise AgentError(
            f"The agent {self._entrypoint} said a {type(output).__name__}; may say strings, or the Message, "
            "Delta, Log, ToolCall and ToolResult of runtime_service.agents, or tuples of these.",
            "AGENT_OUTPUT_INVALID",
        )


class _Stopped(Exception):
    """Unwinds the thread of a call whose turn has ended."""


class _BlockingCall:
    """One call of a blocking function in a thread of its own, at most `_OUTPUTS_AHEAD` ahead of its reader.

    The thread appends, then wakes; the loop lets itself be woken again, then takes all there is: nothing is
    overlooked, and one wake-up serves many outputs.
    """

    def __init__(self, name: str, function: Callable[[TurnContext], object], turn: TurnContext) -> None:
        self._name = name
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._turn = BlockingTurnContext(turn, self._loop)
        self._outputs: deque[object] = deque()
        self._room = threading.Semaphore(_OUTPUTS_AHEAD)
        self._ready = asyncio.Event()
        self._woken = False
        self._stopped = False
        self._ended = False
        self._failure: BaseException | None = None

    async def outputs(self) -> AsyncGenerator[object]:
        """Start the thread and hand on what it says; raise what it raised. Closing this stops the thread."""
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._work,), name=f"agent-{self._name}", daemon=True).start()
        try:
            ended = False
            while not ended:
                await self._ready.wait()
                self._ready.clear()
                self._woken = False
                ended = self._ended
                while self._outputs:
                    output = self._outputs.popleft()
                    self._room.release()
                    yield output
            if self._failure is not None:
                raise self._failure
        finally:
            self._stopped = True
            self._room.release()

    def _work(self) -> None:
        try:
            result = self._function(self._turn)
            if isinstance(result, Generator):
                with closing(result):
                    for output in result:
                        self._put(output)
            elif result is not None:
                self._put(result)
        except _Stopped:
            pass
        except BaseException as error:  # raised again where the turn is executed
            self._failure = error
            if self._stopped:
                log.warning("the agent %s failed after its turn had ended", self._name, exc_info=error)
        self._ended = True
        self._wake()

    def _put(self, output: object) -> None:
        self._room.acquire()
        if self._stopped:
            raise _Stopped
        self._outputs.append(output)
        self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._ready.set)


def _is(kind: Callable[[object], bool], function: object, called: object) -> bool:
    return kind(function) or kind(called)


def _load(entrypoint: str) -> Callable[[TurnContext], Any]:
    """Import the function. Raises ValueError in words for the one who wrote servers.toml."""
    module_name, _, name = entrypoint.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"entrypoint {entrypoint!r}: there is no module {error.name!r}, "
                "neither installed nor beside servers.toml"
            ) from error
        raise ValueError(
            f"entrypoint {entrypoint!r}: {module_name} needs {error.name!r}, which is not installed"
        ) from error
    except (Exception, SystemExit) as error:  # importing it runs code of others
        raise ValueError(
            f"entrypoint {entrypoint!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    try:
        function = getattr(module, name)
    except AttributeError as error:
        raise ValueError(f"entrypoint {entrypoint!r}: the module {module_name} has no {name!r}") from error
    if not callable(function):
        raise ValueError(f"entrypoint {entrypoint!r} is no function but a {type(function).__name__}")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ValueError(
            f"entrypoint {entrypoint!r} must be callable with one argument, the TurnContext: {error}"
        ) from error
    except ValueError:  # a built-in without a signature: the first turn will tell
        pass
    loaded: Callable[[TurnContext], Any] = function
    return loaded
