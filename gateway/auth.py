"""API keys: who is calling, for which organization, and what they may do.

A key reads `acp_<id>_<secret>`: 12 hexadecimal digits by which it is found, and 256 random bits that are
shown once and never stored. The key file holds the SHA-256 of the whole text: a secret of that size cannot
be guessed, so a slow hash would add nothing but a way to load us down. `KeyFile` is for the command line,
`KeyRing` for the requests of a running gateway. Knows headers, but no HTTP server.
"""

import fcntl
import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import msgspec
from multidict import MultiMapping

from gateway.errors import ApiError

Scope = Literal["*", "execute", "runs:read"]

_LOG = logging.getLogger(__name__)

_PREFIX: Final = "acp_"
_ID_CHARACTERS: Final = 12
_SECRET_BYTES: Final = 32

_LITERAL_KEY_ID: Final = "literal"
_LITERAL_KEY_CHARACTERS: Final = 16

# The hash that an unknown id is compared with, so that it takes as long as a wrong secret.
_NO_DIGEST: Final = bytes(32)

_Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key of the key file, without its secret."""

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{12}\\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}\\Z")]
    name: str
    organization: Annotated[str, msgspec.Meta(min_length=1)]
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    created_at: _Moment
    expires_at: _Moment | None = None
    revoked_at: _Moment | None = None


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[KeyEntry, ...] = ()


class KeyFileError(Exception):
    """The key file cannot be used; the message names it and says what to do."""


class UnknownKey(Exception):
    """The key file holds no key with this id."""


class Caller(msgspec.Struct, frozen=True):
    """Who makes a request, as the key has proved it."""

    key_id: str
    organization: str
    scopes: frozenset[str]


class KeyFile:
    """The file that keys are kept in; each change is read, made and written under a lock, and in one piece.

    A file that does not exist holds no keys. All methods block, for as long as another process changes it.
    """

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path = path
        self._now = now

    def load(self) -> tuple[KeyEntry, ...]:
        """All keys, the oldest first, expired and revoked ones too. Raises KeyFileError."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise KeyFileError(
                f"The key file {self.path} cannot be read ({error.strerror}); make it readable for this user."
            ) from error
        try:
            keys = _decode_document(content).keys
        except msgspec.MsgspecError as error:
            raise KeyFileError(
                f"The key file {self.path} is not as it should be ({error}); "
                "restore it from a copy, or move it away and create new keys."
            ) from error
        if len({key.id for key in keys}) != len(keys):
            raise KeyFileError(f"The key file {self.path} holds two keys with one id; remove one of them.")
        return keys

    def create(
        self,
        name: str,
        organization: str = "default",
        scopes: tuple[Scope, ...] = ("*",),
        expires_at: datetime | None = None,
    ) -> tuple[str, KeyEntry]:
        """Makes a key and stores its hash. The text of the key, which comes first, is not kept anywhere.

        `expires_at` needs a time zone. Raises ValueError, KeyFileError.
        """
        if not organization or not organization.isascii() or not organization.isprintable():
            raise ValueError("An organization is named in printable ASCII, as it travels in HTTP headers.")
        if not scopes or not set(scopes) <= set(get_args(Scope)):
            raise ValueError(f"Scopes are one or more of {', '.join(get_args(Scope))}.")
        if expires_at is not None and expires_at.tzinfo is None:
            raise ValueError("The time of expiry needs a time zone.")
        with self._locked():
            keys = self.load()
            taken = {key.id for key in keys}
            while (key_id := secrets.token_hex(_ID_CHARACTERS // 2)) in taken:
                pass
            text = f"{_PREFIX}{key_id}_{secrets.token_hex(_SECRET_BYTES)}"
            entry = KeyEntry(
                id=key_id,
                sha256=sha256(text.encode()).hexdigest(),
                name=name,
                organization=organization,
                scopes=scopes,
                created_at=self._now(),
                expires_at=expires_at,
            )
            self._write((*keys, entry))
        return text, entry

    def revoke(self, key_id: str) -> KeyEntry:
        """Ends a key for good; one that has ended stays as it is. Raises UnknownKey, KeyFileError."""
        with self._locked():
            keys = self.load()
            entry = next((key for key in keys if key.id == key_id), None)
            if entry is None:
                raise UnknownKey(f"The key file {self.path} holds no key {key_id!r}.")
            if entry.revoked_at is not None:
                return entry
            revoked = msgspec.structs.replace(entry, revoked_at=self._now())
            self._write(tuple(revoked if key is entry else key for key in keys))
            return revoked

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock, which is a file of its own: the key file itself is replaced on each change."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise self._not_writable(error) from error
            yield
        finally:
            os.close(lock)

    def _write(self, keys: tuple[KeyEntry, ...]) -> None:
        """Replaces the file: readers see the old keys or the new ones, also after a crash."""
        content = msgspec.json.format(msgspec.json.encode(_Document(keys)), indent=2) + b"\n"
        try:
            # mkstemp makes it 0600, under a name that nobody can have prepared.
            descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(descriptor)
                os.replace(name, self.path)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(name)
                raise
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> KeyFileError:
        return KeyFileError(
            f"The key file {self.path} cannot be written ({error.strerror}); make its folder writable for this user."
        )


_decode_document: Final = msgspec.json.Decoder(_Document).decode


class _Known(msgspec.Struct, frozen=True):
    """A key that may be used until it expires."""

    digest: bytes
    expires: float
    caller: Caller


class KeyRing:
    """The keys that a running gateway accepts: those of a key file, which it follows, and a literal one.

    Raises KeyFileError when built over a file that cannot be used, ValueError for a poor literal key. Later a
    file that cannot be used is logged, and the keys that were good go on being so; a file that is gone holds
    no keys.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        literal_key: str | None = None,
        check_interval_seconds: float = 1.0,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = None if path is None else KeyFile(path)
        self._check_interval_seconds = check_interval_seconds
        self._now = now
        self._monotonic = monotonic
        self._literal_digest = None if literal_key is None else _literal_digest(literal_key)
        self._literal_caller = Caller(_LITERAL_KEY_ID, "default", frozenset(("*",)))
        self._known: dict[str, _Known] = {}
        self._version: tuple[int, int, int] | None = None
        self._next_check = self._monotonic() + check_interval_seconds
        if self._file is not None:
            self._version = _version(self._file.path)
            self._known = _usable(self._file.load())

    def authenticate(self, headers: MultiMapping[str]) -> Caller:
        """The caller that the headers of a request prove.

        Raises ApiError: 401 UNAUTHENTICATED, 403 ORGANIZATION_MISMATCH.
        """
        if self._monotonic() >= self._next_check:
            self._follow_file()
        caller = self._identify(_presented_key(headers))
        for organization in headers.getall("X-Computer-Agents-Organization", ()):
            if organization != caller.organization:
                raise ApiError(
                    403,
                    "ORGANIZATION_MISMATCH",
                    "The API key does not belong to the organization that was named.",
                )
        return caller

    def _identify(self, text: str) -> Caller:
        # A key is ASCII; bytes of a header that are not came as surrogates, which cannot be encoded.
        if text.isascii():
            digest = sha256(text.encode()).digest()
            known = self._known.get(text[len(_PREFIX) : len(_PREFIX) + _ID_CHARACTERS])
            if (
                hmac.compare_digest(digest, _NO_DIGEST if known is None else known.digest)
                and known is not None
                and self._now() < known.expires
            ):
                return known.caller
            if self._literal_digest is not None and hmac.compare_digest(digest, self._literal_digest):
                return self._literal_caller
        # One answer for all: what is wrong with a key is nobody's business but its owner's.
        raise _unauthenticated("The API key is not valid.")

    def _follow_file(self) -> None:
        """Takes over what has changed in the file since the last look."""
        self._next_check = self._monotonic() + self._check_interval_seconds
        if self._file is None:
            return
        # Looked at before it is read: a change in between is seen the next time.
        version = _version(self._file.path)
        if version == self._version:
            return
        self._version = version
        try:
            self._known = _usable(self._file.load())
        except KeyFileError as error:
            _LOG.error("The API keys stay as they were: %s", error)
            return
        if version is None:
            _LOG.warning("The key file %s is gone; it holds no API keys now.", self._file.path)
        else:
            _LOG.info("The API keys were read again; %d can be used.", len(self._known))


def require(caller: Caller, scope: Scope) -> None:
    """Raises ApiError 403 INSUFFICIENT_SCOPE unless the caller's key has the scope, or `*`."""
    if scope not in caller.scopes and "*" not in caller.scopes:
        raise ApiError(403, "INSUFFICIENT_SCOPE", f'The API key lacks the scope "{scope}".')


def _presented_key(headers: MultiMapping[str]) -> str:
    """The text of the one key that a request presents, in whichever header, or in several."""
    key = None
    for value in headers.getall("Authorization", ()):
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthenticated("The Authorization header must read: Bearer KEY.")
        key = _same_key(key, credentials)
    for value in headers.getall("X-API-Key", ()):
        key = _same_key(key, value)
    if key is None:
        raise _unauthenticated("An API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY.")
    return key


def _same_key(key: str | None, other: str) -> str:
    other = other.strip(" \t")
    if key is not None and key != other:
        raise _unauthenticated("The request presents two different API keys.")
    return other


def _unauthenticated(message: str) -> ApiError:
    return ApiError(401, "UNAUTHENTICATED", message, headers={"WWW-Authenticate": "Bearer"})


def _literal_digest(key: str) -> bytes:
    if len(key) < _LITERAL_KEY_CHARACTERS or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ValueError(
            f"An API key that is given literally has at least {_LITERAL_KEY_CHARACTERS} printable ASCII "
            "characters, none of them a blank at either end."
        )
    return sha256(key.encode()).digest()


def _usable(keys: tuple[KeyEntry, ...]) -> dict[str, _Known]:
    return {
        key.id: _Known(
            digest=bytes.fromhex(key.sha256),
            expires=float("inf") if key.expires_at is None else key.expires_at.timestamp(),
            caller=Caller(key.id, key.organization, frozenset(key.scopes)),
        )
        for key in keys
        if key.revoked_at is None
    }


def _version(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
