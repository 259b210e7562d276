//! Who a client is to a registry: the answer to its challenge, kept while it is good and renewed before it is not.
//!
//! After distribution's "Token Authentication Specification" and "OAuth 2 Token Authentication". Nothing is sent before a
//! registry asks, and nothing to anybody but the registry and the token server that it names.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::WireError;
use crate::challenge::{Challenge, challenge};
use crate::credentials::{Credential, CredentialError, CredentialFiles, Secret, sensitive};
use crate::http_call::{Http, Payload};

/// Tokens that one client holds: one for each repository it reads, and one more for each it writes.
const TOKENS_MAX: usize = 256;
/// A token server's answer is at most this long, in bytes.
const TOKEN_BYTES_MAX: u64 = 256 << 10;
/// How long a token lasts whose server does not say (the specification's default).
const LIFETIME: Duration = Duration::from_secs(60);
/// No token is believed to last longer: a day. What a server says beyond that gains nothing.
const LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// A token is renewed this long before its end at most, a quarter of its life where that is shorter.
const MARGIN_MAX: Duration = Duration::from_secs(60);

/// What a request needs: a repository, and whether it writes there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Need {
    repository: String,
    writes: bool,
}

impl Need {
    /// Read from the path, which this crate has made.
    pub(crate) fn of(method: &Method, path: &str) -> Self {
        let (rest, ends): (_, &[&str]) = match path.strip_prefix("/v2/") {
            Some(rest) => (rest, &["blobs", "manifests", "tags", "referrers"]),
            None => (
                path.strip_prefix("/lamina/v1/").unwrap_or_default(),
                &["images", "moved", "traces", "profiles", "chunks", "layers"],
            ),
        };
        let parts: Vec<&str> = rest.split('/').collect();
        let end = parts.iter().rposition(|part| ends.contains(part)).unwrap_or(0);
        let writes = ![Method::GET, Method::HEAD].contains(method);
        Self { repository: parts[..end].join("/"), writes }
    }
}

/// What a request says of its sender.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) header: HeaderValue,
    /// Whose credential it comes from, for messages.
    pub(crate) origin: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Question {
    realm: String,
    service: String,
    scope: String,
}

struct Token {
    sent: Sent,
    question: Question,
    renew_at: Instant,
    ends_at: Instant,
}

#[derive(Default)]
struct State {
    /// For a registry that asks for no token.
    direct: Option<Sent>,
    tokens: HashMap<Need, Token>,
}

/// One client's answers to one registry's challenges.
pub(crate) struct Auth {
    http: Arc<Http>,
    host: String,
    is_secure: bool,
    files: CredentialFiles,
    state: Mutex<State>,
    /// One token is asked for at a time: whoever waits finds it there.
    asking: Semaphore,
}

impl Auth {
    pub(crate) fn new(http: Arc<Http>, host: &str, is_secure: bool, files: CredentialFiles) -> Self {
        let (state, asking) = (Mutex::default(), Semaphore::new(1));
        Self { http, host: host.to_owned(), is_secure, files, state, asking }
    }

    /// What to send with a request. A token that is about to end is replaced first.
    pub(crate) async fn header(&self, need: &Need) -> Option<Sent> {
        let (old, question) = {
            let state = self.state.lock();
            let Some(token) = state.tokens.get(need) else { return state.direct.clone() };
            let now = Instant::now();
            if now < token.renew_at {
                return Some(token.sent.clone());
            }
            (Some(token.sent.clone()).filter(|_| now < token.ends_at), token.question.clone())
        };
        match self.token(need, question, None).await {
            Ok(new) => new,
            // while it lasts the old one does, and after that the registry asks again
            Err(error) => {
                tracing::debug!(%error, "a token was not renewed");
                old
            }
        }
    }

    /// What to answer to a 401 whose request came with `sent`; `None` where there is nothing better to say.
    pub(crate) async fn answer(
        &self,
        need: &Need,
        headers: &HeaderMap,
        sent: Option<&Sent>,
    ) -> Result<Option<Sent>, WireError> {
        match challenge(headers) {
            None => Ok(None),
            Some(Challenge::Bearer { realm, service, scope }) => {
                self.token(need, Question { realm, service, scope }, sent).await
            }
            Some(Challenge::Basic) => {
                let Some(credential) = self.credential(need).await? else { return Ok(None) };
                let direct = direct(&credential).filter(|direct| is_news(direct, sent));
                self.state.lock().direct.clone_from(&direct);
                Ok(direct)
            }
        }
    }

    /// For messages: why nothing was sent.
    pub(crate) fn nobody(&self) -> String {
        format!(
            "no credential was sent, since none is configured for this registry (looked in: {}); log in with docker, podman or skopeo",
            self.files.places()
        )
    }

    async fn credential(&self, need: &Need) -> Result<Option<Credential>, WireError> {
        let found = self.files.find(&self.host, &need.repository).await;
        found.map_err(|CredentialError { origin, reason }| WireError::Credential {
            host: self.host.clone(),
            origin,
            reason,
        })
    }

    /// A token for `need` that is not `refused`.
    async fn token(
        &self,
        need: &Need,
        question: Question,
        refused: Option<&Sent>,
    ) -> Result<Option<Sent>, WireError> {
        let _turn = self.asking.acquire().await.expect("never closed");
        if let Some(token) = self.state.lock().tokens.get(need)
            && Instant::now() < token.renew_at
            && is_news(&token.sent, refused)
        {
            return Ok(Some(token.sent.clone()));
        }
        let credential = self.credential(need).await?;
        if let Some(Credential { secret: Secret::Bearer(_), .. }) = &credential {
            return Ok(credential.as_ref().and_then(direct).filter(|direct| is_news(direct, refused)));
        }
        let asked = Instant::now();
        let Issued { token, lifetime } = self.ask(&question, credential.as_ref()).await?;
        let wrong = || {
            let reason = "its token cannot stand in a header".to_owned();
            WireError::Answer { url: question.realm.clone(), reason }
        };
        let header = sensitive(&format!("Bearer {token}")).ok_or_else(wrong)?;
        let origin = match &credential {
            Some(credential) => format!("a token for {} was sent", credential.origin),
            None => format!("a token for nobody was sent: {}", self.nobody()),
        };
        let sent = Sent { header, origin: origin.into() };
        let renew_at = asked + (lifetime - MARGIN_MAX.min(lifetime / 4));
        let mut state = self.state.lock();
        if state.tokens.len() >= TOKENS_MAX {
            // they can all be had again
            state.tokens.clear();
        }
        let token = Token { sent: sent.clone(), question, renew_at, ends_at: asked + lifetime };
        state.tokens.insert(need.clone(), token);
        Ok(Some(sent))
    }

    /// Asks the token server.
    async fn ask(&self, question: &Question, credential: Option<&Credential>) -> Result<Issued, WireError> {
        let Question { realm, service, scope } = question;
        if self.is_secure && !realm.starts_with("https://") {
            let reason = format!("its token server {realm} would see credentials in the clear");
            return Err(WireError::Answer { url: self.host.clone(), reason });
        }
        let mut parameters = vec![("service", service.as_str())];
        parameters.extend(scope.split(' ').filter(|scope| !scope.is_empty()).map(|scope| ("scope", scope)));
        let (request, payload) = match credential.map(|credential| &credential.secret) {
            Some(Secret::Identity(token)) => {
                parameters.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "lamina"),
                    ("refresh_token", token),
                ]);
                let request = Request::post(realm.as_str())
                    .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
                (request, Payload::Whole(Bytes::from(encoded(&parameters))))
            }
            _ => {
                let separator = if realm.contains('?') { '&' } else { '?' };
                let mut request = Request::get(format!("{realm}{separator}{}", encoded(&parameters)));
                if let Some(header) = credential.and_then(Credential::header) {
                    request = request.header(header::AUTHORIZATION, header);
                }
                (request, Payload::Empty)
            }
        };
        let no_url = |error: http::Error| {
            let reason = format!("its token server {realm:?} cannot be asked: {error}");
            WireError::Answer { url: self.host.clone(), reason }
        };
        let request = request.header(header::USER_AGENT, crate::client::USER_AGENT);
        let request = request.body(payload.into_body()).map_err(no_url)?;
        let mut answer = self.http.send(request).await?;
        answer.credential = match credential {
            Some(credential) => format!("{} was sent to this token server", credential.origin).into(),
            None => self.nobody().into(),
        };
        // the query says nothing that a person needs
        answer.url.clone_from(realm);
        let answer = answer.expect(&[StatusCode::OK]).await?;
        let bytes = answer.bytes(TOKEN_BYTES_MAX).await?;
        Issued::parse(&bytes).ok_or_else(|| {
            let reason = "it answers without a token".to_owned();
            WireError::Answer { url: realm.clone(), reason }
        })
    }
}

/// What needs no token server.
fn direct(credential: &Credential) -> Option<Sent> {
    let origin = format!("{} was sent", credential.origin).into();
    Some(Sent { header: credential.header()?, origin })
}

fn is_news(new: &Sent, refused: Option<&Sent>) -> bool {
    refused.is_none_or(|refused| refused.header != new.header)
}

/// What a token server gave.
#[derive(Debug, PartialEq, Eq)]
struct Issued {
    token: String,
    lifetime: Duration,
}

impl Issued {
    fn parse(bytes: &[u8]) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }
        let Answer { token, access_token, expires_in } = serde_json::from_slice(bytes).ok()?;
        let token = token.or(access_token).filter(|token| !token.is_empty())?;
        let lifetime = expires_in.filter(|seconds| *seconds > 0).map_or(LIFETIME, Duration::from_secs);
        Some(Self { token, lifetime: lifetime.min(LIFETIME_MAX) })
    }
}

/// `a=b&c=d`, with everything encoded that is not unreserved (RFC 3986, 2.3).
fn encoded(parameters: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in parameters {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(byte.into()),
                other => text.push_str(&format!("%{other:02X}")),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_needs_its_repository_and_whether_it_writes() {
        for (method, path, repository, writes) in [
            (Method::GET, "/v2/", "", false),
            (Method::GET, "/v2/a/b/manifests/t", "a/b", false),
            (Method::HEAD, "/v2/blobs/blobs/sha256:0", "blobs", false),
            (Method::POST, "/v2/a/blobs/uploads/", "a", true),
            (Method::PUT, "/v2/a/blobs/uploads/1", "a", true),
            (Method::GET, "/v2/a/tags/list", "a", false),
            (Method::POST, "/lamina/v1/a/b/layers", "a/b", true),
            (Method::GET, "/lamina/v1/a/b/moved/sha256:00", "a/b", false),
            (Method::GET, "/lamina/v1/a/images/sha256:0", "a", false),
        ] {
            let expected = Need { repository: repository.to_owned(), writes };
            assert_eq!(Need::of(&method, path), expected, "{path}");
        }
    }

    #[test]
    fn an_answer_of_a_token_server_is_read_as_both_specifications_have_it() {
        let issued = |text: &str| Issued::parse(text.as_bytes()).map(|it| (it.token, it.lifetime.as_secs()));
        assert_eq!(issued(r#"{"token":"a","expires_in":300}"#), Some(("a".into(), 300)));
        assert_eq!(issued(r#"{"access_token":"b","issued_at":"x"}"#), Some(("b".into(), 60)));
        assert_eq!(issued(r#"{"token":"a","access_token":"b","expires_in":0}"#), Some(("a".into(), 60)));
        assert_eq!(issued(r#"{"token":"a","expires_in":18446744073709551615}"#), Some(("a".into(), 86400)));
        for wrong in ["", "{}", r#"{"token":""}"#, r#"{"token":1}"#, "[]"] {
            assert_eq!(issued(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn parameters_are_encoded() {
        let text = encoded(&[("service", "a b&c"), ("scope", "repository:a/b:pull,push")]);
        assert_eq!(text, "service=a%20b%26c&scope=repository%3Aa%2Fb%3Apull%2Cpush");
    }
}
