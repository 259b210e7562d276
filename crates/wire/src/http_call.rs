//! One HTTP request: sent, answered, read within its bounds.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::proxy::{Connector, Proxies};
use crate::tls::client_tls;
use crate::{ClientConfig, WireError};

/// What an error may say, in bytes: more is cut off.
const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// An answer may go on for as long as bytes come; this long without one ends it.
const STALL: Duration = Duration::from_secs(20);
/// Idle connections are kept this long: a mount reads in bursts.
const IDLE: Duration = Duration::from_secs(90);

/// What goes over the wire.
pub(crate) type WireBody = BoxBody<Bytes, std::io::Error>;

/// What a request carries.
pub(crate) enum Payload {
    Empty,
    Whole(Bytes),
    /// Can be sent once.
    Stream(BoxStream<'static, std::io::Result<Bytes>>),
}

impl Payload {
    /// The same once more; `None` of a stream.
    pub(crate) fn again(&self) -> Option<Self> {
        match self {
            Self::Empty => Some(Self::Empty),
            Self::Whole(bytes) => Some(Self::Whole(bytes.clone())),
            Self::Stream(_) => None,
        }
    }

    pub(crate) fn into_body(self) -> WireBody {
        match self {
            Self::Empty => Empty::new().map_err(|never| match never {}).boxed(),
            Self::Whole(bytes) => Full::new(bytes).map_err(|never| match never {}).boxed(),
            // `BoxBody` must be Sync; a stream in a mutex that nobody shares is
            Self::Stream(stream) => {
                BodyExt::boxed(StreamBody::new(SyncStream(std::sync::Mutex::new(stream)).map_ok(Frame::data)))
            }
        }
    }
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
    pool: Pool<HttpsConnector<Connector>, WireBody>,
    proxies: Proxies,
    answer: Duration,
}

impl Http {
    /// Connections to the registry at `host`, and wherever it leads.
    ///
    /// # Errors
    /// A certificate or key that cannot be used, named.
    pub(crate) fn new(config: &ClientConfig, host: &str) -> Result<Self, String> {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(config.connect));
        tcp.enforce_http(false);
        let proxies = Proxies::new(&config.access.proxy);
        let connector = HttpsConnectorBuilder::new().with_tls_config(client_tls(&config.access, host)?);
        let connector = connector.https_or_http().enable_http1();
        let connector = connector.wrap_connector(Connector { tcp, proxies: proxies.clone() });
        let pool = Pool::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(32)
            .http1_max_buf_size(1 << 20)
            .build(connector);
        Ok(Self { pool, proxies, answer: config.answer })
    }

    /// Sends a request and waits for the head of the answer, whatever its status.
    pub(crate) async fn send(&self, request: Request<WireBody>) -> Result<Answer, WireError> {
        self.send_within(request, None).await
    }

    /// The same, where the answer may take longer: behind a large body, or where the registry has to work.
    pub(crate) async fn send_within(
        &self,
        mut request: Request<WireBody>,
        within: Option<Duration>,
    ) -> Result<Answer, WireError> {
        let url = named(request.uri());
        let waited = within.unwrap_or(self.answer);
        let proxy = self.proxies.intercept(request.uri());
        if let Some(auth) = proxy.as_ref().and_then(|proxy| proxy.basic_auth())
            && request.uri().scheme_str() == Some("http")
        {
            request.headers_mut().insert(header::PROXY_AUTHORIZATION, auth.clone());
        }
        match tokio::time::timeout(waited, self.pool.request(request)).await {
            Err(_) => Err(WireError::Timeout { url, waited }),
            Ok(Err(error)) => Err(unreachable(url, proxy.map(|proxy| proxy.uri().to_string()), &error)),
            Ok(Ok(response)) => Ok(Answer { url, credential: "no credential was sent".into(), response }),
        }
    }
}

/// A URL as messages and spans have it: without its query, which is a credential where a registry sends its readers on to an object
/// store.
pub(crate) fn named(url: &Uri) -> String {
    url.to_string().split('?').next().unwrap_or_default().to_owned()
}

/// What it means that no answer came.
fn unreachable(url: String, proxy: Option<String>, error: &dyn std::error::Error) -> WireError {
    let reason = reason(error);
    // rustls quotes the first bytes of what is no TLS
    if url.starts_with("https:") && reason.contains("InvalidContentType") {
        return WireError::PlainHttp(url);
    }
    let unknown = "; nobody whom this machine trusts has signed its certificate: name its CA with --ca, or in a hosts.toml";
    // in TLS 1.3 a server that misses the client's certificate says so after the handshake, and the pool may find the
    // connection closed before it has read why
    let closed = "; it ended the connection right after the handshake, as one does that wants to see a client certificate: \
                  name one in a hosts.toml";
    let hint = match url.starts_with("https:") {
        true if reason.contains("UnknownIssuer") => unknown,
        true if reason.contains("connection was not ready") => closed,
        _ => "",
    };
    let through = proxy.map(|proxy| format!("through the proxy {proxy}: ")).unwrap_or_default();
    WireError::Unreachable { url, reason: format!("{through}{reason}{hint}") }
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
    /// What was said of the sender, for messages.
    pub(crate) credential: Arc<str>,
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
        let (url, status, credential) = (self.url.clone(), self.status().as_u16(), self.credential.clone());
        let body = self.bytes(MESSAGE_BYTES_MAX as u64).await.unwrap_or_default();
        let message = oci_message(&body);
        Err(match status {
            401 | 403 => WireError::Denied { url, status, message, credential: credential.to_string() },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_error_does_not_tell_the_query_of_its_url() {
        let http = Http::new(&ClientConfig::default(), "127.0.0.1:1").expect("no certificate is named");
        // nothing listens there
        let request = Request::get("http://127.0.0.1:1/blob?X-Amz-Signature=secret");
        let request = request.body(Payload::Empty.into_body()).expect("a request");
        let Err(error) = http.send(request).await else { panic!("somebody answered") };
        let said = error.to_string();
        assert!(said.contains("http://127.0.0.1:1/blob:") && !said.contains("secret"), "{said}");
    }
}
