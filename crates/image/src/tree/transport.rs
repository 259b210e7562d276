//! A tree as a blob: the flat bytes as one zstd frame behind their length.

use std::io::{Read, Write};

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
    let (len, frame) = blob.split_first_chunk::<8>().ok_or(TreeError::Compressed)?;
    let len = u64::from_le_bytes(*len);
    if len > TREE_BYTES_MAX {
        return Err(TreeError::TooLarge("its length"));
    }
    let decoder = zstd::Decoder::with_buffer(frame).map_err(|_| TreeError::Compressed)?;
    let mut flat = Vec::new();
    decoder.take(len + 1).read_to_end(&mut flat).map_err(|_| TreeError::Compressed)?;
    if flat.len() as u64 != len { Err(TreeError::Compressed) } else { Ok(flat) }
}
