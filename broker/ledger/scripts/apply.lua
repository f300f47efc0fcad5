-- What a ledger has to say of what it spent: changes while it is joined, and when it joins, the whole of it again.
-- For each further key in ARGV: what to do, how many words follow, the words.
local verbs = {}

-- A call that ended, by the kinds of its limits. What has changed hands since (window, bucket, run) is left alone.
function verbs.window(key, window, change)
  if tonumber(redis.call('HGET', key, 'i') or -1) ~= tonumber(window) then return end
  redis.call('HINCRBY', key, 't', change)
  redis.call('HINCRBY', key, me, change)
end
function verbs.rate(key, before, after)
  if redis.call('GET', key) == before then redis.call('SET', key, after, 'KEEPTTL') end
end
function verbs.concurrency(key, id) redis.call('ZREM', key, me .. ':' .. id) end
function verbs.run(key, name, change, at)
  if tonumber(redis.call('HGET', key, 'began') or 'inf') > tonumber(at) then return end
  redis.call('HINCRBY', key, name, change)
  redis.call('HINCRBY', key, name .. '@' .. me, change)
end
function verbs.renew(key, lease, ...)
  for _, id in ipairs({...}) do
    local lapses = redis.call('ZSCORE', key, me .. ':' .. id)
    if lapses and tonumber(lapses) > now then redis.call('ZADD', key, text(now + lease), me .. ':' .. id) end
  end
  redis.call('EXPIRE', key, lease + 60)
end

-- All that this ledger has of a key: whatever is said here of it, by whatever was lost or came too late, is put right.
local function mine(key, total, field, value)
  local change = value - (redis.call('HGET', key, field) or 0)
  if change ~= 0 then redis.call('HINCRBY', key, total, text(change)) end
  redis.call('HSET', key, field, text(value))
end
function verbs.own_window(key, window, spent, per)
  local stored = tonumber(redis.call('HGET', key, 'i') or -1)
  if stored >= tonumber(window) then return mine(key, 't', me, stored > tonumber(window) and 0 or tonumber(spent)) end
  if stored >= 0 then redis.call('DEL', key) end
  redis.call('HSET', key, 'i', window, 't', spent, me, spent)
  redis.call('EXPIRE', key, math.min(per, 172800) + 60)
end
function verbs.own_rate(key, full)
  local latest = math.max(tonumber(full), tonumber(redis.call('GET', key) or 0))
  if latest > now then redis.call('SET', key, text(latest), 'EX', math.ceil(latest - now) + 60) end
end
function verbs.own_concurrency(key, first, ...)
  for _, member in ipairs(first == '1' and redis.call('ZRANGE', key, 0, -1) or {}) do
    if string.sub(member, 1, #me + 1) == me .. ':' then redis.call('ZREM', key, member) end
  end
  local open = {...}
  for at = 1, #open, 2 do redis.call('ZADD', key, open[at + 1], me .. ':' .. open[at]) end
  redis.call('EXPIRE', key, 180)
end
function verbs.own_run(key, began, last, steps, idle, ...)
  local known, counts = redis.call('HMGET', key, 'began', 'last', 'steps', 'by'), {...}
  local newer = known[1] and known[1] - last >= (last == '0' and 0 or tonumber(idle))
  if newer and known[4] == me and known[3] == '1' then
    -- Begun by a call that nobody knows of: its answer never came.
    redis.call('DEL', key)
    return
  elseif not newer and last ~= '0' then
    if known[1] and began - known[2] >= tonumber(idle) then
      redis.call('DEL', key)
      known = {}
    end
    redis.call('HSET', key, 'began', text(math.min(began, known[1] or began)), 'last', text(math.max(last, known[2] or 0)),
      'steps', math.max(steps, known[3] or 0))
    redis.call('EXPIRE', key, idle + 60)
  elseif not known[1] then
    return
  end
  for at = 1, #counts, 2 do mine(key, counts[at], counts[at] .. '@' .. me, newer and 0 or tonumber(counts[at + 1])) end
end
-- What all brokers must know, by ID; under the empty ID, the number of the last one.
function verbs.note(key, id, document)
  redis.call('HSET', key, id, document)
  redis.call('HINCRBY', key, '', 1)
end
function verbs.unnote(key, ...) redis.call('HDEL', key, ...) end
-- As long as somebody has more to say, nobody is served.
function verbs.hold(key)
  if real < tonumber(members[2]) then
    members[2] = math.max(members[2], real + 1)
    redis.call('HSET', key, 'ready', text(members[2]))
  end
end

local at = 4
for index = 2, #KEYS do
  verbs[ARGV[at]](KEYS[index], unpack(ARGV, at + 2, at + 1 + ARGV[at + 1]))
  at = at + 2 + ARGV[at + 1]
end
return {'done', text(now), text(members[2] - real), redis.call('HGET', '{broker}:notices', '') or ''}
