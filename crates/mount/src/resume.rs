//! Taking over a mount that another process served: its connection to the kernel is still open, and readers wait on it.
//!
//! A session begins with the kernel's first request, FUSE_INIT, and for this mount that was long ago. So the session is
//! begun over a socket pair, where an INIT of our own waits that offers what was agreed then, and the live connection is
//! put in the socket's place. After that, and before anything is read from it, the kernel is asked to send again whatever was never
//! answered (FUSE_NOTIFY_RESEND, Linux 6.9, `fs/fuse/dev.c`). Inode numbers are the tree's, and answering twice what only reads does
//! no harm, so nothing else has to be carried over; but of a passthrough mount the table of what is open (`opens.rs`). An open that is
//! sent again was counted or not, and counts twice at worst, which `opens.rs` allows for; a release counts after it was answered,
//! and what was answered is not sent again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use fuser::{Config, InitFlags, Session, SessionACL};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};

use crate::fuse::Fuse;

/// `FUSE_INIT` of `include/uapi/linux/fuse.h`.
const INIT: u32 = 26;
/// Its major version, unchanged since 2006.
const MAJOR: u32 = 7;
/// `FUSE_NOTIFY_RESEND` there.
const RESEND: i32 = 7;
/// `struct fuse_in_header` and `struct fuse_init_in` there, in bytes.
const INIT_BYTES: usize = 40 + 64;

/// What a mount and the kernel agreed on when it began. A process that takes the mount over must know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The kernel's minor version of the protocol.
    pub minor: u32,
    /// The `FUSE_*` capabilities in use, as bits of `flags` and above them `flags2`.
    pub capabilities: u64,
    /// The file system's device, as `st_dev` has it.
    pub major_dev: u32,
    /// The rest of it.
    pub minor_dev: u32,
}

impl Terms {
    /// The request that the kernel would have begun with, had it offered just what was agreed.
    fn init(&self) -> Vec<u8> {
        let flags = self.capabilities | InitFlags::FUSE_INIT_EXT.bits();
        let (low, high) = (flags & u64::from(u32::MAX), flags >> 32);
        let mut request = Vec::with_capacity(INIT_BYTES);
        for word in [u32::try_from(INIT_BYTES).expect("small"), INIT] {
            request.extend_from_slice(&word.to_le_bytes());
        }
        // unique, nodeid, uid, gid, pid, and no extensions
        request.extend_from_slice(&1u64.to_le_bytes());
        request.resize(40, 0);
        let halves = [low, high].map(|half| u32::try_from(half).expect("masked"));
        // max_readahead is the kernel's to keep: it was agreed then, too
        for word in [MAJOR, self.minor, 128 << 10, halves[0], halves[1]] {
            request.extend_from_slice(&word.to_le_bytes());
        }
        request.resize(INIT_BYTES, 0);
        request
    }
}

/// A session of the mount behind `connection`, as it goes on. Requests that were never answered come again once
/// [`send_again`] asks for them.
pub(crate) fn session(
    fuse: Fuse,
    connection: BorrowedFd<'_>,
    terms: &Terms,
    loops: Config,
) -> io::Result<Session<Fuse>> {
    let (kernel, socket) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::send(&kernel, &terms.init(), SendFlags::NOSIGNAL)?;
    let session = Session::from_fd(fuse, socket, SessionACL::All, loops)?;
    replace(session.as_fd(), connection)?;
    Ok(session)
}

/// Puts what `by` is open on in the place of `place`, in one step.
fn replace(place: BorrowedFd<'_>, by: BorrowedFd<'_>) -> io::Result<()> {
    #[expect(unsafe_code, reason = "rustix replaces only what it owns, and the session owns this one")]
    // SAFETY: both are open, since they are borrowed; the session goes on to own the number, and closes it once
    let done = unsafe { libc::dup3(by.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the kernel send again what was never answered. *Errors*: [`io::ErrorKind::Unsupported`] where the kernel
/// is older than Linux 6.9: then what was under way waits for ever.
pub(crate) fn send_again(connection: &OwnedFd) -> io::Result<()> {
    let mut message = Vec::with_capacity(16);
    message.extend_from_slice(&16u32.to_le_bytes());
    message.extend_from_slice(&RESEND.to_le_bytes());
    message.extend_from_slice(&0u64.to_le_bytes());
    match rustix::io::write(connection, &message) {
        // the mount ended meanwhile
        Ok(_) | Err(Errno::NODEV | Errno::PERM | Errno::NOTCONN) => Ok(()),
        Err(Errno::INVAL) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel cannot send requests again (that needs Linux 6.9): what was under way stays unanswered",
        )),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_init_offers_what_was_agreed_and_nothing_else() {
        let terms = Terms { minor: 45, capabilities: 1 << 40 | 1 << 13, major_dev: 0, minor_dev: 7 };
        let request = terms.init();
        let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("four"));
        assert_eq!((request.len(), word(0), word(4)), (104, 104, 26));
        assert_eq!((word(40), word(44)), (7, 45));
        assert_eq!((word(52), word(56)), (1 << 13 | 1 << 30, 1 << 8));
    }
}
