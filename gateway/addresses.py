"""Where the runtime services are: targets as they are set, and the addresses that their names stand for.

Knows nothing of what is at an address.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

log = logging.getLogger(__name__)

_ASK_SECONDS = 3.0


class Address(NamedTuple):
    """A host, which may be a name, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_targets(text: str) -> tuple[Address, ...]:
    """Return the targets of `HOST:PORT,HOST:PORT…`, IPv6 in brackets. Raises ValueError naming the wrong one."""
    return tuple(_parse_target(part.strip()) for part in text.split(","))


def _parse_target(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        is_host = _is_literal(host) and ":" in host
    else:
        is_host = host.isascii() and host.isprintable() and not set(host) & set(" /[]:") and _can_be_asked_for(host)
    if not is_host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return Address(host, int(port))


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _can_be_asked_for(name: str) -> bool:
    """Whether a name has labels, dots between, none of them empty or too long: the resolver's own condition."""
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


class AddressBook:
    """The addresses of all targets; names are asked for again every few seconds.

    `on_change` gets every address with the target that it was found by: once the first are known, and whenever they
    change. A name that cannot be asked for at the moment stands for what it stood for.
    """

    def __init__(self, targets: Iterable[Address], on_change: Callable[[Mapping[Address, Address]], None]) -> None:
        self._on_change = on_change
        # In the order of the targets.
        self._found: dict[Address, frozenset[Address]] = {
            target: frozenset({target} if _is_literal(target.host) else ()) for target in targets
        }
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Tell what needs no asking, and ask for the rest."""
        self._tell()
        names = [target for target in self._found if not _is_literal(target.host)]
        self._tasks = [asyncio.create_task(self._follow(name)) for name in names]

    async def close(self) -> None:
        """Ask no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, name: Address) -> None:
        failed = False
        while True:
            try:
                found = frozenset(await resolve(name))
                failed = False
            except OSError as error:
                if not failed:
                    log.warning("%s cannot be resolved: %s", name, error.strerror)
                failed = True
                found = self._found[name]
            if found != self._found[name]:
                self._found[name] = found
                self._tell()
            await asyncio.sleep(_ASK_SECONDS)

    def _tell(self) -> None:
        self._on_change({address: target for target, found in self._found.items() for address in sorted(found)})


async def resolve(name: Address) -> Iterable[Address]:
    """Return all addresses of a name, of IPv4 and IPv6. Raises OSError."""
    infos = await asyncio.get_running_loop().getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    return [Address(str(where[0]), name.port) for *_, where in infos]
