-- Put in front of reserve, settle and void by scripts.py, after _entries.lua: what the rate limits remember.
--
-- KEYS[5] rates  hash  t and k:<key id> -> {requests left, tokens left, at (ms), minute, its requests, hour, its requests}
--                      (msgpack)
local rates = KEYS[5]
local REQUESTS, TOKENS, AT, MINUTE, IN_MINUTE, HOUR, IN_HOUR = 1, 2, 3, 4, 5, 6, 7

-- What a scope remembers; nil when that is nothing, or damaged: this is advice, and money is moved all the same (D4).
local function remembered(raw)
  local sane, s = pcall(cmsgpack.unpack, raw)
  return sane and type(s) == 'table' and #s == HOUR + 1 and tonumber(s[REQUESTS]) and tonumber(s[TOKENS]) and tonumber(s[AT]) and s or nil
end

-- Tokens taken at the reserve and not used go back; those used beyond are owed.
local function give_back(entry, used)
  if entry[RATED] < 0 then return end
  local names, write = {'t', 'k:' .. entry[KEY]}, {}
  for i, raw in ipairs(redis.pcall('HMGET', rates, unpack(names))) do
    local s = raw and remembered(raw)
    if s then
      s[TOKENS] = s[TOKENS] + entry[RATED] - used
      write[#write + 1], write[#write + 2] = names[i], cmsgpack.pack(s)
    end
  end
  if #write > 0 then redis.pcall('HSET', rates, unpack(write)) end
  entry[RATED] = 0
end
