//! The control socket.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use lamina_wire::proto;
use lamina_wire::proto::node_server::NodeServer;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use tonic::{Request, Response, Status};
use tracing::{debug, info};

use crate::{Node, NodeError, Restored};

/// What the socket is called where it is kept.
const CONTROL: &str = "control";
/// Requests on the socket are small.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// A client that has been silent for so long is asked whether it is there,
const SILENCE: Duration = Duration::from_secs(30);
/// and has this long to say so.
const ANSWER: Duration = Duration::from_secs(10);
/// Commands at once; more wait to be heard. A thousand mounts are made by that many at a time.
const CLIENTS_MAX: usize = 128;
/// After the last mount the daemon waits this long for another: scripts unmount and mount again.
const LINGER: Duration = Duration::from_secs(2);

/// Serves the node on a socket in its cache directory, which only root and its own user may use.
///
/// Mounts that the daemon before had are there before anybody is heard; `ready` is called then. Returns when `shutdown` is ready,
/// having unmounted everything; with `idle_exit` also some seconds after the last mount has gone. Returns as well, and leaves the
/// mounts alone, once another program is to take its place.
pub async fn serve(
    node: Arc<Node>,
    socket: &Path,
    idle_exit: bool,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), NodeError> {
    let listener =
        listen(&node, socket).map_err(|error| NodeError::File { path: socket.to_owned(), error })?;
    let restored = if node.held.is_held() { node.restore().await } else { Restored::default() };
    if restored != Restored::default() {
        info!(?restored, "mounts of the daemon before");
    }
    node.held.ready();
    ready();
    tokio::select! {
        () = accept(&listener, &node) => return Ok(()),
        () = idle(&node), if idle_exit => {}
        () = shutdown => {}
    }
    // whoever comes now finds no socket and starts another daemon, which waits for this one's lock
    if node.cache.is_in_place() {
        let _ = std::fs::remove_file(socket);
    }
    node.unmount_all().await;
    node.held.done();
    Ok(())
}

/// The socket: one that a dead daemon listened on, where it was kept, so that whoever asks meanwhile only waits.
fn listen(node: &Node, socket: &Path) -> io::Result<UnixListener> {
    if let Some(kept) = node.held.find(CONTROL) {
        let listener = std::os::unix::net::UnixListener::from(kept.try_clone()?);
        listener.set_nonblocking(true)?;
        return UnixListener::from_std(listener);
    }
    // the cache's lock says that no other daemon is there, so a socket that is left belongs to a dead one
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    node.held.keep(CONTROL, listener.as_fd().try_clone_to_owned()?);
    Ok(listener)
}

/// Ready when there was no mount and no request for a while.
async fn idle(node: &Node) {
    let mut count = node.count();
    loop {
        if count.wait_for(|count| *count == 0).await.is_err() {
            return;
        }
        // also something that came and is over: who asked for it may be about to ask for more
        if timeout(LINGER, count.changed()).await.is_err() {
            return;
        }
    }
}

/// Hears whoever comes. Returns when another program is to take this one's place, and whoever asked for that knows.
async fn accept(listener: &UnixListener, node: &Arc<Node>) {
    let clients = Arc::new(Semaphore::new(CLIENTS_MAX));
    let gone = Arc::new(Notify::new());
    loop {
        let client = Arc::clone(&clients).acquire_owned().await.expect("it is never closed");
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            () = gone.notified(), if node.is_replaced() => return,
        };
        let Ok((stream, _)) = stream else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (node, gone) = (Arc::clone(node), Arc::clone(&gone));
        tokio::spawn(async move {
            hear(stream, Arc::clone(&node)).await;
            drop(client);
            gone.notify_one();
        });
    }
}

/// One connection. Whatever a client sends, it harms nobody but itself.
async fn hear(stream: UnixStream, node: Arc<Node>) {
    let service = NodeServer::new(Control(node)).max_decoding_message_size(REQUEST_BYTES_MAX);
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(SILENCE)
        .keep_alive_timeout(ANSWER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    if let Err(error) = connection.await {
        debug!(%error, "a control connection ended early");
    }
}

/// The node as gRPC has it.
struct Control(Arc<Node>);

/// What cannot be done is said as it would be to a person.
fn refused(error: NodeError) -> Status {
    Status::failed_precondition(error.to_string())
}

#[tonic::async_trait]
impl proto::node_server::Node for Control {
    async fn mount(
        &self,
        request: Request<proto::MountRequest>,
    ) -> Result<Response<proto::MountResponse>, Status> {
        let _busy = self.0.busy();
        self.0.mount(request.into_inner()).await.map(Response::new).map_err(refused)
    }

    async fn process(
        &self,
        request: Request<proto::ProcessRequest>,
    ) -> Result<Response<proto::ProcessResponse>, Status> {
        let _busy = self.0.busy();
        self.0.process(request.into_inner()).await.map(Response::new).map_err(refused)
    }

    async fn unmount(
        &self,
        request: Request<proto::UnmountRequest>,
    ) -> Result<Response<proto::UnmountResponse>, Status> {
        let _busy = self.0.busy();
        let request = request.into_inner();
        let unmounted = self.0.unmount(&PathBuf::from(request.directory), request.lazy).await;
        unmounted.map(Response::new).map_err(refused)
    }

    async fn stats(
        &self,
        request: Request<proto::StatsRequest>,
    ) -> Result<Response<proto::StatsResponse>, Status> {
        let _busy = self.0.busy();
        Ok(Response::new(self.0.stats(Path::new(&request.into_inner().directory)).await))
    }

    async fn upgrade(
        &self,
        request: Request<proto::UpgradeRequest>,
    ) -> Result<Response<proto::UpgradeResponse>, Status> {
        let _busy = self.0.busy();
        let program = PathBuf::from(request.into_inner().program);
        let version = self.0.upgrade(&program).await.map_err(refused)?;
        Ok(Response::new(proto::UpgradeResponse { version }))
    }

    async fn prefetch(
        &self,
        request: Request<proto::PrefetchRequest>,
    ) -> Result<Response<proto::PrefetchResponse>, Status> {
        let _busy = self.0.busy();
        self.0.prefetch(request.into_inner()).await.map(Response::new).map_err(refused)
    }

    async fn fill(
        &self,
        request: Request<proto::FillRequest>,
    ) -> Result<Response<proto::FillResponse>, Status> {
        let _busy = self.0.busy();
        self.0.control_fills(&request.into_inner()).map_err(refused)?;
        Ok(Response::new(proto::FillResponse {}))
    }

    async fn pin(&self, request: Request<proto::PinRequest>) -> Result<Response<proto::PinResponse>, Status> {
        let _busy = self.0.busy();
        self.0.pin(request.into_inner()).await.map(Response::new).map_err(refused)
    }
}
