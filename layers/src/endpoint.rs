//! Paths that plugins serve themselves: metrics, the status, key sets, batches of requests.
//!
//! A plugin offers them once ([`Definition::offer`](crate::plugin::Definition::offer)), not for each object that holds
//! it. None of them can be reached until a route exposes it with `public-api`, which looks them up here.

use std::future::Future;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use http::{Method, Response};

use crate::body::Body;
use crate::exchange::Exchange;
use crate::local::LocalBox;

/// Answers requests for a path of a plugin's own.
pub trait Endpoint: Send + Sync + 'static {
    /// Answers. Runs on a worker: it names its own deadline if it waits, and computes nothing long.
    fn answer(&self, x: &mut Exchange) -> impl Future<Output = Response<Body>>;
}

trait Answers: Send + Sync {
    fn answer<'a>(&'a self, x: &'a mut Exchange) -> LocalBox<'a, Response<Body>>;
}

struct Erased<E>(Arc<E>);

impl<E: Endpoint> Answers for Erased<E> {
    fn answer<'a>(&'a self, x: &'a mut Exchange) -> LocalBox<'a, Response<Body>> {
        Box::pin(self.0.answer(x))
    }
}

/// An endpoint that was found.
#[derive(Clone)]
pub struct Offered(Arc<dyn Answers>);

impl Offered {
    /// Answers.
    pub async fn answer(&self, x: &mut Exchange) -> Response<Body> {
        self.0.answer(x).await
    }
}

/// What plugins offer, by path.
#[derive(Default)]
pub struct Offers(HashMap<Box<str>, Vec<(Method, Offered)>>);

impl Offers {
    /// Serves `method` of `path`. The first of two equal offers stands.
    pub fn serve<E: Endpoint>(&mut self, method: Method, path: &str, endpoint: &Arc<E>) {
        let offered = Offered(Arc::new(Erased(endpoint.clone())));
        self.0.entry(path.into()).or_default().push((method, offered));
    }
}

/// A handle to what plugins offer at present.
#[derive(Clone, Default)]
pub struct Endpoints(Arc<ArcSwap<Offers>>);

impl Endpoints {
    /// Replaces all offers.
    pub fn publish(&self, offers: Offers) {
        self.0.store(Arc::new(offers));
    }

    /// Who answers this method of this path.
    pub fn find(&self, method: &Method, path: &str) -> Option<Offered> {
        let offers = self.0.load();
        offers.0.get(path)?.iter().find(|(served, _)| served == method).map(|(_, offered)| offered.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::exchange;

    struct Says(&'static str);

    impl Endpoint for Says {
        async fn answer(&self, _: &mut Exchange) -> Response<Body> {
            Response::new(Body::from(self.0))
        }
    }

    #[tokio::test]
    async fn an_offer_is_found_by_method_and_path() {
        let endpoints = Endpoints::default();
        assert!(endpoints.find(&Method::GET, "/a").is_none());
        let mut offers = Offers::default();
        offers.serve(Method::GET, "/a", &Arc::new(Says("first")));
        offers.serve(Method::GET, "/a", &Arc::new(Says("second")));
        offers.serve(Method::POST, "/a", &Arc::new(Says("post")));
        endpoints.publish(offers);
        for (method, path, said) in [
            (Method::GET, "/a", Some("first")),
            (Method::POST, "/a", Some("post")),
            (Method::PUT, "/a", None),
            (Method::GET, "/a/", None),
        ] {
            let mut x = exchange("GET", "http://a/").build();
            let answer = match endpoints.find(&method, path) {
                Some(found) => Some(found.answer(&mut x).await.body_mut().collect_up_to(10).await.unwrap()),
                None => None,
            };
            assert_eq!(answer.as_deref(), said.map(str::as_bytes), "{method} {path}");
        }
    }
}
