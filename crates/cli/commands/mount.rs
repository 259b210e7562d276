//! `lamina mount` and `lamina unmount`.

use std::fs::File;
use std::future::pending;
use std::io::{BufRead, BufReader, Read, Seek};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lamina_node::{ControlError, Controller, Held};
use lamina_wire::Reference;
use lamina_wire::proto::{MountRequest, MountResponse, UnmountRequest};

use super::node::{metrics, open};
use super::prefetch::filled;
use super::{Interrupted, interrupted};
use crate::args::{CacheArguments, Common, MountArguments, NodeSettings, UnmountArguments};

/// How long a daemon may take to come up: it may have a large cache to look through, or wait for one that is ending.
const START: Duration = Duration::from_secs(60);
/// What a daemon that did not come up is quoted with, in bytes.
const COMPLAINT_BYTES: u64 = 2 << 10;

/// Mounts an image, by the daemon of the cache directory; starts one where there is none.
pub(crate) async fn run(arguments: MountArguments, common: Common) -> Result<()> {
    let directory = std::path::absolute(&arguments.directory)?;
    let directory = directory.canonicalize().with_context(|| {
        format!("mount point {} does not exist; create it first", arguments.directory.display())
    })?;
    make_cache(&arguments.cache)?;
    let request = MountRequest {
        reference: arguments.reference.to_string(),
        directory: directory.to_str().context("the mount point's name must be UTF-8")?.to_owned(),
        plain_http: common.plain_http,
        require_bound: arguments.require_bound,
        no_boot: arguments.no_boot,
        no_trace: arguments.no_trace,
        record: false,
        fill: if arguments.eager { "bulk".to_owned() } else { arguments.fill.clone() },
        fill_bytes_per_s: arguments.fill_rate.unwrap_or(0) << 20,
        require_lazy: arguments.require_lazy,
        command: arguments.command.as_ref().map_or_else(String::new, ToString::to_string),
        owner: 0,
        passthrough: arguments.passthrough,
    };
    let controller = Controller::new(&arguments.cache.directory);
    // before anything is mounted, so that no Ctrl-C leaves it
    let watched = arguments.foreground.then(interrupted);
    let mut ended = pin!(async {
        match watched {
            Some(interrupted) => interrupted.await,
            None => pending().await,
        }
    });
    if arguments.foreground && controller.stats().await.is_err_and(|error| is_absent(&error)) {
        return alone(&arguments, &common, request, &directory, ended).await;
    }
    let mounted = tokio::select! {
        mounted = mount(&request, &arguments.cache, &arguments.settings, &common) => mounted?,
        () = &mut ended => bail!(Interrupted),
    };
    if arguments.eager {
        let whole = tokio::select! {
            whole = filled(&controller, None, |fill| fill.directory == request.directory) => whole,
            () = &mut ended => Err(Interrupted.into()),
        };
        if let Err(error) = whole {
            controller.unmount(&UnmountRequest { directory: request.directory, lazy: false }).await?;
            return Err(error);
        }
    }
    report(&arguments, &mounted);
    if arguments.foreground {
        ended.await;
        controller.unmount(&UnmountRequest { directory: request.directory, lazy: false }).await?;
    }
    Ok(())
}

/// Makes the cache directory, where it is not there yet; only this user may look into it, as what is cached may come from images
/// that are not for everybody.
pub(crate) fn make_cache(cache: &CacheArguments) -> Result<()> {
    let directory = &cache.directory;
    let made = || {
        if directory.exists() {
            return Ok(());
        }
        directory.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
    };
    made().with_context(|| format!("the cache directory {} cannot be made", directory.display()))
}

/// Has the daemon of the cache directory, which must exist, mount something; starts one where there is none.
pub(crate) async fn mount(
    request: &MountRequest,
    cache: &CacheArguments,
    settings: &NodeSettings,
    common: &Common,
) -> Result<MountResponse> {
    asked(cache, settings, common, async |controller| controller.mount(request).await).await
}

/// Asks the daemon of the cache directory, which must exist, for something; starts one where there is none.
pub(crate) async fn asked<T>(
    cache: &CacheArguments,
    settings: &NodeSettings,
    common: &Common,
    ask: impl AsyncFn(&Controller) -> Result<T, ControlError>,
) -> Result<T> {
    let controller = Controller::new(&cache.directory);
    let begun = Instant::now();
    loop {
        match ask(&controller).await {
            Ok(answer) => return Ok(answer),
            Err(error) if is_absent(&error) && begun.elapsed() < START => {
                start_daemon(cache, settings, common).await?
            }
            Err(error) => return Err(error.into()),
        }
        check_namespaces(&controller).await?;
    }
}

fn is_absent(error: &ControlError) -> bool {
    matches!(error, ControlError::NoDaemon(_))
}

/// `-f` with no daemon around: this process is the daemon.
async fn alone(
    arguments: &MountArguments,
    common: &Common,
    request: MountRequest,
    directory: &Path,
    mut interrupted: Pin<&mut impl Future<Output = ()>>,
) -> Result<()> {
    let node = open(&arguments.cache, &arguments.settings, common, Held::by_nobody(), false).await?;
    metrics(&node, &arguments.settings)?;
    let socket = Controller::socket(&arguments.cache.directory);
    let mounted = tokio::select! {
        mounted = node.mount(request) => mounted?,
        () = &mut interrupted => bail!(Interrupted),
    };
    report(arguments, &mounted);
    let ended = async {
        let mut count = node.count();
        tokio::select! {
            () = interrupted => {}
            // somebody else unmounted it
            _ = count.wait_for(|count| *count == 0) => {}
        }
    };
    tracing::info!(directory = %directory.display(), "mounted in the foreground");
    lamina_node::serve(Arc::clone(&node), &socket, false, || (), ended).await?;
    Ok(())
}

/// Says that an image is not what its registry says now, where that did not answer.
pub(crate) fn report_offline(reference: &Reference, mounted: &MountResponse) {
    let MountResponse { offline, manifest, .. } = mounted;
    if !offline.is_empty() {
        eprintln!("lamina: {offline}");
        eprintln!(
            "lamina: nobody says what {reference} is now; mounted what it was when last asked, {manifest}"
        );
    }
}

fn report(arguments: &MountArguments, mounted: &MountResponse) {
    report_offline(&arguments.reference, mounted);
    if arguments.json {
        let report = serde_json::json!({
            "reference": arguments.reference.to_string(),
            "manifest": mounted.manifest,
            "tree": mounted.tree,
            "elapsed_us": mounted.elapsed_us,
            "requests": mounted.requests,
            "offline": Some(&mounted.offline).filter(|reason| !reason.is_empty()),
        });
        println!("{report}");
    }
}

/// Starts a daemon that stays when this process has gone, and waits until it answers.
async fn start_daemon(cache: &CacheArguments, settings: &NodeSettings, common: &Common) -> Result<()> {
    let cache = cache.directory.clone();
    // before anything is written to it, a log included
    lamina_node::check_cache_directory(&cache)?;
    let log_path = cache.join("node.log");
    let log = File::options()
        .create(true)
        .append(true)
        .read(true)
        .open(&log_path)
        .with_context(|| log_path.display().to_string())?;
    let before = log.metadata()?.len();
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command
        .arg("node")
        .arg("--exit-when-idle")
        .args(["--log", &common.log])
        .arg("--cache")
        .arg(std::path::absolute(&cache)?)
        .args(["--cache-mib", &settings.cache_mib.to_string()])
        .args(["--deadline", &settings.deadline.to_string()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        // Ctrl-C at the terminal is for this process, not for the daemon
        .process_group(0);
    let files =
        [("--auth-file", &common.auth_file), ("--hosts-dir", &common.hosts_dir), ("--ca", &common.ca)];
    for (option, path) in files {
        if let Some(path) = path {
            command.arg(option).arg(std::path::absolute(path)?);
        }
    }
    if let Some(kib) = settings.read_ahead_kb {
        command.args(["--read-ahead-kb", &kib.to_string()]);
    }
    if let Some(address) = settings.metrics {
        command.args(["--metrics", &address.to_string()]);
    }
    if let Some(url) = &settings.otlp.otlp {
        command.args(["--otlp", &url.to_string()]);
    }
    for (registry, mirror) in &settings.mirrors {
        command.args(["--mirror", &format!("{registry}={mirror}")]);
    }
    let mut child = command.spawn().context("the node cannot be started")?;
    let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
    let line = tokio::task::spawn_blocking(move || {
        // it may say other things before
        let mut lines = stdout.lines();
        lines.find(|line| line.as_ref().map_or(true, |line| line == "ready")).transpose()
    });
    let line = tokio::time::timeout(START, line).await.context("the node does not come up")???;
    if line.is_some() {
        return Ok(());
    }
    let complaint = complaint(log, before)?;
    // another `lamina mount` may have been faster: then its daemon serves this one too
    if Controller::new(&cache).stats().await.is_ok() {
        return Ok(());
    }
    if complaint.contains("is in use by process") {
        // one that has just lost its last mount is on its way out
        tokio::time::sleep(Duration::from_millis(50)).await;
        return Ok(());
    }
    bail!("the node did not start: {complaint}")
}

/// The last words of a daemon.
fn complaint(mut log: File, from: u64) -> Result<String> {
    log.seek(std::io::SeekFrom::Start(from))?;
    let mut text = String::new();
    log.take(COMPLAINT_BYTES).read_to_string(&mut text)?;
    let last = text.trim().lines().last().unwrap_or("it said nothing");
    Ok(last.trim_start_matches("lamina: ").to_owned())
}

/// A daemon mounts where it lives: one of another mount or network namespace is of no use here.
async fn check_namespaces(controller: &Controller) -> Result<()> {
    let Ok(stats) = controller.stats().await else { return Ok(()) };
    for namespace in ["mnt", "net"] {
        let link = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/{namespace}"));
        if let (Ok(own), Ok(other)) = (link("self"), link(&stats.pid.to_string())) {
            ensure!(
                own == other,
                "the node of this cache (process {}) lives in another {namespace} namespace; use another --cache",
                stats.pid
            );
        }
    }
    Ok(())
}

/// Unmounts a directory.
pub(crate) async fn unmount(arguments: UnmountArguments) -> Result<()> {
    let controller = Controller::new(&arguments.cache.directory);
    let directory = mountpoint(&arguments.directory)?.display().to_string();
    let done = controller.unmount(&UnmountRequest { directory, lazy: arguments.lazy }).await?;
    if done.held && !arguments.lazy {
        eprintln!(
            "unmounted here; another mount namespace (a container, a service) has a copy of it, which is served until that ends"
        );
    }
    Ok(())
}

/// A directory as a daemon knows it that has something mounted there. A hung mount must not hang this, so its parent is
/// resolved, and not itself.
pub(super) fn mountpoint(directory: &Path) -> std::io::Result<PathBuf> {
    let directory = std::path::absolute(directory)?;
    Ok(match (directory.parent().map(Path::canonicalize), directory.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => directory,
    })
}
