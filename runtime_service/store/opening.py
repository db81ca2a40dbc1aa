"""Which store of runs a setting means."""

from pathlib import Path

from runtime_service.store.base import RunStore
from runtime_service.store.sqlite import SQLiteStore


async def open_store(url: str | None, path: Path, *, address: str, lease_seconds: float) -> RunStore:
    """Open the PostgreSQL database at `url`, or without one the SQLite file at `path`.

    Other processes of the same store reach this one at `address`. Raises StoreUnavailable.
    """
    if url is None:
        return await SQLiteStore.open(path)
    # Not for those who do without: importing it takes a while.
    from runtime_service.store.postgres import PostgresStore

    return await PostgresStore.open(url, address=address, lease_seconds=lease_seconds)
