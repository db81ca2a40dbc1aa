"""The replicas of the runtime service as one: who is there, who serves, whose turn it is.

A call belongs to all of them. It goes to one that serves, in turn. When the stream that carries it breaks, or the
replica does not take it, it is asked of another one at once; where there is none it waits for one, for some time.
"""

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from typing import Any

import grpc

from gateway.addresses import Address, AddressBook, parse_targets
from gateway.call import Call
from gateway.channel import MAX_MESSAGE_BYTES, Channel
from gateway.errors import ApiError, from_code
from gateway.health import HealthWatch
from gateway.session import Session, fits, refused, too_large
from protos.acp.runs.v1 import run_service_pb2 as rpc

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.5


class _Replica:
    """One address. It is `leaving` when its name stands for others now: no new call for it once one is ready there."""

    def __init__(self, address: Address, channel: Channel, owner: "Replicas") -> None:
        name = f"the runtime service at {address}"
        self._channel = channel
        self.session = Session(name, channel.open_session, owner, MAX_MESSAGE_BYTES)
        self.health = HealthWatch(name, channel.watch_health, owner.session_changed)
        self.leaving = False
        self.session.start()
        self.health.start()

    @property
    def is_ready(self) -> bool:
        return self.session.can_take and self.health.is_serving

    async def close(self) -> None:
        await self.health.close()
        await self.session.close()
        await self._channel.close()


class Replicas:
    """Every replica that the targets stand for. `start` it within the loop that makes the calls.

    Raises ValueError for targets that are none.
    """

    def __init__(self, targets: str, service_token: str, max_calls: int, reconnect_seconds: float) -> None:
        self._service_token = service_token
        self._max_calls = max_calls
        self._reconnect_seconds = reconnect_seconds
        self._addresses = AddressBook(parse_targets(targets), self._meet)
        self._replicas: dict[Address, _Replica] = {}
        self._ready: list[Session] = []
        self._turn = 0
        self._served = asyncio.Event()  # somebody is ready
        self._waiting: dict[Call, None] = {}  # in the order in which they came
        self._retry_after = itertools.cycle("123")  # so that those who were refused do not come back all at once
        self._clock: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._in_a_hurry = False
        self._is_closed = False

    def start(self) -> None:
        """Find the replicas and stay with them; calls can be made from now on."""
        self._loop = asyncio.get_running_loop()
        self._addresses.start()
        self._clock = self._loop.call_later(_TICK_SECONDS, self._tick)

    async def close(self) -> None:
        """Leave all replicas, and end whatever still waits for them."""
        self._is_closed = True
        if self._clock is not None:
            self._clock.cancel()
        await self._addresses.close()
        for replica in self._replicas.values():
            self._spawn(replica.close())
        if self._closing:
            await asyncio.wait(self._closing)
        for call in list(self._waiting):
            call.fail(_unreachable(call))

    @property
    def is_serving(self) -> bool:
        """Whether there is a replica that takes calls."""
        return bool(self._ready)

    async def wait_until_serving(self, seconds: float) -> None:
        """Return once there is a replica that takes calls, or after some time."""
        try:
            async with asyncio.timeout(seconds):
                await self._served.wait()
        except TimeoutError:
            log.warning("no runtime service can be reached yet")

    def open(self, command: rpc.SessionCommand, seconds: float | None) -> Call:
        """Make a call; after `seconds` it fails with 504. Raises ApiError 503 when too many are open, 413."""
        open_calls = len(self._waiting) + sum(len(replica.session.calls) for replica in self._replicas.values())
        if open_calls >= self._max_calls:
            raise self._overloaded()
        call = Call(self._loop, self, command, seconds)
        if self._in_a_hurry:
            call.cut_wait()
        if self._ready:
            session = self._next(call)
            if session is None:
                raise self._overloaded()
            call.waits_since = None
            session.carry(call)
        elif not fits(command, MAX_MESSAGE_BYTES):
            raise too_large()
        else:
            self._waiting[call] = None
        return call

    def hurry(self) -> None:
        """Have every call that waits for something, up to a time, answered with what there is by now.

        That holds for those to come, too: the body of a request may still be on its way.
        """
        self._in_a_hurry = True
        for call in list(self._calls()):
            self.hurry_call(call)

    def hurry_call(self, call: Call) -> None:
        """Have a call that waits for something, up to a time, answered with what there is by now."""
        if not call.ended and call.cut_wait():
            call.place.forget(call)
            self._place(call)

    def _calls(self) -> Iterator[Call]:
        yield from self._waiting
        for replica in self._replicas.values():
            yield from replica.session.calls.values()

    # What waiting calls ask for

    def acknowledge(self, call: Call, updates: int) -> None:
        """Nothing comes of a call that waits."""

    def forget(self, call: Call) -> None:
        """Wait no longer."""
        self._waiting.pop(call, None)

    # What sessions tell

    def session_changed(self) -> None:
        """See who can take calls now, and give out what waits."""
        if self._is_closed:
            self._ready = []
            return
        replicas = self._replicas.values()
        ready = [replica for replica in replicas if replica.is_ready]
        self._ready = [replica.session for replica in ready if not replica.leaving] or [each.session for each in ready]
        if not self._ready:
            self._served.clear()
            return
        self._served.set()
        for replica in replicas:
            if replica.health.is_silent and replica.session.calls:
                # Who hangs may do so for long; its calls are safe with another.
                replica.session.renew()
        self._give_out()

    def take_back(self, calls: Iterable[Call]) -> None:
        """Find other places for calls whose stream broke, unless that goes on for too long."""
        now = self._loop.time()
        for call in calls:
            if call.waits_since is None:
                call.waits_since = now
            self._fail_if_overdue(call, now)
            if not call.ended:
                self._place(call)
        stay = [replica for replica in self._replicas.values() if not replica.leaving]
        if all(replica.session.hopeless is not None for replica in stay):
            for call, replica in zip(list(self._waiting), itertools.cycle(stay)):
                assert replica.session.hopeless is not None
                call.fail(refused(replica.session.hopeless))

    def take_refused(self, call: Call, session: Session, error: ApiError) -> None:
        """Find another place for a call that a replica did not take.

        One that stops has a successor, for which the call waits if need be. A store that is away is likely to be away
        for all: each is asked once. So it is with room, which is told as our own want of it is.
        """
        call.refusal = error
        if call.waits_since is None:
            call.waits_since = self._loop.time()
        if error.code == "DRAINING":
            self._place(call)
            return
        call.refused_by = {*(call.refused_by or ()), session}
        other = self._next(call)
        if other is None:
            error = self._overloaded() if error.code == "SESSION_FULL" else error
            call.end_with(_in_doubt(error) if call.is_in_doubt else error)
        else:
            self._carry(other, call)

    # Places

    def _next(self, call: Call) -> Session | None:
        """Return whose turn it is, None when nobody can take the call."""
        for _ in self._ready:
            self._turn += 1
            session = self._ready[self._turn % len(self._ready)]
            if session.has_room and not (call.refused_by and session in call.refused_by):
                return session
        return None

    def _place(self, call: Call) -> None:
        session = None if self._is_closed else self._next(call)
        if session is None:
            call.place = self
            call.refused_by = None  # who comes back, or has room, is asked again; so one that waits holds up nobody
            self._waiting[call] = None
        else:
            self._carry(session, call)

    def _carry(self, session: Session, call: Call) -> None:
        try:
            session.carry(call)
        except ApiError as error:
            call.end_with(error)

    def _give_out(self) -> None:
        for call in list(self._waiting):
            session = self._next(call)
            if session is None:
                return
            del self._waiting[call]
            self._carry(session, call)

    # Time

    def _tick(self) -> None:
        """End the calls whose time is over, and leave the replicas that are not needed any more."""
        self._clock = self._loop.call_later(_TICK_SECONDS, self._tick)
        now = self._loop.time()
        for replica in list(self._replicas.values()):
            session = replica.session
            is_steady = session.is_steady
            for call in list(session.calls.values()):
                if is_steady:
                    call.waits_since = None
                self._fail_if_late(call, now)
        for call in list(self._waiting):
            self._fail_if_late(call, now)
            self._fail_if_overdue(call, now)
        self._give_out()
        for address, replica in list(self._replicas.items()):
            if replica.leaving and not replica.session.calls and replica.session not in self._ready:
                del self._replicas[address]
                self._spawn(replica.close())

    def _fail_if_late(self, call: Call, now: float) -> None:
        if now >= call.deadline:
            call.fail(from_code(grpc.StatusCode.DEADLINE_EXCEEDED))

    def _fail_if_overdue(self, call: Call, now: float) -> None:
        if call.waits_since is not None and now - call.waits_since >= self._reconnect_seconds:
            call.fail(call.refusal or self._absence(call))

    def _absence(self, call: Call) -> ApiError:
        """What to tell about nobody who takes a call: that one of them would but for this gateway, if it is so."""
        for replica in self._replicas.values():
            if replica.session.hopeless is not None and not replica.leaving and not call.sent:
                return refused(replica.session.hopeless)
        return _unreachable(call)

    # Who is there

    def _meet(self, found: Mapping[Address, Address]) -> None:
        for address, replica in self._replicas.items():
            replica.leaving = address not in found
        for address, target in found.items():
            if address not in self._replicas:
                log.info("a runtime service is at %s", address)
                channel = Channel(str(address), str(target), self._service_token)
                self._replicas[address] = _Replica(address, channel, self)
        self.session_changed()

    def _spawn(self, closing: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _overloaded(self) -> ApiError:
        return ApiError(
            503,
            "OVERLOADED",
            "As many requests are under way already as there is room for; nothing was changed. Try again in a moment.",
            headers={"Retry-After": next(self._retry_after)},
        )


def _in_doubt(error: ApiError) -> ApiError:
    """Who refuses last cannot say what came of the request where it was asked before."""
    message = "The runtime service cannot take the request now, but it may have taken effect. Try again in a moment."
    return ApiError(error.status, error.code, message, headers=error.headers)


def _unreachable(call: Call) -> ApiError:
    # Made anew for each call: one that is raised keeps hold of all that it passes through.
    what = "the request may still take effect" if call.sent else "nothing was changed"
    message = f"The runtime service cannot be reached; {what}. Try again in a moment."
    return ApiError(503, "RUNTIME_UNAVAILABLE", message, headers={"Retry-After": "1"})
