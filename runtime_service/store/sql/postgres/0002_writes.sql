-- Every write of the PostgreSQL store is one call of `acp.apply`, and so one statement and one transaction: a process
-- that stops in the middle holds no lock. It takes a batch of writes as JSON (see `postgres_batch.py`):
--
--   requests  those that make themselves known: organization, id, fingerprint, created_at_ms, and of a start its `n`
--   lock      ids of the runs that are written to
--   starts    new runs as they are at the end of the batch: n, run, log
--   turns     extensions of running turns: n, id, number, epoch, at, messages, log, outcome, redraft, draft
--   others    the rest, in order; `write` says what each is
--
-- Plans are made once a session, perhaps while the tables are empty, and must do when they are not. So each table is
-- reached by the index that fits (see the settings of `acp.apply`), and a row that is known by its key is looked up by
-- nothing else: in a subquery of its own, which `OFFSET 0` keeps apart, or before its other columns are looked at.
--
-- Locks are taken in one order by everybody, so that nobody waits in a circle: the replica's own row, requests by
-- their key, runs by theirs. Whatever else could be locked is skipped. Who holds the row of a run may write its turns.

-- Whether a lease lasts. It is counted from the start of the server where that is later: while the database was away
-- nobody could renew.
CREATE FUNCTION acp.is_held(lease_until timestamptz, lease interval) RETURNS boolean LANGUAGE sql VOLATILE AS $$
    SELECT greatest(lease_until, pg_postmaster_start_time() + lease) > clock_timestamp()
$$;

CREATE FUNCTION acp.is_settled(status text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT status IN ('completed', 'failed', 'cancelled')
$$;

-- Put the events of a JSON list at the end of a run's log. The run's status is that of its latest turn from then on.
-- Returns the change: run_key, turn, and the sequences of the first and the last event.
CREATE FUNCTION acp.write_behind(p_run_key bigint, p_number integer, p_log jsonb, p_at bigint) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    last bigint;
    added bigint := jsonb_array_length(p_log);
BEGIN
    UPDATE acp.runs SET
        last_sequence = last_sequence + added,
        message_count = message_count + (
            SELECT count(*) FROM jsonb_array_elements(p_log) AS e (event) WHERE e.event->>'role' IN ('user', 'assistant')
        ),
        updated_at_ms = p_at,
        status = (SELECT t.status FROM acp.turns t WHERE t.run_key = p_run_key AND t.number = runs.last_turn)
    WHERE run_key = p_run_key RETURNING last_sequence INTO last;
    INSERT INTO acp.events (run_key, sequence, turn, role, content, created_at_ms, log_type, log_level, metadata)
    SELECT p_run_key, last - added + place, p_number, role, content, created_at_ms, log_type, log_level,
           convert_from(decode(metadata, 'base64'), 'UTF8')
    FROM ROWS FROM (jsonb_to_recordset(p_log) AS (
        role text, content text, created_at_ms bigint, log_type text, log_level text, metadata text
    )) WITH ORDINALITY AS e (role, content, created_at_ms, log_type, log_level, metadata, place);
    RETURN jsonb_build_array(p_run_key, p_number, last - added + 1, last);
END
$$;

-- What an earlier request of the same id gave, NULL where there is none.
CREATE FUNCTION acp.known_request(p_request jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    known acp.requests;
BEGIN
    SELECT * INTO known FROM acp.requests q
    WHERE q.organization = p_request->>'organization' AND q.request_id = p_request->>'id' AND q.turn > 0;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    RETURN jsonb_build_object(
        'changes', jsonb_build_array(jsonb_build_array(known.run_key, known.turn, 1, 0)), 'replayed', true,
        'same', known.fingerprint = decode(p_request->>'fingerprint', 'base64'));
END
$$;

-- Insert new runs under the keys given, but those of which a request of the same id was known, and those that are
-- there already: a process that lost its lease does not know whether they are. Returns what is there in their place.
CREATE FUNCTION acp.start_runs(p_replica text, p_starts jsonb, p_keys bigint[], p_requests jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    inserted integer;
    others jsonb := '[]';
BEGIN
    INSERT INTO acp.runs (run_key, id, organization, server_id, title, thread_metadata, created_at_ms, updated_at_ms,
                          message_count, last_sequence, last_turn, status)
    SELECT p_keys[s.n + 1], r.id, r.organization, r.server_id, r.title,
           convert_from(decode(r.thread_metadata, 'base64'), 'UTF8'), r.created_at_ms, r.updated_at_ms,
           r.message_count, r.last_sequence, r.last_turn, r.turn->>'status'
    FROM jsonb_to_recordset(p_starts) AS s (n integer, run jsonb, request text),
         jsonb_to_record(s.run) AS r (
             id text, organization text, server_id text, title text, thread_metadata text, created_at_ms bigint,
             updated_at_ms bigint, message_count bigint, last_sequence bigint, last_turn integer, turn jsonb
         )
    WHERE s.request IS NULL OR p_keys[s.n + 1] = (
        SELECT q.run_key FROM acp.requests q WHERE q.organization = r.organization AND q.request_id = s.request
    )
    ON CONFLICT (id) DO NOTHING;
    GET DIAGNOSTICS inserted = ROW_COUNT;

    INSERT INTO acp.turns (run_key, number, organization, server_id, status, mode, input, first_sequence, created_at_ms,
                           output, error, error_code, metadata, completed_at_ms, attempt, epoch, ready, holder)
    SELECT r.run_key, t.number, r.organization, r.server_id, t.status, t.mode, t.input, t.first_sequence,
           t.created_at_ms, t.output, t.error, t.error_code, convert_from(decode(t.metadata, 'base64'), 'UTF8'),
           t.completed_at_ms, t.attempt, t.epoch, t.ready, CASE WHEN t.status = 'running' THEN p_replica END
    FROM jsonb_to_recordset(p_starts) AS s (n integer, run jsonb),
         LATERAL (SELECT * FROM acp.runs x WHERE x.run_key = p_keys[s.n + 1] OFFSET 0) AS r,
         jsonb_to_record(s.run->'turn') AS t (
             number integer, status text, mode text, input text, first_sequence bigint, created_at_ms bigint,
             output text, error text, error_code text, metadata text, completed_at_ms bigint, attempt integer,
             epoch integer, ready boolean
         );

    INSERT INTO acp.events (run_key, sequence, turn, role, content, created_at_ms, log_type, log_level, metadata)
    SELECT r.run_key, e.place, 1, e.role, e.content, e.created_at_ms, e.log_type, e.log_level,
           convert_from(decode(e.metadata, 'base64'), 'UTF8')
    FROM jsonb_to_recordset(p_starts) AS s (n integer, log jsonb),
         LATERAL (SELECT x.run_key FROM acp.runs x WHERE x.run_key = p_keys[s.n + 1] OFFSET 0) AS r,
         ROWS FROM (jsonb_to_recordset(s.log) AS (
             role text, content text, created_at_ms bigint, log_type text, log_level text, metadata text
         )) WITH ORDINALITY AS e (role, content, created_at_ms, log_type, log_level, metadata, place);

    IF inserted < jsonb_array_length(p_starts) THEN
        SELECT jsonb_agg(jsonb_build_object('n', s.n) || coalesce(
            acp.known_request(q.value),
            jsonb_build_object('changes', (
                SELECT jsonb_build_array(jsonb_build_array(r.run_key, r.last_turn, 1, 0))
                FROM acp.runs r WHERE r.id = s.run->>'id'
            ))
        )) INTO others
        FROM jsonb_to_recordset(p_starts) AS s (n integer, run jsonb)
        LEFT JOIN jsonb_array_elements(p_requests) AS q ON (q.value->>'n')::integer = s.n
        WHERE NOT EXISTS (SELECT FROM acp.runs r WHERE r.run_key = p_keys[s.n + 1]);
    END IF;
    RETURN others;
END
$$;

-- Extend the logs of running turns that the replica holds, settle some of them and keep drafts. Returns of each that
-- was its own: n, and the run's last sequence, message count and last turn; and whether a turn became ready by it.
CREATE FUNCTION acp.extend_turns(p_replica text, p_turns jsonb, OUT extended jsonb, OUT readied boolean)
LANGUAGE plpgsql AS $$
BEGIN
    WITH held AS MATERIALIZED (
        SELECT a.*, jsonb_array_length(a.log) AS added, r.run_key, r.last_sequence, r.message_count, r.last_turn
        FROM jsonb_to_recordset(p_turns) AS a (
            n integer, id text, number integer, epoch integer, at bigint, messages integer, log jsonb, outcome jsonb,
            redraft boolean, draft text
        )
        CROSS JOIN LATERAL (SELECT * FROM acp.runs x WHERE x.id = a.id OFFSET 0) AS r
        CROSS JOIN LATERAL (
            SELECT x.epoch, x.holder FROM acp.turns x WHERE x.run_key = r.run_key AND x.number = a.number OFFSET 0
        ) AS t
        WHERE t.epoch = a.epoch AND t.holder = p_replica
    ), runs AS (
        UPDATE acp.runs r SET
            last_sequence = r.last_sequence + h.added,
            message_count = r.message_count + h.messages,
            updated_at_ms = h.at,
            status = CASE WHEN h.number = r.last_turn THEN coalesce(h.outcome->>'status', r.status) ELSE r.status END
        FROM held h WHERE r.run_key = h.run_key AND h.at IS NOT NULL
    ), turns AS (
        UPDATE acp.turns t SET
            status = coalesce(h.outcome->>'status', t.status),
            output = h.outcome->>'output',
            error = h.outcome->>'error',
            error_code = h.outcome->>'error_code',
            completed_at_ms = CASE WHEN h.outcome IS NOT NULL THEN h.at END,
            holder = CASE WHEN h.outcome IS NULL THEN t.holder END,
            draft = CASE WHEN h.outcome IS NULL THEN h.draft END
        FROM held h WHERE t.run_key = h.run_key AND t.number = h.number AND (h.outcome IS NOT NULL OR h.redraft)
    ), next AS (
        -- The turn behind one that was settled waits for room only.
        UPDATE acp.turns t SET ready = true
        FROM held h
        WHERE h.outcome IS NOT NULL AND h.last_turn > h.number
          AND t.run_key = h.run_key AND t.number = h.number + 1
        RETURNING 1
    ), events AS (
        INSERT INTO acp.events (run_key, sequence, turn, role, content, created_at_ms, log_type, log_level, metadata)
        SELECT h.run_key, h.last_sequence + e.place, h.number, e.role, e.content, e.created_at_ms, e.log_type,
               e.log_level, convert_from(decode(e.metadata, 'base64'), 'UTF8')
        FROM held h, ROWS FROM (jsonb_to_recordset(h.log) AS (
            role text, content text, created_at_ms bigint, log_type text, log_level text, metadata text
        )) WITH ORDINALITY AS e (role, content, created_at_ms, log_type, log_level, metadata, place)
    )
    SELECT coalesce(jsonb_agg(jsonb_build_array(
               h.n, h.last_sequence + h.added, h.message_count + h.messages, h.last_turn)), '[]'),
           EXISTS (SELECT FROM next)
    INTO extended, readied
    FROM held h;
END
$$;

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
    SELECT t.* INTO turn FROM acp.runs r JOIN acp.turns t ON t.run_key = r.run_key
    WHERE r.id = p->>'id' AND t.number = (p->>'number')::integer;
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
    next record;
    turn acp.turns;
    changes jsonb := '[]';
    log jsonb;
BEGIN
    FOR next IN
        SELECT t.run_key, t.number FROM acp.turns t JOIN acp.runs r ON r.run_key = t.run_key
        WHERE t.status = 'queued' AND t.ready ORDER BY t.created_at_ms, t.run_key LIMIT (p->>'limit')::integer
        FOR UPDATE OF r SKIP LOCKED
    LOOP
        SELECT * INTO turn FROM acp.turns t WHERE t.run_key = next.run_key AND t.number = next.number;
        CONTINUE WHEN turn.status <> 'queued';
        UPDATE acp.turns t SET status = 'running', attempt = t.attempt + 1, epoch = t.epoch + 1, holder = p_replica
        WHERE t.run_key = next.run_key AND t.number = next.number;
        log := '[]';
        IF turn.epoch > 0 THEN
            log := jsonb_build_array(p->'again' || jsonb_build_object(
                'content', replace(p->'again'->>'content', '{attempt}', (turn.attempt + 1)::text)));
        END IF;
        changes := changes || jsonb_build_array(acp.write_behind(next.run_key, next.number, log, (p->>'at')::bigint));
    END LOOP;
    RETURN jsonb_build_object('changes', changes);
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
    IF turn.status IS DISTINCT FROM 'running' OR turn.epoch <> (p->>'epoch')::integer
       OR EXISTS (SELECT FROM acp.replicas r WHERE r.id = turn.holder) THEN
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
        WHERE NOT EXISTS (
            SELECT FROM acp.runs r JOIN acp.turns t ON t.run_key = r.run_key
            WHERE r.id = a.id AND t.number = a.number AND t.epoch = a.epoch AND t.holder = p_replica
        )
    ), '[]'));
END
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
                            SELECT v.sequence,
                                   1 + (octet_length(v.content) + coalesce(octet_length(v.metadata), 0)) / 4096 AS cost
                            FROM acp.events v WHERE v.run_key = run.run_key ORDER BY v.sequence LIMIT room
                        ) AS c
                    ) AS sized WHERE sized.total - sized.cost < room
                )
                RETURNING 1 + (octet_length(e.content) + coalesce(octet_length(e.metadata), 0)) / 4096 AS cost
            ) SELECT count(*) AS number, coalesce(sum(cost), 0) AS cost INTO step FROM gone;
            events := events + step.number;
            room := room - step.cost;
            EXIT WHEN room <= 0;
            WITH gone AS (
                DELETE FROM acp.turns t WHERE t.run_key = run.run_key AND t.number <= (
                    SELECT max(sized.number) FROM (
                        SELECT c.number, c.cost, sum(c.cost) OVER (ORDER BY c.number) AS total FROM (
                            SELECT v.number,
                                   1 + (octet_length(v.input) + coalesce(octet_length(v.output), 0)) / 4096 AS cost
                            FROM acp.turns v WHERE v.run_key = run.run_key ORDER BY v.number LIMIT room
                        ) AS c
                    ) AS sized WHERE sized.total - sized.cost < room
                )
                RETURNING 1 + (octet_length(t.input) + coalesce(octet_length(t.output), 0)) / 4096 AS cost
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

-- Do one of the writes that stand alone.
CREATE FUNCTION acp.write_other(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    CASE p->>'write'
        WHEN 'continue_run' THEN RETURN acp.continue_run(p_replica, p);
        WHEN 'release_turn' THEN RETURN acp.release_turn(p_replica, p);
        WHEN 'cancel_run' THEN RETURN acp.cancel_run(p);
        WHEN 'claim_turns' THEN RETURN acp.claim_turns(p_replica, p);
        WHEN 'find_orphans' THEN RETURN acp.find_orphans(p_replica, p);
        WHEN 'settle_orphan' THEN RETURN acp.settle_orphan(p);
        WHEN 'find_lost' THEN RETURN acp.find_lost(p_replica, p);
        WHEN 'find_request' THEN RETURN coalesce(acp.known_request(p->'wanted'), '{}');
        WHEN 'delete_runs' THEN RETURN acp.delete_runs(p);
        WHEN 'delete_requests' THEN RETURN acp.delete_requests(p);
    END CASE;
END
$$;

-- Show what a write did: each run that it changed, as it is now, and the events that were added.
CREATE FUNCTION acp.shown(p_done jsonb) RETURNS jsonb LANGUAGE sql VOLATILE AS $$
    SELECT p_done - 'changes' || jsonb_build_object('shown', coalesce((
        SELECT jsonb_agg(jsonb_build_array(to_jsonb(v), (
            SELECT coalesce(jsonb_agg(jsonb_build_array(
                e.sequence, e.turn, e.role, e.content, e.created_at_ms, e.log_type, e.log_level, e.metadata
            ) ORDER BY e.sequence), '[]')
            FROM acp.events e
            WHERE e.run_key = v.run_key AND e.sequence BETWEEN (c.change->>2)::bigint AND (c.change->>3)::bigint
        )) ORDER BY c.place)
        FROM jsonb_array_elements(p_done->'changes') WITH ORDINALITY AS c (change, place)
        CROSS JOIN LATERAL (
            SELECT * FROM acp.shown_runs x
            WHERE x.run_key = (c.change->>0)::bigint AND x.number = (c.change->>1)::integer OFFSET 0
        ) AS v
    ), '[]'))
$$;

-- Show what a batch did, from what is kept of it.
CREATE FUNCTION acp.shown_result(p_result jsonb) RETURNS jsonb LANGUAGE sql VOLATILE AS $$
    SELECT p_result || jsonb_build_object(
        'starts', (SELECT coalesce(jsonb_agg(acp.shown(d.done)), '[]')
                   FROM jsonb_array_elements(p_result->'starts') AS d (done)),
        'others', (SELECT coalesce(jsonb_agg(acp.shown(d.done) ORDER BY d.place), '[]')
                   FROM jsonb_array_elements(p_result->'others') WITH ORDINALITY AS d (done, place)))
$$;

-- Do the writes that stand alone, in order; one whose request is known does nothing. Returns what each did, and the
-- same as it is shown: before the next one is done.
CREATE FUNCTION acp.write_others(p_replica text, p_others jsonb, OUT results jsonb, OUT shown jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    p jsonb;
    done jsonb;
BEGIN
    results := '[]';
    shown := '[]';
    FOR p IN SELECT value FROM jsonb_array_elements(p_others) LOOP
        done := acp.known_request(p->'request');
        IF done IS NULL THEN
            done := acp.write_other(p_replica, p);
            IF done ? 'missing' THEN
                DELETE FROM acp.requests q
                WHERE q.organization = p->'request'->>'organization' AND q.request_id = p->'request'->>'id';
            ELSIF p ? 'request' THEN
                UPDATE acp.requests q
                SET run_key = (done->'changes'->0->>0)::bigint, turn = (done->'changes'->0->>1)::integer
                WHERE q.organization = p->'request'->>'organization' AND q.request_id = p->'request'->>'id';
            END IF;
        END IF;
        results := results || jsonb_build_array(done);
        shown := shown || jsonb_build_array(acp.shown(done));
    END LOOP;
END
$$;

-- Tell the other replicas what they cannot learn otherwise: which runs were written to by anybody but their holder,
-- and that a turn waits. The holder tells those who ask it of all the rest.
CREATE FUNCTION acp.tell_others(p_replica text, p_others jsonb, p_waits boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    written jsonb;
    told text;
BEGIN
    SELECT jsonb_agg(DISTINCT (SELECT r.id FROM acp.runs r WHERE r.run_key = (c.change->>0)::bigint)) INTO written
    FROM jsonb_array_elements(p_others) AS d (done), jsonb_array_elements(d.done->'changes') AS c (change)
    WHERE NOT d.done ?| ARRAY['quiet', 'replayed'];
    IF written IS NULL AND NOT p_waits THEN
        RETURN;
    END IF;
    told := jsonb_build_object('from', p_replica, 'waits', p_waits, 'runs', coalesce(written, '[]'))::text;
    IF octet_length(told) > 7900 THEN
        told := jsonb_build_object('from', p_replica, 'waits', p_waits, 'many', true)::text;
    END IF;
    PERFORM pg_notify('acp', told);
END
$$;

-- Apply a batch of writes, all or none, once: a number that was applied is answered with what came of it then. The
-- replica's row is held to the end; who deletes it waits, or makes the batch fail: then it is lost, and nothing is
-- written. Every write renews the lease.
CREATE FUNCTION acp.apply(p_replica text, p_batch bigint, p_asked jsonb) RETURNS jsonb LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    replica acp.replicas;
    keys bigint[];
    starts jsonb := '[]';
    extended jsonb := '[]';
    others jsonb := '[]';
    shown jsonb := '[]';
    waits boolean := false;
    result jsonb;
BEGIN
    SELECT * INTO replica FROM acp.replicas r
    WHERE r.id = p_replica AND acp.is_held(r.lease_until, r.lease) FOR UPDATE;
    IF NOT FOUND THEN
        RETURN '{"lost": true}';
    END IF;
    IF replica.last_batch = p_batch THEN
        RETURN acp.shown_result(replica.last_result);
    ELSIF replica.last_batch > p_batch THEN
        RETURN NULL;  -- held up on a connection that was given up long ago
    END IF;
    IF p_asked ? 'starts' THEN
        keys := ARRAY(SELECT nextval('acp.run_keys') FROM generate_series(1, jsonb_array_length(p_asked->'starts')));
    END IF;
    IF p_asked ? 'requests' THEN
        INSERT INTO acp.requests (organization, request_id, fingerprint, run_key, turn, created_at_ms)
        SELECT q.organization, q.id, decode(q.fingerprint, 'base64'), coalesce(keys[q.n + 1], 0), (q.n IS NOT NULL)::integer,
               q.created_at_ms
        FROM jsonb_to_recordset(p_asked->'requests') AS q (
            organization text, id text, fingerprint text, n integer, created_at_ms bigint
        )
        ORDER BY q.organization COLLATE "C", q.id COLLATE "C"
        ON CONFLICT (organization, request_id) DO NOTHING;
    END IF;
    IF p_asked ? 'lock' THEN
        PERFORM FROM unnest(ARRAY(
            SELECT r.run_key FROM jsonb_array_elements_text(p_asked->'lock') AS a (id)
            CROSS JOIN LATERAL (SELECT x.run_key FROM acp.runs x WHERE x.id = a.id OFFSET 0) AS r
            ORDER BY r.run_key
        )) AS k (run_key)
        CROSS JOIN LATERAL (SELECT FROM acp.runs x WHERE x.run_key = k.run_key FOR UPDATE) AS locked;
    END IF;
    IF p_asked ? 'starts' THEN
        starts := acp.start_runs(p_replica, p_asked->'starts', keys, p_asked->'requests');
        waits := jsonb_path_exists(p_asked, '$.starts[*].run.turn.status ? (@ == "queued")');
    END IF;
    IF p_asked ? 'turns' THEN
        SELECT e.extended, waits OR e.readied INTO extended, waits
        FROM acp.extend_turns(p_replica, p_asked->'turns') AS e;
    END IF;
    IF p_asked ? 'others' THEN
        SELECT o.results, o.shown INTO others, shown FROM acp.write_others(p_replica, p_asked->'others') AS o;
        waits := waits OR jsonb_path_exists(others, '$[*].waits ? (@ == true)');
    END IF;
    IF waits OR others <> '[]' THEN
        PERFORM acp.tell_others(p_replica, others, waits);
    END IF;
    result := jsonb_build_object('starts', starts, 'turns', extended, 'others', others);
    UPDATE acp.replicas r SET lease_until = clock_timestamp() + r.lease, last_batch = p_batch, last_result = result
    WHERE r.id = p_replica;
    RETURN acp.shown_result(result - 'others') || jsonb_build_object('others', shown);
END
$$;
