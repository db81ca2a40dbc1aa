-- From schema version 2 to 3: requests in a table of their own, that they can be forgotten, and cancels be among them;
-- and a place for runs that are being deleted.

CREATE TABLE requests (
    organization     TEXT    NOT NULL,
    request_id       TEXT    NOT NULL,
    fingerprint      BLOB,
    run_id           TEXT    NOT NULL,
    turn             INTEGER NOT NULL,
    created_at_ms    INTEGER NOT NULL,
    PRIMARY KEY (organization, request_id)
) STRICT, WITHOUT ROWID;

INSERT INTO requests
SELECT organization, request_id, NULL, runs.id, number, turns.created_at_ms
FROM turns JOIN runs ON runs.run_key = turns.run_key
WHERE request_id IS NOT NULL ORDER BY organization, request_id;

CREATE INDEX requests_by_age ON requests (created_at_ms);

CREATE TABLE deleted_runs (
    run_key          INTEGER PRIMARY KEY
) STRICT;

DROP INDEX turns_by_request;
ALTER TABLE turns DROP COLUMN request_id;

PRAGMA user_version = 3;
