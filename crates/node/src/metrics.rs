//! What a node shows to Prometheus: names, units and labels, all in one place.
//!
//! Counters are of the whole node since it started. Mounts are summed up, since a node may have thousands of them; `lamina stats`
//! has each.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use lamina_cache::Class;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::Node;
use crate::sources::State;

/// What the socket is called where it is kept.
const METRICS: &str = "metrics";
/// What the text is.
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// A scraper that says nothing for so long is hung up on.
const HEAD: Duration = Duration::from_secs(10);
/// Seconds: from a registry in the same rack to one that is hardly there.
const BUCKETS: [f64; 13] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Values that go up and down. All others only grow.
const GAUGES: [&str; 6] =
    ["waiting", "disk_used_bytes", "disk_max_bytes", "whole_used_bytes", "pinned_bytes", "wait_us_max"];

/// The time from a request to the head of its answer, by class and source.
pub(crate) type FetchSeconds = Family<[(&'static str, String); 2], Histogram, fn() -> Histogram>;

pub(crate) fn fetch_seconds() -> FetchSeconds {
    Family::new_with_constructor(|| Histogram::new(BUCKETS))
}

/// The labels of a fetch.
pub(crate) fn fetch_labels(class: Class, source: &str) -> [(&'static str, String); 2] {
    [("class", class.name().to_owned()), ("source", source.to_owned())]
}

/// Serves `GET /metrics` until the node ends; the address. A daemon that follows a dead one goes on with its socket, since that
/// one may still have it open.
pub fn serve_metrics(node: &Arc<Node>, address: SocketAddr) -> io::Result<SocketAddr> {
    let listener = match node.held.find(METRICS) {
        Some(kept) => std::net::TcpListener::from(kept.try_clone()?),
        None => std::net::TcpListener::bind(address)?,
    };
    node.held.keep(METRICS, listener.try_clone()?.into());
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    accept(listener, Arc::downgrade(node));
    Ok(address)
}

fn accept(listener: TcpListener, node: Weak<Node>) {
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let Some(node) = node.upgrade() else { return };
            tokio::spawn(async move {
                let service = service_fn(|request| answer(&node, request));
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD)
                    .serve_connection(TokioIo::new(stream), service);
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a scraper left early");
                }
            });
        }
    });
}

async fn answer(node: &Node, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, text(node)),
        _ => (StatusCode::NOT_FOUND, "there is only GET /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    if status == StatusCode::OK {
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(TEXT));
    }
    Ok(response)
}

/// Everything, as text.
fn text(node: &Node) -> String {
    let mut registry = Registry::default();
    let help = "The time from asking for a range to the head of its answer";
    registry.register("lamina_fetch_seconds", help, node.hosts.fetch_seconds().clone());
    registry.register_collector(Box::new(Seen::of(node)));
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes everything");
    text
}

/// The node's counters at one moment.
#[derive(Debug)]
struct Seen {
    cache: Vec<(&'static str, u64)>,
    /// The sums over all mounts.
    mounts: BTreeMap<&'static str, u64>,
    mounted: i64,
    sources: Vec<Source>,
    fill_left_bytes: i64,
}

#[derive(Debug)]
struct Source {
    url: String,
    up: bool,
    counters: Vec<(&'static str, u64)>,
}

impl Seen {
    fn of(node: &Node) -> Self {
        let sources = node.hosts.all().into_iter().map(|(url, host)| Source {
            url,
            up: !matches!(host.state(), State::Away(..)),
            counters: host.counters.named(),
        });
        let mut mounts = BTreeMap::new();
        let mut mounted = 0;
        for counters in node.mount_counters() {
            mounted += 1;
            for (name, value) in counters {
                let sum: &mut u64 = mounts.entry(name).or_default();
                *sum = if name.ends_with("_max") { (*sum).max(value) } else { *sum + value };
            }
        }
        let left =
            node.fills.stats().into_iter().filter(|fill| fill.state == "running" || fill.state == "waiting");
        let left: u64 = left.map(|fill| fill.total_bytes.saturating_sub(fill.done_bytes)).sum();
        Self {
            cache: node.cache.snapshot().named(),
            mounts,
            mounted,
            sources: sources.collect(),
            fill_left_bytes: i64::try_from(left).unwrap_or(i64::MAX),
        }
    }
}

impl Collector for Seen {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, value) in &self.cache {
            one(&mut encoder, "lamina_cache_", name, *value)?;
        }
        for (name, value) in &self.mounts {
            one(&mut encoder, "lamina_mount_", name, *value)?;
        }
        gauge(&mut encoder, "lamina_mounts", "Images that are mounted", self.mounted)?;
        let help = "Bytes that are still to be filled";
        gauge(&mut encoder, "lamina_fill_left_bytes", help, self.fill_left_bytes)?;
        self.encode_sources(&mut encoder)
    }
}

impl Seen {
    fn encode_sources(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let names: Vec<&str> = self
            .sources
            .first()
            .map(|one| one.counters.iter().map(|(name, _)| *name).collect())
            .unwrap_or_default();
        for (at, name) in names.iter().enumerate() {
            let name = format!("lamina_source_{name}");
            let kind = ConstCounter::new(0_u64).metric_type();
            let mut metric = encoder.encode_descriptor(&name, &words(&name), None, kind)?;
            for source in &self.sources {
                let labels = [("source", source.url.as_str())];
                ConstCounter::new(source.counters[at].1).encode(metric.encode_family(&labels)?)?;
            }
        }
        let kind = ConstGauge::new(0_i64).metric_type();
        let mut metric =
            encoder.encode_descriptor("lamina_source_up", "Whether the source answers", None, kind)?;
        for source in &self.sources {
            let labels = [("source", source.url.as_str())];
            ConstGauge::new(i64::from(source.up)).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// One of our counters as Prometheus names it: seconds, and `_total` where it only grows (the encoder's).
fn one(encoder: &mut DescriptorEncoder<'_>, prefix: &str, name: &str, value: u64) -> fmt::Result {
    let (whole, seconds) = (name.strip_suffix("_total").unwrap_or(name), name.contains("_us"));
    let named = format!("{prefix}{}", whole.replace("_us", "_seconds"));
    let is_gauge = GAUGES.contains(&name) || name.ends_with("_max");
    let value_s = value as f64 / 1e6;
    let help = words(&named);
    match (is_gauge, seconds) {
        (true, true) => {
            let gauge = ConstGauge::new(value_s);
            gauge.encode(encoder.encode_descriptor(&named, &help, None, gauge.metric_type())?)
        }
        (true, false) => gauge(encoder, &named, &help, i64::try_from(value).unwrap_or(i64::MAX)),
        (false, true) => {
            let counter = ConstCounter::new(value_s);
            counter.encode(encoder.encode_descriptor(&named, &help, None, counter.metric_type())?)
        }
        (false, false) => {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(&named, &help, None, counter.metric_type())?)
        }
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: i64) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
}

/// A name as words: those of the counters say what they are, and their documentation says the rest.
fn words(name: &str) -> String {
    name.trim_start_matches("lamina_").replace('_', " ")
}
