//! Profiles and boot packs as artifacts: which hang on an image, and how new ones take their place.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use lamina_image::{
    BootPack, COMMANDS_MAX, CommandKey, Descriptor, Digest, PROFILE_ANNOTATION, PROFILE_BYTES_MAX, media_type,
};
use lamina_store::{Repo, Store, StoreError};
use lamina_wire::{CREATED_ANNOTATION, created_after, made_at, newest_first};

use super::Subject;
use crate::artifact::{Artifact, hang};

/// What was learnt of an image, as a referrers answer lists it, but the newest first: of each command, and of all together, one
/// of each kind, and more only after a crash.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hung {
    pub(super) profiles: Vec<Descriptor>,
    pub(super) boots: Vec<Descriptor>,
}

/// Where something that was learnt hangs, and when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot<'a> {
    /// The command that it is about; `None` for all.
    pub(super) command: Option<&'a CommandKey>,
    /// Seconds since 1970.
    pub(super) now: u64,
}

impl Hung {
    /// Looks what hangs on an image. Cost: a listing, and one small read a referrer.
    pub(crate) async fn find(store: &Store, repo: &Repo, image: Digest) -> Result<Self, StoreError> {
        Ok(Self::among(store.referrers(repo, image).await?))
    }

    /// What of an image's referrers is a profile or a boot pack.
    fn among(referrers: Vec<Descriptor>) -> Self {
        let mut hung = Self::default();
        for artifact in referrers {
            match artifact.artifact_type.as_deref() {
                Some(media_type::PROFILE) => hung.profiles.push(artifact),
                Some(media_type::BOOT) => hung.boots.push(artifact),
                _ => {}
            }
        }
        newest_first(&mut hung.profiles);
        newest_first(&mut hung.boots);
        hung
    }

    /// Only what is of this command, or of all of them together.
    pub(super) fn of(&self, command: Option<&CommandKey>) -> Self {
        let of = |artifacts: &[Descriptor]| {
            let own =
                artifacts.iter().filter(|artifact| CommandKey::is_named(command, &artifact.annotations));
            own.cloned().collect()
        };
        Self { profiles: of(&self.profiles), boots: of(&self.boots) }
    }

    /// The commands of which something is known.
    pub(super) fn commands(&self) -> BTreeSet<CommandKey> {
        let all = self.profiles.iter().chain(&self.boots);
        all.filter_map(|artifact| CommandKey::named_by(&artifact.annotations)).collect()
    }

    /// The commands that have to go so that `new` has room beside the others: those that were revised longest ago.
    pub(super) fn surplus(&self, new: &CommandKey) -> Vec<CommandKey> {
        let mut others: Vec<_> = self.commands().into_iter().filter(|command| command != new).collect();
        let surplus = others.len().saturating_sub(COMMANDS_MAX - 1);
        others.sort_by_cached_key(|command| self.revised(command));
        others.truncate(surplus);
        others
    }

    /// When the profile of a command was last written, in seconds since 1970.
    fn revised(&self, command: &CommandKey) -> u64 {
        let own = self.of(Some(command));
        own.profiles.iter().filter_map(made_at).max().unwrap_or(0)
    }

    /// The profile's JSON, not parsed. What is lost or far too long is no profile: the next start makes another.
    pub(crate) async fn profile(&self, store: &Store) -> Result<Option<Bytes>, StoreError> {
        let digest = self.profiles.first().and_then(|artifact| artifact.annotations.get(PROFILE_ANNOTATION));
        let Some(digest) = digest.and_then(|digest| digest.parse().ok()) else { return Ok(None) };
        match store.small_blob(digest, PROFILE_BYTES_MAX as u64).await {
            Err(StoreError::Missing(_) | StoreError::TooLarge { .. }) => Ok(None),
            read => read.map(Some),
        }
    }

    /// The boot pack's blob.
    pub(super) fn boot(&self) -> Option<Descriptor> {
        let boot = BootPack::named_by(&self.boots.first()?.annotations)?;
        Some(Descriptor::named(media_type::BOOT, boot.blob, boot.bytes))
    }

    /// Takes everything down. The bytes stay until they are collected.
    pub(super) async fn remove(&self, store: &Store, repo: &Repo, image: Digest) -> Result<(), StoreError> {
        // a boot pack without a profile would never be made anew
        for artifact in self.boots.iter().chain(&self.profiles) {
            store.delete_manifest(repo, artifact.digest, Some(image)).await?;
        }
        Ok(())
    }
}

impl Slot<'_> {
    /// The same, where something takes the place of `old`, which a crash may leave beside it.
    fn after(self, old: &[Descriptor]) -> Self {
        Self { now: created_after(old, self.now), ..self }
    }

    /// What a referrers answer says beside what it says of the blob.
    fn annotations(self) -> impl Iterator<Item = (String, String)> {
        let created = (CREATED_ANNOTATION.to_owned(), self.now.to_string());
        CommandKey::annotation(self.command).into_iter().chain([created])
    }
}

impl Subject {
    /// Stores a profile, hangs it on the image, and takes the old ones down, which are `hung`.
    pub(super) async fn put_profile(
        &self,
        store: &Store,
        slot: Slot<'_>,
        json: Bytes,
        hung: &Hung,
    ) -> Result<(), StoreError> {
        let size = json.len() as u64;
        let blob = Descriptor::named(media_type::PROFILE, store.put_blob(json).await?, size);
        let mut annotations = BTreeMap::from([(PROFILE_ANNOTATION.to_owned(), blob.digest.to_string())]);
        annotations.extend(slot.after(&hung.profiles).annotations());
        self.replace(store, media_type::PROFILE, Some((blob, annotations)), &hung.profiles).await
    }

    /// The same with a boot pack; where there is none to make, the old ones go.
    pub(super) async fn put_boot(
        &self,
        store: &Store,
        slot: Slot<'_>,
        boot: Option<Vec<u8>>,
        hung: &Hung,
    ) -> Result<(), StoreError> {
        let mut new = None;
        if let Some(boot) = boot {
            let size = boot.len() as u64;
            let blob = Descriptor::named(media_type::BOOT, store.put_blob(boot.into()).await?, size);
            let pack = BootPack { blob: blob.digest, bytes: size, tree: self.tree.digest };
            let mut annotations = pack.annotations();
            annotations.extend(slot.after(&hung.boots).annotations());
            new = Some((blob, annotations));
        }
        self.replace(store, media_type::BOOT, new, &hung.boots).await
    }

    async fn replace(
        &self,
        store: &Store,
        kind: &'static str,
        new: Option<(Descriptor, BTreeMap<String, String>)>,
        old: &[Descriptor],
    ) -> Result<(), StoreError> {
        let image = self.image.digest;
        let mut kept = None;
        if let Some((blob, annotations)) = new {
            let artifact = Artifact { kind, subject: self.image.clone(), blobs: vec![blob], annotations };
            let artifact = artifact.write(store).await?;
            hang(store, &self.repo, image, &artifact).await?;
            kept = Some(artifact.digest);
        }
        for artifact in old.iter().filter(|artifact| Some(artifact.digest) != kept) {
            store.delete_manifest(&self.repo, artifact.digest, Some(image)).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u64) -> CommandKey {
        format!("c{number}").parse().unwrap()
    }

    fn artifact(command: Option<&CommandKey>, now: u64) -> Descriptor {
        let mut artifact = Descriptor::of(media_type::OCI_MANIFEST, b"");
        artifact.annotations.extend(Slot { command, now }.annotations());
        artifact
    }

    #[test]
    fn a_new_command_takes_the_place_of_the_one_that_was_revised_longest_ago() {
        let revised = |number: u64| (number * 7) % 16;
        let commands = (0..16).map(|number| artifact(Some(&key(number)), revised(number)));
        let hung = Hung { profiles: commands.chain([artifact(None, 0)]).collect(), boots: Vec::new() };
        assert_eq!(hung.commands().len(), COMMANDS_MAX);
        assert_eq!(hung.surplus(&key(99)), [key(0)]);
        assert_eq!(hung.surplus(&key(3)), []);
        let mut more = hung.clone();
        more.boots.push(artifact(Some(&key(50)), 99));
        // a boot pack that a crash left without a profile goes first, as it was never finished
        assert_eq!(more.surplus(&key(99)).len(), 2);
        assert!(more.surplus(&key(99)).contains(&key(50)));
    }

    #[test]
    fn of_several_that_a_crash_left_the_newest_counts() {
        let of_kind = |kind: &str, now| {
            let kind = Some(kind.to_owned());
            Descriptor { artifact_type: kind, ..artifact(None, now) }
        };
        let mut undated = of_kind(media_type::PROFILE, 0);
        undated.annotations.remove(CREATED_ANNOTATION);
        let dated = [9, 100, 20]
            .into_iter()
            .flat_map(|now| [media_type::PROFILE, media_type::BOOT].map(|kind| of_kind(kind, now)));
        let hung = Hung::among([undated].into_iter().chain(dated).collect());
        let times = |artifacts: &[Descriptor]| artifacts.iter().map(made_at).collect::<Vec<_>>();
        assert_eq!(times(&hung.profiles), [Some(100), Some(20), Some(9), None]);
        assert_eq!(times(&hung.boots), [Some(100), Some(20), Some(9)]);
    }

    #[test]
    fn what_belongs_to_one_command_is_not_anothers_nor_the_general_one() {
        let hung = Hung {
            profiles: vec![artifact(Some(&key(1)), 1), artifact(None, 2)],
            boots: vec![artifact(Some(&key(1)), 3)],
        };
        let count = |command: Option<&CommandKey>| {
            let own = hung.of(command);
            (own.profiles.len(), own.boots.len())
        };
        assert_eq!((count(None), count(Some(&key(1))), count(Some(&key(2)))), ((1, 0), (1, 1), (0, 0)));
    }
}
