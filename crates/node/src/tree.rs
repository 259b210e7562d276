//! An image's tree: loaded, on disk, or from whoever has the image.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use lamina_image::{Digest, Tree};
use lamina_wire::Client;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tracing::field::Empty;
use tracing::{Instrument, Span, debug_span};

use crate::daemon::{Asked, blocking};
use crate::spans::failed;
use crate::{Found, Node, NodeError};

/// A tree's blob over 1 GiB is refused: some ten million files.
const TREE_BLOB_BYTES_MAX: u64 = 1 << 30;
/// A tree that takes longer to come is given up: the largest one over 100 Mbit/s.
const TREE: Duration = Duration::from_secs(90);

impl Node {
    /// The tree of an image. Mounts that show the same one share it.
    pub(crate) async fn tree(&self, asked: &mut Asked, found: &Found) -> Result<Arc<Tree>, NodeError> {
        let span = debug_span!("tree", digest = %found.tree, from = Empty, otel.status_description = Empty);
        let tree = self.find_tree(asked, found).instrument(span.clone()).await;
        tree.inspect_err(|error| failed(&span, error))
    }

    async fn find_tree(&self, asked: &mut Asked, found: &Found) -> Result<Arc<Tree>, NodeError> {
        let span = Span::current();
        let from = |what: &str| {
            span.record("from", what);
        };
        let Asked { sources, reference, requests } = asked;
        let reference = &*reference;
        let digest = found.tree;
        if let Some(tree) = self.loaded.lock().get(&digest).and_then(std::sync::Weak::upgrade) {
            from("memory");
            return Ok(tree);
        }
        let trees = self.trees.clone();
        let local = blocking(move || Ok::<_, NodeError>(trees.load(digest))).await?;
        let tree = match local {
            Some(tree) => {
                from("disk");
                tree
            }
            None => {
                from("network");
                *requests += 1;
                let (repository, trees) = (&reference.repository, &self.trees);
                sources
                    .ask(TREE, |client| async move {
                        if let Some(tree) = self.receive_tree(&client, repository, digest).await {
                            return Ok(tree);
                        }
                        // once more, with retries, with an error that says why, and without a disk if there is no other way
                        let blob = client.blob(repository, digest, TREE_BLOB_BYTES_MAX).await?;
                        let (trees, name) = (trees.clone(), reference.to_string());
                        blocking(move || trees.store(&name, digest, &blob)).await
                    })
                    .await?
            }
        };
        let tree = Arc::new(tree);
        let mut loaded = self.loaded.lock();
        loaded.retain(|_, tree| tree.strong_count() > 0);
        loaded.insert(digest, Arc::downgrade(&tree));
        Ok(tree)
    }

    /// Unpacks a tree while it comes; `None` if anything goes wrong.
    async fn receive_tree(&self, client: &Client, repository: &str, digest: Digest) -> Option<Tree> {
        let blob = client.blob_stream(repository, digest).await.ok()?;
        if blob.len.is_none_or(|len| len > TREE_BLOB_BYTES_MAX) {
            return None;
        }
        let reader = SyncIoBridge::new(StreamReader::new(blob.bytes.map_err(io::Error::other)));
        let trees = self.trees.clone();
        let received = tokio::task::spawn_blocking(move || trees.receive(digest, reader)).await.ok()?;
        received.inspect_err(|error| tracing::debug!(tree = %digest, %error, "a tree did not come")).ok()
    }
}
