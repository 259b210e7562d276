//! The control socket.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use lamina_wire::proto::{MountRequest, StatsRequest, UnmountRequest};
use prost::Message;
use tokio::net::UnixListener;
use tokio::time::timeout;

use crate::{Node, NodeError};

/// Requests on the socket are small.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// A connection that says nothing for so long is closed.
const HEAD: Duration = Duration::from_secs(10);
/// After the last mount the daemon waits this long for another: scripts unmount and mount again.
const LINGER: Duration = Duration::from_secs(2);

/// Serves the node on a socket in its cache directory, which only root and its own user may use.
///
/// Returns when `shutdown` is ready, having unmounted everything; with `idle_exit` also some seconds after the last
/// mount has gone. `ready` is called once the socket answers.
pub async fn serve(
    node: Arc<Node>,
    socket: &Path,
    idle_exit: bool,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), NodeError> {
    let failed = |error| NodeError::File { path: socket.to_owned(), error };
    // the cache's lock says that no other daemon is there, so a socket that is left belongs to a dead one
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    ready();
    tokio::select! {
        () = accept(&listener, &node) => {}
        () = idle(&node), if idle_exit => {}
        () = shutdown => {}
    }
    // whoever comes now finds no socket and starts another daemon, which waits for this one's lock
    let _ = std::fs::remove_file(socket);
    node.unmount_all().await;
    Ok(())
}

/// Ready when there was no mount and no request for a while.
async fn idle(node: &Node) {
    let mut count = node.count();
    loop {
        if count.wait_for(|count| *count == 0).await.is_err() {
            return;
        }
        if timeout(LINGER, count.wait_for(|count| *count > 0)).await.is_err() {
            return;
        }
    }
}

async fn accept(listener: &UnixListener, node: &Arc<Node>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let node = Arc::clone(node);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&node, request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a control connection ended early");
            }
        });
    }
}

async fn answer(node: &Arc<Node>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let plain = |status: StatusCode, message: String| {
        let mut response = Response::new(Full::new(Bytes::from(message)));
        *response.status_mut() = status;
        response
    };
    if request.method() != Method::POST {
        return Ok(plain(StatusCode::METHOD_NOT_ALLOWED, "requests are POST".into()));
    }
    let body = match timeout(HEAD, Limited::new(request.into_body(), REQUEST_BYTES_MAX).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        _ => return Ok(plain(StatusCode::BAD_REQUEST, "the request did not come whole".into())),
    };
    let _busy = node.busy();
    Ok(match dispatch(node, &path, body).await {
        Ok(message) => Response::new(Full::new(Bytes::from(message))),
        Err(Refused::Unknown) => plain(StatusCode::NOT_FOUND, format!("{path} is nothing that a node does")),
        Err(Refused::Garbage(error)) => plain(StatusCode::BAD_REQUEST, error.to_string()),
        Err(Refused::Failed(error)) => plain(StatusCode::CONFLICT, error.to_string()),
    })
}

/// Why there is no answer.
enum Refused {
    Unknown,
    Garbage(prost::DecodeError),
    Failed(NodeError),
}

impl From<prost::DecodeError> for Refused {
    fn from(error: prost::DecodeError) -> Self {
        Self::Garbage(error)
    }
}

impl From<NodeError> for Refused {
    fn from(error: NodeError) -> Self {
        Self::Failed(error)
    }
}

async fn dispatch(node: &Arc<Node>, path: &str, body: Bytes) -> Result<Vec<u8>, Refused> {
    Ok(match path {
        "/lamina/v1/mount" => node.mount(MountRequest::decode(body)?).await?.encode_to_vec(),
        "/lamina/v1/unmount" => {
            let request = UnmountRequest::decode(body)?;
            node.unmount(&PathBuf::from(request.directory), request.lazy).await?.encode_to_vec()
        }
        "/lamina/v1/stats" => {
            let StatsRequest {} = StatsRequest::decode(body)?;
            node.stats().encode_to_vec()
        }
        _ => return Err(Refused::Unknown),
    })
}
