//! The seam to the network.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use lamina_chunk::PackId;

use crate::Class;

/// Serves byte ranges of packs. Retries belong inside; the deadline belongs to the cache, which drops the future when
/// it has passed. What comes back is not trusted.
pub trait Source: Send + Sync {
    /// The bytes `range` of `pack`, all of them, as they come, so that the first frame of a long answer need not wait for the last.
    fn stream(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
    ) -> BoxFuture<'_, Result<Pieces, SourceError>>;

    /// The same bytes in one piece.
    fn fetch(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
    ) -> BoxFuture<'_, Result<Bytes, SourceError>> {
        let pieces = self.stream(pack, range, class);
        async move {
            let whole = pieces.await?.try_fold(BytesMut::new(), |mut whole, piece| async move {
                whole.extend_from_slice(&piece);
                Ok(whole)
            });
            Ok(whole.await?.freeze())
        }
        .boxed()
    }

    /// Says that bytes of `pack` which came from an origin of this source did not verify: others, where there are any, should
    /// be asked first.
    fn distrust(&self, pack: PackId, origin: usize) {
        let _ = (pack, origin);
    }
}

/// An answer on its way.
pub struct Pieces {
    bytes: BoxStream<'static, Result<Bytes, SourceError>>,
    /// Which of the places that the source asks this came from. It means something to the source only.
    pub origin: usize,
}

impl Pieces {
    /// The answer of a source that has one place to ask.
    pub fn new(bytes: BoxStream<'static, Result<Bytes, SourceError>>) -> Self {
        Self { bytes, origin: 0 }
    }

    /// An answer that is here already.
    pub fn whole(bytes: Bytes) -> Self {
        Self::new(stream::iter([Ok(bytes)]).boxed())
    }

    /// The same answer, from `origin`.
    pub fn from(self, origin: usize) -> Self {
        Self { origin, ..self }
    }
}

impl stream::Stream for Pieces {
    type Item = Result<Bytes, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.bytes.poll_next_unpin(context)
    }
}

/// What went wrong at the other end.
type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// Why a source gave no bytes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// It answers, and does not have the pack. Asking again will not help.
    #[error("the source does not have pack {0}")]
    Missing(PackId),
    /// It answers, and refuses: credentials, or a request that it does not take.
    #[error("the source refuses pack {pack}: {cause}")]
    Refused {
        /// The pack.
        pack: PackId,
        /// Its answer.
        cause: Cause,
    },
    /// It does not answer, or breaks off. Asking again may help.
    #[error("pack {pack} cannot be reached: {cause}")]
    Unreachable {
        /// The pack.
        pack: PackId,
        /// What happened.
        cause: Cause,
    },
}
