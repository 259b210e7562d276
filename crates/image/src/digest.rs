//! OCI digests: the names of blobs.

use std::fmt;
use std::str::FromStr;

use lamina_chunk::PackId;
use sha2::Digest as _;

/// What a digest is made with: those that the OCI image specification registers (descriptor.md, "Registered
/// algorithms").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// What everything that is made here is named by, and nearly everything that is pushed.
    #[default]
    Sha256,
    /// Taken where a client names things so.
    Sha512,
}

impl Algorithm {
    /// As it stands before the colon.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of a blob, after the OCI image specification (descriptor.md, "Digests"): `sha256:` and 64 lower-case
/// hexadecimal digits, or `sha512:` and 128.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(Sum);

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Sum {
    Sha256([u8; 32]),
    Sha512([u8; 64]),
}

impl Digest {
    /// The sha256 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sum::Sha256(sha2::Sha256::digest(bytes).into()))
    }

    /// The digest of `bytes` by this algorithm.
    pub fn by(algorithm: Algorithm, bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    /// The sha256 with exactly these 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Sum::Sha256(bytes))
    }

    /// The digest in hexadecimal digits, whose number tells the algorithm: as file names and object keys have it.
    pub fn from_hex(digits: &str) -> Option<Self> {
        if digits.bytes().any(|digit| digit.is_ascii_uppercase()) {
            return None;
        }
        match digits.len() {
            64 => {
                let mut bytes = [0; 32];
                hex::decode_to_slice(digits, &mut bytes).ok()?;
                Some(Self(Sum::Sha256(bytes)))
            }
            128 => {
                let mut bytes = [0; 64];
                hex::decode_to_slice(digits, &mut bytes).ok()?;
                Some(Self(Sum::Sha512(bytes)))
            }
            _ => None,
        }
    }

    /// What it was made with.
    pub const fn algorithm(&self) -> Algorithm {
        match self.0 {
            Sum::Sha256(_) => Algorithm::Sha256,
            Sum::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// Whether it is the digest of `bytes`.
    pub fn names(&self, bytes: &[u8]) -> bool {
        Self::by(self.algorithm(), bytes) == *self
    }

    /// Its 32 or 64 bytes.
    pub const fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Sum::Sha256(bytes) => bytes,
            Sum::Sha512(bytes) => bytes,
        }
    }

    /// The digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.as_bytes())
    }
}

impl From<PackId> for Digest {
    fn from(pack: PackId) -> Self {
        Self::from_bytes(*pack.as_bytes())
    }
}

/// The digest is not a sha256, so it names no pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a sha256, so it names no pack")]
pub struct NoPackError(Digest);

impl TryFrom<Digest> for PackId {
    type Error = NoPackError;

    fn try_from(digest: Digest) -> Result<Self, NoPackError> {
        match digest.0 {
            Sum::Sha256(bytes) => Ok(Self::from_bytes(bytes)),
            Sum::Sha512(_) => Err(NoPackError(digest)),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The text is not a digest that can be used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a digest of the form sha256:<64 lower-case hexadecimal digits> or sha512:<128 of them>"
)]
pub struct ParseDigestError(String);

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        let digest = text.split_once(':').and_then(|(algorithm, digits)| {
            Self::from_hex(digits).filter(|digest| digest.algorithm().as_str() == algorithm)
        });
        digest.ok_or_else(|| ParseDigestError(text.chars().take(100).collect()))
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A digest over bytes that come one piece after another; a sha256 by default.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    /// A digest by this algorithm, over nothing yet.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => State::Sha256(sha2::Sha256::default()),
            Algorithm::Sha512 => State::Sha512(sha2::Sha512::default()),
        })
    }

    /// What it will give.
    pub fn algorithm(&self) -> Algorithm {
        match self.0 {
            State::Sha256(_) => Algorithm::Sha256,
            State::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// Takes the next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(hasher) => hasher.update(bytes),
            State::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The digest of all pieces.
    pub fn finish(self) -> Digest {
        Digest(match self.0 {
            State::Sha256(hasher) => Sum::Sha256(hasher.finalize().into()),
            State::Sha512(hasher) => Sum::Sha512(hasher.finalize().into()),
        })
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self::new(Algorithm::default())
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hasher({})", self.algorithm())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_parse_only_in_their_one_spelling() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(empty.parse(), Ok(Digest::of(b"")));
        assert_eq!(Digest::of(b"").to_string(), empty);
        for wrong in [
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "sha256:E3B0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "sha256:e3",
            "sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "sha256:../../../../etc/passwd",
            "",
        ] {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_sha512_names_blobs_but_no_packs() {
        // the digest of nothing, as FIPS 180-4 has it
        let empty = "sha512:cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce\
                     47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e";
        let digest = Digest::by(Algorithm::Sha512, b"");
        assert_eq!(empty.parse(), Ok(digest));
        assert_eq!(digest.to_string(), empty);
        assert!(digest.names(b"") && !digest.names(b"a"));
        assert_eq!(Digest::from_hex(&digest.hex()), Some(digest));
        assert!(PackId::try_from(digest).is_err());
        assert_eq!(PackId::try_from(Digest::of(b"a")).map(Digest::from), Ok(Digest::of(b"a")));
    }
}
