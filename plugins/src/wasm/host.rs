//! What a module may ask of the gateway: the functions of the proxy-wasm ABI, 0.1.0 to 0.2.1, and the few of WASI that
//! compilers put in.
//!
//! A module sees its own memory and nothing else. Every pointer it gives is checked; what is not offered answers
//! "unimplemented".

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::var::{Var, Vars};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use layers::exchange::Exchange;
use wasmtime::{Caller, Extern, Linker, StoreLimits};

/// The largest text or map that a module hands over, in bytes.
const LARGEST: usize = 1 << 20;
/// A line of a module's log.
const LONGEST_LINE: usize = 4096;
/// HTTP calls of one callback.
const CALLS: usize = 16;

// Answers of the ABI.
const OK: i32 = 0;
const NOT_FOUND: i32 = 1;
const BAD_ARGUMENT: i32 = 2;
const INVALID_MEMORY: i32 = 6;
const INTERNAL: i32 = 10;
const UNIMPLEMENTED: i32 = 12;

/// What belongs to one instance of a module, between its callbacks and during one.
pub struct Host {
    pub limits: StoreLimits,
    /// For the log.
    pub plugin: Arc<str>,
    /// What callbacks look at.
    pub view: View,
    /// The configuration of the context that is being configured.
    pub configuration: Bytes,
    /// The piece of a body that a callback is about.
    pub body: Bytes,
    /// The answer that the module gives in place of the upstream.
    pub reply: Option<Reply>,
    /// Calls that the module wants made.
    pub calls: VecDeque<Call>,
    /// The answer to one of them, during its callback.
    pub answer: Option<Answer>,
    /// The module said that a paused request goes on.
    pub resumed: bool,
    /// The module wants to see the body of the request, of the answer.
    pub wants: Wants,
    tokens: u32,
}

/// What of bodies a module wants to see. It says so by the properties `wasm_process_req_body` and
/// `wasm_process_resp_body`, as in APISIX.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wants {
    pub request_body: bool,
    pub response_body: bool,
}

/// What a callback may see of a request.
pub enum View {
    Nothing,
    /// A request that goes on.
    Exchange(Exchange),
    /// One that is over.
    Ended {
        request: HeaderMap,
        response: HeaderMap,
        status: u16,
    },
}

/// An answer of the module.
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// An HTTP call that the module wants made.
pub struct Call {
    pub token: u32,
    pub upstream: String,
    pub headers: Vec<(Bytes, Bytes)>,
    pub body: Bytes,
    pub timeout: Duration,
}

/// What came of it.
pub struct Answer {
    pub headers: Vec<(Bytes, Bytes)>,
    pub body: Bytes,
}

impl Host {
    pub fn new(limits: StoreLimits, plugin: Arc<str>) -> Self {
        Self {
            limits,
            plugin,
            view: View::Nothing,
            configuration: Bytes::new(),
            body: Bytes::new(),
            reply: None,
            calls: VecDeque::new(),
            answer: None,
            resumed: false,
            wants: Wants::default(),
            tokens: 0,
        }
    }
}

/// Header maps of the ABI that are offered.
#[derive(Clone, Copy)]
enum Map {
    Request,
    Response,
    CallAnswer,
}

impl Map {
    fn of(number: i32) -> Result<Self, i32> {
        match number {
            0 => Ok(Self::Request),
            2 => Ok(Self::Response),
            6 => Ok(Self::CallAnswer),
            // Trailers are passed on and not shown.
            1 | 3 | 7 => Err(NOT_FOUND),
            _ => Err(BAD_ARGUMENT),
        }
    }
}

impl Host {
    fn pairs(&self, map: Map) -> Vec<(Bytes, Bytes)> {
        let fields = |headers: &HeaderMap| {
            let pair = |(name, value): (&HeaderName, &HeaderValue)| {
                (Bytes::copy_from_slice(name.as_str().as_bytes()), Bytes::copy_from_slice(value.as_bytes()))
            };
            headers.iter().map(pair).collect::<Vec<_>>()
        };
        match (map, &self.view) {
            (Map::CallAnswer, _) => {
                self.answer.as_ref().map_or_else(Vec::new, |answer| answer.headers.clone())
            }
            (Map::Request, View::Exchange(x)) => {
                let mut pairs = Vec::new();
                for name in [":method", ":scheme", ":authority", ":path"] {
                    pairs.extend(pseudo(x, name).map(|value| (Bytes::from_static(name.as_bytes()), value)));
                }
                pairs.extend(fields(&x.request.headers));
                pairs
            }
            (Map::Response, View::Exchange(x)) => {
                let status = Bytes::from(x.response.status().as_u16().to_string());
                let mut pairs = vec![(Bytes::from_static(b":status"), status)];
                pairs.extend(fields(x.response.headers()));
                pairs
            }
            (Map::Request, View::Ended { request, .. }) => fields(request),
            (Map::Response, View::Ended { response, status, .. }) => {
                let mut pairs = vec![(Bytes::from_static(b":status"), Bytes::from(status.to_string()))];
                pairs.extend(fields(response));
                pairs
            }
            (_, View::Nothing) => Vec::new(),
        }
    }

    fn value(&self, map: Map, name: &[u8]) -> Option<Bytes> {
        if let (Map::Request, View::Exchange(x)) = (map, &self.view)
            && !name.starts_with(b":")
        {
            let name = HeaderName::from_bytes(name).ok()?;
            return x.request.headers.get(name).map(|value| Bytes::copy_from_slice(value.as_bytes()));
        }
        self.pairs(map).into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// Sets, adds or removes a field. What cannot be one is refused.
    fn change(&mut self, map: Map, name: &[u8], value: Option<&[u8]>, add: bool) -> Result<(), i32> {
        let View::Exchange(x) = &mut self.view else { return Err(NOT_FOUND) };
        let text =
            |value: Option<&[u8]>| value.and_then(|value| std::str::from_utf8(value).ok().map(str::to_owned));
        let whole = || HeaderValue::from_bytes(value.unwrap_or_default()).map_err(|_| BAD_ARGUMENT);
        match (map, name) {
            (Map::Request, b":path") => {
                let target =
                    PathAndQuery::try_from(text(value).ok_or(BAD_ARGUMENT)?).map_err(|_| BAD_ARGUMENT)?;
                x.forward.uri = Some(target);
            }
            (Map::Request, b":method") => {
                x.forward.method =
                    Some(Method::from_bytes(value.unwrap_or_default()).map_err(|_| BAD_ARGUMENT)?);
            }
            (Map::Request, b":authority") => x.forward.host = Some(whole()?),
            (Map::Response, b":status") => {
                *x.response.status_mut() =
                    StatusCode::from_bytes(value.unwrap_or_default()).map_err(|_| BAD_ARGUMENT)?;
            }
            (Map::CallAnswer, _) => return Err(BAD_ARGUMENT),
            _ => {
                let name = HeaderName::from_bytes(name).map_err(|_| BAD_ARGUMENT)?;
                let headers = if matches!(map, Map::Request) {
                    &mut x.request.headers
                } else {
                    x.response.headers_mut()
                };
                match value {
                    None => {
                        headers.remove(name);
                    }
                    Some(_) if add => {
                        headers.try_append(name, whole()?).map_err(|_| INTERNAL)?;
                    }
                    Some(_) => {
                        headers.try_insert(name, whole()?).map_err(|_| INTERNAL)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn property(&self, path: &[u8]) -> Option<Bytes> {
        // Variables by their names; a path of several parts is one name with underscores.
        let name = std::str::from_utf8(path).ok()?.trim_end_matches('\0').replace('\0', "_");
        match (&self.view, name.as_str()) {
            (_, "plugin_root_id" | "plugin_name") => Some(Bytes::copy_from_slice(self.plugin.as_bytes())),
            (View::Exchange(x), _) => x.get(&Var::parse(&name)).map(|value| Bytes::from(value.into_owned())),
            (View::Ended { status, .. }, "status") => Some(Bytes::from(status.to_string())),
            _ => None,
        }
    }

    fn buffer(&self, kind: i32) -> Option<Bytes> {
        match kind {
            0 | 1 => Some(self.body.clone()),
            4 => self.answer.as_ref().map(|answer| answer.body.clone()),
            6 => Some(Bytes::new()),
            7 => Some(self.configuration.clone()),
            _ => None,
        }
    }
}

fn pseudo(x: &Exchange, name: &str) -> Option<Bytes> {
    let text = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    Some(match name {
        ":method" => text(x.forward.method.as_ref().unwrap_or(&x.request.method).as_str()),
        ":scheme" => text(x.conn.scheme()),
        ":authority" => match &x.forward.host {
            Some(host) => Bytes::copy_from_slice(host.as_bytes()),
            None => text(&x.host),
        },
        ":path" => match &x.forward.uri {
            Some(uri) => text(uri.as_str()),
            None => text(x.request_uri()),
        },
        _ => return None,
    })
}

/// The bytes at a place in the module's memory.
fn read(caller: &mut Caller<'_, Host>, pointer: i32, length: i32) -> Result<Bytes, i32> {
    let (start, length) = (pointer as u32 as usize, length as u32 as usize);
    if length > LARGEST {
        return Err(BAD_ARGUMENT);
    }
    let memory = caller.get_export("memory").and_then(Extern::into_memory).ok_or(INVALID_MEMORY)?;
    let bytes = memory.data(&caller).get(start..start.saturating_add(length)).ok_or(INVALID_MEMORY)?;
    Ok(Bytes::copy_from_slice(bytes))
}

fn write(caller: &mut Caller<'_, Host>, pointer: i32, bytes: &[u8]) -> Result<(), i32> {
    let memory = caller.get_export("memory").and_then(Extern::into_memory).ok_or(INVALID_MEMORY)?;
    memory.write(caller, pointer as u32 as usize, bytes).map_err(|_| INVALID_MEMORY)
}

fn write_number(caller: &mut Caller<'_, Host>, pointer: i32, number: u32) -> Result<(), i32> {
    write(caller, pointer, &number.to_le_bytes())
}

/// Copies `bytes` into memory that the module makes room in, and tells it where.
fn give(caller: &mut Caller<'_, Host>, bytes: &[u8], pointer_at: i32, length_at: i32) -> Result<(), i32> {
    let length = i32::try_from(bytes.len()).map_err(|_| INTERNAL)?;
    let mut place = 0;
    if length > 0 {
        let allocate = ["proxy_on_memory_allocate", "malloc"]
            .into_iter()
            .find_map(|name| caller.get_export(name).and_then(Extern::into_func))
            .ok_or(INTERNAL)?;
        let allocate = allocate.typed::<i32, i32>(&*caller).map_err(|_| INTERNAL)?;
        place = allocate.call(&mut *caller, length).map_err(|_| INTERNAL)?;
        if place == 0 {
            return Err(INTERNAL);
        }
        write(caller, place, bytes)?;
    }
    write_number(caller, pointer_at, place as u32)?;
    write_number(caller, length_at, length as u32)
}

/// Pairs in the form of the ABI: their number, the lengths of all, and all texts, each with a zero behind it.
fn encode(pairs: &[(Bytes, Bytes)]) -> Vec<u8> {
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
    let mut out = Vec::with_capacity(4 + pairs.iter().map(|(k, v)| k.len() + v.len() + 10).sum::<usize>());
    out.extend(number(pairs.len()));
    for (key, value) in pairs {
        out.extend(number(key.len()));
        out.extend(number(value.len()));
    }
    for (key, value) in pairs {
        out.extend_from_slice(key);
        out.push(0);
        out.extend_from_slice(value);
        out.push(0);
    }
    out
}

/// What [`encode`] makes, read again.
fn decode(bytes: &Bytes) -> Result<Vec<(Bytes, Bytes)>, i32> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let number = |at: usize| -> Result<usize, i32> {
        let end = at.checked_add(4).ok_or(BAD_ARGUMENT)?;
        let four: [u8; 4] = bytes.get(at..end).and_then(|four| four.try_into().ok()).ok_or(BAD_ARGUMENT)?;
        Ok(u32::from_le_bytes(four) as usize)
    };
    let count = number(0)?;
    // Each pair takes ten bytes at least.
    if count > bytes.len() / 10 + 1 {
        return Err(BAD_ARGUMENT);
    }
    let mut place = 4 + 8 * count;
    let mut text = |length: usize| -> Result<Bytes, i32> {
        let end = place.checked_add(length).filter(|end| *end < bytes.len()).ok_or(BAD_ARGUMENT)?;
        let text = bytes.slice(place..end);
        place = end + 1;
        Ok(text)
    };
    let mut pairs = Vec::with_capacity(count);
    for index in 0..count {
        let (key, value) = (number(4 + 8 * index)?, number(8 + 8 * index)?);
        pairs.push((text(key)?, text(value)?));
    }
    Ok(pairs)
}

/// Pairs as header fields; those that cannot be fields, and pseudo-fields, are left out.
pub fn fields(pairs: &[(Bytes, Bytes)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            // A map is full at 32,768 fields, which are more than a module can hand over.
            let _ = headers.try_append(name, value);
        }
    }
    headers
}

fn code(result: Result<(), i32>) -> i32 {
    result.err().unwrap_or(OK)
}

/// As [`code`], of what is done in steps.
fn outcome(steps: impl FnOnce() -> Result<(), i32>) -> i32 {
    code(steps())
}

fn tell(host: &Host, level: i32, line: &str) {
    let line: String = line.chars().take(LONGEST_LINE).collect();
    let plugin = &*host.plugin;
    match level {
        0 => tracing::trace!(target: "postern::wasm", plugin, "{line}"),
        1 => tracing::debug!(target: "postern::wasm", plugin, "{line}"),
        2 => tracing::info!(target: "postern::wasm", plugin, "{line}"),
        3 => tracing::warn!(target: "postern::wasm", plugin, "{line}"),
        _ => tracing::error!(target: "postern::wasm", plugin, "{line}"),
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Offers everything to modules.
///
/// # Errors
/// A name is offered twice; a defect.
pub fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    link_maps(linker)?;
    link_bodies(linker)?;
    link_requests(linker)?;
    link_rest(linker)?;
    link_wasi(linker)
}

type Asking<'a> = Caller<'a, Host>;

fn link_maps(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_get_header_map_pairs",
        |mut c: Asking<'_>, map: i32, data: i32, size: i32| {
            let pairs = Map::of(map).map(|map| encode(&c.data().pairs(map)));
            code(pairs.and_then(|pairs| give(&mut c, &pairs, data, size)))
        },
    )?;
    linker.func_wrap("env", "proxy_get_header_map_size", |mut c: Asking<'_>, map: i32, size: i32| {
        let pairs = Map::of(map).map(|map| encode(&c.data().pairs(map)).len() as u32);
        code(pairs.and_then(|length| write_number(&mut c, size, length)))
    })?;
    linker.func_wrap(
        "env",
        "proxy_set_header_map_pairs",
        |mut c: Asking<'_>, map: i32, data: i32, size: i32| {
            let set = || {
                let map = Map::of(map)?;
                let pairs = decode(&read(&mut c, data, size)?)?;
                let host = c.data_mut();
                if let View::Exchange(x) = &mut host.view {
                    match map {
                        Map::Request => x.request.headers.clear(),
                        Map::Response => x.response.headers_mut().clear(),
                        Map::CallAnswer => return Err(BAD_ARGUMENT),
                    }
                }
                pairs.iter().try_for_each(|(name, value)| host.change(map, name, Some(value), true))
            };
            outcome(set)
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_get_header_map_value",
        |mut c: Asking<'_>, map: i32, name: i32, length: i32, data: i32, size: i32| {
            let get = || {
                let map = Map::of(map)?;
                let name = read(&mut c, name, length)?;
                let value = c.data().value(map, &name).ok_or(NOT_FOUND)?;
                give(&mut c, &value, data, size)
            };
            outcome(get)
        },
    )?;
    for (function, add) in [("proxy_add_header_map_value", true), ("proxy_replace_header_map_value", false)] {
        linker.func_wrap(
            "env",
            function,
            move |mut c: Asking<'_>, map: i32, name: i32, name_length: i32, value: i32, value_length: i32| {
                let set = || {
                    let map = Map::of(map)?;
                    let (name, value) =
                        (read(&mut c, name, name_length)?, read(&mut c, value, value_length)?);
                    c.data_mut().change(map, &name, Some(&value), add)
                };
                outcome(set)
            },
        )?;
    }
    linker.func_wrap(
        "env",
        "proxy_remove_header_map_value",
        |mut c: Asking<'_>, map: i32, name: i32, length: i32| {
            let remove = || {
                let map = Map::of(map)?;
                let name = read(&mut c, name, length)?;
                c.data_mut().change(map, &name, None, false)
            };
            outcome(remove)
        },
    )?;
    Ok(())
}

fn link_bodies(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_get_buffer_bytes",
        |mut c: Asking<'_>, kind: i32, start: i32, length: i32, data: i32, size: i32| {
            let get = || {
                let buffer = c.data().buffer(kind).ok_or(NOT_FOUND)?;
                let start = (start as u32 as usize).min(buffer.len());
                let end = start.saturating_add(length as u32 as usize).min(buffer.len());
                if start == end {
                    return Err(NOT_FOUND);
                }
                give(&mut c, &buffer.slice(start..end), data, size)
            };
            outcome(get)
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_get_buffer_status",
        |mut c: Asking<'_>, kind: i32, length: i32, flags: i32| {
            let status = || {
                let buffer = c.data().buffer(kind).ok_or(NOT_FOUND)?;
                write_number(&mut c, length, u32::try_from(buffer.len()).unwrap_or(u32::MAX))?;
                write_number(&mut c, flags, 0)
            };
            outcome(status)
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_buffer_bytes",
        |mut c: Asking<'_>, kind: i32, start: i32, length: i32, data: i32, size: i32| {
            let set = || {
                if !matches!(kind, 0 | 1) {
                    return Err(BAD_ARGUMENT);
                }
                let new = read(&mut c, data, size)?;
                let old = &c.data().body;
                let start = (start as u32 as usize).min(old.len());
                let end = start.saturating_add(length as u32 as usize).min(old.len());
                let (before, after) = (old.slice(..start), old.slice(end..));
                c.data_mut().body = [before, new, after].concat().into();
                Ok(())
            };
            outcome(set)
        },
    )?;
    Ok(())
}

fn link_requests(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_send_local_response",
        |mut c: Asking<'_>,
         status: i32,
         _details: i32,
         _details_length: i32,
         body: i32,
         body_length: i32,
         headers: i32,
         headers_length: i32,
         _grpc: i32| {
            let send = || {
                let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
                let body = read(&mut c, body, body_length)?;
                let headers = fields(&decode(&read(&mut c, headers, headers_length)?)?);
                c.data_mut().reply = Some(Reply { status: status.ok_or(BAD_ARGUMENT)?, headers, body });
                Ok(())
            };
            outcome(send)
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_http_call",
        |mut c: Asking<'_>,
         upstream: i32,
         upstream_length: i32,
         headers: i32,
         headers_length: i32,
         body: i32,
         body_length: i32,
         _trailers: i32,
         _trailers_length: i32,
         timeout: i32,
         token_at: i32| {
            let call = || {
                let upstream = read(&mut c, upstream, upstream_length)?;
                let upstream = String::from_utf8(upstream.into()).map_err(|_| BAD_ARGUMENT)?;
                let headers = decode(&read(&mut c, headers, headers_length)?)?;
                let body = read(&mut c, body, body_length)?;
                let host = c.data_mut();
                if host.calls.len() >= CALLS {
                    return Err(INTERNAL);
                }
                host.tokens = host.tokens.wrapping_add(1);
                let token = host.tokens;
                let timeout = Duration::from_millis(u64::from((timeout as u32).clamp(1, 60_000)));
                host.calls.push_back(Call { token, upstream, headers, body, timeout });
                write_number(&mut c, token_at, token)
            };
            outcome(call)
        },
    )?;
    linker.func_wrap("env", "proxy_continue_stream", |mut c: Asking<'_>, _stream: i32| {
        c.data_mut().resumed = true;
        OK
    })?;
    linker.func_wrap("env", "proxy_continue_request", |mut c: Asking<'_>| {
        c.data_mut().resumed = true;
        OK
    })?;
    linker.func_wrap("env", "proxy_continue_response", |_: Asking<'_>| OK)?;
    linker.func_wrap("env", "proxy_close_stream", |_: Asking<'_>, _stream: i32| UNIMPLEMENTED)?;
    Ok(())
}

fn link_rest(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_log",
        |mut c: Asking<'_>, level: i32, data: i32, length: i32| match read(&mut c, data, length) {
            Ok(line) => {
                tell(c.data(), level, &String::from_utf8_lossy(&line));
                OK
            }
            Err(error) => error,
        },
    )?;
    linker.func_wrap("env", "proxy_get_log_level", |mut c: Asking<'_>, at: i32| {
        code(write_number(&mut c, at, 1))
    })?;
    linker.func_wrap(
        "env",
        "proxy_get_property",
        |mut c: Asking<'_>, path: i32, length: i32, data: i32, size: i32| {
            let get = || {
                let path = read(&mut c, path, length)?;
                let value = c.data().property(&path).ok_or(NOT_FOUND)?;
                give(&mut c, &value, data, size)
            };
            outcome(get)
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_property",
        |mut c: Asking<'_>, path: i32, path_length: i32, value: i32, value_length: i32| {
            let set = || {
                let (path, value) = (read(&mut c, path, path_length)?, read(&mut c, value, value_length)?);
                let wanted = &*value == b"true";
                match path.strip_suffix(b"\0").unwrap_or(&path) {
                    b"wasm_process_req_body" => c.data_mut().wants.request_body = wanted,
                    b"wasm_process_resp_body" => c.data_mut().wants.response_body = wanted,
                    _ => return Err(UNIMPLEMENTED),
                }
                Ok(())
            };
            outcome(set)
        },
    )?;
    linker.func_wrap("env", "proxy_get_current_time_nanoseconds", |mut c: Asking<'_>, at: i32| {
        code(write(&mut c, at, &now().to_le_bytes()))
    })?;
    linker.func_wrap("env", "proxy_get_configuration", |mut c: Asking<'_>, data: i32, size: i32| {
        let configuration = c.data().configuration.clone();
        code(give(&mut c, &configuration, data, size))
    })?;
    // The context that callbacks are about is known anyway.
    linker.func_wrap("env", "proxy_set_effective_context", |_: Asking<'_>, _context: i32| OK)?;
    linker.func_wrap("env", "proxy_done", |_: Asking<'_>| OK)?;
    linker.func_wrap("env", "proxy_set_tick_period_milliseconds", |_: Asking<'_>, _period: i32| {
        UNIMPLEMENTED
    })?;
    linker.func_wrap(
        "env",
        "proxy_get_shared_data",
        |_: Asking<'_>, _: i32, _: i32, _: i32, _: i32, _: i32| NOT_FOUND,
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_shared_data",
        |_: Asking<'_>, _: i32, _: i32, _: i32, _: i32, _: i32| UNIMPLEMENTED,
    )?;
    linker.func_wrap("env", "proxy_define_metric", |_: Asking<'_>, _: i32, _: i32, _: i32, _: i32| {
        UNIMPLEMENTED
    })?;
    linker.func_wrap("env", "proxy_increment_metric", |_: Asking<'_>, _: i32, _: i64| UNIMPLEMENTED)?;
    linker.func_wrap("env", "proxy_record_metric", |_: Asking<'_>, _: i32, _: i64| UNIMPLEMENTED)?;
    linker.func_wrap("env", "proxy_get_metric", |_: Asking<'_>, _: i32, _: i32| UNIMPLEMENTED)?;
    Ok(())
}

const WASI: &str = "wasi_snapshot_preview1";
/// "Bad file descriptor" of WASI: there are no files.
const BADF: i32 = 8;
const FAULT: i32 = 21;

fn link_wasi(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    linker.func_wrap(
        WASI,
        "fd_write",
        |mut c: Asking<'_>, file: i32, vectors: i32, count: i32, written: i32| {
            let mut take = || {
                if !matches!(file, 1 | 2) {
                    return Err(BADF);
                }
                let mut line = Vec::new();
                for index in 0..count.clamp(0, 64) {
                    let vector =
                        read(&mut c, vectors.wrapping_add(index.wrapping_mul(8)), 8).map_err(|_| FAULT)?;
                    let number = |from: usize| {
                        let four = vector.get(from..from + 4).and_then(|four| four.try_into().ok());
                        four.map_or(0, i32::from_le_bytes)
                    };
                    line.extend_from_slice(&read(&mut c, number(0), number(4)).map_err(|_| FAULT)?);
                }
                let length = u32::try_from(line.len()).unwrap_or(u32::MAX);
                let text = String::from_utf8_lossy(&line);
                if !text.trim().is_empty() {
                    tell(c.data(), if file == 2 { 3 } else { 2 }, text.trim_end());
                }
                write_number(&mut c, written, length).map_err(|_| FAULT)
            };
            code(take())
        },
    )?;
    for sizes in ["environ_sizes_get", "args_sizes_get"] {
        linker.func_wrap(WASI, sizes, |mut c: Asking<'_>, count: i32, size: i32| {
            code(
                write_number(&mut c, count, 0)
                    .and_then(|()| write_number(&mut c, size, 0))
                    .map_err(|_| FAULT),
            )
        })?;
    }
    for list in ["environ_get", "args_get"] {
        linker.func_wrap(WASI, list, |_: Asking<'_>, _: i32, _: i32| OK)?;
    }
    linker.func_wrap(
        WASI,
        "clock_time_get",
        |mut c: Asking<'_>, _clock: i32, _precision: i64, at: i32| {
            code(write(&mut c, at, &now().to_le_bytes()).map_err(|_| FAULT))
        },
    )?;
    linker.func_wrap(WASI, "random_get", |mut c: Asking<'_>, at: i32, length: i32| {
        let mut random = vec![0; (length as u32 as usize).min(LARGEST)];
        // The system's generator: modules make keys of it.
        if aws_lc_rs::rand::fill(&mut random).is_err() {
            return FAULT;
        }
        code(write(&mut c, at, &random).map_err(|_| FAULT))
    })?;
    linker.func_wrap(WASI, "sched_yield", |_: Asking<'_>| OK)?;
    linker.func_wrap(WASI, "proc_exit", |_: Asking<'_>, status: i32| -> wasmtime::Result<()> {
        Err(wasmtime::Error::msg(format!("the module ended itself with {status}")))
    })?;
    linker.func_wrap(WASI, "fd_close", |_: Asking<'_>, _: i32| BADF)?;
    linker.func_wrap(WASI, "fd_prestat_get", |_: Asking<'_>, _: i32, _: i32| BADF)?;
    linker.func_wrap(WASI, "fd_prestat_dir_name", |_: Asking<'_>, _: i32, _: i32, _: i32| BADF)?;
    linker.func_wrap(WASI, "fd_fdstat_get", |_: Asking<'_>, _: i32, _: i32| BADF)?;
    linker.func_wrap(WASI, "fd_seek", |_: Asking<'_>, _: i32, _: i64, _: i32, _: i32| BADF)?;
    linker.func_wrap(WASI, "fd_read", |_: Asking<'_>, _: i32, _: i32, _: i32, _: i32| BADF)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(key: &'static str, value: &'static str) -> (Bytes, Bytes) {
        (Bytes::from(key), Bytes::from(value))
    }

    #[test]
    fn pairs_are_written_and_read() {
        let pairs = vec![pair("a", "1"), pair("", ""), pair("long", "value with spaces")];
        assert_eq!(decode(&encode(&pairs).into()).unwrap(), pairs);
        assert_eq!(decode(&Bytes::new()).unwrap(), Vec::new());
    }

    #[test]
    fn pairs_that_lie_about_their_lengths_are_refused() {
        let good = encode(&[pair("a", "1")]);
        for index in 0..12 {
            let mut bad = good.clone();
            bad[index] = 0xff;
            assert!(decode(&bad.into()).is_err(), "{index}");
        }
        for length in 1..good.len() {
            assert!(decode(&good[..length].to_vec().into()).is_err(), "{length}");
        }
    }
}
