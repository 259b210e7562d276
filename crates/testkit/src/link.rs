//! A network link with a set rate and delay, between two network namespaces.
//!
//! Each namespace has a TUN device; packets cross from one to the other through a thread of this process,
//! where they wait for their turn on the wire and then for the delay. So it needs no qdisc in the kernel, and
//! counts what crossed. One link costs some 4 % of a core at 1 Gbit/s.
//!
//! A link never reaches anything but its two namespaces, and takes them away when it is dropped.
//! Start programs in them through [`End::command`]: `ip netns exec` would put them into a new mount namespace,
//! where their mounts vanish.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::shaper::{Counters, Shaper};

mod shaper;
mod tun;

/// Bytes in one packet, at most: large, so that few packets carry a gigabit.
const MTU: u16 = 16_000;

/// How a link behaves, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkSpec {
    /// Millions of bits a second, headers of IP and TCP included.
    pub rate_mbit: f64,
    /// How long a packet is on its way; a round trip takes twice that.
    pub delay_one_way: Duration,
}

/// Two namespaces and the link between them, until dropped.
#[derive(Debug)]
pub struct Link {
    server: End,
    node: End,
    counters: Arc<Counters>,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// One end of a link: a network namespace with one address beside its loopback.
#[derive(Debug)]
pub struct End {
    namespace: String,
    address: Ipv4Addr,
}

impl Link {
    /// Makes both namespaces and starts to carry packets.
    ///
    /// Names are unique in this machine as long as process ids are. Needs root and `ip`.
    ///
    /// # Errors
    /// Without the right to make namespaces or devices; nothing is left behind then.
    pub fn new(spec: LinkSpec) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !(spec.rate_mbit.is_finite() && spec.rate_mbit > 0.0) {
            bail!("a link of {} Mbit/s carries nothing", spec.rate_mbit);
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("lamina-{}-{number}-{side}", std::process::id());
        let server = End::new(name("server"), Ipv4Addr::new(10, 77, 0, 1))?;
        let node = End::new(name("node"), Ipv4Addr::new(10, 77, 0, 2))?;
        let (server_tun, node_tun) = (server.device()?, node.device()?);
        let (stop, stopped) = std::io::pipe()?;
        let counters = Arc::new(Counters::default());
        let shaper = Shaper::new(spec, server_tun, node_tun, Arc::clone(&counters));
        let thread = std::thread::Builder::new()
            .name("link".into())
            .spawn(move || shaper.run(stop.as_fd()))
            .context("a thread for the link")?;
        Ok(Self { server, node, counters, stop: Some(stopped.into()), thread: Some(thread) })
    }

    /// Where the registry runs.
    pub fn server(&self) -> &End {
        &self.server
    }

    /// Where the node runs.
    pub fn node(&self) -> &End {
        &self.node
    }

    /// Bytes of IP packets that have arrived at the node since the link was made.
    pub fn received(&self) -> u64 {
        self.counters.to_node.load(Ordering::Relaxed)
    }

    /// Bytes of IP packets that have arrived at the server since the link was made, so what the node sent.
    pub fn sent(&self) -> u64 {
        self.counters.to_server.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // A panic of the link has already been printed; a second one here would hide the test's own.
            let _ = thread.join();
        }
    }
}

impl End {
    fn new(namespace: String, address: Ipv4Addr) -> Result<Self> {
        ip(&["netns", "add", &namespace])?;
        Ok(Self { namespace, address })
    }

    /// The device of this end, up and with its address.
    fn device(&self) -> Result<OwnedFd> {
        let fd = self.enter(tun::open)??;
        let (name, device) = (self.namespace.as_str(), tun::NAME);
        ip(&["-n", name, "addr", "add", &format!("{}/24", self.address), "dev", device])?;
        let mtu = MTU.to_string();
        ip(&["-n", name, "link", "set", device, "mtu", &mtu, "txqueuelen", "2000", "up"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        Ok(fd)
    }

    /// What `ip netns` calls this namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The file that keeps the namespace, for `nsenter --net=`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/var/run/netns").join(&self.namespace)
    }

    /// The address that the other end reaches this one by.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command that will run in this network namespace, and in this process's mount namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Calls `inside` on a thread of its own in this network namespace: sockets made there belong to it.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        let file =
            std::fs::File::open(self.path()).with_context(|| format!("namespace {}", self.namespace))?;
        let entered = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let kind = rustix::thread::LinkNameSpaceType::Network;
                    rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind))?;
                    rustix::io::Result::Ok(inside())
                })
                .join()
        });
        match entered {
            Ok(value) => value.with_context(|| format!("enter namespace {}", self.namespace)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.namespace]) {
            eprintln!("namespace {} stays behind: {error:#}", self.namespace);
        }
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("run `ip` (Debian: iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
