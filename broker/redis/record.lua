-- Results of one flush: each is written once, and only the first writer tells the waiting process.
-- KEYS: future keys. ARGV: result TTL in ms, inbox TTL in ms, then result, note, inbox key, ... in threes (an inbox of "" tells nobody).
-- The inboxes are no KEYS, since for these Redis wants the right to read, too: a replica may write to an inbox and not read it.
-- Returns 1 for each result that stands there now, 0 for each in whose place another one stood already; 2 is 1, and a value of another
-- type stood at the inbox, and was taken away: one such inbox must not keep the other results from being told.
local function tell(inbox, note)
  if inbox == '' then return 1 end
  local pushed = redis.pcall('RPUSH', inbox, note)
  local is_odd = type(pushed) == 'table'
  if is_odd then
    if not string.find(pushed.err, '^WRONGTYPE') then error(pushed) end
    redis.call('PEXPIRE', inbox, 0)  -- which deletes it
    redis.call('RPUSH', inbox, note)
  end
  redis.call('PEXPIRE', inbox, ARGV[2])
  return is_odd and 2 or 1
end

local function stands(key, result)
  local found = redis.pcall('GET', key)
  if type(found) == 'table' and not string.find(found.err, '^WRONGTYPE') then error(found) end
  return found == result
end

local written = {}
for i = 1, #KEYS do
  local result, note, inbox = ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2]
  if redis.call('SET', KEYS[i], result, 'NX', 'PX', ARGV[1]) then
    written[#written + 1] = tell(inbox, note)
  elseif stands(KEYS[i], result) then
    -- Ours, of a call that was sent twice since its answer was lost; or another's who found the same (cancelled, late).
    written[#written + 1] = tell(inbox, note)
  else
    written[#written + 1] = 0
  end
end
return written
