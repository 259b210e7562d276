//! One request to one answer.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use lamina_image::Digest;
use lamina_store::Store;
use tokio::sync::Semaphore;
use tracing::Instrument;

use crate::access::{Access, Caller};
use crate::body::{Body, Inbound, full};
use crate::convert::Converter;
use crate::learn::Learner;
use crate::metrics::{Metrics, Open};
use crate::observe::{REQUEST_ID, Seen};
use crate::profiles::about;
use crate::query::Query;
use crate::route::Route;
use crate::upstream::Upstream;
use crate::{ApiError, RegistryConfig};

/// Manifests that are checked in depth at the same time: each may hold an image's recipes and tree, some 100 MiB.
const ADMISSIONS_MAX: usize = 2;
/// Manifests over [`SMALL_MANIFEST_BYTES`] that come in at the same time: each may be 4 MiB long, and ten times that while
/// it is parsed.
const MANIFESTS_MAX: usize = 16;
/// Nearly every manifest is shorter.
pub(crate) const SMALL_MANIFEST_BYTES: u64 = 64 << 10;
/// Traces and profiles that come in at the same time: each may be 32 MiB long.
const INTAKE_MAX: usize = 8;
/// Of those, that are parsed at the same time: a bad one may need ten times its length before it is refused.
const CHECKS_MAX: usize = 1;

/// Everything that answers requests.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) converter: Arc<Converter>,
    pub(crate) learner: Arc<Learner>,
    pub(crate) admissions: Semaphore,
    pub(crate) manifests: Semaphore,
    pub(crate) intake: Semaphore,
    pub(crate) checks: Semaphore,
    pub(crate) metrics: Metrics,
    pub(crate) access: Option<Arc<Access>>,
    pub(crate) upstream: Option<Arc<Upstream>>,
    config: RegistryConfig,
}

/// A request without its body.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) query: Query,
    /// Who asks; nobody in particular where nobody is asked.
    pub(crate) caller: Caller,
}

impl Head {
    /// Whether the client says that it has what has this digest.
    pub(crate) fn knows(&self, digest: Digest) -> bool {
        let tags = self.header(header::IF_NONE_MATCH).unwrap_or_default().split(',').map(str::trim);
        let etag = etag_of(digest);
        tags.into_iter().any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
    }

    /// A header's text; `None` where it is absent or not text.
    pub(crate) fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// The entity tag of what has this digest: it never changes.
pub(crate) fn etag_of(digest: Digest) -> String {
    format!("\"{digest}\"")
}

/// An answer for whoever has it already (RFC 9110, 13.1.2).
pub(crate) fn not_modified(digest: Digest) -> Response<Body> {
    let headers = [("etag", etag_of(digest)), ("docker-content-digest", digest.to_string())];
    empty(StatusCode::NOT_MODIFIED, &headers)
}

/// What every handler gives.
pub(crate) type Answer = Result<Response<Body>, ApiError>;

impl Api {
    pub(crate) fn new(
        config: RegistryConfig,
        converter: Arc<Converter>,
        learner: Arc<Learner>,
        metrics: Metrics,
    ) -> Self {
        let [admissions, manifests, intake, checks] =
            [ADMISSIONS_MAX, MANIFESTS_MAX, INTAKE_MAX, CHECKS_MAX].map(Semaphore::new);
        let (store, access) = (converter.store.clone(), config.access.clone());
        let upstream = config.upstream.clone();
        let upstream = upstream.map(|upstream| Upstream::new(store.clone(), upstream, metrics.clone()));
        Self {
            access,
            upstream,
            store,
            converter,
            learner,
            admissions,
            manifests,
            intake,
            checks,
            metrics,
            config,
        }
    }

    pub(crate) fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// Answers a request; errors become answers too. Every answer has an id, under which the logs have the request.
    pub(crate) async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
        let seen = Seen::new(&request, peer);
        let _running = Open::new(&self.metrics.running);
        let span = seen.span();
        let (route, answer) = self.route(request, peer.ip()).instrument(span.clone()).await;
        seen.end(&span, route, &answer);
        let _entered = span.entered();
        let mut response = match &answer {
            Ok(_) => None,
            Err(error) => Some(error.response(&seen.id)),
        };
        self.metrics.answered(route, &seen.method, status_of(&answer), seen.begun.elapsed());
        if let Err(error) = &answer {
            self.metrics.refused(error.parts().1);
        }
        seen.log(&answer);
        let mut response = response.take().unwrap_or_else(|| answer.expect("an error has a response"));
        let version = HeaderValue::from_static("registry/2.0");
        response.headers_mut().insert("docker-distribution-api-version", version);
        let id = HeaderValue::from_str(&seen.id).expect("ids are words");
        response.headers_mut().insert(REQUEST_ID, id);
        response
    }

    /// Finds who answers. Gives what was asked for, by its name in counters.
    async fn route(&self, request: Request<Incoming>, peer: IpAddr) -> (&'static str, Answer) {
        match Route::parse(request.uri().path()) {
            Ok(route) => (route.name(), self.serve(route, request, peer).await),
            Err(error) => ("none", Err(error)),
        }
    }

    async fn serve(&self, route: Route, request: Request<Incoming>, peer: IpAddr) -> Answer {
        let head = Head {
            method: request.method().clone(),
            headers: request.headers().clone(),
            query: Query::parse(request.uri().query()),
            caller: self.let_in(&route, &request, peer).await?,
        };
        let body = Inbound::new(request, self.config.stall_max, self.metrics.received.clone());
        let reads = [Method::GET, Method::HEAD].contains(&head.method);
        if self.upstream.is_some() && route.is_push(&head.method) {
            let text = "this registry passes on what its upstream has, and takes no pushes; push there";
            return Err(ApiError::Unsupported(text));
        }
        match (route, head.method.as_str()) {
            (Route::Health, _) if reads => Ok(json(StatusCode::OK, "{}")),
            (Route::Ready, _) if reads => self.ready().await,
            (Route::Metrics, "GET") if self.config.metrics => Ok(self.count()),
            (Route::Metrics, _) => Err(ApiError::NotFound),
            (Route::Token, "GET") => self.issue_token(&head),
            (Route::Base, _) if reads => Ok(json(StatusCode::OK, "{}")),
            (Route::Catalog, "GET") => self.list_repositories(&head).await,
            (Route::Blob(repo, digest), _) if reads => self.read_blob(&head, &repo, digest).await,
            (Route::Blob(repo, digest), "DELETE") => self.delete_blob(&repo, digest).await,
            (Route::Uploads(repo), "POST") => self.begin_upload(&head, &repo, body).await,
            (Route::Upload(repo, id), "PATCH") => self.append_upload(&head, &repo, id, body).await,
            (Route::Upload(repo, id), "PUT") => self.finish_upload(&head, &repo, id, body).await,
            (Route::Upload(repo, id), "GET") => self.upload_status(&repo, id),
            (Route::Upload(repo, id), "DELETE") => self.cancel_upload(&repo, id).await,
            (Route::Manifest(repo, target), _) if reads => self.read_manifest(&head, &repo, &target).await,
            (Route::Manifest(repo, target), "PUT") => self.put_manifest(&head, &repo, target, body).await,
            (Route::Manifest(repo, target), "DELETE") => self.delete_manifest(&repo, target).await,
            (Route::Tags(repo), "GET") => self.list_tags(&head, &repo).await,
            (Route::Referrers(repo, subject), "GET") => self.list_referrers(&head, &repo, subject).await,
            (Route::Chunks(repo), "POST") => self.find_chunks(&head, &repo, body).await,
            (Route::Layers(repo), "POST") => self.find_layers(&head, &repo, body).await,
            (Route::Image(repo, digest), "GET") => self.image_status(&repo, digest).await,
            (Route::Moved(repo, digest), "GET") => self.read_moved(&repo, digest).await,
            (Route::Traces(repo, digest), "POST") => self.take_trace(about(&head, repo, digest)?, body).await,
            (Route::Profile(repo, digest), "PUT") => {
                self.put_profile(about(&head, repo, digest)?, body).await
            }
            (Route::Profile(repo, digest), "DELETE") => self.drop_profile(about(&head, repo, digest)?).await,
            _ => Err(ApiError::Unsupported("this method is not served here")),
        }
    }
}

impl Api {
    /// Who asks, if it may.
    async fn let_in(
        &self,
        route: &Route,
        request: &Request<Incoming>,
        peer: IpAddr,
    ) -> Result<Caller, ApiError> {
        let Some(access) = &self.access else { return Ok(Caller::default()) };
        let headers = request.headers();
        let needed = route.needs(request.method());
        let caller = access.identify(headers, peer, needed).await?;
        if let Some(user) = &caller.user {
            tracing::Span::current().record("user", user.as_str());
        }
        match (route, needed) {
            (Route::Token | Route::Health | Route::Ready | Route::Metrics, _) => {}
            (_, Some((repo, action))) => access.check(&caller, headers, repo, action)?,
            (_, None) => access.check_base(&caller, headers)?,
        }
        Ok(caller)
    }

    /// `GET /token`: the token server's answer.
    fn issue_token(&self, head: &Head) -> Answer {
        let access = self.access.as_ref().ok_or(ApiError::NotFound)?;
        let scopes: Vec<&str> = head.query.values("scope").collect();
        let issued = access.issue(&head.caller, &head.headers, &scopes, self.config.now())?;
        let mut response = json(StatusCode::OK, issued);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }
}

/// The status that the client is told.
pub(crate) fn status_of(answer: &Answer) -> StatusCode {
    answer.as_ref().map_or_else(|error| error.parts().0, Response::status)
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, text: impl Into<bytes::Bytes>) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// An answer without a body. The values are digests, numbers and validated names.
pub(crate) fn empty(status: StatusCode, headers: &[(&'static str, String)]) -> Response<Body> {
    let mut response = Response::new(full(bytes::Bytes::new()));
    *response.status_mut() = status;
    for (name, value) in headers {
        let value = value.parse().expect("digests, numbers and validated names are header values");
        response.headers_mut().insert(*name, value);
    }
    response
}
