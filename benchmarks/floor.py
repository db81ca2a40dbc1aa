"""The floor: the least that a gateway and a service in Python can do for a run, as two processes.

`serve_grpc` answers one server-streaming call with one message of ten events; `serve_http` makes one such
call a POST and writes the events as hand-made JSON. No key, no validation, no store: what the product does
beyond that is what the ratio shows.

    python -m benchmarks.floor grpc READY_FILE
    python -m benchmarks.floor http READY_FILE GRPC_TARGET
"""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
from aiohttp import web

from benchmarks.environment import EVENTS, TEXT, run_loop
from benchmarks.processes import Server, read_when_written, running
from protos.acp.runs.v1 import run_pb2, run_service_pb2, run_service_pb2_grpc

FLOOR_PATH: Final = "/runs"


class _Service(run_service_pb2_grpc.RunServiceServicer):
    async def StartRun(
        self, request: run_service_pb2.StartRunRequest, context: object
    ) -> AsyncGenerator[run_service_pb2.StartRunResponse]:
        text = request.input
        events = [run_pb2.RunEvent(content=text) for _ in range(EVENTS)]
        yield run_service_pb2.StartRunResponse(update=run_service_pb2.RunUpdate(events=events))


async def serve_grpc(ready: Path) -> None:
    """A bare grpc.aio server, until SIGTERM."""
    server = grpc.aio.server()
    service = _Service()  # type: ignore[abstract]  # the one method is all that the floor has
    run_service_pb2_grpc.add_RunServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _announce(ready, port)
    await _terminated()
    await server.stop(None)


async def serve_http(ready: Path, grpc_target: str) -> None:
    """A bare aiohttp server before one bare channel, until SIGTERM."""
    async with grpc.aio.insecure_channel(grpc_target) as channel:
        stub = run_service_pb2_grpc.RunServiceStub(channel)
        message = run_service_pb2.StartRunRequest(input=TEXT)

        async def start(request: web.Request) -> web.Response:
            await request.read()
            events: list[str] = []
            async for answer in stub.StartRun(message):
                events += [f'{{"content":"{event.content}"}}' for event in answer.update.events]
            body = f'{{"events":[{",".join(events)}]}}'
            return web.Response(status=201, body=body.encode(), content_type="application/json")

        app = web.Application()
        app.router.add_post(FLOOR_PATH, start)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        _announce(ready, runner.addresses[0][1])
        await _terminated()
        await runner.cleanup()


@contextmanager
def floor(directory: Path) -> Iterator[Server]:
    """Both processes, ready; `directory` takes their logs."""
    grpc_ready, http_ready = directory / "floor-grpc.json", directory / "floor-http.json"
    grpc_log, http_log = directory / "floor-grpc.log", directory / "floor-http.log"
    module = ["-m", "benchmarks.floor"]
    with running([*module, "grpc", str(grpc_ready)], log=grpc_log) as service:
        target = f"127.0.0.1:{read_when_written(grpc_ready, service, grpc_log)['port']}"
        with running([*module, "http", str(http_ready), target], log=http_log) as gateway:
            port = read_when_written(http_ready, gateway, http_log)["port"]
            yield Server("127.0.0.1", port, (gateway.pid, service.pid), grpc_target=target)


def _announce(ready: Path, port: int) -> None:
    ready.write_text(json.dumps({"port": port}))


async def _terminated() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, event.set)
    await event.wait()


if __name__ == "__main__":
    if sys.argv[1] == "grpc":
        run_loop(serve_grpc(Path(sys.argv[2])))
    else:
        run_loop(serve_http(Path(sys.argv[2]), sys.argv[3]))
