//! Files that the kernel sends by itself.
//!
//! hyper writes bytes in memory, and `sendfile(2)` wants a file. So a part of a file is mapped and not touched: its bytes are
//! there for whoever reads them, and a connection without TLS knows by their address which file they are of, and has the kernel
//! send them out of the page cache. That saves both of a registry's copies: of 1.0 ms of CPU for each MiB, 0.4.
//!
//! What is not in the page cache is read by the blocking pool instead: `sendfile` would wait for the disk on a thread that serves
//! everybody. That it is there is seen when it is mapped: for a slow client, whose pages the kernel may drop meanwhile, and for
//! files that the registry's user may not write, of which the kernel says nothing (`can_do_mincore` in mm/mincore.c), such
//! a wait can still happen.
//!
//! Nobody may read a mapping of a file that others could cut short, so connections with TLS get bytes that were read.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use lamina_store::{ByteStream, Content, FRAME_BYTES, FileRange};
use memmap2::{Mmap, MmapOptions};
use parking_lot::RwLock;
use rustix::fs::sendfile;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// The least that a kernel has as a page, in bytes: with larger ones some of the answers are asked for and not given.
const PAGE_BYTES: usize = 4096;
/// What is shorter is copied: five system calls cost as much as the two copies of some 200 KiB (`wrk`, 64 connections: 0.7 of
/// the requests at 16 KiB, 0.9 at 128, 1.2 times as many at 256).
const MAPPED_MIN: u64 = 256 << 10;

/// What is mapped now, by its address: at most what hyper holds of an answer for each connection. Addresses are the process's.
static MAPPED: RwLock<BTreeMap<usize, FileRange>> = RwLock::new(BTreeMap::new());

/// The part of a file that these bytes are, if they are mapped here.
fn file_of(bytes: &[u8]) -> Option<FileRange> {
    let at = bytes.as_ptr() as usize;
    let mapped = MAPPED.read();
    let (start, part) = mapped.range(..=at).next_back()?;
    let wanted = (at - start) as u64..(at - start + bytes.len()) as u64;
    let inside = !wanted.is_empty() && wanted.end <= part.range().end - part.range().start;
    inside.then(|| part.part(wanted))
}

/// A part of a file that is known by its address as long as it lives.
struct Mapped(Mmap);

impl Mapped {
    /// `None` where it is not in the page cache as a whole, or cannot be mapped. At most [`FRAME_BYTES`].
    fn of(part: &FileRange) -> Option<Self> {
        let range = part.range();
        let (offset, len) = (range.start, usize::try_from(range.end - range.start).ok()?);
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others could truncate it")]
        // SAFETY: objects are written under another name, renamed, and never written again; and nobody reads the mapping, see
        // the head of this file
        let map = unsafe { MmapOptions::new().offset(offset).len(len).map(part.file()) }.ok()?;
        if !is_cached(&map) {
            return None;
        }
        MAPPED.write().insert(map.as_ptr() as usize, part.clone());
        Some(Self(map))
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // before it is unmapped, and the address another's
        MAPPED.write().remove(&(self.0.as_ptr() as usize));
    }
}

/// Whether the page cache has all pages of a mapping of at most a frame: mincore(2).
fn is_cached(map: &Mmap) -> bool {
    let mut pages = [0u8; FRAME_BYTES as usize / PAGE_BYTES + 1];
    let skipped = map.as_ptr() as usize % PAGE_BYTES;
    let len = skipped + map.len();
    let count = len.div_ceil(PAGE_BYTES);
    assert!(count <= pages.len(), "{} bytes are more than a frame", map.len());
    #[expect(unsafe_code, reason = "rustix lacks mincore")]
    // SAFETY: the pages from the one where the mapping begins are mapped, and there is a byte for each of them
    let done = unsafe { libc::mincore(map.as_ptr().sub(skipped) as *mut _, len, pages.as_mut_ptr()) };
    done == 0 && pages[..count].iter().all(|page| page & 1 == 1)
}

/// The content in frames that a [`Direct`] connection sends without a copy, where that is possible.
pub(crate) fn frames(content: Content) -> ByteStream {
    let part = match content {
        Content::File(part) => part,
        Content::Stream(bytes) => return bytes,
    };
    let frames = stream::try_unfold(part, |mut part| async move {
        let Some(frame) = part.next_frame() else { return Ok(None) };
        let long = frame.range().end - frame.range().start >= MAPPED_MIN;
        let bytes = match long.then(|| Mapped::of(&frame)).flatten() {
            Some(mapped) => Bytes::from_owner(mapped),
            None => frame.read().await?,
        };
        Ok(Some((bytes, part)))
    });
    frames.boxed()
}

/// A connection without TLS, to which the kernel sends files.
pub(crate) struct Direct(pub(crate) TcpStream);

impl Direct {
    /// Writes when the socket can take something.
    fn poll_io(
        &self,
        context: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> rustix::io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(context))?;
            match self.0.try_io(Interest::WRITABLE, || Ok(write(&self.0)?)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Poll::Ready(done),
            }
        }
    }

    fn poll_send(&self, context: &mut Context<'_>, part: &FileRange) -> Poll<io::Result<usize>> {
        let sent = ready!(self.poll_io(context, |socket| {
            let Range { start: mut offset, end } = part.range();
            let len = usize::try_from(end - offset).unwrap_or(usize::MAX);
            sendfile(socket, part.file(), Some(&mut offset), len)
        }))?;
        Poll::Ready(match sent {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter")),
            sent => Ok(sent),
        })
    }
}

impl AsyncRead for Direct {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Direct {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let found = slices.iter().enumerate().find_map(|(at, slice)| Some((at, file_of(slice)?)));
        let Some((at, part)) = found else {
            return Pin::new(&mut self.0).poll_write_vectored(context, slices);
        };
        let before = &slices[..at];
        if before.iter().all(|slice| slice.is_empty()) {
            return self.poll_send(context, &part);
        }
        // the head of an answer goes into one segment with what follows it at once
        let flags = SendFlags::MORE | SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        self.poll_io(context, |socket| sendmsg(socket, before, &mut SendAncillaryBuffer::default(), flags))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::future::poll_fn;
    use std::io::Write;

    use futures_util::TryStreamExt;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    /// Bytes in a file, which is in the page cache because it was just written.
    fn file(len: usize) -> (Vec<u8>, File) {
        let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (bytes, file)
    }

    async fn pair() -> (Direct, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (Direct(near.unwrap()), far.unwrap().0)
    }

    /// Writes all of it as hyper does, in as many calls as the connection needs.
    async fn write(direct: &mut Direct, mut parts: Vec<Bytes>) -> io::Result<()> {
        while parts.iter().any(|part| !part.is_empty()) {
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut written =
                poll_fn(|context| Pin::new(&mut *direct).poll_write_vectored(context, &slices)).await?;
            for part in &mut parts {
                let len = written.min(part.len());
                drop(part.split_to(len));
                written -= len;
            }
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_cached_file_is_sent_as_it_is_from_any_offset_between_other_bytes() {
        let (bytes, file) = file(3 * FRAME_BYTES as usize + 5);
        let min = MAPPED_MIN as usize;
        for range in [0..1, 0..min - 1, 1..min + 1, 4095..FRAME_BYTES as usize + 4097, 0..bytes.len()] {
            let part = FileRange::new(file.try_clone().unwrap(), range.start as u64..range.end as u64);
            let frames: Vec<Bytes> = frames(Content::File(part)).try_collect().await.unwrap();
            let by_kernel = frames.iter().all(|frame| (frame.len() >= min) == file_of(frame).is_some());
            assert!(by_kernel, "{range:?}");
            let mut parts = vec![Bytes::new(), Bytes::from_static(b"head")];
            parts.extend(frames);
            parts.push(Bytes::from_static(b"tail"));
            let (mut near, mut far) = pair().await;
            let sending = tokio::spawn(async move { write(&mut near, parts).await });
            let mut came = Vec::new();
            far.read_to_end(&mut came).await.unwrap();
            sending.await.unwrap().unwrap();
            assert!(came == [b"head", &bytes[range.clone()], b"tail"].concat(), "{range:?}");
        }
    }

    #[test]
    fn bytes_are_known_by_their_address_as_long_as_they_live() {
        let (_, file) = file(5000);
        let part = FileRange::new(file, 0..5000);
        let bytes = Bytes::from_owner(Mapped::of(&part).unwrap());
        let later = file_of(&bytes.slice(4000..4999)).unwrap();
        assert_eq!(later.range(), 4000..4999);
        let address = bytes.as_ptr() as usize;
        drop(bytes);
        // another test may have the address by now, and not this file
        let left = MAPPED.read().get(&address).is_some_and(|left| std::ptr::eq(left.file(), part.file()));
        assert!(!left);
    }

    #[tokio::test]
    async fn a_file_that_became_shorter_ends_the_connection() {
        let len = MAPPED_MIN;
        let (_, file) = file(len as usize);
        let part = FileRange::new(file.try_clone().unwrap(), 0..len);
        let frames: Vec<Bytes> = frames(Content::File(part)).try_collect().await.unwrap();
        file.set_len(0).unwrap();
        let (mut near, far) = pair().await;
        let error = write(&mut near, frames).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        drop(far);
    }

    #[test]
    fn what_is_not_cached_is_not_mapped() {
        let (_, file) = file(4096);
        // a hole was never read
        file.set_len(1 << 20).unwrap();
        let part = FileRange::new(file, 0..1 << 20);
        assert!(Mapped::of(&part.part(0..4096)).is_some());
        assert!(Mapped::of(&part).is_none());
    }
}
