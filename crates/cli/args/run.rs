//! `lamina run` and what it starts.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Args;
use lamina_image::CommandKey;
use lamina_wire::Reference;

use super::{CacheArguments, NodeSettings};

/// Start a program from an image that has not arrived
///
/// The image is mounted as `lamina mount` does it, by the node that owns the cache, and unmounted when the program ends. The
/// program has the image as its root directory, writable; what it writes is gone when it ends. It sees only the processes that it
/// started, its own /proc and /dev/shm, and of this machine the network, /dev (GPUs are there), and /sys, /etc/hosts and
/// /etc/resolv.conf, which it cannot change. It runs as root of this machine unless image or --user say otherwise.
///
/// This starts programs, it does not confine them: there are no limits, no network of their own, no capabilities taken away.
/// Whoever wants that mounts the image and has a container runtime use it, such as `podman run --rootfs DIR:O`. Nor are a GPU
/// driver's libraries put into the image: name them with --volume.
///
/// Signals are handed on, INT and QUIT where the terminal does not send them to the program itself. A program that is not root can
/// open a pipe as /dev/stdout, but not a terminal that is not its user's. The exit code is the program's; 128 and the signal's
/// number if one killed it; 125 if Lamina failed, 126 if the program cannot be executed, 127 if there is none.
#[derive(Args, Debug)]
pub(crate) struct RunArguments {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// One more variable of the environment, besides the image's; with its name alone, as it is here. Can be repeated
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Who runs it, by name or number as the image has them [default: who the image says, or root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Where it starts; made if need be [default: where the image says, or /]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// A file or directory of this machine that it sees at DIR; can be repeated
    #[arg(short, long = "volume", value_name = "HOST:DIR[:ro]", value_parser = volume)]
    pub(crate) volumes: Vec<(PathBuf, PathBuf, bool)>,
    /// The program that gets the command as its arguments, in place of the image's entrypoint and command; empty for none
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Nothing can be written but on volumes and below /dev, and what has no place in the image to be mounted on is left out
    #[arg(long)]
    pub(crate) read_only: bool,
    /// What is written goes to memory, not to the disk of the cache
    #[arg(long, conflicts_with = "read_only")]
    pub(crate) in_memory: bool,
    /// The key of the start: its boot pack is used where there is one, and the start is remembered under it [default: made of the
    /// program's name and a hash of its arguments]
    #[arg(long = "command", value_name = "KEY")]
    pub(crate) key: Option<CommandKey>,
    /// Refuse an image whose manifest does not name its tree
    #[arg(long, env = "LAMINA_REQUIRE_BOUND", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) require_bound: bool,
    /// Have the kernel read files of 1 MiB and more by itself once they are on disk as a whole, as fast as local files. They take
    /// room in the cache a second time, nobody checks what is read of them, and the start is not recorded
    #[arg(long, env = "LAMINA_PASSTHROUGH", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) passthrough: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) settings: NodeSettings,
    /// What to run, in place of the image's command; its entrypoint comes before that
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// `HOST:DIR[:ro]`.
fn volume(text: &str) -> Result<(PathBuf, PathBuf, bool), String> {
    let mut parts = text.split(':');
    let (host, inside) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let read_only = match (parts.next(), parts.next()) {
        (None, _) | (Some("rw"), None) => false,
        (Some("ro"), None) => true,
        _ => return Err("it must be HOST:DIR, with :ro behind it or nothing".into()),
    };
    let parts = || inside.split('/').filter(|part| !part.is_empty() && *part != ".");
    if host.is_empty() || !inside.starts_with('/') || parts().any(|part| part == "..") {
        return Err("it must be HOST:DIR, with an absolute DIR".into());
    }
    if parts().next().is_none() {
        return Err("the image is the root directory; DIR must be below".into());
    }
    Ok((host.into(), inside.into(), read_only))
}

#[derive(Args, Debug)]
pub(crate) struct InsideArguments {
    /// The descriptor of the line to whoever started this, behind the standard streams
    #[arg(value_parser = clap::value_parser!(i32).range(3..))]
    pub(crate) line: RawFd,
}
