-- Which context a build needs: no context goes that an open build or a dead letter still reads.
ALTER TABLE builds ADD COLUMN context TEXT;
UPDATE builds SET context = json_extract(spec, '$.context.digest');
CREATE INDEX builds_by_context ON builds (context, state);
