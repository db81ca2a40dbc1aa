"""`Idempotency-Key` on its way through the gateway: what the runtime service is asked, and what callers are told."""

import asyncio
from pathlib import Path

import grpc
import pytest

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from tests.integration.session_service import answer_to, error_to, fake_service, news, update_of
from tests.integration.stack import Answer, fronting
from tests.support import run_async

KEY = "order 66: retry"
FAMILIES = ("/v1/servers/echo/runs", "/v1/servers/echo/runtime/agent/runs", "/v1/agent-runtimes/echo/runs")
FORMS = ("application/json", "text/event-stream", "application/x-ndjson")
COMPLETED, RUNNING = pb.RUN_STATUS_COMPLETED, pb.RUN_STATUS_RUNNING


def request_of(
    command: rpc.SessionCommand,
) -> rpc.StartRunRequest | rpc.ContinueRunRequest | rpc.CancelRunRequest:
    """What a command asks for, which is one that may be repeated."""
    match command.WhichOneof("operation"):
        case "start_run":
            return command.start_run
        case "continue_run":
            return command.continue_run
        case "cancel_run":
            return command.cancel_run
        case other:
            raise AssertionError(f"{other} has no request id")


def turn(command: rpc.SessionCommand, *, replayed: bool, status: "pb.RunStatus.ValueType") -> rpc.SessionUpdate:
    """The whole answer to a start or continue."""
    update = news(1, 2, status=status)
    update.replayed = replayed
    return update_of(command, update, last=True)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_key_reaches_the_service_and_a_replay_is_told(family: str, replayed: bool, tmp_path: Path) -> None:
    """In every family, operation and form: the key is the request id, and a replay is answered as the first was."""

    async def main() -> None:
        async with fake_service() as service, fronting(tmp_path, service.target) as front:
            stream = await service.session()

            async def call(path: str, body: dict[str, str], accept: str) -> tuple[Answer, rpc.SessionCommand]:
                headers = {"Idempotency-Key": KEY, "Accept": accept}
                answering = asyncio.create_task(front.call("POST", path, body, headers=headers))
                operation = {"input": "continue_run", "cancel": "cancel_run"}.get(path.rpartition("/")[2], "start_run")
                command = await stream.take(operation)
                if operation == "cancel_run":
                    update = answer_to(command)
                    update.cancel_run.replayed = replayed
                else:
                    status = RUNNING if body.get("mode") == "async" else COMPLETED
                    update = turn(command, replayed=replayed, status=status)
                await stream.send(update)
                return await answering, command

            for accept in FORMS:
                for path, done in ((family, 201), (f"{family}/run_1/input", 200)):
                    for mode, status in (("sync", done), ("async", 202 if accept == FORMS[0] else done)):
                        answer, command = await call(path, {"content": "hello", "mode": mode}, accept)
                        assert answer.status == status
                        assert answer.headers["Location"] == f"{family}/run_1"
                        assert answer.headers["Content-Type"].startswith(accept)
                        assert answer.headers.get("Idempotency-Replayed") == ("true" if replayed else None)
                        request = request_of(command)
                        assert request.request_id == KEY
                        assert len(request.request_digest) == 32
                answer, command = await call(f"{family}/run_1/cancel", {}, accept)
                assert answer.status == 200
                assert answer.headers.get("Idempotency-Replayed") == ("true" if replayed else None)
                assert (request_of(command).request_id, request_of(command).request_digest) == (KEY, b"")

    run_async(main())


def test_what_a_caller_wants_back_makes_no_other_request(tmp_path: Path) -> None:
    """`Prefer` and `Accept` may differ between repetitions; another body has another digest."""

    async def main() -> None:
        async with fake_service() as service, fronting(tmp_path, service.target) as front:
            stream = await service.session()

            async def digest(body: dict[str, str], **headers: str) -> bytes:
                named = {"Idempotency-Key": KEY, **headers}
                answering = asyncio.create_task(front.call("POST", FAMILIES[0], body, headers=named))
                command = await stream.take("start_run")
                await stream.send(turn(command, replayed=True, status=COMPLETED))
                assert (await answering).headers["Idempotency-Replayed"] == "true"
                return command.start_run.request_digest

            first = await digest({"content": "hello"})
            for headers in ({"Prefer": "respond-async"}, {"Prefer": "wait=3"}, {"Accept": FORMS[1]}):
                assert await digest({"content": "hello"}, **headers) == first
            assert await digest({"prompt": "hello"}) != first
            assert await digest({"content": "hello", "mode": "async"}) != first

    run_async(main())


def test_key_that_was_used_for_another_request_is_told(tmp_path: Path) -> None:
    """The service's refusal is a 422, in every form."""

    async def main() -> None:
        async with fake_service() as service, fronting(tmp_path, service.target) as front:
            stream = await service.session()
            for accept in FORMS:
                headers = {"Idempotency-Key": KEY, "Accept": accept}
                answering = asyncio.create_task(front.call("POST", FAMILIES[0], {"content": "x"}, headers=headers))
                command = await stream.take("start_run")
                await stream.send(error_to(command, grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED", "No."))
                answer = await answering
                assert (answer.status, answer.json["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")

    run_async(main())


def test_key_that_is_none_is_refused_before_anything_happens(tmp_path: Path) -> None:
    """400 that names the header, on all that take it; reads do not look at it."""

    async def main() -> None:
        async with fake_service() as service, fronting(tmp_path, service.target) as front:
            stream = await service.session()
            for path in (FAMILIES[0], f"{FAMILIES[0]}/run_1/input", f"{FAMILIES[0]}/run_1/cancel"):
                body = {} if path.endswith("cancel") else {"content": "x"}
                answer = await front.call("POST", path, body, headers={"Idempotency-Key": "x" * 256})
                assert (answer.status, answer.json["code"]) == (400, "VALIDATION_FAILED")
                assert [detail["field"] for detail in answer.json["details"]] == ["Idempotency-Key"]
            asking = asyncio.create_task(
                front.call("GET", f"{FAMILIES[0]}/run_1", headers={"Idempotency-Key": "x" * 256})
            )
            command = await stream.take("get_run")
            await stream.send(answer_to(command))
            assert (await asking).status == 200

    run_async(main())


def test_requests_without_a_key_have_ids_of_the_gateway(tmp_path: Path) -> None:
    """Each start, continue and cancel has one of its own, so that the gateway may repeat it."""

    async def main() -> None:
        async with fake_service() as service, fronting(tmp_path, service.target) as front:
            stream = await service.session()
            ids = set()
            for path, operation in ((FAMILIES[0], "start_run"), (f"{FAMILIES[0]}/run_1/input", "continue_run")) * 2:
                answering = asyncio.create_task(front.call("POST", path, {"content": "x"}))
                command = await stream.take(operation)
                await stream.send(turn(command, replayed=False, status=COMPLETED))
                assert "Idempotency-Replayed" not in (await answering).headers
                ids.add(request_of(command).request_id)
            cancelling = asyncio.create_task(front.call("POST", f"{FAMILIES[0]}/run_1/cancel"))
            command = await stream.take("cancel_run")
            ids.add(request_of(command).request_id)
            await stream.send(answer_to(command))
            await cancelling
            assert len(ids) == 5
            assert min(map(len, ids)) > 16

    run_async(main())


@pytest.mark.parametrize("accept", FORMS)
def test_repetition_of_the_gateway_is_no_replay(accept: str, tmp_path: Path) -> None:
    """When the gateway itself has to ask again, its client, who asked once, is not told of a replay."""

    async def main() -> None:
        async with fake_service() as service, fronting(tmp_path, service.target) as front:
            stream = await service.session()
            for path, operation in (
                ("", "start_run"),
                ("/run_1/input", "continue_run"),
                ("/run_1/cancel", "cancel_run"),
            ):
                headers = {"Idempotency-Key": KEY, "Accept": accept}
                body = {} if operation == "cancel_run" else {"content": "x"}
                answering = asyncio.create_task(front.call("POST", FAMILIES[0] + path, body, headers=headers))
                first = await stream.take(operation)
                stream.end(grpc.StatusCode.UNAVAILABLE)
                stream = await service.session()
                command = await stream.take(operation)
                assert request_of(command).request_id == request_of(first).request_id == KEY
                assert request_of(command).request_digest == request_of(first).request_digest
                if operation == "cancel_run":
                    update = answer_to(command)
                    update.cancel_run.replayed = True
                else:
                    update = turn(command, replayed=True, status=COMPLETED)
                await stream.send(update)
                answer = await answering
                assert answer.status in (200, 201)
                assert "Idempotency-Replayed" not in answer.headers

    run_async(main())
