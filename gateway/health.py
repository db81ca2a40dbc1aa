"""What a replica says of itself (grpc.health.v1): whether it serves, and whether it says anything at all.

Knows nothing of calls.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2

log = logging.getLogger(__name__)

HealthStream: TypeAlias = "grpc.aio.UnaryStreamCall[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]"

# A replica that serves tells when it does no more. One that hangs tells nothing; so it is asked anew this often, and
# has so long to answer.
_ASK_SECONDS = 3.0
_ANSWER_SECONDS = 5.0
# One that does not serve is asked this often; it may be about to stop, which a stream that is open would hold up.
_NOT_SERVING_SECONDS = 0.25
_BROKEN_SECONDS = 0.05


class HealthWatch:
    """Keeps `is_serving` and `is_silent` true, and calls `on_change` when they change.

    A replica that is silent does not serve; nor does one that cannot be reached, which is not silent.
    """

    def __init__(self, name: str, open_stream: Callable[[], HealthStream], on_change: Callable[[], None]) -> None:
        self._name = name
        self._open_stream = open_stream
        self._on_change = on_change
        self.is_serving = False
        self.is_silent = False
        self._life: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ask, and go on asking."""
        self._life = asyncio.create_task(self._live())

    async def close(self) -> None:
        """Ask no more."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])

    async def _live(self) -> None:
        while True:
            stream = self._open_stream()
            answered = False
            pause = _NOT_SERVING_SECONDS
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    self._hear(await stream.read())
                answered = True
                async with asyncio.timeout(_ASK_SECONDS):
                    while self.is_serving:
                        self._hear(await stream.read())
            except TimeoutError:
                if not answered:
                    self._set(serving=False, silent=self.is_serving or self.is_silent)
            except grpc.aio.AioRpcError:
                self._set(serving=False, silent=False)
                pause = _BROKEN_SECONDS
            except Exception:
                log.exception("the health of %s cannot be followed; it is asked again", self._name)
                self._set(serving=False, silent=False)
            finally:
                stream.cancel()
            if not self.is_serving:
                await asyncio.sleep(pause)

    def _hear(self, answer: object) -> None:
        """Take in what the replica says; an end of the stream says that it serves no more."""
        says_so = (
            isinstance(answer, health_pb2.HealthCheckResponse)
            and answer.status == health_pb2.HealthCheckResponse.SERVING
        )
        self._set(serving=says_so, silent=False)

    def _set(self, *, serving: bool, silent: bool) -> None:
        if (serving, silent) != (self.is_serving, self.is_silent):
            self.is_serving, self.is_silent = serving, silent
            log.info("%s %s", self._name, "serves" if serving else "says nothing" if silent else "does not serve")
            self._on_change()
