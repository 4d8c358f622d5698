//! The settings of `openid-connect`, with all names that APISIX knows. What is not served says so when it is switched on.

use std::collections::BTreeMap;

use config::fields::{Int, List};
use config::sensitive::Sensitive;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::provider::ClientAuth;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The client, as the provider knows it.
    pub(super) client_id: String,
    /// The client's secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-encrypted" = true))]
    pub(super) client_secret: Option<Sensitive<0>>,
    /// The URL of the provider's discovery document.
    pub(super) discovery: String,
    /// What is asked for at a login.
    #[serde(default = "openid")]
    pub(super) scope: String,
    /// Check the provider's certificate.
    #[serde(default = "yes")]
    pub(super) ssl_verify: bool,
    /// Seconds to wait for an answer of the provider. 1000 and its multiples are milliseconds.
    #[serde(default)]
    pub(super) timeout: Int<1, 600_000, 3>,
    /// Where bearer tokens are introspected, in place of what the discovery document says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) introspection_endpoint: Option<String>,
    /// How the client proves who it is there.
    #[serde(default)]
    pub(super) introspection_endpoint_auth_method: AuthMethod,
    /// How the client proves who it is at the token endpoint.
    #[serde(default)]
    pub(super) token_endpoint_auth_method: AuthMethod,
    /// Only bearer tokens let in; nobody is sent to a login.
    #[serde(default)]
    pub(super) bearer_only: bool,
    /// The sessions of users who have logged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) session: Option<SessionConfig>,
    /// The realm in `WWW-Authenticate` of a refusal.
    #[serde(default = "realm")]
    pub(super) realm: String,
    /// What the claims of a bearer token have to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) claim_validator: Option<ClaimValidator>,
    /// The path that ends a session.
    #[serde(default = "logout")]
    pub(super) logout_path: String,
    /// Where the provider sends a browser back to: a URL, or a path. `/.apisix/redirect` below the path that was asked
    /// for, if it is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) redirect_uri: Option<String>,
    /// Where a browser is sent after `logout_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) post_logout_redirect_uri: Option<String>,
    /// What happens to requests of nobody: sent to the login, refused with 401, or let pass.
    #[serde(default)]
    pub(super) unauth_action: Unauthenticated,
    /// The key that bearer tokens are signed with, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) public_key: Option<String>,
    /// Check bearer tokens with the provider's key set, without introspection.
    #[serde(default)]
    pub(super) use_jwks: bool,
    /// The one algorithm that tokens are signed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) token_signing_alg_values_expected: Option<String>,
    /// Prove at the token endpoint who began the login (PKCE, S256).
    #[serde(default)]
    pub(super) use_pkce: bool,
    /// Tell the upstream the access token: `X-Access-Token`.
    #[serde(default = "yes")]
    pub(super) set_access_token_header: bool,
    /// Tell it as `Authorization: Bearer` instead.
    #[serde(default)]
    pub(super) access_token_in_authorization_header: bool,
    /// Tell the upstream the claims of the ID token: `X-ID-Token`, JSON in base64.
    #[serde(default = "yes")]
    pub(super) set_id_token_header: bool,
    /// Tell the upstream the ID token itself: `X-Raw-ID-Token`.
    #[serde(default)]
    pub(super) set_raw_id_token_header: bool,
    /// Tell the upstream what is known of the user: `X-Userinfo`, JSON in base64.
    #[serde(default = "yes")]
    pub(super) set_userinfo_header: bool,
    /// Tell the upstream the refresh token: `X-Refresh-Token`.
    #[serde(default)]
    pub(super) set_refresh_token_header: bool,
    /// Not served: the provider is asked without a proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) proxy_opts: Option<Map<String, Value>>,
    /// More arguments for the login.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) authorization_params: BTreeMap<String, Value>,
    /// Get a new access token when the old one ends.
    #[serde(default = "yes")]
    pub(super) renew_access_token_on_expiry: bool,
    /// Seconds that an access token lasts when the provider does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) access_token_expires_in: Option<Int<1, { u32::MAX }>>,
    /// Seconds before its end from which on an access token is renewed.
    #[serde(default)]
    pub(super) access_token_expires_leeway: Int<0, 86_400>,
    /// Seconds by which the clock of the provider may be ahead.
    #[serde(default)]
    pub(super) iat_slack: Int<0, 86_400, 120>,
    /// Send a nonce. Taken and without effect: one is always sent.
    #[serde(default)]
    pub(super) use_nonce: bool,
    /// Revoke the tokens at a logout.
    #[serde(default)]
    pub(super) revoke_tokens_on_logout: bool,
    /// Seconds that the key set is kept.
    #[serde(default)]
    pub(super) jwk_expires_in: Int<1, { u32::MAX }, 86_400>,
    /// Taken and without effect: signatures are always verified.
    #[serde(default)]
    pub(super) jwt_verification_cache_ignore: bool,
    /// Taken and without effect: what is kept is kept for each object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cache_segment: Option<String>,
    /// Seconds that an introspection is kept at most; 0 is as long as the token is good.
    #[serde(default)]
    pub(super) introspection_interval: Int<0, { u32::MAX }>,
    /// The member of an introspection that says how long the token is good.
    #[serde(default = "exp")]
    pub(super) introspection_expiry_claim: String,
    /// Fields of the request that go along with an introspection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) introspection_addon_headers: Option<List<String>>,
    /// Scopes that a token needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) required_scopes: Option<Vec<String>>,
    /// A JSON Schema: of a bearer token's claims, or of `user`, `access_token` and `id_token` of a session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) claim_schema: Option<Map<String, Value>>,
    /// Not served unless false: tokens without a signature.
    #[serde(default)]
    pub(super) accept_none_alg: bool,
    /// Taken and without effect: a token whose signature cannot be verified is not good.
    #[serde(default = "yes")]
    pub(super) accept_unsupported_alg: bool,
    /// Not served unless false: a login for every request.
    #[serde(default)]
    pub(super) force_reauthorize: bool,
    /// Not served: ID tokens are not refreshed in the background.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) refresh_session_interval: Option<u64>,
    /// Not served unless `enabled` is false: pushed authorization requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) par: Option<Map<String, Value>>,
    /// Not served unless `enabled` is false: proofs of possession.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) dpop: Option<Map<String, Value>>,
    /// Not served: `private_key_jwt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-encrypted" = true))]
    pub(super) client_rsa_private_key: Option<Sensitive<0>>,
    /// Goes with `client_rsa_private_key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) client_rsa_private_key_id: Option<String>,
    /// Goes with `client_rsa_private_key`.
    #[serde(default)]
    pub(super) client_jwt_assertion_expires_in: Int<1, { u32::MAX }, 60>,
    /// Goes with `client_rsa_private_key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) client_jwt_assertion_alg: Option<String>,
    /// Goes with `client_rsa_private_key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) client_jwt_assertion_audience: Option<String>,
}

/// How a client proves who it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum AuthMethod {
    #[default]
    ClientSecretBasic,
    ClientSecretPost,
}

impl AuthMethod {
    pub(super) fn auth(self) -> ClientAuth {
        match self {
            Self::ClientSecretBasic => ClientAuth::Basic,
            Self::ClientSecretPost => ClientAuth::Post,
        }
    }
}

/// What happens to requests of nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum Unauthenticated {
    #[default]
    Auth,
    Deny,
    Pass,
}

/// The sessions of users who have logged in.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SessionConfig {
    /// What sessions are sealed with. Gateways and routes with the same secret, provider and client share sessions.
    #[schemars(extend("x-encrypted" = true))]
    pub(super) secret: Sensitive<16>,
    /// The name of the cookie.
    #[serde(default = "session")]
    pub(super) cookie_name: String,
    /// The path that the cookie is for.
    #[serde(default = "root")]
    pub(super) cookie_path: String,
    /// The domain that the cookie is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cookie_domain: Option<String>,
    /// The cookie goes over TLS only; as the request came, if it is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cookie_secure: Option<bool>,
    /// Scripts do not see the cookie.
    #[serde(default = "yes")]
    pub(super) cookie_http_only: bool,
    /// Which requests from other sites carry the cookie.
    #[serde(default)]
    pub(super) cookie_same_site: SameSite,
    /// Seconds without a request after which a session is over; 0 is never.
    #[serde(default)]
    pub(super) idling_timeout: Int<0, { u32::MAX }, 900>,
    /// Seconds after which a session that was not renewed is over; 0 is never.
    #[serde(default)]
    pub(super) rolling_timeout: Int<0, { u32::MAX }, 3_600>,
    /// Seconds after the login after which a session is over; 0 is never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) absolute_timeout: Option<Int<0, { u32::MAX }>>,
    /// The older way to write `absolute_timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cookie: Option<OldCookie>,
    /// Where sessions are kept.
    #[serde(default)]
    pub(super) storage: Storage,
    /// The Redis that keeps them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) redis: Option<RedisConfig>,
}

/// The older way to write `absolute_timeout`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OldCookie {
    /// Seconds after the login after which a session is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) lifetime: Option<Int<0, { u32::MAX }>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub(super) enum SameSite {
    Strict,
    #[default]
    Lax,
    None,
    Default,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum Storage {
    #[default]
    Cookie,
    Redis,
}

/// The Redis that keeps sessions.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RedisConfig {
    /// The host.
    #[serde(default = "localhost")]
    #[schemars(length(min = 2))]
    pub(super) host: String,
    /// The port.
    #[serde(default)]
    pub(super) port: Int<1, 65_535, 6_379>,
    /// The user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) username: Option<String>,
    /// The password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-encrypted" = true))]
    pub(super) password: Option<Sensitive<0>>,
    /// The database.
    #[serde(default)]
    pub(super) database: Int<0, { u32::MAX }>,
    /// What keys begin with.
    #[serde(default = "sessions")]
    pub(super) prefix: String,
    /// Speak TLS.
    #[serde(default)]
    pub(super) ssl: bool,
    /// Check the certificate.
    #[serde(default = "yes")]
    pub(super) ssl_verify: bool,
    /// Not served: the certificate has to be of `host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) server_name: Option<String>,
    /// Milliseconds to connect. Counted in `read_timeout`.
    #[serde(default)]
    pub(super) connect_timeout: Int<1, { u32::MAX }, 1_000>,
    /// Milliseconds to send. Counted in `read_timeout`.
    #[serde(default)]
    pub(super) send_timeout: Int<1, { u32::MAX }, 1_000>,
    /// Milliseconds for an answer.
    #[serde(default)]
    pub(super) read_timeout: Int<1, 60_000, 1_000>,
    /// Taken and without effect: one connection stays.
    #[serde(default)]
    pub(super) keepalive_timeout: Int<1_000, { u32::MAX }, 10_000>,
}

/// What the claims of a bearer token have to be.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ClaimValidator {
    /// The issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) issuer: Option<IssuerRule>,
    /// The audience.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) audience: Option<AudienceRule>,
}

/// The issuer of a bearer token.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct IssuerRule {
    /// Issuers that are good; without them that of the discovery document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) valid_issuers: Option<Vec<String>>,
}

/// The audience of a bearer token.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AudienceRule {
    /// The claim.
    #[serde(default = "aud")]
    pub(super) claim: String,
    /// It has to be there.
    #[serde(default)]
    pub(super) required: bool,
    /// It has to be, or hold, `client_id`.
    #[serde(default)]
    pub(super) match_with_client_id: bool,
}

fn yes() -> bool {
    true
}

fn openid() -> String {
    "openid".to_owned()
}

fn realm() -> String {
    "apisix".to_owned()
}

fn logout() -> String {
    "/logout".to_owned()
}

fn exp() -> String {
    "exp".to_owned()
}

fn aud() -> String {
    "aud".to_owned()
}

fn session() -> String {
    "session".to_owned()
}

fn sessions() -> String {
    "sessions".to_owned()
}

fn root() -> String {
    "/".to_owned()
}

fn localhost() -> String {
    "127.0.0.1".to_owned()
}

