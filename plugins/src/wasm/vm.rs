//! Modules, compiled once, and their instances, one for each thread: callbacks with fuel, memory with a limit.
//!
//! An instance that traps (a panic of the module, fuel used up, memory over its limit) is thrown away, and the next
//! request gets a new one.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::HeaderMap;
use layers::body::Body;
use layers::exchange::Exchange;
use wasmtime::{
    Config, Engine, Instance, InstancePre, Linker, Module, Store, StoreLimitsBuilder, TypedFunc, WasmParams,
    WasmResults,
};

use super::host::{Answer, Call, Host, Reply, View, Wants, link};

/// What an instance may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of one callback; about one unit for an instruction.
    pub fuel: u64,
    /// Of an instance, in bytes.
    pub memory: usize,
}

/// A module that is compiled and linked.
pub struct Compiled {
    number: u64,
    plugin: Arc<str>,
    pre: InstancePre<Host>,
    limits: Limits,
}

fn engine() -> Result<&'static Engine, String> {
    static ENGINE: OnceLock<Result<Engine, String>> = OnceLock::new();
    let made = ENGINE.get_or_init(|| {
        let mut config = Config::new();
        config.consume_fuel(true);
        Engine::new(&config).map_err(|error| error.to_string())
    });
    made.as_ref().map_err(Clone::clone)
}

impl Compiled {
    /// Compiles a module, in binary form. Takes long: for the control side.
    ///
    /// # Errors
    /// It is no module, or asks for something that is not offered.
    pub fn new(plugin: &str, binary: &[u8], limits: Limits) -> Result<Self, String> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let engine = engine()?;
        let told = |error: wasmtime::Error| format!("{error:#}");
        let module = Module::new(engine, binary).map_err(told)?;
        let mut linker = Linker::new(engine);
        link(&mut linker).map_err(told)?;
        // Compilers import what a module then never calls.
        linker.define_unknown_imports_as_traps(&module).map_err(told)?;
        let pre = linker.instantiate_pre(&module).map_err(told)?;
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { number, plugin: plugin.into(), pre, limits })
    }
}

thread_local! {
    static INSTANCES: RefCell<HashMap<u64, Rc<RefCell<Vm>>>> = RefCell::default();
}

/// This thread's instance of a module; made if there is none. Those of former versions go when no request has them.
///
/// # Errors
/// It cannot be started.
pub fn instance(compiled: &Compiled) -> Result<Rc<RefCell<Vm>>, Failed> {
    let known = INSTANCES.with_borrow(|instances| instances.get(&compiled.number).cloned());
    if let Some(vm) = known {
        if !vm.borrow().broken {
            return Ok(vm);
        }
        forget(compiled.number);
    }
    let vm = Rc::new(RefCell::new(Vm::start(compiled)?));
    INSTANCES.with_borrow_mut(|instances| {
        instances.retain(|_, other| {
            let former = other.try_borrow().is_ok_and(|other| *other.plugin == *compiled.plugin);
            !former
        });
        instances.insert(compiled.number, vm.clone());
    });
    Ok(vm)
}

fn forget(number: u64) {
    INSTANCES.with_borrow_mut(|instances| instances.remove(&number));
}

/// A callback that did not end well, in words for the log.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

impl From<wasmtime::Error> for Failed {
    fn from(error: wasmtime::Error) -> Self {
        Self(format!("{error:#}"))
    }
}

/// What a module says after a callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Continue,
    Pause,
}

/// A callback about header fields: the first version of the ABI does not tell whether a body follows.
enum OnHeaders {
    First(TypedFunc<(i32, i32), i32>),
    Second(TypedFunc<(i32, i32, i32), i32>),
}

/// Context, token, and how many fields, bytes and trailers there are.
type OnCallResponse = TypedFunc<(i32, i32, i32, i32, i32), ()>;

struct Exports {
    on_context_create: Option<TypedFunc<(i32, i32), ()>>,
    on_vm_start: Option<TypedFunc<(i32, i32), i32>>,
    on_configure: Option<TypedFunc<(i32, i32), i32>>,
    on_request_headers: Option<OnHeaders>,
    on_request_body: Option<TypedFunc<(i32, i32, i32), i32>>,
    on_response_headers: Option<OnHeaders>,
    on_response_body: Option<TypedFunc<(i32, i32, i32), i32>>,
    on_http_call_response: Option<OnCallResponse>,
    on_done: Option<TypedFunc<i32, i32>>,
    on_log: Option<TypedFunc<i32, ()>>,
    on_delete: Option<TypedFunc<i32, ()>>,
}

impl Exports {
    fn of(instance: &Instance, store: &mut Store<Host>) -> Self {
        fn get<P: WasmParams, R: WasmResults>(
            instance: &Instance,
            store: &mut Store<Host>,
            name: &str,
        ) -> Option<TypedFunc<P, R>> {
            instance.get_typed_func(store, name).ok()
        }
        let mut headers = |name: &str| {
            let second = get(instance, store, name).map(OnHeaders::Second);
            second.or_else(|| get(instance, store, name).map(OnHeaders::First))
        };
        Self {
            on_request_headers: headers("proxy_on_request_headers"),
            on_response_headers: headers("proxy_on_response_headers"),
            on_context_create: get(instance, store, "proxy_on_context_create"),
            on_vm_start: get(instance, store, "proxy_on_vm_start"),
            on_configure: get(instance, store, "proxy_on_configure"),
            on_request_body: get(instance, store, "proxy_on_request_body"),
            on_response_body: get(instance, store, "proxy_on_response_body"),
            on_http_call_response: get(instance, store, "proxy_on_http_call_response"),
            on_done: get(instance, store, "proxy_on_done"),
            on_log: get(instance, store, "proxy_on_log"),
            on_delete: get(instance, store, "proxy_on_delete"),
        }
    }
}

/// An instance of a module.
pub struct Vm {
    store: Store<Host>,
    exports: Exports,
    plugin: Arc<str>,
    fuel: u64,
    contexts: i32,
    /// Root contexts by the number of the object whose configuration they have.
    roots: HashMap<u64, i32>,
    broken: bool,
}

/// Runs one exported function with fresh fuel. Absent ones say nothing.
fn run<P: WasmParams, R: WasmResults>(
    store: &mut Store<Host>,
    fuel: u64,
    broken: &mut bool,
    function: Option<&TypedFunc<P, R>>,
    parameters: P,
) -> Result<Option<R>, Failed> {
    if *broken {
        return Err(Failed("its instance is broken".to_owned()));
    }
    let Some(function) = function else { return Ok(None) };
    let outcome = store.set_fuel(fuel).and_then(|()| function.call(&mut *store, parameters));
    outcome.map(Some).map_err(|error| {
        *broken = true;
        error.into()
    })
}

impl Vm {
    fn start(compiled: &Compiled) -> Result<Self, Failed> {
        let limits = StoreLimitsBuilder::new().memory_size(compiled.limits.memory).instances(1).memories(1);
        let host = Host::new(limits.trap_on_grow_failure(true).build(), compiled.plugin.clone());
        let mut store = Store::new(compiled.pre.module().engine(), host);
        store.limiter(|host| &mut host.limits);
        store.set_fuel(compiled.limits.fuel)?;
        let instance = compiled.pre.instantiate(&mut store)?;
        let exports = Exports::of(&instance, &mut store);
        let start = ["_initialize", "_start"]
            .into_iter()
            .find_map(|name| instance.get_typed_func::<(), ()>(&mut store, name).ok());
        let mut vm = Self {
            store,
            exports,
            plugin: compiled.plugin.clone(),
            fuel: compiled.limits.fuel,
            contexts: 1,
            roots: HashMap::new(),
            broken: false,
        };
        run(&mut vm.store, vm.fuel, &mut vm.broken, start.as_ref(), ())?;
        vm.create(1, 0)?;
        let started = run(&mut vm.store, vm.fuel, &mut vm.broken, vm.exports.on_vm_start.as_ref(), (1, 0))?;
        if started == Some(0) {
            return Err(Failed("the module does not want to start".to_owned()));
        }
        Ok(vm)
    }

    fn create(&mut self, context: i32, parent: i32) -> Result<(), Failed> {
        let function = self.exports.on_context_create.as_ref();
        run(&mut self.store, self.fuel, &mut self.broken, function, (context, parent)).map(|_| ())
    }

    fn next_context(&mut self) -> i32 {
        self.contexts = self.contexts.wrapping_add(1).max(2);
        self.contexts
    }

    /// The root context of an object with that configuration.
    ///
    /// # Errors
    /// The module refuses the configuration, or fails on it.
    pub fn root(&mut self, object: u64, configuration: &Bytes) -> Result<i32, Failed> {
        if let Some(root) = self.roots.get(&object) {
            return Ok(*root);
        }
        let root = self.next_context();
        self.store.data_mut().configuration = configuration.clone();
        self.create(root, 0)?;
        let length = i32::try_from(configuration.len()).unwrap_or(i32::MAX);
        let function = self.exports.on_configure.as_ref();
        let configured = run(&mut self.store, self.fuel, &mut self.broken, function, (root, length));
        self.store.data_mut().configuration = Bytes::new();
        if configured? == Some(0) {
            return Err(Failed("the module refuses its configuration".to_owned()));
        }
        self.roots.insert(object, root);
        Ok(root)
    }

    /// A context for a request.
    ///
    /// # Errors
    /// The module fails.
    pub fn begin(&mut self, root: i32) -> Result<i32, Failed> {
        let context = self.next_context();
        self.create(context, root)?;
        Ok(context)
    }

    /// Lets `callback` run on the request, which it may change.
    fn with<T>(
        &mut self,
        x: &mut Exchange,
        callback: impl FnOnce(&mut Self) -> Result<T, Failed>,
    ) -> Result<T, Failed> {
        let conn = x.conn.clone();
        let placeholder = Exchange::new(http::Request::new(Body::Empty), conn);
        let real = std::mem::replace(x, placeholder);
        self.store.data_mut().view = View::Exchange(real);
        let outcome = callback(self);
        if let View::Exchange(real) = std::mem::replace(&mut self.store.data_mut().view, View::Nothing) {
            *x = real;
        }
        outcome
    }

    fn headers(&mut self, context: i32, count: usize, end: bool, request: bool) -> Result<Action, Failed> {
        let exports = &self.exports;
        let function = if request { &exports.on_request_headers } else { &exports.on_response_headers };
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        let said = match function {
            None => None,
            Some(OnHeaders::First(function)) => {
                run(&mut self.store, self.fuel, &mut self.broken, Some(function), (context, count))?
            }
            Some(OnHeaders::Second(function)) => {
                let parameters = (context, count, i32::from(end));
                run(&mut self.store, self.fuel, &mut self.broken, Some(function), parameters)?
            }
        };
        Ok(if said.unwrap_or(0) == 0 { Action::Continue } else { Action::Pause })
    }

    /// `proxy_on_request_headers`.
    ///
    /// # Errors
    /// The module fails.
    pub fn request_headers(&mut self, context: i32, x: &mut Exchange) -> Result<Action, Failed> {
        let host = self.store.data_mut();
        (host.wants, host.resumed) = (Wants::default(), false);
        let (count, end) = (x.request.headers.len() + 4, x.request_body.is_empty());
        self.with(x, |vm| vm.headers(context, count, end, true))
    }

    /// `proxy_on_response_headers`.
    ///
    /// # Errors
    /// The module fails.
    pub fn response_headers(&mut self, context: i32, x: &mut Exchange) -> Result<(), Failed> {
        self.store.data_mut().wants = Wants::default();
        let (count, end) = (x.response.headers().len() + 1, x.response.body().is_empty());
        self.with(x, |vm| vm.headers(context, count, end, false)).map(|_| ())
    }

    /// `proxy_on_request_body` with all of it. Returns it as the module left it.
    ///
    /// # Errors
    /// The module fails.
    pub fn request_body(
        &mut self,
        context: i32,
        x: &mut Exchange,
        body: Bytes,
    ) -> Result<(Bytes, Action), Failed> {
        let length = i32::try_from(body.len()).unwrap_or(i32::MAX);
        self.store.data_mut().resumed = false;
        self.store.data_mut().body = body;
        let said = self.with(x, |vm| {
            let function = vm.exports.on_request_body.as_ref();
            run(&mut vm.store, vm.fuel, &mut vm.broken, function, (context, length, 1))
        });
        let body = std::mem::take(&mut self.store.data_mut().body);
        Ok((body, if said?.unwrap_or(0) == 0 { Action::Continue } else { Action::Pause }))
    }

    /// `proxy_on_response_body` with a piece of it. Returns it as the module left it, and whether more is to come with
    /// the next one first.
    ///
    /// # Errors
    /// The module fails.
    pub fn response_body(
        &mut self,
        context: i32,
        piece: Bytes,
        end: bool,
    ) -> Result<(Bytes, Action), Failed> {
        let length = i32::try_from(piece.len()).unwrap_or(i32::MAX);
        self.store.data_mut().body = piece;
        let function = self.exports.on_response_body.as_ref();
        let parameters = (context, length, i32::from(end));
        let said = run(&mut self.store, self.fuel, &mut self.broken, function, parameters);
        let body = std::mem::take(&mut self.store.data_mut().body);
        Ok((body, if said?.unwrap_or(0) == 0 { Action::Continue } else { Action::Pause }))
    }

    /// `proxy_on_http_call_response`. `None` is a call that had no answer.
    ///
    /// # Errors
    /// The module fails.
    pub fn answered(
        &mut self,
        context: i32,
        token: u32,
        x: &mut Exchange,
        answer: Option<Answer>,
    ) -> Result<(), Failed> {
        let size = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
        let (headers, body) = answer.as_ref().map_or((0, 0), |a| (size(a.headers.len()), size(a.body.len())));
        self.store.data_mut().answer = answer;
        let outcome = self.with(x, |vm| {
            let function = vm.exports.on_http_call_response.as_ref();
            let parameters = (context, token as i32, headers, body, 0);
            run(&mut vm.store, vm.fuel, &mut vm.broken, function, parameters)
        });
        self.store.data_mut().answer = None;
        outcome.map(|_| ())
    }

    /// `proxy_on_done`, `proxy_on_log` and `proxy_on_delete`: the context is no more.
    ///
    /// # Errors
    /// The module fails.
    pub fn end(
        &mut self,
        context: i32,
        request: HeaderMap,
        response: HeaderMap,
        status: u16,
    ) -> Result<(), Failed> {
        self.store.data_mut().view = View::Ended { request, response, status };
        let exports = &self.exports;
        let outcome = run(&mut self.store, self.fuel, &mut self.broken, exports.on_done.as_ref(), context)
            .and_then(|_| run(&mut self.store, self.fuel, &mut self.broken, exports.on_log.as_ref(), context))
            .and_then(|_| {
                run(&mut self.store, self.fuel, &mut self.broken, exports.on_delete.as_ref(), context)
            });
        self.store.data_mut().view = View::Nothing;
        outcome.map(|_| ())
    }

    /// The answer that the module gave in the last callback.
    pub fn take_reply(&mut self) -> Option<Reply> {
        self.store.data_mut().reply.take()
    }

    /// The next call that the module wants made.
    pub fn take_call(&mut self) -> Option<Call> {
        self.store.data_mut().calls.pop_front()
    }

    /// Whether the module said that the request goes on.
    pub fn is_resumed(&self) -> bool {
        self.store.data().resumed
    }

    /// What of bodies it wants to see.
    pub fn wants(&self) -> Wants {
        self.store.data().wants
    }

    /// Throws away what a callback left that nobody has taken.
    pub fn clear(&mut self) {
        let host = self.store.data_mut();
        host.reply = None;
        host.calls.clear();
    }
}
