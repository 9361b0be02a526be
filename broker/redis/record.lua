-- Writes the results of one batch: each with SET NX, and only the first writer adds an entry to the inbox of the waiting process.
-- KEYS: future keys. ARGV: result TTL in ms, inbox TTL in ms, then result, entry, inbox key, ... in threes (inbox "": no entry), then in
-- pairs the number of each result that has another TTL, and that.
-- The inboxes are not in KEYS, because Redis would then demand the right to read them: a replica may write to an inbox and not read it.
-- Returns for each result: 1 if it stands there now, 0 if another result stood there first, 2 if it stands there now and the inbox was a
-- key of another type, which was deleted: one such inbox must not keep the other results from being announced.
local function tell(inbox, note)
  if inbox == '' then return 1 end
  local pushed = redis.pcall('RPUSH', inbox, note)
  local is_odd = type(pushed) == 'table'
  if is_odd then
    if not string.find(pushed.err, '^WRONGTYPE') then error(pushed) end
    redis.call('PEXPIRE', inbox, 0)  -- deletes it
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

local ttls = {}
for at = 3 + 3 * #KEYS, #ARGV, 2 do ttls[tonumber(ARGV[at])] = ARGV[at + 1] end

local written = {}
for i = 1, #KEYS do
  local result, note, inbox = ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2]
  if redis.call('SET', KEYS[i], result, 'NX', 'PX', ttls[i] or ARGV[1]) then
    written[#written + 1] = tell(inbox, note)
  elseif stands(KEYS[i], result) then
    -- An equal result: our own, of a call that was retried after its answer was lost, or another writer's (cancelled, late).
    written[#written + 1] = tell(inbox, note)
  else
    written[#written + 1] = 0
  end
end
return written
