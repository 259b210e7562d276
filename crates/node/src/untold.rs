//! Starts that registries were not told of yet: a daemon that ends has that done first, where it can be.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use lamina_mount::Mount;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::warn;

use crate::start::Report;

/// A registry that has not answered after so long is not waited for: whoever stops a daemon waits as well.
const ANSWER: Duration = Duration::from_secs(5);

/// What became of a start's trace, once that is known.
type Told = watch::Receiver<Option<Report>>;

/// The starts, by their mounts' numbers.
#[derive(Default)]
pub(crate) struct Untold(Mutex<BTreeMap<u64, (Arc<Mount>, Told)>>);

impl Untold {
    /// A start has begun; `told` will say what was told of it.
    pub(crate) fn begin(&self, number: u64, mount: &Arc<Mount>, told: &Told) {
        self.0.lock().insert(number, (Arc::clone(mount), told.clone()));
    }

    /// It is over, and was told.
    pub(crate) fn end(&self, number: u64) {
        self.0.lock().remove(&number);
    }

    /// Returns when registries were told of the starts of all mounts that are gone, or have had the time for it.
    pub(crate) async fn told(&self) {
        let starts: Vec<(Arc<Mount>, Told)> = self.0.lock().values().cloned().collect();
        // of what is in use the start goes on
        let over = starts.into_iter().filter(|(mount, _)| mount.wait().now_or_never().is_some());
        let all = over.map(|(_, mut told)| async move { drop(told.wait_for(Option::is_some).await) });
        if timeout(ANSWER, join_all(all)).await.is_err() {
            warn!("a registry was not told what a start touched: it does not answer");
        }
    }
}
