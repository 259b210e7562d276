//! The OCI Distribution client: manifests, referrers, blobs, ranges.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backon::{ExponentialBuilder, Retryable};
use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, TryStreamExt, future};
use http::{Method, Request, StatusCode, Uri, header};
use lamina_chunk::{MOVED_BYTES_MAX, PackId};
use lamina_image::{Digest, Hasher, MANIFEST_BYTES_MAX, media_type};

use crate::access::Access;
use crate::auth::{Auth, Need, Sent};
use crate::http_call::{Answer, Http, Payload};
use crate::{Version, WireError};

/// Redirects that are followed for one blob: object stores need one.
const REDIRECTS_MAX: usize = 5;
/// How long an upload, or the registry's check of an image, may take: 20 GB at 100 Mbit/s.
const UPLOAD: Duration = Duration::from_secs(1800);
/// A range's buffer is reserved at once up to 1 MiB; beyond it grows with what comes.
const RANGE_RESERVED: usize = 1 << 20;

/// What is taken for a manifest or an index.
pub(crate) const MANIFESTS: [&str; 4] =
    [media_type::OCI_MANIFEST, media_type::OCI_INDEX, media_type::DOCKER_MANIFEST, media_type::DOCKER_INDEX];

pub(crate) const USER_AGENT: &str = concat!("lamina/", env!("CARGO_PKG_VERSION"));

/// How a registry is spoken to, unless its [`HostAccess`](crate::HostAccess) says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// TLS, but plain HTTP on loopback addresses and `localhost`.
    Automatic,
    /// TLS everywhere.
    Tls,
    /// Plain HTTP everywhere.
    PlainHttp,
}

/// Settings of a client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// TLS or not.
    pub scheme: Scheme,
    /// What it takes to be let in.
    pub access: Arc<Access>,
    /// How long a connection may take to come about.
    pub connect: Duration,
    /// How long the head of an answer may take.
    pub answer: Duration,
    /// How many times a request that may be repeated is sent at most.
    pub tries: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        let (connect, answer) = (Duration::from_secs(5), Duration::from_secs(30));
        Self { scheme: Scheme::Automatic, access: Arc::default(), connect, answer, tries: 4 }
    }
}

/// A blob that is on its way.
pub struct Blob {
    /// How long it is, where the registry said so.
    pub len: Option<u64>,
    /// Its bytes. Nothing is verified: whoever reads to the end hashes.
    pub bytes: BoxStream<'static, Result<Bytes, WireError>>,
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({:?} bytes)", self.len)
    }
}

/// What a registry answers when it is only asked whether it is there.
#[derive(Clone, Copy, Debug)]
pub struct Pong {
    /// The HTTP status: 200, or 401 where it wants to know who asks.
    pub status: u16,
    /// Its clock, to the second.
    pub date: Option<SystemTime>,
}

/// A manifest or index as it came, matched against its digest where one was asked for.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What the registry calls it.
    pub media_type: String,
    /// The digest that was asked for; of a tag, the sha256 of the bytes.
    pub digest: Digest,
    /// The document.
    pub bytes: Bytes,
}

impl Fetched {
    /// What a registry has answered to who asked for this version.
    pub(crate) async fn from_answer(answer: Answer, version: &Version) -> Result<Self, WireError> {
        let (url, media_type) = (answer.url.clone(), media_type_of(&answer));
        Self::checked(url, media_type, answer.bytes(MANIFEST_BYTES_MAX as u64).await?, version)
    }

    /// These bytes, if they are this version.
    pub(crate) fn checked(
        url: String,
        media_type: String,
        bytes: Bytes,
        version: &Version,
    ) -> Result<Self, WireError> {
        let digest = match version {
            Version::Digest(digest) if !digest.names(&bytes) => {
                return Err(WireError::WrongBytes { url, digest: *digest });
            }
            Version::Digest(digest) => *digest,
            Version::Tag(_) => Digest::of(&bytes),
        };
        Ok(Self { media_type, digest, bytes })
    }
}

/// What an answer says that its body is, without parameters.
pub(crate) fn media_type_of(answer: &Answer) -> String {
    let media_type = answer.header(header::CONTENT_TYPE).unwrap_or_default();
    media_type.split(';').next().unwrap_or_default().trim().to_owned()
}

/// One repository's registry, as seen from here. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    http: Arc<Http>,
    auth: Arc<Auth>,
    base: String,
    config: ClientConfig,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.base)
    }
}

impl Client {
    /// A client of the registry at `host[:port]`. Nothing is sent yet, but certificates that the settings name are read. Must be called inside a tokio
    /// runtime.
    pub fn new(host: &str, config: ClientConfig) -> Result<Self, WireError> {
        let special = config.access.hosts.get(host);
        let plain = match config.scheme {
            Scheme::PlainHttp => true,
            Scheme::Tls => false,
            Scheme::Automatic => is_loopback(host) && special.is_none(),
        };
        let server = special.and_then(|special| special.server.clone());
        // docker.io is a name, not a machine that serves images
        let address = if host == "docker.io" { "registry-1.docker.io" } else { host };
        let base = server.unwrap_or_else(|| format!("{}://{address}", if plain { "http" } else { "https" }));
        let http = Http::new(&config, host);
        let http = http.map_err(|reason| WireError::Configured { host: host.to_owned(), reason })?;
        let http = Arc::new(http);
        let files = config.access.credentials.clone();
        let auth = Arc::new(Auth::new(Arc::clone(&http), host, base.starts_with("https:"), files));
        Ok(Self { http, auth, base, config })
    }

    /// The same client, over the same connections, that sends a request at most `tries` times: for whoever decides itself
    /// when to ask again, and whom.
    pub fn with_tries(&self, tries: usize) -> Self {
        Self { config: ClientConfig { tries, ..self.config.clone() }, ..self.clone() }
    }

    /// Whether anybody who speaks HTTP is there and well, whatever it says of us. One small request.
    pub async fn ping(&self) -> Result<Pong, WireError> {
        let url = format!("{}/v2/", self.base);
        // without saying who is asking: nobody who guards it need be there as well
        let request = Request::get(&url).body(Payload::Empty.into_body());
        let request =
            request.map_err(|error| WireError::Answer { url: url.clone(), reason: error.to_string() })?;
        let answer = self.http.send(request).await?;
        let status = answer.status().as_u16();
        if status >= 500 {
            return Err(WireError::Status { url, status, message: "it is not well".into() });
        }
        let date = answer.header(header::DATE).and_then(|date| httpdate::parse_http_date(date).ok());
        Ok(Pong { status, date })
    }

    /// `http[s]://host[:port]`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The digest of a manifest or index, as the registry says it, without fetching it; `None` where it does not say.
    pub async fn manifest_digest(
        &self,
        repository: &str,
        version: &Version,
    ) -> Result<Option<Digest>, WireError> {
        let url = self.manifest_url(repository, version);
        self.retrying(|| async {
            let request = Request::head(&url).header(header::ACCEPT, MANIFESTS.join(", "));
            let answer = self.call(request, Payload::Empty).await?.expect(&[StatusCode::OK]).await?;
            let said = answer.header(header::HeaderName::from_static("docker-content-digest"));
            Ok(said.and_then(|digest| digest.parse().ok()))
        })
        .await
    }

    /// The manifest or index of an image. One request.
    pub async fn manifest(&self, repository: &str, version: &Version) -> Result<Fetched, WireError> {
        let url = self.manifest_url(repository, version);
        self.retrying(|| async {
            let request = Request::get(&url).header(header::ACCEPT, MANIFESTS.join(", "));
            let answer = self.call(request, Payload::Empty).await?.expect(&[StatusCode::OK]).await?;
            Fetched::from_answer(answer, version).await
        })
        .await
    }

    pub(crate) fn manifest_url(&self, repository: &str, version: &Version) -> String {
        format!("{}/v2/{repository}/manifests/{version}", self.base)
    }

    /// Whether the registry has this blob.
    pub async fn has_blob(&self, repository: &str, digest: Digest) -> Result<bool, WireError> {
        self.has(self.blob_url(repository, digest)).await
    }

    async fn has(&self, url: String) -> Result<bool, WireError> {
        self.retrying(|| async {
            let answer = self.call(Request::head(&url), Payload::Empty).await?;
            if answer.status() == StatusCode::NOT_FOUND {
                return Ok(false);
            }
            answer.expect(&[StatusCode::OK]).await.map(|_| true)
        })
        .await
    }

    /// How long a blob is, in bytes, as whoever has it says.
    pub async fn blob_len(&self, repository: &str, digest: Digest) -> Result<u64, WireError> {
        let url = self.blob_url(repository, digest);
        self.retrying(|| async {
            let answer = self.following(Method::HEAD, &url, None).await?.expect(&[StatusCode::OK]).await?;
            let len = answer.header(header::CONTENT_LENGTH).and_then(|len| len.parse().ok());
            let silent = || WireError::Answer {
                url: url.clone(),
                reason: "it does not say how long the blob is".into(),
            };
            len.ok_or_else(silent)
        })
        .await
    }

    /// A whole blob of at most `max` bytes, verified.
    pub async fn blob(&self, repository: &str, digest: Digest, max: u64) -> Result<Bytes, WireError> {
        let url = self.blob_url(repository, digest);
        self.retrying(|| async {
            let answer = self.following(Method::GET, &url, None).await?.expect(&[StatusCode::OK]).await?;
            let bytes = answer.bytes(max).await?;
            match digest.names(&bytes) {
                true => Ok(bytes),
                false => Err(WireError::WrongBytes { url: url.clone(), digest }),
            }
        })
        .await
    }

    /// A blob as it comes. The stream ends in an error where the bytes do not hash to the digest.
    pub async fn blob_stream(&self, repository: &str, digest: Digest) -> Result<Blob, WireError> {
        let url = self.blob_url(repository, digest);
        let open =
            || async { self.following(Method::GET, &url, None).await?.expect(&[StatusCode::OK]).await };
        let answer = self.retrying(open).await?;
        let len = answer.header(header::CONTENT_LENGTH).and_then(|len| len.parse().ok());
        let state = (answer.stream(), Some(Hasher::new(digest.algorithm())), url);
        let bytes = futures_util::stream::unfold(state, move |(mut stream, hasher, url)| async move {
            let mut hasher = hasher?;
            match stream.next().await {
                Some(Ok(piece)) => {
                    hasher.update(&piece);
                    Some((Ok(piece), (stream, Some(hasher), url)))
                }
                Some(Err(error)) => Some((Err(error), (stream, None, url))),
                None if hasher.finish() == digest => None,
                None => Some((Err(WireError::WrongBytes { url: url.clone(), digest }), (stream, None, url))),
            }
        });
        Ok(Blob { len, bytes: bytes.boxed() })
    }

    /// Exactly the bytes of `range`. They are not verified: whoever knows what they are opens them.
    pub async fn blob_range(
        &self,
        repository: &str,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<Bytes, WireError> {
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        self.retrying(|| async {
            let mut stream = self.range_once(repository, digest, range.clone()).await?;
            let mut bytes = BytesMut::with_capacity(len.min(RANGE_RESERVED));
            while let Some(piece) = stream.try_next().await? {
                bytes.extend_from_slice(&piece);
            }
            Ok(bytes.freeze())
        })
        .await
    }

    /// The bytes of `range` as they come. Asked for again only while nothing has come; ends in an error where more or
    /// fewer come.
    pub async fn blob_range_stream(
        &self,
        repository: &str,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, WireError>>, WireError> {
        self.retrying(|| self.range_once(repository, digest, range.clone())).await
    }

    /// The bytes from `start` to the blob's end as they come, however many these are. Asked for again only while nothing has come. They
    /// are not verified.
    pub async fn blob_rest_stream(
        &self,
        repository: &str,
        digest: Digest,
        start: u64,
    ) -> Result<BoxStream<'static, Result<Bytes, WireError>>, WireError> {
        self.retrying(|| async { Ok(self.part(repository, digest, start, None).await?.1.boxed()) }).await
    }

    async fn range_once(
        &self,
        repository: &str,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, WireError>>, WireError> {
        let (url, bytes) = self.part(repository, digest, range.start, Some(range.end - 1)).await?;
        Ok(exactly(url, bytes, range.end - range.start).boxed())
    }

    /// What is asked for, and its bytes from `first` on, up to `last` or the end; but where a registry ignores ranges, more than that.
    async fn part(
        &self,
        repository: &str,
        digest: Digest,
        first: u64,
        last: Option<u64>,
    ) -> Result<(String, impl Stream<Item = Result<Bytes, WireError>> + use<>), WireError> {
        let url = self.blob_url(repository, digest);
        let last = last.map(|last| last.to_string()).unwrap_or_default();
        let answer = self.following(Method::GET, &url, Some(&format!("bytes={first}-{last}"))).await?;
        let answer = answer.expect(&[StatusCode::PARTIAL_CONTENT, StatusCode::OK]).await?;
        let skip = if answer.status() == StatusCode::OK { first } else { 0 };
        Ok((answer.url.clone(), behind(answer.stream(), skip)))
    }

    /// Where the frames of a pack have gone that a Lamina registry has repacked, as [`lamina_chunk::Moved`] has the bytes.
    /// *Errors*: [`WireError::is_not_found`] where it was not, and from registries of another kind.
    pub async fn moved(&self, repository: &str, pack: PackId) -> Result<Bytes, WireError> {
        let url = format!("{}/lamina/v1/{repository}/moved/{pack}", self.base);
        self.retrying(|| async {
            let answer = self.call(Request::get(&url), Payload::Empty).await?;
            answer.expect(&[StatusCode::OK]).await?.bytes(MOVED_BYTES_MAX as u64).await
        })
        .await
    }

    pub(crate) fn blob_url(&self, repository: &str, digest: Digest) -> String {
        format!("{}/v2/{repository}/blobs/{digest}", self.base)
    }

    /// A GET or HEAD that follows redirects to where the bytes really are.
    async fn following(&self, method: Method, url: &str, range: Option<&str>) -> Result<Answer, WireError> {
        let mut target: Uri = url
            .parse()
            .map_err(|_| WireError::Answer { url: url.into(), reason: "this is not a URL".into() })?;
        for _ in 0..=REDIRECTS_MAX {
            let mut request = Request::builder().method(&method).uri(&target);
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            let answer = self.call(request, Payload::Empty).await?;
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            target = answer.location()?;
        }
        Err(WireError::Answer { url: url.into(), reason: "it redirects in circles".into() })
    }

    /// Sends one request, and once more where the registry wants to know who is asking.
    pub(crate) async fn call(
        &self,
        request: http::request::Builder,
        payload: Payload,
    ) -> Result<Answer, WireError> {
        self.send(request, payload, None).await
    }

    /// The same for a request whose body takes long to send, or whose answer takes the registry long to find.
    pub(crate) async fn upload(
        &self,
        request: http::request::Builder,
        payload: Payload,
    ) -> Result<Answer, WireError> {
        self.send(request, payload, Some(UPLOAD)).await
    }

    async fn send(
        &self,
        request: http::request::Builder,
        payload: Payload,
        within: Option<Duration>,
    ) -> Result<Answer, WireError> {
        let request = request.header(header::USER_AGENT, USER_AGENT).body(()).map_err(|error| {
            let reason = format!("no request can be made of this: {error}");
            WireError::Answer { url: self.base.clone(), reason }
        })?;
        // where a redirect leads, nobody is told who is asking
        if !self.is_ours(request.uri()) {
            return self.http.send_within(request.map(|()| payload.into_body()), within).await;
        }
        let need = Need::of(request.method(), request.uri().path());
        let again = payload.again();
        let sent = self.auth.header(&need).await;
        let answer = self.send_as(request.clone(), payload, sent.as_ref(), within).await?;
        let Some(payload) = again.filter(|_| answer.status() == StatusCode::UNAUTHORIZED) else {
            return Ok(answer);
        };
        match self.auth.answer(&need, answer.response.headers(), sent.as_ref()).await? {
            None => Ok(answer),
            better => self.send_as(request, payload, better.as_ref(), within).await,
        }
    }

    async fn send_as(
        &self,
        request: Request<()>,
        payload: Payload,
        sent: Option<&Sent>,
        within: Option<Duration>,
    ) -> Result<Answer, WireError> {
        let mut request = request.map(|()| payload.into_body());
        if let Some(sent) = sent {
            request.headers_mut().insert(header::AUTHORIZATION, sent.header.clone());
        }
        let mut answer = self.http.send_within(request, within).await?;
        answer.credential = match sent {
            Some(sent) => Arc::clone(&sent.origin),
            None => self.auth.nobody().into(),
        };
        Ok(answer)
    }

    fn is_ours(&self, url: &Uri) -> bool {
        let text = url.to_string();
        text.strip_prefix(&self.base).is_some_and(|rest| rest.starts_with('/'))
    }

    /// Repeats what may be repeated: after 50 ms, then twice as long each time, with jitter.
    pub(crate) async fn retrying<T, F>(&self, attempt: impl FnMut() -> F) -> Result<T, WireError>
    where
        F: Future<Output = Result<T, WireError>>,
    {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(2))
            .with_max_times(self.config.tries.saturating_sub(1))
            .with_jitter();
        attempt
            .retry(backoff)
            .when(WireError::is_passing)
            .notify(|error, pause| tracing::debug!(%error, ?pause, "asking again"))
            .await
    }
}

/// What comes after the first `skip` bytes.
fn behind(
    pieces: BoxStream<'static, Result<Bytes, WireError>>,
    mut skip: u64,
) -> impl Stream<Item = Result<Bytes, WireError>> {
    pieces.try_filter_map(move |mut piece| {
        let dropped = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
        skip -= dropped as u64;
        bytes::Buf::advance(&mut piece, dropped);
        future::ok((!piece.is_empty()).then_some(piece))
    })
}

/// The first `len` bytes of what `url` answers; an error where it ends before. What follows is dropped, and nobody is
/// misled by it: the bytes are verified by whoever asked.
fn exactly(
    url: String,
    pieces: impl Stream<Item = Result<Bytes, WireError>> + Send + 'static,
    len: u64,
) -> impl Stream<Item = Result<Bytes, WireError>> + Send {
    futures_util::stream::try_unfold((pieces.boxed(), len), move |(mut pieces, left)| {
        let url = url.clone();
        async move {
            if left == 0 {
                return Ok(None);
            }
            let Some(mut piece) = pieces.try_next().await? else {
                return Err(WireError::Length { url, expected: len, found: len - left });
            };
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            let left = left - piece.len() as u64;
            Ok(Some((piece, (pieces, left))))
        }
    })
}

/// Whether a host is this machine itself, by address or by the one name that always is.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}
