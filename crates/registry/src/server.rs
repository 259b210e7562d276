//! Connections in, requests to the [`Api`], and an orderly end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use lamina_store::{Store, StoreError};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tracing::Instrument;
use tracing::field::Empty;

use crate::RegistryConfig;
use crate::api::Api;
use crate::convert::Converter;
use crate::learn::Learner;
use crate::metrics::{Metrics, Open};
use crate::observe::failed;
use crate::sendfile::Direct;
use crate::stall::Stalling;

/// A head of a request is at most this long, and frames of bodies too, in bytes.
const BUFFER_BYTES: usize = 512 << 10;
/// How long a TLS handshake may take: it is two round trips.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often idle uploads are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(60);

/// Serves `store` on `listener` until `shutdown` is ready, then lets running requests end.
///
/// Conversions that are waiting go on; one that runs at the shutdown is left and taken up at the next start.
/// Fails only where the listener does.
pub async fn serve(
    listener: TcpListener,
    store: Store,
    config: RegistryConfig,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let drain_max = config.drain_max;
    let learner = Arc::new(Learner::new(store.clone(), config.trace_every, config.clock));
    let metrics = Metrics::default();
    let (learns, counts) = (Arc::clone(&learner), metrics.clone());
    let converter = Arc::new(Converter::new(store.clone(), config.clone(), learns, counts));
    let api = Arc::new(Api::new(config.clone(), Arc::clone(&converter), Arc::clone(&learner), metrics));
    let bringing = tokio::spawn(Arc::clone(&api).bring_images());
    let learning = tokio::spawn(Arc::clone(&learner).run());
    let converting = tokio::spawn(Arc::clone(&converter).run());
    let collecting = tokio::spawn(collect(store.clone(), config.clone()));
    let watching = config.tls.clone().map(|tls| tokio::spawn(tls.watch()));
    let housekeeping = tokio::spawn(keep_house(store, config));
    let graceful = GracefulShutdown::new();
    let accepted = {
        let accepting = accept(&listener, &api, &graceful);
        let shutdown = std::pin::pin!(shutdown);
        tokio::select! {
            result = accepting => result,
            () = shutdown => Ok(()),
        }
    };
    drop(listener);
    if timeout(drain_max, graceful.shutdown()).await.is_err() {
        tracing::warn!(?drain_max, "requests were still running and are cut off");
    }
    bringing.abort();
    if let Some(upstream) = &api.upstream {
        upstream.stop().await;
    }
    converter.stop();
    learner.stop();
    housekeeping.abort();
    // a collection may end anywhere: what it has not deleted is garbage, and the next one goes on
    collecting.abort();
    if let Some(watching) = watching {
        watching.abort();
    }
    // whoever opens the store next must not find it in use: an aborted task holds it until it has been left
    let _ = tokio::join!(housekeeping, collecting);
    // it was told to end, and where it ended by itself there is no upstream
    let _ = bringing.await;
    // it ends with the layer that it reads, or at once where it waits
    converting.await.map_err(io::Error::other)?;
    learning.await.map_err(io::Error::other)?;
    accepted
}

async fn accept(listener: &TcpListener, api: &Arc<Api>, graceful: &GracefulShutdown) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(api.config().connections_max));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("never closed");
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            // the peer was gone before it was accepted, or descriptors ran out: the next one may do better
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (api, watcher) = (Arc::clone(api), graceful.watcher());
        let open = Open::new(&api.metrics.connections);
        tokio::spawn(async move {
            match secured(stream, &api).await {
                Ok(stream) => {
                    if let Err(error) = watcher.watch(connection(stream, peer, &api)).await {
                        tracing::debug!(%error, "a connection ended early");
                    }
                }
                Err(error) => tracing::debug!(%peer, %error, "no TLS came about"),
            }
            drop((place, open));
        });
    }
}

/// The connection as requests come on it.
async fn secured(stream: TcpStream, api: &Api) -> io::Result<Either<Direct, TlsStream<TcpStream>>> {
    // a socket that refuses this option is still a good one
    let _ = stream.set_nodelay(true);
    match &api.config().tls {
        None => Ok(Either::Left(Direct(stream))),
        Some(tls) => {
            let accepted = timeout(HANDSHAKE, tls.accept(stream)).await;
            accepted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map(Either::Right)
        }
    }
}

fn connection(
    stream: Either<Direct, TlsStream<TcpStream>>,
    peer: SocketAddr,
    api: &Arc<Api>,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> + Send + use<> {
    let (api, config) = (Arc::clone(api), api.config());
    let service = service_fn(move |request| {
        let api = Arc::clone(&api);
        async move { Ok::<_, std::convert::Infallible>(api.answer(request, peer).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(config.head_max)
        .max_headers(64)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(Stalling::new(stream, config.stall_max)), service)
}

/// Drops what clients have left behind.
async fn keep_house(store: Store, config: RegistryConfig) {
    if let Err(error) = store.sweep_uploads(config.now()).await {
        tracing::warn!(%error, "what old uploads left behind was not removed");
    }
    let mut ticks = interval(EXPIRE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let expired = store.expire_uploads(Instant::now()).await;
        if expired > 0 {
            tracing::info!(expired, "uploads to which nobody wrote were dropped");
        }
    }
}

/// Collects garbage, where and as often as it is wanted. Each registry on a bucket may: the store lets one at a time.
async fn collect(store: Store, config: RegistryConfig) {
    let Some((every, gc)) = &config.gc else { return };
    loop {
        // not at once: a registry that restarts often would do nothing else
        tokio::time::sleep(*every).await;
        let begun = Instant::now();
        let span = tracing::info_span!("collect", otel.status_description = Empty);
        match store.keeper().gc(gc, config.now()).instrument(span.clone()).await {
            Ok(report) => tracing::info!(?report, elapsed = ?begun.elapsed(), "garbage was collected"),
            Err(StoreError::Collected) => tracing::info!("another process is collecting garbage"),
            Err(error) => {
                failed(&span, &error);
                tracing::error!(%error, "garbage was not collected");
            }
        }
    }
}
