//! Sessions: what is known of a user who has logged in, sealed in a cookie or, under a name in a cookie, in Redis.
//!
//! A cookie that is too long for a browser is cut into several. What a client brings back is opened or is nothing.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, HeaderValue};
use layers::vars::cookie;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::provider::{Trouble, now};
use crate::support::redis::Redis;
use crate::support::seal::Sealer;

/// Browsers keep cookies of 4096 bytes, name and attributes included.
const CHUNK: usize = 3_500;
/// More than that fits no request.
const MAX_CHUNKS: usize = 6;
/// A login has to be finished within this time.
pub const LOGIN: u64 = 600;
/// Logins of one browser that are on their way at once.
const MAX_LOGINS: usize = 6;
/// A session is written again when it was last used so long ago.
const TOUCH: u64 = 60;

/// What is known of a user who has logged in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// The ID token as the provider gave it.
    pub id_token: String,
    pub access_token: Option<String>,
    pub refresh_token: Option<String>,
    pub user: Option<Map<String, Value>>,
    /// When the access token ends.
    pub expires: Option<u64>,
    pub created: u64,
    pub used: u64,
    /// The name in Redis.
    #[serde(skip)]
    pub id: Option<String>,
}

/// A login on its way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Login {
    pub state: String,
    pub nonce: String,
    pub verifier: Option<String>,
    pub target: String,
    pub redirect_uri: String,
    pub begun: u64,
}

/// Random text that nobody guesses.
pub fn random() -> Result<String, Trouble> {
    let mut bytes = [0; 32];
    rand::fill(&mut bytes).map_err(|_| Trouble::provider("no randomness"))?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Where sessions are kept, and the cookies that name them.
pub struct Sessions {
    pub sealer: Sealer,
    pub name: Box<str>,
    /// `; Path=/; HttpOnly` and the like, without `Secure` where that depends on the request.
    pub attributes: Box<str>,
    /// `Secure` always, never, or with TLS.
    pub secure: Option<bool>,
    /// A session that was not used for so long is over.
    pub idle: Option<u64>,
    /// A session is over so long after the login.
    pub absolute: Option<u64>,
    pub redis: Option<(Arc<Redis>, Box<str>)>,
}

impl Sessions {
    fn cookie(&self, name: &str, value: &str, age: Option<u64>, tls: bool) -> Option<HeaderValue> {
        let mut text = format!("{name}={value}{}", self.attributes);
        if self.secure.unwrap_or(tls) {
            text.push_str("; Secure");
        }
        if let Some(age) = age {
            let _ = write!(text, "; Max-Age={age}");
        }
        HeaderValue::try_from(text).ok()
    }

    fn chunk_name(&self, index: usize) -> String {
        if index == 0 { self.name.to_string() } else { format!("{}_{index}", self.name) }
    }

    /// Whatever the cookies of a session hold, joined.
    fn joined(&self, headers: &HeaderMap) -> Option<String> {
        let first = cookie(headers, &self.name)?;
        let (count, first) = first.split_once('.')?;
        let count: usize = count.parse().ok().filter(|count| (1..=MAX_CHUNKS).contains(count))?;
        let mut text = first.to_owned();
        for index in 1..count {
            text.push_str(cookie(headers, &self.chunk_name(index))?);
        }
        Some(text)
    }

    /// The session of a request; nothing if there is none that is still good.
    ///
    /// # Errors
    /// Redis cannot be asked.
    pub async fn read(&self, headers: &HeaderMap) -> Result<Option<Session>, Trouble> {
        let Some(text) = self.joined(headers) else { return Ok(None) };
        let Some(opened) = self.sealer.open("session", &text) else { return Ok(None) };
        let session = match &self.redis {
            None => serde_json::from_slice::<Session>(&opened).ok(),
            Some((redis, prefix)) => {
                let Ok(id) = String::from_utf8(opened) else { return Ok(None) };
                let mut get = redis::cmd("GET");
                get.arg(format!("{prefix}:{id}"));
                let kept: Option<String> =
                    redis.query(&get).await.map_err(|error| Trouble::provider(error.to_string()))?;
                let opened = kept.and_then(|kept| self.sealer.open("kept", &kept));
                opened.and_then(|opened| serde_json::from_slice::<Session>(&opened).ok()).map(|session| {
                    Session { id: Some(id), ..session }
                })
            }
        };
        let now = now();
        Ok(session.filter(|session| {
            let within = |since: u64, limit: Option<u64>| limit.is_none_or(|limit| now < since.saturating_add(limit));
            within(session.used, self.idle) && within(session.created, self.absolute)
        }))
    }

    /// Whether a session has to be written again to stay.
    pub fn is_due(&self, session: &Session) -> bool {
        self.idle.is_some_and(|idle| now() >= session.used.saturating_add(TOUCH.min(idle / 2)))
    }

    /// Keeps a session; the cookies to set.
    ///
    /// # Errors
    /// It is too large for cookies, or Redis cannot be asked.
    pub async fn write(
        &self,
        session: &mut Session,
        headers: &HeaderMap,
        tls: bool,
    ) -> Result<Vec<HeaderValue>, Trouble> {
        session.used = now();
        let plain = serde_json::to_vec(session).map_err(|error| Trouble::provider(error.to_string()))?;
        let seal = |kind, data: &[u8]| {
            self.sealer.seal(kind, data).ok_or_else(|| Trouble::provider("the session cannot be sealed"))
        };
        let sealed = match &self.redis {
            None => seal("session", &plain)?,
            Some((redis, prefix)) => {
                let id = match session.id.take() {
                    Some(id) => id,
                    None => random()?,
                };
                let lives = [self.idle, self.absolute].into_iter().flatten().min().unwrap_or(86_400);
                let mut set = redis::cmd("SET");
                set.arg(format!("{prefix}:{id}")).arg(seal("kept", &plain)?).arg("EX").arg(lives.max(1));
                let _: () = redis.query(&set).await.map_err(|error| Trouble::provider(error.to_string()))?;
                let sealed = seal("session", id.as_bytes())?;
                session.id = Some(id);
                sealed
            }
        };
        let chunks: Vec<&str> = sealed
            .as_bytes()
            .chunks(CHUNK)
            .map(|chunk| std::str::from_utf8(chunk).unwrap_or_default())
            .collect();
        if chunks.len() > MAX_CHUNKS {
            return Err(Trouble::provider("the session is too large for cookies: use session.storage redis"));
        }
        let mut cookies = Vec::with_capacity(chunks.len());
        for (index, chunk) in chunks.iter().enumerate() {
            let value = if index == 0 { format!("{}.{chunk}", chunks.len()) } else { (*chunk).to_owned() };
            cookies.extend(self.cookie(&self.chunk_name(index), &value, None, tls));
        }
        for index in chunks.len()..MAX_CHUNKS {
            if cookie(headers, &self.chunk_name(index)).is_some() {
                cookies.extend(self.cookie(&self.chunk_name(index), "", Some(0), tls));
            }
        }
        Ok(cookies)
    }

    /// Ends a session; the cookies to set.
    pub async fn end(&self, session: Option<&Session>, headers: &HeaderMap, tls: bool) -> Vec<HeaderValue> {
        if let (Some((redis, prefix)), Some(id)) = (&self.redis, session.and_then(|session| session.id.as_ref())) {
            let mut delete = redis::cmd("DEL");
            delete.arg(format!("{prefix}:{id}"));
            if let Err(error) = redis.query::<u64>(&delete).await {
                tracing::warn!(%error, "openid-connect: a session is not taken out of Redis");
            }
        }
        let names = (0..MAX_CHUNKS).map(|index| self.chunk_name(index));
        let set = names.filter(|name| cookie(headers, name).is_some());
        set.filter_map(|name| self.cookie(&name, "", Some(0), tls)).collect()
    }

    fn login_prefix(&self) -> String {
        format!("{}_login_", self.name)
    }

    /// The name of the cookie of a login. The state is what the provider gives back.
    fn login_name(&self, state: &str) -> Option<String> {
        let tail = state.get(..12).filter(|tail| tail.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'))?;
        Some(format!("{}{tail}", self.login_prefix()))
    }

    /// Remembers a login; the cookies to set. When a browser has begun many and finished none, the others are forgotten.
    pub fn begin(&self, login: &Login, headers: &HeaderMap, tls: bool) -> Result<Vec<HeaderValue>, Trouble> {
        let plain = serde_json::to_vec(login).map_err(|error| Trouble::provider(error.to_string()))?;
        let sealed =
            self.sealer.seal("login", &plain).ok_or_else(|| Trouble::provider("the login cannot be sealed"))?;
        let name = self.login_name(&login.state).ok_or_else(|| Trouble::provider("a state without a name"))?;
        let mut cookies: Vec<_> = self.cookie(&name, &sealed, Some(LOGIN), tls).into_iter().collect();
        let others = self.logins(headers);
        if others.len() >= MAX_LOGINS {
            cookies.extend(others.iter().filter_map(|name| self.cookie(name, "", Some(0), tls)));
        }
        Ok(cookies)
    }

    fn logins(&self, headers: &HeaderMap) -> Vec<String> {
        let prefix = self.login_prefix();
        let fields = headers.get_all(http::header::COOKIE).iter().filter_map(|field| field.to_str().ok());
        let names = fields.flat_map(|field| field.split(';')).filter_map(|pair| Some(pair.trim().split_once('=')?.0));
        names.filter(|name| name.starts_with(&prefix) && name.len() == prefix.len() + 12).map(str::to_owned).collect()
    }

    /// The login that `state` belongs to, and the cookie that forgets it.
    pub fn finish(&self, state: &str, headers: &HeaderMap, tls: bool) -> Option<(Login, Option<HeaderValue>)> {
        let name = self.login_name(state)?;
        let opened = self.sealer.open("login", cookie(headers, &name)?)?;
        let login: Login = serde_json::from_slice(&opened).ok()?;
        let good = login.state == state && now() < login.begun.saturating_add(LOGIN);
        good.then(|| (login, self.cookie(&name, "", Some(0), tls)))
    }
}

/// Turns a setting of seconds, where 0 means never, into a limit.
pub fn limit(seconds: u32) -> Option<u64> {
    (seconds > 0).then(|| Duration::from_secs(seconds.into()).as_secs())
}

#[cfg(test)]
mod tests {
    use http::header;

    use super::*;

    fn sessions() -> Sessions {
        Sessions {
            sealer: Sealer::new(b"0123456789abcdef", "shop").unwrap(),
            name: "session".into(),
            attributes: "; Path=/; HttpOnly".into(),
            secure: None,
            idle: Some(900),
            absolute: Some(86_400),
            redis: None,
        }
    }

    /// What a browser sends back.
    fn back(cookies: &[HeaderValue]) -> HeaderMap {
        let pairs: Vec<_> =
            cookies.iter().map(|cookie| cookie.to_str().unwrap().split(';').next().unwrap().to_owned()).collect();
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, pairs.join("; ").try_into().unwrap());
        headers
    }

    #[tokio::test]
    async fn a_session_comes_back_in_as_many_cookies_as_it_needs() {
        let sessions = sessions();
        for (size, count) in [(10, 1), (3_000, 2), (14_000, 6)] {
            let mut session = Session { id_token: "x".repeat(size), created: now(), ..Session::default() };
            let cookies = sessions.write(&mut session, &HeaderMap::new(), true).await.unwrap();
            assert_eq!(cookies.len(), count, "{size}");
            assert!(cookies.iter().all(|cookie| cookie.len() < 4_096 && cookie.to_str().unwrap().ends_with("; Secure")));
            let headers = back(&cookies);
            assert_eq!(sessions.read(&headers).await.unwrap(), Some(session.clone()));
            // A smaller one takes the rest of the cookies back.
            let mut small = Session { created: now(), ..Session::default() };
            let cookies = sessions.write(&mut small, &headers, false).await.unwrap();
            assert_eq!(cookies.len(), count);
            assert_eq!(sessions.end(None, &headers, false).await.len(), count);
            if count > 1 {
                let first = headers[header::COOKIE].to_str().unwrap().split("; ").next().unwrap().to_owned();
                let mut cut = HeaderMap::new();
                cut.insert(header::COOKIE, first.try_into().unwrap());
                assert_eq!(sessions.read(&cut).await.unwrap(), None);
            }
        }
        let mut huge = Session { id_token: "x".repeat(20_000), ..Session::default() };
        assert!(sessions.write(&mut huge, &HeaderMap::new(), false).await.is_err());
    }

    #[tokio::test]
    async fn a_session_ends() {
        let sessions = sessions();
        for (created, good) in [(0, true), (86_399, true), (86_401, false)] {
            let mut session = Session { created: now() - created, ..Session::default() };
            let cookies = sessions.write(&mut session, &HeaderMap::new(), false).await.unwrap();
            assert_eq!(sessions.read(&back(&cookies)).await.unwrap().is_some(), good, "{created}");
        }
        let session = Session { used: now() - 60, ..Session::default() };
        assert!(sessions.is_due(&session));
        let mut idle = HeaderMap::new();
        let old = Session { created: now() - 901, used: now() - 901, ..Session::default() };
        let sealed = sessions.sealer.seal("session", &serde_json::to_vec(&old).unwrap()).unwrap();
        idle.insert(header::COOKIE, format!("session=1.{sealed}").try_into().unwrap());
        assert_eq!(sessions.read(&idle).await.unwrap(), None);
    }

    #[test]
    fn a_login_belongs_to_its_state() {
        let sessions = sessions();
        let login = |state: &str, begun: u64| Login {
            state: state.into(),
            nonce: "n".into(),
            verifier: None,
            target: "/a".into(),
            redirect_uri: "http://a/r".into(),
            begun,
        };
        let state = random().unwrap();
        let cookies = sessions.begin(&login(&state, now()), &HeaderMap::new(), false).unwrap();
        let headers = back(&cookies);
        assert_eq!(sessions.finish(&state, &headers, false).unwrap().0, login(&state, now()));
        let same_name = format!("{}x", &state[..state.len() - 1]);
        for other in ["", "short", &same_name, &random().unwrap(), "\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}"] {
            assert!(sessions.finish(other, &headers, false).is_none() || other == state, "{other}");
        }
        let old = back(&sessions.begin(&login(&state, now() - LOGIN), &HeaderMap::new(), false).unwrap());
        assert!(sessions.finish(&state, &old, false).is_none());
        // A session is no login, nor the other way round.
        let sealed = sessions.sealer.seal("session", &serde_json::to_vec(&login(&state, now())).unwrap()).unwrap();
        let mut forged = HeaderMap::new();
        forged.insert(header::COOKIE, format!("{}={sealed}", sessions.login_name(&state).unwrap()).try_into().unwrap());
        assert!(sessions.finish(&state, &forged, false).is_none());
    }

    #[test]
    fn logins_that_are_never_finished_do_not_pile_up() {
        let sessions = sessions();
        let mut jar: Vec<HeaderValue> = Vec::new();
        for _ in 0..20 {
            let state = random().unwrap();
            let login = Login {
                state,
                nonce: String::new(),
                verifier: None,
                target: "/".into(),
                redirect_uri: "/".into(),
                begun: now(),
            };
            for cookie in sessions.begin(&login, &back(&jar), false).unwrap() {
                let text = cookie.to_str().unwrap().to_owned();
                let name = text.split('=').next().unwrap().to_owned();
                jar.retain(|kept| !kept.to_str().unwrap().starts_with(&format!("{name}=")));
                if !text.ends_with("Max-Age=0") {
                    jar.push(cookie);
                }
            }
            assert!(jar.len() <= MAX_LOGINS + 1);
        }
    }
}
