//! What a holder and its node say to each other: short lines, each with at most one descriptor.
//!
//! The socket is a pair of `SOCK_SEQPACKET`, so a line is one message. A holder may be older or younger than its node, since an
//! upgrade changes only the node: so these lines keep their meaning, and whoever does not know one ignores it.
//!
//! | from | line | descriptor | meaning |
//! |---|---|---|---|
//! | holder | `have NAME` | yes | this was kept; all of them come first |
//! | holder | `again` | | this node follows one that has ended without having said `done` |
//! | holder | `end` | | that was all that was kept |
//! | holder | `upgrading`, `refused REASON` | | the answer to `upgrade` |
//! | node | `keep NAME` | yes | keep this open, beyond my end; one of the same name is closed |
//! | node | `forget NAME` | | close it |
//! | node | `ready` | | I serve |
//! | node | `upgrade PATH` | | when I end, start that program in my place |
//! | node | `done` | | I shall end, and mean to: close everything, end with me |

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg,
};

/// A path of 4096 bytes (`PATH_MAX`), and a word before it.
const LINE_BYTES_MAX: usize = 4096 + 64;

/// What the names of mounts begin with; readers wait for these.
pub(crate) const MOUNT: &str = "mount-";
/// What the names of tables begin with that say what is open of a passthrough mount.
pub(crate) const OPENS: &str = "opens-";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Have(String),
    Again,
    End,
    Upgrading,
    Refused(String),
    Keep(String),
    Forget(String),
    Ready,
    Upgrade(PathBuf),
    Done,
    /// Something that a younger program says.
    Unknown,
}

impl Line {
    fn words(&self) -> (&'static str, Option<&[u8]>) {
        match self {
            Self::Have(name) => ("have", Some(name.as_bytes())),
            Self::Again => ("again", None),
            Self::End => ("end", None),
            Self::Upgrading => ("upgrading", None),
            Self::Refused(reason) => ("refused", Some(reason.as_bytes())),
            Self::Keep(name) => ("keep", Some(name.as_bytes())),
            Self::Forget(name) => ("forget", Some(name.as_bytes())),
            Self::Ready => ("ready", None),
            Self::Upgrade(path) => ("upgrade", Some(path.as_os_str().as_bytes())),
            Self::Done => ("done", None),
            Self::Unknown => ("unknown", None),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let space = bytes.iter().position(|byte| *byte == b' ');
        let (word, rest) = bytes.split_at(space.unwrap_or(bytes.len()));
        let rest = rest.get(1..).unwrap_or_default();
        let text = || String::from_utf8_lossy(rest).into_owned();
        match word {
            b"have" => Self::Have(text()),
            b"again" => Self::Again,
            b"end" => Self::End,
            b"upgrading" => Self::Upgrading,
            b"refused" => Self::Refused(text()),
            b"keep" => Self::Keep(text()),
            b"forget" => Self::Forget(text()),
            b"ready" => Self::Ready,
            b"upgrade" => Self::Upgrade(PathBuf::from(OsStr::from_bytes(rest))),
            b"done" => Self::Done,
            _ => Self::Unknown,
        }
    }
}

/// The two ends, closed on exec.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends a line. *Errors*: a broken pipe where the other one has ended; one that is too long.
pub(crate) fn send(socket: impl AsFd, line: &Line, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let (word, rest) = line.words();
    let mut bytes = word.as_bytes().to_vec();
    if let Some(rest) = rest {
        bytes.push(b' ');
        bytes.extend_from_slice(rest);
    }
    if bytes.len() > LINE_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next line, and what came with it. Nothing when the other end is closed and all was read.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<Option<(Line, Option<OwnedFd>)>> {
    let mut bytes = [0; LINE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            received => break received?.bytes,
        }
    };
    if received == 0 {
        return Ok(None);
    }
    let mut descriptor = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.into_iter().next().or(descriptor);
        }
    }
    Ok(Some((Line::parse(&bytes[..received]), descriptor)))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_line_arrives_as_it_was_sent_and_a_descriptor_with_it() {
        let (one, other) = pair().expect("a pair");
        let lines = [
            Line::Have("mount-7".into()),
            Line::Again,
            Line::End,
            Line::Upgrading,
            Line::Refused("it is no program".into()),
            Line::Keep("lock".into()),
            Line::Forget("mount-7".into()),
            Line::Ready,
            Line::Upgrade("/a b/lamina".into()),
            Line::Done,
        ];
        for line in &lines {
            send(&one, line, None).expect("sent");
            assert_eq!(receive(&other).expect("received").map(|it| it.0).as_ref(), Some(line));
        }
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"x").expect("written");
        send(&one, &Line::Keep("file".into()), Some(file.as_fd())).expect("sent");
        drop(one);
        let (_, descriptor) = receive(&other).expect("received").expect("a line");
        let mut came = File::from(descriptor.expect("a descriptor"));
        came.rewind().expect("rewound");
        let mut text = String::new();
        came.read_to_string(&mut text).expect("read");
        assert_eq!(text, "x");
        assert!(receive(&other).expect("the end").is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_line(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let line = Line::parse(&bytes);
            if line != Line::Unknown {
                let (word, rest) = line.words();
                prop_assert!(bytes.starts_with(word.as_bytes()));
                prop_assert!(rest.is_none_or(|rest| rest.len() <= bytes.len() * 3));
            }
        }
    }
}
