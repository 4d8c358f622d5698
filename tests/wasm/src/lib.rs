//! A sample plugin: marks requests with its configuration, and shows what a module can do, asked for by header fields.
//!
//! | field | what happens |
//! |---|---|
//! | `x-block` | 403 without the upstream |
//! | `x-ask: HOST:PORT` | the request waits for an HTTP call, whose status goes to the upstream as `x-asked` |
//! | `x-rewrite` | the path is another one |
//! | `x-body` | the request's body is turned into capital letters |
//! | `x-spin`, `x-panic`, `x-eat` | the module misbehaves: it never ends, panics, or takes all memory |

use std::time::Duration;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| -> Box<dyn RootContext> { Box::new(Root::default()) });
}}

#[derive(Default)]
struct Root {
    mark: String,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        self.mark = self.get_plugin_configuration().map_or_else(String::new, |c| String::from_utf8_lossy(&c).into());
        self.mark != "refused"
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Request { mark: self.mark.clone(), version: option_env!("SAMPLE_VERSION").unwrap_or("one") }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Request {
    mark: String,
    version: &'static str,
}

impl Context for Request {
    fn on_http_call_response(&mut self, _token: u32, _headers: usize, _body: usize, _trailers: usize) {
        let status = self.get_http_call_response_header(":status").unwrap_or_else(|| "none".into());
        self.set_http_request_header("x-asked", Some(&status));
        self.resume_http_request();
    }
}

impl HttpContext for Request {
    fn on_http_request_headers(&mut self, _count: usize, _end: bool) -> Action {
        self.set_http_request_header("x-mark", Some(&self.mark));
        let address = self.get_property(vec!["remote_addr"]).unwrap_or_default();
        self.set_http_request_header("x-from", Some(&String::from_utf8_lossy(&address)));
        let asked = |name: &str| self.get_http_request_header(name);
        if asked("x-block").is_some() {
            self.send_http_response(403, vec![("x-by", "sample")], Some(b"blocked"));
            return Action::Pause;
        }
        if asked("x-rewrite").is_some() {
            self.set_http_request_header(":path", Some("/rewritten?by=wasm"));
        }
        if asked("x-body").is_some() {
            self.set_property(vec!["wasm_process_req_body"], Some(b"true"));
        }
        if let Some(upstream) = asked("x-ask") {
            let fields = vec![(":method", "GET"), (":path", "/asked"), (":authority", "asked.test")];
            return match self.dispatch_http_call(&upstream, fields, None, vec![], Duration::from_secs(2)) {
                Ok(_) => Action::Pause,
                Err(_) => Action::Continue,
            };
        }
        if asked("x-panic").is_some() {
            panic!("asked to");
        }
        if asked("x-eat").is_some() {
            let mut eaten = Vec::new();
            loop {
                eaten.push(vec![1u8; 1 << 20]);
                std::hint::black_box(&eaten);
            }
        }
        if asked("x-spin").is_some() {
            loop {
                std::hint::black_box(0);
            }
        }
        Action::Continue
    }

    fn on_http_request_body(&mut self, size: usize, _end: bool) -> Action {
        let body = self.get_http_request_body(0, size).unwrap_or_default();
        self.set_http_request_body(0, size, &body.to_ascii_uppercase());
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _count: usize, _end: bool) -> Action {
        self.set_http_response_header("x-sample", Some(self.version));
        if self.get_http_response_header("x-upper").is_some() {
            self.set_property(vec!["wasm_process_resp_body"], Some(b"true"));
        }
        Action::Continue
    }

    fn on_http_response_body(&mut self, size: usize, _end: bool) -> Action {
        if let Some(body) = self.get_http_response_body(0, size) {
            self.set_http_response_body(0, size, &body.to_ascii_uppercase());
        }
        Action::Continue
    }

    fn on_log(&mut self) {
        let status = self.get_http_response_header(":status").unwrap_or_default();
        proxy_wasm::hostcalls::log(LogLevel::Warn, &format!("sample saw the end with {status}")).ok();
    }
}
