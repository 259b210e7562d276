//! Every object key, made and parsed in this one file.
//!
//! ```text
//! blobs/<algorithm>/<hex>                  bytes that hash to it
//! uploads/<uuid>                           bytes on their way; worthless once their upload has ended
//! packs/<hex>                              the blob is a pack, and every frame in it was opened
//! arrived/<hex>                            the blob ends like a pack, and was not opened yet
//! layers/<hex>                             how to rebuild a layer, by compressed digest and by diff ID
//! images/<hex>                             what became of an image's tree
//! jobs/<hex>/<repo>                        an image that waits for its tree, and the repository that wants it
//! links/<hex>/<repo>                       the blob belongs to the repository
//! repos/<repo>/manifests/<hex>             the manifest belongs to the repository
//! repos/<repo>/referrers/<subject>/<hex>   the manifest hangs on the subject
//! refs/<repo>/<tag>/<20 digits>            the values that the tag had; the highest number counts
//! ```
//!
//! `<hex>` is a digest without its algorithm, which its length tells. A repository's name is one part of a key: its slashes become `!`, which no name can hold. So listing one
//! repository never meets another one.

use lamina_chunk::PackId;
use lamina_image::Digest;
use object_store::path::Path;
use uuid::Uuid;

use crate::{Repo, Tag};

fn flat(repo: &Repo) -> String {
    repo.as_str().replace('/', "!")
}

fn unflat(part: &str) -> Option<Repo> {
    part.replace('!', "/").parse().ok()
}

fn key<const N: usize>(parts: [&str; N]) -> Path {
    Path::from_iter(parts)
}

pub(crate) fn blob(digest: Digest) -> Path {
    key(["blobs", digest.algorithm().as_str(), &digest.hex()])
}

pub(crate) fn uploads() -> Path {
    key(["uploads"])
}

pub(crate) fn upload(id: Uuid) -> Path {
    key(["uploads", &id.to_string()])
}

pub(crate) fn packs() -> Path {
    key(["packs"])
}

pub(crate) fn pack(pack: PackId) -> Path {
    key(["packs", &Digest::from(pack).hex()])
}

pub(crate) fn arrivals() -> Path {
    key(["arrived"])
}

pub(crate) fn arrival(pack: PackId) -> Path {
    key(["arrived", &Digest::from(pack).hex()])
}

pub(crate) fn layer(digest: Digest) -> Path {
    key(["layers", &digest.hex()])
}

pub(crate) fn image(manifest: Digest) -> Path {
    key(["images", &manifest.hex()])
}

pub(crate) fn jobs() -> Path {
    key(["jobs"])
}

pub(crate) fn job(manifest: Digest, repo: &Repo) -> Path {
    key(["jobs", &manifest.hex(), &flat(repo)])
}

pub(crate) fn links(digest: Digest) -> Path {
    key(["links", &digest.hex()])
}

pub(crate) fn link(digest: Digest, repo: &Repo) -> Path {
    key(["links", &digest.hex(), &flat(repo)])
}

/// Every repository that something was ever pushed to lies below it.
pub(crate) fn repositories() -> Path {
    key(["repos"])
}

pub(crate) fn manifests(repo: &Repo) -> Path {
    key(["repos", &flat(repo), "manifests"])
}

pub(crate) fn manifest(repo: &Repo, digest: Digest) -> Path {
    key(["repos", &flat(repo), "manifests", &digest.hex()])
}

pub(crate) fn referrers(repo: &Repo, subject: Digest) -> Path {
    key(["repos", &flat(repo), "referrers", &subject.hex()])
}

pub(crate) fn referrer(repo: &Repo, subject: Digest, digest: Digest) -> Path {
    key(["repos", &flat(repo), "referrers", &subject.hex(), &digest.hex()])
}

pub(crate) fn tags(repo: &Repo) -> Path {
    key(["refs", &flat(repo)])
}

pub(crate) fn tag(repo: &Repo, tag: &Tag) -> Path {
    key(["refs", &flat(repo), tag.as_str()])
}

pub(crate) fn tag_value(repo: &Repo, tag: &Tag, number: u64) -> Path {
    key(["refs", &flat(repo), tag.as_str(), &format!("{number:020}")])
}

/// The digest that a key ends with.
pub(crate) fn parse_digest(path: &Path) -> Option<Digest> {
    Digest::from_hex(path.filename()?)
}

/// The image and the repository of a job's key.
pub(crate) fn parse_job(path: &Path) -> Option<(Digest, Repo)> {
    parse_pair("jobs", path)
}

/// The blob and the repository of a link's key.
pub(crate) fn parse_link(path: &Path) -> Option<(Digest, Repo)> {
    parse_pair("links", path)
}

fn parse_pair(prefix: &str, path: &Path) -> Option<(Digest, Repo)> {
    let (found, rest) = path.as_ref().split_once('/')?;
    let (digest, repo) = rest.split_once('/')?;
    (found == prefix).then_some((Digest::from_hex(digest)?, unflat(repo)?))
}

/// The repository of a prefix below [`repositories`].
pub(crate) fn parse_repository(prefix: &Path) -> Option<Repo> {
    unflat(prefix.as_ref().strip_prefix("repos/")?)
}

/// The tag and the number of a tag value's key.
pub(crate) fn parse_tag_value(path: &Path) -> Option<(Tag, u64)> {
    let parts: Vec<&str> = path.as_ref().split('/').collect();
    let ["refs", _, tag, number] = parts[..] else { return None };
    if number.len() != 20 || !number.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    Some((tag.parse().ok()?, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn repo() -> impl Strategy<Value = Repo> {
        "[a-z0-9]{1,5}([._-][a-z0-9]{1,5})?(/[a-z0-9]{1,5}){0,3}".prop_map(|text| text.parse().unwrap())
    }

    proptest! {
        #[test]
        fn keys_parse_back_to_what_they_were_made_of(repo in repo(), tag in "[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,9}", number: u64, hash: [u8; 32]) {
            let digest = Digest::from_bytes(hash);
            let tag: Tag = tag.parse().unwrap();
            prop_assert_eq!(parse_tag_value(&tag_value(&repo, &tag, number)), Some((tag, number)));
            prop_assert_eq!(parse_job(&job(digest, &repo)), Some((digest, repo.clone())));
            prop_assert_eq!(parse_link(&link(digest, &repo)), Some((digest, repo.clone())));
            prop_assert_eq!(parse_digest(&blob(digest)), Some(digest));
            prop_assert_eq!(parse_digest(&referrer(&repo, digest, digest)), Some(digest));
        }

        #[test]
        fn keys_of_two_repositories_never_lie_below_each_other(one in repo(), other in repo()) {
            prop_assume!(one != other);
            prop_assert!(!tags(&one).prefix_matches(&tags(&other)));
        }

        #[test]
        fn any_other_key_parses_to_nothing(text in "[a-z0-9/!]{0,60}") {
            let path = Path::from(text);
            prop_assert_eq!(parse_tag_value(&path), None);
            prop_assert_eq!(parse_job(&path), None);
            prop_assert_eq!(parse_link(&path), None);
        }
    }
}
