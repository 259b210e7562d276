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

/// The boot pack for a command among what hangs on an image with this tree: its own, else the general one.
fn choose(found: &[Descriptor], tree: Digest, command: Option<&CommandKey>) -> Option<Chosen> {
    let of = |command: Option<&CommandKey>| {
        let named = found.iter().filter(|one| CommandKey::is_named(command, &one.annotations));
        named.filter_map(|one| BootPack::named_by(&one.annotations)).find(|pack| pack.tree == tree)
    };
    let own = command.and_then(|command| of(Some(command))).map(|pack| Chosen { pack, own: true });
    own.or_else(|| Some(Chosen { pack: of(None)?, own: false }))
}

impl Starting {
    /// Asks for the image's boot pack, away from whoever mounts it.
    fn find_boot(&self) -> JoinHandle<Option<BootPack>> {
        let this = self.clone();
        let span =
            info_span!("boot", pack = Empty, bytes = Empty, own = Empty, otel.status_description = Empty);
        self.within.begin_boot(span.clone());
        let find = async move {
            let found = this.client.referrers(&this.repository, this.manifest, media_type::BOOT).await;
            let found = found.inspect_err(|error| debug!(%error, "no boot pack")).ok()?;
            let chosen = choose(&found, this.tree, this.command.as_ref())?;
            let span = Span::current();
            span.record("pack", chosen.pack.blob.to_string())
                .record("bytes", chosen.pack.bytes)
                .record("own", chosen.own);
            Some(this.chosen.get_or_init(|| chosen).pack)
        };
        tokio::spawn(find.instrument(span))
    }

    /// Looks for the boot pack at once, and begins to fetch it, away from whoever mounts the image, once `ahead` is over, and to open
    /// all but its beginning once `unpacking` is. `before` goes on until the start has had all of it, or there is none.
    ///
    /// The tree's names may still come then: both begin slowly, as TCP does (RFC 5681), and the link has room for both.
    pub(crate) fn stream_boot(
        &self,
        source: Arc<dyn Source>,
        room: BootRoom,
        (ahead, unpacking): (Turn, Turn),
        before: TurnGuard,
    ) -> ComingBoot {
        let found = self.find_boot();
        let stream = tokio::spawn(async move {
            let pack = found.await.ok().flatten()?;
            ahead.over().await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_gets_its_own_boot_pack_and_else_the_general_one() {
        let (tree, other) = (Digest::of(b"tree"), Digest::of(b"other"));
        let key = |text: &str| text.parse::<CommandKey>().expect("a key");
        let boot = |command: Option<&CommandKey>, tree: Digest, bytes: u64| {
            let mut artifact = Descriptor::of(media_type::OCI_MANIFEST, b"");
            artifact.annotations = BootPack { blob: Digest::of(b"boot"), bytes, tree }.annotations();
            artifact.annotations.extend(CommandKey::annotation(command));
            artifact
        };
        let (a, b, c) = (key("a"), key("b"), key("c"));
        let found = [
            boot(Some(&a), tree, 1),
            boot(Some(&b), tree, 2),
            boot(Some(&c), other, 3),
            boot(None, other, 4),
            boot(None, tree, 5),
        ];
        let chosen = |command: Option<&CommandKey>, found: &[Descriptor]| {
            choose(found, tree, command).map(|chosen| (chosen.pack.bytes, chosen.own))
        };
        assert_eq!(chosen(Some(&a), &found), Some((1, true)));
        assert_eq!(chosen(Some(&b), &found), Some((2, true)));
        for none in [Some(&c), Some(&key("d")), None] {
            assert_eq!(chosen(none, &found), Some((5, false)), "{none:?}");
        }
        assert_eq!(chosen(None, &found[..4]), None, "no other command's, and no other image's");
        assert_eq!(chosen(Some(&b), &found[..1]), None);
    }
}
