//! Decompression of layers.

use std::io::{self, BufReader, Read};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

use super::Progress;

/// Plaintext goes from thread to thread in blocks of 2 MiB: chunks are slices of them, and only those that lie
/// across two are copied.
const BLOCK_BYTES: usize = 2 << 20;
/// Blocks that wait: enough that neither side stops for the other's hiccups.
const BLOCKS_WAITING: usize = 4;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Plain,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

impl Compression {
    /// What the first bytes of a layer say. Media types are not asked: they are wrong often enough.
    pub fn of(beginning: &[u8]) -> Self {
        match beginning {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // a skippable frame, as zstd:chunked may begin with
            [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50 => Self::Zstd,
            _ => Self::Plain,
        }
    }

    /// The plaintext of a layer whose compression its first bytes tell.
    pub fn decode<'a>(compressed: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
        let mut compressed = BufReader::with_capacity(256 << 10, compressed);
        let beginning = io::BufRead::fill_buf(&mut compressed)?;
        Ok(match Self::of(beginning) {
            Self::Plain => Box::new(compressed),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(compressed)),
            Self::Zstd => Box::new(zstd::Decoder::with_buffer(compressed)?),
        })
    }
}

/// Counts what goes through.
pub(super) struct Counted<'a, R>(pub(super) R, pub(super) &'a AtomicU64);

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.0.read(buffer)?;
        Progress::add(self.1, len);
        Ok(len)
    }
}

/// Blocks of plaintext, an error last where there was one.
pub(super) type Blocks = Receiver<io::Result<Bytes>>;

pub(super) fn channel() -> (SyncSender<io::Result<Bytes>>, Blocks) {
    sync_channel(BLOCKS_WAITING)
}

/// Reads until the end, an error, or until the cutter takes no more. The hasher gets the same blocks.
pub(super) fn pump<'a>(
    compressed: impl Read + Send + 'a,
    cutter: &SyncSender<io::Result<Bytes>>,
    hasher: Option<&SyncSender<Bytes>>,
) {
    let mut plain = match Compression::decode(compressed) {
        Ok(plain) => plain,
        Err(error) => return drop(cutter.send(Err(error))),
    };
    loop {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        let read = plain.by_ref().take(BLOCK_BYTES as u64).read_to_end(&mut block);
        if !block.is_empty() {
            let block = Bytes::from(block);
            let hashes = hasher.is_none_or(|hasher| hasher.send(block.clone()).is_ok());
            if !hashes || cutter.send(Ok(block)).is_err() {
                return;
            }
        }
        match read {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => return drop(cutter.send(Err(error))),
        }
    }
}
