//! The other end of the control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use lamina_wire::proto::{
    CONTENT_TYPE, MountRequest, MountResponse, StatsRequest, StatsResponse, UnmountRequest, UnmountResponse,
};
use prost::Message;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Answers are small: a thousand mounts with their counters.
const ANSWER_BYTES_MAX: usize = 16 << 20;
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
        self.call("mount", request).await
    }

    /// Unmounts a directory.
    pub async fn unmount(&self, request: &UnmountRequest) -> Result<UnmountResponse, ControlError> {
        self.call("unmount", request).await
    }

    /// All counters.
    pub async fn stats(&self) -> Result<StatsResponse, ControlError> {
        self.call("stats", &StatsRequest {}).await
    }

    async fn call<Q: Message, A: Message + Default>(
        &self,
        what: &str,
        question: &Q,
    ) -> Result<A, ControlError> {
        let broken = |reason: String| ControlError::Broken { socket: self.socket.clone(), reason };
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ControlError::NoDaemon(self.socket.parent().unwrap_or(&self.socket).to_owned())
            }
            _ => broken(error.to_string()),
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(error.to_string()))?;
        let request = Request::post(format!("/lamina/v1/{what}"))
            .header(header::HOST, "node")
            .header(header::CONTENT_TYPE, CONTENT_TYPE)
            .body(Full::new(Bytes::from(question.encode_to_vec())))
            .expect("all parts are valid");
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|error| broken(error.to_string()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            Ok((status, body.map_err(|error| broken(error.to_string()))?.to_bytes()))
        };
        let answered = async {
            tokio::select! {
                biased;
                answer = exchange => answer,
                ended = connection => Err(broken(ended.err().map_or("it hung up".into(), |error| error.to_string()))),
            }
        };
        let (status, body) =
            timeout(ANSWER, answered).await.map_err(|_| broken(format!("no answer within {ANSWER:?}")))??;
        match status {
            StatusCode::OK => A::decode(body).map_err(|error| broken(error.to_string())),
            _ => Err(ControlError::Failed(String::from_utf8_lossy(&body).into_owned())),
        }
    }
}
