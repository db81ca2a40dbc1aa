"""Rows of the PostgreSQL store to domain values, and what is read. Of a run, columns are known by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from runtime_service.runs import Question, Run, RunEvent, RunStatus, Turn
from runtime_service.store.columns import LEVELS, MODES, ROLES, STATUSES
from runtime_service.store.postgres_connection import QUERIES

_decode_question = msgspec.json.Decoder(Question).decode


def _listing(status: RunStatus | None) -> str:
    if status is None:
        latest_turns = QUERIES["latest_turns"].format(status="")
    elif status is RunStatus.COMPLETED:
        latest_turns = QUERIES["latest_turns"].format(status="AND status = 'completed'")
    else:
        latest_turns = QUERIES["latest_turns_not_completed"].format(status=status.value)
    return QUERIES["list_runs"].format(latest_turns=latest_turns)


LIST_RUNS: dict[RunStatus | None, str] = {status: _listing(status) for status in (None, *RunStatus)}
"""The query of a page of runs, by the status asked for."""


def run_from_row(row: Mapping[str, Any], own: str | None) -> Run:
    """Return the run of a row of `acp.shown_runs`; `own` is the id of the replica that asks."""
    turn = Turn(
        number=row["number"],
        status=STATUSES[row["status"]],
        mode=MODES[row["mode"]],
        input=row["input"],
        first_sequence=row["first_sequence"],
        created_at_ms=row["turn_created_at_ms"],
        output=row["output"],
        error=row["error"],
        error_code=row["error_code"],
        metadata=_bytes(row["metadata"]),
        completed_at_ms=row["completed_at_ms"],
        attempt=row["attempt"],
        epoch=row["epoch"],
        ready=row["ready"],
    )
    return Run(
        id=row["id"],
        organization=row["organization"],
        server_id=row["server_id"],
        created_at_ms=row["created_at_ms"],
        updated_at_ms=row["updated_at_ms"],
        message_count=row["message_count"],
        last_sequence=row["last_sequence"],
        last_turn=row["last_turn"],
        turn=turn,
        title=row["title"],
        thread_metadata=_bytes(row["thread_metadata"]),
        holder=None if row["holder"] == own else row["address"],
        question=None if (question := row["question"]) is None else _decode_question(question),
    )


def event_from_row(row: Sequence[Any]) -> RunEvent:
    """Return the event of a row: its columns in the order of the fields."""
    sequence, turn, role, content, at, log_type, level, metadata = row
    return RunEvent(sequence, turn, ROLES[role], content, at, log_type, LEVELS[level], _bytes(metadata))


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
