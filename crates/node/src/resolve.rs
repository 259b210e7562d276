//! From a reference to an image, whoever answers: its mirrors, its registry, or what was known of it before.

use std::time::Duration;

use lamina_wire::{Reference, Version};
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::field::Empty;
use tracing::{Instrument, debug_span};

use crate::image::{Begun, Wish, find_begun};
use crate::known::Known;
use crate::sources::Sources;
use crate::spans::failed;
use crate::{Found, NodeError};

/// An image that is known is not waited for longer than this, however long readers wait: its mount is what a node restarts with.
const KNOWN_WAIT: Duration = Duration::from_secs(5);

/// An image, and how it was found.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub(crate) found: Found,
    /// Why nobody said what the tag means now, where it is mounted as it was last known.
    pub(crate) offline: Option<String>,
    /// Ends when it is remembered, where it is new. Nothing else waits for the disk.
    pub(crate) remembered: Option<JoinHandle<()>>,
    /// What comes of it already.
    pub(crate) begun: Option<Begun>,
}

/// How long it is asked for what an image is.
pub(crate) fn within(deadline: Duration, is_known: bool) -> Duration {
    if is_known { deadline.min(KNOWN_WAIT) } else { deadline }
}

/// Finds an image within `deadline`. Of one that is known something may be here, so it is not begun to come. *Errors*: the registry's, unless
/// the image is known and nobody answers.
pub(crate) async fn resolve(
    sources: &Sources,
    known: &Known,
    reference: &Reference,
    mut wish: Wish<'_>,
    deadline: Duration,
) -> Result<Resolved, NodeError> {
    let before = known.find(reference).filter(|found| found.bound || !wish.require_bound);
    if let (Version::Digest(_), Some(found)) = (&reference.version, &before) {
        return Ok(Resolved { found: found.clone(), offline: None, remembered: None, begun: None });
    }
    if before.is_some() {
        wish.start = false;
    }
    let within = within(deadline, before.is_some());
    let span =
        debug_span!("resolve", image = %reference, otel.kind = "client", otel.status_description = Empty);
    let asked = sources
        .ask(within, |client| async move { find_begun(&client, reference, wish).await })
        .instrument(span.clone())
        .await;
    let asked = asked.inspect_err(|error| failed(&span, error));
    match (asked, before) {
        (Ok((found, begun)), _) => {
            let (known, reference, new) = (known.clone(), reference.clone(), found.clone());
            let remembered = spawn_blocking(move || known.remember(&reference, &new));
            Ok(Resolved { found, offline: None, remembered: Some(remembered), begun })
        }
        (Err(NodeError::Wire(error)), Some(found)) if error.is_passing() => {
            tracing::warn!(%reference, manifest = %found.manifest, %error, "mounting the image last known");
            Ok(Resolved { found, offline: Some(error.to_string()), remembered: None, begun: None })
        }
        (Err(error), _) => Err(error),
    }
}
