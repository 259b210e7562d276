//! `lamina profile push`: a profile and its boot pack, made here, for a registry that does not learn.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use lamina_chunk::{Chunk, FrameId, PackId, Place, Sealed};
use lamina_image::{
    BootHad, BootPack, COMMANDS_MAX, CommandKey, Descriptor, Digest, Document, PROFILE_ANNOTATION,
    PROFILE_BYTES_MAX, Profile, Start, Starts, TREE_BYTES_MAX, Tree, build_boot, media_type, unpack_tree,
};
use lamina_node::{KeptTrace, KeptTraces};
use lamina_wire::{CREATED_ANNOTATION, Client, created_after, read_trace};
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
    let (reference, command) = (&arguments.reference, arguments.of.command.as_ref());
    let image = Image::find(reference, common).await?;
    let learns = image.client.known_layers(image.repository(), &[]).await?.is_some();
    if let Some(path) = &arguments.file {
        let (profile, json) = read_profile(path)?;
        if learns {
            return Ok(image.client.put_profile(image.repository(), image.manifest, command, json).await?);
        }
        return push(&image, &image.tree().await?, command, profile).await;
    }
    ensure!(
        !learns,
        "{} learns from starts by itself; name a FILE to replace what it has learnt",
        reference.host
    );
    let traces = KeptTraces::new(arguments.cache.directory.join("traces"));
    let mut kept = traces.find(image.manifest)?;
    kept.retain(|one| command.is_none() || one.command.as_ref() == command);
    let tree = image.tree().await?;
    let seen = seen(&image, &tree, kept).await?;
    if seen.is_empty() {
        bail!(
            "no start of {reference} was recorded here since the last push; mount it without a boot pack and start it, or `lamina profile record {reference} -- COMMAND`"
        );
    }
    for (command, profile) in seen {
        push(&image, &tree, command.as_ref(), profile).await?;
    }
    let forgotten = traces.forget(image.manifest, command);
    forgotten.with_context(|| arguments.cache.directory.display().to_string())
}

/// The profiles of what this node has seen, and of what is there already: those of commands, and the general one, which hears
/// of each start.
async fn seen(image: &Image<'_>, tree: &ImageTree, kept: Vec<KeptTrace>) -> Result<Profiles> {
    let mut known = Profiles::new();
    for command in kept.iter().map(|one| one.command.as_ref()).chain([None]) {
        if !known.contains_key(&command.cloned())
            && let Some((profile, _)) = image.profile(command).await?
        {
            known.insert(command.cloned(), profile);
        }
    }
    let mut revised = BTreeSet::new();
    for KeptTrace { command, trace: message } in kept {
        let Some((of, trace)) = read_trace(&message).filter(|(of, _)| *of == tree.digest) else {
            tracing::warn!("a trace of another tree is passed over");
            continue;
        };
        tracing::debug!(%of, boot = trace.boot, "a trace");
        let touched = Profile::of_trace(&tree.tree, &trace)?;
        let had = BootHad::of(trace.boot, message.boot_own);
        let starts = Starts::of(touched, had, known.get(&command), known.get(&None));
        let own = command.is_some().then_some((command, starts.own));
        for (command, start) in own.into_iter().chain([(None, starts.general)]) {
            if let Some(next) = start.and_then(|start| next(known.get(&command), start)) {
                known.insert(command.clone(), next);
                revised.insert(command);
            }
        }
    }
    known.retain(|command, _| revised.contains(command));
    Ok(known)
}

/// What a profile becomes by a start.
fn next(known: Option<&Profile>, Start { touched, missed }: Start) -> Option<Profile> {
    match known {
        // only what a boot pack lacked, and that is gone
        None if missed => None,
        None => Some(touched),
        Some(known) if known.inherited && !missed && !touched.inherited => Some(touched),
        Some(known) => Some(known.merged(&touched, missed)),
    }
}

/// Profiles of commands, and under `None` the general one.
type Profiles = BTreeMap<Option<CommandKey>, Profile>;

/// An image's tree, opened.
#[derive(Clone)]
pub(super) struct ImageTree {
    digest: Digest,
    tree: Tree,
}

impl Image<'_> {
    pub(super) async fn tree(&self) -> Result<ImageTree> {
        let bound = match &self.document {
            Document::Manifest(manifest) => manifest.bound_tree()?,
            Document::Index(_) => bail!("{} has no image for this machine", self.reference),
        };
        let digest = match bound {
            Some(digest) => digest,
            None => {
                let listed =
                    self.client.referrers(self.repository(), self.manifest, media_type::TREE).await?;
                let named = listed.iter().find_map(Descriptor::hung_tree);
                named
                    .with_context(|| format!("{} has no tree; push it with `lamina push`", self.reference))?
            }
        };
        let blob = self.client.blob(self.repository(), digest, TREE_BYTES_MAX).await?;
        let tree = tokio::task::spawn_blocking(move || Tree::open(unpack_tree(&blob)?.into())).await?;
        Ok(ImageTree { digest, tree: tree.with_context(|| format!("the tree of {}", self.reference))? })
    }

    /// Takes down what was listed, as far as the registry lets.
    pub(super) async fn take_down(&self, listed: Vec<Descriptor>, kept: Option<Digest>) -> Result<()> {
        for one in listed.into_iter().filter(|one| Some(one.digest) != kept) {
            self.client.drop_referrer(self.repository(), self.manifest, one.digest).await?;
        }
        Ok(())
    }
}

/// Forgets profiles and boot packs: all, or those of one command.
pub(super) async fn take_all_down(image: &Image<'_>, command: Option<&CommandKey>) -> Result<()> {
    // a boot pack without a profile would be no use to the next push
    for kind in [media_type::BOOT, media_type::PROFILE] {
        let mut listed = image.hung(kind).await?;
        listed.retain(|one| command.is_none() || CommandKey::is_named(command, &one.annotations));
        image.take_down(listed, None).await?;
    }
    Ok(())
}

/// Builds the boot pack of a profile, and hangs both on the image in place of those that are there of the same command.
pub(super) async fn push(
    image: &Image<'_>,
    tree: &ImageTree,
    command: Option<&CommandKey>,
    profile: Profile,
) -> Result<()> {
    let json = Bytes::from(profile.to_json());
    ensure!(json.len() <= PROFILE_BYTES_MAX, "the profile is longer than {PROFILE_BYTES_MAX} bytes");
    let (starts, pages) = (profile.starts, profile.pages());
    let boot = build(image, tree.clone(), profile).await?;
    let (digest, bytes) = config();
    image.client.push_blob(image.repository(), digest, bytes).await?;
    let mut size = 0;
    let mut new = None;
    if let Some((boot, of)) = boot {
        size = boot.len() as u64;
        let pack = BootPack { blob: Digest::of(&boot), bytes: size, tree: of };
        new = Some((boot, pack.annotations()));
    }
    replace(image, media_type::BOOT, command, new).await?;
    let annotations = [(PROFILE_ANNOTATION.to_owned(), Digest::of(&json).to_string())];
    replace(image, media_type::PROFILE, command, Some((json, annotations.into()))).await?;
    make_room(image).await?;
    let of = command.map_or_else(String::new, |command| format!(" for {command}"));
    println!("{}{of}: {pages} pages of {starts} starts, a boot pack of {}", image.reference, mib(size));
    Ok(())
}

/// Pushes a blob and the artifact that hangs it on the image; then the old ones of its kind and command go.
async fn replace(
    image: &Image<'_>,
    kind: &'static str,
    command: Option<&CommandKey>,
    new: Option<(Bytes, BTreeMap<String, String>)>,
) -> Result<()> {
    let mut old = image.hung(kind).await?;
    old.retain(|one| CommandKey::is_named(command, &one.annotations));
    let Some((blob, mut annotations)) = new else { return image.take_down(old, None).await };
    let descriptor = Descriptor::of(kind, &blob);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    annotations.insert(CREATED_ANNOTATION.to_owned(), created_after(&old, now.as_secs()).to_string());
    annotations.extend(CommandKey::annotation(command));
    image.client.push_blob(image.repository(), descriptor.digest, blob).await?;
    let artifact = Artifact { kind, subject: image.subject.clone(), blobs: vec![descriptor], annotations };
    let new = artifact.push(&image.client, image.repository()).await?;
    if let Err(error) = image.take_down(old, Some(new.digest)).await {
        tracing::warn!(%error, "an old one stays listed beside the new one, which is newer and counts");
    }
    Ok(())
}

/// Takes down what hangs there of more commands than an image may have, the oldest.
async fn make_room(image: &Image<'_>) -> Result<()> {
    let mut commands = Vec::new();
    // the newest first
    for one in image.hung(media_type::PROFILE).await? {
        commands.extend(CommandKey::named_by(&one.annotations).filter(|command| !commands.contains(command)));
    }
    for command in commands.iter().skip(COMMANDS_MAX) {
        take_all_down(image, Some(command)).await?;
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
