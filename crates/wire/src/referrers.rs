//! What hangs on a manifest, read and written: by the referrers API, and where a registry lacks it, by the tag that
//! distribution-spec 1.1 has for this ("Referrers Tag Schema").

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use lamina_image::{Descriptor, Digest, Index, MANIFEST_BYTES_MAX, media_type};

use crate::http_call::Payload;
use crate::{Client, Version, WireError};

/// Pages of referrers that are read.
const REFERRER_PAGES_MAX: usize = 16;
/// Annotation on an artifact that a client has made: when, in seconds since 1970. The newest of its kind counts.
pub const CREATED_ANNOTATION: &str = "dev.lamina.created";
/// What to write as [`CREATED_ANNOTATION`] on what takes the place of `old`, in seconds since 1970: `now`, or just after the newest
/// of them, where a clock was ahead when that was made. It may stay listed, and would count until then.
pub fn created_after(old: &[Descriptor], now: u64) -> u64 {
    old.iter().filter_map(made_at).max().map_or(now, |newest| now.max(newest.saturating_add(1)))
}

/// Puts what clients have made in the order in which it counts: the newest first, and last what does not say when it was made.
pub fn newest_first(artifacts: &mut [Descriptor]) {
    artifacts.sort_by_key(|one| std::cmp::Reverse(made_at(one)));
}

/// When an artifact says that it was made, in seconds since 1970.
pub fn made_at(artifact: &Descriptor) -> Option<u64> {
    artifact.annotations.get(CREATED_ANNOTATION)?.parse().ok()
}

/// Set in answers to a manifest with a subject, by registries that list it there by themselves.
const OCI_SUBJECT: &str = "oci-subject";

impl Client {
    /// What hangs on a manifest, of one artifact type, those that say when they were made newest first.
    pub async fn referrers(
        &self,
        repository: &str,
        subject: Digest,
        artifact_type: &str,
    ) -> Result<Vec<Descriptor>, WireError> {
        let encoded = artifact_type.replace('+', "%2B").replace('/', "%2F");
        let mut url = format!("{}/v2/{repository}/referrers/{subject}?artifactType={encoded}", self.base());
        let mut found = Vec::new();
        for page in 0..REFERRER_PAGES_MAX {
            let (listed, next) = match self.retrying(|| self.referrer_page(&url)).await {
                // every registry that has the API answers with an index, even where nothing is in it
                Err(error) if page == 0 && error.is_unserved() => {
                    let index = self.tagged_referrers(repository, subject).await?;
                    (index.map(|index| index.manifests).unwrap_or_default(), None)
                }
                listed => listed?,
            };
            // the filter is the registry's to apply or not
            found
                .extend(listed.into_iter().filter(|one| one.artifact_type.as_deref() == Some(artifact_type)));
            match next {
                Some(next) => url = next,
                None => break,
            }
        }
        newest_first(&mut found);
        Ok(found)
    }

    async fn referrer_page(&self, url: &str) -> Result<(Vec<Descriptor>, Option<String>), WireError> {
        let request = Request::get(url).header(header::ACCEPT, media_type::OCI_INDEX);
        let answer = self.call(request, Payload::Empty).await?.expect(&[StatusCode::OK]).await?;
        let next = answer.header(header::LINK).and_then(|link| link.split(['<', '>']).nth(1));
        let next = next
            .map(|path| if path.starts_with('/') { format!("{}{path}", self.base()) } else { path.into() });
        let bytes = answer.bytes(MANIFEST_BYTES_MAX as u64).await?;
        Ok((read_index(url, &bytes)?.manifests, next))
    }

    /// The index under the tag that stands for the API. `None` where there is none.
    async fn tagged_referrers(&self, repository: &str, subject: Digest) -> Result<Option<Index>, WireError> {
        let tag = tag_of(subject);
        match self.manifest(repository, &Version::Tag(tag.clone())).await {
            Ok(found) => {
                let url = format!("{}/v2/{repository}/manifests/{tag}", self.base());
                read_index(&url, &found.bytes).map(Some)
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Puts the artifact manifest `bytes`, whose subject is `subject`, and sees to it that it is listed there. `listed` is what
    /// the list says of it. Where the registry lacks the API, two clients that do this at the same time for one subject may
    /// overwrite each other's entry, as the specification has it.
    pub async fn push_referrer(
        &self,
        repository: &str,
        subject: Digest,
        listed: Descriptor,
        bytes: Bytes,
    ) -> Result<(), WireError> {
        let version = Version::Digest(listed.digest);
        let answer = self.put_manifest(repository, &version, &listed.media_type, bytes).await?;
        if answer.header(header::HeaderName::from_static(OCI_SUBJECT)).is_some() {
            return Ok(());
        }
        let listed_before = self.tagged_referrers(repository, subject).await?;
        let mut index = listed_before.unwrap_or_else(empty_index);
        if index.manifests.iter().any(|one| one.digest == listed.digest) {
            return Ok(());
        }
        index.manifests.push(listed);
        self.put_tagged_referrers(repository, subject, &index).await
    }

    /// Takes what hangs on `subject` from it. Where the registry lacks the API it is only not listed any more, and stays until
    /// the registry collects it.
    pub async fn drop_referrer(
        &self,
        repository: &str,
        subject: Digest,
        artifact: Digest,
    ) -> Result<(), WireError> {
        if let Some(mut index) = self.tagged_referrers(repository, subject).await?
            && index.manifests.iter().any(|one| one.digest == artifact)
        {
            index.manifests.retain(|one| one.digest != artifact);
            return self.put_tagged_referrers(repository, subject, &index).await;
        }
        let url = format!("{}/v2/{repository}/manifests/{artifact}", self.base());
        self.retrying(|| async {
            let request = Request::builder().method(Method::DELETE).uri(&url);
            let answer = self.call(request, Payload::Empty).await?;
            answer.expect(&[StatusCode::ACCEPTED, StatusCode::NOT_FOUND]).await.map(drop)
        })
        .await
    }

    async fn put_tagged_referrers(
        &self,
        repository: &str,
        subject: Digest,
        index: &Index,
    ) -> Result<(), WireError> {
        let bytes = Bytes::from(serde_json::to_vec(index).expect("an index has string keys"));
        let version = Version::Tag(tag_of(subject));
        self.push_manifest(repository, &version, media_type::OCI_INDEX, bytes).await
    }
}

fn tag_of(subject: Digest) -> String {
    format!("{}-{:.64}", subject.algorithm(), subject.hex())
}

fn empty_index() -> Index {
    Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.to_owned()),
        artifact_type: None,
        manifests: Vec::new(),
        subject: None,
        annotations: Default::default(),
    }
}

fn read_index(url: &str, bytes: &[u8]) -> Result<Index, WireError> {
    serde_json::from_slice(bytes)
        .map_err(|error| WireError::Answer { url: url.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(at: Option<&str>) -> Descriptor {
        let mut artifact = Descriptor::of(media_type::PROFILE, b"");
        artifact.annotations.extend(at.map(|at| (CREATED_ANNOTATION.to_owned(), at.to_owned())));
        artifact
    }

    #[test]
    fn what_is_made_after_a_clock_was_stepped_back_is_newer_than_what_it_replaces() {
        assert_eq!(created_after(&[], 50), 50);
        assert_eq!(created_after(&[made(Some("40")), made(None), made(Some("later"))], 50), 50);
        assert_eq!(created_after(&[made(Some("40")), made(Some("90"))], 50), 91);
        assert_eq!(created_after(&[made(Some("50"))], 50), 51);
        assert_eq!(created_after(&[made(Some("18446744073709551615"))], 50), u64::MAX);
    }
}
