//! Counts in Redis: one script reads the time, counts and sets the expiry, so that gateways agree whatever their clocks
//! say, and none can leave a count behind that never ends.

use std::sync::LazyLock;
use std::time::Duration;

use layers::limits::window::{Limit, Verdict, WindowKind};
use tokio::time::Instant;

use crate::support::redis::{Failure, Redis, Script};

/// KEYS: the count. ARGV: the limit, the time in milliseconds, how many to count, 1 to count them above the limit too.
/// Answers whether they were counted, how many are left, and in how many milliseconds there is room again.
static FIXED: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local limit, window, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local ttl = redis.call('PTTL', KEYS[1])
local count = 0
if ttl > 0 then
    count = tonumber(redis.call('GET', KEYS[1])) or 0
end
if ARGV[4] ~= '1' and count + cost > limit then
    return {0, math.max(limit - count, 0), ttl > 0 and ttl or window}
end
if ttl > 0 then
    redis.call('INCRBY', KEYS[1], ARGV[3])
else
    ttl = window
    redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
end
return {1, math.max(limit - count - cost, 0), ttl}
",
    )
});

/// As `FIXED`, for windows that follow each other: the number of the window, its count and that of the one before.
static SLIDING: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local limit, window, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local number = math.floor(now / window)
local left = window - now % window
local known = redis.call('HMGET', KEYS[1], 'window', 'count', 'before')
local count, before = 0, 0
if tonumber(known[1]) == number then
    count, before = tonumber(known[2]) or 0, tonumber(known[3]) or 0
elseif tonumber(known[1]) == number - 1 then
    before = math.min(tonumber(known[2]) or 0, limit)
end
local weighed = before * left / window + count
if ARGV[4] ~= '1' and (count >= limit or weighed >= limit) then
    local reset = left
    if count < limit and before > 0 then
        reset = math.max(left - (limit - count) * window / before, 0)
    end
    return {0, 0, math.ceil(reset)}
end
redis.call('HSET', KEYS[1], 'window', string.format('%.0f', number), 'count', count + cost, 'before', before)
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', window + left))
return {1, math.max(math.floor(limit - weighed - cost), 0), left}
",
    )
});

/// Asks whether one more is within `limit`, and counts it if so.
pub(super) async fn take(
    redis: &Redis,
    key: &str,
    limit: Limit,
    cost: u64,
    deadline: Instant,
) -> Result<Verdict, Failure> {
    ask(redis, key, limit, [cost, 0], deadline).await
}

/// Counts what was let through already.
pub(super) async fn add(
    redis: &Redis,
    key: &str,
    limit: Limit,
    cost: u64,
    deadline: Instant,
) -> Result<Verdict, Failure> {
    ask(redis, key, limit, [cost, 1], deadline).await
}

async fn ask(
    redis: &Redis,
    key: &str,
    limit: Limit,
    [cost, force]: [u64; 2],
    deadline: Instant,
) -> Result<Verdict, Failure> {
    // What Redis takes for an expiry.
    const LONGEST: u64 = 1 << 52;
    let window = u64::try_from(limit.window.as_millis()).unwrap_or(LONGEST).clamp(1, LONGEST);
    let script = match limit.kind {
        WindowKind::Fixed => &*FIXED,
        WindowKind::Sliding => &*SLIDING,
    };
    let arguments = [limit.count, window, cost, force];
    let (allowed, remaining, reset): (u8, u64, u64) = redis.run(script, &[key], &arguments, deadline).await?;
    Ok(Verdict { allowed: allowed == 1, remaining, reset: Duration::from_millis(reset) })
}
