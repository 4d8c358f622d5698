//! The one service that runs the plugins of a request, phase by phase, around the upstream.
//!
//! The order is APISIX's: global `rewrite`, route `rewrite`, then, if a consumer was recognised, the `rewrite` of what
//! its plugins add, global `access`, route `access`, the upstream, and on every answer the response and body phases in
//! the same order. Synchronous steps run without a future; from the first step that waits on, the rest of the request
//! is one boxed future. So is an upstream call that plugins surround.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use config::expr::Expr;
use hashbrown::HashMap;
use http::{HeaderValue, header};
use pin_project_lite::pin_project;
use serde_json::Value;
use smallvec::SmallVec;
use tower::Service;

use crate::body::Body;
use crate::consumer::Consumer;
use crate::error::{Error, Fault, Reason};
use crate::exchange::{Answered, Exchange, State};
use crate::local::LocalBox;
use crate::plugin::{
    BeforeProxy, Encode, Flow, Hide, Hooks, Next, OnBody, OnLog, OnResponse, Step, Surrounding, Surrounds,
    Waits,
};
use crate::rescue;

/// Which object of the configuration a plugin came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source(pub Arc<str>);

/// The answer that `_meta.error_response` puts in place of a plugin's refusal.
#[derive(Clone, Debug)]
pub struct ErrorResponse {
    text: Arc<str>,
    json: bool,
}

impl From<&config::meta::ErrorResponse> for ErrorResponse {
    fn from(own: &config::meta::ErrorResponse) -> Self {
        match own {
            config::meta::ErrorResponse::Text(text) => Self { text: text.as_str().into(), json: false },
            config::meta::ErrorResponse::Json(object) => {
                Self { text: Value::Object(object.clone()).to_string().into(), json: true }
            }
        }
    }
}

/// One plugin of one object, built.
pub struct Instance {
    /// The plugin's name.
    pub name: &'static str,
    /// Its place in the order: `_meta.priority` or the plugin's own.
    pub priority: i32,
    /// Where it was configured: `routes/1`.
    pub source: Source,
    /// `_meta.filter`: it takes no part in requests for which this is false.
    pub filter: Option<Expr>,
    /// `_meta.error_response`.
    pub error_response: Option<ErrorResponse>,
    /// Its phases.
    pub hooks: Hooks,
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({}) of {}", self.name, self.priority, self.source.0)
    }
}

/// A phase's list: the index of the instance, and its part.
type List<T> = Box<[(u16, T)]>;

/// The plugins of a request, by phase and in order.
#[derive(Default)]
pub struct Plan {
    instances: Box<[Arc<Instance>]>,
    rewrite: List<Step>,
    /// The `rewrite` of what a consumer added; the other plugins have run theirs before the consumer was known.
    added_rewrite: List<Step>,
    access: List<Step>,
    around: List<Arc<dyn Surrounds>>,
    before_proxy: List<Arc<dyn BeforeProxy>>,
    response: List<Arc<dyn OnResponse>>,
    body: List<Arc<dyn OnBody>>,
    encode: List<Arc<dyn Encode>>,
    hide: List<Arc<dyn Hide>>,
    log: List<Arc<dyn OnLog>>,
    filtered: bool,
    reads_head: bool,
    /// Plugins that take part in some phase, by name.
    active: Box<[&'static str]>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.instances.iter()).finish()
    }
}

fn list<T: Clone>(instances: &[Arc<Instance>], part: impl Fn(&Hooks) -> &[T]) -> List<T> {
    instances
        .iter()
        .enumerate()
        .flat_map(|(index, instance)| {
            part(&instance.hooks).iter().map(move |step| (index as u16, step.clone()))
        })
        .collect()
}

impl Plan {
    /// Orders `instances` by priority, highest first, then by name.
    pub fn new(mut instances: Vec<Arc<Instance>>) -> Self {
        instances.sort_by(|a, b| b.priority.cmp(&a.priority).then(a.name.cmp(b.name)));
        // Far above any real list; the index of an instance is 16 bits wide.
        instances.truncate(usize::from(u16::MAX));
        Self {
            rewrite: list(&instances, |hooks| &hooks.rewrite),
            added_rewrite: Box::default(),
            access: list(&instances, |hooks| &hooks.access),
            around: list(&instances, |hooks| &hooks.around),
            before_proxy: list(&instances, |hooks| &hooks.before_proxy),
            response: list(&instances, |hooks| &hooks.response),
            body: list(&instances, |hooks| &hooks.body),
            encode: list(&instances, |hooks| &hooks.encode),
            hide: list(&instances, |hooks| &hooks.hide),
            log: list(&instances, |hooks| &hooks.log),
            filtered: instances.iter().any(|instance| instance.filter.is_some()),
            reads_head: instances
                .iter()
                .any(|instance| instance.hooks.log.iter().any(|step| step.reads_head())),
            active: instances.iter().filter(|i| !i.hooks.is_empty()).map(|i| i.name).collect(),
            instances: instances.into(),
        }
    }

    /// This plan with a consumer's plugins: each replaces the one of the same name, and the `rewrite` of those that
    /// are not already here will still run.
    pub fn with_consumer(&self, consumer: &Consumer) -> Self {
        let theirs = &consumer.plugins;
        let mut all: Vec<_> = theirs.to_vec();
        all.extend(self.instances.iter().filter(|mine| theirs.iter().all(|t| t.name != mine.name)).cloned());
        let mut plan = Self::new(all);
        plan.added_rewrite = plan
            .rewrite
            .iter()
            .filter(|(index, _)| {
                plan.instance(*index).is_some_and(|i| self.instances.iter().all(|mine| mine.name != i.name))
            })
            .cloned()
            .collect();
        plan
    }

    /// The plugins in order.
    pub fn instances(&self) -> &[Arc<Instance>] {
        &self.instances
    }

    fn instance(&self, index: u16) -> Option<&Arc<Instance>> {
        self.instances.get(usize::from(index))
    }

    fn surrounds(&self, x: &mut Exchange, all: &mut Surrounding) {
        for (owner, step) in &self.around {
            if self.takes_part(*owner, x) {
                all.push(step.clone());
            }
        }
    }

    /// True when a plugin has answered.
    fn before_proxy(&self, x: &mut Exchange) -> bool {
        self.before_proxy.iter().any(|(owner, step)| {
            if !self.takes_part(*owner, x) {
                return false;
            }
            match (step.before_proxy(x), self.instance(*owner)) {
                (Flow::Reply(response), Some(instance)) => {
                    replied(x, instance, response);
                    true
                }
                _ => false,
            }
        })
    }

    fn hides(&self, x: &mut Exchange) {
        for (owner, step) in &self.hide {
            if self.takes_part(*owner, x) {
                step.hide(x);
            }
        }
    }

    /// Whether the plugin takes part in this request: `_meta.filter`, asked once a request.
    fn takes_part(&self, index: u16, x: &mut Exchange) -> bool {
        if !self.filtered {
            return true;
        }
        let Some(instance) = self.instance(index) else { return false };
        let Some(filter) = &instance.filter else { return true };
        let id = Arc::as_ptr(instance) as usize;
        if let Some((_, verdict)) = x.slot::<Verdicts>().and_then(|v| v.0.iter().find(|(i, _)| *i == id)) {
            return *verdict;
        }
        let verdict = filter.eval(&**x);
        if let Some(verdicts) = x.slot_mut::<Verdicts>() {
            verdicts.0.push((id, verdict));
        }
        verdict
    }
}

/// What `_meta.filter` said for this request, by instance.
#[derive(Default)]
struct Verdicts(SmallVec<[(usize, bool); 4]>);

/// The request phases, in the order in which they run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    GlobalRewrite,
    Rewrite,
    AddedRewrite,
    GlobalAccess,
    Access,
}

#[derive(Clone, Copy)]
struct Cursor {
    stage: Stage,
    index: usize,
}

enum Progress {
    Forward,
    Replied,
    Waits(Arc<Instance>, Arc<dyn Waits>),
}

/// The plan of a route if it has one, the consumer, and the two merged.
type MergedPlan = (Option<Arc<Plan>>, Arc<Consumer>, Arc<Plan>);

/// Merged plans of routes and consumers, kept by each worker. Bounded: when full it starts again.
#[derive(Default)]
struct Merged(HashMap<(usize, usize), MergedPlan>);

const MERGED_LIMIT: usize = 4096;

impl Merged {
    fn plan(&mut self, base: Option<Arc<Plan>>, consumer: &Arc<Consumer>) -> Arc<Plan> {
        // The entry holds both, so their addresses cannot be taken by others while it stands.
        let key =
            (base.as_ref().map_or(0, |base| Arc::as_ptr(base) as usize), Arc::as_ptr(consumer) as usize);
        if let Some((_, _, merged)) = self.0.get(&key) {
            return merged.clone();
        }
        if self.0.len() >= MERGED_LIMIT {
            self.0.clear();
        }
        let merged = Arc::new(base.as_deref().unwrap_or(&Plan::default()).with_consumer(consumer));
        self.0.insert(key, (base, consumer.clone(), merged.clone()));
        merged
    }
}

/// Runs the plugins of a request around the inner service.
#[derive(Clone)]
pub struct PluginChain<S> {
    inner: S,
    merged: Rc<RefCell<Merged>>,
}

impl<S> PluginChain<S> {
    /// Around `inner`, which forwards the request.
    pub fn new(inner: S) -> Self {
        Self { inner, merged: Rc::default() }
    }

    /// Runs steps until one waits, one answers, or all are done.
    fn advance(merged: &RefCell<Merged>, x: &mut Exchange, cursor: &mut Cursor) -> Progress {
        loop {
            let global = matches!(cursor.stage, Stage::GlobalRewrite | Stage::GlobalAccess);
            // Taken and put back: a clone would touch a counter that all workers share.
            let plan = if global { x.global_plan.take() } else { x.plan.take() };
            let progress = plan.as_ref().and_then(|plan| {
                let steps = match cursor.stage {
                    Stage::GlobalRewrite | Stage::Rewrite => &plan.rewrite,
                    Stage::AddedRewrite => &plan.added_rewrite,
                    Stage::GlobalAccess | Stage::Access => &plan.access,
                };
                run_steps(plan, steps, x, &mut cursor.index)
            });
            if global {
                x.global_plan = plan;
            } else {
                x.plan = plan;
            }
            if let Some(progress) = progress {
                return progress;
            }
            cursor.index = 0;
            cursor.stage = match cursor.stage {
                Stage::GlobalRewrite => Stage::Rewrite,
                Stage::Rewrite => {
                    if let Err(error) = add_consumer(merged, x) {
                        rescue::rescue(x, error);
                        return Progress::Replied;
                    }
                    Stage::AddedRewrite
                }
                Stage::AddedRewrite => Stage::GlobalAccess,
                Stage::GlobalAccess => Stage::Access,
                Stage::Access => return Progress::Forward,
            };
        }
    }
}

/// Merges what the recognised consumer adds.
fn add_consumer(merged: &RefCell<Merged>, x: &mut Exchange) -> Result<(), Error> {
    let Some(consumer) = x.consumer.clone() else { return Ok(()) };
    if let Some(why) = &consumer.refused {
        return Err(Error::new(Reason::ConsumerRefused).detail(why.to_string()));
    }
    if !consumer.plugins.is_empty() {
        let base = x.plan.take();
        x.plan = Some(merged.borrow_mut().plan(base, &consumer));
    }
    Ok(())
}

fn run_steps(plan: &Plan, steps: &[(u16, Step)], x: &mut Exchange, index: &mut usize) -> Option<Progress> {
    while let Some((owner, step)) = steps.get(*index) {
        *index += 1;
        if !plan.takes_part(*owner, x) {
            continue;
        }
        let instance = plan.instance(*owner)?;
        match step {
            Step::Waits(step) => return Some(Progress::Waits(instance.clone(), step.clone())),
            Step::Now(step) => {
                if let Flow::Reply(response) = step.run(x) {
                    replied(x, instance, response);
                    return Some(Progress::Replied);
                }
            }
        }
    }
    None
}

/// A plugin answered: notes who, and puts `_meta.error_response` in place of a refusal's body.
fn replied(x: &mut Exchange, by: &Instance, mut response: http::Response<Body>) {
    if let Some(own) = &by.error_response
        && response.status().as_u16() >= 400
    {
        *response.body_mut() = Body::from(own.text.to_string());
        let kind = if own.json { "application/json" } else { "text/plain; charset=utf-8" };
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    x.reply(response, Reason::Plugin);
    x.error = Some(Box::new(Error::new(Reason::Plugin).detail(by.name)));
}

/// The plugins around the upstream call, the innermost first.
fn surrounding(x: &mut Exchange) -> Surrounding {
    let mut all = Surrounding::new();
    for global in [true, false] {
        let plan = if global { &mut x.global_plan } else { &mut x.plan };
        if plan.as_ref().is_none_or(|plan| plan.around.is_empty()) {
            continue;
        }
        let plan = plan.take();
        if let Some(plan) = &plan {
            plan.surrounds(x, &mut all);
        }
        if global {
            x.global_plan = plan;
        } else {
            x.plan = plan;
        }
    }
    all
}

/// Runs `before_proxy` of all plugins. True when one of them has answered; the upstream is then not asked.
pub fn before_proxy(x: &mut Exchange) -> bool {
    if x.with_layered(|plans, x| plans.iter().any(|plan| plan.before_proxy(x))) == Some(true) {
        return true;
    }
    for global in [true, false] {
        let plan = if global { x.global_plan.take() } else { x.plan.take() };
        let answered = plan.as_ref().is_some_and(|plan| plan.before_proxy(x));
        if global {
            x.global_plan = plan;
        } else {
            x.plan = plan;
        }
        if answered {
            return true;
        }
    }
    false
}

/// Runs the response and body phases on the answer.
fn respond(x: &mut Exchange) {
    let plans = [x.global_plan.take(), x.plan.take()];
    answer_passes(x, &[plans[0].as_deref(), plans[1].as_deref()]);
    let [global, route] = plans;
    x.global_plan = global;
    x.plan = route;
}

/// Runs the response, body and encode phases of these plans on the answer.
fn answer_passes(x: &mut Exchange, plans: &[Option<&Plan>]) {
    // An upstream that was asked has said so already.
    x.responded.get_or_insert_with(std::time::Instant::now);
    let early = std::mem::take(&mut x.response_headers);
    for (name, value) in early {
        x.response.headers_mut().insert(name, value);
    }
    rescue::proxy_status(x);
    for plan in plans.iter().flatten() {
        x.keeps_head |= plan.reads_head;
        for (owner, step) in &plan.response {
            if plan.takes_part(*owner, x) {
                step.response(x);
            }
        }
    }
    for plan in plans.iter().flatten() {
        for (owner, step) in &plan.body {
            if plan.takes_part(*owner, x)
                && let Some(filter) = step.body(x)
            {
                if !filter.only_watches() {
                    // The length that was announced is not the length any more.
                    x.response.headers_mut().remove(header::CONTENT_LENGTH);
                }
                let body = std::mem::take(x.response.body_mut());
                *x.response.body_mut() = body.filtered(filter);
            }
        }
    }
    for plan in plans.iter().flatten() {
        for (owner, step) in &plan.encode {
            if plan.takes_part(*owner, x) {
                step.encode(x);
            }
        }
    }
}

/// Runs the log phase. Called when the exchange is over.
pub(crate) fn log(x: &mut Exchange) {
    hide(x);
    for global in [true, false] {
        // Only the plan that runs is taken out: a global plugin may look whether the route has it too.
        let plan = if global { x.global_plan.take() } else { x.plan.take() };
        for (plan, (owner, step)) in
            plan.iter().flat_map(|plan| plan.log.iter().map(move |step| (plan, step)))
        {
            if plan.takes_part(*owner, x) {
                step.log(x);
            }
        }
        if global {
            x.global_plan = plan;
        } else {
            x.plan = plan;
        }
    }
    x.with_layered(|plans, x| {
        for (plan, (owner, step)) in
            plans.iter().flat_map(|plan| plan.log.iter().map(move |step| (plan, step)))
        {
            if plan.takes_part(*owner, x) {
                step.log(x);
            }
        }
    });
}

/// Takes out of the request what no log may tell.
fn hide(x: &mut Exchange) {
    x.with_layered(|plans, x| plans.iter().for_each(|plan| plan.hides(x)));
    let hides = |plan: &Option<Arc<Plan>>| plan.as_ref().is_some_and(|plan| !plan.hide.is_empty());
    if !hides(&x.global_plan) && !hides(&x.plan) {
        return;
    }
    let plans = [x.global_plan.take(), x.plan.take()];
    plans.iter().flatten().for_each(|plan| plan.hides(x));
    let [global, route] = plans;
    x.global_plan = global;
    x.plan = route;
}

/// The way through `surrounding` to `inner` and back.
pub(crate) fn next<S>(surrounding: Surrounding, mut inner: S) -> Next
where
    S: Service<Exchange, Response = Exchange, Error = Fault> + 'static,
{
    Next { inside: surrounding, forward: Box::new(move |x| Box::pin(inner.call(x))) }
}

fn finish(result: Result<Exchange, Fault>) -> Exchange {
    let mut x = answered(result);
    respond(&mut x);
    x
}

/// The exchange with its answer, whatever became of it.
fn answered(result: Result<Exchange, Fault>) -> Exchange {
    result.unwrap_or_else(|Fault { mut exchange, error }| {
        rescue::rescue(&mut exchange, error);
        exchange
    })
}

/// The request phases of one plan as a layer runs them: all of `rewrite`, then all of `access`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Walk {
    rewritten: bool,
    index: usize,
}

/// How far [`Walk::on`] came.
pub(crate) enum Walked {
    /// The request goes on; these surround it.
    On(Surrounding),
    /// A plugin has answered.
    Replied,
    /// A step has to be waited for.
    Waits(Arc<Instance>, Arc<dyn Waits>),
}

impl Walk {
    /// Runs steps until one waits, one answers, or all are done.
    pub(crate) fn on(&mut self, plan: &Plan, x: &mut Exchange) -> Walked {
        loop {
            let steps = if self.rewritten { &plan.access } else { &plan.rewrite };
            match run_steps(plan, steps, x, &mut self.index) {
                Some(Progress::Waits(instance, step)) => return Walked::Waits(instance, step),
                Some(_) => return Walked::Replied,
                None if self.rewritten => break,
                None => *self = Self { rewritten: true, index: 0 },
            }
        }
        let mut surrounding = Surrounding::new();
        plan.surrounds(x, &mut surrounding);
        Walked::On(surrounding)
    }

    /// Runs a step that waits. True when it has answered.
    pub(crate) async fn wait(x: &mut Exchange, instance: &Instance, step: &dyn Waits) -> bool {
        match step.run(x).await {
            Flow::Reply(response) => {
                replied(x, instance, response);
                true
            }
            Flow::Next => false,
        }
    }
}

/// Settles the answer of a plan that a layer runs.
pub(crate) fn settle_layer(plan: &Plan, result: Result<Exchange, Fault>) -> Exchange {
    let mut x = answered(result);
    answer_passes(&mut x, &[Some(plan)]);
    x
}

impl<S> Service<Exchange> for PluginChain<S>
where
    S: Service<Exchange, Response = Exchange, Error = Fault> + Clone + 'static,
{
    type Response = Exchange;
    type Error = Fault;
    type Future = ChainFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        let mut cursor = Cursor { stage: Stage::GlobalRewrite, index: 0 };
        match Self::advance(&self.merged, &mut x, &mut cursor) {
            Progress::Forward if x.answered == Answered::No => {
                let surrounding = surrounding(&mut x);
                if surrounding.is_empty() {
                    ChainFuture::Forward { future: self.inner.call(x) }
                } else {
                    ChainFuture::Waits { future: next(surrounding, self.inner.clone()).run(x) }
                }
            }
            Progress::Forward | Progress::Replied => ChainFuture::Replied { exchange: Some(x) },
            Progress::Waits(instance, step) => {
                let mut inner = self.inner.clone();
                let merged = self.merged.clone();
                ChainFuture::Waits {
                    future: Box::pin(async move {
                        let mut waits = (instance, step);
                        loop {
                            let (instance, step) = waits;
                            if let Flow::Reply(response) = step.run(&mut x).await {
                                replied(&mut x, &instance, response);
                                return Ok(x);
                            }
                            match Self::advance(&merged, &mut x, &mut cursor) {
                                Progress::Forward if x.answered == Answered::No => {
                                    let surrounding = surrounding(&mut x);
                                    if surrounding.is_empty() {
                                        return inner.call(x).await;
                                    }
                                    return next(surrounding, inner).run(x).await;
                                }
                                Progress::Forward | Progress::Replied => return Ok(x),
                                Progress::Waits(instance, step) => waits = (instance, step),
                            }
                        }
                    }),
                }
            }
        }
    }
}

pin_project! {
    /// The future of [`PluginChain`].
    #[project = ChainProjection]
    pub enum ChainFuture<F> {
        /// A plugin answered at once.
        Replied { exchange: Option<Exchange> },
        /// No plugin waits; the inner service is at work.
        Forward { #[pin] future: F },
        /// A plugin waits.
        Waits { #[pin] future: LocalBox<'static, Result<Exchange, Fault>> },
    }
}

impl<F: Future<Output = Result<Exchange, Fault>>> Future for ChainFuture<F> {
    type Output = Result<Exchange, Fault>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = match self.project() {
            // Polled after its end: pending for ever is what a finished future may do without a panic.
            ChainProjection::Replied { exchange } => match exchange.take() {
                Some(x) => Ok(x),
                None => return Poll::Pending,
            },
            ChainProjection::Forward { future } => ready!(future.poll(cx)),
            ChainProjection::Waits { future } => ready!(future.poll(cx)),
        };
        Poll::Ready(Ok(finish(result)))
    }
}

impl State {
    /// The name of the plugin that answered, if one did.
    pub fn answered_by_plugin(&self) -> Option<&str> {
        self.error.as_ref().filter(|error| error.reason() == Reason::Plugin)?.detail_text()
    }

    /// Whether the route has this plugin and runs it: some plugins of global rules give way to it then.
    pub fn route_runs(&self, plugin: &str) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.active.contains(&plugin))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http::StatusCode;
    use serde_json::json;

    use super::*;
    use crate::plugin::{
        Access, AccessWaits, Around, BeforeProxy, OnBody, OnLog, OnResponse, Rewrite, RewriteWaits,
    };
    use crate::testing::{exchange, field, service, text};

    type Diary = Arc<Mutex<Vec<String>>>;

    /// Writes down which phase of it runs.
    struct Diarist {
        name: &'static str,
        diary: Diary,
        refuses: bool,
        authenticates: Option<Arc<Consumer>>,
    }

    impl Diarist {
        fn note(&self, phase: &str) {
            self.diary.lock().unwrap().push(format!("{phase} {}", self.name));
        }
    }

    impl Rewrite for Diarist {
        fn rewrite(&self, x: &mut Exchange) -> Flow {
            self.note("rewrite");
            if self.authenticates.is_some() {
                x.consumer = self.authenticates.clone();
            }
            Flow::Next
        }
    }

    impl RewriteWaits for Diarist {
        async fn rewrite(&self, _: &mut Exchange) -> Flow {
            tokio::task::yield_now().await;
            self.note("rewrite");
            Flow::Next
        }
    }

    impl Access for Diarist {
        fn access(&self, _: &mut Exchange) -> Flow {
            self.note("access");
            if self.refuses { Flow::message(StatusCode::FORBIDDEN, "no") } else { Flow::Next }
        }
    }

    impl AccessWaits for Diarist {
        async fn access(&self, x: &mut Exchange) -> Flow {
            tokio::task::yield_now().await;
            Access::access(self, x)
        }
    }

    impl Around for Diarist {
        async fn around(&self, mut x: Exchange, next: Next) -> Result<Exchange, Fault> {
            self.note("before the upstream");
            if x.request.headers.contains_key("x-answer") {
                x.response = http::Response::new(Body::from("kept"));
                x.answered = Answered::Upstream;
                return Ok(x);
            }
            let result = next.run(x).await;
            self.note(if result.is_ok() { "after the upstream" } else { "after a failure" });
            result
        }
    }

    impl Encode for Diarist {
        fn encode(&self, _: &mut Exchange) {
            self.note("encode");
        }
    }

    impl BeforeProxy for Diarist {
        fn before_proxy(&self, _: &mut Exchange) -> Flow {
            self.note("before_proxy");
            Flow::Next
        }
    }

    impl OnResponse for Diarist {
        fn response(&self, _: &mut Exchange) {
            self.note("response");
        }
    }

    impl OnBody for Diarist {
        fn body(&self, _: &mut Exchange) -> Option<Box<dyn crate::body::BodyFilter>> {
            self.note("body");
            None
        }
    }

    impl OnLog for Diarist {
        fn log(&self, _: &Exchange) {
            self.note("log");
        }
    }

    #[derive(Default)]
    struct Traits {
        waits: bool,
        refuses: bool,
        authenticates: Option<Arc<Consumer>>,
        filter: Option<Value>,
        error_response: Option<Value>,
    }

    fn diarist(diary: &Diary, name: &'static str, priority: i32, traits: Traits) -> Arc<Instance> {
        let plugin = Arc::new(Diarist {
            name,
            diary: diary.clone(),
            refuses: traits.refuses,
            authenticates: traits.authenticates,
        });
        let mut hooks = Hooks::default();
        if traits.waits {
            hooks.rewrite_waits(&plugin);
            hooks.access_waits(&plugin);
        } else {
            hooks.rewrite(&plugin);
            hooks.access(&plugin);
        }
        hooks.before_proxy(&plugin);
        hooks.response(&plugin);
        hooks.body(&plugin);
        hooks.log(&plugin);
        Arc::new(Instance {
            name,
            priority,
            source: Source("routes/1".into()),
            filter: traits.filter.map(|filter| Expr::parse(&filter).unwrap()),
            error_response: traits.error_response.as_ref().map(|own| {
                ErrorResponse::from(
                    &serde_json::from_value::<config::meta::ErrorResponse>(own.clone()).unwrap(),
                )
            }),
            hooks,
        })
    }

    fn plain(diary: &Diary, name: &'static str, priority: i32) -> Arc<Instance> {
        diarist(diary, name, priority, Traits::default())
    }

    fn consumer(plugins: Vec<Arc<Instance>>) -> Arc<Consumer> {
        Arc::new(Consumer { plugins: plugins.into(), ..Consumer::new("jack") })
    }

    async fn run(global: Vec<Arc<Instance>>, route: Vec<Arc<Instance>>) -> Exchange {
        let mut x = exchange("GET", "http://a/x?skip=yes").build();
        x.global_plan = Some(Arc::new(Plan::new(global)));
        x.plan = Some(Arc::new(Plan::new(route)));
        let mut chain = PluginChain::new(service(|x| {
            before_proxy(x);
            Ok(())
        }));
        chain.call(x).await.unwrap()
    }

    fn told(diary: &Diary) -> Vec<String> {
        std::mem::take(&mut diary.lock().unwrap())
    }

    #[tokio::test]
    async fn each_phase_runs_over_all_plugins_global_ones_first_and_the_response_in_the_same_order() {
        let diary = Diary::default();
        let x =
            run(vec![plain(&diary, "global", 1)], vec![plain(&diary, "low", 10), plain(&diary, "high", 20)])
                .await;
        let phases = ["rewrite", "access", "before_proxy", "response", "body"];
        let expected: Vec<_> = phases
            .iter()
            .flat_map(|phase| ["global", "high", "low"].map(|name| format!("{phase} {name}")))
            .collect();
        assert_eq!(told(&diary), expected);
        drop(x);
        assert_eq!(told(&diary), ["log global", "log high", "log low"]);
    }

    #[tokio::test]
    async fn what_is_hidden_is_hidden_from_the_log_of_every_plugin() {
        struct Hides;
        impl Hide for Hides {
            fn hide(&self, x: &mut Exchange) {
                x.request.headers.remove("x-secret");
            }
        }
        struct Logs(Diary);
        impl OnLog for Logs {
            fn log(&self, x: &Exchange) {
                self.0.lock().unwrap().push(format!("{}", x.request.headers.contains_key("x-secret")));
            }
        }
        let diary = Diary::default();
        let mut high = diarist(&diary, "high", 30, Traits::default());
        let mut low = diarist(&diary, "low", 20, Traits::default());
        Arc::get_mut(&mut high).unwrap().hooks = Hooks::default();
        Arc::get_mut(&mut high).unwrap().hooks.log(&Arc::new(Logs(diary.clone())));
        Arc::get_mut(&mut low).unwrap().hooks = Hooks::default();
        Arc::get_mut(&mut low).unwrap().hooks.hide(&Arc::new(Hides));
        let mut x = exchange("GET", "http://a/").header("x-secret", "1").build();
        x.plan = Some(Arc::new(Plan::new(vec![high, low])));
        let x = PluginChain::new(service(|_| Ok(()))).call(x).await.unwrap();
        assert!(x.request.headers.contains_key("x-secret"), "not before it is over");
        drop(x);
        assert_eq!(told(&diary), ["false"]);
    }

    #[tokio::test]
    async fn a_step_that_waits_changes_no_order() {
        let diary = Diary::default();
        let waits = || Traits { waits: true, ..Traits::default() };
        let route = vec![plain(&diary, "a", 30), diarist(&diary, "b", 20, waits()), plain(&diary, "c", 10)];
        run(vec![diarist(&diary, "global", 1, waits())], route).await;
        let told = told(&diary);
        let requests: Vec<_> = told.iter().take(8).map(String::as_str).collect();
        assert_eq!(
            requests,
            [
                "rewrite global",
                "rewrite a",
                "rewrite b",
                "rewrite c",
                "access global",
                "access a",
                "access b",
                "access c"
            ]
        );
    }

    #[tokio::test]
    async fn a_refusal_skips_the_upstream_but_not_the_response_and_log_phases() {
        let diary = Diary::default();
        let refuses = Traits { refuses: true, ..Traits::default() };
        let x = run(vec![], vec![diarist(&diary, "guard", 20, refuses), plain(&diary, "other", 10)]).await;
        assert_eq!(x.status(), 403);
        assert_eq!(field(&x, "proxy-status"), "postern; error=http_request_denied; details=\"plugin:guard\"");
        drop(x);
        assert_eq!(
            told(&diary),
            [
                "rewrite guard",
                "rewrite other",
                "access guard",
                "response guard",
                "response other",
                "body guard",
                "body other",
                "log guard",
                "log other"
            ]
        );
    }

    #[tokio::test]
    async fn a_consumer_replaces_plugins_of_the_same_name_and_only_what_it_adds_is_rewritten_again() {
        let diary = Diary::default();
        let theirs = Traits { waits: true, ..Traits::default() };
        let consumer = consumer(vec![plain(&diary, "limit", 10), diarist(&diary, "extra", 5, theirs)]);
        let auth = Traits { authenticates: Some(consumer), ..Traits::default() };
        let route = vec![diarist(&diary, "auth", 30, auth), plain(&diary, "limit", 10)];
        run(vec![], route).await;
        let told = told(&diary);
        let requests: Vec<_> = told.iter().take(6).map(String::as_str).collect();
        assert_eq!(
            requests,
            ["rewrite auth", "rewrite limit", "rewrite extra", "access auth", "access limit", "access extra"]
        );
    }

    #[tokio::test]
    async fn a_filter_that_is_false_takes_the_plugin_out_of_every_phase() {
        let diary = Diary::default();
        let filter = Traits { filter: Some(json!([["arg_skip", "==", "no"]])), ..Traits::default() };
        drop(run(vec![], vec![diarist(&diary, "filtered", 20, filter), plain(&diary, "other", 10)]).await);
        assert!(told(&diary).iter().all(|line| line.ends_with("other")));
    }

    fn surrounds(diary: &Diary, name: &'static str, priority: i32, waits: bool) -> Arc<Instance> {
        let plugin = Arc::new(Diarist { name, diary: diary.clone(), refuses: false, authenticates: None });
        let mut hooks = Hooks::default();
        if waits {
            hooks.access_waits(&plugin);
        }
        hooks.around(&plugin);
        hooks.response(&plugin);
        hooks.encode(&plugin);
        Arc::new(Instance {
            name,
            priority,
            source: Source("routes/1".into()),
            filter: None,
            error_response: None,
            hooks,
        })
    }

    #[tokio::test]
    async fn plugins_around_the_upstream_pass_the_answer_on_in_the_order_of_responses() {
        for waits in [false, true] {
            let diary = Diary::default();
            let route = vec![surrounds(&diary, "high", 20, waits), surrounds(&diary, "low", 10, waits)];
            let x = run(vec![surrounds(&diary, "global", 1, waits)], route).await;
            assert_eq!(x.answered, Answered::Upstream);
            let told: Vec<_> = told(&diary).into_iter().filter(|line| !line.starts_with("access")).collect();
            assert_eq!(
                told,
                [
                    "before the upstream low",
                    "before the upstream high",
                    "before the upstream global",
                    "after the upstream global",
                    "after the upstream high",
                    "after the upstream low",
                    "response global",
                    "response high",
                    "response low",
                    "encode global",
                    "encode high",
                    "encode low",
                ]
            );
        }
    }

    #[tokio::test]
    async fn a_plugin_around_the_upstream_may_answer_in_its_place_and_sees_its_failure() {
        let diary = Diary::default();
        let plan = Arc::new(Plan::new(vec![surrounds(&diary, "cache", 1, false)]));
        let mut chain = PluginChain::new(service(|_| Err(Error::new(Reason::ConnectFailed))));
        let mut x = exchange("GET", "http://a/").header("x-answer", "1").build();
        x.plan = Some(plan.clone());
        let mut x = chain.call(x).await.unwrap();
        assert_eq!((x.status(), &*text(&mut x).await), (200, "kept"));
        assert_eq!(told(&diary), ["before the upstream cache", "response cache", "encode cache"]);
        let mut x = exchange("GET", "http://a/").build();
        x.plan = Some(plan);
        assert_eq!(chain.call(x).await.unwrap().status(), 502);
        assert!(told(&diary).contains(&"after a failure cache".to_owned()));
    }

    #[tokio::test]
    async fn the_upstream_is_not_surrounded_when_a_plugin_has_answered() {
        let diary = Diary::default();
        let refuses = Traits { refuses: true, ..Traits::default() };
        let route = vec![surrounds(&diary, "cache", 10, false), diarist(&diary, "guard", 20, refuses)];
        assert_eq!(run(vec![], route).await.status(), 403);
        assert!(!told(&diary).contains(&"before the upstream cache".to_owned()));
    }

    #[tokio::test]
    async fn the_configured_error_response_stands_in_place_of_a_refusal() {
        for (configured, kind, expected) in [
            (json!({"code": 7}), "application/json", "{\"code\":7}"),
            (json!("go away"), "text/plain; charset=utf-8", "go away"),
        ] {
            let diary = Diary::default();
            let traits = Traits { refuses: true, error_response: Some(configured), ..Traits::default() };
            let mut x = run(vec![], vec![diarist(&diary, "guard", 20, traits)]).await;
            assert_eq!((x.status(), field(&x, "content-type")), (403, kind));
            assert_eq!(text(&mut x).await, expected);
        }
    }

    #[tokio::test]
    async fn a_failure_of_the_upstream_is_answered_and_passes_the_response_phases() {
        let diary = Diary::default();
        let mut x = exchange("GET", "http://a/").build();
        x.plan = Some(Arc::new(Plan::new(vec![plain(&diary, "other", 1)])));
        let mut chain = PluginChain::new(service(|_| Err(Error::new(Reason::ConnectFailed))));
        let x = chain.call(x).await.unwrap();
        assert_eq!(x.status(), 502);
        assert_eq!(
            field(&x, "proxy-status"),
            "postern; error=connection_refused; details=\"connect_failed\""
        );
        assert!(told(&diary).contains(&"response other".to_owned()));
    }
}
