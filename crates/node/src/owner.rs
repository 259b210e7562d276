//! Mounts that belong to a process: they go when that does, however it ends.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::holder::watched;

/// A process that runs, as far as was seen.
pub(crate) struct Owner {
    process: AsyncFd<OwnedFd>,
    /// When it began, in ticks since the machine did: together with its number this names a process until the machine ends.
    pub(crate) began: u64,
}

impl Owner {
    /// Finds a process. *Errors*: there is none of that number. Must be called within a runtime.
    pub(crate) fn find(pid: u32) -> io::Result<Self> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
        // from here on it is this process that is meant, so what is read of it is its own, or nothing
        let process = pidfd_open(number, PidfdFlags::empty())?;
        let began = began(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?).ok_or_else(gone)?;
        Ok(Self { process: watched(process, Interest::READABLE)?, began })
    }

    /// Ready once it has ended.
    pub(crate) async fn ended(&self) {
        // an error is no reason to take its mount away
        if self.process.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Ready once the process `pid` that began at `began` has ended; never for 0, which is nobody.
pub(crate) async fn ended(pid: u32, began: u64) {
    if pid == 0 {
        return std::future::pending().await;
    }
    match Owner::find(pid) {
        Ok(owner) if owner.began == began => owner.ended().await,
        Err(error) if !is_gone(&error) => {
            warn!(pid, %error, "the owner of a mount cannot be watched; the mount stays until somebody unmounts it");
            std::future::pending().await
        }
        // another process has its number, or none
        _ => {}
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// The 22nd field of a line of `/proc/PID/stat` (proc(5)). The second, in brackets, may hold anything.
fn began(stat: &str) -> Option<u64> {
    let (_, behind) = stat.rsplit_once(')')?;
    behind.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn an_owner_ends_when_its_process_does() {
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let owner = Owner::find(child.id()).unwrap();
        assert_eq!(owner.began, Owner::find(child.id()).unwrap().began);
        ended(child.id(), owner.began + 1).await;
        child.kill().unwrap();
        owner.ended().await;
        child.wait().unwrap();
        ended(child.id(), owner.began).await;
        assert!(
            Owner::find(child.id()).is_err() && Owner::find(0).is_err() && Owner::find(u32::MAX).is_err()
        );
    }

    #[test]
    fn a_name_with_brackets_and_spaces_is_none_of_the_fields() {
        let behind = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(began(&format!("12 (a) b (c) {behind}")), Some(4711));
        assert_eq!(began("12 (a) S 1"), None);
    }
}
