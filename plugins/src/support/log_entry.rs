//! What loggers tell of a request: APISIX's default entry, or the fields of a `log_format`, with bodies where asked.
//!
//! Bodies are copied while they pass, up to a limit, and delay nothing. The entry is put together in the `log` phase
//! and written as JSON by the control runtime. A plugin that hides parts of requests puts a [`Mask`] into the exchange;
//! entries see the request through it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::error::{ConfigError, escape};
use config::expr::Expr;
use config::template::{Piece, Template};
use config::var::{Var, Vars};
use http::{HeaderMap, Uri, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use layers::body::{Body, BodyError, BodyFilter};
use layers::exchange::{Exchange, State};
use layers::plugin::{Access, BuildEnv, Flow, Hooks, OnBody, OnLog};
use layers::telemetry::metrics::Metrics;
use layers::vars::{BufferedBody, argument, cookie, hostname};
use percent_encoding::percent_decode_str;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use smallvec::SmallVec;

use super::batch::Batch;

/// The fields of an entry.
pub type Fields = Map<String, Value>;

/// Levels of a `log_format`; what is nested deeper is left out.
const LEVELS: usize = 5;
/// Members of a query that are told apart.
const ARGUMENTS: usize = 100;

/// `log_format`: names and values. A text that begins with `$` is a variable or holds some; an object is nested.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LogFormat(Map<String, Value>);

impl JsonSchema for LogFormat {
    fn schema_name() -> Cow<'static, str> {
        "LogFormat".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object"})
    }
}

/// A value of a compiled format.
#[derive(Debug)]
enum Field {
    Literal(Value),
    Var(Var),
    Text(Template),
    Object(Format),
}

/// A compiled `log_format`.
#[derive(Debug, Default)]
struct Format(Vec<(String, Field)>);

impl Format {
    fn new(format: &Map<String, Value>, levels: usize) -> Self {
        let field = |value: &Value| match value {
            Value::String(text) if text.starts_with('$') => {
                let template = Template::parse(text);
                match template.pieces() {
                    [Piece::Var(var, None)] => Some(Field::Var(var.clone())),
                    _ => Some(Field::Text(template)),
                }
            }
            Value::Object(nested) if levels > 1 => Some(Field::Object(Self::new(nested, levels - 1))),
            Value::Object(_) => None,
            literal => Some(Field::Literal(literal.clone())),
        };
        Self(format.iter().filter_map(|(name, value)| Some((name.clone(), field(value)?))).collect())
    }

    fn vars(&self) -> Vec<&Var> {
        self.0
            .iter()
            .flat_map(|(_, field)| match field {
                Field::Literal(_) => Vec::new(),
                Field::Var(var) => vec![var],
                Field::Text(template) => template.vars().collect(),
                Field::Object(nested) => nested.vars(),
            })
            .collect()
    }

    /// Variables without a value are left out.
    fn fields<V: Vars>(&self, vars: &V) -> Fields {
        let value = |field: &Field| match field {
            Field::Literal(value) => Some(value.clone()),
            Field::Var(var) => vars
                .value(var)
                .filter(|_| var.is_typed())
                .or_else(|| vars.get(var).map(|text| Value::String(text.into_owned()))),
            Field::Text(template) => Some(Value::String(template.to_text(vars).into_owned())),
            Field::Object(nested) => Some(Value::Object(nested.fields(vars))),
        };
        self.0.iter().filter_map(|(name, field)| Some((name.clone(), value(field)?))).collect()
    }
}

/// Parts of a request as loggers may see them.
#[derive(Debug, Default)]
pub struct Masked {
    /// Path and query in place of those that the client wrote.
    pub request_uri: Option<Uri>,
    /// The header fields in place of the request's.
    pub headers: Option<HeaderMap>,
    /// The body in place of the request's.
    pub body: Option<Bytes>,
}

/// Hides parts of a request from loggers.
pub trait Mask {
    /// Changes what is shown in place of the request `x`. `shown` holds what earlier masks have made of it, and what was
    /// kept of the body, if anything was; nothing stands for what the request itself says.
    fn mask(&self, x: &State, shown: &mut Masked);
}

/// A slot of the exchange: the masks that entries see the request through, each after the one before.
#[derive(Default)]
pub struct Masks(pub SmallVec<[Rc<dyn Mask>; 1]>);

/// A request and its answer as an entry sees them.
pub struct View<'a> {
    x: &'a State,
    masked: Masked,
    request_body: Option<BufferedBody>,
    response_body: Option<Bytes>,
}

impl View<'_> {
    /// The exchange behind it. What it says of the request is not masked.
    pub fn exchange(&self) -> &State {
        self.x
    }

    /// The header fields of the request.
    pub fn headers(&self) -> &HeaderMap {
        self.masked.headers.as_ref().unwrap_or(&self.x.request.headers)
    }

    /// The body of the request, as far as it was kept.
    pub fn request_body(&self) -> Option<&Bytes> {
        self.request_body.as_ref().map(|body| &body.bytes)
    }

    /// When the request began.
    pub fn started(&self) -> SystemTime {
        SystemTime::now().checked_sub(self.x.started.elapsed()).unwrap_or(UNIX_EPOCH)
    }

    fn request_uri(&self) -> &str {
        match &self.masked.request_uri {
            Some(uri) => uri.path_and_query().map_or("/", |target| target.as_str()),
            None => self.x.request_uri(),
        }
    }

    fn query(&self) -> Option<&str> {
        match &self.masked.request_uri {
            Some(uri) => uri.query(),
            None => self.x.request.uri.query(),
        }
    }

    fn host(&self) -> &str {
        &self.x.host
    }
}

impl Vars for View<'_> {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        let text = |bytes: &'a Bytes| String::from_utf8_lossy(bytes);
        match var {
            Var::RespBody => self.response_body.as_ref().map(text),
            Var::RequestBody => self.request_body.as_ref().map(|body| text(&body.bytes)),
            Var::PostArg(name) => {
                let body = std::str::from_utf8(&self.request_body.as_ref()?.bytes).ok()?;
                argument(body, name)
            }
            Var::PostArgPath(_) => match self.value(var)? {
                Value::String(text) => Some(Cow::Owned(text)),
                Value::Null => None,
                other => Some(Cow::Owned(other.to_string())),
            },
            Var::RequestUri => Some(Cow::Borrowed(self.request_uri())),
            Var::Args => Some(Cow::Borrowed(self.query().unwrap_or_default())),
            Var::Arg(name) => argument(self.query()?, name),
            Var::Request if self.masked.request_uri.is_some() => {
                let line = self.x.get(&Var::Request)?;
                let (method, version) = (line.split(' ').next()?, line.rsplit(' ').next()?);
                Some(Cow::Owned(format!("{method} {} {version}", self.request_uri())))
            }
            Var::UpstreamUri if self.masked.request_uri.is_some() => {
                let uri = self.x.get(var)?;
                let path = uri.split('?').next().unwrap_or_default();
                Some(Cow::Owned(match self.query() {
                    Some(query) => format!("{path}?{query}"),
                    None => path.to_owned(),
                }))
            }
            Var::Http(name) if self.masked.headers.is_some() && *name != header::HOST => {
                self.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()))
            }
            Var::Cookie(name) if self.masked.headers.is_some() => {
                cookie(self.headers(), name).map(Cow::Borrowed)
            }
            other => self.x.get(other),
        }
    }

    fn value(&self, var: &Var) -> Option<Value> {
        let Var::PostArgPath(path) = var else { return self.x.value(var) };
        let body = self.request_body.as_ref()?;
        match &body.json {
            Some(json) => layers::vars::json_path(json, path),
            None => argument(std::str::from_utf8(&body.bytes).ok()?, path)
                .map(|text| Value::String(text.into_owned())),
        }
    }
}

/// Whether and how much of a body is told.
#[derive(Debug)]
struct BodyRule {
    only: Option<Expr>,
    limit: usize,
}

impl BodyRule {
    fn new(
        expr: Option<&Vec<Value>>,
        limit: std::num::NonZeroU32,
        pointer: &str,
    ) -> Result<Self, ConfigError> {
        let only = expr.map(|expr| Expr::parse(&Value::Array(expr.clone()))).transpose();
        Ok(Self { only: only.map_err(|error| error.under(pointer))?, limit: limit.get() as usize })
    }

    /// Whether the expression can be judged before there is an answer.
    fn is_of_request(&self) -> bool {
        self.only.as_ref().is_none_or(|only| !only.vars().iter().any(|var| var.is_of_response()))
    }

    fn holds<V: Vars>(&self, vars: &V) -> bool {
        self.only.as_ref().is_none_or(|only| only.eval(vars))
    }
}

/// What a logger's settings say about entries. Made by [`logger_settings`](super::log_settings::logger_settings).
#[derive(Clone, Copy, Debug)]
pub struct EntrySettings<'a> {
    pub(crate) log_format: Option<&'a LogFormat>,
    pub(crate) log_format_extra: Option<&'a LogFormat>,
    pub(crate) include_req_body: bool,
    pub(crate) include_req_body_expr: Option<&'a Vec<Value>>,
    pub(crate) max_req_body_bytes: std::num::NonZeroU32,
    pub(crate) include_resp_body: bool,
    pub(crate) include_resp_body_expr: Option<&'a Vec<Value>>,
    pub(crate) max_resp_body_bytes: std::num::NonZeroU32,
}

impl EntrySettings<'_> {
    /// What the types cannot say.
    pub fn check(&self) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        for (name, format) in [("log_format", self.log_format), ("log_format_extra", self.log_format_extra)] {
            errors.extend(format.iter().flat_map(|format| nameless(&format.0, &format!("/{name}"))));
        }
        let exprs = [
            ("/include_req_body_expr", self.include_req_body_expr),
            ("/include_resp_body_expr", self.include_resp_body_expr),
        ];
        for (pointer, expr) in exprs {
            errors.extend(expr.and_then(|expr| check_expr(expr, pointer)));
        }
        errors
    }
}

/// An expression that cannot work, by its pointer.
pub(crate) fn check_expr(expr: &[Value], pointer: &str) -> Option<ConfigError> {
    if expr.is_empty() {
        return Some(ConfigError::invalid(pointer, "write at least one condition"));
    }
    Expr::parse(&Value::Array(expr.to_vec())).err().map(|error| error.under(pointer))
}

/// Members whose values are a lone `$`.
fn nameless(format: &Map<String, Value>, pointer: &str) -> Vec<ConfigError> {
    let wrong = |(name, value): (&String, &Value)| {
        let here = format!("{pointer}/{}", escape(name));
        match value {
            Value::String(text) if text == "$" => {
                vec![ConfigError::invalid(here, "name a variable behind `$`")]
            }
            Value::Object(nested) => nameless(nested, &here),
            _ => Vec::new(),
        }
    };
    format.iter().flat_map(wrong).collect()
}

/// Makes the entries of one logger.
#[derive(Debug)]
pub struct Recorder {
    format: Option<Format>,
    extra: Format,
    request_body: Option<BodyRule>,
    response_body: Option<BodyRule>,
    /// The format asks for the body of the request by a variable.
    body_by_name: bool,
    reads_head: bool,
    /// Requests for which this is false have no entry.
    pub(crate) only: Option<Expr>,
    metrics: Arc<Metrics>,
}

impl Recorder {
    /// Compiles the settings. `metadata` has the formats of the whole gateway, which those of the plugin replace.
    ///
    /// # Errors
    /// An expression is none.
    pub fn new(
        settings: EntrySettings<'_>,
        metadata: MetadataFormats<'_>,
        env: &BuildEnv<'_>,
    ) -> Result<Self, ConfigError> {
        let global = metadata.log_format.filter(|format| !format.0.is_empty());
        let format = settings.log_format.or(global).map(|format| Format::new(&format.0, LEVELS));
        let extra = settings.log_format_extra.or(metadata.log_format_extra);
        let extra = extra.map(|format| Format::new(&format.0, LEVELS)).unwrap_or_default();
        let named = || format.iter().chain([&extra]).flat_map(Format::vars);
        let body_by_name = named().any(Var::needs_body);
        let reads_head =
            format.is_none() || named().any(|var| matches!(var, Var::SentHttp(_) | Var::UpstreamHttp(_)));
        let EntrySettings { include_req_body_expr, max_req_body_bytes, .. } = settings;
        let request_body = (settings.include_req_body || body_by_name)
            .then(|| {
                let expr = include_req_body_expr.filter(|_| settings.include_req_body);
                BodyRule::new(expr, max_req_body_bytes, "/include_req_body_expr")
            })
            .transpose()?;
        let EntrySettings { include_resp_body_expr, max_resp_body_bytes, .. } = settings;
        let response_body = settings
            .include_resp_body
            .then(|| BodyRule::new(include_resp_body_expr, max_resp_body_bytes, "/include_resp_body_expr"))
            .transpose()?;
        Ok(Self {
            format,
            extra,
            request_body,
            response_body,
            body_by_name,
            reads_head,
            only: None,
            metrics: env.metrics.clone(),
        })
    }

    fn kept(&self, limit: usize) -> Rc<RefCell<Kept>> {
        Rc::new(RefCell::new(Kept { bytes: Vec::new(), limit, metrics: self.metrics.clone() }))
    }

    /// Copies the request body while it is forwarded.
    fn keep_request(&self, owner: usize, x: &mut Exchange) {
        let Some(rule) = &self.request_body else { return };
        if rule.is_of_request() && !rule.holds(&**x) {
            return;
        }
        let kept = self.kept(rule.limit);
        let body = match std::mem::take(&mut x.request_body) {
            Body::Empty => return,
            Body::Full(bytes) => {
                kept.borrow_mut().add(&bytes);
                Body::Full(bytes)
            }
            body => Body::Boxed(Box::pin(Watched { body, kept: kept.clone() })),
        };
        x.request_body = body;
        if let Some(copies) = x.slot_mut::<Copies>() {
            copies.0.push((owner, Side::Request, kept));
        }
    }

    /// A filter that copies the body of the answer while it is sent.
    fn keep_response(&self, owner: usize, x: &mut Exchange) -> Option<Box<dyn BodyFilter>> {
        let rule = self.response_body.as_ref()?;
        if x.response.body().is_empty() || x.response.status().is_informational() || !rule.holds(&**x) {
            return None;
        }
        let kept = self.kept(rule.limit);
        x.slot_mut::<Copies>()?.0.push((owner, Side::Response, kept.clone()));
        Some(Box::new(Copy(kept)))
    }

    /// The request as entries of this logger see it.
    pub(crate) fn view<'a>(&self, owner: usize, x: &'a Exchange) -> View<'a> {
        let copy = |side| {
            let (_, _, kept) =
                x.slot::<Copies>()?.0.iter().find(|(other, of, _)| (*other, *of) == (owner, side))?;
            let bytes = Bytes::copy_from_slice(&kept.borrow().bytes);
            (!bytes.is_empty()).then_some(bytes)
        };
        let mut masked = Masked { body: copy(Side::Request), ..Masked::default() };
        for mask in x.slot::<Masks>().iter().flat_map(|masks| &masks.0) {
            mask.mask(x, &mut masked);
        }
        let kind = x.request.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        // Parsed only where a variable asks for a part of it.
        let request_body = masked.body.take().map(|bytes| match self.body_by_name {
            true => BufferedBody::new(bytes, kind),
            false => BufferedBody { bytes, json: None },
        });
        View { x, masked, request_body, response_body: copy(Side::Response) }
    }

    /// The fields of the entry.
    pub fn fields(&self, view: &View<'_>) -> Fields {
        match &self.format {
            Some(format) => {
                let mut fields = format.fields(view);
                if let Some(target) = &view.x.target {
                    fields.insert("route_id".into(), Value::from(&*target.route_id));
                    if let Some(service) = &target.service_id {
                        fields.insert("service_id".into(), Value::from(&**service));
                    }
                }
                fields
            }
            None => self.full(view),
        }
    }

    /// Whether a `log_format` is set.
    pub fn is_custom(&self) -> bool {
        self.format.is_some()
    }

    /// APISIX's default entry.
    fn full(&self, view: &View<'_>) -> Fields {
        let x = view.x;
        let now = Instant::now();
        let millis = |time: std::time::Duration| Value::from(time.as_micros() as f64 / 1e3);
        let total = now.saturating_duration_since(x.started);
        let upstream = x.upstream_time(now);
        let mut request = Fields::new();
        let uri = view.request_uri();
        let url = format!("{}://{}:{}{uri}", x.conn.scheme(), view.host(), x.conn.local.port());
        request.insert("url".into(), url.into());
        request.insert("uri".into(), uri.into());
        request.insert("method".into(), x.request.method.as_str().into());
        let mut headers = headers(view.headers());
        if !headers.contains_key("host")
            && let Some(host) = x.authority()
        {
            headers.insert("host".into(), host.into_owned().into());
        }
        request.insert("headers".into(), Value::Object(headers));
        request.insert("querystring".into(), Value::Object(querystring(view.query().unwrap_or_default())));
        request.insert("size".into(), x.request_length().into());
        if let (Some(rule), Some(body)) = (&self.request_body, view.request_body())
            && (rule.is_of_request() || rule.holds(view))
        {
            request.insert("body".into(), String::from_utf8_lossy(body).into());
        }
        let mut response = Fields::new();
        response.insert("status".into(), x.status().into());
        response.insert("headers".into(), Value::Object(self::headers(x.response.headers())));
        response.insert("size".into(), x.response_length().into());
        if let Some(body) = &view.response_body {
            response.insert("body".into(), String::from_utf8_lossy(body).into());
        }
        let mut fields = Fields::new();
        fields.insert("request".into(), Value::Object(request));
        fields.insert("response".into(), Value::Object(response));
        let server = json!({"hostname": hostname(), "version": env!("CARGO_PKG_VERSION")});
        fields.insert("server".into(), server);
        if let Some(addresses) = x.get(&Var::UpstreamAddr) {
            fields.insert("upstream".into(), addresses.into_owned().into());
        }
        let service = match &x.target {
            Some(target) => target.service_id.as_deref().unwrap_or_default(),
            None => view.host(),
        };
        fields.insert("service_id".into(), service.into());
        if let Some(target) = &x.target {
            fields.insert("route_id".into(), Value::from(&*target.route_id));
        }
        if let Some(consumer) = &x.consumer {
            fields.insert("consumer".into(), json!({"username": &*consumer.name}));
        }
        fields.insert("client_ip".into(), x.remote_addr.to_string().into());
        let started = view.started().duration_since(UNIX_EPOCH).unwrap_or_default();
        fields.insert("start_time".into(), u64::try_from(started.as_millis()).unwrap_or(u64::MAX).into());
        fields.insert("latency".into(), millis(total));
        if let Some(upstream) = upstream {
            fields.insert("upstream_latency".into(), millis(upstream));
        }
        fields.insert("apisix_latency".into(), millis(total.saturating_sub(upstream.unwrap_or_default())));
        for (name, value) in self.extra.fields(view) {
            fields.entry(name).or_insert(value);
        }
        fields
    }
}

/// Fields by name; several of one name are a list.
fn headers(fields: &HeaderMap) -> Fields {
    let text = |value: &http::HeaderValue| Value::from(String::from_utf8_lossy(value.as_bytes()));
    fields
        .keys()
        .map(|name| {
            let mut values: Vec<Value> = fields.get_all(name).iter().map(text).collect();
            let value =
                if values.len() > 1 { Value::Array(values) } else { values.pop().unwrap_or_default() };
            (name.as_str().to_owned(), value)
        })
        .collect()
}

/// The members of a query as nginx's Lua tells them: `true` without `=`, a list where a name comes again.
fn querystring(query: &str) -> Fields {
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
    };
    let mut members = Fields::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()).take(ARGUMENTS) {
        let (name, value) = match pair.split_once('=') {
            Some((name, value)) => (name, Value::String(decode(value))),
            None => (pair, Value::Bool(true)),
        };
        match members.entry(decode(name)) {
            serde_json::map::Entry::Vacant(entry) => {
                entry.insert(value);
            }
            serde_json::map::Entry::Occupied(mut entry) => match entry.get_mut() {
                Value::Array(values) => values.push(value),
                one => *one = Value::Array(vec![one.take(), value]),
            },
        }
    }
    members
}

/// About how many bytes the fields take.
pub fn weight(fields: &Fields) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::String(text) => 40 + text.len(),
            Value::Array(values) => 40 + values.iter().map(of).sum::<usize>(),
            Value::Object(fields) => weight(fields),
            Value::Null | Value::Bool(_) | Value::Number(_) => 32,
        }
    }
    64 + fields.iter().map(|(name, value)| 40 + name.len() + of(value)).sum::<usize>()
}

/// Whose body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Request,
    Response,
}

/// A slot of the exchange: what loggers have copied of bodies, by logger.
#[derive(Default)]
struct Copies(SmallVec<[Copied; 2]>);

/// The logger, whose body, and its beginning.
type Copied = (usize, Side, Rc<RefCell<Kept>>);

/// The beginning of a body.
struct Kept {
    bytes: Vec<u8>,
    limit: usize,
    metrics: Arc<Metrics>,
}

impl Kept {
    fn add(&mut self, piece: &[u8]) {
        let room = self.limit.saturating_sub(self.bytes.len());
        let part = piece.get(..room.min(piece.len())).unwrap_or_default();
        if part.is_empty() {
            return;
        }
        if self.metrics.logs.reserve(part.len()) {
            self.bytes.extend_from_slice(part);
        } else {
            // The rest would not continue where this ends.
            self.limit = self.bytes.len();
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.metrics.logs.release(self.bytes.len());
    }
}

/// A request body that is copied while it is read.
struct Watched {
    body: Body,
    kept: Rc<RefCell<Kept>>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.kept.borrow_mut().add(data);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Copies the body of an answer.
struct Copy(Rc<RefCell<Kept>>);

impl BodyFilter for Copy {
    fn data(&mut self, piece: Bytes) -> Bytes {
        self.0.borrow_mut().add(&piece);
        piece
    }

    fn only_watches(&self) -> bool {
        true
    }
}

/// `plugin_metadata` of a logger that has nothing else there.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The fields of entries, where a plugin has no `log_format` of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_format: Option<LogFormat>,
    /// Fields added to the default entry, where a plugin has no `log_format_extra` of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_format_extra: Option<LogFormat>,
    /// Entries that may wait, where a plugin does not say it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_pending_entries: Option<std::num::NonZeroU32>,
}

impl Metadata {
    /// Reads the metadata that a plugin is built with. It was checked when it was stored.
    pub fn of(env: &BuildEnv<'_>) -> Self {
        env.metadata.and_then(|value| Self::deserialize(value).ok()).unwrap_or_default()
    }

    /// The formats.
    pub fn formats(&self) -> MetadataFormats<'_> {
        MetadataFormats {
            log_format: self.log_format.as_ref(),
            log_format_extra: self.log_format_extra.as_ref(),
        }
    }
}

/// The formats of `plugin_metadata`.
#[derive(Clone, Copy, Debug, Default)]
pub struct MetadataFormats<'a> {
    pub(crate) log_format: Option<&'a LogFormat>,
    pub(crate) log_format_extra: Option<&'a LogFormat>,
}

/// Makes what a logger's queue holds.
pub trait Make: Send + Sync + 'static {
    /// An entry on its way.
    type Entry: Send + Sync + 'static;

    /// The entry of a request, and about how many bytes it takes.
    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Self::Entry, usize);
}

/// The fields as they are.
pub struct Plain;

impl Make for Plain {
    type Entry = Fields;

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Fields, usize) {
        let fields = recorder.fields(view);
        let bytes = weight(&fields);
        (fields, bytes)
    }
}

/// A logger: an entry for each request, handed to a queue.
pub struct Logger<M: Make> {
    recorder: Recorder,
    make: M,
    queue: Arc<Batch<M::Entry>>,
}

impl<M: Make> Logger<M> {
    /// Registers a logger for the phases that it needs.
    pub fn register(recorder: Recorder, make: M, queue: Arc<Batch<M::Entry>>, hooks: &mut Hooks) {
        let logger = Arc::new(Self { recorder, make, queue });
        if logger.recorder.request_body.is_some() {
            hooks.access(&logger);
        }
        if logger.recorder.response_body.is_some() {
            hooks.body(&logger);
        }
        hooks.log(&logger);
    }

    /// Tells copies of this logger from those of others in one exchange.
    fn id(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

impl<M: Make> Access for Logger<M> {
    fn access(&self, x: &mut Exchange) -> Flow {
        self.recorder.keep_request(self.id(), x);
        Flow::Next
    }
}

impl<M: Make> OnBody for Logger<M> {
    fn body(&self, x: &mut Exchange) -> Option<Box<dyn BodyFilter>> {
        self.recorder.keep_response(self.id(), x)
    }
}

impl<M: Make> OnLog for Logger<M> {
    fn log(&self, x: &Exchange) {
        let view = self.recorder.view(self.id(), x);
        if self.recorder.only.as_ref().is_some_and(|only| !only.eval(&view)) {
            return;
        }
        let (entry, bytes) = self.make.make(&self.recorder, &view);
        self.queue.push(entry, bytes);
    }

    fn reads_head(&self) -> bool {
        self.recorder.reads_head
    }
}

/// One entry as a line of JSON, without its end.
pub fn line(fields: &Fields) -> String {
    serde_json::to_string(fields).unwrap_or_default()
}

/// A batch as APISIX sends it: the entry itself where batches have one, else a list.
pub fn json_batch(entries: &[Fields], single: bool) -> String {
    match entries {
        [one] if single => line(one),
        all => serde_json::to_string(all).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use layers::exchange::{Answered, Attempt};
    use layers::testing::{TestEnv, exchange};

    use super::*;
    use crate::support::log_settings::{body_bytes, logger_settings};

    logger_settings! {}

    fn recorder(env: &TestEnv, config: Value) -> Recorder {
        let config: Config = serde_json::from_value(config).unwrap();
        env.with(|env| Recorder::new(config.entry_settings(), MetadataFormats::default(), env)).unwrap()
    }

    fn fields(config: Value, x: &Exchange) -> Value {
        let recorder = recorder(&TestEnv::default(), config);
        Value::Object(recorder.fields(&recorder.view(1, x)))
    }

    #[test]
    fn limits_of_bodies_are_those_of_apisix() {
        assert_eq!(body_bytes().get(), 512 * 1024);
    }

    #[tokio::test]
    async fn the_default_entry_is_that_of_apisix() {
        let mut x = exchange("GET", "http://a.com/b%20c?x=1&x=%32&y&z=")
            .header("X-A", "1")
            .header("x-a", "2")
            .build();
        x.response.headers_mut().insert("server", http::HeaderValue::from_static("s"));
        x.answered = Answered::Upstream;
        x.bytes_sent = 10;
        x.attempts.push(Attempt {
            started: std::time::Instant::now(),
            address: ([127, 0, 0, 1], 1980).into(),
            status: Some(200),
            took: std::time::Duration::ZERO,
            connect: std::time::Duration::ZERO,
            failed: None,
        });
        let mut entry =
            fields(json!({"log_format_extra": {"m": "$request_method", "request": "not this"}}), &x);
        for name in ["latency", "upstream_latency", "apisix_latency"] {
            assert!(entry[name].as_f64().is_some_and(|millis| millis < 60_000.0), "{name}: {entry}");
        }
        assert!(entry["start_time"].as_u64().unwrap() > 1_600_000_000_000);
        assert_eq!(entry["server"]["version"], env!("CARGO_PKG_VERSION"));
        let fields = entry.as_object_mut().unwrap();
        for name in ["latency", "upstream_latency", "apisix_latency", "start_time", "server"] {
            fields.remove(name);
        }
        let expected = json!({
            "request": {
                "url": "http://a.com:9080/b%20c?x=1&x=%32&y&z=", "uri": "/b%20c?x=1&x=%32&y&z=", "method": "GET",
                "headers": {"host": "a.com", "x-a": ["1", "2"]},
                "querystring": {"x": ["1", "2"], "y": true, "z": ""}, "size": x.request_length(),
            },
            "response": {"status": 200, "headers": {"server": "s"}, "size": 19 + 11 + 10},
            "upstream": "127.0.0.1:1980", "service_id": "a.com", "client_ip": "127.0.0.1", "m": "GET",
        });
        assert_eq!(entry, expected);
    }

    #[tokio::test]
    async fn a_format_has_texts_variables_and_levels() {
        let x = exchange("GET", "http://a.com/b?n=1").header("x-a", "v").build();
        let format = json!({
            "text": "host: $host", "var": "$http_x_a", "none": "$http_x_b", "both": "$host:$arg_n", "number": 7,
            "in": {"in": {"in": {"in": {"deep": "$host", "deeper": {"x": "$host"}}}}},
        });
        let expected = json!({
            "text": "host: $host", "var": "v", "both": "a.com:1", "number": 7, "in": {"in": {"in": {"in": {"deep": "a.com"}}}},
        });
        assert_eq!(fields(json!({"log_format": format}), &x), expected);
    }

    #[tokio::test]
    async fn bytes_that_are_no_text_are_told_all_the_same() {
        let mut x = exchange("GET", "http://a.com/?%ff=%fe").build();
        let odd = http::HeaderValue::from_bytes(b"a\xff").unwrap();
        x.request.headers.insert("x-a", odd);
        let entry = fields(json!({}), &x);
        assert_eq!(entry["request"]["headers"]["x-a"], "a\u{fffd}");
        assert_eq!(entry["request"]["querystring"], json!({"\u{fffd}": "\u{fffd}"}));
    }

    /// Hides one argument, one field and the body.
    struct Hide;

    impl Mask for Hide {
        fn mask(&self, x: &State, shown: &mut Masked) {
            shown.request_uri = Some(Uri::from_static("/a?token=***"));
            let mut headers = x.request.headers.clone();
            headers.insert("authorization", http::HeaderValue::from_static("***"));
            shown.headers = Some(headers);
            shown.body = shown.body.as_ref().map(|body| format!("{} bytes", body.len()).into());
        }
    }

    #[tokio::test]
    async fn a_mask_holds_for_fields_and_for_variables() {
        let build = || {
            exchange("POST", "http://a.com/a?token=secret").header("authorization", "secret").body("secret")
        };
        let all = json!({"include_req_body": true});
        let names = [
            "request_uri",
            "args",
            "arg_token",
            "request",
            "http_authorization",
            "request_body",
            "upstream_uri",
        ];
        let format: Map<String, Value> =
            names.iter().map(|name| ((*name).to_owned(), format!("${name}").into())).collect();
        for config in [all, json!({"log_format": format})] {
            let recorder = recorder(&TestEnv::default(), config);
            let mut x = build().build();
            recorder.keep_request(1, &mut x);
            let entry = |x: &Exchange| Value::Object(recorder.fields(&recorder.view(1, x))).to_string();
            assert!(entry(&x).contains("secret"));
            x.put_slot(Masks(SmallVec::from_iter([Rc::new(Hide) as Rc<dyn Mask>])));
            let masked = entry(&x);
            assert!(!masked.contains("secret"), "{masked}");
            assert!(masked.contains("token=***") && masked.contains("6 bytes"), "{masked}");
        }
    }

    #[tokio::test]
    async fn bodies_are_kept_by_condition_and_up_to_a_limit() {
        let cases = [
            (json!({"include_req_body": true}), Some("0123456789")),
            (json!({"include_req_body": true, "max_req_body_bytes": 4}), Some("0123")),
            (
                json!({"include_req_body": true, "include_req_body_expr": [["arg_a", "==", "1"]]}),
                Some("0123456789"),
            ),
            (json!({"include_req_body": true, "include_req_body_expr": [["arg_a", "==", "2"]]}), None),
            (json!({"include_req_body": true, "include_req_body_expr": [["status", "==", 404]]}), None),
            (
                json!({"include_req_body": true, "include_req_body_expr": [["status", "==", 200]]}),
                Some("0123456789"),
            ),
            (json!({}), None),
        ];
        for (config, expected) in cases {
            let env = TestEnv::default();
            let recorder = recorder(&env, config.clone());
            // Whole, and in pieces.
            for body in [Body::from("0123456789"), Body::boxed(Body::from("0123456789"))] {
                let mut x = exchange("POST", "http://a.com/?a=1").body(body).build();
                recorder.keep_request(1, &mut x);
                assert_eq!(x.request_body.size_hint().exact(), Some(10));
                assert_eq!(x.request_body.collect_up_to(100).await.unwrap(), "0123456789");
                x.answered = Answered::Upstream;
                let entry = Value::Object(recorder.fields(&recorder.view(1, &x)));
                assert_eq!(entry["request"]["body"].as_str(), expected, "{config}");
                assert_eq!(entry["request"].get("body").is_some(), expected.is_some());
            }
            assert!(env.metrics.logs.reserve(layers::telemetry::log_shipping::MEMORY), "memory came back");
        }
    }

    #[tokio::test]
    async fn a_part_of_a_body_can_be_named() {
        let recorder = recorder(
            &TestEnv::default(),
            json!({"log_format": {"model": "$post_arg.model", "deep": "$post_arg.a.b", "all": "$request_body"}}),
        );
        let body = r#"{"model":"m","a":{"b":[1]}}"#;
        let mut x =
            exchange("POST", "http://a/").header("content-type", "application/json").body(body).build();
        recorder.keep_request(1, &mut x);
        let entry = Value::Object(recorder.fields(&recorder.view(1, &x)));
        assert_eq!(entry, json!({"model": "m", "deep": [1], "all": body}));
    }
}
