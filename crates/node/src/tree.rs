//! An image's tree: loaded, on disk, or from whoever has the image.

use std::io::{self, Read as _};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, poll_fn};
use futures_util::{StreamExt, TryStreamExt};
use lamina_image::{Digest, Tree, TreeError, TreeNames};
use lamina_mount::Contents;
use lamina_wire::{Client, PartStream, Reference, WireError};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tokio_util::io::{StreamReader, SyncIoBridge};
use tracing::field::Empty;
use tracing::{Instrument, Span, debug_span};

use crate::daemon::{Asked, blocking};
use crate::sources::Sources;
use crate::spans::failed;
use crate::trees::{Named, Trees};
use crate::turn::{Turn, TurnGuard, turn};
use crate::{Found, Node, NodeError};

/// A tree's blob over 1 GiB is refused: some ten million files.
const TREE_BLOB_BYTES_MAX: u64 = 1 << 30;
/// A tree that takes longer to come is given up: the largest one over 100 Mbit/s.
const TREE: Duration = Duration::from_secs(90);
/// A host that has not begun to send names by then is asked for all of the tree, as one without them is.
const NAMES_HEAD: Duration = Duration::from_secs(5);
/// Pieces that have come and are not unpacked yet; a piece is some 10 to 100 KiB.
const HELD_PIECES: usize = 64;
/// What broke off is asked for again so soon, and then later and later, up to the second.
const AGAIN_MIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(2);
/// What nobody has, or refuses to give, is asked for once a minute: somebody may put it back.
const DEFINITE: Duration = Duration::from_secs(60);

impl Node {
    /// The tree of an image, all of it. Mounts that show the same one share it.
    ///
    /// *Errors*: also where its contents do not come in time though its names did.
    pub(crate) async fn tree(
        &self,
        asked: &mut Asked,
        found: &Found,
        turns: Turns,
    ) -> Result<Arc<Tree>, NodeError> {
        let found = Found { names: None, ..found.clone() };
        let (tree, contents) = self.tree_names(asked, &found, turns).await?;
        let _ = timeout(TREE, contents.need()).await;
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
        turns: Turns,
    ) -> Result<(Arc<Tree>, Contents), NodeError> {
        let span = debug_span!("tree", digest = %found.tree, from = Empty, otel.status_description = Empty);
        let tree = self.find_tree(asked, found, turns).instrument(span.clone()).await;
        tree.inspect_err(|error| failed(&span, error))
    }

    async fn find_tree(
        &self,
        asked: &mut Asked,
        found: &Found,
        mut turns: Turns,
    ) -> Result<(Arc<Tree>, Contents), NodeError> {
        let span = Span::current();
        let from = |what: &str| {
            span.record("from", what);
        };
        let digest = found.tree;
        // where they are here already that makes way for what comes behind them
        let begun = asked.begun.as_mut().and_then(|begun| begun.names.take());
        if let Some((tree, contents)) = self.loaded.lock().get(&digest)
            && let Some(tree) = tree.upgrade()
        {
            from("memory");
            return Ok((tree, contents.clone()));
        }
        let trees = self.trees.clone();
        let here = match trees.has(digest) {
            true => {
                // what comes over the link does not wait for the disk
                turns = Turns::alone();
                blocking(move || Ok::<_, NodeError>(trees.load(digest))).await?
            }
            false => None,
        };
        let (tree, contents) = match here {
            Some(tree) => {
                from("disk");
                (Arc::new(tree), Contents::here())
            }
            None => {
                from("network");
                asked.requests += u32::from(begun.is_none());
                let Asked { sources, reference, .. } = asked;
                let wanted = Wanted { trees: self.trees.clone(), reference: reference.clone(), digest };
                let names = found.names.filter(|names| names.bytes <= TREE_BLOB_BYTES_MAX);
                wanted.receive(sources, names, begun, turns).await?
            }
        };
        let mut loaded = self.loaded.lock();
        loaded.retain(|_, (tree, _)| tree.strong_count() > 0);
        loaded.insert(digest, (Arc::downgrade(&tree), contents.clone()));
        Ok((tree, contents))
    }
}

/// When the parts of a tree come, where the boot pack comes over the same link.
pub(crate) struct Turns {
    names: NamesTurn,
    /// What goes before the contents, as long as nobody needs these.
    before_contents: Turn,
}

/// While names come, each until it is taken.
struct NamesTurn {
    /// Goes on until they begin to.
    ahead: Mutex<Option<TurnGuard>>,
    /// Goes on until all of them have.
    coming: Mutex<Option<TurnGuard>>,
}

/// For what waits for the parts of a tree, or goes before one.
pub(crate) struct Around {
    /// Over when the names begin to come, or all of the tree is there.
    pub(crate) ahead: Turn,
    /// Over when all names have come, or all of the tree is there.
    pub(crate) coming: Turn,
    /// What comes before the contents goes on for as long.
    pub(crate) before_contents: TurnGuard,
}

impl Turns {
    /// With those of what comes around the tree.
    pub(crate) fn new() -> (Self, Around) {
        let ((ahead, names_begin), (coming, names_end)) = (turn(), turn());
        let (before, before_contents) = turn();
        let names = NamesTurn { ahead: Mutex::new(Some(ahead)), coming: Mutex::new(Some(coming)) };
        let around = Around { ahead: names_begin, coming: names_end, before_contents: before };
        (Self { names, before_contents }, around)
    }

    /// Where nothing else comes.
    pub(crate) fn alone() -> Self {
        Self::new().0
    }
}

/// What comes, for a thread that may block.
type PieceReader = SyncIoBridge<StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>>;

/// A tree that is not here.
#[derive(Clone)]
struct Wanted {
    trees: Trees,
    reference: Reference,
    digest: Digest,
}

impl Wanted {
    /// Receives it from whoever has it, up to its names where it is known what they are; then the rest comes in the background. Names that
    /// have `begun` to come are not asked for.
    async fn receive(
        self,
        sources: &Sources,
        names: Option<TreeNames>,
        begun: Option<PartStream>,
        Turns { names: turn, before_contents }: Turns,
    ) -> Result<(Arc<Tree>, Contents), NodeError> {
        let begun = Mutex::new(begun);
        let ask = |client: Client| {
            let (this, turn, begun) = (self.clone(), &turn, begun.lock().take());
            async move {
                let named = match names {
                    Some(names) => this.names(&client, names, begun, turn).await?,
                    None => {
                        drop(begun);
                        None
                    }
                };
                Ok(match named {
                    Some((tree, named)) => (tree, Some(named)),
                    None => (this.whole(&client).await?, None),
                })
            }
        };
        let (tree, named) = sources.ask(TREE, ask).await?;
        // where all of it came at once
        drop(turn);
        let tree = Arc::new(tree);
        let Some(named) = named else { return Ok((tree, Contents::here())) };
        let (bringing, contents) = Contents::coming();
        let (wanted, sources) = (Arc::downgrade(&tree), sources.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = before_contents.over() => {}
                () = bringing.needed() => {}
            }
            if self.bring(&wanted, &sources, named).await {
                bringing.done();
            }
        });
        Ok((tree, contents))
    }

    /// Brings the contents to a tree of which the names are here, for as long as somebody has it. Whether it has them now.
    async fn bring(self, wanted: &Weak<Tree>, sources: &Sources, named: Named) -> bool {
        let Some(tree) = wanted.upgrade() else { return false };
        match timeout(TREE, self.contents(sources, tree, named)).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => {
                tracing::warn!(tree = %self.digest, %error, "a tree broke off behind its names")
            }
            Err(_) => tracing::warn!(tree = %self.digest, "a tree stays away behind its names"),
        }
        for wait in pauses() {
            sleep(wait).await;
            let Some(tree) = wanted.upgrade() else { return false };
            let whole = |client: Client| {
                let this = self.clone();
                async move { this.whole(&client).await }
            };
            let whole = sources.ask(TREE, whole).await;
            match whole.map(|whole| tree.set_contents(whole.as_bytes().clone())) {
                Ok(Ok(())) => return true,
                // it was what the digest names, so it will be the same again
                Ok(Err(error)) => {
                    tracing::error!(tree = %self.digest, %error, "a tree is not the one whose names came; its files cannot be read");
                    return false;
                }
                Err(NodeError::Wire(error)) if error.is_passing() => {
                    tracing::debug!(tree = %self.digest, %error, "a tree does not come");
                }
                Err(error) => {
                    tracing::warn!(tree = %self.digest, %error, "a tree does not come");
                    drop(tree);
                    sleep(DEFINITE).await;
                }
            }
        }
        false
    }

    /// Unpacks its names while they come, of which the `turn` is; `None` where it is worth asking the same host for all of it, which is done
    /// with retries. *Errors*: it does not have it.
    async fn names(
        &self,
        client: &Client,
        names: TreeNames,
        begun: Option<PartStream>,
        turn: &NamesTurn,
    ) -> Result<Option<(Tree, Named)>, NodeError> {
        let client = client.with_tries(1);
        let asked = client.blob_range_stream(&self.reference.repository, self.digest, 0..names.bytes);
        let part = match begun {
            Some(mut part) => match timeout(NAMES_HEAD, part.next()).await {
                Ok(Some(first)) => stream::iter([first]).chain(part).boxed(),
                Ok(None) | Err(_) => return Ok(None),
            },
            None => match timeout(NAMES_HEAD, asked).await {
                Ok(Ok(part)) => part,
                Ok(Err(error)) if error.is_not_found() => return Err(error.into()),
                Ok(Err(_)) | Err(_) => return Ok(None),
            },
        };
        turn.ahead.lock().take();
        let all_come = |bytes| {
            if bytes == names.bytes {
                turn.coming.lock().take();
            }
        };
        let (trees, digest) = (self.trees.clone(), self.digest);
        let received = received(part, all_come, move |part| trees.receive_names(digest, names, part)).await;
        Ok(received.inspect_err(|error| tracing::debug!(tree = %digest, %error, "names did not come")).ok())
    }

    /// Unpacks what is behind the names of `tree` while it comes.
    async fn contents(&self, sources: &Sources, tree: Arc<Tree>, named: Named) -> io::Result<()> {
        let from = named.bytes();
        let ask = |client: Client| async move {
            Ok(client.blob_rest_stream(&self.reference.repository, self.digest, from).await?)
        };
        let rest = sources.ask(TREE, ask).await.map_err(io::Error::other)?;
        let (trees, max) = (self.trees.clone(), TREE_BLOB_BYTES_MAX - from);
        received(rest, |_| (), move |rest| trees.receive_contents(&tree, named, rest.take(max))).await
    }

    /// All of it.
    async fn whole(&self, client: &Client) -> Result<Tree, NodeError> {
        match self.unpacked(client).await {
            Some(tree) => Ok(tree),
            None => self.stored(client).await,
        }
    }

    /// Unpacks it while it comes; `None` if anything goes wrong.
    async fn unpacked(&self, client: &Client) -> Option<Tree> {
        let blob = client.blob_stream(&self.reference.repository, self.digest).await.ok()?;
        if blob.len.is_none_or(|len| len > TREE_BLOB_BYTES_MAX) {
            return None;
        }
        let (trees, digest) = (self.trees.clone(), self.digest);
        let received = received(blob.bytes, |_| (), move |blob| trees.receive(digest, blob)).await;
        received.inspect_err(|error| tracing::debug!(tree = %digest, %error, "a tree did not come")).ok()
    }

    /// With retries, with an error that says why, and without a disk if there is no other way.
    async fn stored(&self, client: &Client) -> Result<Tree, NodeError> {
        let blob = client.blob(&self.reference.repository, self.digest, TREE_BLOB_BYTES_MAX).await?;
        let (trees, name, digest) = (self.trees.clone(), self.reference.to_string(), self.digest);
        blocking(move || trees.store(&name, digest, &blob)).await
    }
}

/// Has `receive` read what comes, on a thread that may block. Where nothing goes wrong `all_come` is told how many bytes have come, though
/// they may not all be read yet. Dropping this ends what `receive` reads, and so that thread.
async fn received<T: Send + 'static>(
    mut bytes: BoxStream<'static, Result<Bytes, WireError>>,
    all_come: impl FnOnce(u64),
    receive: impl FnOnce(PieceReader) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (sender, mut pieces) = mpsc::channel(HELD_PIECES);
    let pieces = poll_fn(move |cx| pieces.poll_recv(cx)).map_err(io::Error::other).boxed();
    let reader = SyncIoBridge::new(StreamReader::new(pieces));
    let receiving = spawn_blocking(move || receive(reader));
    let forward = async move {
        let mut come = 0;
        while let Some(piece) = bytes.next().await {
            let is_wrong = piece.is_err();
            come += piece.as_ref().map_or(0, |piece| piece.len() as u64);
            if sender.send(piece).await.is_err() || is_wrong {
                return;
            }
        }
        all_come(come);
    };
    let ((), received) = tokio::join!(forward, receiving);
    received.expect("receiving does not panic")
}

/// How long to wait before each try to bring what readers wait for, for ever.
fn pauses() -> impl Iterator<Item = Duration> {
    let next = |pause: &Duration| Some((*pause * 2).min(AGAIN_MAX));
    std::iter::successors(Some(AGAIN_MIN), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn that_all_has_come_is_told_before_it_is_read_and_not_of_what_breaks_off() {
        for breaks_off in [false, true] {
            let (sender, mut coming) = mpsc::channel(2);
            let coming = poll_fn(move |cx| coming.poll_recv(cx)).boxed();
            let ((told, hear), (go, gone)) =
                (std::sync::mpsc::sync_channel(1), std::sync::mpsc::sync_channel(1));
            let read = move |mut part: PieceReader| {
                gone.recv().expect("sent");
                io::copy(&mut part, &mut io::sink())
            };
            let received =
                tokio::spawn(received(coming, move |bytes| told.send(bytes).expect("heard"), read));
            sender.send(Ok(Bytes::from_static(b"some bytes"))).await.expect("taken");
            if breaks_off {
                let error = WireError::Timeout { url: String::new(), waited: Duration::ZERO };
                sender.send(Err(error)).await.expect("taken");
            }
            drop(sender);
            let heard = spawn_blocking(move || hear.recv()).await.expect("no panic");
            assert_eq!(heard.ok(), (!breaks_off).then_some(10));
            go.send(()).expect("heard");
            assert_eq!(received.await.expect("no panic").ok(), (!breaks_off).then_some(10));
        }
    }
}
