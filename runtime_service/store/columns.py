"""What the stores have in common: queries in files by their names, and words of the domain as columns hold them."""

import re
from importlib import resources

from runtime_service.runs import EventRole, LogLevel, RunMode, RunStatus

SQL = resources.files("runtime_service.store") / "sql"
ROLES: dict[str, EventRole] = {role.value: role for role in EventRole}
LEVELS: dict[str | None, LogLevel | None] = {None: None} | {level.value: level for level in LogLevel}
STATUSES: dict[str, RunStatus] = {status.value: status for status in RunStatus}
MODES: dict[str, RunMode] = {mode.value: mode for mode in RunMode}


def named_queries(file: str) -> dict[str, str]:
    """Return the queries of a file of `sql/` by their names; each begins with a line `-- name: NAME`."""
    text = (SQL / file).read_text()
    return dict(re.findall(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", text, re.M | re.S))
