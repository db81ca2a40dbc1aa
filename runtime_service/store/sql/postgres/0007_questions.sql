-- Questions: asked by the running turn, answered once, gone when no turn of the run is running any more. A result of a
-- write (see 0003_other_writes.sql) that is `missing` has the `question` that is open, or that it was `answered`, where
-- it was refused for that. Processes of the version before, which may be at work still, ask nothing, and what comes to
-- them is queued.

-- A run as it shows one of its turns; holder and address are those of the replica that executes one of them.
CREATE OR REPLACE VIEW acp.shown_runs AS
SELECT runs.run_key, runs.id, runs.organization, runs.server_id, runs.title, runs.thread_metadata,
       runs.created_at_ms, runs.updated_at_ms, runs.message_count, runs.last_sequence, runs.last_turn,
       turns.number, turns.status, turns.mode, turns.input, turns.first_sequence, turns.created_at_ms AS turn_created_at_ms,
       turns.output, turns.error, turns.error_code, turns.metadata, turns.completed_at_ms, turns.attempt, turns.epoch,
       turns.ready, held.holder, held.address, runs.question::text AS question
FROM acp.runs JOIN acp.turns ON turns.run_key = runs.run_key LEFT JOIN LATERAL (
    SELECT running.holder, replicas.address
    FROM acp.turns AS running LEFT JOIN acp.replicas ON replicas.id = running.holder
    WHERE running.run_key = runs.run_key AND running.status = 'running'
) AS held ON true;

-- Put the events of a JSON list at the end of a run's log. The run's status is that of its latest turn from then on,
-- and its question is gone unless a turn is running. Returns the change: run_key, turn, and the sequences of the first
-- and the last event.
CREATE OR REPLACE FUNCTION acp.write_behind(p_run_key bigint, p_number integer, p_log jsonb, p_at bigint) RETURNS jsonb
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
        status = (SELECT t.status FROM acp.turns t WHERE t.run_key = p_run_key AND t.number = runs.last_turn),
        question = CASE WHEN question IS NOT NULL AND EXISTS (
            SELECT FROM acp.turns t WHERE t.run_key = p_run_key AND t.status = 'running'
        ) THEN question END
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

-- Extend the logs of running turns that the replica holds, settle some of them and keep drafts. Returns of each that
-- was its own: n, the run's last sequence, message count and last turn, and the question that it had, if any; and
-- whether a turn became ready by it.
CREATE OR REPLACE FUNCTION acp.extend_turns(p_replica text, p_turns jsonb, OUT extended jsonb, OUT readied boolean)
LANGUAGE plpgsql AS $$
BEGIN
    WITH held AS MATERIALIZED (
        SELECT a.*, jsonb_array_length(a.log) AS added, r.run_key, r.last_sequence, r.message_count, r.last_turn,
               r.question
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
            status = CASE WHEN h.number = r.last_turn THEN coalesce(h.outcome->>'status', r.status) ELSE r.status END,
            question = CASE WHEN h.outcome IS NULL THEN r.question END
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
    SELECT coalesce(jsonb_agg(
               jsonb_build_array(h.n, h.last_sequence + h.added, h.message_count + h.messages, h.last_turn)
               || CASE WHEN h.question IS NULL THEN '[]' ELSE jsonb_build_array(h.question) END), '[]'),
           EXISTS (SELECT FROM next)
    INTO extended, readied
    FROM held h;
END
$$;

-- Open the next turn of a run; not while it asks, nor with an input that can only be meant as an answer to what was
-- asked: one that names an option, but for `blanks` before it, in so many `characters`.
CREATE OR REPLACE FUNCTION acp.continue_run(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    run acp.runs;
    before acp.turns;
    number integer;
    claimed boolean;
    said text;
BEGIN
    SELECT * INTO run FROM acp.runs
    WHERE id = p->>'id' AND organization = p->>'organization' AND server_id = p->>'server_id';
    IF NOT FOUND THEN
        RETURN '{"missing": true}';
    END IF;
    IF run.question IS NOT NULL AND p ? 'characters' THEN
        said := substr(p->>'input', (p->>'blanks')::integer + 1, (p->>'characters')::integer);
        IF (run.question->>1)::boolean THEN
            RETURN jsonb_build_object('missing', true, 'question', run.question);
        ELSIF EXISTS (
            SELECT FROM jsonb_array_elements(run.question->2) AS o (option) WHERE said IN (o.option->>0, o.option->>1)
        ) THEN
            RETURN '{"missing": true, "answered": true}';
        END IF;
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

-- Put events at the end of the log of a turn that the replica holds; the last one asks what the run asks from now on.
-- Who follows the turn hears of it from its holder.
CREATE FUNCTION acp.ask_question(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    turn acp.turns;
    change jsonb;
BEGIN
    SELECT * INTO turn FROM acp.turns t
    WHERE t.run_key = (SELECT r.run_key FROM acp.runs r WHERE r.id = p->>'id') AND t.number = (p->>'number')::integer;
    IF turn.holder IS DISTINCT FROM p_replica OR turn.epoch <> (p->>'epoch')::integer THEN
        RETURN '{"missing": true}';
    END IF;
    IF jsonb_path_exists(p->'log', '$[*] ? (@.role == "assistant")') THEN
        UPDATE acp.turns t SET draft = NULL WHERE t.run_key = turn.run_key AND t.number = turn.number;
    END IF;
    change := acp.write_behind(turn.run_key, turn.number, p->'log', (p->>'at')::bigint);
    UPDATE acp.runs SET question = jsonb_build_array(change->3, true, p->'options') WHERE run_key = turn.run_key;
    RETURN jsonb_build_object('quiet', true, 'changes', jsonb_build_array(change));
END
$$;

-- Append the answer to the question that is open, and close that. Who executes the turn has to hear of it.
CREATE FUNCTION acp.answer_question(p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    run acp.runs;
    asking integer;
BEGIN
    SELECT * INTO run FROM acp.runs
    WHERE id = p->>'id' AND organization = p->>'organization' AND server_id = p->>'server_id';
    IF NOT FOUND THEN
        RETURN '{"missing": true}';
    END IF;
    IF run.question->0 IS DISTINCT FROM p->'sequence' OR NOT (run.question->>1)::boolean THEN
        RETURN '{"missing": true, "answered": true}';
    END IF;
    UPDATE acp.runs SET question = jsonb_set(question, '{1}', 'false') WHERE run_key = run.run_key;
    SELECT t.number INTO asking FROM acp.turns t WHERE t.run_key = run.run_key AND t.status = 'running';
    RETURN jsonb_build_object('changes', jsonb_build_array(
        acp.write_behind(run.run_key, asking, p->'log', (p->>'at')::bigint)));
END
$$;

-- Do one of the writes that stand alone.
CREATE OR REPLACE FUNCTION acp.write_other(p_replica text, p jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    CASE p->>'write'
        WHEN 'continue_run' THEN RETURN acp.continue_run(p_replica, p);
        WHEN 'ask_question' THEN RETURN acp.ask_question(p_replica, p);
        WHEN 'answer_question' THEN RETURN acp.answer_question(p);
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
