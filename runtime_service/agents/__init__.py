"""The kinds of agents, and what an agent of one's own yields."""

from runtime_service.agents.base import (
    Agent,
    AgentError,
    AgentOutput,
    AgentSays,
    Answer,
    AnsweredBy,
    Delta,
    HistoryMessage,
    Log,
    Message,
    Option,
    OptionKind,
    Surroundings,
    ToolCall,
    ToolResult,
    TurnContext,
)

__all__ = [
    "Agent",
    "AgentError",
    "AgentOutput",
    "AgentSays",
    "Answer",
    "AnsweredBy",
    "Delta",
    "HistoryMessage",
    "Log",
    "Message",
    "Option",
    "OptionKind",
    "Surroundings",
    "ToolCall",
    "ToolResult",
    "TurnContext",
]
