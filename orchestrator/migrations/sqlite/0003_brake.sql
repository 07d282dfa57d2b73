-- Agents that were believed dead lately, by name with the moment: one row that every process shares.
CREATE TABLE brake (
    id       BIGINT PRIMARY KEY,
    version  BIGINT NOT NULL,
    silenced TEXT   NOT NULL
);
INSERT INTO brake (id, version, silenced) VALUES (1, 0, '{}');
