//! An image's tree: loaded, on disk, or from whoever has the image.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use lamina_image::{Digest, Tree, TreeError, TreeNames};
use lamina_mount::Contents;
use lamina_wire::{Client, Reference};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::io::{StreamReader, SyncIoBridge};
use tracing::field::Empty;
use tracing::{Instrument, Span, debug_span};

use crate::daemon::{Asked, blocking};
use crate::sources::Sources;
use crate::spans::failed;
use crate::trees::Trees;
use crate::{Found, Node, NodeError};

/// A tree's blob over 1 GiB is refused: some ten million files.
const TREE_BLOB_BYTES_MAX: u64 = 1 << 30;
/// A tree that takes longer to come is given up: the largest one over 100 Mbit/s.
const TREE: Duration = Duration::from_secs(90);
/// What broke off is asked for again so soon, and then later and later, up to the second.
const AGAIN_MIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(2);
/// What nobody has, or refuses to give, is asked for once a minute: somebody may put it back.
const DEFINITE: Duration = Duration::from_secs(60);

impl Node {
    /// The tree of an image, all of it. Mounts that show the same one share it.
    ///
    /// *Errors*: also where its contents do not come in time though its names did.
    pub(crate) async fn tree(&self, asked: &mut Asked, found: &Found) -> Result<Arc<Tree>, NodeError> {
        let found = Found { names: None, ..found.clone() };
        let (tree, contents) = self.tree_names(asked, &found).await?;
        let _ = timeout(TREE, contents.come()).await;
        if !tree.has_contents() {
            return Err(NodeError::Tree { reference: asked.reference.to_string(), error: TreeError::Coming });
        }
        Ok(tree)
    }

    /// The same as soon as its names are there.
    pub(crate) async fn tree_names(
        &self,
        asked: &mut Asked,
        found: &Found,
    ) -> Result<(Arc<Tree>, Contents), NodeError> {
        let span = debug_span!("tree", digest = %found.tree, from = Empty, otel.status_description = Empty);
        let tree = self.find_tree(asked, found).instrument(span.clone()).await;
        tree.inspect_err(|error| failed(&span, error))
    }

    async fn find_tree(&self, asked: &mut Asked, found: &Found) -> Result<(Arc<Tree>, Contents), NodeError> {
        let span = Span::current();
        let from = |what: &str| {
            span.record("from", what);
        };
        let digest = found.tree;
        if let Some((tree, contents)) = self.loaded.lock().get(&digest)
            && let Some(tree) = tree.upgrade()
        {
            from("memory");
            return Ok((tree, contents.clone()));
        }
        let trees = self.trees.clone();
        let (tree, contents) = match blocking(move || Ok::<_, NodeError>(trees.load(digest))).await? {
            Some(tree) => {
                from("disk");
                (Arc::new(tree), Contents::here())
            }
            None => {
                from("network");
                asked.requests += 1;
                let Asked { sources, reference, .. } = asked;
                let wanted = Wanted { trees: self.trees.clone(), reference: reference.clone(), digest };
                wanted.receive(sources, found.names).await?
            }
        };
        let mut loaded = self.loaded.lock();
        loaded.retain(|_, (tree, _)| tree.strong_count() > 0);
        loaded.insert(digest, (Arc::downgrade(&tree), contents.clone()));
        Ok((tree, contents))
    }
}

/// A tree that is not here.
#[derive(Clone)]
struct Wanted {
    trees: Trees,
    reference: Reference,
    digest: Digest,
}

/// A tree of which the names have come.
struct Begun {
    tree: Arc<Tree>,
    /// What brings the rest, where that is not here.
    rest: Option<JoinHandle<io::Result<Arc<Tree>>>>,
}

impl Wanted {
    /// Receives it from whoever has it, up to its names where it is known what they are; then the rest comes in the background.
    async fn receive(
        self,
        sources: &Sources,
        names: Option<TreeNames>,
    ) -> Result<(Arc<Tree>, Contents), NodeError> {
        let ask = |client: Client| {
            let this = self.clone();
            async move {
                match this.begin(&client, names).await {
                    Some(begun) => Ok(begun),
                    None => Ok(Begun { tree: Arc::new(this.whole(&client).await?), rest: None }),
                }
            }
        };
        let Begun { tree, rest } = sources.ask(TREE, ask).await?;
        let Some(rest) = rest else { return Ok((tree, Contents::here())) };
        let (come, contents) = Contents::coming();
        let (wanted, sources) = (Arc::downgrade(&tree), sources.clone());
        tokio::spawn(async move {
            if let Ok(Ok(Ok(_))) = timeout(TREE, rest).await {
                come.send_replace(true);
                return;
            }
            tracing::warn!(tree = %self.digest, "a tree broke off behind its names; it is asked for again");
            for wait in pauses() {
                sleep(wait).await;
                let Some(tree) = wanted.upgrade() else { return };
                let whole = sources.ask(TREE, |client| self.again(client)).await;
                match whole.map(|whole| tree.set_contents(whole.as_bytes().clone())) {
                    Ok(Ok(())) => {
                        come.send_replace(true);
                        return;
                    }
                    // it was what the digest names, so it will be the same again
                    Ok(Err(error)) => {
                        tracing::error!(tree = %self.digest, %error, "a tree is not the one whose names came; its files cannot be read");
                        return;
                    }
                    Err(NodeError::Wire(error)) if error.is_passing() => {
                        tracing::debug!(tree = %self.digest, %error, "a tree does not come");
                    }
                    Err(error) => {
                        tracing::warn!(tree = %self.digest, %error, "a tree does not come");
                        sleep(DEFINITE).await;
                    }
                }
            }
        });
        Ok((tree, contents))
    }

    async fn again(&self, client: Client) -> Result<Tree, NodeError> {
        self.whole(&client).await
    }

    /// Unpacks it while it comes; `None` if anything goes wrong.
    async fn begin(&self, client: &Client, names: Option<TreeNames>) -> Option<Begun> {
        let blob = client.blob_stream(&self.reference.repository, self.digest).await.ok()?;
        if blob.len.is_none_or(|len| len > TREE_BLOB_BYTES_MAX) {
            return None;
        }
        let reader = SyncIoBridge::new(StreamReader::new(blob.bytes.map_err(io::Error::other)));
        let (trees, digest) = (self.trees.clone(), self.digest);
        let (early, begun) = oneshot::channel();
        let receive = move || {
            let received = trees.receive(digest, names, reader, |tree| drop(early.send(tree)));
            received.inspect_err(|error| tracing::debug!(tree = %digest, %error, "a tree did not come"))
        };
        let rest = tokio::task::spawn_blocking(receive);
        match begun.await {
            Ok(tree) => Some(Begun { tree, rest: Some(rest) }),
            Err(_) => Some(Begun { tree: rest.await.ok()?.ok()?, rest: None }),
        }
    }

    /// All of it, with retries, with an error that says why, and without a disk if there is no other way.
    async fn whole(&self, client: &Client) -> Result<Tree, NodeError> {
        let blob = client.blob(&self.reference.repository, self.digest, TREE_BLOB_BYTES_MAX).await?;
        let (trees, name, digest) = (self.trees.clone(), self.reference.to_string(), self.digest);
        blocking(move || trees.store(&name, digest, &blob)).await
    }
}

/// How long to wait before each try to bring what readers wait for, for ever.
fn pauses() -> impl Iterator<Item = Duration> {
    let next = |pause: &Duration| Some((*pause * 2).min(AGAIN_MAX));
    std::iter::successors(Some(AGAIN_MIN), next)
}
