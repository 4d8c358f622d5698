//! Names of request variables, compiled.
//!
//! `vars` predicates, `$var` templates, log formats and hash keys name variables as nginx and APISIX do. A name is
//! looked at once, when the configuration is read; a request only matches on the enum. What a variable is worth is
//! the business of whoever implements [`Vars`]: this module knows names, not requests.

use std::borrow::Cow;
use std::fmt;

use http::HeaderName;
use serde_json::Value;

/// Access to the variables of one request (or connection, or log record).
pub trait Vars {
    /// The text of a variable; `None` when it has no value, which is not the same as an empty one.
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>>;

    /// The JSON value of a variable that is not text (see [`Var::is_typed`]). Asked before [`Vars::get`] for those.
    fn value(&self, var: &Var) -> Option<Value> {
        let _ = var;
        None
    }
}

/// The variables with a fixed name. One line each: variant, canonical name, other names of the same thing.
macro_rules! fixed {
    ($($(#[$doc:meta])* $variant:ident = $name:literal $(| $alias:literal)*;)+) => {
        /// A variable, by what it is looked up in.
        ///
        /// Names without a known meaning are kept as [`Var::Other`]: plugins may set variables of their own.
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum Var {
            $($(#[$doc])* $variant,)+
            /// `arg_NAME`: first query argument of that name.
            Arg(Box<str>),
            /// `http_NAME`: request header, ready for look-up (lower case, `_` turned into `-`).
            Http(HeaderName),
            /// `cookie_NAME`: request cookie; names are case-sensitive.
            Cookie(Box<str>),
            /// `sent_http_NAME`: header of the response sent to the client.
            SentHttp(HeaderName),
            /// `upstream_http_NAME`: header of the upstream's response.
            UpstreamHttp(HeaderName),
            /// `post_arg_NAME`: argument of a form-encoded body.
            PostArg(Box<str>),
            /// `post_arg.PATH`: value at a JSON path (without the leading `$.`) of the body.
            PostArgPath(Box<str>),
            /// `uri_param_NAME`: parameter captured by the route's URI.
            UriParam(Box<str>),
            /// Any other name, as written.
            Other(Box<str>),
        }

        impl Var {
            /// Every variable with a fixed name, in the order of this file.
            pub const FIXED: &'static [Var] = &[$(Var::$variant),+];

            fn fixed(name: &str) -> Option<Var> {
                Some(match name {
                    $($name $(| $alias)* => Var::$variant,)+
                    _ => return None,
                })
            }

            fn fixed_name(&self) -> &str {
                match self {
                    $(Var::$variant => $name,)+
                    Var::Arg(name)
                    | Var::Cookie(name)
                    | Var::PostArg(name)
                    | Var::PostArgPath(name)
                    | Var::UriParam(name)
                    | Var::Other(name) => name,
                    Var::Http(name) | Var::SentHttp(name) | Var::UpstreamHttp(name) => name.as_str(),
                }
            }
        }
    };
}

fixed! {
    /// Decoded, normalised path.
    Uri = "uri" | "document_uri";
    /// Path and query as the client sent them.
    RequestUri = "request_uri";
    /// Query string, without `?`.
    Args = "args" | "query_string";
    /// `?` if there is a query string, else empty.
    IsArgs = "is_args";
    /// Host of the request, lower case, without port.
    Host = "host";
    /// Name of this machine.
    Hostname = "hostname";
    /// Request line as the client sent it.
    Request = "request";
    RequestMethod = "request_method" | "method";
    /// Bytes received: request line, headers and body.
    RequestLength = "request_length";
    /// Seconds since the first byte of the request, with milliseconds.
    RequestTime = "request_time";
    RequestId = "request_id";
    RequestBody = "request_body";
    RequestCompletion = "request_completion";
    ContentType = "content_type";
    ContentLength = "content_length";
    Scheme = "scheme";
    /// `on` over TLS, else empty.
    Https = "https";
    ServerProtocol = "server_protocol";
    ServerName = "server_name";
    ServerAddr = "server_addr";
    ServerPort = "server_port";
    /// Client address, after `real_ip` and the `real-ip` plugin.
    RemoteAddr = "remote_addr";
    RemotePort = "remote_port";
    /// Address of the TCP peer, whatever headers say.
    RealipRemoteAddr = "realip_remote_addr";
    RealipRemotePort = "realip_remote_port";
    RemoteUser = "remote_user";
    ProxyProtocolAddr = "proxy_protocol_addr";
    ProxyProtocolPort = "proxy_protocol_port";
    ProxyAddXForwardedFor = "proxy_add_x_forwarded_for";
    /// Serial number of the connection.
    Connection = "connection";
    /// Requests so far on the connection, this one included.
    ConnectionRequests = "connection_requests";
    ConnectionTime = "connection_time";
    Pid = "pid";
    /// Seconds since the epoch.
    Time = "time";
    /// Seconds since the epoch, with milliseconds.
    Msec = "msec";
    TimeIso8601 = "time_iso8601";
    /// Local time in the common log format.
    TimeLocal = "time_local";
    /// Status of the response to the client.
    Status = "status";
    BytesSent = "bytes_sent";
    BodyBytesSent = "body_bytes_sent";
    /// Seconds of a stream session, with milliseconds.
    SessionTime = "session_time";
    BytesReceived = "bytes_received";
    Protocol = "protocol";
    UpstreamAddr = "upstream_addr";
    UpstreamStatus = "upstream_status";
    UpstreamResponseTime = "upstream_response_time";
    UpstreamConnectTime = "upstream_connect_time";
    UpstreamHeaderTime = "upstream_header_time";
    UpstreamResponseLength = "upstream_response_length";
    UpstreamBytesSent = "upstream_bytes_sent";
    UpstreamBytesReceived = "upstream_bytes_received";
    UpstreamCacheStatus = "upstream_cache_status";
    UpstreamScheme = "upstream_scheme";
    /// Host header sent upstream.
    UpstreamHost = "upstream_host";
    /// Path and query sent upstream.
    UpstreamUri = "upstream_uri";
    /// Node as configured, before its name was resolved.
    UpstreamUnresolvedHost = "upstream_unresolved_host";
    BalancerIp = "balancer_ip";
    BalancerPort = "balancer_port";
    ConsumerName = "consumer_name";
    ConsumerGroupId = "consumer_group_id";
    RouteId = "route_id";
    RouteName = "route_name";
    ServiceId = "service_id";
    ServiceName = "service_name";
    /// Pattern of the route's URI that matched.
    MatchedUri = "matched_uri";
    MatchedHost = "matched_host";
    /// Response body, where a logger was told to keep it.
    RespBody = "resp_body";
    MqttClientId = "mqtt_client_id";
    SslServerName = "ssl_server_name";
    SslProtocol = "ssl_protocol";
    SslCipher = "ssl_cipher";
    SslSessionReused = "ssl_session_reused";
    SslClientSDn = "ssl_client_s_dn";
    SslClientIDn = "ssl_client_i_dn";
    SslClientSerial = "ssl_client_serial";
    SslClientFingerprint = "ssl_client_fingerprint";
    /// `SUCCESS`, `NONE` or `FAILED:reason`.
    SslClientVerify = "ssl_client_verify";
    SslClientCert = "ssl_client_cert";
}

impl Var {
    /// The variable of that name. Never fails: an unknown name is [`Var::Other`], as it is in APISIX.
    pub fn parse(name: &str) -> Var {
        if let Some(var) = Var::fixed(name) {
            return var;
        }
        let family = Var::family(name);
        family.unwrap_or_else(|| Var::Other(name.into()))
    }

    fn family(name: &str) -> Option<Var> {
        // An empty name after the prefix names nothing, so it stays `Other`.
        fn rest<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
            name.strip_prefix(prefix).filter(|rest| !rest.is_empty())
        }
        if let Some(name) = rest(name, "http_") {
            return header(name).map(Var::Http);
        }
        if let Some(name) = rest(name, "arg_") {
            return Some(Var::Arg(name.into()));
        }
        if let Some(name) = rest(name, "cookie_") {
            return Some(Var::Cookie(name.into()));
        }
        if let Some(name) = rest(name, "post_arg.") {
            return Some(Var::PostArgPath(name.into()));
        }
        if let Some(name) = rest(name, "post_arg_") {
            return Some(Var::PostArg(name.into()));
        }
        if let Some(name) = rest(name, "uri_param_") {
            return Some(Var::UriParam(name.into()));
        }
        if let Some(name) = rest(name, "sent_http_") {
            return header(name).map(Var::SentHttp);
        }
        rest(name, "upstream_http_").and_then(header).map(Var::UpstreamHttp)
    }

    /// Whether the variable may hold JSON that is not text, so that [`Vars::value`] is asked before [`Vars::get`].
    pub fn is_typed(&self) -> bool {
        matches!(self, Var::PostArgPath(_) | Var::Other(_))
    }

    /// Whether the request body must be read before the variable has a value.
    pub fn needs_body(&self) -> bool {
        match self {
            Var::PostArg(_) | Var::PostArgPath(_) | Var::RequestBody => true,
            Var::Other(name) => name.starts_with("graphql_"),
            _ => false,
        }
    }

    /// Whether the variable has a value only after the response began, so that it is of no use for routing.
    pub fn is_of_response(&self) -> bool {
        matches!(
            self,
            Var::Status
                | Var::BytesSent
                | Var::BodyBytesSent
                | Var::RespBody
                | Var::SentHttp(_)
                | Var::UpstreamHttp(_)
                | Var::UpstreamStatus
                | Var::UpstreamResponseTime
                | Var::UpstreamHeaderTime
                | Var::UpstreamResponseLength
                | Var::UpstreamBytesReceived
        )
    }
}

/// Header name of the part after `http_`, ready for look-up; `None` if no header can have that name.
fn header(name: &str) -> Option<HeaderName> {
    let name = name.to_ascii_lowercase().replace('_', "-");
    HeaderName::from_bytes(name.as_bytes()).ok()
}

impl fmt::Display for Var {
    /// The name as one would write it in `vars`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self {
            Var::Arg(_) => "arg_",
            Var::Http(_) => "http_",
            Var::Cookie(_) => "cookie_",
            Var::SentHttp(_) => "sent_http_",
            Var::UpstreamHttp(_) => "upstream_http_",
            Var::PostArg(_) => "post_arg_",
            Var::PostArgPath(_) => "post_arg.",
            Var::UriParam(_) => "uri_param_",
            _ => "",
        };
        match self {
            Var::Http(name) | Var::SentHttp(name) | Var::UpstreamHttp(name) => {
                write!(f, "{prefix}{}", name.as_str().replace('-', "_"))
            }
            _ => write!(f, "{prefix}{}", self.fixed_name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_nginx_and_apisix_mean() {
        let header = |name: &'static str| HeaderName::from_static(name);
        let cases = [
            ("uri", Var::Uri),
            ("document_uri", Var::Uri),
            ("query_string", Var::Args),
            ("args", Var::Args),
            ("method", Var::RequestMethod),
            ("http_host", Var::Http(header("host"))),
            ("http_X_Api_Key", Var::Http(header("x-api-key"))),
            ("http_x-api-key", Var::Http(header("x-api-key"))),
            ("http_\u{e9}", Var::Other("http_\u{e9}".into())),
            ("http_", Var::Other("http_".into())),
            ("https", Var::Https),
            ("arg_Name", Var::Arg("Name".into())),
            ("arg_", Var::Other("arg_".into())),
            ("args_x", Var::Other("args_x".into())),
            ("cookie_Session", Var::Cookie("Session".into())),
            ("post_arg_a", Var::PostArg("a".into())),
            ("post_arg.model.name", Var::PostArgPath("model.name".into())),
            ("uri_param_id", Var::UriParam("id".into())),
            ("sent_http_content_type", Var::SentHttp(header("content-type"))),
            ("upstream_http_server", Var::UpstreamHttp(header("server"))),
            ("upstream_host", Var::UpstreamHost),
            ("graphql_operation", Var::Other("graphql_operation".into())),
            ("my_plugin_var", Var::Other("my_plugin_var".into())),
            ("", Var::Other("".into())),
        ];
        for (name, var) in cases {
            assert_eq!(Var::parse(name), var, "{name}");
        }
    }

    #[test]
    fn every_fixed_name_reads_back() {
        for var in Var::FIXED {
            assert_eq!(&Var::parse(&var.to_string()), var);
        }
        for name in
            ["arg_a", "http_x_y", "cookie_c", "post_arg.a.b", "post_arg_q", "uri_param_id", "sent_http_x"]
        {
            assert_eq!(Var::parse(name).to_string(), name);
        }
    }

    #[test]
    fn body_and_response_variables_are_known() {
        assert!(Var::parse("post_arg.a").needs_body());
        assert!(Var::parse("post_arg_a").needs_body());
        assert!(Var::parse("graphql_name").needs_body());
        assert!(!Var::parse("arg_a").needs_body());
        assert!(Var::parse("status").is_of_response());
        assert!(!Var::parse("uri").is_of_response());
    }
}
