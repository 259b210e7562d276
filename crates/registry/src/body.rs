//! Bodies of requests and answers.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use http::Request;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use lamina_store::{ByteStream, StoreError};
use tokio::time::timeout;

use crate::ApiError;

/// What an answer carries.
pub(crate) type Body = UnsyncBoxBody<Bytes, StoreError>;

/// A body that is in memory.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that comes from the store. An error in the middle cuts the connection, so that no client takes what came
/// for the whole.
pub(crate) fn streamed(bytes: ByteStream) -> Body {
    let logged = bytes.inspect_err(|error| tracing::error!(%error, "an answer was cut off"));
    StreamBody::new(logged.map_ok(Frame::data)).boxed_unsync()
}

/// A request's body, frame by frame.
pub(crate) struct Upstream {
    body: Incoming,
    stall_max: Duration,
}

impl Upstream {
    pub(crate) fn new(request: Request<Incoming>, stall_max: Duration) -> Self {
        Self { body: request.into_body(), stall_max }
    }

    /// The next frame; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let frame = timeout(self.stall_max, self.body.frame()).await;
            let frame =
                frame.map_err(|_| ApiError::Body(format!("nothing came for {:?}", self.stall_max)))?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => return Err(ApiError::Body(error.to_string())),
                // trailers have no meaning here
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// The whole body, of at most `limit` bytes.
    pub(crate) async fn whole(mut self, limit: usize) -> Result<Bytes, ApiError> {
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
