"""What the two programs say of themselves, and to each other's clients when one of them stops."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import ClientConnectionError
from prometheus_client.parser import text_string_to_metric_families

from gateway.app import _PARTS
from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from tests.integration.stack import GATES, Stack, runs, serving, until
from tests.integration.test_gateway import CALLER, reason_of
from tests.integration.test_gateway_events import STREAMED, check_stream, events_of
from tests.support import eventually, run_async


async def _is_ready(stack: Stack) -> bool:
    return (await stack.call("GET", "/health", key="")).status == 200


def test_runtime_that_is_down_is_told(tmp_path: Path) -> None:
    """Every operation is a 503 RUNTIME_UNAVAILABLE with Retry-After; once the runtime is back all is as it was."""

    async def main() -> None:
        async with serving(tmp_path, reconnect_seconds=0.2) as stack:
            started = await stack.start()
            path = started.headers["Location"]
            await stack.stop_runtime()
            try:
                for method, where, body in (
                    ("POST", runs("echo"), {"content": "x"}),
                    ("GET", runs("echo"), None),
                    ("GET", path, None),
                    ("POST", path + "/input", {"content": "x"}),
                    ("GET", path + "/events", None),
                    ("POST", path + "/cancel", None),
                ):
                    for accept in ("application/json", "text/event-stream"):
                        answer = await stack.call(method, where, body, headers={"Accept": accept})
                        assert answer.status == 503
                        assert answer.json["code"] == "RUNTIME_UNAVAILABLE"
                        assert answer.json["error"] == "Service Unavailable"
                        assert int(answer.headers["Retry-After"]) >= 1
                health = await stack.call("GET", "/health", key="")
                assert (health.status, health.json) == (503, {"status": "unavailable", "ready": False})
                live = await stack.call("GET", "/health/live", key="")
                assert (live.status, live.json) == (200, {"status": "ok"})
            finally:
                await stack.start_runtime()
            await until(lambda: _is_ready(stack))
            assert (await stack.call("GET", path)).run == started.run
            assert [run["id"] for run in (await stack.call("GET", runs("echo"))).json["runs"]] == [started.run["id"]]
            assert (await stack.start()).status == 201

    run_async(main())


def test_requests_wait_out_a_short_restart(tmp_path: Path) -> None:
    """A request that comes while the runtime is restarted is answered as soon as that is back."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            await stack.start()
            await stack.stop_runtime()
            waiting = asyncio.create_task(stack.start())
            await until(lambda: _is_unready(stack))
            await stack.start_runtime()
            assert (await waiting).status == 201

    run_async(main())


async def _is_unready(stack: Stack) -> bool:
    return not await _is_ready(stack)


@pytest.mark.parametrize("accept", STREAMED)
def test_stream_tells_that_the_runtime_stops(accept: str, tmp_path: Path) -> None:
    """When the runtime stops for long the stream's last frame is a stream.error; what was stored can be read on."""
    name = f"runtime stops {accept}"

    async def main() -> None:
        async with serving(tmp_path, reconnect_seconds=0.1) as stack:
            async with stack.stream("POST", runs("gated"), {"content": name}, accept=accept) as stream:
                frames = await stream.until(lambda frame: frame.document.get("event", {}).get("sequence") == 2)
                path = stream.response.headers["Location"]
                await stack.stop_runtime()
                frames += await stream.rest()
            check_stream(frames)
            end = frames[-1].document
            assert end.keys() == {"type", "error", "message", "code"}
            assert (end["type"], end["code"]) == ("stream.error", "DRAINING")
            GATES[name].open.set()
            await stack.start_runtime()
            async with stack.stream("GET", f"{path}/events?after=2", accept=accept) as stream:
                rest = await stream.rest()
            check_stream(rest)
            assert rest[-1].document["run"]["status"] == "completed"
            log = (await stack.call("GET", path + "/events")).events
            assert log == [*events_of(frames), *events_of(rest)]

    run_async(main())


def test_code_in_the_middle_is_the_reason_of_grpc(tmp_path: Path) -> None:
    """A gRPC caller who follows the run is told the same reason as the reader of the stream."""

    async def main() -> None:
        async with (
            serving(tmp_path, reconnect_seconds=0.1) as stack,
            grpc.aio.insecure_channel(stack.target) as channel,
        ):
            path = await stack.start_async("gated", "both doors")
            request = rpc.WatchRunRequest(server=rpc.ServerReference(id="gated"), run_id=path.rpartition("/")[2])
            call: Any = run_service_pb2_grpc.RunServiceStub(channel).WatchRun(request, metadata=CALLER)
            await call.read()
            async with stack.stream("GET", path + "/events") as stream:
                await stream.until(lambda frame: frame.type == "run.event")
                await stack.stop_runtime()
                frames = await stream.rest()

            async def read_to_the_end() -> None:
                while await call.read() is not grpc.aio.EOF:
                    pass

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end()
            assert frames[-1].document["code"] == reason_of(caught.value) == "DRAINING"
            await stack.start_runtime()

    run_async(main())


@pytest.mark.parametrize("accept", STREAMED)
def test_stream_tells_that_the_gateway_stops(accept: str, tmp_path: Path) -> None:
    """When the gateway stops the last frame is a stream.error DRAINING, at once; the run goes on."""
    name = f"gateway stops {accept}"

    async def main() -> None:
        async with serving(tmp_path) as stack:
            async with stack.stream("POST", runs("gated"), {"content": name}, accept=accept) as stream:
                frames = await stream.until(lambda frame: frame.document.get("event", {}).get("sequence") == 2)
                stopping = asyncio.create_task(stack.gateway.__aexit__(None, None, None))
                frames += await stream.rest()
            check_stream(frames)
            end = frames[-1].document
            assert (end["type"], end["code"]) == ("stream.error", "DRAINING")
            await stopping
            with pytest.raises(ClientConnectionError):
                await stack.start()
            assert not GATES[name].left.is_set()

    run_async(main())


def test_sync_start_is_answered_while_the_gateway_stops(tmp_path: Path) -> None:
    """A request under way has the drain time to be answered."""

    async def main() -> None:
        async with serving(tmp_path, drain_seconds=10) as stack:
            waiting = asyncio.create_task(stack.start("gated", "drain"))
            await GATES["drain"].reached.wait()
            stopping = asyncio.create_task(stack.gateway.__aexit__(None, None, None))
            GATES["drain"].open.set()
            answer = await waiting
            assert (answer.status, answer.run["status"]) == (201, "completed")
            await stopping

    run_async(main())


def test_gateway_that_stops_says_so_first(tmp_path: Path) -> None:
    """`/health` is 503 at once, while requests are taken as ever; each answer ends its connection, and says so."""

    async def main() -> None:
        async with serving(tmp_path, drain_delay_seconds=0.5) as stack:
            stopping = asyncio.create_task(stack.gateway.__aexit__(None, None, None))
            await asyncio.sleep(0)
            health = await stack.call("GET", "/health", key="")
            assert (health.status, health.json, health.headers["Connection"]) == (
                503,
                {"status": "unavailable", "ready": False},
                "close",
            )
            assert (await stack.call("GET", "/health/live", key="")).status == 200
            started = await stack.start()
            assert (started.status, started.headers["Connection"]) == (201, "close")
            async with stack.stream("GET", started.headers["Location"] + "/events") as stream:
                assert (await stream.rest())[-1].type == "stream.completed"
                assert stream.response.headers["Connection"] == "close"
            assert not stopping.done()
            await stopping
            with pytest.raises(ClientConnectionError):
                await stack.start()

    run_async(main())


def test_wait_is_cut_short_when_the_gateway_stops(tmp_path: Path) -> None:
    """When the drain time is over whoever waits is told what there is: the 202 of async, a page without news."""

    async def main() -> None:
        async with serving(tmp_path, drain_seconds=0.1) as stack:
            path = await stack.start_async("gated", "stop polled")
            busy = await stack.start_async("gated", "stop busy")
            await GATES["stop polled"].reached.wait()
            asking = [
                asyncio.create_task(stack.start("gated", "stop started")),
                asyncio.create_task(stack.call("GET", path + "/events?after=2&wait=30")),
            ]
            await GATES["stop started"].reached.wait()
            asking.append(asyncio.create_task(stack.call("POST", busy + "/input", {"content": "stop continued"})))
            await until(lambda: _has_turn(stack, busy, 2))
            await stack.gateway.__aexit__(None, None, None)
            started, poll, continued = await asyncio.gather(*asking)
            assert (started.status, started.run["status"]) == (202, "running")
            assert started.headers["Location"]
            assert (poll.status, poll.events) == (200, [])
            assert (continued.status, continued.run["status"]) == (202, "queued")
            for name in ("stop polled", "stop busy", "stop started"):
                assert not GATES[name].left.is_set()

    run_async(main())


def test_wait_that_begins_when_the_gateway_is_about_to_be_gone_is_cut_short(tmp_path: Path) -> None:
    """A body may be so slow that its request begins behind the drain time: it is answered like those that waited."""
    body = json.dumps({"content": "stop slow body"}).encode()

    async def main() -> None:
        async with serving(tmp_path, drain_seconds=0.1) as stack:
            waiting = asyncio.create_task(stack.start("gated", "stop before it"))
            await GATES["stop before it"].reached.wait()
            url = stack.url(runs("gated"))
            reader, writer = await asyncio.open_connection(url.host, url.port)
            lines = [f"POST {url.raw_path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
            lines += ["Content-Type: application/json", f"Authorization: Bearer {stack.key}", "", ""]
            writer.write("\r\n".join(lines).encode() + body[:1])
            await stack.call("GET", "/health")  # by now the head is known
            stopping = asyncio.create_task(stack.gateway.__aexit__(None, None, None))
            assert (await waiting).status == 202  # the drain time is over
            writer.write(body[1:])
            assert (await reader.read()).startswith(b"HTTP/1.1 202 ")
            writer.close()
            await stopping

    run_async(main())


@pytest.mark.parametrize("operation", ["start", "input", "events"])
def test_client_that_leaves_its_wait_makes_room(operation: str, tmp_path: Path) -> None:
    """What it has asked for goes on; what was kept for its answer is free for others at once."""
    name = f"left at {operation}"

    async def main() -> None:
        async with serving(tmp_path) as stack:
            replicas = stack.gateway._runner.app[_PARTS].replicas
            path = await stack.start_async("gated", name)
            await GATES[name].reached.wait()
            method, target, content = {
                "start": ("POST", runs("gated"), name + " too"),
                "input": ("POST", path + "/input", name + " too"),
                "events": ("GET", path + "/events?after=2&wait=50", None),
            }[operation]
            body = b"" if content is None else json.dumps({"content": content}).encode()
            url = stack.url(target)
            _, writer = await asyncio.open_connection(url.host, url.port)
            lines = [f"{method} {url.raw_path_qs} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
            lines += ["Content-Type: application/json", f"Authorization: Bearer {stack.key}", "", ""]
            writer.write("\r\n".join(lines).encode() + body)
            await eventually(lambda: any(replicas._calls()))
            writer.close()
            await eventually(lambda: not any(replicas._calls()))
            assert not GATES[name].left.is_set()
            GATES[name].open.set()
            GATES[name + " too"].open.set()
            if operation != "events":
                latest = (await stack.call("GET", runs("gated") + "?limit=1")).json["runs"][0]
                path = f"{runs('gated')}/{latest['id']}"
                assert (await stack.until_status(path))["input"] == content
            assert (await stack.until_status(path))["status"] == "completed"

    run_async(main())


async def _has_turn(stack: Stack, path: str, turn: int) -> bool:
    return bool((await stack.call("GET", path)).json["thread"]["messageCount"] > turn)


@pytest.mark.parametrize("accept", STREAMED)
def test_stream_that_comes_late_begins(accept: str, tmp_path: Path) -> None:
    """One that is asked for on a connection from before the door was closed gets what there is, then DRAINING."""
    name = f"late stream {accept}"
    body = json.dumps({"content": name}).encode()

    async def main() -> None:
        async with serving(tmp_path) as stack:
            url = stack.url(runs("gated"))
            reader, writer = await asyncio.open_connection(url.host, url.port)
            await stack.call("GET", "/health")  # by now the connection is known
            stopping = asyncio.create_task(stack.gateway.__aexit__(None, None, None))
            await until(lambda: _is_refused(url.port))
            lines = [f"POST {url.raw_path} HTTP/1.1", "Host: x", f"Accept: {accept}", f"Content-Length: {len(body)}"]
            lines += ["Content-Type: application/json", f"Authorization: Bearer {stack.key}", "", ""]
            writer.write("\r\n".join(lines).encode() + body)
            head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert head.startswith(b"HTTP/1.1 201 ")
            assert b"Connection: close" in head
            assert b'"type":"run.updated"' in rest
            assert b'"code":"DRAINING"' in rest
            await stopping

    run_async(main())


async def _is_refused(port: int | None) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


def test_sync_start_tells_that_the_runtime_stops(tmp_path: Path) -> None:
    """Whoever waits for a turn when the runtime stops for long gets 503 DRAINING; the run is executed afterwards."""

    async def main() -> None:
        async with serving(tmp_path, reconnect_seconds=0.1) as stack:
            waiting = asyncio.create_task(stack.start("gated", "sync drain"))
            await GATES["sync drain"].reached.wait()
            await stack.stop_runtime()
            answer = await waiting
            assert (answer.status, answer.json["code"]) == (503, "DRAINING")
            assert answer.headers["Retry-After"]
            GATES["sync drain"].open.set()
            await stack.start_runtime()
            run = (await stack.call("GET", runs("gated"))).json["runs"][0]
            run = await stack.until_status(f"{runs('gated')}/{run['id']}")
            assert (run["status"], run["output"]) == ("completed", "sync drain")

    run_async(main())


# -- Metrics -------------------------------------------------------------------------------------------


def test_metrics_count_requests_runs_and_streams(tmp_path: Path) -> None:
    """Prometheus' text format; requests by route and status, latency, open streams, runs by status; bounded labels."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = (await stack.start()).headers["Location"]
            await stack.start("failing")
            await stack.call("GET", path)
            await stack.call("GET", path + "x")
            await stack.call("GET", "/v1/nowhere/at/all")
            await stack.call("PUT", runs("echo"))
            async with stack.stream("POST", runs("gated"), {"content": "metrics"}) as stream:
                await stream.until(lambda frame: frame.type == "run.event")
                answer = await stack.call("GET", "/metrics", key="")
                GATES["metrics"].open.set()
                await stream.rest()
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            samples = {
                (sample.name, *sorted(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(answer.body.decode())
                for sample in family.samples
            }

            def value(name: str, **labels: str) -> Any:
                return samples.get((name, *sorted(labels.items())))

            start, get = "/v1/servers/{serverId}/runs", "/v1/servers/{serverId}/runs/{runId}"
            assert value("acp_gateway_requests_total", method="POST", route=start, status="201") == 2
            assert value("acp_gateway_requests_total", method="GET", route=get, status="200") == 1
            assert value("acp_gateway_requests_total", method="GET", route=get, status="404") == 1
            assert value("acp_gateway_requests_total", method="ANY", route="unmatched", status="404") == 1
            assert value("acp_gateway_requests_total", method="ANY", route="unmatched", status="405") == 1
            assert value("acp_gateway_request_duration_seconds_count", method="POST", route=start) == 2
            assert value("acp_gateway_request_duration_seconds_sum", method="POST", route=start) > 0
            assert value("acp_gateway_runs_total", operation="start", status="completed") == 1
            assert value("acp_gateway_runs_total", operation="start", status="failed") == 1
            assert value("acp_gateway_open_streams") == 1
            assert stack.key not in answer.body.decode()
            assert "run_" not in answer.body.decode()

    run_async(main())


# -- The HTTP layer of the whole gateway ---------------------------------------------------------------


def test_every_answer_has_a_request_id(tmp_path: Path) -> None:
    """The caller's X-Request-Id comes back where it is fit to be one, else a new one is made."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for path in ("/health", "/metrics", "/nowhere", runs("echo"), runs("echo") + "/run_x"):
                known = await stack.call("GET", path, headers={"X-Request-Id": "my-id.1:2_3"})
                assert known.headers["X-Request-Id"] == "my-id.1:2_3"
                unfit = await stack.call("GET", path, headers={"X-Request-Id": "a b"})
                assert unfit.headers["X-Request-Id"].startswith("req_")
            async with stack.stream("POST", runs("echo"), {"content": "x"}, X_Request_Id="mine") as stream:
                assert stream.response.headers.getall("X-Request-Id") == ["mine"]

    run_async(main())


def test_connections_past_the_limit_are_told(tmp_path: Path) -> None:
    """One connection too many gets the error document with 503 and Retry-After."""

    async def main() -> None:
        async with serving(tmp_path, max_connections=1) as stack:
            url = stack.url("/health")
            async with stack.stream("POST", runs("gated"), {"content": "only one"}) as stream:
                await stream.until(lambda frame: frame.type == "run.event")
                reader, writer = await asyncio.open_connection(url.host, url.port)
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                writer.close()
                GATES["only one"].open.set()
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: 1" in head
            assert b"X-Request-Id: req_" in head
            assert json.loads(body)["code"] == "TOO_MANY_CONNECTIONS"

    run_async(main())
