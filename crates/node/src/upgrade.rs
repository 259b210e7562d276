//! Another program in the place of this one, while its mounts are in use.
//!
//! The same way as after a death: the holder has every connection, the other program takes them over, and what was asked and not
//! answered is asked again. If the other program does not serve, the holder goes back to this one.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tracing::warn;

use crate::daemon::blocking;
use crate::{Node, NodeError};

/// A program says its version sooner.
const VERSION: Duration = Duration::from_secs(10);
/// What every version of ours begins with.
const NAME: &str = "lamina ";

/// A tree that is coming is waited for so long.
const CONTENTS: Duration = Duration::from_secs(5);

impl Node {
    /// Makes `program` the next daemon; its version. This one has to end then, without unmounting: [`serve`](crate::serve) returns.
    ///
    /// *Errors*: it is none of ours, something is being mounted, or nobody would keep the mounts meanwhile. Nothing has
    /// changed then.
    pub async fn upgrade(self: &Arc<Self>, program: &Path) -> Result<String, NodeError> {
        let refused = |reason: String| NodeError::Upgrade { program: program.to_owned(), reason };
        if !program.is_absolute() {
            return Err(refused("name it by an absolute path".to_owned()));
        }
        let version = version(program).await.map_err(refused)?;
        self.need_contents(CONTENTS).await;
        if self.is_mounting() {
            return Err(refused("something is being mounted; try again".to_owned()));
        }
        let cache = self.cache();
        let flushed = blocking(move || Ok::<_, NodeError>(cache.flush())).await?;
        if !flushed {
            warn!("what is not written to the cache's disk yet will be fetched again");
        }
        let (held, path) = (self.held.clone(), PathBuf::from(program));
        let answer = blocking(move || Ok::<_, NodeError>(held.upgrade(path))).await?;
        answer.map_err(refused)?;
        self.replaced.store(true, Ordering::SeqCst);
        Ok(version)
    }

    /// Whether another program is to take this one's place.
    pub(crate) fn is_replaced(&self) -> bool {
        self.replaced.load(Ordering::SeqCst)
    }
}

/// What a program says its version is.
async fn version(program: &Path) -> Result<String, String> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = timeout(VERSION, command.output()).await;
    let output = output.map_err(|_| format!("it does not say its version within {VERSION:?}"))?;
    let output = output.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().next().and_then(|line| line.strip_prefix(NAME)) {
        Some(version) if output.status.success() => Ok(version.to_owned()),
        _ => Err("it is not lamina: `--version` does not say so".to_owned()),
    }
}
