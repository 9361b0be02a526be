-- Results of one flush: each is written once, and only the first writer tells the waiting process.
-- KEYS: future key, inbox key, ... in pairs (an inbox of "" tells nobody)
-- ARGV: result TTL in ms, inbox TTL in ms, then result, note, ... in pairs
-- Returns 1 for each result that was written, 0 for each that stood there already.
local written = {}
for i = 1, #KEYS, 2 do
  if redis.call('SET', KEYS[i], ARGV[i + 2], 'NX', 'PX', ARGV[1]) then
    if KEYS[i + 1] ~= '' then
      redis.call('RPUSH', KEYS[i + 1], ARGV[i + 3])
      redis.call('PEXPIRE', KEYS[i + 1], ARGV[2])
    end
    written[#written + 1] = 1
  else
    written[#written + 1] = 0
  end
end
return written
