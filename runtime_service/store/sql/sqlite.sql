-- The queries of the embedded store. Each begins with a line `-- name: NAME`.
-- A turn is written to only while it runs and its epoch is the writer's own.

-- name: insert_run
INSERT INTO runs (run_key, id, organization, server_id, title, thread_metadata, created_at_ms, updated_at_ms,
                  message_count, last_sequence, last_turn, status)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: insert_turn
INSERT INTO turns (run_key, number, status, mode, input, first_sequence, created_at_ms, output, error, error_code,
                   metadata, completed_at_ms, attempt, epoch, ready)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: insert_request
-- One of the same id is there only when its run is gone.
INSERT OR REPLACE INTO requests (organization, request_id, fingerprint, run_id, turn, created_at_ms)
VALUES (?, ?, ?, ?, ?, ?)

-- name: insert_event
INSERT INTO events (run_key, sequence, turn, role, content, created_at_ms, log_type, log_level, metadata)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: open_next_turn
UPDATE runs SET last_turn = last_turn + 1, last_sequence = last_sequence + 1, message_count = message_count + 1,
                updated_at_ms = ?2, status = ?3
WHERE run_key = ?1

-- name: extend_log
UPDATE runs SET last_sequence = ?2, message_count = ?3, updated_at_ms = ?4, question = ?5 WHERE run_key = ?1

-- name: settle_run
-- A run has the status of its latest turn.
UPDATE runs SET status = ?3 WHERE run_key = ?1 AND last_turn = ?2

-- name: settle_turn
UPDATE turns SET status = ?3, output = ?4, error = ?5, error_code = ?6, completed_at_ms = ?7, draft = NULL
WHERE run_key = ?1 AND number = ?2

-- name: requeue_turn
UPDATE turns SET status = 'queued', attempt = ?3, epoch = epoch + 1, draft = NULL
WHERE run_key = ?1 AND number = ?2

-- name: claim_turn
UPDATE turns SET status = 'running', attempt = attempt + 1, epoch = epoch + 1
WHERE run_key = ?1 AND number = ?2

-- name: take_turn_away
UPDATE turns SET epoch = epoch + 1 WHERE run_key = ?1 AND number = ?2

-- name: forget_draft
UPDATE turns SET draft = NULL WHERE run_key = ?1 AND number = ?2

-- name: save_draft
UPDATE turns SET draft = ?4
WHERE run_key = (SELECT run_key FROM runs WHERE id = ?1) AND number = ?2 AND epoch = ?3 AND status = 'running'

-- name: set_run
-- A run has the status of its latest turn.
UPDATE runs SET last_sequence = ?2, message_count = ?3, updated_at_ms = ?4, question = ?5,
                status = (SELECT status FROM turns WHERE turns.run_key = ?1 AND number = last_turn)
WHERE run_key = ?1

-- name: claimable_turns
-- Queued turns in the order of their acceptance, without those that wait for an earlier turn of their run.
SELECT run_key, number FROM turns
WHERE status = 'queued' AND ready = 1 ORDER BY created_at_ms, run_key LIMIT ?1

-- name: make_ready
-- The turn behind one that was settled waits for room only.
UPDATE turns SET ready = 1 WHERE run_key = ?1 AND number = ?2 AND status = 'queued'

-- name: running_turns
SELECT run_key, number, epoch FROM turns WHERE status = 'running' ORDER BY run_key, number

-- name: turns_of_run
-- Newest first, for a reader that stops at the first settled one: those before it are settled, too.
SELECT number, status FROM turns WHERE run_key = ?1 ORDER BY number DESC

-- name: count_queued
SELECT count(*) FROM turns WHERE status = 'queued'

-- name: run_key
SELECT run_key FROM runs WHERE id = ?1 AND organization = ?2 AND server_id = ?3

-- name: run_at_turn
SELECT runs.id, organization, server_id, runs.created_at_ms, updated_at_ms, message_count, last_sequence, last_turn,
       title, thread_metadata,
       number, turns.status, mode, input, first_sequence, turns.created_at_ms, output, error, error_code, metadata,
       completed_at_ms, attempt, epoch, ready, question
FROM runs JOIN turns ON turns.run_key = runs.run_key AND number = coalesce(?2, last_turn)
WHERE runs.run_key = ?1

-- name: last_run_key
-- The greatest in use, also by what is left of a deleted run.
SELECT max(coalesce((SELECT max(run_key) FROM runs), 0), coalesce((SELECT max(run_key) FROM deleted_runs), 0))

-- name: requested_turn
SELECT run_key, turn, fingerprint FROM requests JOIN runs ON runs.id = run_id
WHERE requests.organization = ?1 AND request_id = ?2

-- name: runs_of_age
-- Whether each was accepted before a time, whether it may be deleted as not used since, and how many rows that are.
SELECT run_key, created_at_ms < ?2, updated_at_ms < ?2 AND status NOT IN ('queued', 'running'), last_sequence + last_turn
FROM runs WHERE run_key > ?1 ORDER BY run_key LIMIT ?3

-- name: delete_run
DELETE FROM runs WHERE run_key = ?1 AND updated_at_ms < ?2 AND status NOT IN ('queued', 'running')

-- name: deleted_runs
SELECT run_key FROM deleted_runs ORDER BY run_key

-- name: note_deleted_run
INSERT OR IGNORE INTO deleted_runs (run_key) VALUES (?)

-- name: forget_deleted_run
DELETE FROM deleted_runs WHERE run_key = ?

-- name: sizes_of_events
-- octet_length does not read the text.
SELECT sequence, octet_length(content) + coalesce(octet_length(metadata), 0)
FROM events WHERE run_key = ?1 ORDER BY sequence LIMIT ?2

-- name: delete_events
DELETE FROM events WHERE run_key = ?1 AND sequence <= ?2

-- name: sizes_of_turns
SELECT number, octet_length(input) + coalesce(octet_length(output), 0) + coalesce(octet_length(error), 0)
               + coalesce(octet_length(metadata), 0)
FROM turns WHERE run_key = ?1 ORDER BY number LIMIT ?2

-- name: delete_turns
DELETE FROM turns WHERE run_key = ?1 AND number <= ?2

-- name: forget_requests
-- Looked for among those made first. Not only up to the first young one: the clock may have been wrong then.
DELETE FROM requests WHERE number IN (
    SELECT number FROM (SELECT number, created_at_ms FROM requests ORDER BY number LIMIT ?3)
    WHERE created_at_ms < ?1 LIMIT ?2
)

-- name: draft
SELECT draft FROM turns WHERE run_key = ?1 AND number = ?2

-- name: list_runs
SELECT runs.id, organization, server_id, runs.created_at_ms, updated_at_ms, message_count, last_sequence, last_turn,
       title, thread_metadata,
       number, turns.status, mode, input, first_sequence, turns.created_at_ms, output, error, error_code, metadata,
       completed_at_ms, attempt, epoch, ready, question
FROM runs JOIN turns ON turns.run_key = runs.run_key AND number = last_turn
WHERE organization = ?1 AND server_id = ?2 AND runs.run_key < ?3
ORDER BY runs.run_key DESC LIMIT ?4

-- name: list_runs_by_status
-- {status} is a literal: only then can a partial index serve.
SELECT runs.id, organization, server_id, runs.created_at_ms, updated_at_ms, message_count, last_sequence, last_turn,
       title, thread_metadata,
       number, turns.status, mode, input, first_sequence, turns.created_at_ms, output, error, error_code, metadata,
       completed_at_ms, attempt, epoch, ready, question
FROM runs JOIN turns ON turns.run_key = runs.run_key AND number = last_turn
WHERE organization = ?1 AND server_id = ?2 AND runs.run_key < ?3 AND runs.status = '{status}'
ORDER BY runs.run_key DESC LIMIT ?4

-- name: list_open_runs
-- {status} is a literal: only then can the partial index serve. There are never many.
SELECT runs.id, organization, server_id, runs.created_at_ms, updated_at_ms, message_count, last_sequence, last_turn,
       title, thread_metadata,
       number, turns.status, mode, input, first_sequence, turns.created_at_ms, output, error, error_code, metadata,
       completed_at_ms, attempt, epoch, ready, question
FROM turns INDEXED BY turns_open CROSS JOIN runs ON turns.run_key = runs.run_key AND number = last_turn
WHERE turns.status = '{status}' AND organization = ?1 AND server_id = ?2 AND runs.run_key < ?3
ORDER BY runs.run_key DESC LIMIT ?4

-- name: running_turn
SELECT runs.id, organization, server_id, runs.created_at_ms, updated_at_ms, message_count, last_sequence, last_turn,
       title, thread_metadata,
       number, turns.status, mode, input, first_sequence, turns.created_at_ms, output, error, error_code, metadata,
       completed_at_ms, attempt, epoch, ready, question,
       runs.run_key, draft IS NOT NULL
FROM runs JOIN turns ON turns.run_key = runs.run_key AND number = ?2
WHERE runs.id = ?1 AND epoch = ?3 AND turns.status = 'running'

-- name: events_after
SELECT sequence, turn, role, content, created_at_ms, log_type, log_level, metadata FROM events
WHERE run_key = (SELECT run_key FROM runs WHERE id = ?1) AND sequence > ?2 ORDER BY sequence LIMIT ?3

-- name: messages_before_turn
-- The thread as a model wants it: turn by turn, also where an input came while an earlier turn was running.
SELECT role, content FROM events
WHERE run_key = (SELECT run_key FROM runs WHERE id = ?1) AND turn < ?2
  AND role IN ('user', 'assistant') AND log_type IS NULL
ORDER BY turn DESC, sequence DESC LIMIT ?3

-- name: latest_log
SELECT sequence, turn, role, content, created_at_ms, log_type, log_level, metadata FROM events
WHERE run_key = (SELECT run_key FROM runs WHERE id = ?1) AND log_type = ?2 AND sequence > ?3
ORDER BY sequence DESC LIMIT 1
