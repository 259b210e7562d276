//! Downloads of blobs, and their end.

use http::{HeaderValue, Response, StatusCode, header};
use lamina_image::Digest;
use lamina_store::Repo;

use crate::ApiError;
use crate::api::{Answer, Api, Head, empty, etag_of, not_modified};
use crate::body::{full, streamed};
use crate::range::{Wanted, wanted};

impl Api {
    /// `GET` and `HEAD`, whole or in part.
    pub(crate) async fn read_blob(&self, head: &Head, repo: &Repo, digest: Digest) -> Answer {
        // who only asks may be about to push, and builds on the answer
        let blob = match head.method == http::Method::HEAD {
            true => self.store.take_blob_in(repo, digest).await?,
            false => self.store.blob_in(repo, digest).await?,
        };
        let blob = blob.ok_or(ApiError::BlobUnknown(digest))?;
        if head.knows(digest) {
            return Ok(not_modified(digest));
        }
        let size = blob.size();
        // a range of something else than this is no use to the client
        let same = head.header(header::IF_RANGE).is_none_or(|tag| tag == etag_of(digest));
        let (status, range) = match wanted(head.header(header::RANGE).filter(|_| same), size) {
            Wanted::Whole => (StatusCode::OK, 0..size),
            Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
            Wanted::Outside => return Err(ApiError::Range(size)),
        };
        let body = match head.method == http::Method::HEAD {
            true => full(bytes::Bytes::new()),
            false => {
                let bytes = self.store.read_blob(digest, blob, range.clone()).await?;
                streamed(bytes, self.metrics.sent.clone())
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        let ours = |text: String| text.parse::<HeaderValue>().expect("digits and hexadecimal digits");
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(header::CONTENT_LENGTH, (range.end - range.start).into());
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        headers.insert(header::ETAG, ours(etag_of(digest)));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=31536000, immutable"));
        headers.insert("docker-content-digest", ours(digest.to_string()));
        if status == StatusCode::PARTIAL_CONTENT {
            let content_range = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            headers.insert(header::CONTENT_RANGE, ours(content_range));
        }
        Ok(response)
    }
    /// `DELETE`: the repository has it no more. Others that have it keep it; the bytes stay until they are collected.
    pub(crate) async fn delete_blob(&self, repo: &Repo, digest: Digest) -> Answer {
        match self.store.unlink_blob(repo, digest).await? {
            true => Ok(empty(StatusCode::ACCEPTED, &[])),
            false => Err(ApiError::BlobUnknown(digest)),
        }
    }
}
