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
SELECT * FROM acp.shown_runs
WHERE id = $1 AND organization = $2 AND server_id = $3 AND number = coalesce($4, last_turn)

-- name: run_key
SELECT run_key FROM acp.runs WHERE id = $1 AND organization = $2 AND server_id = $3

-- name: newest_runs
SELECT * FROM acp.shown_runs
WHERE organization = $1 AND server_id = $2 AND run_key < $3 AND number = last_turn{status}
ORDER BY run_key DESC LIMIT $4 + 1

-- name: newest_runs_of_turns
-- By the turns that did not complete, which are few; a settled one may be followed by a later turn of its run. {status}
-- is written out: only then can a partial index serve. Runs are found one by one, whatever the planner thinks.
SELECT run.* FROM (
    SELECT run_key, number FROM acp.turns
    WHERE status = '{status}' AND organization = $1 AND server_id = $2 AND run_key < $3 ORDER BY run_key DESC
) AS turn CROSS JOIN LATERAL (
    SELECT * FROM acp.shown_runs
    WHERE run_key = turn.run_key AND number = turn.number AND number = last_turn OFFSET 0
) AS run
ORDER BY turn.run_key DESC LIMIT $4 + 1

-- name: list_runs
SELECT * FROM (
    SELECT newest.*, row_number() OVER by_age AS place, count(*) OVER () AS found, sum(
        octet_length(input) + coalesce(octet_length(output), 0) + coalesce(octet_length(error), 0)
        + coalesce(octet_length(metadata), 0) + coalesce(octet_length(thread_metadata), 0)
        + 2 * coalesce(octet_length(title), 0)
    ) OVER by_age AS size
    FROM ({newest}) AS newest
    WINDOW by_age AS (ORDER BY run_key DESC)
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
