//! Connections, straight or through an HTTP proxy: a tunnel for TLS, absolute URLs for plain HTTP.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

use crate::access::ProxySettings;
use crate::client::is_loopback;
use crate::window;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Which URLs are asked for through which proxy.
#[derive(Clone, Debug)]
pub(crate) struct Proxies(Arc<Matcher>);

impl Proxies {
    pub(crate) fn new(settings: &ProxySettings) -> Self {
        let ProxySettings { http, https, no } = settings.clone();
        Self(Arc::new(Matcher::builder().http(http).https(https).no(no).build()))
    }

    pub(crate) fn intercept(&self, url: &Uri) -> Option<Intercept> {
        if is_loopback(url.host()?) {
            return None;
        }
        self.0.intercept(url)
    }
}

/// Connects.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    pub(crate) tcp: HttpConnector,
    pub(crate) proxies: Proxies,
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Stream, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let mut tcp = self.tcp.clone();
        let Some(proxy) = self.proxies.intercept(&url) else {
            return async move { Ok(Stream::new(tcp.call(url).await?, false)) }.boxed();
        };
        async move {
            let address = proxy.uri().clone();
            if address.scheme_str() != Some("http") {
                return Err(format!("proxies are spoken to by http://, not as {address} asks for").into());
            }
            if url.scheme_str() != Some("https") {
                return Ok(Stream::new(tcp.call(address).await?, true));
            }
            let mut tunnel = Tunnel::new(address, tcp);
            if let Some(auth) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(auth.clone());
            }
            Ok(Stream::new(tunnel.call(url).await?, false))
        }
        .boxed()
    }
}

/// A connection that knows whether a proxy reads the requests on it.
#[derive(Debug)]
pub(crate) struct Stream {
    io: TokioIo<TcpStream>,
    proxied: bool,
}

impl Stream {
    fn new(io: TokioIo<TcpStream>, proxied: bool) -> Self {
        window::open_wide(io.inner());
        Self { io, proxied }
    }
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        self.io.connected().proxy(self.proxied)
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }
}
