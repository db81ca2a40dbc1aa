"""RunService as gRPC calls: the caller's organization out of the call, the answer into it."""

from typing import Any, TypeAlias

import grpc

from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service.errors import InvalidRequest
from runtime_service.operations import Operations, RunNews, Send
from runtime_service.peers import RELAYED
from runtime_service.session import Sessions

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Updates: TypeAlias = type[rpc.StartRunResponse] | type[rpc.ContinueRunResponse] | type[rpc.WatchRunResponse]


class RunService(run_service_pb2_grpc.RunServiceServicer):
    """See run_service.proto. The plain RPCs and `Session` are two doors to the same operations."""

    def __init__(self, operations: Operations, sessions: Sessions) -> None:
        self._operations = operations
        self._sessions = sessions

    # The streaming ones write to their context, which costs less than being iterated over.

    async def StartRun(self, request: rpc.StartRunRequest, context: _Context) -> None:  # type: ignore[override]
        """Accept a run; in mode sync follow its first turn."""
        await self._operations.start_run(_organization(context), request, _sender(context, rpc.StartRunResponse))

    async def ContinueRun(  # type: ignore[override]
        self, request: rpc.ContinueRunRequest, context: _Context
    ) -> None:
        """Open a run's next turn; in mode sync follow it."""
        await self._operations.continue_run(_organization(context), request, _sender(context, rpc.ContinueRunResponse))

    async def WatchRun(self, request: rpc.WatchRunRequest, context: _Context) -> None:  # type: ignore[override]
        """Replay after a sequence, then follow."""
        send = _sender(context, rpc.WatchRunResponse)
        await self._operations.watch_run(_organization(context), request, send, relayed=_is_relayed(context))

    async def GetRun(self, request: rpc.GetRunRequest, context: _Context) -> rpc.GetRunResponse:
        """Return one run."""
        return await self._operations.get_run(_organization(context), request)

    async def ListRuns(self, request: rpc.ListRunsRequest, context: _Context) -> rpc.ListRunsResponse:
        """Return a page of runs, newest first."""
        return await self._operations.list_runs(_organization(context), request)

    async def ListRunEvents(self, request: rpc.ListRunEventsRequest, context: _Context) -> rpc.ListRunEventsResponse:
        """Return a page of a run's log."""
        return await self._operations.list_run_events(_organization(context), request)

    async def CancelRun(self, request: rpc.CancelRunRequest, context: _Context) -> rpc.CancelRunResponse:
        """Cancel every open turn of a run."""
        return await self._operations.cancel_run(_organization(context), request, relayed=_is_relayed(context))

    async def Session(self, _: object, context: _Context) -> None:  # type: ignore[override]
        """Many calls over one stream."""
        await self._sessions.serve(context)


def _sender(context: _Context, response_type: _Updates) -> Send:
    """Return what writes each update in a response of its own."""

    async def send(news: RunNews) -> None:
        response = response_type()
        news.fill(response.update)
        await context.write(response)

    return send


def _organization(context: _Context) -> str:
    if (organization := _metadata(context, "x-acp-organization")) is None:
        raise InvalidRequest("x-acp-organization", "must be set in the metadata of the call")
    return organization


def _is_relayed(context: _Context) -> bool:
    return _metadata(context, RELAYED) is not None


def _metadata(context: _Context, name: str) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None
