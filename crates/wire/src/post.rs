//! Requests to hosts that are no registries, over connections of the same kind: TLS, proxies, bounds.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, header};
use tokio::time::timeout;

use crate::client::USER_AGENT;
use crate::http_call::{Http, Payload, named};
use crate::{ClientConfig, WireError};

/// Connections to one host that is no registry. Cheap to clone; clones share them.
#[derive(Clone)]
pub struct Post {
    http: Arc<Http>,
}

impl std::fmt::Debug for Post {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Post")
    }
}

impl Post {
    /// Connections to `host[:port]`. Nothing is sent yet, but certificates that the settings name are read.
    pub fn new(config: &ClientConfig, host: &str) -> Result<Self, WireError> {
        let http = Http::new(config, host);
        let http = http.map_err(|reason| WireError::Configured { host: host.to_owned(), reason })?;
        Ok(Self { http: Arc::new(http) })
    }

    /// The answer, whatever its status, if all of it comes within `within` and its body has at most `bytes_max` bytes. Sent once,
    /// and redirects are not followed. Must be called inside a tokio runtime.
    pub async fn send(
        &self,
        mut request: Request<Bytes>,
        within: Duration,
        bytes_max: u64,
    ) -> Result<Response<Bytes>, WireError> {
        let url = named(request.uri());
        request.headers_mut().insert(header::USER_AGENT, header::HeaderValue::from_static(USER_AGENT));
        let request = request.map(|body| Payload::Whole(body).into_body());
        let sent = async {
            let answer = self.http.send_within(request, Some(within)).await?;
            let (status, headers) = (answer.status(), answer.response.headers().clone());
            let mut response = Response::new(answer.bytes(bytes_max).await?);
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            Ok(response)
        };
        timeout(within, sent).await.unwrap_or_else(|_| Err(WireError::Timeout { url, waited: within }))
    }
}
