//! Preludes out: an image's manifest, and in the same answer what its mount needs next.
//!
//! It is one representation of a manifest among others, for clients whose `Accept` names its media type (RFC 9110, 12.5.1).

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderValue, Method, Response, header};
use lamina_image::{
    BootPack, CommandKey, Descriptor, Digest, Document, Manifest, PreludeHead, TreeNames, media_type,
};
use lamina_store::{Content, ManifestLink, Repo};
use lamina_wire::{COMMAND_HEADER, newest_first};

use crate::ApiError;
use crate::api::{Api, Head};
use crate::body::{Body, streamed};

/// A longer manifest comes by itself, as a stream: a prelude holds it for as long as its reader takes.
const MANIFEST_BYTES_MAX: u64 = 256 << 10;
/// What answers under the URL of a manifest depend on.
pub(crate) const VARY: HeaderValue = HeaderValue::from_static("accept, lamina-command");

impl Api {
    /// The prelude of an image with this manifest, for a client that takes one; `None` where the manifest is all that there is, or no client
    /// of this kind asks.
    pub(crate) async fn read_prelude(
        &self,
        head: &Head,
        repo: &Repo,
        image: Digest,
        ManifestLink { media_type, size }: &ManifestLink,
    ) -> Result<Option<Response<Body>>, ApiError> {
        let may_have_one = is_image(media_type) && *size <= MANIFEST_BYTES_MAX;
        if head.method != Method::GET || !takes_preludes(head) || !may_have_one {
            return Ok(None);
        }
        // what an object store answers takes a round trip each, and the node waits for all of them
        let manifest = self.store.small_blob(image, MANIFEST_BYTES_MAX);
        let (bytes, (mut hung, more)) =
            tokio::try_join!(manifest, self.store.referrers_after(repo, image, None))?;
        // the newest of them may be on another page
        if more {
            return Ok(None);
        }
        let Ok(Document::Manifest(manifest)) = Document::parse(media_type, &bytes) else { return Ok(None) };
        newest_first(&mut hung);
        let Some((tree, names)) = self.names_of(image, &manifest, &hung).await? else { return Ok(None) };
        let command = command_of(head);
        let boot = boot_of(hung, tree, command.as_ref());
        let booted = async {
            let (pack, own) = boot?;
            Some((self.first_part(repo, pack.blob, pack.bytes).await?, pack, own))
        };
        let (named, booted) = tokio::join!(self.first_part(repo, tree, names.bytes), booted);
        let mut contents = Vec::new();
        let mut prelude = PreludeHead::new(Descriptor::named(media_type, image, bytes.len() as u64));
        if let Some(part) = named {
            prelude = prelude.with_names(tree, names);
            contents.push(part);
        }
        if let Some((part, pack, own)) = booted {
            prelude = prelude.with_boot(pack, command.as_ref().filter(|_| own));
            contents.push(part);
        }
        Ok((!contents.is_empty()).then(|| self.whole(image, &prelude, bytes, contents)))
    }

    fn whole(
        &self,
        image: Digest,
        prelude: &PreludeHead,
        manifest: Bytes,
        contents: Vec<Content>,
    ) -> Response<Body> {
        let begun = [&prelude.to_bytes()[..], &manifest].concat();
        let size = begun.len() as u64 + prelude.parts_bytes() - manifest.len() as u64;
        let parts: Vec<_> = contents.into_iter().map(|content| self.stream_of(content)).collect();
        let bytes = stream::iter([Ok(Bytes::from(begun))]).chain(stream::iter(parts).flatten()).boxed();
        let mut response = Response::new(streamed(bytes, self.metrics.sent.clone()));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type::PRELUDE));
        headers.insert(header::CONTENT_LENGTH, size.into());
        headers.insert(header::VARY, VARY);
        // the boot pack in it changes, whatever names the manifest
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("docker-content-digest", image.to_string().parse().expect("hexadecimal digits"));
        response
    }

    /// The tree of an image, and the names that it begins with: those that its manifest binds, else the first that hang on it.
    async fn names_of(
        &self,
        image: Digest,
        manifest: &Manifest,
        hung: &[Descriptor],
    ) -> Result<Option<(Digest, TreeNames)>, ApiError> {
        if let Some(tree) = manifest.bound_tree()? {
            return Ok(TreeNames::noted_in(&manifest.annotations).map(|names| (tree, names)));
        }
        let mut hung = hung.to_vec();
        self.leave_out_superseded(image, &mut hung).await?;
        let tree =
            hung.iter().find_map(|one| Some((one.hung_tree()?, TreeNames::noted_in(&one.annotations))));
        Ok(tree.and_then(|(tree, names)| Some((tree, names?))))
    }

    /// The first `len` bytes of a blob, where it is here and has as many.
    async fn first_part(&self, repo: &Repo, blob: Digest, len: u64) -> Option<Content> {
        let part = self.store.part_in(repo, blob, 0..len).await.ok()??;
        (part.range == (0..len)).then_some(part.bytes)
    }
}

/// Whether what has this type is one image, and no index of several.
fn is_image(kind: &str) -> bool {
    [media_type::OCI_MANIFEST, media_type::DOCKER_MANIFEST].contains(&kind)
}

/// Whether the client says that it takes them.
fn takes_preludes(head: &Head) -> bool {
    let accepted = head.headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(names_preludes)
}

/// Whether a part of an `Accept` names them, other than to say that they are not wanted.
fn names_preludes(range: &str) -> bool {
    let mut parts = range.split(';').map(str::trim);
    let is_named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(media_type::PRELUDE));
    let quality = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
    is_named && quality.is_none_or(|quality| quality.parse::<f32>().is_ok_and(|quality| quality > 0.0))
}

/// The command that is to start, if it is named as it should be.
fn command_of(head: &Head) -> Option<CommandKey> {
    head.headers.get(COMMAND_HEADER)?.to_str().ok()?.parse().ok()
}

/// The boot pack for a command, as a node would choose it of what hangs on an image, the newest first.
fn boot_of(
    mut hung: Vec<Descriptor>,
    tree: Digest,
    command: Option<&CommandKey>,
) -> Option<(BootPack, bool)> {
    hung.retain(|one| one.artifact_type.as_deref() == Some(media_type::BOOT));
    BootPack::choose(&hung, tree, command)
}
