//! The system calls that `lamina run` and `lamina profile record` need beyond those of a mount.
//!
//! Each is made, with what it does nothing for: what a kernel's version promises a container's seccomp profile may refuse.

use std::io;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::Check;

/// All are there since this one (mount_setattr(2)).
const KERNEL: &str = "5.12";

pub(super) fn check() -> Check {
    let calls = [
        ("open_tree", open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLOEXEC).map(drop)),
        ("move_mount", move_mount(CWD, "", CWD, "", MoveMountFlags::empty())),
        ("mount_setattr", mount_setattr()),
        ("statx", mount_id()),
        ("pidfd_open", pidfd_open(getpid(), PidfdFlags::empty()).map(drop)),
        ("close_range", close_range()),
    ];
    verdict(calls.into_iter().filter(|(_, made)| made.is_err_and(is_missing)).map(|(name, _)| name))
}

/// Whether an error is about the call itself, and not about what it was made with.
fn is_missing(error: Errno) -> bool {
    matches!(error, Errno::NOSYS | Errno::PERM)
}

fn verdict(missing: impl Iterator<Item = &'static str>) -> Check {
    let missing: Vec<&str> = missing.collect();
    if missing.is_empty() {
        return Check::ok("lamina run", "has the system calls that it needs");
    }
    let found = format!("cannot call {}", missing.join(", "));
    let advice = format!(
        "mounts do without; for `lamina run` use Linux {KERNEL} or newer, run as root, and in a container with a seccomp profile \
         that lets it (docker run --privileged)"
    );
    Check::poor("lamina run", found, advice)
}

/// An error where the kernel does not say in which mount a file is.
fn mount_id() -> rustix::io::Result<()> {
    let found = statx(CWD, "/", AtFlags::empty(), StatxFlags::MNT_ID)?;
    if found.stx_mask & StatxFlags::MNT_ID.bits() == 0 { Err(Errno::NOSYS) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "rustix has no mount_setattr(2)")]
fn mount_setattr() -> rustix::io::Result<()> {
    // SAFETY: the path outlives the call, and of the attributes no byte is read
    let made = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"".as_ptr(),
            0_u32,
            std::ptr::null::<libc::mount_attr>(),
            0_usize,
        )
    };
    outcome(made == 0)
}

#[expect(unsafe_code, reason = "rustix has no close_range(2)")]
fn close_range() -> rustix::io::Result<()> {
    let none = libc::c_uint::MAX;
    // SAFETY: there is no such descriptor
    let made = unsafe { libc::close_range(none, none, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    // a kernel that has it without the flag is as good as one without it
    outcome(made == 0).map_err(|error| if error == Errno::INVAL { Errno::NOSYS } else { error })
}

fn outcome(done: bool) -> rustix::io::Result<()> {
    if done { Ok(()) } else { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}
