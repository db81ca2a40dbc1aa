-- A batch of writes as a whole: see 0002_turns.sql.

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

CREATE FUNCTION acp.all_shown(p_done jsonb) RETURNS jsonb LANGUAGE sql VOLATILE AS $$
    SELECT (SELECT coalesce(jsonb_agg(acp.shown(d.done) ORDER BY d.place), '[]')
            FROM jsonb_array_elements(p_done) WITH ORDINALITY AS d (done, place))
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
    shown_starts jsonb := '[]';
    shown_others jsonb := '[]';
    waits boolean := false;
    result jsonb;
BEGIN
    SELECT * INTO replica FROM acp.replicas r
    WHERE r.id = p_replica AND acp.is_held(r.lease_until, r.lease) FOR UPDATE;
    IF NOT FOUND THEN
        RETURN '{"lost": true}';
    END IF;
    IF replica.last_batch = p_batch THEN
        RETURN replica.last_result || jsonb_build_object(
            'starts', acp.all_shown(replica.last_result->'starts'),
            'others', acp.all_shown(replica.last_result->'others'));
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
        shown_starts := acp.all_shown(starts);
        waits := jsonb_path_exists(p_asked, '$.starts[*].run.turn.status ? (@ == "queued")');
    END IF;
    IF p_asked ? 'turns' THEN
        SELECT e.extended, waits OR e.readied INTO extended, waits
        FROM acp.extend_turns(p_replica, p_asked->'turns') AS e;
    END IF;
    IF p_asked ? 'others' THEN
        SELECT o.results, o.shown INTO others, shown_others
        FROM acp.write_others(p_replica, p_asked->'others') AS o;
        waits := waits OR jsonb_path_exists(others, '$[*].waits ? (@ == true)');
    END IF;
    IF waits OR others <> '[]' THEN
        PERFORM acp.tell_others(p_replica, others, waits);
    END IF;
    result := jsonb_build_object('starts', starts, 'turns', extended, 'others', others);
    UPDATE acp.replicas r SET lease_until = clock_timestamp() + r.lease, last_batch = p_batch, last_result = result
    WHERE r.id = p_replica;
    RETURN result || jsonb_build_object('starts', shown_starts, 'others', shown_others);
END
$$;
