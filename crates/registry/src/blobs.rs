//! Downloads of blobs, and their end.

use std::ops::Range;
use std::sync::Arc;

use http::{HeaderValue, Response, StatusCode, header};
use lamina_chunk::PackId;
use lamina_image::Digest;
use lamina_store::{ByteStream, Content, Repo};

use crate::ApiError;
use crate::api::{Answer, Api, Head, empty, etag_of, not_modified};
use crate::body::{Body, full, streamed};
use crate::range::{Wanted, bounded, wanted};
use crate::sendfile;
use crate::upstream::{Brought, Upstream};

/// What an answer carries: which bytes of a blob of `size`, or all.
struct Download {
    size: u64,
    status: StatusCode,
    range: Range<u64>,
    body: Body,
}

impl Api {
    /// `GET` and `HEAD`, whole or in part.
    pub(crate) async fn read_blob(&self, head: &Head, repo: &Repo, digest: Digest) -> Answer {
        let here = match self.read_part(head, repo, digest).await? {
            Some(part) => Ok(part),
            None => self.read_any(head, repo, digest).await,
        };
        let download = match (here, &self.upstream) {
            (Err(ApiError::BlobUnknown(_)), Some(upstream)) => {
                self.read_upstream(upstream, head, repo, digest).await?
            }
            (here, upstream) => {
                if upstream.is_some() && here.is_ok() {
                    self.metrics.passed_on("blob", "hit");
                }
                here?
            }
        };
        let Download { size, status, range, body } = download;
        if status == StatusCode::NOT_MODIFIED {
            return Ok(not_modified(digest));
        }
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

    /// What nodes ask for: a range with two ends. `None` for all else, and for what is better said by who knows how long the
    /// blob is.
    async fn read_part(
        &self,
        head: &Head,
        repo: &Repo,
        digest: Digest,
    ) -> Result<Option<Download>, ApiError> {
        let conditions = [header::IF_RANGE, header::IF_NONE_MATCH];
        if head.method != http::Method::GET || conditions.into_iter().any(|name| head.header(name).is_some())
        {
            return Ok(None);
        }
        let Some(range) = head.header(header::RANGE).and_then(bounded) else { return Ok(None) };
        // whatever is wrong shows again where it is asked for step by step
        let Ok(Some(part)) = self.store.part_in(repo, digest, range).await else { return Ok(None) };
        let body = self.sent(part.bytes);
        Ok(Some(Download { size: part.size, status: StatusCode::PARTIAL_CONTENT, range: part.range, body }))
    }

    /// What an answer to a client carries of the store.
    pub(crate) fn sent(&self, content: Content) -> Body {
        streamed(self.stream_of(content), self.metrics.sent.clone())
    }

    pub(crate) fn stream_of(&self, content: Content) -> ByteStream {
        match self.config().tls {
            None => sendfile::frames(content),
            Some(_) => content.into_stream(),
        }
    }

    async fn read_any(&self, head: &Head, repo: &Repo, digest: Digest) -> Result<Download, ApiError> {
        let is_head = head.method == http::Method::HEAD;
        // who only asks may be about to push, and builds on the answer
        let blob = match is_head {
            true => self.store.take_blob_in(repo, digest).await?,
            false => self.store.blob_in(repo, digest).await?,
        };
        let blob = blob.ok_or(ApiError::BlobUnknown(digest))?;
        let (size, nothing) = (blob.size(), || full(bytes::Bytes::new()));
        if head.knows(digest) {
            let status = StatusCode::NOT_MODIFIED;
            return Ok(Download { size, status, range: 0..size, body: nothing() });
        }
        // a range of something else than this is no use to the client
        let same = head.header(header::IF_RANGE).is_none_or(|tag| tag == etag_of(digest));
        let (status, range) = match wanted(head.header(header::RANGE).filter(|_| same), size) {
            Wanted::Whole => (StatusCode::OK, 0..size),
            Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
            Wanted::Outside => return Err(ApiError::Range(size)),
        };
        let body = match is_head {
            true => nothing(),
            false => self.sent(self.store.read_blob(digest, blob, range.clone()).await?),
        };
        Ok(Download { size, status, range, body })
    }

    /// What is not here: as it comes, and where only a part of it is wanted, once all of it is here.
    async fn read_upstream(
        &self,
        upstream: &Arc<Upstream>,
        head: &Head,
        repo: &Repo,
        digest: Digest,
    ) -> Result<Download, ApiError> {
        let status = StatusCode::OK;
        if head.method == http::Method::HEAD {
            let size = upstream.blob_len(repo, digest).await?;
            return Ok(Download { size, status, range: 0..size, body: full(bytes::Bytes::new()) });
        }
        let in_parts =
            [header::RANGE, header::IF_NONE_MATCH].into_iter().any(|name| head.header(name).is_some());
        match upstream.fetch_blob(repo, digest, !in_parts).await? {
            Brought::Here => self.read_any(head, repo, digest).await,
            Brought::Coming { size, bytes } => {
                let body = streamed(bytes, self.metrics.sent.clone());
                Ok(Download { size, status, range: 0..size, body })
            }
        }
    }

    /// `GET /lamina/v1/<repository>/moved/<digest>`: where the frames of a pack have gone that was repacked.
    pub(crate) async fn read_moved(&self, repo: &Repo, digest: Digest) -> Answer {
        let unknown = || ApiError::BlobUnknown(digest);
        let pack = PackId::try_from(digest).map_err(|_| unknown())?;
        let mut record = self.store.moved_in(repo, pack).await?;
        if let (None, Some(upstream)) = (&record, &self.upstream) {
            record = upstream.moved(repo, pack).await?.map(|(_, bytes)| bytes);
        }
        let record = record.ok_or_else(unknown)?;
        let mut response = Response::new(full(record));
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
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
