-- Deletes keys if the guard holds. KEYS: guard key, then the keys to delete. ARGV: '1' and the guard's value, or '0' and '' for absent.
local current = redis.pcall('GET', KEYS[1])
if type(current) == 'table' then  -- a value of another type is not the guard's
  if not string.find(current.err, '^WRONGTYPE') then error(current) end
  return 0
end
if ARGV[1] == '1' then
  if current ~= ARGV[2] then return 0 end
elseif current then
  return 0
end
redis.call('DEL', unpack(KEYS, 2))
return 1
