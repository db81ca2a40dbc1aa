"""A LangGraph graph that stops for its reader: `interrupt` becomes a question to the caller.

    acp-gateway up --servers examples/langgraph_approval/servers.toml

The first half is LangGraph's own: a graph that drafts a newsletter, shows it, and revises it until its reader is
content. The second half, `write_newsletter`, is all that the gateway needs: what the graph streams becomes deltas, a
step becomes a log entry, and the value of an `interrupt` is asked with `turn.ask`, whose answer resumes the graph.

No account is needed: rules stand where a model would. A checkpoint lives as long as the turn; what was said in earlier
turns comes from `turn.history()`, so a run goes on after a restart, and on another machine.
"""

import re
from collections.abc import AsyncGenerator
from typing import Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt

from runtime_service.agents import Delta, Log, Message, TurnContext
from runtime_service.runs import EventRole

# -- The graph -----------------------------------------------------------------------------------------


class Newsletter(TypedDict):
    """What the graph knows: what to write about, what was asked to be changed, and the text."""

    topics: list[str]
    wishes: list[str]
    text: str


async def draft(state: Newsletter) -> dict[str, Any]:
    """Write the text, a word at a time."""
    topics = " and ".join(state["topics"])
    text = f"This month: {topics}." + "".join(f" ({wish})" for wish in state["wishes"])
    write = get_stream_writer()
    for word in re.findall(r"\S+\s*", text):
        write(word)
    return {"text": text}


async def review(state: Newsletter) -> Command[str]:
    """Show the text to its reader; what is neither a yes nor silence is a wish."""
    answer = interrupt("Shall it go out like this? Say yes, or what to change.")
    if not answer:
        return Command(goto=END)
    if answer.strip().lower() == "yes":
        return Command(goto="send")
    return Command(goto="draft", update={"wishes": [*state["wishes"], answer]})


async def send(state: Newsletter) -> None:
    """Here it would go out."""


newsletter = (
    StateGraph(Newsletter)
    .add_node("draft", draft)
    .add_node("review", review, destinations=("draft", "send", END))
    .add_node("send", send)
    .add_edge(START, "draft")
    .add_edge("draft", "review")
    .add_edge("send", END)
)

# -- The agent of the gateway --------------------------------------------------------------------------


async def write_newsletter(turn: TurnContext) -> AsyncGenerator[Delta | Log | Message]:
    """Run the graph; ask what it interrupts for, and resume it with the answer."""
    earlier = [message.content for message in await turn.history() if message.role is EventRole.USER]
    step: Newsletter | Command[str] | None = Newsletter(topics=[*earlier, turn.input], wishes=[], text="")
    # Of this turn alone: one that was shared would keep the checkpoints of all turns that ever were.
    graph = newsletter.compile(checkpointer=InMemorySaver())
    config = RunnableConfig(configurable={"thread_id": turn.run_id})
    while step is not None:
        question: str | None = None
        async for _, chunk in graph.astream(step, config, stream_mode=["custom", "updates"]):
            if isinstance(chunk, str):  # what a node writes; else what the nodes have changed
                yield Delta(chunk)
                continue
            for node, update in chunk.items():
                if node == "__interrupt__":
                    question = update[0].value
                elif node == "draft":
                    yield Message(update["text"])
                else:
                    yield Log(f"{node} is done", type="step")
        step = None
        if question is not None:
            answer = await turn.ask(question)
            step = Command(resume=answer.text or "")
