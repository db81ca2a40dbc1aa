-- Schema version 4 of the embedded store. `run_key` is the internal, dense key of a run: the events of a run lie
-- together under it, and a run's cost does not depend on how many there are.

CREATE TABLE runs (
    run_key          INTEGER PRIMARY KEY,
    id               TEXT    NOT NULL UNIQUE,
    organization     TEXT    NOT NULL,
    server_id        TEXT    NOT NULL,
    title            TEXT,
    thread_metadata  BLOB,
    created_at_ms    INTEGER NOT NULL,
    updated_at_ms    INTEGER NOT NULL,
    message_count    INTEGER NOT NULL,
    last_sequence    INTEGER NOT NULL,
    last_turn        INTEGER NOT NULL,
    status           TEXT    NOT NULL,  -- of turn `last_turn`
    question         BLOB  -- that the running turn has asked last; JSON
) STRICT;

-- Completed runs are nearly all: who asks for them finds them by the first index, the rare others by a small one.
-- (Partial indexes say OR: of IN, SQLite does not see that one status implies it.)
CREATE INDEX runs_by_server ON runs (organization, server_id, run_key);
CREATE INDEX runs_by_outcome ON runs (organization, server_id, status, run_key)
    WHERE status = 'failed' OR status = 'cancelled';

CREATE TABLE turns (
    run_key          INTEGER NOT NULL REFERENCES runs (run_key),
    number           INTEGER NOT NULL,
    status           TEXT    NOT NULL,
    mode             TEXT    NOT NULL,
    input            TEXT    NOT NULL,
    first_sequence   INTEGER NOT NULL,
    created_at_ms    INTEGER NOT NULL,
    output           TEXT,
    error            TEXT,
    error_code       TEXT,
    metadata         BLOB,
    completed_at_ms  INTEGER,
    attempt          INTEGER NOT NULL,
    epoch            INTEGER NOT NULL,
    ready            INTEGER NOT NULL,  -- no earlier turn of the run is open
    draft            TEXT,  -- the text so far of the message in the making
    PRIMARY KEY (run_key, number)
) STRICT, WITHOUT ROWID;

CREATE INDEX turns_open ON turns (status, ready, created_at_ms, run_key, number)
    WHERE status = 'queued' OR status = 'running';

-- Requests that make themselves known, so that they can be repeated. They know their run by its id: the key of a run
-- that was deleted may be another one's. Where the run is gone, the request is as one that never was.
-- (Under a number of their own, as ids come in no order: so only a small row is put in its place among all.)
CREATE TABLE requests (
    number           INTEGER PRIMARY KEY,  -- in the order of their acceptance
    organization     TEXT    NOT NULL,
    request_id       TEXT    NOT NULL,
    fingerprint      BLOB,  -- of all that it asked for; NULL: not known, any is the same
    run_id           TEXT    NOT NULL,
    turn             INTEGER NOT NULL,  -- that it opened; of a cancel, the latest then
    created_at_ms    INTEGER NOT NULL,
    UNIQUE (organization, request_id)
) STRICT;

CREATE TABLE events (
    run_key          INTEGER NOT NULL REFERENCES runs (run_key),
    sequence         INTEGER NOT NULL,
    turn             INTEGER NOT NULL,
    role             TEXT    NOT NULL,
    content          TEXT    NOT NULL,
    created_at_ms    INTEGER NOT NULL,
    log_type         TEXT,
    log_level        TEXT,
    metadata         BLOB,
    PRIMARY KEY (run_key, sequence)
) STRICT, WITHOUT ROWID;

-- Runs that were deleted while turns or events of them are still there.
CREATE TABLE deleted_runs (
    run_key          INTEGER PRIMARY KEY
) STRICT;

PRAGMA user_version = 4;
