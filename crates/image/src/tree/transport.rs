//! A tree as a blob: the flat bytes as one zstd frame behind their length.

use std::io::{self, Read, Write};

use super::TreeError;

/// No flat tree is longer: 2 GiB, some ten million files.
pub const TREE_BYTES_MAX: u64 = 2 << 30;

/// Level 3 gives all that higher ones give here: half of a tree is hashes.
const LEVEL: i32 = 3;

/// Compresses a flat tree for the registry: its length as a little-endian 64-bit word, then one zstd frame.
/// Whether two trees are the same is told by the flat bytes: zstd may compress better one day.
pub fn pack_tree(flat: &[u8]) -> Vec<u8> {
    let mut blob = (flat.len() as u64).to_le_bytes().to_vec();
    let mut encoder = zstd::Encoder::new(&mut blob, LEVEL).expect("a level zstd knows");
    encoder.write_all(flat).and_then(|()| encoder.finish().map(drop)).expect("a Vec takes every byte");
    blob
}

/// The flat tree in a blob. The claimed length is only believed up to [`TREE_BYTES_MAX`], and memory grows with
/// what really comes.
pub fn unpack_tree(blob: &[u8]) -> Result<Vec<u8>, TreeError> {
    let mut flat = Vec::new();
    let wrong = |error: io::Error| error.into_inner()?.downcast::<TreeError>().ok();
    unpack_tree_into(blob, &mut flat)
        .map_err(|error| wrong(error).map_or(TreeError::Compressed, |it| *it))?;
    Ok(flat)
}

/// The same from a blob that is still coming, written to `flat` as it comes: its length, in bytes. Memory does not grow with it.
///
/// # Errors
/// What `blob` and `flat` say; and `InvalidData` around a [`TreeError`] for what is no tree's blob.
pub fn unpack_tree_into(mut blob: impl Read, flat: &mut impl Write) -> io::Result<u64> {
    let wrong = |error: TreeError| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut len = [0; 8];
    blob.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    if len > TREE_BYTES_MAX {
        return Err(wrong(TreeError::TooLarge("its length")));
    }
    let mut decoder = zstd::Decoder::new(blob)?.take(len + 1);
    match io::copy(&mut decoder, flat)? {
        written if written == len => Ok(len),
        _ => Err(wrong(TreeError::Compressed)),
    }
}
