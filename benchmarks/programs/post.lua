-- Posts one of the bodies below: wrk -s post.lua URL -- KIND

local function item(number)
  return string.format('{"id":%d,"name":"item %d","score":%.3f,"tags":["red","green","blue"]}', number, number, number / 7)
end

local function items(bytes)
  local list, length, number = {}, 0, 0
  while length < bytes do
    number = number + 1
    list[number] = item(number)
    length = length + #list[number] + 1
  end
  return '{"items":[' .. table.concat(list, ",") .. "]}"
end

local MB = 1000000
local BODIES = {
  empty = function() return "application/json", "{}" end,
  job = function() return "application/json", "{}", "respond-async" end,
  json = function() return "application/json", items(10000) end,
  octets = function() return "application/octet-stream", string.rep("x", MB) end,
  text = function() return "application/json", '{"data":"' .. string.rep("x", MB) .. '"}' end,
}

function init(arguments)
  local kind, body, prefer = BODIES[arguments[1]]()
  request_of_all = wrk.format("POST", nil, { ["Content-Type"] = kind, ["Prefer"] = prefer }, body)
end

function request()
  return request_of_all
end
