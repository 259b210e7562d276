//! Tags: the only thing that changes.
//!
//! A tag's values are objects with rising numbers, each written only if it is not there yet; the highest number
//! counts. That is compare-and-swap with nothing but put-if-absent, which every object store has. A deleted tag is a
//! value that names nothing. The last [`KEPT`] values stay, older ones go.
//!
//! Why they stay: whoever read number 5 and then slept might find 6 absent because it came and went meanwhile. As
//! long as fewer than [`KEPT`] values were written after 6, it was never removed; so a writer looks once more after
//! its write, and where it is further behind than that it says [`StoreError::Contended`].

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_image::Digest;

use crate::record::RefValue;
use crate::{Repo, Store, StoreError, Tag, keys};

/// How many values of a tag are kept.
const KEPT: u64 = 16;
/// How often a change is tried again when others were faster.
const TRIES: usize = 16;
/// Tags that are read at the same time for a list.
const READS: usize = 16;

/// A tag's value, as one reader found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference {
    /// How often the tag has changed; 0 where it never was.
    pub number: u64,
    /// What it points at; `None` where it was deleted or never was.
    pub manifest: Option<Digest>,
}

impl Store {
    /// What the tag points at now.
    pub async fn reference(&self, repo: &Repo, tag: &Tag) -> Result<Reference, StoreError> {
        for _ in 0..TRIES {
            let numbers = self.numbers(repo, tag).await?;
            let Some(number) = numbers.last().copied() else {
                return Ok(Reference { number: 0, manifest: None });
            };
            // where it has gone, 16 values were written since the listing
            if let Some(value) = self.objects.json::<RefValue>(&keys::tag_value(repo, tag, number)).await? {
                return Ok(Reference { number, manifest: value.manifest });
            }
        }
        Err(StoreError::Contended(tag.clone()))
    }

    /// Makes the tag point at `manifest`, or at nothing, if it still has the value that was `seen`.
    ///
    /// Everything that the manifest reaches must be durable already: this is the commit point. Cancelling it leaves
    /// the old or the new value.
    ///
    /// # Errors
    /// [`StoreError::Contended`] where somebody else changed it.
    pub async fn swap(
        &self,
        repo: &Repo,
        tag: &Tag,
        seen: Reference,
        manifest: Option<Digest>,
    ) -> Result<(), StoreError> {
        let number = seen.number + 1;
        let contended = || StoreError::Contended(tag.clone());
        if !self.objects.create_json(&keys::tag_value(repo, tag, number), &RefValue { manifest }).await? {
            return Err(contended());
        }
        let numbers = self.numbers(repo, tag).await?;
        let last = numbers.last().copied().unwrap_or(number);
        if last >= number + KEPT {
            return Err(contended());
        }
        for old in numbers.into_iter().filter(|old| old + KEPT <= last) {
            if let Err(error) = self.objects.delete(&keys::tag_value(repo, tag, old)).await {
                // the next change tries again
                tracing::debug!(%repo, %tag, old, %error, "an old value of a tag was not removed");
            }
        }
        Ok(())
    }

    /// Makes the tag point at `manifest`, or at nothing, whatever it pointed at. False where it was so already.
    pub async fn set_tag(
        &self,
        repo: &Repo,
        tag: &Tag,
        manifest: Option<Digest>,
    ) -> Result<bool, StoreError> {
        for _ in 0..TRIES {
            let seen = self.reference(repo, tag).await?;
            if seen.manifest == manifest {
                return Ok(false);
            }
            match self.swap(repo, tag, seen, manifest).await {
                Err(StoreError::Contended(_)) => {}
                other => return other.map(|()| true),
            }
        }
        Err(StoreError::Contended(tag.clone()))
    }

    /// All tags of a repository that point at something, sorted, with what they point at.
    ///
    /// Cost: a listing, and one small read a tag.
    pub async fn tags(&self, repo: &Repo) -> Result<Vec<(Tag, Digest)>, StoreError> {
        let mut found = BTreeMap::<Tag, u64>::new();
        let mut listing = self.objects.list(&keys::tags(repo));
        while let Some(object) = listing.try_next().await? {
            if let Some((tag, number)) = keys::parse_tag_value(&object.location) {
                let highest = found.entry(tag).or_default();
                *highest = number.max(*highest);
            }
        }
        let read = |tag: Tag| async move {
            let seen = self.reference(repo, &tag).await?;
            Ok(seen.manifest.map(|manifest| (tag, manifest)))
        };
        let tags = stream::iter(found.into_keys().map(read)).buffered(READS);
        tags.try_filter_map(|tag| async move { Ok(tag) }).try_collect().await
    }

    /// What the tags of a repository point at or pointed at, as far as it is kept, the newest first; at most `limit`
    /// values. Deletions are left out.
    ///
    /// Cost: a listing, and one small read a value.
    pub async fn tag_values(&self, repo: &Repo, limit: usize) -> Result<Vec<(Tag, Digest)>, StoreError> {
        let listing = self.objects.list(&keys::tags(repo));
        let found = listing.try_filter_map(|object| async move {
            let value = keys::parse_tag_value(&object.location);
            Ok(value.map(|(tag, number)| (object.last_modified, number, tag)))
        });
        let mut found: Vec<_> = found.try_collect().await?;
        found.sort_unstable_by(|one, other| other.cmp(one));
        found.truncate(limit);
        let read = |(_, number, tag)| async move {
            let value = self.objects.json::<RefValue>(&keys::tag_value(repo, &tag, number)).await?;
            Ok(value.and_then(|value| value.manifest).map(|manifest| (tag, manifest)))
        };
        let values = stream::iter(found.into_iter().map(read)).buffered(READS);
        values.try_filter_map(|value| async move { Ok(value) }).try_collect().await
    }

    /// The numbers of a tag's values that are there, rising.
    async fn numbers(&self, repo: &Repo, tag: &Tag) -> Result<Vec<u64>, StoreError> {
        let listing = self.objects.list(&keys::tag(repo, tag));
        let numbers = listing.try_filter_map(|object| async move {
            Ok(keys::parse_tag_value(&object.location).map(|(_, number)| number))
        });
        let mut numbers: Vec<u64> = numbers.try_collect().await?;
        numbers.sort_unstable();
        Ok(numbers)
    }
}
