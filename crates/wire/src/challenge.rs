//! What a registry wants to know before it answers: the `WWW-Authenticate` header.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// Headers of this kind in one answer that are looked at.
const HEADERS_MAX: usize = 8;

/// One way to say who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password, each time.
    Basic,
    /// A token of a token server (distribution's "Token Authentication Specification").
    Bearer {
        /// The token server's URL.
        realm: String,
        /// What the registry is called there; may be empty.
        service: String,
        /// What is asked for; may be empty.
        scope: String,
    },
}

/// The best of the ways that an answer offers: a token rather than the password itself.
pub(crate) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let texts = headers.get_all(WWW_AUTHENTICATE).iter().take(HEADERS_MAX);
    let offered = texts.filter_map(|text| http_auth::parse_challenges(text.to_str().ok()?).ok()).flatten();
    let mut basic = None;
    for one in offered {
        if one.scheme.eq_ignore_ascii_case("basic") {
            basic = Some(Challenge::Basic);
        }
        let value = |name: &str| {
            let found = one.params.iter().find(|(found, _)| found.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped()).unwrap_or_default()
        };
        let realm = value("realm");
        if one.scheme.eq_ignore_ascii_case("bearer") && !realm.is_empty() {
            return Some(Challenge::Bearer { realm, service: value("service"), scope: value("scope") });
        }
    }
    basic
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(texts: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for text in texts {
            headers.append(WWW_AUTHENTICATE, text.parse().unwrap());
        }
        challenge(&headers)
    }

    #[test]
    fn a_token_is_preferred_to_a_password_whatever_the_order() {
        let bearer = r#"Bearer realm="https://t.example/token",service="r",scope="repository:a:pull,push""#;
        let expected = Challenge::Bearer {
            realm: "https://t.example/token".into(),
            service: "r".into(),
            scope: "repository:a:pull,push".into(),
        };
        for texts in [&[bearer][..], &[r#"Basic realm="r""#, bearer], &[bearer, "basic realm=r"]] {
            assert_eq!(read(texts), Some(expected.clone()), "{texts:?}");
        }
        assert_eq!(read(&[r#"Basic realm="r", charset="UTF-8""#]), Some(Challenge::Basic));
        assert_eq!(read(&["Negotiate", "Bearer service=x"]), None);
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_a_panic(text in "[ -~]{0,100}") {
            read(&[&text]);
            read(&[&format!("Bearer {text}")]);
        }
    }
}
