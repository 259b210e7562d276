//! Who may do what: users, rules for repositories, tokens, and how far deduplication reaches.
//!
//! A request says who is asking by Basic or by a token of this registry's own (`token.rs`). A token allows what it was asked
//! for and granted, never more than its user may at the moment; what is known of chunks, layers and blobs of other repositories is
//! told by what the user may read and by the scope of deduplication.

use std::net::IpAddr;
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderMap, header};
use lamina_store::Repo;

mod attempts;
mod rules;
mod token;
mod users;

pub use rules::{Action, DedupScope, Rule, RuleError, Who};
pub use users::{Users, UsersError};

use crate::ApiError;
use attempts::Attempts;
use token::{Grant, Tokens};

/// How a registry is guarded.
#[derive(Debug)]
pub struct AccessConfig {
    /// Who there is.
    pub users: Users,
    /// What they may do. Without any, every user may do everything.
    pub rules: Vec<Rule>,
    /// How far a push, or a conversion, uses what other repositories have.
    pub dedup: DedupScope,
    /// How long a token is good.
    pub token_lifetime: Duration,
    /// What tokens are signed with; the same on all replicas of a registry. Unguessable.
    pub token_key: Vec<u8>,
    /// `http[s]://host[:port]` under which clients reach this registry; what they asked for where it is not set.
    pub external_url: Option<String>,
    /// Whether clients ask by TLS, where no URL says it.
    pub is_secure: bool,
}

/// The guard.
#[derive(Debug)]
pub struct Access {
    users: Users,
    rules: Vec<Rule>,
    pub(crate) dedup: DedupScope,
    tokens: Tokens,
    attempts: Attempts,
    external_url: Option<String>,
    is_secure: bool,
}

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Caller {
    /// `None` for nobody in particular.
    pub(crate) user: Option<String>,
    /// What a token allows; `None` where there is none, and the user's rights are all that counts.
    grants: Option<Vec<Grant>>,
}

impl Access {
    /// A guard that lets in as this says.
    pub fn new(config: AccessConfig) -> Self {
        let AccessConfig { users, rules, dedup, token_lifetime, token_key, external_url, is_secure } = config;
        let tokens = Tokens::new(&token_key, token_lifetime);
        Self { users, rules, dedup, tokens, attempts: Attempts::default(), external_url, is_secure }
    }

    /// Who sends these headers. *Errors*: a credential that is none, or wrong.
    ///
    /// `needed` is what the challenge then asks for.
    pub(crate) async fn identify(
        &self,
        headers: &HeaderMap,
        peer: IpAddr,
        needed: Option<(&Repo, Action)>,
    ) -> Result<Caller, ApiError> {
        let Some(value) = headers.get(AUTHORIZATION) else { return Ok(Caller::default()) };
        let refused = |reason: &'static str| self.unauthorized(headers, needed, reason);
        let text = value.to_str().map_err(|_| refused("the credential is not text"))?;
        let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
        if scheme.eq_ignore_ascii_case("bearer") {
            let (user, grants) = self
                .tokens
                .open(rest.trim())
                .ok_or_else(|| refused("the token is not, or not any more, valid"))?;
            return Ok(Caller { user, grants: Some(grants) });
        }
        if !scheme.eq_ignore_ascii_case("basic") {
            return Err(refused("only Basic and Bearer credentials are taken"));
        }
        let (user, password) = users::basic(rest).ok_or_else(|| refused("the credential is not Basic"))?;
        if self.users.is_remembered(&user, &password) {
            return Ok(Caller { user: Some(user), grants: None });
        }
        let turn = self.users.turn().await;
        // asked now: those before it in the queue may have been wrong
        if let Some(wait) = self.attempts.wait(peer) {
            return Err(ApiError::TooManyAttempts(wait.as_secs() + 1));
        }
        if !self.users.verify(&user, &password, turn).await {
            self.attempts.failed(peer);
            tracing::warn!(%peer, user, "a wrong password");
            return Err(refused("the user is unknown or the password wrong"));
        }
        Ok(Caller { user: Some(user), grants: None })
    }

    /// Lets the caller in, or says why not and what would help.
    pub(crate) fn check(
        &self,
        caller: &Caller,
        headers: &HeaderMap,
        repo: &Repo,
        action: Action,
    ) -> Result<(), ApiError> {
        let granted = caller.grants.as_ref().is_none_or(|grants| token::allow(grants, repo, action));
        let may = self.may(caller, repo, action);
        if granted && may {
            return Ok(());
        }
        // another token, or any user, may help; a user who may not will not be helped by a token
        if caller.user.is_none() || (may && !granted) {
            return Err(self.unauthorized(headers, Some((repo, action)), "this needs another credential"));
        }
        let user = caller.user.clone().unwrap_or_default();
        Err(ApiError::Denied(format!("{user} may not {action} {repo}")))
    }

    /// Whether the rules let the caller's user do it, whatever its token is for.
    pub(crate) fn may(&self, caller: &Caller, repo: &Repo, action: Action) -> bool {
        rules::allow(&self.rules, caller.user.as_deref(), repo, action)
    }

    /// `/v2/`: whether anybody who can be somebody is there.
    pub(crate) fn check_base(&self, caller: &Caller, headers: &HeaderMap) -> Result<(), ApiError> {
        if caller.user.is_some() || caller.grants.is_some() {
            return Ok(());
        }
        Err(self.unauthorized(headers, None, "this registry wants to know who is asking"))
    }

    /// `GET /token`: a token for what the caller asks and may.
    pub(crate) fn issue(
        &self,
        caller: &Caller,
        headers: &HeaderMap,
        scopes: &[&str],
        now: u64,
    ) -> Result<String, ApiError> {
        let anonymous = caller.user.is_none();
        if anonymous && !rules::admits_nobody(&self.rules) {
            return Err(self.unauthorized(
                headers,
                None,
                "this registry has nothing for nobody in particular",
            ));
        }
        let grants = token::grants(scopes, |repo, action| self.may(caller, repo, action));
        Ok(self.tokens.issue(caller.user.as_deref(), grants, now))
    }

    /// A 401 that says where to get a token, and for what.
    fn unauthorized(
        &self,
        headers: &HeaderMap,
        needed: Option<(&Repo, Action)>,
        reason: &'static str,
    ) -> ApiError {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        // it goes into a quoted string
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".:-_[]".contains(&byte);
        let host = if host.bytes().all(plain) { host } else { "" };
        let base = self
            .external_url
            .clone()
            .unwrap_or_else(|| format!("{}://{host}", if self.is_secure { "https" } else { "http" }));
        let mut challenge = format!("Bearer realm=\"{base}/token\",service=\"{}\"", token::SERVICE);
        if let Some((repo, action)) = needed {
            let actions = match action {
                Action::Pull => "pull",
                Action::Push => "pull,push",
                Action::Delete => "pull,delete",
            };
            challenge += &format!(",scope=\"repository:{repo}:{actions}\"");
        }
        ApiError::Unauthorized { challenge, reason }
    }
}
