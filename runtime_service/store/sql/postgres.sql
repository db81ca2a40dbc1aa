-- What is read from PostgreSQL, each query by its name; and how a replica registers. Writes are in `postgres/`.

-- name: register
INSERT INTO acp.replicas (id, address, lease, lease_until, last_batch, last_result)
VALUES ($1, $2, make_interval(secs => $3), clock_timestamp() + make_interval(secs => $3), 0, '{}')
ON CONFLICT (id) DO NOTHING

-- name: give_up
DELETE FROM acp.replicas WHERE id = $1

-- name: apply
SELECT acp.apply($1, $2, $3)

-- name: probe
SELECT pg_notify('acp', $1)

-- name: is_claimable
SELECT EXISTS (SELECT FROM acp.turns WHERE status = 'queued' AND ready)

-- name: count_queued
SELECT count(*) FROM acp.turns WHERE status = 'queued'

-- name: get_run
-- By the id alone first: with the server's, too, it might be looked for among all runs of the server.
SELECT * FROM acp.shown_runs
WHERE run_key = (SELECT run_key FROM acp.runs WHERE id = $1) AND organization = $2 AND server_id = $3
  AND number = coalesce($4, last_turn)

-- name: run_key
SELECT run_key FROM acp.runs
WHERE run_key = (SELECT run_key FROM acp.runs WHERE id = $1) AND organization = $2 AND server_id = $3

-- name: latest_turns
-- Of all runs, or of those of which the latest turn has the status {status}: for nearly all.
SELECT run_key, last_turn AS number FROM acp.runs
WHERE organization = $1 AND server_id = $2 AND run_key < $3 {status} ORDER BY run_key DESC LIMIT $4 + 1

-- name: latest_turns_not_completed
-- {status} is a literal: only then can the partial index serve. There are never many.
SELECT run_key, number FROM acp.turns JOIN acp.runs USING (run_key)
WHERE turns.organization = $1 AND turns.server_id = $2 AND turns.status = '{status}' AND turns.run_key < $3
  AND number = last_turn
ORDER BY turns.run_key DESC LIMIT $4 + 1

-- name: list_runs
SELECT * FROM (
    SELECT shown.*, row_number() OVER by_age AS place, count(*) OVER () AS found, sum(
        octet_length(input) + coalesce(octet_length(output), 0) + coalesce(octet_length(error), 0)
        + coalesce(octet_length(metadata), 0) + coalesce(octet_length(thread_metadata), 0)
        + 2 * coalesce(octet_length(title), 0)
    ) OVER by_age AS size
    FROM ({latest_turns}) AS latest CROSS JOIN LATERAL (
        SELECT * FROM acp.shown_runs WHERE run_key = latest.run_key AND number = latest.number OFFSET 0
    ) AS shown
    WINDOW by_age AS (ORDER BY shown.run_key DESC)
) AS sized WHERE place <= $4 AND (size <= $5 OR place = 1) ORDER BY place

-- name: read_events
SELECT sequence, turn, role, content, created_at_ms, log_type, log_level, metadata FROM (
    SELECT next.*, row_number() OVER in_order AS place,
           sum(octet_length(content) + coalesce(octet_length(metadata), 0)) OVER in_order AS size
    FROM (
        SELECT * FROM acp.events
        WHERE run_key = (SELECT run_key FROM acp.runs WHERE id = $1) AND sequence > $2 ORDER BY sequence LIMIT $3
    ) AS next
    WINDOW in_order AS (ORDER BY sequence)
) AS sized WHERE size <= $4 OR place = 1 ORDER BY sequence

-- name: read_messages
-- The thread as a model wants it: turn by turn, also where an input came while an earlier turn was running.
SELECT role, content FROM acp.events
WHERE run_key = (SELECT run_key FROM acp.runs WHERE id = $1) AND turn < $2
  AND role IN ('user', 'assistant') AND log_type IS NULL
ORDER BY turn DESC, sequence DESC LIMIT $3

-- name: read_latest_log
SELECT sequence, turn, role, content, created_at_ms, log_type, log_level, metadata FROM acp.events
WHERE run_key = (SELECT run_key FROM acp.runs WHERE id = $1) AND log_type = $2 AND sequence > $3
ORDER BY sequence DESC LIMIT 1
