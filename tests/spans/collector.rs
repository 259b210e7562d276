//! A collector of spans, as OpenTelemetry has them: takes OTLP over HTTP, and keeps what came.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use lamina_testkit::process::until;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use prost::Message;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::rig::DEADLINE;

/// What it does with what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Takes,
    /// 500.
    Fails,
    /// No answer.
    Hangs,
}

/// One that runs until it is dropped.
pub(crate) struct Collector {
    address: String,
    received: Arc<Received>,
    _runtime: Runtime,
}

#[derive(Default)]
struct Received {
    spans: Mutex<Vec<Span>>,
    requests: AtomicUsize,
}

/// A span that came.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) service: String,
    pub(crate) name: String,
    pub(crate) id: Vec<u8>,
    /// Empty where it has none.
    pub(crate) parent: Vec<u8>,
    /// What a span and all within it have in common.
    pub(crate) whole: Vec<u8>,
    pub(crate) fields: BTreeMap<String, String>,
    pub(crate) failure: Option<String>,
    pub(crate) from_ns: u64,
    pub(crate) to_ns: u64,
}

impl Span {
    pub(crate) fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.parent == other.id && self.whole == other.whole
    }
}

impl Collector {
    pub(crate) fn new(manner: Manner) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?.to_string();
        let received = Arc::<Received>::default();
        let keeps = Arc::clone(&received);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let keeps = Arc::clone(&keeps);
                let service = service_fn(move |request| answer(request, manner, Arc::clone(&keeps)));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(Self { address, received, _runtime: runtime })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests that came so far.
    pub(crate) fn requests(&self) -> usize {
        self.received.requests.load(Ordering::SeqCst)
    }

    /// All spans, once they are enough.
    pub(crate) fn spans(&self, what: &str, enough: impl Fn(&[Span]) -> bool) -> Result<Vec<Span>> {
        let spans = || self.received.spans.lock().expect("nobody panics with it").clone();
        until(what, DEADLINE, || Ok(Some(spans()).filter(|spans| enough(spans))))
            .with_context(|| format!("{:#?}", spans()))
    }
}

async fn answer(
    request: Request<Incoming>,
    manner: Manner,
    received: Arc<Received>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let status = |status| Response::builder().status(status).body(Full::default()).expect("a status");
    if (request.method(), request.uri().path()) != (&Method::POST, "/v1/traces") {
        return Ok(status(StatusCode::NOT_FOUND));
    }
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    received.requests.fetch_add(1, Ordering::SeqCst);
    match manner {
        Manner::Takes => {}
        Manner::Fails => return Ok(status(StatusCode::INTERNAL_SERVER_ERROR)),
        Manner::Hangs => std::future::pending().await,
    }
    let Ok(request) = ExportTraceServiceRequest::decode(body) else {
        return Ok(status(StatusCode::BAD_REQUEST));
    };
    received.spans.lock().expect("nobody panics with it").extend(read(request));
    let body = ExportTraceServiceResponse::default().encode_to_vec();
    Ok(Response::new(Full::from(body)))
}

fn read(request: ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for resource in request.resource_spans {
        let of = fields(resource.resource.map(|resource| resource.attributes).unwrap_or_default());
        for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            let failed = span.status.filter(|status| status.code == SpanStatus::Error as i32);
            spans.push(Span {
                service: of.get("service.name").cloned().unwrap_or_default(),
                name: span.name,
                id: span.span_id,
                parent: span.parent_span_id,
                whole: span.trace_id,
                fields: fields(span.attributes),
                failure: failed.map(|status| status.message),
                from_ns: span.start_time_unix_nano,
                to_ns: span.end_time_unix_nano,
            });
        }
    }
    spans
}

fn fields(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::BoolValue(yes)) => yes.to_string(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.into_iter().map(|one| (one.key, text(one.value))).collect()
}
