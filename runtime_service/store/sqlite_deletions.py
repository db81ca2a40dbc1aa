"""What the embedded store forgets: runs and requests that are old, a small piece of the work in each transaction.

Old runs are looked for in the order of their acceptance, through any connection: no index has the time of a run's
last write, as each append would have to write to it. A long run is deleted over several transactions; it is gone
with the first one, in which it loses its row in `runs`. The file does not shrink: what is written later takes the room.
"""

from collections.abc import Sequence
from typing import NamedTuple

import apsw

from runtime_service.store.base import Deleted
from runtime_service.store.sqlite_rows import execute

_PAGE_RUNS = 1_000
_PAGE_REQUESTS = 10_000
_ROW_BYTES = 4_096  # what a row may hold and count as one


class OldRuns(NamedTuple):
    """Keys of old runs, in order; the runs up to `last_key` were looked at. `ended`: behind it there are no more."""

    keys: Sequence[int]
    last_key: int
    ended: bool


def old_runs(db: apsw.Connection, after: int, before_ms: int, limit: int) -> OldRuns:
    """Look for runs behind a key that may be deleted, until they have `limit` rows or a page of runs was looked at."""
    keys: list[int] = []
    count = size = 0
    any_old = False
    for key, old, unused, row_count in execute(db, "runs_of_age", (after, before_ms, _PAGE_RUNS)):
        after = key
        count += 1
        any_old = any_old or bool(old)
        if unused:
            keys.append(key)
            size += row_count
            if size >= limit:
                return OldRuns(keys, after, ended=False)
    # Not at the first that is young: the clock may have been wrong when it was accepted.
    return OldRuns(keys, after, ended=count < _PAGE_RUNS or not any_old)


def delete_runs(db: apsw.Connection, found: OldRuns, before_ms: int, limit: int) -> tuple[Deleted, int]:
    """Delete what is left of deleted runs, then those found that are still unused, up to about `limit` rows.

    Return how much, and the key up to which all was seen to.
    """
    deleted = {"runs": 0, "turns": 0, "events": 0}
    left = [key for (key,) in execute(db, "deleted_runs", ())]
    last_key, room = found.last_key, limit
    for key in [*left, *found.keys]:
        if room <= 0:
            last_key = key - 1
            break
        if key not in left:
            execute(db, "delete_run", (key, before_ms))
            if not db.changes():
                continue
            deleted["runs"] += 1
            room -= 1
        for table in ("events", "turns"):
            if room > 0:
                count, size = _delete_rows(db, table, key, room)
                deleted[table] += count
                room -= size
        execute(db, "note_deleted_run" if room <= 0 else "forget_deleted_run", (key,))
    return Deleted(**deleted), last_key


def _delete_rows(db: apsw.Connection, table: str, key: int, room: int) -> tuple[int, int]:
    """Delete a run's first rows of a table, at least one; return how many, and as how many they count."""
    count = size = last = 0
    for number, row_bytes in execute(db, f"sizes_of_{table}", (key, room)):
        last = number
        count += 1
        size += 1 + row_bytes // _ROW_BYTES
        if size >= room:
            break
    execute(db, f"delete_{table}", (key, last))
    return count, size


def forget_requests(db: apsw.Connection, before_ms: int, limit: int) -> int:
    """Forget requests made before a time; return how many."""
    execute(db, "forget_requests", (before_ms, limit, _PAGE_REQUESTS))
    return db.changes()
