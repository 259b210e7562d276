//! Every error a client can see, translated once: into a status and an OCI error document.

use std::sync::Arc;

use http::{HeaderValue, Response, StatusCode, header};
use lamina_image::{Digest, DocumentError};
use lamina_store::{ParseNameError, StoreError};
use lamina_wire::WireError;
use serde_json::json;

use crate::body::{Body, full};

/// What a manifest names and the repository lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// What it is to the manifest.
    pub what: &'static str,
    /// Its digest.
    pub digest: Digest,
}

impl std::fmt::Display for Absent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, digest } = self;
        write!(f, "the manifest names {what} {digest}, which is not in this repository; push it first")
    }
}

fn absent(absent: &[Absent]) -> String {
    absent.iter().map(Absent::to_string).collect::<Vec<_>>().join("; ")
}

/// Why a request was refused, after distribution-spec 1.1, "Error Codes".
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nothing is served under this path.
    #[error("there is nothing at this path")]
    NotFound,
    /// The path is served, the method is not.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A name that the grammar does not allow.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// No such repository.
    #[error("there is no repository {0}")]
    NameUnknown(String),
    /// No such blob.
    #[error("there is no blob {0}")]
    BlobUnknown(Digest),
    /// No upload has this name, or not in this repository.
    #[error("there is no upload {0:?} in this repository: it has ended, expired, or never began")]
    UploadUnknown(String),
    /// No such manifest.
    #[error("there is no manifest {0}")]
    ManifestUnknown(String),
    /// A manifest names something that is not here.
    #[error("{}", absent(.0))]
    ManifestBlobUnknown(Vec<Absent>),
    /// A manifest that cannot be taken.
    #[error("{0}")]
    ManifestInvalid(String),
    /// A digest that is none, or not that of the bytes.
    #[error("{0}")]
    DigestInvalid(String),
    /// A part of an upload that does not continue it.
    #[error("the upload has {received} bytes; go on from there")]
    OutOfOrder {
        /// How many bytes have come.
        received: u64,
        /// Where to go on.
        location: String,
    },
    /// A request that contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// A range that lies outside the blob.
    #[error("the range lies outside the {0} bytes of the blob")]
    Range(u64),
    /// A body over its limit.
    #[error("the body is over the limit of {0} bytes")]
    TooLarge(usize),
    /// The client went away or stood still in the middle of its body.
    #[error("the body ended in the middle: {0}")]
    Body(String),
    /// The client is too slow.
    #[error("the body came too slowly: {0}")]
    Slow(String),
    /// The image has no tree yet, or never will.
    #[error("image {0} has no tree, so nothing can be learnt of its starts; its status says why")]
    NoTree(Digest),
    /// Too much of this kind is on its way already. Retrying later will help.
    #[error("too many requests of this kind are being worked on; try again later")]
    Busy,
    /// Nobody in particular asks, or somebody who is not who it says, or with a token for something else.
    #[error("{reason}")]
    Unauthorized {
        /// The challenge.
        challenge: String,
        /// What is missing.
        reason: &'static str,
    },
    /// The user may not.
    #[error("{0}")]
    Denied(String),
    /// Too many wrong passwords came from there.
    #[error("too many wrong passwords; try again in {0} s")]
    TooManyAttempts(u64),
    /// The upstream did not answer as hoped.
    #[error("{}", said(.0))]
    Upstream(#[from] WireError),
    /// What comes from the upstream cannot be kept while it comes.
    #[error("what comes from the upstream cannot be kept in {path}: {error}")]
    Spool {
        /// The directory.
        path: String,
        /// What the file system says.
        #[source]
        error: std::io::Error,
    },
    /// What many waited for failed for all of them.
    #[error(transparent)]
    Shared(Arc<ApiError>),
    /// The store said no.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<DocumentError> for ApiError {
    fn from(error: DocumentError) -> Self {
        Self::ManifestInvalid(error.to_string())
    }
}

impl ApiError {
    /// The error itself, however many wait for it.
    pub(crate) fn root(&self) -> &Self {
        match self {
            Self::Shared(error) => error.root(),
            other => other,
        }
    }

    /// Whether the upstream may answer better later.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self.root(), Self::Upstream(error) if error.is_passing())
    }

    /// The HTTP status and the code of the OCI error document.
    pub(crate) fn parts(&self) -> (StatusCode, &'static str) {
        match self {
            Self::NotFound => (StatusCode::NOT_FOUND, "UNSUPPORTED"),
            Self::Unsupported(_) => (StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED"),
            Self::Name(_) => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            Self::NameUnknown(_) => (StatusCode::NOT_FOUND, "NAME_UNKNOWN"),
            Self::BlobUnknown(_) => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN"),
            Self::UploadUnknown(_) => (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            Self::ManifestUnknown(_) => (StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN"),
            Self::ManifestBlobUnknown(_) => (StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN"),
            Self::ManifestInvalid(_) => (StatusCode::BAD_REQUEST, "MANIFEST_INVALID"),
            Self::DigestInvalid(_) => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            Self::OutOfOrder { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID"),
            Self::Invalid(_) | Self::Body(_) => (StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID"),
            Self::Slow(_) => (StatusCode::REQUEST_TIMEOUT, "BLOB_UPLOAD_INVALID"),
            Self::Range(_) => (StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID"),
            Self::TooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
            Self::NoTree(_) => (StatusCode::CONFLICT, "UNSUPPORTED"),
            Self::Busy => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
            Self::Unauthorized { .. } => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
            Self::Denied(_) => (StatusCode::FORBIDDEN, "DENIED"),
            Self::TooManyAttempts(_) => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
            Self::Upstream(error) => upstream_parts(error),
            Self::Spool { error, .. } if is_full(error) => (StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN"),
            Self::Spool { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN"),
            Self::Shared(error) => error.parts(),
            Self::Store(error) => store_parts(error),
        }
    }

    /// What is kept of it for whoever asks later: nothing of the inside.
    pub(crate) fn reason(&self) -> String {
        match self.root() {
            Self::Upstream(_) => self.to_string(),
            other if other.parts().0.is_server_error() => "the registry failed; its log says more".to_owned(),
            other => other.to_string(),
        }
    }

    /// What the client reads: one entry for each thing that is wrong.
    fn documents(&self, code: &str, request: &str) -> Vec<serde_json::Value> {
        let digest_of = |digest: &Digest| json!({ "digest": digest });
        match self.root() {
            Self::ManifestBlobUnknown(absent) => {
                let entries = absent.iter().map(|absent| {
                    json!({ "code": code, "message": absent.to_string(), "detail": digest_of(&absent.digest) })
                });
                entries.collect()
            }
            Self::BlobUnknown(digest) => {
                vec![json!({ "code": code, "message": self.to_string(), "detail": digest_of(digest) })]
            }
            // whoever asks can see to it at the upstream
            Self::Upstream(_) => vec![json!({ "code": code, "message": self.to_string(), "detail": null })],
            // what goes wrong inside is for the log
            other if other.parts().0.is_server_error() => {
                let text = "the registry failed; its log says more, under this request's id";
                vec![json!({ "code": code, "message": text, "detail": { "request": request } })]
            }
            other => vec![json!({ "code": code, "message": other.to_string(), "detail": null })],
        }
    }

    /// The answer to the `request` of this id. What is our own fault is logged here, in full.
    pub(crate) fn response(&self, request: &str) -> Response<Body> {
        let (status, code) = self.parts();
        if status.is_server_error() {
            tracing::error!(%status, code, error = %self, "a request failed");
        }
        let mut response =
            Response::new(full(json!({ "errors": self.documents(code, request) }).to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let ours = "digits and validated names are header values";
        match self.root() {
            Self::OutOfOrder { received, location } => {
                headers.insert(header::LOCATION, location.parse().expect(ours));
                headers.insert(header::RANGE, crate::uploads::range_of(*received).parse().expect(ours));
            }
            Self::Unauthorized { challenge, .. } => {
                let challenge = challenge.parse().expect("a checked host, validated names and our own words");
                headers.insert(header::WWW_AUTHENTICATE, challenge);
            }
            Self::TooManyAttempts(seconds) => {
                headers.insert(header::RETRY_AFTER, (*seconds).into());
            }
            Self::Range(size) => {
                headers.insert(header::CONTENT_RANGE, format!("bytes */{size}").parse().expect(ours));
            }
            _ if [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
            }
            _ => {}
        }
        response
    }
}

/// What a client is told of the upstream: not whose credential was sent, and where it is kept, nor what a URL that it
/// led to is signed with.
fn said(error: &WireError) -> String {
    without_queries(&match error {
        WireError::Denied { url, status, message, .. } => format!(
            "the upstream refuses: {url}: {status}: {message}; this registry has no credential there, or not one that may"
        ),
        WireError::Credential { host, .. } => {
            format!("this registry cannot get at its credential for the upstream {host}; its log says why")
        }
        other => format!("the upstream does not answer as hoped: {other}"),
    })
}

/// The text, its URLs up to their `?`.
fn without_queries(text: &str) -> String {
    let cut = |word: &str| match (word.find("://"), word.find('?')) {
        (Some(scheme), Some(query)) if scheme < query => {
            let url = word.trim_end_matches(|end: char| end.is_whitespace() || ":;,)\"'".contains(end));
            [&word[..query], &word[url.len().max(query + 1)..]].concat()
        }
        _ => word.to_owned(),
    };
    text.split_inclusive(char::is_whitespace).map(cut).collect()
}

fn upstream_parts(error: &WireError) -> (StatusCode, &'static str) {
    match error {
        WireError::Denied { .. } => (StatusCode::FORBIDDEN, "DENIED"),
        WireError::Status { status: 429, .. } => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
        WireError::Unreachable { .. } | WireError::Timeout { .. } | WireError::Status { .. } => {
            (StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN")
        }
        _ => (StatusCode::BAD_GATEWAY, "UNKNOWN"),
    }
}

fn store_parts(error: &StoreError) -> (StatusCode, &'static str) {
    match error {
        StoreError::Missing(_) => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN"),
        StoreError::Digest { .. } => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
        StoreError::UploadUnknown(_) => (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
        StoreError::UploadBusy(_) => (StatusCode::CONFLICT, "BLOB_UPLOAD_INVALID"),
        StoreError::UploadsFull(_) => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
        StoreError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
        StoreError::Contended(_) => (StatusCode::CONFLICT, "TOOMANYREQUESTS"),
        StoreError::Collecting(_) | StoreError::Closed => {
            (StatusCode::SERVICE_UNAVAILABLE, "TOOMANYREQUESTS")
        }
        _ if is_full(error) => (StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN"),
        // a bucket that is slow or says no now may say yes later
        StoreError::Object(_) | StoreError::Truncated(_) => (StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN"),
    }
}

/// Whether the disk below is full.
fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_url_is_signed_with_is_not_told() {
        for (text, told) in [
            ("https://a/b?sig=1: 403: no; why?", "https://a/b: 403: no; why?"),
            ("see (https://a/b?x=http://c?d) there", "see (https://a/b) there"),
            ("https://a/b?\nnext", "https://a/b\nnext"),
            ("is it? https://a/b is", "is it? https://a/b is"),
        ] {
            assert_eq!(without_queries(text), told);
        }
        let (url, message) = ("https://cdn/blob?signature=secret".to_owned(), "expired".to_owned());
        let denied = WireError::Denied { url, status: 403, message, credential: "the file".to_owned() };
        let told = ApiError::from(denied).reason();
        assert!(told.contains("https://cdn/blob: 403") && !told.contains("secret"), "{told}");
    }

    #[test]
    fn what_goes_wrong_inside_is_not_kept_as_a_reason() {
        let error = std::io::Error::other("broken");
        let spool = ApiError::Shared(Arc::new(ApiError::Spool { path: "/inside".to_owned(), error }));
        assert!(!spool.reason().contains("inside") && spool.to_string().contains("inside"));
        let absent = ApiError::BlobUnknown(Digest::of(b"absent"));
        assert_eq!(absent.reason(), absent.to_string());
    }
}
