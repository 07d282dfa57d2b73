-- A build is a document with the columns that queries need beside it; the document decides, and every save
-- writes both. Moments are microseconds since 1970. Names are compared byte by byte, as SQLite does it: the order of
-- a language changes with the library that knows the language, and breaks indexes.

-- A sequence, so that submissions do not wait for each other.
CREATE SEQUENCE submit_seq AS BIGINT;

CREATE TABLE builds (
    id              UUID    PRIMARY KEY,
    submit_seq      BIGINT  NOT NULL UNIQUE,
    namespace       TEXT COLLATE "C" NOT NULL,
    pool            TEXT COLLATE "C" NOT NULL,
    priority        BIGINT  NOT NULL,
    concurrency_group TEXT COLLATE "C",
    repositories    TEXT    NOT NULL,
    idempotency_key TEXT COLLATE "C",
    request_hash    TEXT    NOT NULL,
    state           TEXT COLLATE "C" NOT NULL,
    version         BIGINT  NOT NULL,
    committed       BOOLEAN NOT NULL,
    not_before      BIGINT  NOT NULL,
    due_at          BIGINT,
    ended_at        BIGINT,
    avoid           TEXT COLLATE "C",
    lease_agent     TEXT COLLATE "C",
    lease_until     BIGINT,
    claim_id        UUID,
    spec            TEXT    NOT NULL,
    document        TEXT    NOT NULL,
    UNIQUE (namespace, idempotency_key)
);
CREATE INDEX builds_by_state ON builds (state, pool, namespace, priority DESC, submit_seq);
CREATE INDEX builds_by_state_and_id ON builds (state, id);
CREATE INDEX builds_by_lease ON builds (lease_until) WHERE lease_until IS NOT NULL;
CREATE INDEX builds_by_agent ON builds (lease_agent) WHERE lease_agent IS NOT NULL;
CREATE INDEX builds_by_due ON builds (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX builds_by_end ON builds (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX builds_by_claim ON builds (claim_id) WHERE claim_id IS NOT NULL;

-- The newest committed build of every target, and when its tag is looked at again.
CREATE TABLE tag_heads (
    target     TEXT COLLATE "C" PRIMARY KEY,
    submit_seq BIGINT NOT NULL,
    build      UUID   NOT NULL,
    digest     TEXT COLLATE "C" NOT NULL,
    recheck_at BIGINT,
    rechecks   BIGINT NOT NULL
);
CREATE INDEX tag_heads_by_build ON tag_heads (build);
CREATE INDEX tag_heads_by_recheck ON tag_heads (recheck_at) WHERE recheck_at IS NOT NULL;

-- Every digest that Kiln ever put under a target: what else is found there is somebody else's.
CREATE TABLE tag_history (
    target TEXT COLLATE "C" NOT NULL,
    digest TEXT COLLATE "C" NOT NULL,
    build  UUID   NOT NULL,
    at     BIGINT NOT NULL,
    PRIMARY KEY (target, digest, build)
);
CREATE INDEX tag_history_by_time ON tag_history (at);

-- Every lease that ended: who worked on what, and how that ended.
CREATE TABLE attempts (
    id       BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    build    UUID    NOT NULL,
    attempt  BIGINT  NOT NULL,
    lane     TEXT    NOT NULL,
    claim_id UUID    NOT NULL,
    ended_at BIGINT  NOT NULL,
    document TEXT    NOT NULL
);
CREATE INDEX attempts_by_build ON attempts (build, id);
CREATE INDEX attempts_by_claim ON attempts (claim_id);

-- Messages of committed changes that the bus has not confirmed yet.
CREATE TABLE outbox (
    id           BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    exchange     TEXT    NOT NULL,
    routing_key  TEXT    NOT NULL,
    message_type TEXT    NOT NULL,
    message_id   UUID    NOT NULL,
    body         BYTEA    NOT NULL,
    created_at   BIGINT  NOT NULL,
    locked_until BIGINT  NOT NULL,
    tries        BIGINT  NOT NULL,
    error        TEXT
);

-- What everybody may know of every change, in order.
CREATE TABLE events (
    id        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    build     UUID    NOT NULL,
    namespace TEXT COLLATE "C" NOT NULL,
    at        BIGINT  NOT NULL,
    body      TEXT    NOT NULL
);
CREATE INDEX events_by_build ON events (build, id);

CREATE TABLE agents (
    id       TEXT COLLATE "C" PRIMARY KEY,
    boot     UUID   NOT NULL,
    pools    TEXT   NOT NULL,
    policies TEXT   NOT NULL,
    slots    BIGINT NOT NULL,
    free     BIGINT NOT NULL,
    seen_at  BIGINT NOT NULL
);

-- Runs of agents that a newer run has replaced: what they still say comes too late.
CREATE TABLE retired_boots (
    boot  UUID   PRIMARY KEY,
    agent TEXT COLLATE "C" NOT NULL,
    at    BIGINT NOT NULL
);

CREATE TABLE audit (
    id     BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     BIGINT  NOT NULL,
    actor  TEXT    NOT NULL,
    action TEXT    NOT NULL,
    build  UUID,
    detail TEXT    NOT NULL
);

-- Messages that nobody could read.
CREATE TABLE bad_messages (
    id     BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     BIGINT  NOT NULL,
    queue  TEXT    NOT NULL,
    error  TEXT    NOT NULL,
    body   BYTEA    NOT NULL
);
