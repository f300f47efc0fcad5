-- Become a member. ARGV: replica, new token, the caller's clock or '', last token, run_id, grace, the ledger's own time.
-- Answers whether all is as the ledger left it, the time, and in how many seconds reservations are served.
local moment = redis.call('TIME')
local real = moment[1] + moment[2] / 1e6
local known = redis.call('HMGET', KEYS[1], 'run_id', ARGV[1], 'ready', 'clock')
local kept, ready = known[1] == ARGV[5] and known[2] == ARGV[4], tonumber(known[3] or 0)
if known[1] ~= ARGV[5] then
  -- Another server, or one that lost its data: the others have the grace to say what they spent.
  ready = real + ARGV[6]
  redis.call('DEL', KEYS[1])
end
local now, own = math.max(tonumber(ARGV[3]) or real, tonumber(known[4] or 0)), tonumber(ARGV[7])
-- A new server's clock may lag a little behind the last one's. More is not the clock of a server, and is not believed.
if own < now + 10 then now = math.max(now, own) end
local function text(number) return string.format('%.17g', number) end
redis.call('HSET', KEYS[1], 'run_id', ARGV[5], ARGV[1], ARGV[2], 'ready', text(ready), 'clock', text(now))
return {kept and 'kept' or 'lost', text(now), text(ready - real)}
