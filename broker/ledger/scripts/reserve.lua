-- Take what a call may spend, all or nothing. KEYS[2]: its run; then a key for each limit. ARGV[4]: decision ID, lease, idle ('' for
-- no run), whether it is a step of it (0, 1); then for each limit: kind, need, amount, per, burst, name in the run. As
-- `MemoryLedger.reserve`, line by line.
local id, lease, idle, run = ARGV[4], ARGV[5], tonumber(ARGV[6]), KEYS[2]
local began, last, steps = now, now, 0
if idle then
  local known = redis.call('HMGET', run, 'began', 'last', 'steps')
  if known[1] and now - known[2] < idle then began, last, steps = tonumber(known[1]), tonumber(known[2]), tonumber(known[3]) end
end
local answer, takes = {'granted', text(now), text(began), steps + 1}, {}
for index = 3, #KEYS do
  local key, at = KEYS[index], index * 6 - 11
  local kind, need, amount, per = ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  local burst, name, spent, wait = tonumber(ARGV[at + 5]), ARGV[at + 6], 0, 0
  local function counts(hash, field)
    redis.call('HINCRBY', hash, field, ARGV[at + 2])
    redis.call('HINCRBY', hash, kind == 'window' and me or field .. '@' .. me, ARGV[at + 2])
  end
  if kind == 'runs' then
    kind, need = 'window', steps == 0 and need or 0
  end
  if need == 0 then
    amount = 0
  elseif kind == 'window' then
    local window, known = (now - math.fmod(now, per)) / per, redis.call('HMGET', key, 'i', 't')
    local stored = tonumber(known[1] or -1)
    if stored >= window then window, spent = stored, tonumber(known[2]) end
    wait = (window + 1) * per - now
    takes[index] = function()
      if stored < window then
        redis.call('DEL', key)
        redis.call('HSET', key, 'i', text(window))
        redis.call('EXPIRE', key, math.min(per, 172800) + 60)
      end
      counts(key, 't')
    end
  elseif kind == 'rate' then
    if amount == 0 or need > burst then return {'refused', index - 3, 0, text(need), '0'} end
    local full, empty = tonumber(redis.call('GET', key) or now), now + burst * per / amount
    if full > empty then
      full = empty
      redis.call('SET', key, text(full), 'KEEPTTL')
    end
    full = math.max(full, now)
    wait = full - now + (need - burst) * per / amount
    if wait > 1e-6 then return {'refused', index - 3, text(burst), text(need), text(wait)} end
    full, amount = full + need * per / amount, need
    takes[index] = function()
      redis.call('SET', key, text(full), 'EX', math.ceil(full - now) + 60)
      answer[#answer + 1] = text(full)
    end
  elseif kind == 'concurrency' then
    spent, wait = redis.call('ZCARD', key), 1
    if spent + need > amount then spent = spent - redis.call('ZREMRANGEBYSCORE', key, '-inf', text(now)) end
    takes[index] = function()
      redis.call('ZADD', key, text(now + lease), me .. ':' .. id)
      redis.call('EXPIRE', key, lease + 60)
    end
  elseif kind == 'run_time' then
    spent, need, wait = math.ceil(now - began), 0, last + idle - now
  elseif kind == 'flow' then
    need, amount, spent = 0, 0, steps > 0 and 1 or 0
    for label in string.gmatch(name, '[^\n]+') do
      if tonumber(redis.call('HGET', run, label) or 0) <= 0 then spent = 0 end
    end
  else
    spent, wait = steps > 0 and tonumber(redis.call('HGET', run, name) or 0) or 0, last + idle - now
    takes[index] = function() counts(run, name) end
  end
  if spent + need > amount then return {'refused', index - 3, text(spent), text(need), text(need > amount and 0 or wait)} end
end
if idle and ARGV[7] == '1' then
  if steps == 0 then
    redis.call('DEL', run)
    redis.call('HSET', run, 'began', text(began), 'by', me)
  end
  redis.call('HSET', run, 'last', text(now), 'steps', steps + 1)
  redis.call('EXPIRE', run, idle + 60)
end
for index = 3, #KEYS do
  if takes[index] then takes[index]() end
end
return answer
