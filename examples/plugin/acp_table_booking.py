"""A kind of agent as a package of its own: the function of ../function, with options that servers.toml gives.

pip install ./examples/plugin
acp-gateway agents check --servers examples/plugin/servers.toml
acp-gateway up --servers examples/plugin/servers.toml
"""

import re
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec

from runtime_service.agents import Agent, AgentError, AgentSays, Finding, Log, Message, Option, OptionKind, TurnContext

BOOK = Option("book", "Book it", OptionKind.ALLOW_ONCE)
LEAVE = Option("leave", "Leave it", OptionKind.REJECT_ONCE)


class TableBookingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`restaurant`: whose tables; `seats`: how many there are in all."""

    restaurant: Annotated[str, msgspec.Meta(min_length=1)]
    seats: Annotated[int, msgspec.Meta(ge=1)] = 20


class TableBookingAgent(Agent):
    """Books seats until none is left. One instance serves all turns of its server, many at once."""

    Options = TableBookingOptions

    # A seat that was booked by a turn whose process died is not to be booked again.
    repeatable = False

    def __init__(self, options: TableBookingOptions) -> None:
        self._restaurant = options.restaurant
        self._free = options.seats

    async def check(self) -> AsyncGenerator[Finding]:
        """Say what `agents check` is to show before it speaks to the agent."""
        yield Finding(f"{self._restaurant} has {self._free} free seats.")

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentSays]:
        """Book a table for as many people as the input says, or as the caller says when asked."""
        number = re.search(r"\d+", turn.input)
        if number is None:
            answer = await turn.ask("For how many people?")
            number = re.search(r"\d+", answer.text or "")
        if number is None:
            raise AgentError("Say for how many people the table is to be.", "PEOPLE_UNKNOWN")
        people = int(number.group())
        answer = await turn.ask(f"Book a table for {people} at {self._restaurant}?", [BOOK, LEAVE], tool_kind="execute")
        if answer.option != BOOK.id:
            yield Message("Then I leave it.")
            return
        # Others may have booked while the caller thought about it.
        if people > self._free:
            raise AgentError(f"{self._restaurant} has only {self._free} seats left.", "FULLY_BOOKED")
        self._free -= people
        yield Log(f"table for {people} at {self._restaurant}", type="booking", metadata={"people": people})
        yield Message(f"A table for {people} is booked at {self._restaurant}.")
