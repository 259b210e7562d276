//! One TUN device in the network namespace of the calling thread.

#![expect(unsafe_code, reason = "TUNSETIFF is an ioctl that no safe wrapper offers")]

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

/// What the device is called; a namespace has one.
pub(super) const NAME: &str = "wire";

/// The descriptor that packets are read from and written to, without blocking. The device goes with it.
pub(super) fn open() -> Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(NAME.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).expect("both flags are below 2^13");
    let request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the descriptor is open, TUNSETIFF reads one `ifreq`, and `request` outlives the call.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if answer < 0 {
        return Err(std::io::Error::last_os_error()).context("make a TUN device");
    }
    Ok(file.into())
}
