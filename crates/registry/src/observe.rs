//! What is told of requests: ids, logs, health, counters.
//!
//! Every request has an id, that of the client where it sends a sensible one. Writes that were done and requests that were
//! refused are logged under the target `audit`, one line each; everything is, under `debug`.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};
use tracing::Span;
use tracing::field::{Empty, display};
use uuid::Uuid;

use crate::ApiError;
use crate::api::{Answer, Api, json, status_of};
use crate::body::{Body, full};
use crate::metrics::CONTENT_TYPE;

/// The header that carries a request's id, in both directions.
pub(crate) const REQUEST_ID: &str = "x-request-id";
/// A client's id is at most so long, in bytes: twice a UUID.
const ID_BYTES_MAX: usize = 72;
/// How long the store may take to say that it is there.
const READY: Duration = Duration::from_secs(5);

/// What is remembered of a request until it is answered.
pub(crate) struct Seen {
    pub(crate) id: String,
    pub(crate) method: Method,
    pub(crate) begun: Instant,
    path: String,
    peer: SocketAddr,
}

impl Seen {
    pub(crate) fn new(request: &Request<Incoming>, peer: SocketAddr) -> Self {
        let said = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let id = said.filter(|id| is_id(id)).map_or_else(|| Uuid::new_v4().to_string(), str::to_owned);
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        Self { id, method, begun: Instant::now(), path, peer }
    }

    /// A request's span, which ends with the head of its answer. README.md has its fields.
    pub(crate) fn span(&self) -> Span {
        tracing::info_span!("request", id = %self.id, user = Empty, http.request.method = %self.method, http.route = Empty,
            http.response.status_code = Empty, otel.kind = "server", otel.status_description = Empty)
    }

    /// Says in a request's span what became of it, and of the registry's own failures that they are.
    pub(crate) fn end(&self, span: &Span, route: &'static str, answer: &Answer) {
        let status = status_of(answer);
        span.record("http.route", route).record("http.response.status_code", status.as_u16());
        if let Err(error) = answer
            && status.is_server_error()
        {
            failed(span, error);
        }
    }

    /// Logs an answer inside its request's span.
    pub(crate) fn log(&self, answer: &Answer) {
        let Self { method, path, peer, begun, .. } = self;
        let (status, elapsed) = (status_of(answer).as_u16(), begun.elapsed());
        match answer {
            Err(error) if is_refusal(method, error) => {
                let code = error.parts().1;
                tracing::info!(target: "audit", %peer, %method, path, status, code, reason = %error, "refused");
            }
            Ok(response) if is_write(method, response.status()) => {
                let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
                let digest = header("docker-content-digest");
                tracing::info!(target: "audit", %peer, %method, path, status, digest, "written");
            }
            _ => tracing::debug!(%peer, %method, path, status, ?elapsed, "request"),
        }
    }
}

/// Says in a span that its work failed.
pub(crate) fn failed(span: &Span, error: &dyn Display) {
    span.record("otel.status_description", display(error));
}

/// Whether something was changed for good: an upload that begins or goes on does not.
fn is_write(method: &Method, status: StatusCode) -> bool {
    match *method {
        Method::PUT => status.is_success(),
        Method::POST => status == StatusCode::CREATED,
        Method::DELETE => status == StatusCode::ACCEPTED,
        _ => false,
    }
}

/// Whether somebody wanted what he may not: of reads, only what is forbidden.
fn is_refusal(method: &Method, error: &ApiError) -> bool {
    let status = error.parts().0;
    let reads = [Method::GET, Method::HEAD].contains(method);
    let forbidden = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status);
    status.is_client_error() && (forbidden || !reads)
}

/// A word that can stand in a log: no client writes lines of its own into it.
fn is_id(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    (1..=ID_BYTES_MAX).contains(&text.len()) && text.bytes().all(word)
}

impl Api {
    /// `GET /readyz`: whether the store answers.
    pub(crate) async fn ready(&self) -> Answer {
        match timeout(READY, self.store.reach()).await {
            Ok(Ok(())) => Ok(json(StatusCode::OK, "{}")),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Ok(json(
                StatusCode::SERVICE_UNAVAILABLE,
                "{\"errors\":[{\"code\":\"UNKNOWN\",\"message\":\"the store does not answer\"}]}",
            )),
        }
    }

    /// `GET /metrics`.
    pub(crate) fn count(&self) -> Response<Body> {
        let mut response = Response::new(full(self.metrics.text(self.store.uploads_open())));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_would_write_into_the_log_are_not_taken() {
        for good in ["a", "6f1b-4c", "trace:1.2_3"] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", "a b", "a\nb", "\u{1b}[31m", &"a".repeat(73), "\u{e9}"] {
            assert!(!is_id(bad), "{bad}");
        }
    }
}
