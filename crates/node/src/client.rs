//! The other end of the control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task;
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use lamina_wire::proto::node_client::NodeClient;
use lamina_wire::proto::{
    FillRequest, FillResponse, MountRequest, MountResponse, PinRequest, PinResponse, PrefetchRequest,
    PrefetchResponse, ProcessRequest, ProcessResponse, StatsRequest, StatsResponse, UnmountRequest,
    UnmountResponse, UpgradeRequest, UpgradeResponse,
};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::{Code, Status};

/// Answers are small: a thousand mounts with their counters.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// A message for people comes as a header; it may quote what a registry said.
const HEADERS_BYTES_MAX: u32 = 256 << 10;
/// The daemon's own deadlines are shorter.
const ANSWER: Duration = Duration::from_secs(300);

/// Why the daemon was not heard, or what it said.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No daemon listens there.
    #[error("no node is running for cache {0:?}; nothing is mounted from it")]
    NoDaemon(PathBuf),
    /// The connection broke or the answer makes no sense.
    #[error("the node at {socket:?} does not answer: {reason}")]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The daemon is of a version that knows no such call.
    #[error(
        "the node at {0:?} is of an earlier version and does not know what is asked; `lamina node upgrade` puts this one in its place"
    )]
    Earlier(PathBuf),
    /// The daemon could not do it.
    #[error("{0}")]
    Failed(String),
}

/// Speaks to the daemon of one cache directory. Each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Controller {
    socket: PathBuf,
}

impl Controller {
    /// The daemon of the cache in `directory`. Nothing is sent yet.
    pub fn new(directory: &Path) -> Self {
        Self { socket: Self::socket(directory) }
    }

    /// Where the daemon of the cache in `directory` listens.
    pub fn socket(directory: &Path) -> PathBuf {
        directory.join("node.sock")
    }

    /// Mounts an image.
    pub async fn mount(&self, request: &MountRequest) -> Result<MountResponse, ControlError> {
        let request = request.clone();
        self.call(async move |mut node| node.mount(request).await).await
    }

    /// How an image wants its programs run.
    pub async fn process(&self, request: &ProcessRequest) -> Result<ProcessResponse, ControlError> {
        let request = request.clone();
        self.call(async move |mut node| node.process(request).await).await
    }

    /// Unmounts a directory.
    pub async fn unmount(&self, request: &UnmountRequest) -> Result<UnmountResponse, ControlError> {
        let request = request.clone();
        self.call(async move |mut node| node.unmount(request).await).await
    }

    /// All counters.
    pub async fn stats(&self) -> Result<StatsResponse, ControlError> {
        self.mount_stats("").await
    }

    /// The same, and what became of the pages that the boot pack of the mount at `directory` stored.
    pub async fn mount_stats(&self, directory: &str) -> Result<StatsResponse, ControlError> {
        let request = StatsRequest { directory: directory.to_owned() };
        self.call(async move |mut node| node.stats(request).await).await
    }

    /// Puts another program in the daemon's place.
    pub async fn upgrade(&self, program: String) -> Result<UpgradeResponse, ControlError> {
        self.call(async move |mut node| node.upgrade(UpgradeRequest { program }).await).await
    }

    /// Begins to bring an image to disk.
    pub async fn prefetch(&self, request: &PrefetchRequest) -> Result<PrefetchResponse, ControlError> {
        let request = request.clone();
        self.call(async move |mut node| node.prefetch(request).await).await
    }

    /// Pauses, resumes or cancels filling.
    pub async fn fill(&self, request: &FillRequest) -> Result<FillResponse, ControlError> {
        let request = request.clone();
        self.call(async move |mut node| node.fill(request).await).await
    }

    /// Pins an image, takes a pin away, or lists pins.
    pub async fn pin(&self, request: &PinRequest) -> Result<PinResponse, ControlError> {
        let request = request.clone();
        self.call(async move |mut node| node.pin(request).await).await
    }

    async fn call<A>(
        &self,
        ask: impl AsyncFnOnce(NodeClient<Sender>) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, ControlError> {
        let broken = |reason: String| ControlError::Broken { socket: self.socket.clone(), reason };
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ControlError::NoDaemon(self.socket.parent().unwrap_or(&self.socket).to_owned())
            }
            _ => broken(error.to_string()),
        })?;
        let answered = async {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .max_header_list_size(HEADERS_BYTES_MAX)
                .handshake(TokioIo::new(stream))
                .await
                .map_err(|error| broken(error.to_string()))?;
            // nothing in it names the socket; the host of a request must have some name
            let origin = Uri::from_static("http://node");
            let node =
                NodeClient::with_origin(Sender(sender), origin).max_decoding_message_size(ANSWER_BYTES_MAX);
            // the request first: it may have been answered before the connection broke
            let answer = tokio::select! {
                biased;
                answer = ask(node) => answer,
                ended = connection => {
                    let reason = ended.err().map_or("it hung up".into(), |error| error.to_string());
                    return Err(broken(reason));
                }
            };
            match answer {
                Ok(answer) => Ok(answer.into_inner()),
                Err(status) if status.code() == Code::FailedPrecondition => {
                    Err(ControlError::Failed(status.message().to_owned()))
                }
                Err(status) if status.code() == Code::Unimplemented => {
                    Err(ControlError::Earlier(self.socket.clone()))
                }
                Err(status) => Err(broken(status.message().to_owned())),
            }
        };
        timeout(ANSWER, answered).await.map_err(|_| broken(format!("no answer within {ANSWER:?}")))?
    }
}

/// A connection as tonic wants it.
struct Sender(http2::SendRequest<Body>);

impl tower_service::Service<Request<Body>> for Sender {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> task::Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    use hyper::server::conn::http2 as server;
    use hyper::service::service_fn;
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_node_that_does_not_know_a_call_is_said_to_be_of_an_earlier_version() {
        let cache = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(Controller::socket(cache.path())).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            // as every gRPC server answers what it does not know
            let unknown = async |_| {
                let answer = Response::builder()
                    .header("content-type", "application/grpc")
                    .header("grpc-status", "12");
                answer.body(Body::empty())
            };
            let _ = server::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service_fn(unknown))
                .await;
        });
        let answer = Controller::new(cache.path()).process(&ProcessRequest::default()).await;
        let error = answer.expect_err("it does not know");
        assert!(matches!(error, ControlError::Earlier(_)), "{error}");
        assert!(error.to_string().contains("lamina node upgrade"), "{error}");
    }
}
