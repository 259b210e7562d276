//! Paths, taken apart once.

use http::Method;
use lamina_image::Digest;
use lamina_store::{Repo, Tag};
use uuid::Uuid;

use crate::{Action, ApiError};

/// How a manifest is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    Tag(Tag),
    Digest(Digest),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Health,
    Ready,
    Metrics,
    Base,
    Token,
    Catalog,
    Blob(Repo, Digest),
    Uploads(Repo),
    Upload(Repo, Uuid),
    Manifest(Repo, Target),
    Tags(Repo),
    Referrers(Repo, Digest),
    Chunks(Repo),
    Layers(Repo),
    Image(Repo, Digest),
    Moved(Repo, Digest),
    Traces(Repo, Digest),
    Profile(Repo, Digest),
}

impl Route {
    /// What must be allowed, and where; `None` of what belongs to no repository.
    pub(crate) fn needs(&self, method: &Method) -> Option<(&Repo, Action)> {
        let reads = [Method::GET, Method::HEAD].contains(method);
        let or_else = |other| if reads { Action::Pull } else { other };
        let deletes = if method == Method::DELETE { Action::Delete } else { Action::Push };
        match self {
            Self::Base | Self::Token | Self::Catalog | Self::Health | Self::Ready | Self::Metrics => None,
            Self::Blob(repo, _) | Self::Manifest(repo, _) => Some((repo, or_else(deletes))),
            Self::Uploads(repo) | Self::Upload(repo, _) | Self::Chunks(repo) | Self::Layers(repo) => {
                Some((repo, Action::Push))
            }
            Self::Tags(repo) | Self::Referrers(repo, _) | Self::Image(repo, _) | Self::Moved(repo, _) => {
                Some((repo, Action::Pull))
            }
            // whoever starts an image may say what it touched: that moves pages, and brings none
            Self::Traces(repo, _) => Some((repo, Action::Pull)),
            Self::Profile(repo, _) => Some((repo, Action::Push)),
        }
    }

    /// Whether it would bring in what others then pull.
    pub(crate) fn is_push(&self, method: &Method) -> bool {
        match self {
            Self::Uploads(_) | Self::Upload(..) | Self::Chunks(_) | Self::Layers(_) => true,
            Self::Manifest(..) => method == Method::PUT,
            _ => false,
        }
    }

    /// What it is called where requests are counted.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Health | Self::Ready => "health",
            Self::Metrics => "metrics",
            Self::Base => "base",
            Self::Token => "token",
            Self::Catalog => "catalog",
            Self::Blob(..) => "blob",
            Self::Uploads(_) | Self::Upload(..) => "upload",
            Self::Manifest(..) => "manifest",
            Self::Tags(_) => "tags",
            Self::Referrers(..) => "referrers",
            Self::Chunks(_) => "chunks",
            Self::Layers(_) => "layers",
            Self::Image(..) => "image",
            Self::Moved(..) => "moved",
            Self::Traces(..) => "traces",
            Self::Profile(..) => "profile",
        }
    }

    /// Takes a path apart. Names are checked, so no percent sign and no `..` gets through.
    pub(crate) fn parse(path: &str) -> Result<Self, ApiError> {
        match path {
            "/v2/" | "/v2" => return Ok(Self::Base),
            "/token" => return Ok(Self::Token),
            "/v2/_catalog" => return Ok(Self::Catalog),
            "/healthz" => return Ok(Self::Health),
            "/readyz" => return Ok(Self::Ready),
            "/metrics" => return Ok(Self::Metrics),
            _ => {}
        }
        if let Some(rest) = path.strip_prefix("/lamina/v1/") {
            let (rest, digest) = rest.rsplit_once('/').ok_or(ApiError::NotFound)?;
            match digest {
                "chunks" => return Ok(Self::Chunks(rest.parse()?)),
                "layers" => return Ok(Self::Layers(rest.parse()?)),
                _ => {}
            }
            let (repo, what) = rest.rsplit_once('/').ok_or(ApiError::NotFound)?;
            let route = match what {
                "images" => Self::Image,
                "moved" => Self::Moved,
                "traces" => Self::Traces,
                "profiles" => Self::Profile,
                _ => return Err(ApiError::NotFound),
            };
            return Ok(route(repo.parse()?, parse_digest(digest)?));
        }
        let rest = path.strip_prefix("/v2/").ok_or(ApiError::NotFound)?;
        let parts: Vec<&str> = rest.split('/').collect();
        match parts.as_slice() {
            [repo @ .., "blobs", "uploads"] | [repo @ .., "blobs", "uploads", ""] => {
                Ok(Self::Uploads(parse_repo(repo)?))
            }
            [repo @ .., "blobs", "uploads", id] => {
                let unknown = |_| ApiError::UploadUnknown(id.chars().take(64).collect());
                Ok(Self::Upload(parse_repo(repo)?, id.parse().map_err(unknown)?))
            }
            [repo @ .., "blobs", digest] => Ok(Self::Blob(parse_repo(repo)?, parse_digest(digest)?)),
            [repo @ .., "manifests", target] => Ok(Self::Manifest(parse_repo(repo)?, parse_target(target)?)),
            [repo @ .., "tags", "list"] => Ok(Self::Tags(parse_repo(repo)?)),
            [repo @ .., "referrers", digest] => Ok(Self::Referrers(parse_repo(repo)?, parse_digest(digest)?)),
            _ => Err(ApiError::NotFound),
        }
    }
}

fn parse_repo(parts: &[&str]) -> Result<Repo, ApiError> {
    Ok(parts.join("/").parse()?)
}

pub(crate) fn parse_digest(text: &str) -> Result<Digest, ApiError> {
    text.parse().map_err(|error: lamina_image::ParseDigestError| ApiError::DigestInvalid(error.to_string()))
}

fn parse_target(text: &str) -> Result<Target, ApiError> {
    if text.contains(':') { Ok(Target::Digest(parse_digest(text)?)) } else { Ok(Target::Tag(text.parse()?)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn every_path_of_the_specification_is_found() {
        let repo: Repo = "a/b".parse().unwrap();
        let digest: Digest = format!("sha256:{HEX}").parse().unwrap();
        let id = Uuid::from_bytes([7; 16]);
        for (path, expected) in [
            ("/v2/".to_owned(), Route::Base),
            ("/v2/_catalog".to_owned(), Route::Catalog),
            ("/healthz".to_owned(), Route::Health),
            ("/readyz".to_owned(), Route::Ready),
            ("/metrics".to_owned(), Route::Metrics),
            (format!("/v2/a/b/blobs/sha256:{HEX}"), Route::Blob(repo.clone(), digest)),
            ("/v2/a/b/blobs/uploads/".to_owned(), Route::Uploads(repo.clone())),
            (format!("/v2/a/b/blobs/uploads/{id}"), Route::Upload(repo.clone(), id)),
            (
                "/v2/a/b/manifests/v1".to_owned(),
                Route::Manifest(repo.clone(), Target::Tag("v1".parse().unwrap())),
            ),
            (
                format!("/v2/a/b/manifests/sha256:{HEX}"),
                Route::Manifest(repo.clone(), Target::Digest(digest)),
            ),
            ("/v2/a/b/tags/list".to_owned(), Route::Tags(repo.clone())),
            (format!("/v2/a/b/referrers/sha256:{HEX}"), Route::Referrers(repo.clone(), digest)),
            (format!("/lamina/v1/a/b/images/sha256:{HEX}"), Route::Image(repo.clone(), digest)),
            (format!("/lamina/v1/a/b/moved/sha256:{HEX}"), Route::Moved(repo.clone(), digest)),
            (format!("/lamina/v1/a/b/traces/sha256:{HEX}"), Route::Traces(repo.clone(), digest)),
            (format!("/lamina/v1/a/b/profiles/sha256:{HEX}"), Route::Profile(repo.clone(), digest)),
        ] {
            assert_eq!(Route::parse(&path).unwrap(), expected, "{path}");
        }
    }

    #[test]
    fn paths_that_climb_or_hide_something_are_refused() {
        for path in [
            "/v2/../manifests/v1",
            "/v2/a/../b/manifests/v1",
            "/v2/a%2fb/manifests/v1",
            "/v2/a/manifests/..",
            "/v2/a/manifests/%2e%2e",
            "/v2/A/manifests/v1",
            "/v2/a//b/tags/list",
            "/v2/manifests/v1",
            "/v2/a/blobs/sha256:xyz",
            "/v2/a/blobs/sha512:00",
            "/v2/a/blobs/sha384:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "/v2/a/blobs/uploads/7",
            "/v1/a",
            "/lamina/v1/traces",
            "/lamina/v1/a/../profiles/sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "/",
            "",
        ] {
            assert!(Route::parse(path).is_err(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path_is_read_without_a_panic(path in "(/v2/|/lamina/v1/)?(\\PC{0,8}/){0,4}(blobs|manifests|tags|list|uploads)?/?\\PC{0,8}") {
            let _ = Route::parse(&path);
        }
    }
}
