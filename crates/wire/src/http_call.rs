//! One HTTP request: sent, answered, read within its bounds.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::WireError;

/// What an error may say, in bytes: more is cut off.
const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// An answer may go on for as long as bytes come; this long without one ends it.
const STALL: Duration = Duration::from_secs(20);
/// Idle connections are kept this long: a mount reads in bursts.
const IDLE: Duration = Duration::from_secs(90);

/// What a request carries.
pub(crate) type RequestBody = BoxBody<Bytes, std::io::Error>;

pub(crate) fn no_body() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed()
}

pub(crate) fn whole_body(bytes: Bytes) -> RequestBody {
    Full::new(bytes).map_err(|never| match never {}).boxed()
}

pub(crate) fn stream_body(stream: BoxStream<'static, std::io::Result<Bytes>>) -> RequestBody {
    // `BoxBody` must be Sync; a stream in a mutex that nobody shares is
    BodyExt::boxed(StreamBody::new(SyncStream(std::sync::Mutex::new(stream)).map_ok(Frame::data)))
}

struct SyncStream(std::sync::Mutex<BoxStream<'static, std::io::Result<Bytes>>>);

impl futures_util::Stream for SyncStream {
    type Item = std::io::Result<Bytes>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let stream = self.get_mut().0.get_mut();
        stream.unwrap_or_else(std::sync::PoisonError::into_inner).poll_next_unpin(context)
    }
}

/// A pool of connections.
pub(crate) struct Http {
    pool: Pool<HttpsConnector<HttpConnector>, RequestBody>,
    answer: Duration,
}

impl Http {
    pub(crate) fn new(connect: Duration, answer: Duration) -> std::io::Result<Self> {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(connect));
        tcp.enforce_http(false);
        let connector = hyper_rustls::HttpsConnectorBuilder::new();
        let connector = connector.with_native_roots()?.https_or_http().enable_http1().wrap_connector(tcp);
        let pool = Pool::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(32)
            .http1_max_buf_size(1 << 20)
            .build(connector);
        Ok(Self { pool, answer })
    }

    /// Sends a request and waits for the head of the answer, whatever its status.
    pub(crate) async fn send(&self, request: Request<RequestBody>) -> Result<Answer, WireError> {
        self.send_within(request, self.answer).await
    }

    /// The same, where the answer may take longer: behind a large body, or where the registry has to work.
    pub(crate) async fn send_within(
        &self,
        request: Request<RequestBody>,
        waited: Duration,
    ) -> Result<Answer, WireError> {
        let url = request.uri().to_string();
        match tokio::time::timeout(waited, self.pool.request(request)).await {
            Err(_) => Err(WireError::Timeout { url, waited }),
            Ok(Err(error)) => Err(WireError::Unreachable { url, reason: reason(&error) }),
            Ok(Ok(response)) => Ok(Answer { url, response }),
        }
    }
}

/// The innermost cause: the outer ones only say that a request failed.
fn reason(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// The head of an answer, with its body still to come.
pub(crate) struct Answer {
    pub(crate) url: String,
    pub(crate) response: Response<Incoming>,
}

impl Answer {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(crate) fn header(&self, name: header::HeaderName) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// Where a redirect points, resolved against the URL asked for.
    pub(crate) fn location(&self) -> Result<Uri, WireError> {
        let wrong =
            || WireError::Answer { url: self.url.clone(), reason: "its Location is not a URL".into() };
        let location = self.header(header::LOCATION).ok_or_else(wrong)?;
        let location: Uri = location.parse().map_err(|_| wrong())?;
        if location.authority().is_some() {
            return Ok(location);
        }
        let base: Uri = self.url.parse().map_err(|_| wrong())?;
        let mut parts = base.into_parts();
        parts.path_and_query = location.into_parts().path_and_query;
        Uri::from_parts(parts).map_err(|_| wrong())
    }

    /// The answer if its status is one of these, otherwise the error that it is.
    pub(crate) async fn expect(self, wanted: &[StatusCode]) -> Result<Self, WireError> {
        if wanted.contains(&self.status()) {
            return Ok(self);
        }
        let (url, status) = (self.url.clone(), self.status().as_u16());
        let body = self.bytes(MESSAGE_BYTES_MAX as u64).await.unwrap_or_default();
        let message = oci_message(&body);
        Err(match status {
            401 | 403 => WireError::Denied { url, status, message },
            404 => WireError::NotFound { url, message },
            _ => WireError::Status { url, status, message },
        })
    }

    /// The whole body, if it is at most `max` bytes long.
    pub(crate) async fn bytes(self, max: u64) -> Result<Bytes, WireError> {
        let announced = self.header(header::CONTENT_LENGTH).and_then(|len| len.parse::<u64>().ok());
        if let Some(found) = announced.filter(|len| *len > max) {
            return Err(WireError::Length { url: self.url, expected: max, found });
        }
        let url = self.url.clone();
        let mut stream = self.stream();
        let mut body = BytesMut::with_capacity(usize::try_from(announced.unwrap_or(0)).unwrap_or(0));
        while let Some(piece) = stream.next().await {
            let piece = piece?;
            if body.len() as u64 + piece.len() as u64 > max {
                return Err(WireError::Length {
                    url,
                    expected: max,
                    found: body.len() as u64 + piece.len() as u64,
                });
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// The body as it comes.
    pub(crate) fn stream(self) -> BoxStream<'static, Result<Bytes, WireError>> {
        let url = self.url;
        let body = self.response.into_body().into_data_stream();
        futures_util::stream::unfold((body, url, false), |(mut body, url, ended)| async move {
            if ended {
                return None;
            }
            match tokio::time::timeout(STALL, body.next()).await {
                Ok(None) => None,
                Ok(Some(Ok(piece))) => Some((Ok(piece), (body, url, false))),
                Ok(Some(Err(error))) => {
                    let broken = WireError::Unreachable { url: url.clone(), reason: reason(&error) };
                    Some((Err(broken), (body, url, true)))
                }
                Err(_) => {
                    Some((Err(WireError::Timeout { url: url.clone(), waited: STALL }), (body, url, true)))
                }
            }
        })
        .boxed()
    }
}

/// The message in an error of the distribution specification, or the beginning of whatever came instead.
fn oci_message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        code: String,
        #[serde(default)]
        message: String,
    }
    let parsed: Option<Errors> = serde_json::from_slice(body).ok();
    match parsed.and_then(|all| all.errors.into_iter().next()) {
        Some(One { code, message }) => format!("{code}: {message}"),
        None => {
            let text = String::from_utf8_lossy(body);
            let text: String = text.chars().filter(|letter| !letter.is_control()).take(200).collect();
            if text.is_empty() { "no reason given".into() } else { text }
        }
    }
}
