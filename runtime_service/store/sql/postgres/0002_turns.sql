-- Every write of the PostgreSQL store is one call of `acp.apply`, and so one statement and one transaction: a process
-- that stops in the middle holds no lock. It takes a batch of writes as JSON (see `postgres_batch.py`):
--
--   requests  those that make themselves known: organization, id, fingerprint, created_at_ms, and of a start its `n`
--   lock      ids of the runs that are written to
--   starts    new runs as they are at the end of the batch: n, run, log, request (its id), draft
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
    IF added > 0 THEN
        INSERT INTO acp.events (run_key, sequence, turn, role, content, created_at_ms, log_type, log_level, metadata)
        SELECT p_run_key, last - added + place, p_number, role, content, created_at_ms, log_type, log_level,
               convert_from(decode(metadata, 'base64'), 'UTF8')
        FROM ROWS FROM (jsonb_to_recordset(p_log) AS (
            role text, content text, created_at_ms bigint, log_type text, log_level text, metadata text
        )) WITH ORDINALITY AS e (role, content, created_at_ms, log_type, log_level, metadata, place);
    END IF;
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
                           output, error, error_code, metadata, completed_at_ms, attempt, epoch, ready, draft, holder)
    SELECT r.run_key, t.number, r.organization, r.server_id, t.status, t.mode, t.input, t.first_sequence,
           t.created_at_ms, t.output, t.error, t.error_code, convert_from(decode(t.metadata, 'base64'), 'UTF8'),
           t.completed_at_ms, t.attempt, t.epoch, t.ready, s.draft, CASE WHEN t.status = 'running' THEN p_replica END
    FROM jsonb_to_recordset(p_starts) AS s (n integer, run jsonb, draft text),
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
