-- A build is a document with the columns that queries need beside it; the document decides, and every save
-- writes both. Moments are microseconds since 1970.

CREATE TABLE counters (
    name  TEXT   PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counters (name, value) VALUES ('submit', 0);

CREATE TABLE builds (
    id              BLOB    PRIMARY KEY,
    submit_seq      BIGINT  NOT NULL UNIQUE,
    namespace       TEXT    NOT NULL,
    pool            TEXT    NOT NULL,
    priority        BIGINT  NOT NULL,
    concurrency_group TEXT,
    repositories    TEXT    NOT NULL,
    idempotency_key TEXT,
    request_hash    TEXT    NOT NULL,
    state           TEXT    NOT NULL,
    version         BIGINT  NOT NULL,
    committed       BOOLEAN NOT NULL,
    not_before      BIGINT  NOT NULL,
    due_at          BIGINT,
    ended_at        BIGINT,
    avoid           TEXT,
    lease_agent     TEXT,
    lease_until     BIGINT,
    claim_id        BLOB,
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
    target     TEXT   PRIMARY KEY,
    submit_seq BIGINT NOT NULL,
    build      BLOB   NOT NULL,
    digest     TEXT   NOT NULL,
    recheck_at BIGINT,
    rechecks   BIGINT NOT NULL
);
CREATE INDEX tag_heads_by_build ON tag_heads (build);
CREATE INDEX tag_heads_by_recheck ON tag_heads (recheck_at) WHERE recheck_at IS NOT NULL;

-- Every digest that Kiln ever put under a target: what else is found there is somebody else's.
CREATE TABLE tag_history (
    target TEXT   NOT NULL,
    digest TEXT   NOT NULL,
    build  BLOB   NOT NULL,
    at     BIGINT NOT NULL,
    PRIMARY KEY (target, digest, build)
);
CREATE INDEX tag_history_by_time ON tag_history (at);

-- Every lease that ended: who worked on what, and how that ended.
CREATE TABLE attempts (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    build    BLOB    NOT NULL,
    attempt  BIGINT  NOT NULL,
    lane     TEXT    NOT NULL,
    claim_id BLOB    NOT NULL,
    ended_at BIGINT  NOT NULL,
    document TEXT    NOT NULL
);
CREATE INDEX attempts_by_build ON attempts (build, id);
CREATE INDEX attempts_by_claim ON attempts (claim_id);

-- Messages of committed changes that the bus has not confirmed yet.
CREATE TABLE outbox (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    exchange     TEXT    NOT NULL,
    routing_key  TEXT    NOT NULL,
    message_type TEXT    NOT NULL,
    message_id   BLOB    NOT NULL,
    body         BLOB    NOT NULL,
    created_at   BIGINT  NOT NULL,
    locked_until BIGINT  NOT NULL,
    tries        BIGINT  NOT NULL,
    error        TEXT
);

-- What everybody may know of every change, in order.
CREATE TABLE events (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    build     BLOB    NOT NULL,
    namespace TEXT    NOT NULL,
    at        BIGINT  NOT NULL,
    body      TEXT    NOT NULL
);
CREATE INDEX events_by_build ON events (build, id);

CREATE TABLE agents (
    id       TEXT   PRIMARY KEY,
    boot     BLOB   NOT NULL,
    pools    TEXT   NOT NULL,
    policies TEXT   NOT NULL,
    slots    BIGINT NOT NULL,
    free     BIGINT NOT NULL,
    seen_at  BIGINT NOT NULL
);

-- Runs of agents that a newer run has replaced: what they still say comes too late.
CREATE TABLE retired_boots (
    boot  BLOB   PRIMARY KEY,
    agent TEXT   NOT NULL,
    at    BIGINT NOT NULL
);

CREATE TABLE audit (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    at     BIGINT  NOT NULL,
    actor  TEXT    NOT NULL,
    action TEXT    NOT NULL,
    build  BLOB,
    detail TEXT    NOT NULL
);

-- Messages that nobody could read.
CREATE TABLE bad_messages (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    at     BIGINT  NOT NULL,
    queue  TEXT    NOT NULL,
    error  TEXT    NOT NULL,
    body   BLOB    NOT NULL
);
