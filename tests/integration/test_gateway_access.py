"""Who may do what: keys, scopes and organizations, through the real gateway and the real runtime service."""

import functools
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import gateway.app
from gateway.auth import KeyRing
from tests.integration.stack import GATES, Answer, runs, serving
from tests.integration.test_gateway import FAMILIES
from tests.support import run_async

# Every operation, by the scope that it needs; {} is the path of a family's runs.
OPERATIONS = [
    ("POST", "{}", {"content": "x"}, "execute"),
    ("GET", "{}", None, "runs:read"),
    ("GET", "{}/run_x", None, "runs:read"),
    ("POST", "{}/run_x/input", {"content": "x"}, "execute"),
    ("GET", "{}/run_x/events", None, "runs:read"),
    ("POST", "{}/run_x/cancel", None, "execute"),
]


@pytest.fixture(autouse=True)
def _eager_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gateway look at the key file with every request, not once a second."""
    monkeypatch.setattr(gateway.app, "KeyRing", functools.partial(KeyRing, check_interval_seconds=0))


def check_unauthenticated(answer: Answer) -> None:
    """A 401 as the contract wants it."""
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json.keys() == {"error", "message", "code"}
    assert (answer.json["error"], answer.json["code"]) == ("Unauthorized", "UNAUTHENTICATED")


def test_key_comes_in_either_header(tmp_path: Path) -> None:
    """`Authorization: Bearer` and `X-API-Key` give the same access; the scheme is case-insensitive."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for headers in (
                {"Authorization": f"Bearer {stack.key}"},
                {"Authorization": f"bearer {stack.key}"},
                {"X-API-Key": stack.key},
                {"X-API-Key": stack.key, "Authorization": f"Bearer {stack.key}"},
            ):
                answer = await stack.call("POST", runs("echo"), {"content": "x"}, headers=headers, key="")
                assert answer.status == 201

    run_async(main())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_needs_a_key(family: str, tmp_path: Path) -> None:
    """Without a key each of the eighteen routes is a 401, whatever else is wrong with the request."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for method, path, body, _ in OPERATIONS:
                for sent in (body, b"no json"):
                    check_unauthenticated(await stack.call(method, path.format(FAMILIES[family]), sent, key=""))
            assert (await stack.call("GET", runs("echo"))).json["runs"] == []

    run_async(main())


def test_bad_keys_are_all_told_the_same(tmp_path: Path) -> None:
    """Malformed, unknown, revoked and expired keys are a 401 of one wording."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            revoked = stack.make_key()
            stack.keys.revoke(revoked.split("_")[1])
            expired, _ = stack.keys.create("old", expires_at=datetime.now(UTC) - timedelta(seconds=1))
            messages = set()
            for key in (
                "x",
                "acp_",
                "acp_000000000000_" + "0" * 64,
                stack.key[:-1],
                stack.key + "0",
                stack.key.upper(),
                revoked,
                expired,
                "kéy",
            ):
                answer = await stack.call("GET", runs("echo"), key=key)
                check_unauthenticated(answer)
                messages.add(answer.json["message"])
            assert len(messages) == 1
            assert (await stack.call("GET", runs("echo"))).status == 200

    run_async(main())


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": ""},
        {"X-API-Key": ""},
        {"X-API-Key": "Bearer KEY"},
        {"Authorization": "Bearer KEY", "X-API-Key": "another"},
        {"Authorization": "KEY"},
    ],
)
def test_malformed_credentials_are_refused(headers: dict[str, str], tmp_path: Path) -> None:
    """Other schemes, empty keys and two different keys are a 401."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            sent = {name: value.replace("KEY", stack.key) for name, value in headers.items()}
            check_unauthenticated(await stack.call("GET", runs("echo"), headers=sent, key=""))

    run_async(main())


@pytest.mark.parametrize("scope", ["execute", "runs:read"])
def test_scopes_say_what_a_key_may_do(scope: str, tmp_path: Path) -> None:
    """`execute` is for start, continue and cancel, `runs:read` for the reads; the other is a 403."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            key = stack.make_key("default", "execute" if scope == "execute" else "runs:read")
            for method, path, body, needed in OPERATIONS:
                answer = await stack.call(method, path.format(runs("echo")), body, key=key)
                if needed == scope:
                    assert answer.status in (200, 201, 404)
                else:
                    assert answer.status == 403
                    assert answer.json["code"] == "INSUFFICIENT_SCOPE"
                    assert answer.json["error"] == "Forbidden"
                    assert needed in answer.json["message"]
            started = len((await stack.call("GET", runs("echo"))).json["runs"])
            assert started == (1 if scope == "execute" else 0)

    run_async(main())


def test_organization_header_must_be_the_keys(tmp_path: Path) -> None:
    """`X-Computer-Agents-Organization` with the key's organization changes nothing, with another it is a 403."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            header = "X-Computer-Agents-Organization"
            assert (await stack.call("GET", runs("echo"), headers={header: "default"})).status == 200
            for name in ("other", "", "Default"):
                answer = await stack.call("POST", runs("echo"), {"content": "x"}, headers={header: name})
                assert (answer.status, answer.json["code"]) == (403, "ORGANIZATION_MISMATCH")
            assert (await stack.call("GET", runs("echo"))).json["runs"] == []

    run_async(main())


def test_other_organizations_are_not_there(tmp_path: Path) -> None:
    """Another organization's servers, resources and runs answer exactly as ones that do not exist: 404."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            other = stack.make_key("other")
            theirs = await stack.call("POST", runs("theirs"), {"content": "mine"}, key=other)
            assert theirs.status == 201
            shop = "/v1/servers/their-shop/runtime/agent/runs"
            assert (await stack.call("POST", shop, {"content": "mine"}, key=other)).status == 201
            run_id = theirs.run["id"]
            nowhere = "/v1/servers/nowhere/runtime/agent/runs"
            for there, not_there in (
                (runs("theirs"), runs("nowhere")),
                (shop, nowhere),
                ("/v1/agent-runtimes/theirs/runs", "/v1/agent-runtimes/nowhere/runs"),
            ):
                for method, path, body, _ in OPERATIONS:
                    one = await stack.call(method, path.format(there).replace("run_x", run_id), body)
                    none = await stack.call(method, path.format(not_there), body)
                    assert one.status == none.status == 404
                    assert one.json["code"] == "SERVER_NOT_FOUND"
                    for name in ("their-shop", "theirs"):
                        one = Answer(one.status, one.headers, one.body.replace(name.encode(), b"nowhere"))
                    assert one.body == none.body

            # The same with a run of theirs on a server of ours, and one of ours on another server.
            ours = (await stack.start("talkative")).run["id"]
            for run in (run_id, ours):
                for method, path, body, _ in OPERATIONS[2:]:
                    one = await stack.call(method, path.format(runs("echo")).replace("run_x", run), body)
                    none = await stack.call(method, path.format(runs("echo")), body)
                    assert one.status == none.status == 404
                    assert one.json["code"] == "RUN_NOT_FOUND"
                    assert one.body.replace(run.encode(), b"run_x") == none.body
            assert (await stack.call("GET", runs("theirs") + f"/{run_id}", key=other)).run == theirs.run

    run_async(main())


def test_revoked_key_is_refused_by_a_running_gateway(tmp_path: Path) -> None:
    """The key file is read again when it changes: new keys work, revoked ones do not; runs under way go on."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            key = stack.make_key()
            answer = await stack.call("POST", runs("gated"), {"content": "revoked", "mode": "async"}, key=key)
            assert answer.status == 202
            stack.keys.revoke(key.split("_")[1])
            check_unauthenticated(await stack.call("GET", answer.headers["Location"], key=key))
            GATES["revoked"].open.set()
            assert (await stack.until_status(answer.headers["Location"]))["status"] == "completed"

    run_async(main())


def test_literal_key_is_accepted_beside_the_file(tmp_path: Path) -> None:
    """The key of ACP_API_KEY is of the organization "default" and may do everything."""

    async def main() -> None:
        async with serving(tmp_path, api_key="a-key-from-the-environment") as stack:
            assert (await stack.call("GET", runs("echo"), key="a-key-from-the-environment")).status == 200
            assert (await stack.call("GET", runs("theirs"), key="a-key-from-the-environment")).status == 404
            assert (await stack.call("GET", runs("echo"))).status == 200

    run_async(main())


def test_health_and_metrics_need_no_key(tmp_path: Path) -> None:
    """Probes and scrapers come without one, and a bad one does not matter."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for path in ("/health", "/health/live", "/metrics"):
                for key in ("", "bad"):
                    assert (await stack.call("GET", path, key=key)).status == 200

    run_async(main())
