-- What is old is deleted in small pieces. The time of a run's last write is in no index, as each write would have to
-- change that; so runs are looked through in the order of their acceptance.

-- As how many rows one counts that holds these texts.
CREATE FUNCTION acp.cost(p_text text, p_more text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT 1 + (octet_length(p_text) + coalesce(octet_length(p_more), 0)) / 4096
$$;

-- Delete settled runs behind the key `after`, in the order of their keys, that were last written to before a time; then
-- the turns and events of deleted runs. In all about `limit` rows, of which one counts once more for each 4 KiB.
-- Returns the counts, and the key to go on behind, NULL when there is none.
CREATE FUNCTION acp.delete_runs(p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    room bigint := (p->>'limit')::bigint;
    before_ms bigint := (p->>'before_ms')::bigint;
    after bigint := (p->>'after')::bigint;
    run record;
    runs integer := 0;
    turns integer := 0;
    events integer := 0;
    step record;
BEGIN
    LOOP
        -- What is left of runs that are deleted goes first.
        FOR run IN SELECT d.run_key FROM acp.deleted_runs d ORDER BY d.run_key FOR UPDATE SKIP LOCKED LOOP
            EXIT WHEN room <= 0;
            WITH gone AS (
                DELETE FROM acp.events e WHERE e.run_key = run.run_key AND e.sequence <= (
                    SELECT max(sized.sequence) FROM (
                        SELECT c.sequence, c.cost, sum(c.cost) OVER (ORDER BY c.sequence) AS total FROM (
                            SELECT v.sequence, acp.cost(v.content, v.metadata) AS cost
                            FROM acp.events v WHERE v.run_key = run.run_key ORDER BY v.sequence LIMIT room
                        ) AS c
                    ) AS sized WHERE sized.total - sized.cost < room
                )
                RETURNING acp.cost(e.content, e.metadata) AS cost
            ) SELECT count(*) AS number, coalesce(sum(cost), 0) AS cost INTO step FROM gone;
            events := events + step.number;
            room := room - step.cost;
            EXIT WHEN room <= 0;
            WITH gone AS (
                DELETE FROM acp.turns t WHERE t.run_key = run.run_key AND t.number <= (
                    SELECT max(sized.number) FROM (
                        SELECT c.number, c.cost, sum(c.cost) OVER (ORDER BY c.number) AS total FROM (
                            SELECT v.number, acp.cost(v.input, v.output) AS cost
                            FROM acp.turns v WHERE v.run_key = run.run_key ORDER BY v.number LIMIT room
                        ) AS c
                    ) AS sized WHERE sized.total - sized.cost < room
                )
                RETURNING acp.cost(t.input, t.output) AS cost
            ) SELECT count(*) AS number, coalesce(sum(cost), 0) AS cost INTO step FROM gone;
            turns := turns + step.number;
            room := room - step.cost;
            EXIT WHEN room <= 0;
            DELETE FROM acp.deleted_runs d WHERE d.run_key = run.run_key;
        END LOOP;
        EXIT WHEN room <= 0 OR after IS NULL;
        -- Clocks differ, but not by an hour: behind a run that was accepted so much later there is none to delete.
        SELECT max(r.run_key) AS run_key, count(*) = 1000 AND max(r.created_at_ms) < before_ms + 3600000 AS goes_on
        INTO run FROM (
            SELECT x.run_key, x.created_at_ms FROM acp.runs x WHERE x.run_key > after ORDER BY x.run_key LIMIT 1000
        ) AS r;
        WITH old AS (
            SELECT r.run_key FROM acp.runs r
            WHERE r.run_key > after AND r.run_key <= run.run_key AND r.updated_at_ms < before_ms
              AND acp.is_settled(r.status)
            ORDER BY r.run_key LIMIT room FOR UPDATE SKIP LOCKED
        ), gone AS (
            DELETE FROM acp.runs r USING old WHERE r.run_key = old.run_key RETURNING r.run_key
        ), unknown AS (
            DELETE FROM acp.requests q USING gone WHERE q.run_key = gone.run_key
        ), noted AS (
            INSERT INTO acp.deleted_runs SELECT run_key FROM gone RETURNING run_key
        ) SELECT count(*) AS number, max(run_key) AS last INTO step FROM noted;
        runs := runs + step.number;
        room := room - step.number;
        after := CASE WHEN room <= 0 THEN coalesce(step.last, after) WHEN run.goes_on THEN run.run_key END;
        EXIT WHEN step.number = 0;
    END LOOP;
    RETURN jsonb_build_object('runs', runs, 'turns', turns, 'events', events, 'after', after);
END
$$;

-- Forget requests made before a time, the oldest first; returns how many.
CREATE FUNCTION acp.delete_requests(p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    number integer;
BEGIN
    DELETE FROM acp.requests WHERE (organization, request_id) IN (
        SELECT q.organization, q.request_id FROM acp.requests q WHERE q.created_at_ms < (p->>'before_ms')::bigint
        ORDER BY q.created_at_ms LIMIT (p->>'limit')::integer FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS number = ROW_COUNT;
    RETURN jsonb_build_object('requests', number);
END
$$;
