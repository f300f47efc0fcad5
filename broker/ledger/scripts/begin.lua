-- How every script but `join` begins. KEYS[1]: the members. ARGV: replica, its token, the caller's clock ('' for this server's).
-- A command of another token was sent before its sender joined again, or to data that is gone: it changes nothing.
local me = ARGV[1]
local function text(number) return string.format('%.17g', number) end
local moment = redis.call('TIME')
local real = moment[1] + moment[2] / 1e6
local members = redis.call('HMGET', KEYS[1], me, 'ready', 'clock')
if members[1] ~= ARGV[2] then return {'away'} end
local now = math.max(tonumber(ARGV[3]) or real, tonumber(members[3]))
redis.call('HSET', KEYS[1], 'clock', text(now))
