-- Takes steps of jobs, all of one batch, in their order. broker/job_store.py says what each one means.
-- KEYS: for each step the record of its job. ARGV: the constants below, then for each step its name, how many arguments it has, and these.
-- The other keys are among the arguments, because Redis would demand the rights to read and to write each one in KEYS: a process may write
-- to others' inboxes and not read them, and a sender has no use for leases.
-- Every step may be taken twice, since its answer may be lost: it recognizes what it has written.
-- Returns two lists: for each step its outcome, which may be an error, since one step must not keep the others from being taken; and the
-- keys that were of another type, which were deleted.
local JOBS, ENDS, RECORD = ARGV[1], ARGV[2], ARGV[3]  -- the third is the beginning of a record's key, up to the id
local INBOX_TTL, LEASE_TTL, UNENDED_TTL, WAIT_TTL, MESSAGE_TTL, RESULT_TTL = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local KEPT_EVENTS, KEPT_ATTEMPTS = tonumber(ARGV[10]), tonumber(ARGV[11])
local FIRST = 12
local SWEPT = 2  -- ids that each run looks at
local odd = {}

-- Runs a command on a key. One of another type is deleted first.
local function run(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  if not string.find(reply.err, '^WRONGTYPE') then error(reply) end
  odd[#odd + 1] = key
  redis.call('PEXPIRE', key, 0)  -- deletes it
  return redis.call(command, key, ...)
end

local function tell(inbox, entry)
  run('RPUSH', inbox, entry)
  redis.call('PEXPIRE', inbox, INBOX_TTL)
end

-- The inbox entry `[1, id, 3, seq, event]`.
local function entry_of(id, seq, event)
  return '\149\1' .. cmsgpack.pack(id) .. '\3' .. cmsgpack.pack(seq) .. '\198' .. struct.pack('>I4', #event) .. event
end

-- Events are a list of inbox entries: a stream, whose numbers would do, takes 4 KiB with its first one.
local function add_event(one, event)
  local entry = entry_of(one.id, run('HINCRBY', one.record, 'events', 1), event)
  local length = run('RPUSH', one.events, entry)
  if length == 1 then redis.call('PEXPIRE', one.events, UNENDED_TTL) end
  if length > KEPT_EVENTS then redis.call('LTRIM', one.events, -KEPT_EVENTS, -1) end
  for _, inbox in ipairs(run('SMEMBERS', one.followers)) do tell(inbox, entry) end
end

local function keep_first_facts(one)
  local is_first = run('HSETNX', one.record, 'facts', one.facts) == 1
  if is_first then run('ZADD', JOBS, one.created, one.id) end
  return is_first
end

-- Returns whether the record has had no facts, or those of a job that was held.
local function keep_facts(one)
  if keep_first_facts(one) then return true end
  local is_held = run('HMGET', one.record, 'held')[1] == '1'
  if is_held then redis.call('HSET', one.record, 'facts', one.facts, 'held', '0') end
  return is_held
end

-- Counts the end of a job for its group. The byte of the member says whether that was done.
local function count(one)
  local total = tonumber(run('HMGET', one.group, 'total')[1] or 0)
  local number = tonumber(one.number)
  if number >= total then return end  -- the group is not known any more
  local known = run('GETRANGE', one.group_ends, number, number)
  if known ~= '' and known ~= '\0' then return end
  run('SETRANGE', one.group_ends, number, string.sub(one.state, 1, 1))
  redis.call('HINCRBY', one.group, one.state, 1)
  local ended = redis.call('HINCRBY', one.group, 'ended', 1)
  redis.call('PEXPIRE', one.group, UNENDED_TTL)
  redis.call('PEXPIRE', one.group_ends, UNENDED_TTL)
  if ended == total and run('HMGET', one.group, 'call')[1] then run('XADD', ENDS, '*', 'end', one.last_of_group) end
end

local function look(record)
  local found = run('HMGET', record, 'state', 'token', 'runs')
  return found[1], found[2], found[3]
end

local function join_queue(one)
  run('ZADD', one.waiting, one.score, one.id)
  redis.call('PEXPIRE', one.waiting, UNENDED_TTL)
end

-- Removes ids whose records have expired. Each run looks at more of them than it adds, so that they stay a part of all.
local function sweep()
  for _, id in ipairs(run('ZRANDMEMBER', JOBS, SWEPT)) do
    if redis.call('EXISTS', RECORD .. id .. '}') == 0 then redis.call('ZREM', JOBS, id) end
  end
end

local function read(one)
  return {run('HGETALL', one.record), redis.call('EXISTS', one.future)}
end

local function register(one, set)
  run('SADD', set, one.inbox)
  redis.call('PEXPIRE', set, WAIT_TTL)
  return read(one)
end

-- A pipeline runs from the first run of a stage on, and tells of the first run of each one.
local function begin_pipeline(one, is_first_run)
  local whole = {id = one.pipeline_id, record = one.pipeline_record, events = one.pipeline_events, followers = one.pipeline_followers,
                 facts = one.pipeline_facts, created = one.pipeline_created}
  if look(whole.record) then return end  -- it has ended: it was cancelled a moment ago
  keep_facts(whole)
  if run('HSETNX', whole.record, 'run:1', one.run) == 1 then
    redis.call('HSET', whole.record, 'runs', 1)
    add_event(whole, one.event)
  end
  if is_first_run then add_event(whole, one.pipeline_note) end
  redis.call('PEXPIRE', whole.record, UNENDED_TTL)
end

local steps = {}

function steps.add(one)
  local is_new = keep_facts(one)
  local state, _, runs = look(one.record)
  if state then  -- it has ended already, and may be tried again all the same
    if one.message ~= '' then
      redis.call('SET', one.message_key, one.message, 'PX', state == 'succeeded' and MESSAGE_TTL or RESULT_TTL)
    end
    return 1
  end
  redis.call('PEXPIRE', one.record, UNENDED_TTL)
  if is_new and not runs then
    if one.waiting ~= '' then join_queue(one) end  -- a pipeline waits in no queue
    add_event(one, one.event)
  end
  if one.message ~= '' then redis.call('SET', one.message_key, one.message, 'PX', UNENDED_TTL) end
  return 1
end

function steps.hold(one)
  if keep_first_facts(one) then
    redis.call('HSET', one.record, 'held', '1')
    redis.call('PEXPIRE', one.record, UNENDED_TTL)
    add_event(one, one.event)
  end
  return 1
end

-- The record is that of a group in this step and the next one.
function steps.keep_group(one)
  if run('HSETNX', one.record, 'facts', one.facts) == 1 then
    redis.call('HSET', one.record, 'total', one.total)
    if one.call ~= '' then redis.call('HSET', one.record, 'call', one.call) end
    redis.call('PEXPIRE', one.record, UNENDED_TTL)
  end
  return 1
end

function steps.group(one) return run('HGETALL', one.record) end

function steps.begin(one)
  local result = run('GET', one.future)
  local state, latest, runs = look(one.record)
  if result or state then return {'done', result or ''} end
  local holder = run('GET', one.lease)
  local left = redis.call('PTTL', one.lease)
  if holder and holder ~= one.token and left > 0 then return {'held', left} end
  redis.call('SET', one.lease, one.token, 'PX', LEASE_TTL)
  if latest ~= one.token then
    keep_facts(one)
    runs = run('HINCRBY', one.record, 'runs', 1)
    redis.call('HSET', one.record, 'token', one.token, 'noted', 0, 'run:' .. runs, one.run)
    if runs > KEPT_ATTEMPTS then redis.call('HDEL', one.record, 'run:' .. runs - KEPT_ATTEMPTS, 'end:' .. runs - KEPT_ATTEMPTS) end
    run('ZREM', one.waiting, one.id)
    add_event(one, one.event)
    if one.pipeline_id then begin_pipeline(one, tonumber(runs) == 1) end
    sweep()
  end
  redis.call('PEXPIRE', one.record, one.ttl)
  return {'leased', tonumber(runs)}
end

function steps.renew(one)
  local state, latest = look(one.record)
  if latest and latest ~= one.token then return 0 end
  if not state then redis.call('SET', one.lease, one.token, 'PX', LEASE_TTL) end
  return 1
end

function steps.try_again(one)
  if run('HGET', one.record, one.name) == one.attempt then return 1 end  -- our own
  local state, latest = look(one.record)
  if latest and latest ~= one.token or state or run('GET', one.future) then return 0 end
  redis.call('HSET', one.record, one.name, one.attempt, 'token', '')
  redis.call('PEXPIRE', one.record, UNENDED_TTL)
  redis.call('PEXPIRE', one.lease, 0)
  join_queue(one)
  add_event(one, one.event)
  return 1
end

function steps.give_back(one)
  local state, latest, runs = look(one.record)
  if latest ~= one.token or state then return 0 end
  redis.call('HDEL', one.record, 'run:' .. runs)
  redis.call('HINCRBY', one.record, 'runs', -1)
  redis.call('HSET', one.record, 'token', '')
  redis.call('PEXPIRE', one.lease, 0)
  join_queue(one)
  add_event(one, one.event)
  return 1
end

steps['end'] = function(one)
  local found = run('GET', one.future)
  if found and found ~= one.result then return 0 end
  if not found then
    local state, latest = look(one.record)
    if state then return 0 end  -- it has ended, and its result is not kept any more
    if one.token ~= '' and one.state ~= 'succeeded' and latest and latest ~= one.token then return 0 end
    redis.call('SET', one.future, one.result, 'PX', one.ttl)
  end
  if run('HSETNX', one.record, 'state', one.state) == 1 then
    redis.call('HSET', one.record, 'status', one.status, 'ended', one.ended)
    redis.call('PEXPIRE', one.record, 2 * one.ttl)
    run('ZREM', one.waiting, one.id)
    add_event(one, one.event)
    redis.call('PEXPIRE', one.events, one.ttl)
    local kept = one.state == 'succeeded' and math.min(one.ttl, MESSAGE_TTL) or one.ttl
    redis.call('PEXPIRE', one.message_key, kept)
    redis.call('PEXPIRE', one.body, kept)
    if one.outbox ~= '' then run('XADD', ENDS, '*', 'end', one.outbox) end
    if one.group then count(one) end
  end
  if one.token ~= '' and run('GET', one.lease) == one.token then redis.call('PEXPIRE', one.lease, 0) end
  if one.inbox ~= '' then tell(one.inbox, one.note) end
  for _, inbox in ipairs(run('SMEMBERS', one.waiters)) do
    if inbox ~= one.inbox then tell(inbox, one.note) end
  end
  return 1
end

function steps.note(one)
  local state, latest = look(one.record)
  if latest ~= one.token or state then return 0 end
  if tonumber(run('HGET', one.record, 'noted') or 0) >= tonumber(one.number) then return 1 end  -- our own
  redis.call('HSET', one.record, 'noted', one.number)
  if one.kind == 'progress' then redis.call('HSET', one.record, 'progress', one.event) end
  add_event(one, one.event)
  return 1
end

function steps.wait(one) return register(one, one.waiters) end

function steps.follow(one) return register(one, one.followers) end

steps.read = read

function steps.place(one) return run('ZRANK', one.waiting, one.id) or -1 end

function steps.forget(one)
  local state = look(one.record)
  if not state and redis.call('EXISTS', one.record) == 1 then return 0 end
  for _, key in ipairs({one.record, one.future, one.result_body, one.events, one.message_key, one.body}) do
    redis.call('PEXPIRE', key, 0)
  end
  run('ZREM', JOBS, one.id)
  return 1
end

local at = FIRST
local function next_step()
  local name, count, arguments = ARGV[at], tonumber(ARGV[at + 1]), {}
  for i = at + 2, at + 1 + 2 * count, 2 do arguments[ARGV[i]] = ARGV[i + 1] end
  at = at + 2 + 2 * count
  return name, arguments
end

local outcomes = {}
for i = 1, #KEYS do
  local name, one = next_step()
  one.record = KEYS[i]
  local is_taken, outcome = pcall(steps[name], one)
  if is_taken then
    outcomes[i] = outcome
  else
    local message = tostring(outcome)  -- Redis's pcall gives the words of an error alone
    outcomes[i] = {err = string.find(message, '^%u+ ') and message or 'ERR ' .. message}
  end
end
return {outcomes, odd}
