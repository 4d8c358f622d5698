//! One plugin as an ordinary tower layer, for stacks whose list of plugins is fixed.
//!
//! Its phases run as in the [chain](crate::chain): `rewrite`, then `access`, then what surrounds the upstream call; on the
//! way back `response`, `body` and `encode` of the answer, the upstream's or our own; `before_proxy` when a node is
//! chosen; `log` when all is over. Among several such layers answers pass the innermost first, as in every onion, and a
//! plugin of one has finished `access` before the next begins to rewrite. Where the order of phases over several plugins
//! matters, or the list changes while the stack stands (the plugins of a service of a sidecar), a
//! [`Plan`] on the exchange and a [`PluginChain`](crate::chain::PluginChain) are the means.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use config::error::ConfigError;
use config::id::ResourceKey;
use pin_project_lite::pin_project;
use serde_json::Value;
use tower::{Layer, Service};

use crate::assembly::Assembly;
use crate::chain::{Instance, Plan, Source, Walk, Walked, next, settle_layer};
use crate::error::Fault;
use crate::exchange::Exchange;
use crate::local::LocalBox;
use crate::plugin::Upstreams;
use crate::stack::HttpService;

/// Makes [`PluginService`].
#[derive(Clone)]
pub struct PluginLayer(Arc<Plan>);

impl PluginLayer {
    /// Of a plugin that was built.
    pub fn new(instance: Arc<Instance>) -> Self {
        Self(Arc::new(Plan::new(vec![instance])))
    }

    /// Builds the plugin of that name with the JSON that a route would have. Needs the control runtime around it.
    ///
    /// # Errors
    /// There is no such plugin, or the settings cannot work, with pointers into them.
    pub fn build(
        assembly: &Assembly<'_>,
        owner: &ResourceKey,
        name: &str,
        settings: &Value,
        upstreams: &dyn Upstreams,
    ) -> Result<Self, Vec<ConfigError>> {
        let source = Source(owner.to_string().into());
        match assembly.one(owner, &source, name, settings, upstreams)? {
            Some(instance) => Ok(Self::new(instance)),
            None => Err(vec![ConfigError::new(
                "",
                config::ErrorKind::UnknownPlugin { name: name.to_owned(), advice: None },
            )]),
        }
    }
}

impl<S> Layer<S> for PluginLayer {
    type Service = PluginService<S>;

    fn layer(&self, inner: S) -> PluginService<S> {
        PluginService { inner, plan: self.0.clone() }
    }
}

/// Runs one plugin around the inner service.
#[derive(Clone)]
pub struct PluginService<S> {
    inner: S,
    plan: Arc<Plan>,
}

impl<S: HttpService> Service<Exchange> for PluginService<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = PluginFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        let plan = self.plan.clone();
        x.add_layered(plan.clone());
        let mut walk = Walk::default();
        let state = match walk.on(&plan, &mut x) {
            Walked::Replied => Running::Replied { exchange: Some(x) },
            Walked::On(surrounding) if surrounding.is_empty() => {
                Running::Inner { future: self.inner.call(x) }
            }
            Walked::On(surrounding) => {
                Running::Boxed { future: next(surrounding, self.inner.clone()).run(x) }
            }
            Walked::Waits(instance, step) => {
                let (mut inner, plan) = (self.inner.clone(), plan.clone());
                Running::Boxed {
                    future: Box::pin(async move {
                        let mut waits = (instance, step);
                        loop {
                            let (instance, step) = waits;
                            if Walk::wait(&mut x, &instance, &*step).await {
                                return Ok(x);
                            }
                            match walk.on(&plan, &mut x) {
                                Walked::Replied => return Ok(x),
                                Walked::On(surrounding) if surrounding.is_empty() => {
                                    return inner.call(x).await;
                                }
                                Walked::On(surrounding) => return next(surrounding, inner).run(x).await,
                                Walked::Waits(instance, step) => waits = (instance, step),
                            }
                        }
                    }),
                }
            }
        };
        PluginFuture { plan, state }
    }
}

pin_project! {
    /// The future of [`PluginService`].
    pub struct PluginFuture<F> {
        plan: Arc<Plan>,
        #[pin]
        state: Running<F>,
    }
}

pin_project! {
    #[project = RunningProjection]
    enum Running<F> {
        Replied { exchange: Option<Exchange> },
        Inner { #[pin] future: F },
        Boxed { #[pin] future: LocalBox<'static, Result<Exchange, Fault>> },
    }
}

impl<F: Future<Output = Result<Exchange, Fault>>> Future for PluginFuture<F> {
    type Output = Result<Exchange, Fault>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = match this.state.project() {
            // Polled after its end: pending for ever is what a finished future may do without a panic.
            RunningProjection::Replied { exchange } => match exchange.take() {
                Some(x) => Ok(x),
                None => return Poll::Pending,
            },
            RunningProjection::Inner { future } => ready!(future.poll(cx)),
            RunningProjection::Boxed { future } => ready!(future.poll(cx)),
        };
        Poll::Ready(Ok(settle_layer(this.plan, result)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http::StatusCode;

    use super::*;
    use crate::chain::before_proxy;
    use crate::error::{Error, Reason};
    use crate::exchange::Answered;
    use crate::plugin::{
        Access, AccessWaits, Around, BeforeProxy, Encode, Flow, Hooks, Next, OnLog, OnResponse, Rewrite,
        RewriteWaits,
    };
    use crate::stack::Stack;
    use crate::testing::{exchange, field, service};

    type Diary = Arc<Mutex<Vec<String>>>;

    struct Notes(&'static str, Diary);

    impl Notes {
        fn note(&self, phase: &str) {
            self.1.lock().unwrap().push(format!("{phase} {}", self.0));
        }

        fn flow(&self, x: &Exchange, phase: &str) -> Flow {
            self.note(phase);
            let refused =
                x.request.headers.get("x-refuse").is_some_and(|at| at == &*format!("{phase} {}", self.0));
            if refused { Flow::message(StatusCode::FORBIDDEN, "no") } else { Flow::Next }
        }
    }

    impl Rewrite for Notes {
        fn rewrite(&self, x: &mut Exchange) -> Flow {
            self.flow(x, "rewrite")
        }
    }

    impl RewriteWaits for Notes {
        async fn rewrite(&self, x: &mut Exchange) -> Flow {
            tokio::task::yield_now().await;
            self.flow(x, "rewrite")
        }
    }

    impl Access for Notes {
        fn access(&self, x: &mut Exchange) -> Flow {
            self.flow(x, "access")
        }
    }

    impl AccessWaits for Notes {
        async fn access(&self, x: &mut Exchange) -> Flow {
            tokio::task::yield_now().await;
            self.flow(x, "access")
        }
    }

    impl BeforeProxy for Notes {
        fn before_proxy(&self, x: &mut Exchange) -> Flow {
            self.flow(x, "before_proxy")
        }
    }

    impl Around for Notes {
        async fn around(&self, x: Exchange, next: Next) -> Result<Exchange, Fault> {
            self.note("into");
            let result = next.run(x).await;
            self.note("out of");
            result
        }
    }

    impl OnResponse for Notes {
        fn response(&self, _: &mut Exchange) {
            self.note("response");
        }
    }

    impl Encode for Notes {
        fn encode(&self, _: &mut Exchange) {
            self.note("encode");
        }
    }

    impl OnLog for Notes {
        fn log(&self, _: &Exchange) {
            self.note("log");
        }
    }

    fn layer(diary: &Diary, name: &'static str, waits: bool, around: bool) -> PluginLayer {
        let plugin = Arc::new(Notes(name, diary.clone()));
        let mut hooks = Hooks::default();
        if waits {
            hooks.rewrite_waits(&plugin);
            hooks.access_waits(&plugin);
        } else {
            hooks.rewrite(&plugin);
            hooks.access(&plugin);
        }
        if around {
            hooks.around(&plugin);
        }
        hooks.before_proxy(&plugin);
        hooks.response(&plugin);
        hooks.encode(&plugin);
        hooks.log(&plugin);
        PluginLayer::new(Arc::new(Instance {
            name,
            priority: 1,
            source: Source("services/1".into()),
            filter: None,
            error_response: None,
            hooks,
        }))
    }

    async fn run(diary: &Diary, waits: bool, around: bool, refuse: &str, fails: bool) -> (u16, String) {
        let mut stack = Stack::new()
            .push(layer(diary, "outer", waits, around))
            .push(layer(diary, "inner", !waits, false))
            .around(service(move |x| {
                if before_proxy(x) {
                    return Ok(());
                }
                if fails { Err(Error::new(Reason::ConnectFailed)) } else { Ok(()) }
            }));
        let x = exchange("GET", "http://a/").header("x-refuse", refuse).build();
        let x = stack.call(x).await.unwrap();
        let told = (x.status(), field(&x, "proxy-status").to_owned());
        drop(x);
        told
    }

    fn told(diary: &Diary) -> Vec<String> {
        std::mem::take(&mut diary.lock().unwrap())
    }

    #[tokio::test]
    async fn every_phase_of_a_plugin_runs_around_the_inner_service() {
        for waits in [false, true] {
            let diary = Diary::default();
            assert_eq!(run(&diary, waits, true, "", false).await.0, 200);
            let expected = [
                "rewrite outer",
                "access outer",
                "into outer",
                "rewrite inner",
                "access inner",
                "before_proxy outer",
                "before_proxy inner",
                "response inner",
                "encode inner",
                "out of outer",
                "response outer",
                "encode outer",
                "log outer",
                "log inner",
            ];
            assert_eq!(told(&diary), expected, "waits {waits}");
        }
    }

    #[tokio::test]
    async fn a_refusal_in_any_phase_keeps_the_request_from_what_is_further_in() {
        let cases = [
            ("rewrite outer", "access outer", true),
            ("access outer", "rewrite inner", true),
            ("rewrite inner", "access inner", false),
            ("before_proxy outer", "before_proxy inner", false),
        ];
        for waits in [false, true] {
            for (at, never, outer) in cases {
                let diary = Diary::default();
                let (status, mark) = run(&diary, waits, true, at, false).await;
                let told = told(&diary);
                assert!(!told.iter().any(|line| line == never), "{at}: {told:?}");
                assert!(
                    told.contains(&"response outer".to_owned()) && told.contains(&"log outer".to_owned())
                );
                assert_eq!(told.contains(&"log inner".to_owned()), !outer, "{at}: {told:?}");
                // The upstream of this test marks an answer of `before_proxy` as its own.
                if !at.starts_with("before_proxy") {
                    let by = if outer { "outer" } else { "inner" };
                    assert_eq!(status, 403, "{at}");
                    assert!(mark.contains(&format!("plugin:{by}")), "{at}: {mark}");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_failure_of_the_upstream_is_an_answer_to_the_plugins_around_it() {
        for waits in [false, true] {
            let diary = Diary::default();
            let (status, mark) = run(&diary, waits, true, "", true).await;
            assert_eq!(status, 502);
            assert!(mark.contains("connect_failed"), "{mark}");
            assert!(told(&diary).contains(&"response outer".to_owned()));
        }
    }

    #[tokio::test]
    async fn a_layer_goes_together_with_a_chain() {
        let diary = Diary::default();
        let mut stack = Stack::new()
            .push(layer(&diary, "layer", false, false))
            .push(tower::layer::layer_fn(crate::chain::PluginChain::new))
            .around(service(|x| {
                before_proxy(x);
                Ok(())
            }));
        let mut x = exchange("GET", "http://a/").build();
        let PluginLayer(plan) = layer(&diary, "route", false, false);
        x.plan = Some(plan);
        let x = stack.call(x).await.unwrap();
        assert_eq!(x.answered, Answered::Upstream);
        drop(x);
        assert_eq!(
            told(&diary),
            [
                "rewrite layer",
                "access layer",
                "rewrite route",
                "access route",
                "before_proxy layer",
                "before_proxy route",
                "response route",
                "encode route",
                "response layer",
                "encode layer",
                "log route",
                "log layer",
            ]
        );
    }
}
