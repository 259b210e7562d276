//! A real S3 server on a loopback port: `s3s` speaks the protocol (signatures, XML, multipart), `s3s-fs` keeps the
//! objects in a directory.
//!
//! Why this one: Garage cannot do conditional writes, since its replicas never agree on an order. `s3s-fs` honours
//! `If-None-Match` and `If-Match`, but looks and writes in two steps, and copies in place; Amazon does each at once. So
//! `Atomic` puts a lock around conditional writes and makes a copy a new object, and lists by directory, since
//! `s3s-fs` walks through the whole bucket for each list. It can also be slow, and refuse with 503 as Amazon does.

mod atomic;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::net::{TcpListener, TcpStream};

use self::atomic::Atomic;

/// The bucket that is there.
pub const BUCKET: &str = "bucket";

/// A server, until it is dropped.
#[derive(Debug)]
pub struct S3 {
    address: SocketAddr,
    faults: Arc<Faults>,
    // the server's threads end with it
    runtime: Option<tokio::runtime::Runtime>,
    directory: tempfile::TempDir,
}

#[derive(Debug, Default)]
struct Faults {
    /// Requests so far.
    requests: AtomicU64,
    /// Of so many requests one is refused with 503; 0 for none.
    refuse_every: AtomicU64,
    /// Each answer comes so much later, in milliseconds.
    late_ms: AtomicU64,
}

impl S3 {
    /// Starts a server with an empty bucket.
    pub fn start() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        std::fs::create_dir(directory.path().join(BUCKET))?;
        let mut builder = S3ServiceBuilder::new(Atomic::new(directory.path())?);
        builder.set_auth(SimpleAuth::from_single("key", "secret"));
        let (service, faults) = (builder.build(), Arc::new(Faults::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let served = Arc::clone(&faults);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it is a listener that does not block");
            accept(listener, service, served).await;
        });
        Ok(Self { address, faults, runtime: Some(runtime), directory })
    }

    /// Where `lamina` finds a store below `prefix`.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What must be in the environment of whoever uses it.
    pub fn settings(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.address);
        let pairs = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_REGION", "us-east-1"),
        ];
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// The directory that holds the bucket's objects under their keys.
    pub fn objects(&self) -> std::path::PathBuf {
        self.directory.path().join(BUCKET)
    }

    /// Of so many requests from now on one is refused with 503 and changes nothing; 0 for none.
    pub fn refuse_every(&self, requests: u64) {
        self.faults.refuse_every.store(requests, Ordering::Relaxed);
    }

    /// From now on each answer comes so much later.
    pub fn answer_late(&self, by: Duration) {
        self.faults.late_ms.store(by.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How many requests have come.
    pub fn requests(&self) -> u64 {
        self.faults.requests.load(Ordering::Relaxed)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // may be dropped inside another runtime, where waiting is not allowed
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, service: S3Service, faults: Arc<Faults>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, service.clone(), Arc::clone(&faults)));
    }
}

async fn serve(stream: TcpStream, service: S3Service, faults: Arc<Faults>) {
    let _ = stream.set_nodelay(true);
    let answer = hyper::service::service_fn(move |request: Request<Incoming>| {
        let (service, faults) = (service.clone(), Arc::clone(&faults));
        async move { Ok::<_, Infallible>(answer(request, &service, &faults).await) }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
    // a client that goes away ends it early
    let _ = connection.await;
}

async fn answer(request: Request<Incoming>, service: &S3Service, faults: &Faults) -> Response<s3s::Body> {
    let number = faults.requests.fetch_add(1, Ordering::Relaxed) + 1;
    let late = Duration::from_millis(faults.late_ms.load(Ordering::Relaxed));
    if !late.is_zero() {
        tokio::time::sleep(late).await;
    }
    let every = faults.refuse_every.load(Ordering::Relaxed);
    if every > 0 && number.is_multiple_of(every) {
        return failed(503, "SlowDown");
    }
    match service.call(request.map(s3s::Body::from)).await {
        Ok(response) => response,
        Err(_) => failed(500, "InternalError"),
    }
}

fn failed(status: u16, code: &str) -> Response<s3s::Body> {
    let text = format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>");
    let response = Response::builder().status(status).body(s3s::Body::from(text));
    response.expect("a status and a body")
}

/// The path of an object below a server's directory.
fn file(root: &Path, bucket: &str, key: &str) -> std::path::PathBuf {
    root.join(bucket).join(key)
}
