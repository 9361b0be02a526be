-- Results of one flush: each is written once, and only the first writer tells the waiting process.
-- KEYS: future key, inbox key, ... in pairs (an inbox of "" tells nobody)
-- ARGV: result TTL in ms, inbox TTL in ms, then result, note, ... in pairs
-- Returns 1 for each result that stands there now, 0 for each in whose place another one stood already.
local function tell(inbox, note)
  if inbox ~= '' then
    redis.call('RPUSH', inbox, note)
    redis.call('PEXPIRE', inbox, ARGV[2])
  end
end

local written = {}
for i = 1, #KEYS, 2 do
  if redis.call('SET', KEYS[i], ARGV[i + 2], 'NX', 'PX', ARGV[1]) then
    tell(KEYS[i + 1], ARGV[i + 3])
    written[#written + 1] = 1
  elseif redis.call('GET', KEYS[i]) == ARGV[i + 2] then
    -- Ours, of a call that was sent twice since its answer was lost; or another's who found the same (cancelled, late).
    tell(KEYS[i + 1], ARGV[i + 3])
    written[#written + 1] = 1
  else
    written[#written + 1] = 0
  end
end
return written
