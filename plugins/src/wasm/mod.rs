//! WASM plugins by the proxy-wasm ABI: modules that `wasm.plugins` of `config.yaml` names become plugins like any other.
//!
//! Phases: `rewrite` or `access` as configured (request headers, and the body if the module asks for it), the header
//! and body phases of the answer, and `log`. A module that fails answers the request with 500: it may be the one that
//! authenticates. A changed file takes effect for the next request; requests that have begun keep what they began with.

mod file;
mod host;
mod vm;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use config::error::ConfigError;
use config::process::{WasmPhase, WasmPlugin};
use http::{HeaderValue, Request, Response, StatusCode, header};
use layers::body::{Body, BodyFilter};
use layers::exchange::Exchange;
use layers::plugin::{
    AccessWaits, BuildEnv, Extras, Flow, Hooks, OnBody, OnLog, OnResponse, Registration, RewriteWaits,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::file::ModuleFile;
use self::host::{Answer, Call, Reply, Wants, fields};
use self::vm::{Action, Failed, Limits, Vm};
use crate::support::http_call::{self, HttpClient, url};
use crate::support::request_body;

/// Settings of a WASM plugin on a route or service.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What the module gets as its configuration: a text as it is, an object as JSON.
    conf: Conf,
}

/// A text or an object.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Conf {
    /// A text.
    Text(#[schemars(length(min = 1))] String),
    /// An object.
    Object(#[schemars(extend("minProperties" = 1))] serde_json::Map<String, Value>),
}

impl Conf {
    fn bytes(&self) -> Bytes {
        match self {
            Self::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
            Self::Object(object) => Value::Object(object.clone()).to_string().into(),
        }
    }
}

/// The largest body that a module sees, in bytes. A request with more is refused; of an answer the rest passes by.
const BODY: usize = 1 << 20;
/// Calls of one request.
const CALLS: usize = 32;

/// The plugins that `config.yaml` names. Their names live as long as the process; to be called once.
pub fn registrations(plugins: &[WasmPlugin]) -> Vec<&'static Registration> {
    plugins
        .iter()
        .map(|plugin| {
            let registration = Registration {
                check_attr: |_, _| Vec::new(),
                name: Box::leak(plugin.name.clone().into_boxed_str()),
                priority: plugin.priority,
                placement: layers::plugin::Placement::Both,
                check: |value| {
                    let config = config::typed::parse::<Config>(value)?;
                    check(&config).map_err(|error| vec![error])?;
                    config::typed::to_value(&config).map_err(|error| vec![error])
                },
                schema: config::typed::schema_of::<Config>,
                build: |value, env, hooks| {
                    let config = config::typed::parse::<Config>(value)?;
                    build(&config, env, hooks).map_err(|error| vec![error])
                },
                offer: |_, _| Ok(()),
                extras: Extras::default,
            };
            &*Box::leak(Box::new(registration))
        })
        .collect()
}

fn check(config: &Config) -> Result<(), ConfigError> {
    let empty = match &config.conf {
        Conf::Text(text) => text.is_empty(),
        Conf::Object(object) => object.is_empty(),
    };
    if empty {
        Err(ConfigError::invalid("/conf", "write a text or an object that is not empty"))
    } else {
        Ok(())
    }
}

/// What a plugin of `config.yaml` is told of itself when it is built: its entry there.
fn entry(env: &BuildEnv<'_>) -> Result<WasmPlugin, ConfigError> {
    let entry = env.attr.and_then(|attr| WasmPlugin::deserialize(attr).ok());
    entry.ok_or_else(|| ConfigError::invalid("", "it is not in `wasm.plugins` of config.yaml"))
}

fn build(config: &Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    let entry = entry(env)?;
    let refused = |error: Failed| ConfigError::invalid("", format!("{}: {error}", entry.file.display()));
    let limits = Limits { fuel: entry.fuel, memory: entry.memory };
    let file = env
        .carry
        .get_or(&format!("wasm/{}", entry.name), || ModuleFile::new(&entry.name, &entry.file, limits));
    file.watch(env.control);
    let settings = http_call::Settings { timeout: Duration::from_secs(60), ..http_call::Settings::default() };
    let plugin = Arc::new(Plugin {
        name: entry.name.as_str().into(),
        number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        configuration: config.conf.bytes(),
        client: HttpClient::new(&settings, env)?,
        file,
    });
    // Tried here, where a refusal can be told to whoever writes it.
    let compiled = plugin.file.current().map_err(|why| refused(Failed(why)))?;
    let vm = vm::instance(&compiled).map_err(refused)?;
    vm.borrow_mut().root(plugin.number, &plugin.configuration).map_err(refused)?;
    if entry.phase == WasmPhase::Rewrite {
        hooks.rewrite_waits(&plugin);
    } else {
        hooks.access_waits(&plugin);
    }
    hooks.response(&plugin);
    hooks.body(&plugin);
    hooks.log(&plugin);
    Ok(())
}

/// One object's use of a module.
struct Plugin {
    name: Arc<str>,
    number: u64,
    configuration: Bytes,
    client: HttpClient,
    file: Arc<ModuleFile>,
}

/// A module's context for one request.
struct Context {
    plugin: u64,
    vm: Rc<RefCell<Vm>>,
    id: i32,
    /// It looks at the body of the answer.
    filters: bool,
}

/// The contexts of a request, one for each WASM plugin.
#[derive(Default)]
struct Contexts(Vec<Context>);

impl Plugin {
    fn context(&self, x: &Exchange) -> Option<(Rc<RefCell<Vm>>, i32)> {
        let contexts = x.slot::<Contexts>()?;
        contexts.0.iter().find(|c| c.plugin == self.number).map(|c| (c.vm.clone(), c.id))
    }

    /// Answers for a module that has failed.
    fn failed(&self, error: &Failed) -> Flow {
        tracing::error!(plugin = &*self.name, %error, "a WASM plugin failed");
        Flow::status(StatusCode::INTERNAL_SERVER_ERROR)
    }

    async fn request(&self, x: &mut Exchange) -> Flow {
        match self.run(x).await {
            Ok(flow) => flow,
            Err(error) => {
                // Its context went with its instance.
                if let Some(contexts) = x.slot_mut::<Contexts>() {
                    contexts.0.retain(|context| context.plugin != self.number);
                }
                self.failed(&error)
            }
        }
    }

    async fn run(&self, x: &mut Exchange) -> Result<Flow, Failed> {
        let compiled = self.file.current().map_err(Failed)?;
        let vm = vm::instance(&compiled)?;
        let id = {
            let mut vm = vm.borrow_mut();
            let root = vm.root(self.number, &self.configuration)?;
            vm.begin(root)?
        };
        if let Some(contexts) = x.slot_mut::<Contexts>() {
            contexts.0.push(Context { plugin: self.number, vm: vm.clone(), id, filters: false });
        }
        let mut after = After::of(&vm, |vm| vm.request_headers(id, x))?;
        let mut wants_body = after.wants.request_body;
        let mut paused = after.action == Action::Pause;
        let mut made = 0;
        let mut calls: VecDeque<Call> = VecDeque::new();
        loop {
            if let Some(reply) = after.reply.take() {
                return Ok(Flow::Reply(response(reply)));
            }
            calls.append(&mut after.calls);
            if let Some(call) = calls.pop_front() {
                made += 1;
                if made > CALLS {
                    return Err(Failed(format!("it wants more than {CALLS} calls made for one request")));
                }
                let token = call.token;
                let answer = self.call(call).await;
                after = After::of(&vm, |vm| vm.answered(id, token, x, answer).map(|()| Action::Continue))?;
                paused &= !after.resumed;
            } else if std::mem::take(&mut wants_body) {
                let body = match request_body::read(x, BODY).await {
                    Ok(body) => body,
                    Err(refusal) => return Ok(refusal),
                };
                let mut left = Bytes::new();
                after = After::of(&vm, |vm| {
                    let (body, action) = vm.request_body(id, x, body)?;
                    left = body;
                    Ok(action)
                })?;
                paused = after.action == Action::Pause;
                // The upstream is told the length of what it gets.
                x.request.headers.remove(header::CONTENT_LENGTH);
                x.request_body = Body::from(left);
            } else if paused {
                return Err(Failed(
                    "it paused a request, and nothing is on its way that could resume it".to_owned(),
                ));
            } else {
                return Ok(Flow::Next);
            }
        }
    }

    /// Makes a call. `None`: there was no answer.
    async fn call(&self, call: Call) -> Option<Answer> {
        let request = match outgoing(&call) {
            Ok(request) => request,
            Err(problem) => {
                tracing::warn!(
                    plugin = &*self.name,
                    upstream = call.upstream,
                    problem,
                    "a call of a WASM plugin"
                );
                return None;
            }
        };
        let answer = tokio::time::timeout(call.timeout, self.client.call(request)).await;
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                tracing::warn!(plugin = &*self.name, upstream = call.upstream, %error, "a call of a WASM plugin");
                return None;
            }
            Err(_) => return None,
        };
        let status = Bytes::from(answer.status().as_u16().to_string());
        let mut headers = vec![(Bytes::from_static(b":status"), status)];
        headers.extend(answer.headers().iter().map(|(name, value)| {
            (Bytes::copy_from_slice(name.as_str().as_bytes()), Bytes::copy_from_slice(value.as_bytes()))
        }));
        Some(Answer { headers, body: answer.into_body() })
    }
}

/// What a callback has left.
struct After {
    action: Action,
    reply: Option<Reply>,
    calls: VecDeque<Call>,
    wants: Wants,
    resumed: bool,
}

impl After {
    /// Runs `callback` and takes what it left before another request of this thread runs one.
    fn of(
        vm: &RefCell<Vm>,
        callback: impl FnOnce(&mut Vm) -> Result<Action, Failed>,
    ) -> Result<Self, Failed> {
        let mut vm = vm.borrow_mut();
        vm.clear();
        let action = callback(&mut vm)?;
        let calls = std::iter::from_fn(|| vm.take_call()).collect();
        Ok(Self { action, reply: vm.take_reply(), calls, wants: vm.wants(), resumed: vm.is_resumed() })
    }
}

fn response(reply: Reply) -> Response<Body> {
    let mut response = Response::new(Body::from(reply.body));
    *response.status_mut() = reply.status;
    *response.headers_mut() = reply.headers;
    // What says how long the body is has to be true.
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response.headers_mut().remove(header::TRANSFER_ENCODING);
    response
}

/// The request of a call: pseudo-fields name method, path and host.
fn outgoing(call: &Call) -> Result<Request<Bytes>, String> {
    let pseudo = |name: &[u8]| {
        let found = call.headers.iter().find(|(key, _)| **key == *name);
        found.and_then(|(_, value)| std::str::from_utf8(value).ok())
    };
    let base = if call.upstream.contains("://") {
        call.upstream.clone()
    } else {
        format!("http://{}", call.upstream)
    };
    let path = pseudo(b":path").unwrap_or("/");
    let uri = url(&format!("{}{path}", base.trim_end_matches('/')), "").map_err(|error| error.to_string())?;
    let mut request = Request::builder()
        .method(pseudo(b":method").unwrap_or("GET"))
        .uri(uri)
        .body(call.body.clone())
        .map_err(|error| error.to_string())?;
    *request.headers_mut() = fields(&call.headers);
    if let Some(host) = pseudo(b":authority").and_then(|host| HeaderValue::from_str(host).ok()) {
        request.headers_mut().insert(header::HOST, host);
    }
    Ok(request)
}

impl RewriteWaits for Plugin {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        self.request(x).await
    }
}

impl AccessWaits for Plugin {
    async fn access(&self, x: &mut Exchange) -> Flow {
        self.request(x).await
    }
}

impl OnResponse for Plugin {
    fn response(&self, x: &mut Exchange) {
        let Some((vm, id)) = self.context(x) else { return };
        match After::of(&vm, |vm| vm.response_headers(id, x).map(|()| Action::Continue)) {
            Ok(After { reply, wants, .. }) => {
                if let Some(reply) = reply {
                    x.response = response(reply);
                }
                let contexts = x.slot_mut::<Contexts>();
                let own =
                    contexts.and_then(|contexts| contexts.0.iter_mut().find(|c| c.plugin == self.number));
                if let Some(own) = own {
                    own.filters = wants.response_body;
                }
            }
            Err(error) => {
                tracing::error!(plugin = &*self.name, %error, "a WASM plugin failed");
                let mut refused = Response::new(Body::Empty);
                *refused.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                x.response = refused;
            }
        }
    }
}

impl OnBody for Plugin {
    fn body(&self, x: &mut Exchange) -> Option<Box<dyn BodyFilter>> {
        let contexts = x.slot::<Contexts>()?;
        let own = contexts.0.iter().find(|context| context.plugin == self.number && context.filters)?;
        let filter = Filter {
            plugin: self.name.clone(),
            vm: own.vm.clone(),
            id: own.id,
            held: Bytes::new(),
            passes: false,
        };
        Some(Box::new(filter))
    }
}

/// Shows a module the body of an answer, piece by piece; what it pauses on is shown again with the next piece.
struct Filter {
    plugin: Arc<str>,
    vm: Rc<RefCell<Vm>>,
    id: i32,
    held: Bytes,
    /// The rest is not shown: it is too long, or the module has failed.
    passes: bool,
}

impl Filter {
    fn show(&mut self, piece: Bytes, end: bool) -> Bytes {
        if self.passes {
            return piece;
        }
        let piece = if self.held.is_empty() {
            piece
        } else {
            [std::mem::take(&mut self.held), piece].concat().into()
        };
        if piece.len() > BODY {
            self.passes = true;
            tracing::warn!(
                plugin = &*self.plugin,
                limit = BODY,
                "an answer is too long for a WASM plugin; it passes by"
            );
            return piece;
        }
        match self.vm.borrow_mut().response_body(self.id, piece, end) {
            Ok((body, Action::Pause)) if !end => {
                self.held = body;
                Bytes::new()
            }
            Ok((body, _)) => body,
            Err(error) => {
                tracing::error!(plugin = &*self.plugin, %error, "a WASM plugin failed; the rest of the body is left out");
                self.passes = true;
                Bytes::new()
            }
        }
    }
}

impl BodyFilter for Filter {
    fn data(&mut self, piece: Bytes) -> Bytes {
        self.show(piece, false)
    }

    fn end(&mut self) -> Bytes {
        self.show(Bytes::new(), true)
    }
}

impl OnLog for Plugin {
    fn log(&self, x: &Exchange) {
        let Some((vm, id)) = self.context(x) else { return };
        let (request, response) = (x.request.headers.clone(), x.response.headers().clone());
        // A request that ends while another one's callback runs cannot be: callbacks do not wait.
        if let Ok(mut vm) = vm.try_borrow_mut()
            && let Err(error) = vm.end(id, request, response, x.status())
        {
            tracing::debug!(plugin = &*self.name, %error, "a WASM plugin failed at the end of a request");
        }
    }

    fn reads_head(&self) -> bool {
        true
    }
}
