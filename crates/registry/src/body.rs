//! Bodies of requests and answers.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use http::{Request, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use lamina_store::{ByteStream, StoreError};
use prometheus_client::metrics::counter::Counter;
use tokio::time::{Instant, timeout};

use crate::ApiError;

/// Bytes in a second that a body brings at least, on average, once it has taken as long as it may stand still. A modem is
/// faster.
const RATE_MIN: u64 = 1_024;
/// What is taken and forgotten of a body that nobody wants, in bytes, and for how long.
const DRAIN_BYTES_MAX: usize = 128 << 20;
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// What an answer carries.
pub(crate) type Body = UnsyncBoxBody<Bytes, StoreError>;

/// A body that is in memory.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that comes from the store. An error in the middle cuts the connection, so that no client takes what came
/// for the whole.
pub(crate) fn streamed(bytes: ByteStream, sent: Counter) -> Body {
    let logged = bytes.inspect_err(|error| tracing::error!(%error, "an answer was cut off"));
    let counted = logged.map_ok(move |bytes| {
        sent.inc_by(bytes.len() as u64);
        Frame::data(bytes)
    });
    StreamBody::new(counted).boxed_unsync()
}

/// A request's body, frame by frame.
///
/// What is left of it when it is dropped is still taken for a while, and forgotten: a client that sends before it reads
/// would otherwise find its connection broken instead of the answer.
pub(crate) struct Inbound {
    body: Option<Incoming>,
    /// The client waits to be told that its body is wanted.
    waits: bool,
    stall_max: Duration,
    begun: Instant,
    len: u64,
    received: Counter,
}

impl Inbound {
    pub(crate) fn new(request: Request<Incoming>, stall_max: Duration, received: Counter) -> Self {
        let waits = request.headers().contains_key(header::EXPECT);
        let body = Some(request.into_body());
        Self { body, waits, stall_max, begun: Instant::now(), len: 0, received }
    }

    /// How long it is at most, in bytes, where the client has said so.
    pub(crate) fn len_max(&self) -> Option<u64> {
        self.body.as_ref().map_or(Some(0), |body| body.size_hint().upper())
    }

    /// The next frame; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        self.waits = false;
        loop {
            let Some(body) = &mut self.body else { return Ok(None) };
            let frame = timeout(self.stall_max, body.frame()).await;
            let frame =
                frame.map_err(|_| ApiError::Slow(format!("nothing came for {:?}", self.stall_max)))?;
            match frame {
                None => {
                    self.body = None;
                    return Ok(None);
                }
                Some(Err(error)) => {
                    self.body = None;
                    return Err(ApiError::Body(error.to_string()));
                }
                // trailers have no meaning here
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.count(&bytes)?;
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// Counts what has come. A client that keeps just below the limit of silence is not waited for either.
    fn count(&mut self, bytes: &Bytes) -> Result<(), ApiError> {
        self.received.inc_by(bytes.len() as u64);
        self.len += bytes.len() as u64;
        let elapsed = self.begun.elapsed();
        if elapsed > self.stall_max && self.len < elapsed.as_secs().max(1) * RATE_MIN {
            let text = format!("{} bytes in {elapsed:.0?} are fewer than {RATE_MIN} in a second", self.len);
            return Err(ApiError::Slow(text));
        }
        Ok(())
    }

    /// The whole body, of at most `limit` bytes.
    pub(crate) async fn whole(mut self, limit: usize) -> Result<Bytes, ApiError> {
        let announced = self.body.as_ref().map_or(0, |body| body.size_hint().lower());
        if announced > limit as u64 {
            return Err(ApiError::TooLarge(limit));
        }
        let mut whole = BytesMut::new();
        while let Some(bytes) = self.next().await? {
            if whole.len() + bytes.len() > limit {
                return Err(ApiError::TooLarge(limit));
            }
            whole.extend_from_slice(&bytes);
        }
        Ok(whole.freeze())
    }

    /// Takes the whole body, of at most `limit` bytes, and keeps none of it: whoever sends it gets an answer.
    pub(crate) async fn ignored(mut self, limit: usize) -> Result<(), ApiError> {
        let mut len = 0usize;
        while let Some(bytes) = self.next().await? {
            len += bytes.len();
            if len > limit {
                return Err(ApiError::TooLarge(limit));
            }
        }
        Ok(())
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !self.waits && !body.is_end_stream()) else {
            return;
        };
        tokio::spawn(timeout(DRAIN_MAX, async move {
            let mut len = 0;
            while len < DRAIN_BYTES_MAX {
                let Some(Ok(frame)) = body.frame().await else { return };
                len += frame.data_ref().map_or(0, Bytes::len);
            }
        }));
    }
}
