-- A run knows what its running turn has asked last: [sequence, is_open, [[id, name], …]], NULL where that is nothing.
-- (In a transaction of its own: with the view in the same one it could wait in a circle with those who read that.)

ALTER TABLE acp.runs ADD COLUMN question jsonb;
