//! Spans of what a node does, beside those that stand where the work is done. README.md has the names and fields of all of them.

use std::fmt::Display;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use lamina_cache::{Class, Pieces, SourceError};
use lamina_chunk::PackId;
use parking_lot::Mutex;
use tracing::field::{Empty, display};
use tracing::{Span, debug_span};

/// Says in a span that its work failed.
pub(crate) fn failed(span: &Span, error: &dyn Display) {
    span.record("otel.status_description", display(error));
}

/// What the fetches of one image are part of. Clones share it.
///
/// No span is sent before those within it have ended, so this has to be ended some time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Within(Arc<Mutex<Spans>>);

#[derive(Debug, Default)]
struct Spans {
    all: Option<Span>,
    boot: Option<Span>,
}

impl Within {
    /// Fetches are part of this from now on.
    pub(crate) fn begin(&self, span: Span) {
        self.0.lock().all = Some(span);
    }

    /// The same, until what is returned is dropped.
    pub(crate) fn during(&self, span: Span) -> During<'_> {
        self.begin(span);
        During(self)
    }

    /// Those for the boot pack are part of this, until it ends.
    pub(crate) fn begin_boot(&self, span: Span) {
        self.0.lock().boot = Some(span);
    }

    /// What those for the boot pack are part of.
    pub(crate) fn boot(&self) -> Span {
        self.0.lock().boot.clone().unwrap_or_else(Span::none)
    }

    /// The boot pack has come, or comes no more.
    pub(crate) fn end_boot(&self) {
        self.0.lock().boot.take();
    }

    /// Fetches are part of nothing from now on.
    pub(crate) fn end(&self) {
        *self.0.lock() = Spans::default();
    }

    /// Somebody asks for `bytes` bytes of a pack.
    pub(crate) fn fetch(&self, pack: PackId, bytes: u64, class: Class) -> Fetch {
        let within = self.0.lock();
        let boot = within.boot.as_ref().filter(|_| class == Class::Boot);
        // explicitly: whoever fetches runs in a task of its own
        let parent = boot.or(within.all.as_ref()).and_then(Span::id);
        let span = debug_span!(parent: parent, "fetch", class = class.name(), %pack, bytes, received = Empty,
            host = Empty, otel.kind = "client", otel.status_description = Empty);
        Fetch { span, received: 0 }
    }
}

/// Fetches are part of a span until this is dropped.
pub(crate) struct During<'a>(&'a Within);

impl Drop for During<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// One fetch. Its span ends when this is dropped.
pub(crate) struct Fetch {
    span: Span,
    received: u64,
}

impl Fetch {
    /// Whether nobody wants to know of it.
    pub(crate) fn is_unwanted(&self) -> bool {
        self.span.is_disabled()
    }

    /// Nobody has answered.
    pub(crate) fn failed(&self, error: &SourceError) {
        failed(&self.span, error);
    }

    /// `host` has answered: the fetch ends with the pieces, or with whoever reads them.
    pub(crate) fn answered(self, host: &str, pieces: Pieces) -> Pieces {
        self.span.record("host", host);
        let origin = pieces.origin;
        Pieces::new(Arriving { pieces, fetch: self }.boxed()).from(origin)
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.span.record("received", self.received);
    }
}

/// An answer that counts what comes of it.
struct Arriving {
    pieces: Pieces,
    fetch: Fetch,
}

impl Stream for Arriving {
    type Item = Result<Bytes, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.pieces.poll_next_unpin(context);
        match &polled {
            Poll::Ready(Some(Ok(piece))) => self.fetch.received += piece.len() as u64,
            Poll::Ready(Some(Err(error))) => self.fetch.failed(error),
            _ => {}
        }
        polled
    }
}
