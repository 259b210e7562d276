//! Whether anybody has a file open: what the kernel says, by giving or refusing a lease (`F_SETLEASE` of fcntl(2)).
//!
//! So processes that have died without a word count as well, and mappings whose descriptor is closed. Where a file system gives no
//! leases nobody can say, and then each file may be open.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// `F_SETSIG` of `include/uapi/asm-generic/fcntl.h`, which libc does not have.
const F_SETSIG: libc::c_int = 10;

/// The file, open, if nobody else has it open or mapped. Whoever opens it from here on waits until what this gives is closed.
///
/// *Errors*: nobody can say.
pub(super) fn alone(path: &Path) -> io::Result<Option<File>> {
    // not waiting for somebody else's lease to end
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match lease(&file) {
        Ok(()) => Ok(Some(file)),
        // and nothing else says that somebody has it open
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A new file without a name in `directory`, which nobody else has open. *Errors*: its file system has no such files, or gives no
/// leases.
pub(super) fn trial(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?);
    lease(&file)?;
    Ok(file)
}

/// Whether nobody has it open or mapped but by this descriptor.
pub(crate) fn is_alone(file: &File) -> bool {
    let alone = lease(file).is_ok();
    // who wants to open it need not wait until it is closed
    if alone && let Err(error) = ask(file, libc::F_SETLEASE, libc::F_UNLCK) {
        tracing::debug!(%error, "a lease is not given back");
    }
    alone
}

/// Takes a write lease, which is only given where nobody else has the file open. The signal that says that somebody wants to open
/// it is one that nobody heeds.
fn lease(file: &File) -> Result<(), Errno> {
    ask(file, F_SETSIG, libc::SIGURG)?;
    ask(file, libc::F_SETLEASE, libc::F_WRLCK)
}

/// Has fcntl(2) do something that takes a number.
fn ask(file: &File, command: libc::c_int, argument: libc::c_int) -> Result<(), Errno> {
    #[expect(unsafe_code, reason = "rustix has no leases")]
    // SAFETY: the descriptor is open, and all who call this give a command that takes a number
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).expect("it has a number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_alone_but_while_it_is_open() {
        let directory = tempfile::tempdir().expect("made");
        let path = directory.path().join("file");
        std::fs::write(&path, "bytes").expect("written");
        let is_alone = || alone(&path).expect("there are leases").is_some();
        assert!(is_alone());
        let file = File::open(&path).expect("opened");
        assert!(!is_alone());
        drop(file);
        assert!(is_alone());
    }

    #[test]
    fn where_nobody_can_say_it_is_an_error_and_not_an_answer() {
        // a device has no leases, and proc no files without names
        assert!(alone(Path::new("/dev/null")).is_err());
        assert!(trial(Path::new("/proc")).is_err());
        let directory = tempfile::tempdir().expect("made");
        trial(directory.path()).expect("both are here");
        assert_eq!(std::fs::read_dir(directory.path()).expect("listed").count(), 0);
    }
}
