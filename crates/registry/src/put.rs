//! Manifests in: what they name, what they claim, and under which names they appear.

use std::fmt::Write;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use http::{HeaderValue, StatusCode, header};
use lamina_image::{
    BOOT_ANNOTATION, Descriptor, Digest, Document, MANIFEST_BYTES_MAX, PROFILE_ANNOTATION, TREE_ANNOTATION,
    media_type,
};
use lamina_store::{ManifestPut, Repo, Store, Tag};

use crate::api::{Answer, Api, Head, SMALL_MANIFEST_BYTES, empty};
use crate::body::Inbound;
use crate::manifests::{artifact_type_of, referrer_of_document};
use crate::route::Target;
use crate::{Absent, ApiError};

/// Artifacts that are taken from nobody.
pub(crate) const OUR_ARTIFACTS: [&str; 3] = [media_type::TREE, media_type::PROFILE, media_type::BOOT];
/// Annotations that only those have, and of images the first.
const OUR_ANNOTATIONS: [&str; 3] = [TREE_ANNOTATION, PROFILE_ANNOTATION, BOOT_ANNOTATION];
/// Images of an index that take over a profile: more than there are platforms.
const PLATFORMS_MAX: usize = 32;
/// Manifests in an index: each is looked up before the index is taken.
const CHILDREN_MAX: usize = 10_000;
/// What a manifest names is looked up so many at a time.
const LOOKUPS: usize = 16;
/// Tags that one request sets: distribution-spec asks for at least ten.
const TAGS_MAX: usize = 100;
/// Warnings are at most so long together, in bytes: distribution-spec 1.1, "Warnings", allows 4,096.
const WARNING_BYTES_MAX: usize = 1_024;

/// A manifest as it came.
struct Incoming {
    digest: Digest,
    media_type: String,
    document: Document,
    bytes: Bytes,
    tags: Vec<Tag>,
    /// Whether the request named a tag rather than a digest.
    by_tag: bool,
}

impl Incoming {
    fn read(head: &Head, target: Target, bytes: Bytes) -> Result<Self, ApiError> {
        let by_tag = matches!(target, Target::Tag(_));
        let (digest, mut tags) = match target {
            Target::Tag(tag) => (Digest::of(&bytes), vec![tag]),
            Target::Digest(expected) => (expected, Vec::new()),
        };
        let found = Digest::by(digest.algorithm(), &bytes);
        if found != digest {
            return Err(ApiError::DigestInvalid(format!("the manifest hashes to {found}, not to {digest}")));
        }
        for tag in head.query.values("tag") {
            tags.push(tag.parse()?);
        }
        if tags.len() > TAGS_MAX {
            return Err(ApiError::Invalid(format!(
                "{} tags in one request are more than {TAGS_MAX}",
                tags.len()
            )));
        }
        let media_type = media_type_of(head.header(header::CONTENT_TYPE), &bytes)?;
        let document = Document::parse(&media_type, &bytes)?;
        Ok(Self { digest, media_type, document, bytes, tags, by_tag })
    }
}

impl Api {
    /// `PUT`: what it names is looked for first; then it is here, and last its tags.
    pub(crate) async fn put_manifest(
        &self,
        head: &Head,
        repo: &Repo,
        target: Target,
        body: Inbound,
    ) -> Answer {
        let large = body.len_max().is_none_or(|len| len > SMALL_MANIFEST_BYTES);
        let _place = match large {
            true => Some(self.manifests.try_acquire().map_err(|_| ApiError::Busy)?),
            false => None,
        };
        let bytes = body.whole(MANIFEST_BYTES_MAX).await?;
        let incoming = Incoming::read(head, target, bytes)?;
        check_claims(&self.store, repo, incoming.digest, &incoming.document).await?;
        // the layers of an image with its tree are here once its recipes are found good
        let image = match &incoming.document {
            Document::Manifest(manifest) if manifest.is_image() => {
                self.check_reach(head, repo, manifest).await?;
                self.admit(repo, incoming.digest, manifest).await?
            }
            _ => None,
        };
        let absent = self.absent(repo, &incoming.document).await?;
        if !absent.is_empty() && (image.is_some() || !self.may_be_sparse(repo, &incoming, &absent).await?) {
            return Err(ApiError::ManifestBlobUnknown(absent));
        }
        let Incoming { digest, media_type, document, bytes, tags, .. } = incoming;
        let subject = document.subject().map(|subject| subject.digest);
        let referrer = referrer_of_document(&document, &media_type, digest, bytes.len() as u64);
        self.store.put_manifest(repo, ManifestPut { digest, media_type, bytes, referrer }).await?;
        match image {
            Some(image) => self.store.put_image(digest, &image).await?,
            None if absent.is_empty() => self.converter.want(repo, digest, &document).await?,
            // what is not all here cannot be converted, and what others have of it is not this repository's
            None => {}
        }
        for tag in &tags {
            self.store.set_tag(repo, tag, Some(digest)).await?;
        }
        if !tags.is_empty() && absent.is_empty() {
            self.inherit(repo, digest, &document);
        }
        let mut headers = vec![
            ("location", format!("/v2/{repo}/manifests/{digest}")),
            ("docker-content-digest", digest.to_string()),
        ];
        headers.extend(subject.map(|subject| ("oci-subject", subject.to_string())));
        let mut response = empty(StatusCode::CREATED, &headers);
        for tag in head.query.values("tag") {
            response.headers_mut().append("oci-tag", HeaderValue::from_str(tag).expect("it parsed as a tag"));
        }
        if !absent.is_empty() {
            response.headers_mut().insert(header::WARNING, warning(&absent));
        }
        Ok(response)
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

    /// What the document names and the repository lacks. Layers that a registry need not have do not count.
    async fn absent(&self, repo: &Repo, document: &Document) -> Result<Vec<Absent>, ApiError> {
        let named = named_by(document);
        if let Document::Index(_) = document
            && named.len() > CHILDREN_MAX
        {
            let text = format!("{} manifests in an index are more than {CHILDREN_MAX}", named.len());
            return Err(ApiError::ManifestInvalid(text));
        }
        let look_up = named.into_iter().map(|named| self.look_up(repo, named));
        let absent = stream::iter(look_up).buffered(LOOKUPS);
        absent.try_filter_map(|absent| async move { Ok(absent) }).try_collect().await
    }

    async fn look_up(&self, repo: &Repo, named: Named) -> Result<Option<Absent>, ApiError> {
        let Named { what, digest, blob_size } = named;
        let Some(said) = blob_size else {
            let link = self.store.manifest_link(repo, digest).await?;
            return Ok(link.is_none().then_some(Absent { what, digest }));
        };
        let Some(blob) = self.store.take_blob_in(repo, digest).await? else {
            return Ok(Some(Absent { what, digest }));
        };
        let size = blob.size();
        if size != said {
            let text = format!("the manifest says that {what} {digest} has {said} bytes, but it has {size}");
            return Err(ApiError::ManifestInvalid(text));
        }
        Ok(None)
    }

    /// Whether a manifest may name what is not here.
    ///
    /// Who pushes under a tag means a whole image, and what is missing is a mistake that he wants to hear of. Who pushes
    /// by digest knows what he does, and may set tags afterwards. An index of which some images are here is the usual
    /// copy of a few platforms.
    async fn may_be_sparse(
        &self,
        repo: &Repo,
        incoming: &Incoming,
        absent: &[Absent],
    ) -> Result<bool, ApiError> {
        if let Document::Index(index) = &incoming.document
            && absent.len() < index.manifests.len()
        {
            return Ok(true);
        }
        Ok(!incoming.by_tag || self.store.manifest_link(repo, incoming.digest).await?.is_some())
    }
}

/// Nobody but this registry hangs a tree, a profile or a boot pack on an image: what reads them would trust them.
pub(crate) async fn check_claims(
    store: &Store,
    repo: &Repo,
    digest: Digest,
    document: &Document,
) -> Result<(), ApiError> {
    let (annotations, bound) = match document {
        Document::Manifest(it) => (&it.annotations, it.is_image()),
        Document::Index(it) => (&it.annotations, false),
    };
    // under the type that a referrers answer would give it
    let kind = artifact_type_of(document);
    let is_ours = kind.is_some_and(|kind| OUR_ARTIFACTS.contains(&kind));
    let notes = OUR_ANNOTATIONS.iter().any(|note| annotations.contains_key(*note));
    if !is_ours && (bound || !notes) {
        return Ok(());
    }
    let own = match document.subject() {
        Some(subject) => store.image(subject.digest).await?.and_then(|image| image.artifact),
        None => None,
    };
    // what is in the repository was made here, or came by this check
    if own.is_some_and(|own| own.digest == digest) || store.manifest_link(repo, digest).await?.is_some() {
        return Ok(());
    }
    let text = "this registry makes the trees, profiles and boot packs of its images itself and takes none from \
                elsewhere; push the image, and a profile to /lamina/v1/<repository>/profiles/<digest>";
    Err(ApiError::ManifestInvalid(text.to_owned()))
}

/// What a document names.
struct Named {
    what: &'static str,
    digest: Digest,
    /// How long the document says that it is, where it is a blob; `None` for a manifest.
    blob_size: Option<u64>,
}

fn named_by(document: &Document) -> Vec<Named> {
    let blob = |what, blob: &Descriptor| Named { what, digest: blob.digest, blob_size: Some(blob.size) };
    match document {
        Document::Manifest(manifest) => {
            let layers = manifest.layers.iter().filter(|layer| !is_foreign(&layer.media_type));
            let layers = layers.map(|layer| blob("the layer", layer));
            std::iter::once(blob("the config", &manifest.config)).chain(layers).collect()
        }
        Document::Index(index) => {
            let child =
                |child: &Descriptor| Named { what: "the manifest", digest: child.digest, blob_size: None };
            index.manifests.iter().map(child).collect()
        }
    }
}

/// The blobs that a manifest names and that a registry must have.
pub(crate) fn blobs_of(document: &Document) -> Vec<Digest> {
    let blobs = named_by(document).into_iter().filter(|named| named.blob_size.is_some());
    blobs.map(|named| named.digest).collect()
}

/// Layers that a registry need not have.
fn is_foreign(media_type: &str) -> bool {
    media_type.contains("nondistributable") || media_type.contains(".foreign.")
}

/// The media type in the header, or where there is none, in the document.
pub(crate) fn media_type_of(header: Option<&str>, bytes: &Bytes) -> Result<String, ApiError> {
    let header = header.and_then(|text| text.split(';').next()).map(str::trim);
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

/// Tells the client that the manifest was taken though something is missing.
fn warning(absent: &[Absent]) -> HeaderValue {
    let mut text = String::from("299 - \"taken, but pulls will fail until it is pushed:");
    for (number, Absent { what, digest }) in absent.iter().enumerate() {
        if text.len() > WARNING_BYTES_MAX {
            write!(text, " and {} more", absent.len() - number).expect("strings take everything");
            break;
        }
        write!(text, " {what} {digest}").expect("strings take everything");
    }
    text.push('"');
    text.parse().expect("words and digests")
}
