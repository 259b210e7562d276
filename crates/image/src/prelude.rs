//! What a registry answers to whoever is about to start an image, in one go: its manifest, and behind it the beginning of its tree and
//! its boot pack.
//!
//! Asked for one after the other these take three round trips, over connections that each have to find out how fast the link is.
//! `FORMAT.md` has the bytes.

use crate::{
    BootPack, CommandKey, Descriptor, Digest, DocumentError, MANIFEST_BYTES_MAX, TREE_ANNOTATION, TreeNames,
    media_type,
};

/// The head is not longer: 64 KiB, some twenty times what it needs.
pub const PRELUDE_HEAD_BYTES_MAX: usize = 64 << 10;
/// So many bytes before the head say how long it is.
pub const PRELUDE_LENGTH_BYTES: usize = 4;
/// More parts than there are kinds of.
const PARTS_MAX: usize = 16;

/// Says what parts there are, in the order in which they come: the manifest, then whatever a mount of it can begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreludeHead(Vec<Descriptor>);

impl PreludeHead {
    /// The one for an image.
    pub fn new(manifest: Descriptor) -> Self {
        Self(vec![manifest])
    }

    /// The same with the names of the image's tree behind it.
    pub fn with_names(mut self, tree: Digest, names: TreeNames) -> Self {
        let mut part = Descriptor::named(media_type::TREE, names.digest, names.bytes);
        part.annotations.insert(TREE_ANNOTATION.to_owned(), tree.to_string());
        part.annotations.extend(names.notes());
        self.0.push(part);
        self
    }

    /// The same with a boot pack behind it: that for `command`, or the general one for `None`.
    pub fn with_boot(mut self, pack: BootPack, command: Option<&CommandKey>) -> Self {
        let mut part = Descriptor::named(media_type::BOOT, pack.blob, pack.bytes);
        part.annotations = pack.annotations();
        part.annotations.extend(CommandKey::annotation(command));
        self.0.push(part);
        self
    }

    /// How long it is, and then it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let head = serde_json::to_vec(&self.0).expect("it has string keys");
        let len = u32::try_from(head.len()).expect("a few KiB");
        [&len.to_le_bytes()[..], &head].concat()
    }

    /// How long a head is, by the bytes before it. `None` where it is too long.
    pub fn length(bytes: [u8; PRELUDE_LENGTH_BYTES]) -> Option<usize> {
        usize::try_from(u32::from_le_bytes(bytes)).ok().filter(|len| *len <= PRELUDE_HEAD_BYTES_MAX)
    }

    /// Reads one. *Errors*: it does not parse, or does not begin with a manifest that may be.
    pub fn parse(head: &[u8]) -> Result<Self, DocumentError> {
        if head.len() > PRELUDE_HEAD_BYTES_MAX {
            return Err(DocumentError::TooLong(head.len()));
        }
        let parts: Vec<Descriptor> = serde_json::from_slice(head)?;
        let manifest = parts.first().ok_or(DocumentError::Prelude)?;
        let len = usize::try_from(manifest.size).unwrap_or(usize::MAX);
        if len > MANIFEST_BYTES_MAX {
            return Err(DocumentError::TooLong(len));
        }
        let sum = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(part.size));
        if parts.len() > PARTS_MAX || sum.is_none() {
            return Err(DocumentError::Prelude);
        }
        Ok(Self(parts))
    }

    /// The manifest.
    pub fn manifest(&self) -> &Descriptor {
        &self.0[0]
    }

    /// What comes behind the manifest, in order. Kinds that are not known are to be passed over.
    pub fn behind(&self) -> &[Descriptor] {
        &self.0[1..]
    }

    /// How long all parts are together, in bytes.
    pub fn parts_bytes(&self) -> u64 {
        self.0.iter().map(|part| part.size).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prelude() -> PreludeHead {
        let (tree, names) = (Digest::of(b"tree"), TreeNames { digest: Digest::of(b"names"), bytes: 500 });
        let pack = BootPack { blob: Digest::of(b"boot"), bytes: 7000, tree };
        PreludeHead::new(Descriptor::of(media_type::OCI_MANIFEST, b"{}"))
            .with_names(tree, names)
            .with_boot(pack, Some(&"key".parse().expect("a key")))
    }

    #[test]
    fn what_is_written_is_read() {
        let (written, bytes) = (prelude(), prelude().to_bytes());
        let (len, head) = bytes.split_first_chunk().expect("a length");
        assert_eq!(PreludeHead::length(*len), Some(head.len()));
        let read = PreludeHead::parse(head).expect("a head");
        assert_eq!(read, written);
        assert_eq!(read.parts_bytes(), 2 + 500 + 7000);
        let [names, boot] = read.behind() else { panic!("{read:?}") };
        assert_eq!(TreeNames::noted_in(&names.annotations).map(|names| names.bytes), Some(names.size));
        assert_eq!(BootPack::named_by(&boot.annotations).map(|pack| pack.blob), Some(boot.digest));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(PreludeHead::length([0, 0, 1, 0]), Some(PRELUDE_HEAD_BYTES_MAX));
        assert_eq!(PreludeHead::length([1, 0, 1, 0]), None);
        let of = |parts: &[Descriptor]| {
            PreludeHead::parse(&serde_json::to_vec(parts).expect("it has string keys"))
        };
        let part = |size: u64| Descriptor { size, ..Descriptor::of(media_type::OCI_MANIFEST, b"") };
        of(&[]).expect_err("no manifest");
        of(&[part(MANIFEST_BYTES_MAX as u64 + 1)]).expect_err("a manifest that is too long");
        of(&[part(1), part(u64::MAX)]).expect_err("more bytes than there are numbers");
        of(&vec![part(1); PARTS_MAX + 1]).expect_err("too many parts");
        assert!(of(&[part(MANIFEST_BYTES_MAX as u64), part(1 << 40)]).is_ok());
        PreludeHead::parse(&vec![b' '; PRELUDE_HEAD_BYTES_MAX + 1]).expect_err("too long");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whatever_bytes_come_nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = PreludeHead::parse(&bytes);
        }

        #[test]
        fn a_damaged_head_is_refused_or_bounded(at in 0usize..600, byte: u8) {
            let mut head = prelude().to_bytes().split_off(PRELUDE_LENGTH_BYTES);
            let at = at % head.len();
            head[at] = byte;
            if let Ok(read) = PreludeHead::parse(&head) {
                prop_assert!(read.manifest().size <= MANIFEST_BYTES_MAX as u64);
                let _ = read.parts_bytes();
            }
        }
    }
}
