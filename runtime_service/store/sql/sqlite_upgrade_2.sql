-- From schema version 2 to 3: requests in a table of their own, that they can be forgotten, and cancels be among them;
-- and a place for runs that are being deleted.

CREATE TABLE requests (
    number           INTEGER PRIMARY KEY,
    organization     TEXT    NOT NULL,
    request_id       TEXT    NOT NULL,
    fingerprint      BLOB,
    run_id           TEXT    NOT NULL,
    turn             INTEGER NOT NULL,
    created_at_ms    INTEGER NOT NULL,
    UNIQUE (organization, request_id)
) STRICT;

INSERT INTO requests (organization, request_id, fingerprint, run_id, turn, created_at_ms)
SELECT organization, request_id, NULL, runs.id, number, turns.created_at_ms
FROM turns JOIN runs ON runs.run_key = turns.run_key
WHERE request_id IS NOT NULL ORDER BY turns.created_at_ms;

CREATE TABLE deleted_runs (
    run_key          INTEGER PRIMARY KEY
) STRICT;

DROP INDEX turns_by_request;
ALTER TABLE turns DROP COLUMN request_id;

PRAGMA user_version = 3;
