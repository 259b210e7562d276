//! Which image a new one follows: the one that its tag named before, else the one that was tagged last.

use std::collections::BTreeSet;

use lamina_image::{Digest, Document, Platform};
use lamina_store::{Repo, StoreError, Tag};

use super::{Hung, Learner};

/// Values of tags that are looked at, the newest: some hundred small reads in the background.
const VALUES_MAX: usize = 64;
/// Images of one index that are looked at: more than there are platforms.
const PLATFORMS_MAX: usize = 32;

/// What a tag names or named, each image with its platform where an index says it.
#[derive(Debug)]
struct Value {
    tag: Tag,
    images: Vec<(Digest, Option<Platform>)>,
}

impl Learner {
    /// The image that this one follows, and what was learnt of that. `None` where it is not tagged, or follows none with a profile.
    pub(super) async fn predecessor(
        &self,
        repo: &Repo,
        image: Digest,
    ) -> Result<Option<(Digest, Hung)>, StoreError> {
        let mut values = Vec::new();
        for (tag, digest) in self.store.tag_values(repo, VALUES_MAX).await? {
            values.push(Value { tag, images: self.images_under(repo, digest).await? });
        }
        for candidate in order(&values, image) {
            let hung = Hung::find(&self.store, repo, candidate).await?;
            if hung.of(None).profile(&self.store).await?.is_some() || !hung.commands().is_empty() {
                tracing::info!(%repo, %image, %candidate, "an image takes profiles over");
                return Ok(Some((candidate, hung)));
            }
        }
        Ok(None)
    }

    /// The images of a manifest or index. None where it was removed or does not parse.
    async fn images_under(
        &self,
        repo: &Repo,
        digest: Digest,
    ) -> Result<Vec<(Digest, Option<Platform>)>, StoreError> {
        let Some((media_type, bytes)) = self.store.manifest(repo, digest).await? else {
            return Ok(Vec::new());
        };
        Ok(match Document::parse(&media_type, &bytes) {
            Ok(Document::Manifest(_)) => vec![(digest, None)],
            Ok(Document::Index(index)) => {
                let images = index.manifests.into_iter().take(PLATFORMS_MAX);
                images.map(|image| (image.digest, image.platform)).collect()
            }
            Err(_) => Vec::new(),
        })
    }
}

/// The other images, in the order in which they are likely to be the predecessor: first what the same tags named, then
/// what others did, the newest first. Values come newest first. Empty where nothing names the image.
fn order(values: &[Value], image: Digest) -> Vec<Digest> {
    let own = |value: &&Value| value.images.iter().any(|(digest, _)| *digest == image);
    let tags: BTreeSet<&Tag> = values.iter().filter(own).map(|value| &value.tag).collect();
    if tags.is_empty() {
        return Vec::new();
    }
    let images = values.iter().flat_map(|value| &value.images);
    let platform = images.filter(|(digest, _)| *digest == image).find_map(|(_, platform)| platform.as_ref());
    // who says nothing of platforms may be for any
    let fits = |other: &Option<Platform>| match (other, platform) {
        (Some(other), Some(platform)) => other == platform,
        _ => true,
    };
    let (same, others): (Vec<&Value>, Vec<&Value>) =
        values.iter().partition(|value| tags.contains(&value.tag));
    let mut seen = BTreeSet::from([image]);
    let images = same.into_iter().chain(others).flat_map(|value| &value.images);
    let fitting = images.filter(|(_, other)| fits(other)).map(|(digest, _)| *digest);
    fitting.filter(|digest| seen.insert(*digest)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: u8) -> Digest {
        Digest::from_bytes([number; 32])
    }

    fn on(architecture: &str) -> Option<Platform> {
        Some(Platform { architecture: architecture.to_owned(), os: "linux".to_owned(), variant: None })
    }

    fn value(tag: &str, images: &[(u8, Option<Platform>)]) -> Value {
        let images = images.iter().map(|(number, platform)| (digest(*number), platform.clone()));
        Value { tag: tag.parse().unwrap(), images: images.collect() }
    }

    #[test]
    fn the_same_tag_goes_before_others_and_new_before_old() {
        let values = [
            value("latest", &[(9, None)]),
            value("v3", &[(9, None)]),
            value("edge", &[(7, None)]),
            value("v2", &[(5, None)]),
            value("latest", &[(4, None)]),
            value("latest", &[(5, None)]),
        ];
        assert_eq!(order(&values, digest(9)), [4, 5, 7].map(digest));
    }

    #[test]
    fn an_image_that_nothing_names_follows_none() {
        assert_eq!(order(&[value("v1", &[(1, None)])], digest(9)), []);
    }

    #[test]
    fn images_of_another_platform_are_no_predecessors() {
        let values = [
            value("v2", &[(3, on("amd64")), (4, on("arm64"))]),
            value("v1", &[(1, on("amd64")), (2, on("arm64"))]),
            value("v0", &[(5, None)]),
        ];
        assert_eq!(order(&values, digest(4)), [2, 5].map(digest));
    }
}
