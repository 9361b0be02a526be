-- Compare and set, if the guard holds too.
-- KEYS: key, guard key (or none)
-- ARGV: expected value, new value, TTL of the new value in ms (0: none), channel to announce on ('': none), guard's value. Each value is
-- a pair: '1' and the value, or '0' and '' for absent.
local function holds(key, there, value)
  local current = redis.pcall('GET', key)
  if type(current) == 'table' then  -- reads as WRONG_TYPE of store.py, so that it can be replaced
    if not string.find(current.err, '^WRONGTYPE') then error(current) end
    current = '\0WRONGTYPE'
  end
  if there == '1' then return current == value end
  return not current
end
if KEYS[2] and not holds(KEYS[2], ARGV[7], ARGV[8]) then return 0 end
if not holds(KEYS[1], ARGV[1], ARGV[2]) then return 0 end
if ARGV[3] ~= '1' then
  redis.call('DEL', KEYS[1])
elseif ARGV[5] ~= '0' then
  redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
else
  redis.call('SET', KEYS[1], ARGV[4])
end
if ARGV[6] ~= '' then redis.call('PUBLISH', ARGV[6], KEYS[1]) end
return 1
