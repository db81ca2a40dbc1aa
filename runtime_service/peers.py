"""The other runtime services over the same store, asked on behalf of callers who came here.

What they execute they know first: each piece of text, and what an agent has said that is not stored yet. Nothing
depends on their answers: whoever cannot be reached is done without, because the store is the truth.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeAlias

import grpc

from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service.convert import update_from
from runtime_service.live_run import Update
from runtime_service.runs import Run

RELAYED = "x-acp-relayed"
"""Metadata of a call that comes from another runtime service: it is not passed on once more."""

_Metadata: TypeAlias = tuple[tuple[str, str], ...]
_CANCEL_SECONDS = 3.0
_FOLLOW_SECONDS = 600.0
_MAX_CHANNELS = 64


class Peers:
    """Channels to other runtime services, by address, each made when it is needed.

    `own` is the address of this one. A service that was there before and is lost is not to be asked any more.
    """

    def __init__(self, own: str, service_token: str, options: tuple[tuple[str, int], ...]) -> None:
        self._own = own
        self._token = service_token
        self._options = options
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def follow(self, address: str, run: Run, after: int) -> AsyncGenerator[Update]:
        """Yield what the service at `address` says of a run; ends when it has no more to say, also by an error."""
        if address == self._own:
            return
        request = rpc.WatchRunRequest(run_id=run.id, after_sequence=after)
        request.server.id = run.server_id
        request.stream.deltas = True
        call = self._stub(address).WatchRun(
            request,
            metadata=self._metadata(run.organization),
            timeout=_FOLLOW_SECONDS,
        )
        try:
            async for response in call:
                yield update_from(response.update, run)
        except grpc.aio.AioRpcError:
            return
        finally:
            call.cancel()

    async def cancel(
        self, address: str, organization: str, request: rpc.CancelRunRequest
    ) -> rpc.CancelRunResponse | None:
        """Have the service at `address` cancel a run; None when it does not."""
        if address == self._own:
            return None
        try:
            answer: rpc.CancelRunResponse = await self._stub(address).CancelRun(
                request, metadata=self._metadata(organization), timeout=_CANCEL_SECONDS
            )
        except grpc.aio.AioRpcError:
            return None
        return answer

    async def close(self) -> None:
        """Close every channel."""
        for closing in self._closing:
            closing.cancel()
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing, return_exceptions=True)

    def _stub(self, address: str) -> run_service_pb2_grpc.RunServiceStub:
        channel = self._channels.pop(address, None)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=self._options)
        self._channels[address] = channel  # the one used last is the last
        if len(self._channels) > _MAX_CHANNELS:
            oldest = self._channels.pop(next(iter(self._channels)))
            closing = asyncio.create_task(oldest.close(_FOLLOW_SECONDS))  # whoever follows by it goes on
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return run_service_pb2_grpc.RunServiceStub(channel)

    def _metadata(self, organization: str) -> _Metadata:
        return (("authorization", f"Bearer {self._token}"), ("x-acp-organization", organization), (RELAYED, "1"))
