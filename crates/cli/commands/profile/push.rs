//! `lamina profile push`: a profile and its boot pack, made here, for a registry that does not learn.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use lamina_chunk::{Chunk, FrameId, PackId, Place, Sealed};
use lamina_image::{
    BootPack, Descriptor, Digest, Document, PROFILE_ANNOTATION, PROFILE_BYTES_MAX, Profile, TREE_ANNOTATION,
    TREE_BYTES_MAX, Tree, build_boot, media_type, unpack_tree,
};
use lamina_node::KeptTraces;
use lamina_wire::{CREATED_ANNOTATION, Client, read_trace};
use lru::LruCache;
use tokio::runtime::Handle;

use super::{Image, read_profile};
use crate::args::{Common, ProfilePush};
use crate::commands::artifact::{Artifact, config};
use crate::commands::mib;

/// Pages in a boot pack: 1 GiB, as registries of ours build them.
const BOOT_PAGES_MAX: u64 = 1 << 18;
/// A frame is fetched with what follows it in its pack, up to 2 MiB: frames that a start needs lie together, and a round trip
/// costs more than what is fetched in vain.
const WINDOW_BYTES: u64 = 2 << 20;
/// Of those, that are held: 64 MiB.
const WINDOWS: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");

/// Pushes what this node has seen of an image's starts, or a profile from a file.
pub(super) async fn run(arguments: ProfilePush, common: &Common) -> Result<()> {
    let reference = &arguments.reference;
    let image = Image::find(reference, common).await?;
    let learns = image.client.known_layers(image.repository(), &[]).await?.is_some();
    if let Some(path) = &arguments.file {
        let (profile, json) = read_profile(path)?;
        if learns {
            return Ok(image.client.put_profile(image.repository(), image.manifest, json).await?);
        }
        return push(&image, profile).await;
    }
    ensure!(
        !learns,
        "{} learns from starts by itself; name a FILE to replace what it has learnt",
        reference.host
    );
    let traces = KeptTraces::new(arguments.cache.directory.join("traces"));
    let profile = seen(&image, &traces).await?;
    push(&image, profile).await?;
    traces.forget(image.manifest).with_context(|| arguments.cache.directory.display().to_string())
}

/// The profile of what this node has seen, and of what is there already.
async fn seen(image: &Image<'_>, traces: &KeptTraces) -> Result<Profile> {
    let kept = traces.find(image.manifest)?;
    let tree = image.tree().await?;
    let mut profile = image.profile().await?.map(|(profile, _)| profile);
    for message in &kept {
        let Some((of, trace)) = read_trace(message).filter(|(of, _)| *of == tree.digest) else {
            tracing::warn!("a trace of another tree is passed over");
            continue;
        };
        tracing::debug!(%of, boot = trace.boot, "a trace");
        let new = Profile::of_trace(&tree.tree, &trace)?;
        profile = match profile {
            // only what a boot pack lacked, and that is gone
            None if trace.boot => None,
            None => Some(new),
            Some(profile) if profile.inherited && !trace.boot => Some(new),
            Some(profile) => Some(profile.merged(&new, trace.boot)),
        };
    }
    match profile {
        Some(profile) if !kept.is_empty() => Ok(profile),
        _ => bail!(
            "no start of {0} was recorded here since the last push; mount it without a boot pack and start it, or `lamina profile record {0} -- COMMAND`",
            image.reference
        ),
    }
}

/// An image's tree, opened.
pub(super) struct ImageTree {
    digest: Digest,
    tree: Tree,
}

impl Image<'_> {
    async fn tree(&self) -> Result<ImageTree> {
        let bound = match &self.document {
            Document::Manifest(manifest) => manifest.bound_tree()?,
            Document::Index(_) => bail!("{} has no image for this machine", self.reference),
        };
        let digest = match bound {
            Some(digest) => digest,
            None => {
                let listed =
                    self.client.referrers(self.repository(), self.manifest, media_type::TREE).await?;
                let named = listed.iter().find_map(|one| one.annotations.get(TREE_ANNOTATION)?.parse().ok());
                named
                    .with_context(|| format!("{} has no tree; push it with `lamina push`", self.reference))?
            }
        };
        let blob = self.client.blob(self.repository(), digest, TREE_BYTES_MAX).await?;
        let tree = tokio::task::spawn_blocking(move || Tree::open(unpack_tree(&blob)?.into())).await?;
        Ok(ImageTree { digest, tree: tree.with_context(|| format!("the tree of {}", self.reference))? })
    }

    /// What of an artifact type hangs on the image.
    async fn hung(&self, kind: &str) -> Result<Vec<Descriptor>> {
        Ok(self.client.referrers(self.repository(), self.manifest, kind).await?)
    }

    /// Takes down what was listed, as far as the registry lets.
    pub(super) async fn take_down(&self, listed: Vec<Descriptor>, kept: Option<Digest>) -> Result<()> {
        for one in listed.into_iter().filter(|one| Some(one.digest) != kept) {
            self.client.drop_referrer(self.repository(), self.manifest, one.digest).await?;
        }
        Ok(())
    }
}

/// Forgets profile and boot pack.
pub(super) async fn take_all_down(image: &Image<'_>) -> Result<()> {
    // a boot pack without a profile would be no use to the next push
    for kind in [media_type::BOOT, media_type::PROFILE] {
        image.take_down(image.hung(kind).await?, None).await?;
    }
    Ok(())
}

/// Builds the boot pack of a profile, and hangs both on the image in place of those that are there.
pub(super) async fn push(image: &Image<'_>, profile: Profile) -> Result<()> {
    let json = Bytes::from(profile.to_json());
    ensure!(json.len() <= PROFILE_BYTES_MAX, "the profile is longer than {PROFILE_BYTES_MAX} bytes");
    let tree = image.tree().await?;
    let (starts, pages) = (profile.starts, profile.pages());
    let boot = build(image, tree, profile).await?;
    let (digest, bytes) = config();
    image.client.push_blob(image.repository(), digest, bytes).await?;
    let mut size = 0;
    if let Some((boot, of)) = boot {
        size = boot.len() as u64;
        let pack = BootPack { blob: Digest::of(&boot), bytes: size, tree: of };
        replace(image, media_type::BOOT, boot, pack.annotations()).await?;
    } else {
        image.take_down(image.hung(media_type::BOOT).await?, None).await?;
    }
    let annotations = [(PROFILE_ANNOTATION.to_owned(), Digest::of(&json).to_string())];
    replace(image, media_type::PROFILE, json, annotations.into()).await?;
    println!("{}: {pages} pages of {starts} starts, a boot pack of {}", image.reference, mib(size));
    Ok(())
}

/// Pushes a blob and the artifact that hangs it on the image; then the old ones of its kind go.
async fn replace(
    image: &Image<'_>,
    kind: &'static str,
    blob: Bytes,
    mut annotations: std::collections::BTreeMap<String, String>,
) -> Result<()> {
    let old = image.hung(kind).await?;
    let descriptor = Descriptor::of(kind, &blob);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    annotations.insert(CREATED_ANNOTATION.to_owned(), now.as_secs().to_string());
    image.client.push_blob(image.repository(), descriptor.digest, blob).await?;
    let artifact = Artifact { kind, subject: image.subject.clone(), blobs: vec![descriptor], annotations };
    let new = artifact.push(&image.client, image.repository()).await?;
    if let Err(error) = image.take_down(old, Some(new.digest)).await {
        tracing::warn!(%error, "an old one stays listed beside the new one, which is newer and counts");
    }
    Ok(())
}

/// A boot pack and the tree that it is for.
async fn build(image: &Image<'_>, of: ImageTree, profile: Profile) -> Result<Option<(Bytes, Digest)>> {
    let mut frames = Frames {
        client: image.client.clone(),
        repository: image.repository().to_owned(),
        ends: pack_ends(&of.tree)?,
        windows: LruCache::new(WINDOWS),
        runtime: Handle::current(),
    };
    let built = tokio::task::spawn_blocking(move || {
        let profile = profile.first_pages(BOOT_PAGES_MAX);
        let boot = build_boot(&of.tree, of.digest, &profile, |id, place| frames.open(id, place))?;
        anyhow::Ok(boot.map(|boot| (Bytes::from(boot), of.digest)))
    });
    built.await?.with_context(|| format!("the boot pack of {}", image.reference))
}

/// Where the frames of each pack end, in bytes: nothing is asked for beyond.
fn pack_ends(tree: &Tree) -> Result<HashMap<PackId, u64>> {
    let mut ends = HashMap::new();
    for number in 0..tree.frames() {
        let (_, place) = tree.frame(number)?;
        let end = ends.entry(place.pack).or_insert(0);
        *end = place.frame.end().max(*end);
    }
    Ok(ends)
}

/// Frames of an image, from its registry. For threads that may block.
struct Frames {
    client: Client,
    repository: String,
    ends: HashMap<PackId, u64>,
    /// Parts of packs, by where they begin.
    windows: LruCache<(PackId, u64), Bytes>,
    runtime: Handle,
}

impl Frames {
    fn open(&mut self, id: FrameId, place: Place) -> Result<Chunk> {
        let (start, end) = (u64::from(place.frame.offset), place.frame.end());
        let inside = |(key, bytes): (&(PackId, u64), &Bytes)| {
            (key.0 == place.pack && key.1 <= start && end <= key.1 + bytes.len() as u64).then_some(*key)
        };
        let key = match self.windows.iter().find_map(inside) {
            Some(key) => key,
            None => {
                let last = self.ends.get(&place.pack).copied().unwrap_or(end);
                let range = start..(start + WINDOW_BYTES).clamp(end, last.max(end));
                let fetched = self.client.blob_range(&self.repository, place.pack.into(), range);
                self.windows.put((place.pack, start), self.runtime.block_on(fetched)?);
                (place.pack, start)
            }
        };
        let window = self.windows.get(&key).expect("just found or put");
        let at = usize::try_from(start - key.1).expect("inside a window");
        let sealed = window.slice(at..at + place.frame.sealed_len as usize);
        Ok(Sealed::new(sealed, place.frame.plain_len as usize).open(id)?)
    }
}
