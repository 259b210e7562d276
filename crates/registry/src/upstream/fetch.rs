//! Blobs on their way from the upstream into the store.
//!
//! Each goes two ways as it comes: into an upload of the store, which hashes it, and into a file without a name, the
//! spool, from which any number of clients read it at their own pace while it grows. So nobody waits for gigabytes, a
//! slow client holds nobody up, and the upstream sends each blob once. The last piece is readable only when the whole
//! is stored under its digest: of wrong bytes no client gets a whole answer. A range cannot be judged by itself, so
//! who asks for one waits for the whole.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use lamina_image::Digest;
use lamina_store::{ByteStream, FRAME_BYTES, Repo, Session, StoreError};
use lamina_wire::WireError;
use tokio::sync::watch;

use super::flights::Flight;
use super::{Upstream, outcome_of};
use crate::ApiError;

/// How often a blob that broke off is gone on with: at a break every 100 MiB, enough for the longest layers there are.
const RESUMES_MAX: usize = 100;

/// How far a blob is.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    /// Its length in bytes and where to read it, once the upstream has begun to send it and has said how long it is.
    spool: Option<(u64, Arc<File>)>,
    /// How many bytes of it can be read there.
    readable: u64,
    /// How it ended.
    ended: Option<Result<(), Arc<ApiError>>>,
}

/// How a blob that was not here can be had.
pub(crate) enum Brought {
    /// It is in the store and belongs to the repository.
    Here,
    /// It comes. The stream ends in an error where it turns out to be another one.
    Coming {
        /// Its length in bytes, at least one.
        size: u64,
        /// All of it.
        bytes: ByteStream,
    },
}

type Coming = Flight<(Repo, Digest), Progress>;

impl Upstream {
    /// Sees to it that a blob is here.
    pub(crate) async fn bring_blob(self: &Arc<Self>, repo: &Repo, digest: Digest) -> Result<(), ApiError> {
        match self.store.take_blob_in(repo, digest).await? {
            Some(_) => Ok(()),
            None => self.fetch_blob(repo, digest, false).await.map(drop),
        }
    }

    /// How long a blob is, in bytes, which is not fetched for it.
    pub(crate) async fn blob_len(&self, repo: &Repo, digest: Digest) -> Result<u64, ApiError> {
        self.client.blob_len(repo.as_str(), digest).await.map_err(|error| absent(error, digest))
    }

    /// Fetches a blob that is not here, or waits for whoever does: to its end, unless `early`, and it is on its way.
    pub(crate) async fn fetch_blob(
        self: &Arc<Self>,
        repo: &Repo,
        digest: Digest,
        early: bool,
    ) -> Result<Brought, ApiError> {
        let (upstream, key) = (Arc::clone(self), (repo.clone(), digest));
        let mut progress = self.coming.join(key, Progress::default(), |coming| async move {
            let ended = upstream.store_blob(&coming).await;
            if let Err(error) = &ended {
                let (repo, digest) = coming.key();
                tracing::warn!(%repo, %digest, %error, "a blob did not come from the upstream");
                upstream.metrics.passed_on("blob", outcome_of(error));
            }
            coming.send_modify(|progress| progress.ended = Some(ended.map_err(Arc::new)));
        })?;
        loop {
            let Progress { spool, ended, .. } = progress.borrow_and_update().clone();
            match (ended, spool) {
                (Some(Ok(())), _) => return Ok(Brought::Here),
                (Some(Err(error)), _) => return Err(ApiError::Shared(error)),
                // of an empty one there is nothing to hold back
                (None, Some((size, spool))) if early && size > 0 => {
                    return Ok(Brought::Coming { size, bytes: follow(progress, spool, digest) });
                }
                (None, _) => {}
            }
            progress.changed().await.map_err(|_| StoreError::Closed)?;
        }
    }

    async fn store_blob(&self, coming: &Coming) -> Result<(), ApiError> {
        let (repo, digest) = coming.key();
        let _place = self.fetches.acquire().await.expect("never closed");
        // it may have come since whoever asks looked for it
        if self.store.take_blob_in(repo, *digest).await?.is_some() || self.link_known(repo, *digest).await? {
            self.metrics.passed_on("blob", "hit");
            return Ok(());
        }
        let mut session = self.store.begin_upload_by(repo, digest.algorithm())?;
        if let Err(error) = self.receive(coming, &mut session).await {
            session.cancel().await;
            return Err(error);
        }
        let size = session.finish(*digest).await.map_err(|error| match error {
            StoreError::Digest { .. } => {
                let url = format!("{}/v2/{repo}/blobs/{digest}", self.client.base());
                ApiError::Upstream(WireError::WrongBytes { url, digest: *digest })
            }
            other => other.into(),
        })?;
        coming.send_modify(|progress| progress.readable = size);
        self.metrics.passed_on("blob", "miss");
        tracing::info!(target: "audit", %repo, %digest, bytes = size, "a blob came from the upstream");
        Ok(())
    }

    /// Whether the bytes are here for another repository, and the upstream has them in this one too.
    async fn link_known(&self, repo: &Repo, digest: Digest) -> Result<bool, ApiError> {
        if self.store.take_blob(digest).await?.is_none() {
            return Ok(false);
        }
        match self.client.blob_len(repo.as_str(), digest).await {
            Ok(_) => {
                self.store.link_blobs(repo, [digest]).await?;
                Ok(true)
            }
            // one that does not like the question may like to send it
            Err(error) if error.is_unserved() && !error.is_not_found() => Ok(false),
            Err(error) => Err(absent(error, digest)),
        }
    }

    /// Takes the whole blob, and goes on where it breaks off.
    async fn receive(&self, coming: &Coming, session: &mut Session) -> Result<(), ApiError> {
        let (repo, digest) = coming.key();
        let blob = self.client.blob_stream(repo.as_str(), *digest).await;
        let blob = blob.map_err(|error| absent(error, *digest))?;
        let spool = self.spool()?;
        if let Some(len) = blob.len {
            let spool = Some((len, Arc::clone(&spool)));
            coming.send_modify(|progress| progress.spool = spool);
        }
        let (mut bytes, mut resumes, mut resumed_at) = (blob.bytes, 0, None);
        while let Some(piece) = bytes.next().await {
            let received = session.received();
            match piece {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => {
                    self.metrics.upstream_received.inc_by(piece.len() as u64);
                    session.write(piece.clone()).await?;
                    self.write(&spool, piece, received).await?;
                    // all but this piece
                    coming.send_modify(|progress| progress.readable = received);
                }
                Err(error) => {
                    let goes_on = error.is_passing() && resumes < RESUMES_MAX && resumed_at != Some(received);
                    let Some(len) = blob.len.filter(|len| goes_on && received < *len) else {
                        return Err(error.into());
                    };
                    tracing::debug!(%repo, %digest, %error, received, "a blob broke off; going on with it");
                    (resumes, resumed_at) = (resumes + 1, Some(received));
                    bytes = self.client.blob_range_stream(repo.as_str(), *digest, received..len).await?;
                }
            }
        }
        Ok(())
    }

    /// A file that nobody else sees, and that is gone when nobody reads it any more.
    fn spool(&self) -> Result<Arc<File>, ApiError> {
        let made = tempfile::tempfile_in(&self.config.spool);
        made.map(Arc::new).map_err(|error| self.unspooled(error))
    }

    async fn write(&self, spool: &Arc<File>, piece: Bytes, offset: u64) -> Result<(), ApiError> {
        let spool = Arc::clone(spool);
        let written = tokio::task::spawn_blocking(move || spool.write_all_at(&piece, offset)).await;
        written.expect("writing does not panic").map_err(|error| self.unspooled(error))
    }

    fn unspooled(&self, error: std::io::Error) -> ApiError {
        ApiError::Spool { path: self.config.spool.display().to_string(), error }
    }
}

/// What the upstream does not have is not here either.
fn absent(error: WireError, digest: Digest) -> ApiError {
    match error {
        WireError::NotFound { .. } => ApiError::BlobUnknown(digest),
        other => other.into(),
    }
}

/// The whole blob, as it becomes readable.
fn follow(progress: watch::Receiver<Progress>, spool: Arc<File>, digest: Digest) -> ByteStream {
    let state = (progress, spool, 0);
    stream::try_unfold(state, move |(mut progress, spool, offset)| async move {
        let broken = || StoreError::Truncated(digest);
        let known = progress.wait_for(|now| now.readable > offset || now.ended.is_some()).await;
        let (readable, failed) = {
            let now = known.map_err(|_| broken())?;
            (now.readable, matches!(now.ended, Some(Err(_))))
        };
        if readable == offset {
            return if failed { Err(broken()) } else { Ok(None) };
        }
        let len = usize::try_from((readable - offset).min(FRAME_BYTES)).expect("at most a frame");
        let file = Arc::clone(&spool);
        let read = tokio::task::spawn_blocking(move || {
            let mut frame = vec![0; len];
            file.read_exact_at(&mut frame, offset).map(|()| Bytes::from(frame))
        });
        let frame = read.await.expect("reading does not panic").map_err(|error| {
            tracing::error!(%digest, %error, "what had come from the upstream cannot be read again");
            broken()
        })?;
        Ok(Some((frame, (progress, spool, offset + len as u64))))
    })
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::super::tests::away;
    use super::*;

    #[tokio::test]
    async fn a_blob_that_has_come_meanwhile_is_not_asked_for_again() {
        let directory = tempfile::tempdir().unwrap();
        let (upstream, repo) = (away(directory.path()).await, "app".parse().unwrap());
        let digest = Digest::of(b"bytes");
        let mut session = upstream.store.begin_upload_by(&repo, digest.algorithm()).unwrap();
        session.write(Bytes::from_static(b"bytes")).await.unwrap();
        session.finish(digest).await.unwrap();
        let brought = upstream.fetch_blob(&repo, digest, false).await.unwrap();
        assert!(matches!(brought, Brought::Here));
    }
}
