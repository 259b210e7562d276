//! Every object key, made and parsed in this one file.
//!
//! ```text
//! blobs/<algorithm>/<hex>                  bytes that hash to it
//! uploads/<uuid>                           bytes on their way; worthless once their upload has ended
//! trials/<uuid>                            written when a bucket is opened, to see that it honours conditions
//! packs/<hex>                              the blob is a pack, and every frame in it was opened
//! arrived/<hex>                            the blob ends like a pack, and was not opened yet
//! moved/<hex>                              the pack was repacked, and where its frames are now
//! layers/<hex>                             how to rebuild a layer, by compressed digest and by diff ID
//! images/<hex>                             what became of an image's tree
//! jobs/<hex>/<repo>                        an image that waits for its tree, and the repository that wants it
//! links/<hex>/<repo>                       the blob belongs to the repository
//! repos/<repo>/manifests/<hex>             the manifest belongs to the repository
//! repos/<repo>/referrers/<subject>/<hex>   the manifest hangs on the subject
//! refs/<repo>/<tag>/<20 digits>            the values that the tag had; the highest number counts
//! collecting/leases/<uuid>                 a process that takes things in, and its answer to collectors
//! collecting/collectors/<20 digits>        who collects; the highest number counts
//! collecting/condemned/<20 digits>         what a collector is about to delete
//! collecting/hanging                       an artifact that a collector hangs on an image, and where
//! quarantine/<4 digits>                    what nothing names, and since when
//! damaged/<key>                            what was found damaged, out of the way
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

pub(crate) fn trial(id: Uuid) -> Path {
    key(["trials", &id.to_string()])
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

pub(crate) fn all_moved() -> Path {
    key(["moved"])
}

pub(crate) fn moved(pack: PackId) -> Path {
    key(["moved", &Digest::from(pack).hex()])
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

pub(crate) fn collecting() -> Path {
    key(["collecting"])
}

pub(crate) fn leases() -> Path {
    key(["collecting", "leases"])
}

pub(crate) fn lease(id: Uuid) -> Path {
    key(["collecting", "leases", &id.to_string()])
}

pub(crate) fn collectors() -> Path {
    key(["collecting", "collectors"])
}

pub(crate) fn collector(number: u64) -> Path {
    key(["collecting", "collectors", &format!("{number:020}")])
}

pub(crate) fn condemned_lists() -> Path {
    key(["collecting", "condemned"])
}

pub(crate) fn condemned(number: u64) -> Path {
    key(["collecting", "condemned", &format!("{number:020}")])
}

pub(crate) fn hanging() -> Path {
    key(["collecting", "hanging"])
}

pub(crate) fn quarantines() -> Path {
    key(["quarantine"])
}

pub(crate) fn quarantine(number: usize) -> Path {
    key(["quarantine", &format!("{number:04}")])
}

/// Where a damaged object goes.
pub(crate) fn damaged(of: &Path) -> Path {
    Path::from(format!("damaged/{of}"))
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

/// The number of a collector's key.
pub(crate) fn parse_collector(path: &Path) -> Option<u64> {
    parse_number(path.as_ref().strip_prefix("collecting/collectors/")?)
}

/// The number of a list of condemned objects.
pub(crate) fn parse_condemned(path: &Path) -> Option<u64> {
    parse_number(path.as_ref().strip_prefix("collecting/condemned/")?)
}

fn parse_number(text: &str) -> Option<u64> {
    (text.len() == 20 && text.bytes().all(|digit| digit.is_ascii_digit())).then(|| text.parse().ok())?
}

/// What a key is of, where it is one of those that are collected and checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Named {
    Blob(Digest),
    Pack(PackId),
    Arrival(PackId),
    Moved(PackId),
    Layer(Digest),
    Image(Digest),
    Job(Digest, Repo),
    Link(Digest, Repo),
    Manifest(Repo, Digest),
    Referrer(Repo, Digest, Digest),
    TagValue(Repo, Tag, u64),
}

impl Named {
    /// Reads a key.
    pub(crate) fn parse(path: &Path) -> Option<Self> {
        let digest = Digest::from_hex;
        let parts: Vec<&str> = path.as_ref().split('/').collect();
        Some(match parts[..] {
            ["blobs", algorithm, hex] => {
                Self::Blob(digest(hex).filter(|digest| digest.algorithm().as_str() == algorithm)?)
            }
            ["packs", hex] => Self::Pack(PackId::try_from(digest(hex)?).ok()?),
            ["arrived", hex] => Self::Arrival(PackId::try_from(digest(hex)?).ok()?),
            ["moved", hex] => Self::Moved(PackId::try_from(digest(hex)?).ok()?),
            ["layers", hex] => Self::Layer(digest(hex)?),
            ["images", hex] => Self::Image(digest(hex)?),
            ["jobs", hex, repo] => Self::Job(digest(hex)?, unflat(repo)?),
            ["links", hex, repo] => Self::Link(digest(hex)?, unflat(repo)?),
            ["repos", repo, "manifests", hex] => Self::Manifest(unflat(repo)?, digest(hex)?),
            ["repos", repo, "referrers", subject, hex] => {
                Self::Referrer(unflat(repo)?, digest(subject)?, digest(hex)?)
            }
            ["refs", repo, tag, number] => {
                Self::TagValue(unflat(repo)?, tag.parse().ok()?, parse_number(number)?)
            }
            _ => return None,
        })
    }

    /// The blob that it is, or that it is a mark or a link of.
    pub(crate) fn bytes(&self) -> Option<Digest> {
        match self {
            Self::Blob(digest) | Self::Link(digest, _) => Some(*digest),
            Self::Pack(pack) | Self::Arrival(pack) => Some((*pack).into()),
            _ => None,
        }
    }

    /// Makes the key again.
    pub(crate) fn key(&self) -> Path {
        match self {
            Self::Blob(digest) => blob(*digest),
            Self::Pack(id) => pack(*id),
            Self::Arrival(id) => arrival(*id),
            Self::Moved(id) => moved(*id),
            Self::Layer(digest) => layer(*digest),
            Self::Image(digest) => image(*digest),
            Self::Job(digest, repo) => job(*digest, repo),
            Self::Link(digest, repo) => link(*digest, repo),
            Self::Manifest(repo, digest) => manifest(repo, *digest),
            Self::Referrer(repo, subject, digest) => referrer(repo, *subject, *digest),
            Self::TagValue(repo, tag, number) => tag_value(repo, tag, *number),
        }
    }
}

/// The tag and the number of a tag value's key.
pub(crate) fn parse_tag_value(path: &Path) -> Option<(Tag, u64)> {
    let parts: Vec<&str> = path.as_ref().split('/').collect();
    let ["refs", _, tag, number] = parts[..] else { return None };
    Some((tag.parse().ok()?, parse_number(number)?))
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
            let tag = "t".parse().unwrap();
            for named in [
                Named::Blob(digest),
                Named::Blob(Digest::by(lamina_image::Algorithm::Sha512, &hash)),
                Named::Pack(PackId::from_bytes(hash)),
                Named::Arrival(PackId::from_bytes(hash)),
                Named::Moved(PackId::from_bytes(hash)),
                Named::Link(digest, repo.clone()),
                Named::Layer(digest),
                Named::Image(digest),
                Named::Job(digest, repo.clone()),
                Named::Manifest(repo.clone(), digest),
                Named::Referrer(repo.clone(), digest, digest),
                Named::TagValue(repo.clone(), tag, number),
            ] {
                prop_assert_eq!(Named::parse(&named.key()), Some(named));
            }
            prop_assert_eq!(parse_condemned(&condemned(number)), Some(number));
            prop_assert_eq!(parse_collector(&collector(number)), Some(number));
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
