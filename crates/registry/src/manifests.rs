//! Manifests out, and their end.

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};
use lamina_image::{Descriptor, Digest, Document, media_type};
use lamina_store::{Blob, Referrer, Repo, StoreError};

use crate::ApiError;
use crate::api::{Answer, Api, Head, empty, etag_of, not_modified};
use crate::body::full;
use crate::prelude::VARY;
use crate::put::OUR_ARTIFACTS;
use crate::route::Target;

impl Api {
    /// `GET` and `HEAD`, by tag and by digest.
    pub(crate) async fn read_manifest(&self, head: &Head, repo: &Repo, target: &Target) -> Answer {
        let unknown = || ApiError::ManifestUnknown(format!("{repo} {target}"));
        if let Some(upstream) = &self.upstream {
            upstream.bring_manifest(repo, target).await?;
        }
        let digest = match target {
            Target::Digest(digest) => *digest,
            Target::Tag(tag) => self.store.reference(repo, tag).await?.manifest.ok_or_else(unknown)?,
        };
        let link = self.store.manifest_link(repo, digest).await?.ok_or_else(unknown)?;
        if let (Some(upstream), true) = (&self.upstream, head.method == Method::GET) {
            upstream.want_image(repo, digest).await?;
        }
        if head.knows(digest) {
            let mut known = not_modified(digest);
            known.headers_mut().insert(header::VARY, VARY);
            return Ok(known);
        }
        // whatever is wrong with it shows again where its parts are asked for
        if let Ok(Some(prelude)) = self.read_prelude(head, repo, digest, &link).await {
            return Ok(prelude);
        }
        let (media_type, size) = (link.media_type, link.size);
        let body = match head.method == Method::HEAD {
            true => full(Bytes::new()),
            // as a stream, so that many slow readers of long manifests do not each hold a whole one
            false => {
                let bytes = self.store.read_blob(digest, Blob::Stored { size }, 0..size).await;
                self.sent(bytes.map_err(|error| missing(error, unknown))?)
            }
        };
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        let media_type = media_type.parse().unwrap_or(HeaderValue::from_static(media_type::OCI_MANIFEST));
        let ours = |text: String| text.parse::<HeaderValue>().expect("hexadecimal digits");
        headers.insert(header::CONTENT_TYPE, media_type);
        headers.insert(header::CONTENT_LENGTH, size.into());
        headers.insert(header::VARY, VARY);
        headers.insert(header::ETAG, ours(etag_of(digest)));
        headers.insert("docker-content-digest", ours(digest.to_string()));
        Ok(response)
    }

    /// `DELETE`: of a tag, that tag alone; of a digest, the manifest and its tags.
    pub(crate) async fn delete_manifest(&self, repo: &Repo, target: Target) -> Answer {
        let unknown = || ApiError::ManifestUnknown(format!("{repo} {target}"));
        match &target {
            Target::Tag(tag) => {
                if !self.store.set_tag(repo, tag, None).await? {
                    return Err(unknown());
                }
            }
            Target::Digest(digest) => {
                let (media_type, bytes) = self.store.manifest(repo, *digest).await?.ok_or_else(unknown)?;
                let subject = Document::parse(&media_type, &bytes)?.subject().map(|subject| subject.digest);
                self.store.delete_manifest(repo, *digest, subject).await?;
                self.take_down(repo, *digest).await?;
            }
        }
        Ok(empty(StatusCode::ACCEPTED, &[]))
    }

    /// What this registry has hung on an image goes with it; what others have hung on it is theirs.
    async fn take_down(&self, repo: &Repo, image: Digest) -> Result<(), ApiError> {
        for hung in self.store.referrers(repo, image).await? {
            if hung.artifact_type.as_deref().is_some_and(|kind| OUR_ARTIFACTS.contains(&kind)) {
                self.store.delete_manifest(repo, hung.digest, Some(image)).await?;
            }
        }
        Ok(())
    }
}

/// A manifest whose bytes are gone is as good as none.
fn missing(error: StoreError, unknown: impl Fn() -> ApiError) -> ApiError {
    match error {
        StoreError::Missing(_) => unknown(),
        other => other.into(),
    }
}

/// What a referrers answer calls a manifest: its artifact type, or that of an image manifest which says none, the media
/// type of its config.
pub(crate) fn artifact_type_of(document: &Document) -> Option<&str> {
    let (said, config) = match document {
        Document::Manifest(it) => (&it.artifact_type, Some(it.config.media_type.as_str())),
        Document::Index(it) => (&it.artifact_type, None),
    };
    said.as_deref().filter(|said| !said.is_empty()).or(config)
}

/// What a manifest hangs on, and what a referrers answer says of it there.
pub(crate) fn referrer_of_document(
    document: &Document,
    media_type: &str,
    digest: Digest,
    size: u64,
) -> Option<Referrer> {
    let subject = document.subject()?.digest;
    Some(Referrer { subject, descriptor: referrer_of(document, media_type, digest, size) })
}

/// What a referrers answer says of a manifest.
pub(crate) fn referrer_of(document: &Document, media_type: &str, digest: Digest, size: u64) -> Descriptor {
    let annotations = match document {
        Document::Manifest(it) => it.annotations.clone(),
        Document::Index(it) => it.annotations.clone(),
    };
    let artifact_type = artifact_type_of(document).map(str::to_owned);
    Descriptor { artifact_type, annotations, ..Descriptor::named(media_type, digest, size) }
}
