//! What all systems share: the link, the registries at its far end with the image in them, and the workload.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lamina_testkit::link::{Link, LinkSpec};
use lamina_testkit::mounts::{self, MountGuard};
use lamina_testkit::process::{self, Process};
use rustix::mount::MountFlags;

use crate::args::Args;
use crate::layout::Layout;
use crate::sample::{NEAR_NOTHING_BYTES, Sample};
use crate::{machine, page_cache};

/// A server that does not listen by then never will.
pub(crate) const START: Duration = Duration::from_secs(20);
/// No push, pull or workload takes longer: 100 times the slowest seen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(3600);
/// A registry that has done nothing for so long has finished converting what was pushed, and building boot packs.
const QUIET: Duration = Duration::from_millis(500);
/// Once nothing has come over the link for so long a start has got all: what is left of a tree comes a second behind a boot pack.
const REST: Duration = Duration::from_secs(2);
/// That is so by then, or never.
const REST_MAX: Duration = Duration::from_secs(60);
/// What one start takes of memory, in bytes, and more: the page cache of torch is 200 MiB, and its program has twice that.
const START_BYTES: u64 = 2 << 30;
const PORT: u16 = 5000;
const PEER_PORT: u16 = 5001;

/// The set of one bench.
pub(crate) struct Stage {
    pub(crate) dir: PathBuf,
    pub(crate) spec: LinkSpec,
    pub(crate) image: Layout,
    pub(crate) workload: Vec<String>,
    pub(crate) quick: bool,
    /// Whether profiles are recorded explicitly.
    pub(crate) record: bool,
    /// Whether there is a daemon before a start.
    pub(crate) daemon: bool,
    /// The program under test.
    lamina: PathBuf,
    /// What lamina mounts.
    pub(crate) lazy_ref: String,
    /// What the others pull.
    pub(crate) plain_ref: String,
    /// Before the link: they have to end before their namespace goes.
    registries: Vec<Process>,
    pub(crate) link: Link,
}

impl Stage {
    /// Makes the link, starts the registries, and pushes the image.
    ///
    /// # Errors
    /// When any of it fails.
    pub(crate) fn new(args: &Args, state: &Path) -> Result<Self> {
        // Namespaces, container runtimes and sockets leave their traces in /run: let it be our own.
        rustix::mount::mount("none", "/run", "tmpfs", MountFlags::empty(), c"mode=755")?;
        let image = Layout::open(&args.image)?;
        let delay_one_way = Duration::try_from_secs_f64(args.rtt_ms() / 2000.0).context("--rtt-ms")?;
        let spec = LinkSpec { rate_mbit: args.rate_mbit(), delay_one_way };
        let link = Link::new(spec)?;
        let host = link.server().address();
        let plain_port = if args.peer_registry { PEER_PORT } else { PORT };
        let mut stage = Self {
            dir: state.to_owned(),
            spec,
            workload: args.workload(),
            quick: args.quick,
            record: args.record,
            daemon: args.daemon,
            lamina: args.lamina.clone(),
            lazy_ref: format!("{host}:{PORT}/bench/lazy:{}", image.tag),
            plain_ref: format!("{host}:{plain_port}/bench/plain:{}", image.tag),
            registries: Vec::new(),
            image,
            link,
        };
        if !args.quick {
            stage.drop_page_cache()?;
            let start = Instant::now();
            machine::touch_free_memory(u64::MAX);
            eprintln!("prepare: touch free memory: {:.2} s", start.elapsed().as_secs_f64());
        }
        let lazy = args.has_lazy();
        if lazy || (args.has_peers() && !args.peer_registry) {
            stage.start_lamina()?;
        }
        // into an empty registry, as its numbers are quoted: beside a conversion it would share the new chunks with that
        if lazy {
            let mut push = stage.lamina_at_server();
            push.args(["push", &stage.image.source, &stage.lazy_ref, "--plain-http"]);
            stage.prepare("lamina push", &mut push)?;
        }
        if args.has_peers() {
            if args.peer_registry {
                stage.start_peer()?;
            }
            let mut skopeo = stage.link.server().command("skopeo");
            skopeo.args(["copy", "--quiet", "--dest-tls-verify=false", &stage.image.source]);
            skopeo.arg(format!("docker://{}", stage.plain_ref));
            stage.prepare("skopeo copy", &mut skopeo)?;
        }
        stage.settle()?;
        Ok(stage)
    }

    /// Waits until the registries have nothing more to do.
    pub(crate) fn settle(&self) -> Result<()> {
        self.registries.iter().try_for_each(|registry| process::wait_idle(registry.pid(), QUIET, DEADLINE))
    }

    /// A call of `lamina` where the registry is: nothing of it goes over the link.
    pub(crate) fn lamina_at_server(&self) -> Command {
        self.link.server().command(&self.lamina)
    }

    /// A call of `lamina` on the node.
    pub(crate) fn lamina(&self) -> Command {
        self.link.node().command(&self.lamina)
    }

    /// Runs one step of the preparation and says how long it took.
    pub(crate) fn prepare(&self, what: &str, command: &mut Command) -> Result<()> {
        let start = Instant::now();
        process::run_logged(command, &self.dir.join("prepare.log"), DEADLINE).context(what.to_owned())?;
        eprintln!("prepare: {what}: {:.2} s", start.elapsed().as_secs_f64());
        Ok(())
    }

    /// A new empty directory for one sample.
    pub(crate) fn fresh(&self, name: &str, round: u32) -> Result<PathBuf> {
        let dir = self.dir.join(format!("{name}-{round}"));
        std::fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        Ok(dir)
    }

    /// Empties the node's caches of files, names and inodes. Of the memory that this leaves free the host has enough for a start.
    pub(crate) fn drop_caches(&self) -> Result<()> {
        self.drop_page_cache()?;
        if !self.quick {
            machine::touch_free_memory(START_BYTES);
        }
        Ok(())
    }

    fn drop_page_cache(&self) -> Result<()> {
        let storages = [self.lamina_storage(), self.peer_storage()];
        page_cache::drop_all_but(&storages).context("drop the page cache")
    }

    /// Waits until nothing but acknowledgements comes to the node any more.
    pub(crate) fn rest(&self) -> Result<()> {
        let (mut since, mut before) = (Instant::now(), self.link.received());
        process::until("nothing to come over the link", REST_MAX, || {
            if since.elapsed() < REST {
                return Ok(None);
            }
            since = Instant::now();
            let received = self.link.received();
            let come = received.saturating_sub(std::mem::replace(&mut before, received));
            Ok((come < NEAR_NOTHING_BYTES).then_some(()))
        })
    }

    /// Where lamina's registry stores.
    fn lamina_storage(&self) -> PathBuf {
        self.dir.join("registry")
    }

    /// Where docker-registry does.
    fn peer_storage(&self) -> PathBuf {
        self.dir.join("docker-registry")
    }

    /// Runs `start`, which gives what it took to prepare, between two looks at clock and link.
    pub(crate) fn measure(&self, start: impl FnOnce() -> Result<Duration>) -> Result<Sample> {
        let (received, sent) = (self.link.received(), self.link.sent());
        let clock = Instant::now();
        let ready = start()?;
        Ok(Sample {
            seconds: clock.elapsed().as_secs_f64(),
            ready_seconds: ready.as_secs_f64(),
            received_bytes: self.link.received() - received,
            sent_bytes: self.link.sent() - sent,
            ..Sample::default()
        })
    }

    /// Runs the workload with `root` as its root directory, on the node, in the image's environment.
    pub(crate) fn run_in(&self, root: &Path, log: &Path) -> Result<()> {
        let net = self.link.node().path();
        let mut command = Command::new("/usr/bin/nsenter");
        command
            .arg(format!("--net={}", net.display()))
            .arg(format!("--root={}", root.display()))
            .arg(format!("--wd={}", root.display()))
            .arg("--")
            .args(&self.workload)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .envs(self.image.env.iter().map(|(name, value)| (name, value)));
        process::run_logged(&mut command, log, DEADLINE)
    }

    fn start_lamina(&mut self) -> Result<()> {
        let listen = format!("{}:{PORT}", self.link.server().address());
        let mut command = self.link.server().command(&self.lamina);
        command
            .env("LAMINA_LOG", "warn")
            .args(["registry", "--plain-http", "--listen", &listen, "--storage"])
            .arg(self.lamina_storage());
        let mut registry = Process::spawn("lamina registry", &mut command)?;
        registry.wait_line("listening on", START)?;
        self.registries.push(registry);
        Ok(())
    }

    fn start_peer(&mut self) -> Result<()> {
        let address = SocketAddr::from((self.link.server().address(), PEER_PORT));
        let config = self.dir.join("docker-registry.yml");
        let storage = self.peer_storage();
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{address}\"}}\n\
             storage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n",
            storage.display()
        );
        std::fs::write(&config, text)?;
        let mut command = self.link.server().command("docker-registry");
        command.arg("serve").arg(&config).stderr(std::process::Stdio::null());
        self.registries.push(Process::spawn("docker-registry", &mut command)?);
        process::until("docker-registry", START, || {
            self.link.server().enter(|| TcpStream::connect(address).ok().map(drop))
        })
    }
}

/// A root directory to run in: an overlayfs over `lower`, with /proc and /dev.
pub(crate) struct Root {
    pub(crate) path: PathBuf,
    /// The last is unmounted first.
    guards: Vec<MountGuard>,
}

impl Root {
    /// Mounts it at `dir`/root. `lower` has the topmost layer first.
    ///
    /// # Errors
    /// What mount(2) says.
    pub(crate) fn new(lower: &[PathBuf], dir: &Path) -> Result<Self> {
        let path = dir.join("root");
        std::fs::create_dir_all(&path)?;
        let mut guards = vec![mounts::overlay(lower, dir, &path).context("overlayfs over the image")?];
        let (proc, dev) = (path.join("proc"), path.join("dev"));
        std::fs::create_dir_all(&proc)?;
        std::fs::create_dir_all(&dev)?;
        rustix::mount::mount("proc", &proc, "proc", MountFlags::empty(), None::<&std::ffi::CStr>)?;
        guards.push(MountGuard::new(proc));
        rustix::mount::mount_bind("/dev", &dev)?;
        guards.push(MountGuard::new(dev));
        Ok(Self { path, guards })
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        while let Some(guard) = self.guards.pop() {
            drop(guard);
        }
    }
}
