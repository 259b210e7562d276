//! What objects hold, on its way out: files in frames of [`FRAME_BYTES`], and streams.
//!
//! Budget: a registry serves the same file to many readers from the page cache, and is measured against sendfile. So what
//! is cached is read where it is asked for, without a thread in between, into buffers that are used again: a new one of
//! 1 MiB costs more in page faults and zeros than the copy itself. What has to come from the disk is read by the blocking
//! pool. Memory: one frame for each body, and at most [`SPARE_MAX`] spare ones.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use parking_lot::Mutex;
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::StoreError;
use crate::objects::{ByteStream, FRAME_BYTES};

const FRAME_LEN: usize = FRAME_BYTES as usize;
/// Buffers that are kept for the next frame: as many as the usual number of busy connections.
const SPARE_MAX: usize = 32;

/// Buffers without a frame. They are the process's: which store a frame is of does not matter to them.
static SPARE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// A buffer with a frame in it, which goes back when nobody reads it any more.
struct Frame {
    buffer: Box<[u8]>,
    len: usize,
}

impl Frame {
    fn new(len: usize) -> Self {
        let spare = SPARE.lock().pop();
        Self { buffer: spare.unwrap_or_else(|| vec![0; FRAME_LEN].into()), len }
    }

    fn unread(&mut self, from: usize) -> &mut [u8] {
        &mut self.buffer[from..self.len]
    }
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        let mut spare = SPARE.lock();
        if spare.len() < SPARE_MAX {
            spare.push(std::mem::take(&mut self.buffer));
        }
    }
}

/// The bytes of an object, or of a range of it.
pub enum Content {
    /// They lie in a file, from where the kernel can send them by itself.
    File(FileRange),
    /// They come from elsewhere.
    Stream(ByteStream),
}

impl Content {
    /// The bytes as they come, in frames of [`FRAME_BYTES`], the last one shorter.
    pub fn into_stream(self) -> ByteStream {
        match self {
            Self::File(part) => part.into_stream(),
            Self::Stream(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(part) => part.fmt(f),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// Bytes of a file, which is as long as that and is not written any more.
#[derive(Clone, Debug)]
pub struct FileRange {
    file: Arc<File>,
    range: Range<u64>,
}

impl FileRange {
    /// The bytes `range` of `file`.
    pub fn new(file: File, range: Range<u64>) -> Self {
        Self { file: Arc::new(file), range }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the bytes lie in it.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The bytes `range` of these, which must be among them.
    pub fn part(&self, range: Range<u64>) -> Self {
        let range = self.range.start + range.start..self.range.start + range.end;
        assert!(range.end <= self.range.end, "{range:?} of {:?}", self.range);
        Self { file: self.file.clone(), range }
    }

    /// Cuts off the next frame, at most [`FRAME_BYTES`]; `None` at the end.
    pub fn next_frame(&mut self) -> Option<Self> {
        let len = FRAME_BYTES.min(self.range.end - self.range.start);
        let frame = self.part(0..len);
        self.range.start += len;
        (len > 0).then_some(frame)
    }

    /// Reads the bytes, at most [`FRAME_BYTES`]. Fails where the file cannot be read, or has become shorter.
    pub async fn read(self) -> Result<Bytes, StoreError> {
        let wrong = |error: io::Error| object_store::Error::Generic { store: "file", source: error.into() };
        let len = usize::try_from(self.range.end - self.range.start).expect("at most 1 MiB");
        let frame = read(self.file, self.range.start, len).await;
        frame.map(Bytes::from_owner).map_err(|error| StoreError::Object(wrong(error)))
    }

    fn into_stream(self) -> ByteStream {
        let frames = stream::try_unfold(self, |mut part| async move {
            let Some(frame) = part.next_frame() else { return Ok(None) };
            Ok(Some((frame.read().await?, part)))
        });
        frames.boxed()
    }
}

async fn read(file: Arc<File>, offset: u64, len: usize) -> io::Result<Frame> {
    let mut frame = Frame::new(len);
    let cached = read_cached(&file, frame.unread(0), offset)?;
    if cached == len {
        return Ok(frame);
    }
    let rest = tokio::task::spawn_blocking(move || {
        file.read_exact_at(frame.unread(cached), offset + cached as u64).map(|()| frame)
    });
    rest.await.expect("reading does not panic")
}

/// Reads what can be read without waiting. Gives how many bytes that were.
fn read_cached(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    match preadv2(file, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT) {
        Ok(read) => Ok(read),
        // nothing is cached, or the file system cannot tell
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt;
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn every_range_of_a_file_comes_as_it_is_in_full_frames() {
        let bytes: Vec<u8> = (0..FRAME_LEN * 2 + 5).map(|at| (at % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for range in [0..0, 0..1, 3..FRAME_LEN + 3, 0..bytes.len(), bytes.len() - 1..bytes.len()] {
            let part = FileRange::new(file.try_clone().unwrap(), range.start as u64..range.end as u64);
            let frames: Vec<Bytes> = part.into_stream().try_collect().await.unwrap();
            assert!(frames.concat() == bytes[range.clone()], "{range:?}");
            assert!(frames.iter().rev().skip(1).all(|frame| frame.len() == FRAME_LEN));
        }
    }

    #[tokio::test]
    async fn a_file_that_became_shorter_is_an_error_and_not_a_short_body() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 1000]).unwrap();
        let frames: Result<Vec<Bytes>, _> = FileRange::new(file, 0..2000).into_stream().try_collect().await;
        assert!(frames.is_err());
    }

    #[test]
    fn buffers_are_used_again_and_not_hoarded() {
        let frames: Vec<Frame> = (0..SPARE_MAX * 2).map(|_| Frame::new(10)).collect();
        drop(frames);
        assert!(SPARE.lock().len() <= SPARE_MAX);
    }
}
