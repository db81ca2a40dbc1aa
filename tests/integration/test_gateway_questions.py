"""Questions of agents through REST: 202 with the question, the answer by POST …/input, and what streams show."""

import asyncio
from pathlib import Path

import pytest

from tests.integration.stack import Answer, Stack, runs, serving, until
from tests.integration.wire import Wire
from tests.support import eventually, run_async

RUNS = runs("asking")


def states(answer: Answer) -> tuple[int, str, str, str]:
    """Status of the answer, the run, and the thread as both show it."""
    run = answer.run
    return answer.status, run["status"], run["threadStatus"], answer.json["thread"]["status"]


async def answer(stack: Stack, run: str, content: str, **fields: object) -> Answer:
    """Answer the question of a run."""
    return await stack.call("POST", f"{RUNS}/{run}/input", {"content": content, **fields})


def test_sync_caller_is_answered_at_once_with_the_question(tmp_path: Path) -> None:
    """202 and the question with its options; each answer goes on to the next question, then to the end."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            first = await stack.start("asking", "go")
            assert states(first) == (202, "running", "permission_asked", "permission_asked")
            run = first.run["id"]
            assert [event["content"] for event in first.events] == ["go", "Delete a.txt?"]
            question = first.events[1]
            assert (question["role"], question["logType"]) == ("execution_log", "permission_request")
            assert question["metadata"] == {
                "options": [
                    {"id": "allow", "name": "Allow once", "kind": "allow_once"},
                    {"id": "reject", "name": "Reject", "kind": "reject_once"},
                ],
                "toolKind": "delete",
                "timeoutSeconds": 600,
            }
            shown = await stack.call("GET", f"{RUNS}/{run}")
            assert states(shown) == (200, "running", "permission_asked", "permission_asked")
            listed = (await stack.call("GET", f"{RUNS}?status=running")).json["runs"]
            assert [(each["id"], each["threadStatus"]) for each in listed] == [(run, "permission_asked")]

            second = await answer(stack, run, "allow", metadata={"by": "hand"})
            assert states(second) == (202, "running", "permission_asked", "permission_asked")
            assert [event["content"] for event in second.events] == ["allow", "What is your name?"]
            given = second.events[0]
            assert (given["role"], given["logType"]) == ("user", "permission_response")
            assert given["metadata"] == {"question": 2, "optionId": "allow", "metadata": {"by": "hand"}}

            third = await answer(stack, run, "Ada")
            assert states(third) == (200, "completed", "completed", "completed")
            assert [event["content"] for event in third.events] == ["Ada", "allow Ada"]
            assert third.run["output"] == "allow Ada"
            sequences = [event["sequence"] for event in (await stack.call("GET", f"{RUNS}/{run}/events")).events]
            assert sequences == [1, 2, 3, 4, 5, 6]

    run_async(main())


def test_async_caller_finds_the_question_and_answers_async(tmp_path: Path) -> None:
    """The answer is accepted with 202 and its event; the run goes on."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("asking", "go")
            polled = await stack.call("GET", f"{path}/events?after=1&wait=10")
            assert [event["content"] for event in polled.events] == ["Delete a.txt?"]
            run = path.rpartition("/")[2]
            accepted = await answer(stack, run, "reject", mode="async")
            assert accepted.status == 202
            assert [event["content"] for event in accepted.events] == ["reject"]
            assert accepted.headers["Location"] == path
            await stack.call("GET", f"{path}/events?after=3&wait=10")
            assert states(await answer(stack, run, "Bob")) == (200, "completed", "completed", "completed")

    run_async(main())


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
def test_stream_goes_on_across_a_question(tmp_path: Path, accept: str) -> None:
    """It shows that the run asks, and that it does no longer; then the end."""

    async def main() -> None:
        async with (
            serving(tmp_path) as stack,
            stack.stream("POST", RUNS, {"content": "go"}, accept=accept) as stream,
        ):
            threads: list[str] = []
            given = {"Delete a.txt?": "allow", "What is your name?": "Ada"}
            async for frame in stream.frames():
                threads += [frame.document["run"]["threadStatus"]] if "run" in frame.document else []
                event = frame.document.get("event", {})
                if event.get("logType") == "permission_request":
                    run = event["id"].rpartition("_")[0].replace("event", "run")
                    assert (await answer(stack, run, given[event["content"]], mode="async")).status == 202
            assert (threads[0], threads[-1]) == ("running", "completed")
            assert set(threads) == {"running", "permission_asked", "completed"}
            assert frame.type == "stream.completed"

    run_async(main())


def test_answers_are_checked(tmp_path: Path) -> None:
    """What is no option is a 400 that names them; the second answer a 409; neither changes anything."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            run = (await stack.start("asking", "go")).run["id"]
            wrong = await answer(stack, run, "perhaps")
            assert (wrong.status, wrong.json["code"]) == (400, "VALIDATION_FAILED")
            [detail] = wrong.json["details"]
            assert detail["field"] == "content"
            assert "allow, reject" in detail["message"]
            answers = await asyncio.gather(*(answer(stack, run, "allow", mode="async") for _ in range(5)))
            statuses = sorted(each.status for each in answers)
            # "allow" is also a text: whoever comes once the next question is open answers that one.
            assert statuses[:1] == [202]
            assert set(statuses[1:]) <= {202, 409}
            assert all(each.json["code"] == "QUESTION_ANSWERED" for each in answers if each.status == 409)

    run_async(main())


def test_key_makes_an_answer_safe_to_repeat(tmp_path: Path) -> None:
    """The same key and body is the same answer, executed once; another body is a 422."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            run = (await stack.start("asking", "go")).run["id"]
            path, key = f"{RUNS}/{run}/input", {"Idempotency-Key": "once"}
            first = await stack.call("POST", path, {"content": "allow"}, headers=key)
            again = await stack.call("POST", path, {"content": "allow"}, headers=key)
            other = await stack.call("POST", path, {"content": "reject"}, headers=key)
            assert (first.status, again.status, other.status) == (202, 202, 422)
            assert again.headers["Idempotency-Replayed"] == "true"
            assert again.events == first.events
            assert (await answer(stack, run, "Ada")).run["output"] == "allow Ada"

    run_async(main())


def test_key_of_an_input_that_was_no_answer_shows_all_of_its_turn(tmp_path: Path) -> None:
    """Also where an answer in that turn had the same words."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            run = (await stack.start("asking", "go")).run["id"]
            await stack.call("POST", f"{RUNS}/{run}/cancel")
            path, key = f"{RUNS}/{run}/input", {"Idempotency-Key": "once"}
            first = await stack.call("POST", path, {"content": "allow"}, headers=key)
            assert [event["content"] for event in first.events] == ["allow", "Delete a.txt?"]
            second = await answer(stack, run, "allow")
            again = await stack.call("POST", path, {"content": "allow"}, headers=key)
            assert again.events == first.events + second.events

    run_async(main())


def test_answer_sees_no_cut(tmp_path: Path) -> None:
    """Taken, and nobody told: asked for again, it is given once, and answered with what came behind it."""
    wire = Wire()

    async def main() -> None:
        async with serving(tmp_path, wire=wire) as stack:
            run = (await stack.start("asking", "go")).run["id"]
            for given, behind in (("allow", "What is your name?"), ("Ada", "allow Ada")):
                swallowed = wire.swallowed
                wire.swallow(answers_only=True)
                asking = asyncio.create_task(answer(stack, run, given))
                await eventually(lambda before=swallowed: wire.swallowed > before)  # type: ignore[misc]
                wire.cut()
                answered = await asking
                assert [event["content"] for event in answered.events] == [given, behind]
                assert "Idempotency-Replayed" not in answered.headers

    run_async(main())


def test_question_survives_the_gateway(tmp_path: Path) -> None:
    """It is the runtime's: another gateway takes the answer. Cancel ends it as any turn."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            first, second = [(await stack.start("asking", "go")).run["id"] for _ in range(2)]
            await stack.gateway.__aexit__(None, None, None)
            await stack.gateway.__aenter__()
            await answer(stack, first, "allow")
            assert (await answer(stack, first, "Ada")).run["output"] == "allow Ada"
            cancelled = await stack.call("POST", f"{RUNS}/{second}/cancel")
            assert states(cancelled) == (200, "cancelled", "cancelled", "cancelled")

    run_async(main())


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ('permissions = "allow_all"', "Allowed by the server's settings: Delete a.txt?"),
        ('permissions = "deny_all"', "Denied by the server's settings: Delete a.txt?"),
        ('allow_tool_kinds = ["delete"]', "Allowed by the server's settings: Delete a.txt?"),
        ("timeout_seconds = 0.05", "Nobody answered within 0.05 s: denied."),
    ],
)
def test_servers_toml_decides(tmp_path: Path, settings: str, first: str) -> None:
    """The table `questions` of a server."""
    servers = f"""
[servers.asking]
kind = "agent_runtime"
agent = "python"
options = {{ entrypoint = "tests.integration.stack:asking" }}
questions = {{ {settings} }}
"""

    async def main() -> None:
        async with serving(tmp_path, servers=servers) as stack:
            run = (await stack.start("asking", "go")).run["id"]

            async def decided() -> list[str]:
                events = (await stack.call("GET", f"{RUNS}/{run}/events")).events
                return [event["content"] for event in events if event.get("logType") == "permission_decision"]

            async def any_decided() -> bool:
                return bool(await decided())

            await until(any_decided)
            assert (await decided())[0] == first

    run_async(main())
