-- Results of one flush: each is written once, and only the first writer tells the waiting process.
-- KEYS: future keys. ARGV: result TTL in ms, inbox TTL in ms, then result, note, inbox key, ... in threes (an inbox of "" tells nobody).
-- The inboxes are no KEYS, since for these Redis wants the right to read, too: a replica may write to an inbox and not read it.
-- Returns 1 for each result that stands there now, 0 for each in whose place another one stood already.
local function tell(inbox, note)
  if inbox ~= '' then
    redis.call('RPUSH', inbox, note)
    redis.call('PEXPIRE', inbox, ARGV[2])
  end
end

local written = {}
for i = 1, #KEYS do
  local result, note, inbox = ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2]
  if redis.call('SET', KEYS[i], result, 'NX', 'PX', ARGV[1]) then
    tell(inbox, note)
    written[#written + 1] = 1
  elseif redis.call('GET', KEYS[i]) == result then
    -- Ours, of a call that was sent twice since its answer was lost; or another's who found the same (cancelled, late).
    tell(inbox, note)
    written[#written + 1] = 1
  else
    written[#written + 1] = 0
  end
end
return written
