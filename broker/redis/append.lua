-- Appends frames to streams, trims them, and records their ends: all Appends of one batch (broker/store.py says what each one means).
-- KEYS: stream, owner, future, ... in threes. ARGV: result TTL in ms, inbox TTL in ms, and for each Append: claim, attempt, number of the
-- first frame, number up to which the stream may be trimmed, '1' to do so, TTL in ms, '1' to renew it, '1' if the stream may have lost its
-- last frames, the result ('' for none) and its inbox entry, how many frames, how many inboxes, the frames, the inboxes. A frame comes as
-- its inbox entry, and the stream holds the same string: to make one from the other here would copy it twice.
-- The inboxes are not in KEYS, because Redis would then demand the right to read them: a replica may write to an inbox and not read it.
-- Returns two lists: for each Append the number of the stream's last frame, -1 if a result stands there, or -2 if another run owns the
-- stream; and the keys that were of another type, which were deleted: one such key must not keep the other Appends from being written.
local ENDED, TAKEN = -1, -2
local PORTION = 256  -- entries of one RPUSH: Lua's stack is bounded
local odd = {}

local function is_error(reply, pattern)
  return type(reply) == 'table' and reply.err and string.find(reply.err, pattern)
end

local function checked(reply)
  if is_error(reply, '') then error(reply) end
  return reply
end

-- Runs a command on a key. One of another type is deleted first.
local function try(key, ...)
  local reply = redis.pcall(...)
  if is_error(reply, '^WRONGTYPE') then
    odd[#odd + 1] = key
    redis.call('PEXPIRE', key, 0)  -- deletes it
    reply = redis.pcall(...)
  end
  return reply
end

local function find_result(future)
  local found = redis.pcall('GET', future)
  if is_error(found, '^WRONGTYPE') then return true end  -- it keeps results away, as in record.lua
  return checked(found)
end

-- Attempt and number of the last frame that was ever appended. XINFO copies the first and the last frame, so it is asked only if need be.
local function find_end(stream)
  local info = try(stream, 'XINFO', 'STREAM', stream)
  if is_error(info, 'no such key') then return 0, 0 end
  for i = 1, #checked(info), 2 do
    if info[i] == 'last-generated-id' then
      local attempt, seq = string.match(info[i + 1], '(%d+)-(%d+)')
      return tonumber(attempt), tonumber(seq)
    end
  end
end

-- Removes the frames up to a number. Those of earlier attempts have lower ids, whatever their numbers: so it looks for the attempt that has
-- the last frame to remove, and only the first attempt needs no look.
local function trim(stream, attempt, up_to)
  while attempt > 1 do
    local found = redis.call('XRANGE', stream, attempt, attempt, 'COUNT', 1)[1]
    if found and tonumber(string.match(found[1], '-(%d+)')) <= up_to then break end
    attempt = attempt - 1
  end
  redis.call('XTRIM', stream, 'MINID', '=', string.format('%d-%d', attempt, up_to + 1))
end

local function tell(one)
  local notes = one.frames
  if one.ends ~= '' then notes[#notes + 1] = one.end_note end
  for _, inbox in ipairs(#notes > 0 and one.inboxes or {}) do
    for from = 1, #notes, PORTION do
      checked(try(inbox, 'RPUSH', inbox, unpack(notes, from, math.min(from + PORTION - 1, #notes))))
    end
    redis.call('PEXPIRE', inbox, ARGV[2])
  end
end

-- Appends the frames that the stream lacks. Returns the number of its last frame, and that frame's attempt. A number below `first - 1` means
-- a gap, and nothing written.
local function add(one)
  local attempt, last, before = one.attempt, 0, one.first - 1
  local function look()
    local last_attempt
    last_attempt, last = find_end(one.stream)
    attempt = math.max(attempt, last_attempt)  -- ids rise
  end
  if one.may_lack or attempt > 1 or one.trim_to < before and checked(try(one.stream, 'XLEN', one.stream)) == 0 then
    look()
    if math.max(last, one.trim_to) < before then return math.max(last, one.trim_to) end
  end
  for i = 1, #one.frames do
    local seq = before + i
    if seq > last then
      local added = try(one.stream, 'XADD', one.stream, string.format('%d-%d', attempt, seq), 'f', one.frames[i])
      if is_error(added, 'equal or smaller') then
        look()
        if seq > last then redis.call('XADD', one.stream, string.format('%d-%d', attempt, seq), 'f', one.frames[i]) end
      else
        checked(added)
      end
    end
  end
  return math.max(last, one.trim_to, before + #one.frames), attempt
end

local function append(one)
  local odd_before = #odd
  local result = find_result(one.future)
  if result and result == one.ends then  -- our own, of a call that was repeated after its answer was lost
    local last = one.first - 1 + #one.frames
    tell(one)
    return last
  end
  if result then return ENDED end
  local owner = checked(try(one.owner, 'GET', one.owner))
  if owner and owner ~= one.claim then return TAKEN end
  local last, attempt = add(one)
  if last < one.first - 1 then return last end
  if one.trims then trim(one.stream, attempt, one.trim_to) end
  if one.renews or not owner or #odd > odd_before then  -- the last two: the stream may be new
    redis.call('SET', one.owner, one.claim, 'PX', one.ttl)
    redis.call('PEXPIRE', one.stream, one.ttl)
  end
  if one.ends ~= '' then redis.call('SET', one.future, one.ends, 'NX', 'PX', ARGV[1]) end
  tell(one)
  return last
end

local at = 3
local function next_values(count)
  local values = {}
  for i = 1, count do values[i] = ARGV[at + i - 1] end
  at = at + count
  return values
end

local outcomes = {}
for k = 1, #KEYS, 3 do
  local one = {stream = KEYS[k], owner = KEYS[k + 1], future = KEYS[k + 2]}
  one.claim, one.attempt, one.first, one.trim_to = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  one.trims, one.ttl, one.renews, one.may_lack = ARGV[at + 4] == '1', ARGV[at + 5], ARGV[at + 6] == '1', ARGV[at + 7] == '1'
  one.ends, one.end_note = ARGV[at + 8], ARGV[at + 9]
  local frames, inboxes = tonumber(ARGV[at + 10]), tonumber(ARGV[at + 11])
  at = at + 12
  one.frames, one.inboxes = next_values(frames), next_values(inboxes)
  outcomes[#outcomes + 1] = append(one)
end
return {outcomes, odd}
