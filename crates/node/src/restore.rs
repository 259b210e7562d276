//! A daemon goes on where another ended: mounts whose connections a holder has kept are resumed, all others that are remembered
//! are made again. No registry is asked for either, as long as the trees are here.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use lamina_image::TreeError;
use lamina_mount::{Kept, Mount, MountError, Record, Terms};
use lamina_wire::proto::MountRecord;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::field::Empty;
use tracing::{Instrument, Span, error, info, info_span, warn};

use crate::boot_files::KeptSource;
use crate::daemon::{Mounted, blocking};
use crate::line::{MOUNT, OPENS};
use crate::records::found;
use crate::spans::failed;
use crate::start::{ComingBoot, Report};
use crate::tree::Turns;
use crate::{Found, Node, NodeError};

/// How many mounts are restored at once: each reads a tree and some more.
const AT_ONCE: usize = 8;
/// Where a tree is not here and no registry has it, that is tried again after this long,
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// and at last every so often: programs wait, or want to start.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How a mount came here, as statistics say it.
const RESUMED: &str = "resumed";
const AGAIN: &str = "mounted again";

/// What a mount's connection is called where it is kept.
fn held_name(number: u64) -> String {
    format!("{MOUNT}{number}")
}

/// What the table of its open files is called there.
fn opens_name(number: u64) -> String {
    format!("{OPENS}{number}")
}

/// What became of the mounts of a daemon that has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Served on, so that no program noticed.
    pub resumed: usize,
    /// Made again.
    pub again: usize,
    /// Cannot be had yet; tried again and again.
    pub waiting: usize,
    /// Given up. The log says why.
    pub lost: usize,
}

enum Outcome {
    Resumed,
    Again,
    Waiting,
    Lost,
}

impl Node {
    /// Has kept what the next daemon needs to go on with a mount, and begins passthrough, where that is asked for. A connection that is
    /// kept alone is one of which nobody knows what is open: so the table comes first, and where it does not arrive there is no
    /// passthrough.
    pub(crate) fn hold(&self, number: u64, mount: &Mount) {
        if let Some(opens) = mount.take_opens() {
            match self.held.keep(&opens_name(number), opens) {
                true => mount.begin_passthrough(),
                false => {
                    warn!(directory = %mount.mountpoint().display(), "no passthrough: nobody keeps its table")
                }
            }
        }
        if let Some(connection) = mount.take_connection() {
            self.held.keep(&held_name(number), connection);
        }
    }

    /// Keeps nothing open of a mount any more.
    pub(crate) fn let_go(&self, number: u64) {
        self.held.forget(&held_name(number));
        self.held.forget(&opens_name(number));
    }

    /// Restores all mounts of the daemon that owned the cache before. Returns when each is there or cannot be had now; says of
    /// each what became of it.
    pub async fn restore(self: &Arc<Self>) -> Restored {
        let records = self.records.mounts();
        let names = |(number, _): &(u64, MountRecord)| [held_name(*number), opens_name(*number)];
        let known: Vec<String> = records.iter().flat_map(names).collect();
        for name in self.held.names() {
            let of_mount = name.strip_prefix(MOUNT);
            if let Some(number) = of_mount.and_then(|digits| digits.parse().ok()) {
                self.records.take_numbers(number);
            }
            if (of_mount.is_some() || name.starts_with(OPENS)) && !known.contains(&name) {
                warn!(name, "nothing is known of a mount of which this was kept");
                self.held.forget(&name);
            }
        }
        let outcomes = stream::iter(records)
            .map(|(number, record)| self.restore_one(number, record))
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<_>>();
        let mut restored = Restored::default();
        for outcome in outcomes.await {
            let count = match outcome {
                Outcome::Resumed => &mut restored.resumed,
                Outcome::Again => &mut restored.again,
                Outcome::Waiting => &mut restored.waiting,
                Outcome::Lost => &mut restored.lost,
            };
            *count += 1;
        }
        restored
    }

    async fn restore_one(self: &Arc<Self>, number: u64, record: MountRecord) -> Outcome {
        let Remembered { directory, image, terms } = match Remembered::of(&record) {
            Some(remembered) => remembered,
            None => return self.lose(number, "its record names no image"),
        };
        let connection = self.held.find(&held_name(number));
        let owned = record.request.as_ref().is_some_and(|request| request.owner != 0);
        if !record.mounted || ((record.detached || owned) && connection.is_none()) {
            // whoever asked for it has got an error, or nobody can reach it any more, or its owner's root directory is dead
            self.let_go(number);
            drop(connection);
            self.records.forget_mount(number);
            match record.mounted {
                true => drop(Mount::clear(&directory, Some(&terms))),
                // in the background: where a process that does not quite die has it open, whoever looks there waits for that
                false => drop(spawn_blocking(move || Mount::clear(&directory, None))),
            }
            return Outcome::Lost;
        }
        match self.try_restore(number, &record, &image, connection.as_deref()).await {
            Ok(outcome) => outcome,
            Err(error) if is_passing(&error) => {
                warn!(directory = %directory.display(), %error, "a mount cannot be restored yet; trying on");
                let node = Arc::clone(self);
                tokio::spawn(async move { node.go_on_trying(number, record, image).await });
                Outcome::Waiting
            }
            Err(error) => self.lose(number, &error.to_string()),
        }
    }

    fn lose(&self, number: u64, reason: &str) -> Outcome {
        error!(number, reason, "a mount of the daemon before is lost");
        self.let_go(number);
        self.records.forget_mount(number);
        Outcome::Lost
    }

    async fn go_on_trying(self: Arc<Self>, number: u64, record: MountRecord, image: Found) {
        let _busy = self.busy();
        let mut pause = PAUSE_MIN;
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            let connection = self.held.find(&held_name(number));
            match self.try_restore(number, &record, &image, connection.as_deref()).await {
                Ok(_) => return,
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    self.lose(number, &error.to_string());
                    return;
                }
            }
        }
    }

    async fn try_restore(
        self: &Arc<Self>,
        number: u64,
        record: &MountRecord,
        image: &Found,
        connection: Option<&OwnedFd>,
    ) -> Result<Outcome, NodeError> {
        let (directory, reference) = (record.request.as_ref(), record.image.as_ref());
        let directory = directory.map(|request| request.directory.as_str());
        let span = info_span!(
            "restore",
            image = reference.map(|image| image.reference.as_str()),
            directory,
            resumed = connection.is_some(),
            otel.status_description = Empty
        );
        let restored = self.restore_now(number, record, image, connection).instrument(span.clone()).await;
        restored.inspect_err(|error| failed(&span, error))
    }

    async fn restore_now(
        self: &Arc<Self>,
        number: u64,
        record: &MountRecord,
        image: &Found,
        connection: Option<&OwnedFd>,
    ) -> Result<Outcome, NodeError> {
        let (reference, manifest) = (record.image.clone().unwrap_or_default().reference, image.manifest);
        let directory = record.request.clone().unwrap_or_default().directory;
        if let Some(connection) = connection {
            self.resume(number, record, image, connection).await?;
            info!(reference, %manifest, directory, "goes on with a mount; no registry was asked");
            return Ok(Outcome::Resumed);
        }
        let remembered = Remembered::of(record);
        let terms = remembered.as_ref().map(|it| it.terms);
        let path = PathBuf::from(&directory);
        if let Some(terms) = terms
            && blocking(move || Mount::clear(&path, Some(&terms))).await?
        {
            warn!(directory, "took away what was left of a mount that nobody kept alive");
        }
        let mut asked = self.ask(&record.request.clone().unwrap_or_default())?;
        asked.sources.within.begin(Span::current());
        self.make(number, record.clone(), &mut asked, image, AGAIN).await?;
        info!(reference, %manifest, directory, requests = asked.requests, "mounted again what was mounted before");
        Ok(Outcome::Again)
    }

    /// Goes on with a mount whose connection was kept.
    async fn resume(
        self: &Arc<Self>,
        number: u64,
        record: &MountRecord,
        image: &Found,
        connection: &OwnedFd,
    ) -> Result<(), NodeError> {
        let request = record.request.clone().unwrap_or_default();
        let terms = Remembered::of(record).expect("looked at").terms;
        let mut asked = self.ask(&request)?;
        let tree = self.tree(&mut asked, image, Turns::alone()).await?;
        let (mut starting, kept) = self.starting(&asked, image, &request)?;
        starting.until_unmount = false;
        let mut config = self.mount_config(&asked.reference, &request);
        // what a start touched before is not known here
        config.record = Record::Off;
        let failed =
            |cause| MountError::System { action: "take over", path: config.mountpoint.clone(), cause };
        let opens = self.held.find(&opens_name(number));
        let opens = opens.map(|opens| opens.try_clone()).transpose().map_err(failed)?;
        let kept_open = Kept { connection: connection.try_clone().map_err(failed)?, opens, terms };
        let (cache, handle, source) = (self.cache(), Handle::current(), Arc::new(KeptSource(kept)));
        let mount = blocking(move || {
            let mount = Mount::resume(tree, cache, source, config, handle, kept_open)?;
            let attached = mount.is_attached();
            Ok::<_, MountError>((Arc::new(mount), attached))
        });
        let (mount, attached) = mount.await?;
        let record = MountRecord { detached: !attached, ..record.clone() };
        self.remember(number, &record);
        let refused = "the node died during the recording".to_owned();
        let report = request.record.then(|| Some(Report { refused: Some(refused), ..Report::default() }));
        let chosen = Arc::clone(&starting.chosen);
        let within = starting.within.clone();
        let mounted = Mounted { mount, number, record, report: None, restored: RESUMED, chosen, within };
        let booted = starting.boot(&mounted.mount, ComingBoot::none());
        self.keep(mounted, report, starting, booted);
        Ok(())
    }
}

/// What a record says.
struct Remembered {
    directory: PathBuf,
    image: Found,
    terms: Terms,
}

impl Remembered {
    fn of(record: &MountRecord) -> Option<Self> {
        Some(Self {
            directory: PathBuf::from(&record.request.as_ref()?.directory),
            image: found(record.image.as_ref()?)?,
            terms: Terms {
                minor: record.fuse_minor,
                capabilities: record.fuse_capabilities,
                major_dev: record.device_major,
                minor_dev: record.device_minor,
            },
        })
    }
}

/// Whether it may help to try again: a registry may come back.
fn is_passing(error: &NodeError) -> bool {
    match error {
        NodeError::Wire(error) => error.is_passing(),
        NodeError::Tree { error, .. } => *error == TreeError::Coming,
        _ => false,
    }
}
