-- From schema version 1 to 2: turns know the request that opened them.

ALTER TABLE turns ADD COLUMN request_id TEXT;
CREATE INDEX turns_by_request ON turns (request_id) WHERE request_id IS NOT NULL;

PRAGMA user_version = 2;
