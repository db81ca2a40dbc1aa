"""API keys: the file that keeps them, and what a request must show."""

import json
import logging
import os
import re
import stat
import threading
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from multidict import CIMultiDict

from gateway.auth import Caller, KeyFile, KeyFileError, KeyRing, Scope, UnknownKey, require
from gateway.errors import ApiError

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LITERAL = "a-key-from-the-environment"


class Clocks:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return NOW.timestamp() + self.seconds

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    """A key file that does not exist yet, in a folder that does not either."""
    return KeyFile(tmp_path / "data" / "keys.json", now=lambda: NOW)


def ring_over(key_file: KeyFile, clocks: Clocks | None = None, literal_key: str | None = None) -> KeyRing:
    """A ring that follows the file, under clocks of the test's."""
    clocks = clocks or Clocks()
    return KeyRing(key_file.path, literal_key=literal_key, now=clocks.now, monotonic=clocks.monotonic)


def bearer(key: str) -> CIMultiDict[str]:
    """The headers that present a key."""
    return CIMultiDict({"Authorization": f"Bearer {key}"})


def refusal(ring: KeyRing, headers: CIMultiDict[str]) -> ApiError:
    """The error that a request with these headers gets."""
    with pytest.raises(ApiError) as caught:
        ring.authenticate(headers)
    return caught.value


# -- The key file --------------------------------------------------------------------------------------


def test_key_file_that_does_not_exist_holds_no_keys(key_file: KeyFile) -> None:
    """Before the first key there is nothing to restore."""
    assert key_file.load() == ()


def test_key_file_keeps_hashes_only(key_file: KeyFile) -> None:
    """A created key is stored as its SHA-256, in a file that only its owner reads; the text is shown once."""
    text, entry = key_file.create("ci", "acme", ("execute", "runs:read"), NOW + timedelta(days=1))
    assert re.fullmatch(f"acp_{entry.id}_[0-9a-f]{{64}}", text)
    assert re.fullmatch("[0-9a-f]{12}", entry.id)
    content = key_file.path.read_text()
    assert text[-64:] not in content
    assert json.loads(content)["keys"] == [
        {
            "id": entry.id,
            "sha256": sha256(text.encode()).hexdigest(),
            "name": "ci",
            "organization": "acme",
            "scopes": ["execute", "runs:read"],
            "created_at": "2026-01-02T03:04:05Z",
            "expires_at": "2026-01-03T03:04:05Z",
            "revoked_at": None,
        }
    ]
    assert stat.S_IMODE(key_file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(f"{key_file.path}.lock").stat().st_mode) == 0o600
    assert key_file.load() == (entry,)


def test_key_file_revokes_once(key_file: KeyFile) -> None:
    """A revoked key stays listed, with the time of the first revocation."""
    _, first = key_file.create("first")
    _, second = key_file.create("second")
    revoked = key_file.revoke(first.id)
    assert revoked.revoked_at == NOW
    later = KeyFile(key_file.path, now=lambda: NOW + timedelta(hours=1))
    assert later.revoke(first.id) == revoked
    assert key_file.load() == (revoked, second)
    with pytest.raises(UnknownKey, match="no key '000000000000'"):
        key_file.revoke("000000000000")


@pytest.mark.parametrize(
    ("organization", "scopes", "expires_at"),
    [
        ("", ("*",), None),
        ("bücher", ("*",), None),
        ("a\nb", ("*",), None),
        ("acme", (), None),
        ("acme", ("everything",), None),
        ("acme", ("*",), datetime(2030, 1, 1)),
    ],
)
def test_key_file_refuses_what_no_request_could_use(
    key_file: KeyFile, organization: str, scopes: tuple[Scope, ...], expires_at: datetime | None
) -> None:
    """Nothing is written for arguments that make no sense."""
    with pytest.raises(ValueError, match=r"organization|[Ss]copes|time zone"):
        key_file.create("x", organization, scopes, expires_at)
    assert not key_file.path.exists()


def test_key_file_loses_no_key_to_another_writer(key_file: KeyFile) -> None:
    """Writers at the same time wait for each other."""

    def create_some() -> None:
        for number in range(5):
            KeyFile(key_file.path).create(f"key {number}")

    writers = [threading.Thread(target=create_some) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(key_file.load()) == 20


def test_key_file_survives_a_failed_write(key_file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk refuses, the old keys stay and nothing is left lying about."""
    _, entry = key_file.create("first")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyFileError, match=r"cannot be written.*No space left"):
        key_file.create("second")
    assert key_file.load() == (entry,)
    assert sorted(path.name for path in key_file.path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"keys":[{"id":"abc"}]}',
        '{"keys":{},"more":1}',
        '{"keys":[{"id":"0123456789ab","sha256":"%s","name":"n","organization":"o","scopes":["root"],'
        '"created_at":"2026-01-02T03:04:05Z"}]}' % ("0" * 64),
        '{"keys":[{"id":"0123456789ab\\n","sha256":"%s","name":"n","organization":"o","scopes":["*"],'
        '"created_at":"2026-01-02T03:04:05Z"}]}' % ("0" * 64),
    ],
)
def test_key_file_that_is_corrupt_says_what_to_do(tmp_path: Path, content: str) -> None:
    """The error names the file and a way out, and no command overwrites what is there."""
    path = tmp_path / "keys.json"
    path.write_text(content)
    for use in (KeyFile(path).load, lambda: KeyFile(path).create("x"), lambda: KeyRing(path)):
        with pytest.raises(KeyFileError, match=f"{re.escape(str(path))}.*restore it"):
            use()
    assert path.read_text() == content


def test_key_file_with_one_id_twice_is_refused(key_file: KeyFile) -> None:
    """Which of the two would count is not for us to say."""
    key_file.create("x")
    document = json.loads(key_file.path.read_text())
    key_file.path.write_text(json.dumps({"keys": document["keys"] * 2}))
    with pytest.raises(KeyFileError, match="two keys with one id"):
        key_file.load()


def test_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Errors of the operating system are told like all others."""
    with pytest.raises(KeyFileError, match=f"{re.escape(str(tmp_path))} cannot be read"):
        KeyFile(tmp_path).load()
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot be written"):
        KeyFile(tmp_path / "file" / "keys.json").create("x")


# -- The key ring --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        [("Authorization", "Bearer KEY")],
        [("authorization", "bearer  KEY ")],
        [("X-API-Key", "KEY")],
        [("x-api-key", " KEY ")],
        [("Authorization", "Bearer KEY"), ("X-API-Key", "KEY")],
        [("X-API-Key", "KEY"), ("X-Computer-Agents-Organization", "acme")],
    ],
)
def test_ring_accepts_a_key_in_either_header(key_file: KeyFile, template: list[tuple[str, str]]) -> None:
    """Both headers give the same access, alone or together."""
    text, entry = key_file.create("ci", "acme", ("execute",))
    headers = CIMultiDict((name, value.replace("KEY", text)) for name, value in template)
    assert ring_over(key_file).authenticate(headers) == Caller(entry.id, "acme", frozenset({"execute"}))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([], "An API key is needed"),
        ([("Authorization", "")], "must read: Bearer KEY"),
        ([("Authorization", "Basic KEY")], "must read: Bearer KEY"),
        ([("Authorization", "BearerKEY")], "must read: Bearer KEY"),
        ([("Authorization", "Basic x"), ("X-API-Key", "KEY")], "must read: Bearer KEY"),
        ([("Authorization", "Bearer")], "not valid"),
        ([("X-API-Key", "")], "not valid"),
        ([("Authorization", "Bearer KEY"), ("X-API-Key", "KEYx")], "two different"),
        ([("X-API-Key", "KEY"), ("X-API-Key", "other")], "two different"),
        ([("Authorization", "Bearer KEY KEY")], "not valid"),
        ([("Authorization", "Bearer \udcff\udcfe")], "not valid"),
        ([("X-API-Key", "KEY\udcff")], "not valid"),
        ([("X-API-Key", "sch\u00fcssel")], "not valid"),
        ([("Authorization", "\udcff")], "must read"),
        ([("X-API-Key", "acp_")], "not valid"),
    ],
)
def test_ring_refuses_what_is_no_key(key_file: KeyFile, template: list[tuple[str, str]], message: str) -> None:
    """Each is a 401 that says how to authenticate, whatever bytes came."""
    text, _ = key_file.create("ci")
    headers = CIMultiDict((name, value.replace("KEY", text)) for name, value in template)
    error = refusal(ring_over(key_file, literal_key=LITERAL), headers)
    assert (error.status, error.code) == (401, "UNAUTHENTICATED")
    assert error.headers == {"WWW-Authenticate": "Bearer"}
    assert message in error.message
    assert text not in error.message


def test_ring_answers_unknown_revoked_expired_and_wrong_secrets_alike(key_file: KeyFile) -> None:
    """Nobody learns from an answer that an id exists."""
    clocks = Clocks()
    good, _ = key_file.create("good")
    revoked, entry = key_file.create("revoked")
    key_file.revoke(entry.id)
    expired, _ = key_file.create("expired", expires_at=NOW)
    ring = ring_over(key_file, clocks)
    wrong_secret = good[:-1] + ("0" if good[-1] != "0" else "1")
    unknown = f"acp_{'0' * 12}_{'0' * 64}"
    answers = {refusal(ring, bearer(key)).body() for key in (unknown, revoked, expired, wrong_secret, good[:17])}
    assert len(answers) == 1


def test_ring_ends_a_key_when_it_expires(key_file: KeyFile) -> None:
    """Expiry needs no change of the file."""
    clocks = Clocks()
    text, entry = key_file.create("ci", expires_at=NOW + timedelta(seconds=1002))
    ring = ring_over(key_file, clocks)
    assert ring.authenticate(bearer(text)).key_id == entry.id
    clocks.seconds += 2
    assert refusal(ring, bearer(text)).status == 401


def test_ring_refuses_another_organization(key_file: KeyFile) -> None:
    """The optional header must name the organization of the key, each time it is given."""
    text, _ = key_file.create("ci", "acme")
    ring = ring_over(key_file)
    headers = bearer(text)
    headers.add("x-computer-agents-organization", "acme")
    headers.add("x-computer-agents-organization", "other")
    error = refusal(ring, headers)
    assert (error.status, error.code) == (403, "ORGANIZATION_MISMATCH")


def test_ring_follows_the_file(key_file: KeyFile) -> None:
    """New and revoked keys count from the next look at the file on, which is a second later at most."""
    clocks = Clocks()
    ring = ring_over(key_file, clocks)
    text, entry = key_file.create("ci")
    clocks.seconds += 0.9
    assert refusal(ring, bearer(text)).status == 401
    clocks.seconds += 0.2
    assert ring.authenticate(bearer(text)).key_id == entry.id
    key_file.revoke(entry.id)
    clocks.seconds += 1
    assert refusal(ring, bearer(text)).status == 401


def test_ring_keeps_good_keys_while_the_file_is_corrupt(key_file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    """A slip of an editor locks nobody out; it is logged once, and the repaired file counts again."""
    clocks = Clocks()
    text, entry = key_file.create("ci")
    ring = ring_over(key_file, clocks)
    good = key_file.path.read_text()
    key_file.path.write_text(good[:-10])
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            clocks.seconds += 1
            assert ring.authenticate(bearer(text)).key_id == entry.id
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert str(key_file.path) in caplog.text
    assert entry.sha256 not in caplog.text
    key_file.path.write_text(good.replace('"*"', '"execute"'))
    clocks.seconds += 1
    assert ring.authenticate(bearer(text)).scopes == {"execute"}


def test_ring_takes_a_file_that_is_gone_as_empty(key_file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    """To remove the file is to revoke all that it held."""
    clocks = Clocks()
    text, _ = key_file.create("ci")
    ring = ring_over(key_file, clocks)
    key_file.path.unlink()
    clocks.seconds += 1
    assert refusal(ring, bearer(text)).status == 401
    assert "is gone" in caplog.text


def test_ring_accepts_a_literal_key(key_file: KeyFile) -> None:
    """A key from the environment works with and without a key file, for everything."""
    text, entry = key_file.create("ci")
    ring = ring_over(key_file, literal_key=LITERAL)
    assert ring.authenticate(bearer(text)).key_id == entry.id
    for each in (ring, KeyRing(None, literal_key=LITERAL)):
        assert each.authenticate(bearer(LITERAL)) == Caller("literal", "default", frozenset({"*"}))
        assert refusal(each, bearer(LITERAL + "x")).status == 401
    clocks = Clocks()
    alone = KeyRing(None, literal_key="with some blanks inside", monotonic=clocks.monotonic)
    clocks.seconds += 5
    assert alone.authenticate(bearer("with some blanks inside")).organization == "default"


@pytest.mark.parametrize("key", ["", "fifteen letters", "sixteen letters!\n", " sixteen letters!", "ü" * 20])
def test_ring_refuses_a_poor_literal_key(key: str) -> None:
    """A literal key that is short or cannot travel in a header is told at the start, without repeating it."""
    with pytest.raises(ValueError, match="at least 16") as caught:
        KeyRing(None, literal_key=key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("held", "wanted", "allowed"),
    [
        ({"*"}, "execute", True),
        ({"*"}, "runs:read", True),
        ({"execute"}, "execute", True),
        ({"execute"}, "runs:read", False),
        ({"runs:read"}, "execute", False),
    ],
)
def test_require_asks_for_the_scope(held: set[str], wanted: Scope, allowed: bool) -> None:
    """`*` gives all, any other scope itself; what is missing is named."""
    caller = Caller("k", "acme", frozenset(held))
    if allowed:
        require(caller, wanted)
        return
    with pytest.raises(ApiError) as caught:
        require(caller, wanted)
    assert (caught.value.status, caught.value.code) == (403, "INSUFFICIENT_SCOPE")
    assert wanted in caught.value.message
