"""A plain function as an agent: it asks for what it has to know, and once more before it does anything.

acp-gateway up --servers examples/function/servers.toml
"""

import re
from collections.abc import AsyncGenerator

from runtime_service.agents import Log, Option, OptionKind, TurnContext

BOOK = Option("book", "Book it", OptionKind.ALLOW_ONCE)
LEAVE = Option("leave", "Leave it", OptionKind.REJECT_ONCE)


async def book_table(turn: TurnContext) -> AsyncGenerator[str | Log]:
    """Book a table for as many people as the input says, or as the caller says when asked."""
    number = re.search(r"\d+", turn.input)
    if number is None:
        answer = await turn.ask("For how many people?")
        number = re.search(r"\d+", answer.text or "")
    if number is None:
        yield "Without a number of people I can book no table."
        return
    people = number.group()
    answer = await turn.ask(f"Book a table for {people} at eight?", [BOOK, LEAVE], tool_kind="execute")
    if answer.option != BOOK.id:
        yield "Then I leave it."
        return
    yield Log(f"table for {people} at 20:00", type="booking", metadata={"people": int(people)})
    yield f"A table for {people} is booked for eight o'clock."
