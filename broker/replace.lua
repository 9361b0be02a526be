-- Compare and set. KEYS: key. ARGV: expected ('' with a flag for absent), new, flags 'old?' 'new?', channel to announce on.
local current = redis.call('GET', KEYS[1])
if ARGV[3] == '1' then
  if current ~= ARGV[1] then return 0 end
elseif current then
  return 0
end
if ARGV[4] == '1' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('DEL', KEYS[1]) end
redis.call('PUBLISH', ARGV[5], KEYS[1])
return 1
