"""A pydantic-ai agent with tools, one of which needs the caller's permission.

    acp-gateway up --servers examples/pydantic_ai_tools/servers.toml

Without an account a few rules play the model. STORE_KEEPER_MODEL names a real one, such as `openai:gpt-5-mini`; its key
is then where pydantic-ai looks for it (OPENAI_API_KEY).

The first half is pydantic-ai's own: the agent, its tools, `requires_approval`. The second half, `keep_store`, is all
that the gateway needs: the history goes in, events come out, and an approval becomes a question to the caller.
"""

import os
import re
from collections.abc import AsyncGenerator, AsyncIterator

from pydantic_ai import (
    Agent,
    AgentRunResultEvent,
    DeferredToolRequests,
    DeferredToolResults,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    RunUsage,
    TextPart,
    TextPartDelta,
    ToolDenied,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel

from runtime_service.agents import Delta, HistoryMessage, Message, Option, OptionKind, ToolCall, ToolResult, TurnContext
from runtime_service.runs import EventRole

# -- The agent -----------------------------------------------------------------------------------------

STOCK = {"flour": 12, "sugar": 3, "salt": 40}


async def rules(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    """Play the model: call the tool that the input asks for, then say what came of it."""
    part = messages[-1].parts[-1]
    if isinstance(part, UserPromptPart):
        text = str(part.content).lower()
        item = next((name for name in STOCK if name in text), None)
        if item is not None and (quantity := re.search(r"order (\d+)", text)):
            yield {0: DeltaToolCall("order", f'{{"item": "{item}", "quantity": {quantity[1]}}}')}
            return
        if item is not None:
            yield {0: DeltaToolCall("count", f'{{"item": "{item}"}}')}
            return
        said = f"I can count and order {', '.join(STOCK)}."
    else:
        said = part.model_response_str() if isinstance(part, ToolReturnPart) else "I cannot do that."
    for word in re.findall(r"\S+\s*", said):
        yield word


keeper = Agent(
    os.environ.get("STORE_KEEPER_MODEL") or FunctionModel(stream_function=rules),
    instructions="You keep the store of a bakery. Be brief. Count before you say how much there is.",
    output_type=[str, DeferredToolRequests],
)


@keeper.tool_plain
def count(item: str) -> str:
    """Count how many bags of an item there are."""
    return f"There are {STOCK[item]} bags of {item}." if item in STOCK else f"There is no {item}."


@keeper.tool_plain(requires_approval=True)
def order(item: str, quantity: int) -> str:
    """Order bags of an item; this spends money."""
    return f"{quantity} bags of {item} are ordered."


# -- The agent of the gateway --------------------------------------------------------------------------

OPTIONS = (
    Option("allow", "Allow", OptionKind.ALLOW_ONCE),
    Option("reject", "Reject", OptionKind.REJECT_ONCE),
)


async def keep_store(turn: TurnContext) -> AsyncGenerator[Delta | Message | ToolCall | ToolResult]:
    """Run the agent; where it needs an approval, ask the caller and let it go on."""
    prompt: str | None = turn.input
    messages = [_as_model_message(each) for each in await turn.history()]
    approvals: DeferredToolResults | None = None
    usage = RunUsage()
    told: set[str] = set()  # a call is told again when it goes on with its approval
    while True:
        text = ""
        async with keeper.run_stream_events(
            prompt, message_history=messages, deferred_tool_results=approvals, usage=usage
        ) as events:
            async for event in events:
                match event:
                    case (
                        PartStartEvent(part=TextPart(content=piece))
                        | PartDeltaEvent(delta=TextPartDelta(content_delta=piece))
                    ):
                        text += piece
                        yield Delta(piece)
                    case FunctionToolCallEvent(part=call) if call.tool_call_id not in told:
                        if text:  # what the model said before the call is a message of its own
                            yield Message(text)
                            text = ""
                        told.add(call.tool_call_id)
                        yield ToolCall(call.tool_name, call.args_as_dict(), call.tool_call_id)
                    case FunctionToolResultEvent(part=part):
                        yield _as_tool_result(part)
                    case AgentRunResultEvent(result=result):
                        break
        if isinstance(result.output, str):
            spent = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
            yield Message(result.output, {"model": result.response.model_name, "usage": spent})
            return
        prompt, messages, approvals = None, result.all_messages(), await _approvals(turn, result.output)


async def _approvals(turn: TurnContext, requests: DeferredToolRequests) -> DeferredToolResults:
    """Ask the caller for each of the calls."""
    results = DeferredToolResults()
    for call in requests.approvals:
        answer = await turn.ask(
            f"May I call {call.tool_name} with {call.args_as_json_str()}?",
            OPTIONS,
            tool_kind="execute",
            metadata={"toolCallId": call.tool_call_id, "arguments": call.args_as_dict()},
        )
        results.approvals[call.tool_call_id] = answer.option == "allow" or ToolDenied("The caller did not allow it.")
    return results


def _as_model_message(message: HistoryMessage) -> ModelMessage:
    if message.role is EventRole.USER:
        return ModelRequest([UserPromptPart(message.content)])
    return ModelResponse([TextPart(message.content)])


def _as_tool_result(part: ToolReturnPart) -> ToolResult:
    return ToolResult(part.tool_name, part.model_response_str(), part.tool_call_id, failed=part.outcome != "success")
