-- The writes that stand alone in a batch, each a function of its arguments as JSON (see `postgres_writes.py`). A result
-- has the `changes` made, `missing` where there is nothing to write to, `waits` where a turn may be claimed by now, and
-- `quiet` where the others need not hear of it.

-- Open the next turn of a run.
CREATE FUNCTION acp.continue_run(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    run acp.runs;
    before acp.turns;
    number integer;
    claimed boolean;
BEGIN
    SELECT * INTO run FROM acp.runs
    WHERE id = p->>'id' AND organization = p->>'organization' AND server_id = p->>'server_id';
    IF NOT FOUND THEN
        RETURN '{"missing": true}';
    END IF;
    SELECT * INTO before FROM acp.turns t WHERE t.run_key = run.run_key AND t.number = run.last_turn;
    number := run.last_turn + 1;
    claimed := (p->>'claim')::boolean AND acp.is_settled(run.status);
    INSERT INTO acp.turns (run_key, number, organization, server_id, status, mode, input, first_sequence, created_at_ms,
                           metadata, attempt, epoch, ready, holder)
    VALUES (run.run_key, number, run.organization, run.server_id, CASE WHEN claimed THEN 'running' ELSE 'queued' END,
            p->>'mode', p->>'input', run.last_sequence + 1, (p->>'at')::bigint,
            coalesce(convert_from(decode(p->>'metadata', 'base64'), 'UTF8'), before.metadata), claimed::integer,
            claimed::integer, acp.is_settled(run.status), CASE WHEN claimed THEN p_replica END);
    UPDATE acp.runs SET last_turn = number WHERE run_key = run.run_key;
    RETURN jsonb_build_object(
        'changes', jsonb_build_array(acp.write_behind(run.run_key, number, p->'log', (p->>'at')::bigint)),
        'waits', acp.is_settled(run.status) AND NOT claimed);
END
$$;

-- Give a turn that the replica holds back to the queue, its attempt not counted.
CREATE FUNCTION acp.release_turn(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    turn acp.turns;
BEGIN
    SELECT * INTO turn FROM acp.turns t
    WHERE t.run_key = (SELECT r.run_key FROM acp.runs r WHERE r.id = p->>'id') AND t.number = (p->>'number')::integer;
    IF turn.holder IS DISTINCT FROM p_replica OR turn.epoch <> (p->>'epoch')::integer THEN
        RETURN '{"missing": true}';
    END IF;
    UPDATE acp.turns t SET status = 'queued', attempt = greatest(t.attempt - 1, 0), epoch = t.epoch + 1, draft = NULL,
                           holder = NULL
    WHERE t.run_key = turn.run_key AND t.number = turn.number;
    RETURN jsonb_build_object('waits', true, 'changes', jsonb_build_array(
        acp.write_behind(turn.run_key, turn.number, p->'log', (p->>'at')::bigint)));
END
$$;

-- Return the events of `p_log`, and before them the draft as the event `p_incomplete`, where there is one.
CREATE FUNCTION acp.with_draft(p_draft text, p_incomplete jsonb, p_log jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN coalesce(p_draft, '') = '' THEN p_log
                ELSE jsonb_build_array(p_incomplete || jsonb_build_object('content', p_draft)) || p_log END
$$;

-- Settle every open turn of a run as cancelled.
CREATE FUNCTION acp.cancel_run(p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    run acp.runs;
    turn acp.turns;
    first acp.turns;
    log jsonb := p->'log';
    said text := p->>'output';
    change jsonb;
BEGIN
    SELECT * INTO run FROM acp.runs
    WHERE id = p->>'id' AND organization = p->>'organization' AND server_id = p->>'server_id';
    IF NOT FOUND THEN
        RETURN '{"missing": true}';
    END IF;
    IF acp.is_settled(run.status) THEN
        RETURN jsonb_build_object('quiet', true,
                                  'changes', jsonb_build_array(jsonb_build_array(run.run_key, run.last_turn, 1, 0)));
    END IF;
    -- Turns before a settled one are settled, too.
    FOR turn IN SELECT * FROM acp.turns t WHERE t.run_key = run.run_key ORDER BY t.number DESC LOOP
        EXIT WHEN acp.is_settled(turn.status);
        first := turn;
    END LOOP;
    IF p ? 'incomplete' AND first.draft <> '' THEN
        log := acp.with_draft(first.draft, p->'incomplete', log);
        said := first.draft;
    END IF;
    UPDATE acp.turns t SET status = 'cancelled', epoch = t.epoch + 1, completed_at_ms = (p->>'at')::bigint, draft = NULL,
                           holder = NULL, output = CASE WHEN t.number = first.number THEN said END
    WHERE t.run_key = run.run_key AND t.number >= first.number;
    change := acp.write_behind(run.run_key, first.number, log, (p->>'at')::bigint);
    -- The run shows its latest turn; the events belong to the earliest.
    RETURN jsonb_build_object('changes', jsonb_build_array(jsonb_set(change, '{1}', to_jsonb(run.last_turn))));
END
$$;

-- Claim queued turns, oldest first. What others are about to claim is left to them. The search sees turns as they were
-- when it began: each is looked at once more while its run is held.
CREATE FUNCTION acp.claim_turns(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql SET enable_sort = off AS $$
DECLARE
    keys bigint[];
    numbers integer[];
    changes jsonb;
BEGIN
    SELECT array_agg(f.run_key), array_agg(f.number) INTO keys, numbers FROM (
        SELECT t.run_key, t.number FROM acp.turns t JOIN acp.runs r ON r.run_key = t.run_key
        WHERE t.status = 'queued' AND t.ready ORDER BY t.created_at_ms, t.run_key LIMIT (p->>'limit')::integer
        FOR UPDATE OF r SKIP LOCKED
    ) AS f;
    WITH found AS MATERIALIZED (
        SELECT k.run_key, k.number, k.place, t.attempt + 1 AS attempt, (t.epoch > 0)::integer AS added
        FROM unnest(keys, numbers) WITH ORDINALITY AS k (run_key, number, place)
        CROSS JOIN LATERAL (
            SELECT x.status, x.attempt, x.epoch FROM acp.turns x
            WHERE x.run_key = k.run_key AND x.number = k.number OFFSET 0
        ) AS t
        WHERE t.status = 'queued'
    ), turns AS (
        UPDATE acp.turns t SET status = 'running', attempt = f.attempt, epoch = t.epoch + 1, holder = p_replica
        FROM found f WHERE t.run_key = f.run_key AND t.number = f.number
    ), runs AS (
        UPDATE acp.runs r SET
            updated_at_ms = (p->>'at')::bigint,
            last_sequence = r.last_sequence + f.added,
            status = CASE WHEN f.number = r.last_turn THEN 'running' ELSE r.status END
        FROM found f WHERE r.run_key = f.run_key
        RETURNING f.*, r.last_sequence
    ), events AS (
        INSERT INTO acp.events (run_key, sequence, turn, role, content, created_at_ms, log_type, log_level)
        SELECT r.run_key, r.last_sequence, r.number, e.role, replace(e.content, '{attempt}', r.attempt::text),
               e.created_at_ms, e.log_type, e.log_level
        FROM runs r, jsonb_to_record(p->'again') AS e (
            role text, content text, created_at_ms bigint, log_type text, log_level text
        )
        WHERE r.added > 0
    )
    SELECT jsonb_agg(jsonb_build_array(
        r.run_key, r.number, r.last_sequence - r.added + 1, r.last_sequence) ORDER BY r.place)
    INTO changes FROM runs r;
    RETURN jsonb_build_object('changes', coalesce(changes, '[]'));
END
$$;

-- Give up the replicas whose lease ran out, then find turns that nobody holds any more. A replica whose row is locked
-- is at work just now, and so is none of them.
CREATE FUNCTION acp.find_orphans(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM acp.replicas WHERE id IN (
        SELECT r.id FROM acp.replicas r
        WHERE r.id <> p_replica AND NOT acp.is_held(r.lease_until, r.lease) FOR UPDATE SKIP LOCKED
    );
    RETURN jsonb_build_object('quiet', true, 'changes', coalesce((
        SELECT jsonb_agg(jsonb_build_array(o.run_key, o.number, 1, 0)) FROM (
            SELECT t.run_key, t.number FROM acp.turns t
            WHERE t.status = 'running' AND NOT EXISTS (SELECT FROM acp.replicas r WHERE r.id = t.holder)
            LIMIT (p->>'limit')::integer
        ) AS o
    ), '[]'));
END
$$;

-- Settle a turn that nobody holds, or queue it again where no outcome is given; its draft becomes an event.
CREATE FUNCTION acp.settle_orphan(p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    run acp.runs;
    turn acp.turns;
    at bigint := (p->>'at')::bigint;
    outcome jsonb := p->'outcome';
BEGIN
    SELECT * INTO run FROM acp.runs WHERE id = p->>'id';
    SELECT * INTO turn FROM acp.turns t WHERE t.run_key = run.run_key AND t.number = (p->>'number')::integer;
    -- Found without a holder, it has none while it runs in the same epoch: nobody's name comes back.
    IF turn.status IS DISTINCT FROM 'running' OR turn.epoch <> (p->>'epoch')::integer THEN
        RETURN '{"missing": true}';
    END IF;
    IF outcome IS NULL THEN
        UPDATE acp.turns t SET status = 'queued', epoch = t.epoch + 1, draft = NULL, holder = NULL
        WHERE t.run_key = turn.run_key AND t.number = turn.number;
    ELSE
        UPDATE acp.turns t SET status = outcome->>'status', output = nullif(turn.draft, ''), error = outcome->>'error',
                               error_code = outcome->>'error_code', completed_at_ms = at, draft = NULL, holder = NULL
        WHERE t.run_key = turn.run_key AND t.number = turn.number;
        UPDATE acp.turns t SET ready = true
        WHERE t.run_key = turn.run_key AND t.number = turn.number + 1;
    END IF;
    RETURN jsonb_build_object(
        'waits', outcome IS NULL OR run.last_turn > turn.number,
        'changes', jsonb_build_array(acp.write_behind(
            turn.run_key, turn.number, acp.with_draft(turn.draft, p->'incomplete', p->'log'), at)));
END
$$;

-- Return which of the turns named the replica does not hold any more, by the ids of their runs.
CREATE FUNCTION acp.find_lost(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    RETURN jsonb_build_object('lost', coalesce((
        SELECT jsonb_agg(a.id)
        FROM jsonb_to_recordset(p->'turns') AS a (id text, number integer, epoch integer)
        WHERE a.epoch IS DISTINCT FROM (
            SELECT CASE WHEN t.holder = p_replica THEN t.epoch END FROM acp.turns t
            WHERE t.run_key = (SELECT r.run_key FROM acp.runs r WHERE r.id = a.id) AND t.number = a.number
        )
    ), '[]'));
END
$$;
