-- The tables of the PostgreSQL store; all that is made here is in the schema `acp`.
--
-- `run_key` is the internal key of a run, given in the order of acceptance. Nothing refers to another table by a
-- constraint: every write goes through `acp.apply`, which holds the row of the run while it writes the others.
-- Columns that the usual writes change are in no index of `acp.runs`: so its rows are updated in place (HOT).

CREATE SEQUENCE acp.run_keys;

CREATE TABLE acp.runs (
    run_key          bigint PRIMARY KEY,
    id               text COLLATE "C" NOT NULL UNIQUE,
    organization     text COLLATE "C" NOT NULL,
    server_id        text COLLATE "C" NOT NULL,
    title            text,
    thread_metadata  text,
    created_at_ms    bigint NOT NULL,
    updated_at_ms    bigint NOT NULL,
    message_count    bigint NOT NULL,
    last_sequence    bigint NOT NULL,
    last_turn        integer NOT NULL,
    status           text COLLATE "C" NOT NULL  -- of turn `last_turn`
) WITH (fillfactor = 80);

CREATE INDEX runs_by_server ON acp.runs (organization, server_id, run_key);

CREATE TABLE acp.turns (
    run_key          bigint NOT NULL,
    number           integer NOT NULL,
    organization     text COLLATE "C" NOT NULL,  -- of the run, as the server's id: for the index by status
    server_id        text COLLATE "C" NOT NULL,
    status           text COLLATE "C" NOT NULL,
    mode             text NOT NULL,
    input            text NOT NULL,
    first_sequence   bigint NOT NULL,
    created_at_ms    bigint NOT NULL,
    output           text,
    error            text,
    error_code       text,
    metadata         text,
    completed_at_ms  bigint,
    attempt          integer NOT NULL,
    epoch            integer NOT NULL,
    ready            boolean NOT NULL,  -- no earlier turn of the run is open
    draft            text,  -- the text so far of the message in the making
    holder           text COLLATE "C",  -- the replica that executes it, exactly while it is running
    PRIMARY KEY (run_key, number)
);

CREATE INDEX turns_queued ON acp.turns (ready, created_at_ms, run_key) WHERE status = 'queued';
CREATE INDEX turns_running ON acp.turns (run_key) WHERE status = 'running';
-- Completed turns are nearly all: the others are few, and found without them.
CREATE INDEX turns_not_completed ON acp.turns (organization, server_id, status, run_key) WHERE status <> 'completed';

CREATE TABLE acp.events (
    run_key          bigint NOT NULL,
    sequence         bigint NOT NULL,
    turn             integer NOT NULL,
    role             text NOT NULL,
    content          text NOT NULL,
    created_at_ms    bigint NOT NULL,
    log_type         text,
    log_level        text,
    metadata         text,
    PRIMARY KEY (run_key, sequence)
);

-- Requests that make themselves known, so that they can be repeated. They go with their run.
CREATE TABLE acp.requests (
    organization     text COLLATE "C" NOT NULL,
    request_id       text COLLATE "C" NOT NULL,
    fingerprint      bytea NOT NULL,  -- of all that it asked for
    run_key          bigint NOT NULL,
    turn             integer NOT NULL,  -- that it opened; of a cancel, the latest then; 0 only within a transaction
    created_at_ms    bigint NOT NULL,
    PRIMARY KEY (organization, request_id)
);

CREATE INDEX requests_by_age ON acp.requests (created_at_ms);
CREATE INDEX requests_by_run ON acp.requests (run_key);

-- The processes that write here. What a replica holds is its own while its lease lasts, by the clock of the database.
CREATE TABLE acp.replicas (
    id               text COLLATE "C" PRIMARY KEY,
    address          text NOT NULL,
    lease            interval NOT NULL,
    lease_until      timestamptz NOT NULL,
    last_batch       bigint NOT NULL,  -- the number of the last batch that was applied, and what came of it
    last_result      jsonb NOT NULL
) WITH (fillfactor = 20);

-- Runs that were deleted and of which turns and events are still to be removed.
CREATE TABLE acp.deleted_runs (
    run_key          bigint PRIMARY KEY
);

-- A run as it shows one of its turns; holder and address are those of the replica that executes one of them.
CREATE VIEW acp.shown_runs AS
SELECT runs.run_key, runs.id, runs.organization, runs.server_id, runs.title, runs.thread_metadata,
       runs.created_at_ms, runs.updated_at_ms, runs.message_count, runs.last_sequence, runs.last_turn,
       runs.status AS run_status,
       turns.number, turns.status, turns.mode, turns.input, turns.first_sequence,
       turns.created_at_ms AS turn_created_at_ms,
       turns.output, turns.error, turns.error_code, turns.metadata, turns.completed_at_ms, turns.attempt, turns.epoch,
       turns.ready, held.holder, held.address
FROM acp.runs JOIN acp.turns ON turns.run_key = runs.run_key LEFT JOIN LATERAL (
    SELECT running.holder, replicas.address
    FROM acp.turns AS running LEFT JOIN acp.replicas ON replicas.id = running.holder
    WHERE running.run_key = runs.run_key AND running.status = 'running'
) AS held ON true;
