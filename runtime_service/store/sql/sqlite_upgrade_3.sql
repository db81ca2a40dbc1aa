-- From schema version 3 to 4: a run knows what its running turn has asked.

ALTER TABLE runs ADD COLUMN question BLOB;

PRAGMA user_version = 4;
