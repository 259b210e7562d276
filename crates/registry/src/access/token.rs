//! Tokens: what somebody asked for and was granted, for a few minutes, signed by this registry for itself.
//!
//! JSON web tokens with the claims of distribution's "Token Authentication Implementation", by HMAC with SHA-256: whoever
//! signs is whoever checks, so no key is public. No other algorithm is taken, whatever a token says of itself.

use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use lamina_store::Repo;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Action;

/// Who issues tokens, and whom they are for.
pub(super) const SERVICE: &str = "lamina";
/// Scopes in one request that are looked at: a push that mounts from some other repositories has a few.
const SCOPES_MAX: usize = 32;
/// No token is longer, in bytes: it must fit a header.
const TOKEN_BYTES_MAX: usize = 16 << 10;

/// What may be done in one repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Grant {
    #[serde(rename = "type")]
    kind: String,
    name: String,
    actions: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    /// Empty for nobody in particular.
    sub: String,
    iat: u64,
    nbf: u64,
    exp: u64,
    access: Vec<Grant>,
}

/// Issues and opens them.
pub(super) struct Tokens {
    encoding: EncodingKey,
    decoding: DecodingKey,
    validation: Validation,
    lifetime: Duration,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({:?})", self.lifetime)
    }
}

impl Tokens {
    pub(super) fn new(key: &[u8], lifetime: Duration) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_audience(&[SERVICE]);
        validation.set_issuer(&[SERVICE]);
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
        validation.validate_nbf = true;
        // replicas whose clocks differ by more have other troubles
        validation.leeway = 5;
        let (encoding, decoding) = (EncodingKey::from_secret(key), DecodingKey::from_secret(key));
        Self { encoding, decoding, validation, lifetime }
    }

    /// A token server's answer. `now` in seconds since 1970.
    pub(super) fn issue(&self, user: Option<&str>, access: Vec<Grant>, now: u64) -> String {
        let claims = Claims {
            iss: SERVICE.to_owned(),
            aud: SERVICE.to_owned(),
            sub: user.unwrap_or_default().to_owned(),
            iat: now,
            nbf: now,
            exp: now + self.lifetime.as_secs(),
            access,
        };
        let token = encode(&Header::new(Algorithm::HS256), &claims, &self.encoding);
        let token = token.expect("strings and numbers are JSON, and any key signs");
        json!({ "token": token, "access_token": token, "expires_in": self.lifetime.as_secs() }).to_string()
    }

    /// Whose token it is and what it allows; `None` where it is not ours, or not good now.
    pub(super) fn open(&self, token: &str) -> Option<(Option<String>, Vec<Grant>)> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let claims = decode::<Claims>(token, &self.decoding, &self.validation).ok()?.claims;
        Some((Some(claims.sub).filter(|user| !user.is_empty()), claims.access))
    }
}

/// Whether a token allows it.
pub(super) fn allow(grants: &[Grant], repo: &Repo, action: Action) -> bool {
    let action = action.to_string();
    grants
        .iter()
        .any(|one| one.kind == "repository" && one.name == repo.as_str() && one.actions.contains(&action))
}

/// What of the scopes (`repository:<name>:<actions>`, several with spaces between them) is granted.
pub(super) fn grants(scopes: &[&str], may: impl Fn(&Repo, Action) -> bool) -> Vec<Grant> {
    let scopes = scopes.iter().flat_map(|scope| scope.split(' ')).take(SCOPES_MAX);
    let granted = scopes.filter_map(|scope| {
        let (kind, rest) = scope.split_once(':')?;
        let (name, actions) = rest.rsplit_once(':')?;
        let repo: Repo = name.parse().ok().filter(|_| kind == "repository")?;
        let asked = |action: Action| actions.split(',').any(|one| one == "*" || one == action.to_string());
        let allowed = [Action::Pull, Action::Push, Action::Delete].into_iter();
        let allowed = allowed.filter(|action| asked(*action) && may(&repo, *action));
        let actions: Vec<String> = allowed.map(|action| action.to_string()).collect();
        (!actions.is_empty()).then(|| Grant { kind: kind.to_owned(), name: name.to_owned(), actions })
    });
    granted.collect()
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;
    use proptest::prelude::*;

    use super::*;

    fn now() -> u64 {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
    }

    fn tokens(key: &[u8]) -> Tokens {
        Tokens::new(key, Duration::from_secs(60))
    }

    fn token(tokens: &Tokens, now: u64) -> String {
        let access = grants(&["repository:a/b:pull,push"], |_, action| action == Action::Pull);
        let answer: serde_json::Value =
            serde_json::from_str(&tokens.issue(Some("alice"), access, now)).unwrap();
        answer["token"].as_str().unwrap().to_owned()
    }

    #[test]
    fn a_token_says_whose_it_is_and_allows_what_was_granted() {
        let tokens = tokens(b"key");
        let (user, access) = tokens.open(&token(&tokens, now())).unwrap();
        assert_eq!(user.as_deref(), Some("alice"));
        let allows = |name: &str, action| allow(&access, &name.parse().unwrap(), action);
        assert!(allows("a/b", Action::Pull));
        assert!(!allows("a/b", Action::Push) && !allows("a", Action::Pull) && !allows("a/b/c", Action::Pull));
    }

    #[test]
    fn a_token_that_is_old_or_early_or_anothers_or_unsigned_opens_nothing() {
        let ours = tokens(b"key");
        let good = token(&ours, now());
        assert!(ours.open(&good).is_some());
        assert!(ours.open(&token(&ours, now() - 120)).is_none(), "expired");
        assert!(ours.open(&token(&ours, now() + 600)).is_none(), "not yet good");
        assert!(ours.open(&token(&tokens(b"other"), now())).is_none(), "another key");
        let parts: Vec<&str> = good.split('.').collect();
        let header = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        for algorithm in ["none", "None", "HS384", "RS256"] {
            let head = header(&format!(r#"{{"alg":"{algorithm}","typ":"JWT"}}"#));
            for signature in ["", parts[2]] {
                assert!(ours.open(&format!("{head}.{}.{signature}", parts[1])).is_none(), "{algorithm}");
            }
        }
        let payload = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
        let more = header(&payload.replace("\"pull\"", "\"pull\",\"push\""));
        assert!(ours.open(&format!("{}.{more}.{}", parts[0], parts[2])).is_none(), "changed");
        assert!(ours.open(&"a".repeat(1 << 20)).is_none());
    }

    #[test]
    fn scopes_are_granted_as_far_as_the_user_may() {
        let may = |repo: &Repo, action| repo.as_str() == "a" && action != Action::Delete;
        let granted = |scopes: &[&str]| -> Vec<(String, String)> {
            grants(scopes, may).into_iter().map(|one| (one.name, one.actions.join(","))).collect()
        };
        let a = |actions: &str| ("a".to_owned(), actions.to_owned());
        assert_eq!(granted(&["repository:a:*"]), [a("pull,push")]);
        assert_eq!(
            granted(&["repository:a:pull repository:b:pull", "repository:a:push"]),
            [a("pull"), a("push")]
        );
        for scope in
            ["", "a", "repository:a", "repository:../a:pull", "registry:catalog:*", "repository:a:delete"]
        {
            assert_eq!(granted(&[scope]), [], "{scope}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_no_token_and_no_panic(text in "[A-Za-z0-9._-]{0,200}", scope in "\\PC{0,60}") {
            prop_assert!(tokens(b"key").open(&text).is_none());
            grants(&[&scope], |_, _| true);
        }
    }
}
