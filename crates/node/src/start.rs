//! A mount's start: its boot pack in, its trace out. Nothing here is ever in the way of the mount.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lamina_cache::Source;
use lamina_image::{BootPack, CommandKey, Descriptor, Digest, Trace, media_type};
use lamina_mount::{BootFailure, BootRoom, BootStream, Mount};
use lamina_wire::{Client, proto, write_trace};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::field::Empty;
use tracing::{Instrument, Span, debug, info, info_span, warn};

use crate::KeptTraces;
use crate::boot_files::KeptBoot;
use crate::image::BegunBoot;
use crate::spans::{Within, failed};
use crate::turn::{Turn, TurnGuard};

/// A start that has read nothing new for so long is over.
const QUIET: Duration = Duration::from_secs(5);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A start that had a boot pack and missed fewer pages has nothing to tell.
const MISSED_PAGES_MIN: u64 = 64;
/// A program that has got its boot pack needs both link and processor for itself for so long.
const AFTER_BOOT: Duration = Duration::from_secs(1);
/// A registry that does not take a trace in this time does without.
const REPORT: Duration = Duration::from_secs(60);

/// What became of a trace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) names: u64,
    pub(crate) pages: u64,
    /// Why the registry did not get it.
    pub(crate) refused: Option<String>,
    /// Whether this node keeps it.
    pub(crate) kept: bool,
}

/// The image that starts, as its registry knows it.
#[derive(Clone, Debug)]
pub(crate) struct Starting {
    pub(crate) client: Client,
    pub(crate) repository: String,
    pub(crate) manifest: Digest,
    pub(crate) tree: Digest,
    /// The command that starts, if that is known.
    pub(crate) command: Option<CommandKey>,
    /// Whether the recording goes on until the unmount.
    pub(crate) until_unmount: bool,
    /// Where boot packs are kept.
    pub(crate) kept: Arc<KeptBoot>,
    /// Where traces stay that the registry does not want.
    pub(crate) traces: KeptTraces,
    /// What was found for it.
    pub(crate) chosen: Arc<OnceLock<Chosen>>,
    /// What its fetches are part of, until it is over.
    pub(crate) within: Within,
}

/// The boot pack of a mount, if it is to have one, on its way.
pub(crate) struct ComingBoot(Option<JoinHandle<Option<(BootStream, TurnGuard)>>>);

impl ComingBoot {
    /// It has none.
    pub(crate) fn none() -> Self {
        Self(None)
    }
}

/// A boot pack for a start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen {
    pub(crate) pack: BootPack,
    /// Whether it was made for the command that starts, and not for all of them.
    pub(crate) own: bool,
}

impl Starting {
    /// Asks for the image's boot pack, away from whoever mounts it, unless the registry sends one already; what a mirror sends is not the
    /// registry's word. With it, whether it comes.
    fn find_boot(&self, begun: Option<BegunBoot>) -> JoinHandle<Option<(BootPack, bool)>> {
        let this = self.clone();
        let span =
            info_span!("boot", pack = Empty, bytes = Empty, own = Empty, otel.status_description = Empty);
        self.within.begin_boot(span.clone());
        let find = async move {
            let begun = begun.filter(|begun| begun.base == this.client.base());
            let begun = begun.and_then(|begun| Some((this.choose(&[begun.said])?, begun.bytes)));
            let (chosen, comes) = match begun {
                Some((chosen, bytes)) => {
                    this.kept.begin(chosen.pack.pack(), chosen.pack.bytes, bytes);
                    (chosen, true)
                }
                None => {
                    let found =
                        this.client.referrers(&this.repository, this.manifest, media_type::BOOT).await;
                    let found = found.inspect_err(|error| debug!(%error, "no boot pack")).ok()?;
                    (this.choose(&found)?, false)
                }
            };
            let span = Span::current();
            span.record("pack", chosen.pack.blob.to_string())
                .record("bytes", chosen.pack.bytes)
                .record("own", chosen.own);
            Some((this.chosen.get_or_init(|| chosen).pack, comes))
        };
        tokio::spawn(find.instrument(span))
    }

    fn choose(&self, found: &[Descriptor]) -> Option<Chosen> {
        let chosen = BootPack::choose(found, self.tree, self.command.as_ref());
        chosen.map(|(pack, own)| Chosen { pack, own })
    }

    /// Looks for the boot pack at once, and begins to fetch it, away from whoever mounts the image, once `ahead` is over, and to open
    /// all but its beginning once `unpacking` is. `before` goes on until the start has had all of it, or there is none. One that is `begun`
    /// comes behind the names anyway.
    ///
    /// The tree's names may still come then: both begin slowly, as TCP does (RFC 5681), and the link has room for both.
    pub(crate) fn stream_boot(
        &self,
        source: Arc<dyn Source>,
        begun: Option<BegunBoot>,
        room: BootRoom,
        (ahead, unpacking): (Turn, Turn),
        before: TurnGuard,
    ) -> ComingBoot {
        let found = self.find_boot(begun);
        let stream = tokio::spawn(async move {
            let (pack, comes) = found.await.ok().flatten()?;
            if !comes {
                ahead.over().await;
            }
            Some((BootStream::start(pack, source, room, unpacking.over()), before))
        });
        ComingBoot(Some(stream))
    }

    /// Has a mount booted, from now on. Ends when it is, or goes on without.
    pub(crate) fn boot(&self, mount: &Arc<Mount>, boot: ComingBoot) -> JoinHandle<()> {
        let (this, mount) = (self.clone(), Arc::clone(mount));
        tokio::spawn(async move {
            let stream = match boot.0 {
                Some(boot) => boot.await.ok().flatten(),
                None => None,
            };
            let Some((stream, before)) = stream else { return this.within.end_boot() };
            let (pack, span) = (stream.pack(), this.within.boot());
            let booted = mount.boot(stream).instrument(span.clone()).await;
            match &booted {
                Ok(()) => info!(boot = %pack.blob, bytes = pack.bytes, "booted"),
                Err(error @ BootFailure::Overtaken) => info!(boot = %pack.blob, %error, "stopped booting"),
                Err(error) => {
                    failed(&span, error);
                    warn!(boot = %pack.blob, %error, "starting without the boot pack");
                }
            }
            this.within.end_boot();
            drop(span);
            if booted.is_ok() {
                // nobody waits for what comes next, and the start goes on with what has come
                tokio::spawn(async move {
                    sleep(AFTER_BOOT).await;
                    drop(before);
                });
            }
            this.keep(pack, booted).await;
        })
    }

    /// Sees a start through: waits until it is `booted` and over, and tells the registry what it touched.
    pub(crate) async fn see(self, mount: Arc<Mount>, booted: JoinHandle<()>) -> Report {
        let (_, ()) = tokio::join!(booted, self.over(&mount));
        self.within.end();
        let Some(trace) = mount.end_start() else { return Report::default() };
        self.tell(trace).await
    }

    /// Keeps a boot pack for the next start, if all of it came and was right.
    async fn keep(&self, pack: BootPack, booted: Result<(), BootFailure>) {
        let kept = Arc::clone(&self.kept);
        let blob = pack.pack();
        let done = tokio::task::spawn_blocking(move || match booted {
            Ok(()) => kept.finish(blob, pack.bytes),
            Err(BootFailure::Bad(_) | BootFailure::Length(_)) => {
                kept.forget(blob);
                Ok(())
            }
            Err(BootFailure::Source(_) | BootFailure::Refused | BootFailure::Overtaken) => {
                kept.give_up(blob);
                Ok(())
            }
        });
        if let Ok(Err(error)) = done.await {
            debug!(boot = %pack.blob, %error, "a boot pack is not kept");
        }
    }

    /// Returns when the start is over.
    async fn over(&self, mount: &Mount) {
        let quiet = async {
            while mount.quiet().is_none_or(|quiet| quiet < QUIET) {
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = quiet, if !self.until_unmount => {}
            () = mount.wait() => {}
        }
    }

    async fn tell(&self, trace: Trace) -> Report {
        let pages = trace.runs.iter().map(|run| run.pages).sum();
        let mut report = Report { names: trace.names.len() as u64, pages, ..Report::default() };
        if trace.boot && pages < MISSED_PAGES_MIN {
            return report;
        }
        let boot_own = trace.boot && self.chosen.get().is_some_and(|chosen| chosen.own);
        let message = proto::Trace { boot_own, ..write_trace(self.tree, &trace) };
        let command = self.command.as_ref();
        let sent = self.client.send_trace(&self.repository, self.manifest, command, &message);
        let told = timeout(REPORT, sent).await;
        report.refused = match told {
            Ok(Ok(())) => None,
            Ok(Err(error)) if error.is_unserved() => {
                report.kept = self.keep_trace(message).await;
                Some("the registry does not learn from starts".to_owned())
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("the registry did not answer within {REPORT:?}")),
        };
        match &report.refused {
            None => info!(names = report.names, pages, "told the registry what the start touched"),
            Some(reason) => debug!(reason, "the registry did not take a trace"),
        }
        report
    }

    /// Keeps a trace for `lamina profile push`, if that can be.
    async fn keep_trace(&self, message: proto::Trace) -> bool {
        let (traces, manifest, command) = (self.traces.clone(), self.manifest, self.command.clone());
        let kept = move || traces.keep(manifest, command.as_ref(), &message);
        let kept = tokio::task::spawn_blocking(kept).await;
        let kept = kept.expect("keeping does not panic");
        kept.inspect_err(|error| warn!(%error, "a trace is not kept")).is_ok()
    }
}
