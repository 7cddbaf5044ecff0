#!lua
-- announce(args=[tenant], keys=[version, changes])
--
-- Tells every process that a tenant, its keys or its limits changed: they poll the version and ask what came after.
-- KEYS[1] version  string  counts changes
-- KEYS[2] changes  zset    tenant id -> version of its last change
-- Returns the new version.
local tenant = ARGV[1]
local version = redis.call('INCR', KEYS[1])
redis.call('ZADD', KEYS[2], version, tenant)
return version
