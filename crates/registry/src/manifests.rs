//! Manifests in and out.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use lamina_image::{
    BOOT_ANNOTATION, Descriptor, Digest, Document, MANIFEST_BYTES_MAX, Manifest, PROFILE_ANNOTATION,
    TREE_ANNOTATION, media_type,
};
use lamina_store::{ManifestPut, Referrer, Repo};

use crate::ApiError;
use crate::api::{Answer, Api, Head, empty};
use crate::body::{Upstream, full};
use crate::route::Target;

/// Artifacts that are taken from nobody.
const OUR_ARTIFACTS: [&str; 3] = [media_type::TREE, media_type::PROFILE, media_type::BOOT];
/// Annotations that only those have, and of images the first.
const OUR_ANNOTATIONS: [&str; 3] = [TREE_ANNOTATION, PROFILE_ANNOTATION, BOOT_ANNOTATION];
/// Images of an index that take over a profile: more than there are platforms.
const PLATFORMS_MAX: usize = 32;

impl Api {
    /// `GET` and `HEAD`, by tag and by digest.
    pub(crate) async fn read_manifest(&self, repo: &Repo, target: &Target) -> Answer {
        let unknown = || ApiError::ManifestUnknown(format!("{repo} {target}"));
        let digest = match target {
            Target::Digest(digest) => *digest,
            Target::Tag(tag) => self.store.reference(repo, tag).await?.manifest.ok_or_else(unknown)?,
        };
        let (media_type, bytes) = self.store.manifest(repo, digest).await?.ok_or_else(unknown)?;
        let mut response = Response::new(full(bytes.clone()));
        let headers = response.headers_mut();
        let media_type = media_type.parse().unwrap_or(HeaderValue::from_static(media_type::OCI_MANIFEST));
        let ours = |text: String| text.parse::<HeaderValue>().expect("hexadecimal digits");
        headers.insert(header::CONTENT_TYPE, media_type);
        headers.insert(header::CONTENT_LENGTH, bytes.len().into());
        headers.insert(header::ETAG, ours(format!("\"{digest}\"")));
        headers.insert("docker-content-digest", ours(digest.to_string()));
        Ok(response)
    }

    /// `PUT`: what it names must be here; only then it is, and last the tag.
    pub(crate) async fn put_manifest(
        &self,
        head: &Head,
        repo: &Repo,
        target: Target,
        body: Upstream,
    ) -> Answer {
        let bytes = body.whole(MANIFEST_BYTES_MAX).await?;
        let digest = Digest::of(&bytes);
        if let Target::Digest(expected) = target
            && expected != digest
        {
            return Err(ApiError::DigestInvalid(format!(
                "the manifest hashes to {digest}, not to {expected}"
            )));
        }
        let media_type = media_type_of(head, &bytes)?;
        let document = Document::parse(&media_type, &bytes)?;
        self.check_claims(repo, digest, &document).await?;
        // the layers of an image with its tree are here once its recipes are found good
        let image = match &document {
            Document::Manifest(manifest) if manifest.is_image() => self.admit(digest, manifest).await?,
            _ => None,
        };
        match &document {
            Document::Manifest(manifest) => self.check_blobs(manifest).await?,
            Document::Index(index) => self.check_children(repo, &index.manifests).await?,
        }
        let subject = document.subject().map(|subject| subject.digest);
        let referrer = subject.map(|subject| Referrer {
            subject,
            descriptor: referrer_of(&document, &media_type, digest, bytes.len() as u64),
        });
        self.store.put_manifest(repo, ManifestPut { digest, media_type, bytes, referrer }).await?;
        match image {
            Some(image) => self.store.put_image(digest, &image).await?,
            None => self.converter.want(repo, digest, &document).await?,
        }
        if let Target::Tag(tag) = &target {
            self.store.set_tag(repo, tag, Some(digest)).await?;
            self.inherit(repo, digest, &document);
        }
        let mut headers = vec![
            ("location", format!("/v2/{repo}/manifests/{digest}")),
            ("docker-content-digest", digest.to_string()),
        ];
        headers.extend(subject.map(|subject| ("oci-subject", subject.to_string())));
        Ok(empty(StatusCode::CREATED, &headers))
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
            }
        }
        Ok(empty(StatusCode::ACCEPTED, &[]))
    }

    /// A new tag's images take over the profile of their predecessor, where they have none.
    fn inherit(&self, repo: &Repo, digest: Digest, document: &Document) {
        match document {
            Document::Manifest(manifest) if manifest.is_image() => self.learner.inherit(repo, digest),
            Document::Manifest(_) => {}
            Document::Index(index) => {
                for image in index.manifests.iter().take(PLATFORMS_MAX) {
                    self.learner.inherit(repo, image.digest);
                }
            }
        }
    }

    async fn check_blobs(&self, manifest: &Manifest) -> Result<(), ApiError> {
        let layers = manifest.layers.iter().filter(|layer| !is_foreign(&layer.media_type));
        let named = layers.map(|layer| ("the layer", layer));
        for (what, descriptor) in std::iter::once(("the config", &manifest.config)).chain(named) {
            let digest = descriptor.digest;
            let blob = self.store.blob(digest).await?;
            let size = blob.ok_or(ApiError::ManifestBlobUnknown { what, digest })?.size();
            if size != descriptor.size {
                let said = descriptor.size;
                let text =
                    format!("the manifest says that {what} {digest} has {said} bytes, but it has {size}");
                return Err(ApiError::ManifestInvalid(text));
            }
        }
        Ok(())
    }

    /// Nobody but this registry hangs a tree, a profile or a boot pack on an image: what reads them would trust them.
    async fn check_claims(&self, repo: &Repo, digest: Digest, document: &Document) -> Result<(), ApiError> {
        let (kind, annotations, bound) = match document {
            Document::Manifest(it) => (&it.artifact_type, &it.annotations, it.is_image()),
            Document::Index(it) => (&it.artifact_type, &it.annotations, false),
        };
        let is_ours = kind.as_deref().is_some_and(|kind| OUR_ARTIFACTS.contains(&kind));
        let notes = OUR_ANNOTATIONS.iter().any(|note| annotations.contains_key(*note));
        if !is_ours && (bound || !notes) {
            return Ok(());
        }
        let own = match document.subject() {
            Some(subject) => self.store.image(subject.digest).await?.and_then(|image| image.artifact),
            None => None,
        };
        // what is in the repository was made here, or came by this check
        if own.is_some_and(|own| own.digest == digest)
            || self.store.manifest_link(repo, digest).await?.is_some()
        {
            return Ok(());
        }
        let text = "this registry makes the trees, profiles and boot packs of its images itself and takes none from \
                    elsewhere; push the image, and a profile to /lamina/v1/<repository>/profiles/<digest>";
        Err(ApiError::ManifestInvalid(text.to_owned()))
    }

    async fn check_children(&self, repo: &Repo, children: &[Descriptor]) -> Result<(), ApiError> {
        for Descriptor { digest, .. } in children {
            if self.store.manifest_link(repo, *digest).await?.is_none() {
                return Err(ApiError::ManifestBlobUnknown { what: "the manifest", digest: *digest });
            }
        }
        Ok(())
    }
}

/// Layers that a registry need not have.
fn is_foreign(media_type: &str) -> bool {
    media_type.contains("nondistributable") || media_type.contains(".foreign.")
}

/// What a referrers answer says of a manifest.
pub(crate) fn referrer_of(document: &Document, media_type: &str, digest: Digest, size: u64) -> Descriptor {
    let (artifact_type, annotations) = match document {
        Document::Manifest(it) => {
            let artifact_type = it.artifact_type.clone().unwrap_or_else(|| it.config.media_type.clone());
            (Some(artifact_type), it.annotations.clone())
        }
        Document::Index(it) => (it.artifact_type.clone(), it.annotations.clone()),
    };
    Descriptor { artifact_type, annotations, ..Descriptor::named(media_type, digest, size) }
}

/// The media type in the header, or where there is none, in the document.
fn media_type_of(head: &Head, bytes: &Bytes) -> Result<String, ApiError> {
    let header = head.header(header::CONTENT_TYPE).and_then(|text| text.split(';').next()).map(str::trim);
    if let Some(media_type) = header.filter(|text| !text.is_empty() && *text != "application/octet-stream") {
        return Ok(media_type.to_owned());
    }
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Said {
        media_type: String,
    }
    let said: Result<Said, _> = serde_json::from_slice(bytes);
    said.map(|said| said.media_type).map_err(|_| {
        ApiError::ManifestInvalid("neither a header nor the document says its media type".to_owned())
    })
}
