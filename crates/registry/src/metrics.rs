//! What is counted: names and units of everything under `/metrics`, in the text format of Prometheus.

use std::time::Duration;

use http::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// The content type of the text format.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the buckets of request times, in seconds: from a manifest out of the page cache to a layer of
/// gigabytes.
const SECONDS: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0, 300.0];

/// A request by what it asked for and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    route: &'static str,
    method: &'static str,
    status: u16,
}

/// What a request asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    route: &'static str,
}

/// A refusal, by its OCI error code.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refusal {
    code: &'static str,
}

/// What became of a conversion.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Conversion {
    outcome: &'static str,
}

/// What a registry with an upstream was asked for, and where it found it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PassedOn {
    what: &'static str,
    outcome: &'static str,
}

/// All counters of one registry process. A handle: clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    requests: Family<Request, Counter>,
    seconds: Family<Asked, Histogram>,
    refusals: Family<Refusal, Counter>,
    conversions: Family<Conversion, Counter>,
    passed_on: Family<PassedOn, Counter>,
    /// Bytes of manifests and blobs that came from the upstream.
    pub(crate) upstream_received: Counter,
    /// Requests that are being answered; a body on its way does not count.
    pub(crate) running: Gauge,
    /// Open connections.
    pub(crate) connections: Gauge,
    /// Bytes of requests' bodies.
    pub(crate) received: Counter,
    /// Bytes of blobs that were sent.
    pub(crate) sent: Counter,
    uploads: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            refusals: Family::default(),
            conversions: Family::default(),
            passed_on: Family::default(),
            upstream_received: Counter::default(),
            running: Gauge::default(),
            connections: Gauge::default(),
            received: Counter::default(),
            sent: Counter::default(),
            uploads: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Counts an answered request.
    pub(crate) fn answered(
        &self,
        route: &'static str,
        method: &http::Method,
        status: StatusCode,
        elapsed: Duration,
    ) {
        let request = Request { route, method: name_of(method), status: status.as_u16() };
        self.requests.get_or_create(&request).inc();
        self.seconds.get_or_create(&Asked { route }).observe(elapsed.as_secs_f64());
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, code: &'static str) {
        self.refusals.get_or_create(&Refusal { code }).inc();
    }

    /// Counts a conversion that has ended.
    pub(crate) fn converted(&self, outcome: &'static str) {
        self.conversions.get_or_create(&Conversion { outcome }).inc();
    }

    /// Counts a manifest or a blob of a registry with an upstream: a `hit` was here, a `miss` came from the upstream, what
    /// is `stale` was here and nobody said that it still counts, what is `absent` the upstream does not have, and an
    /// `error` is all else.
    pub(crate) fn passed_on(&self, what: &'static str, outcome: &'static str) {
        self.passed_on.get_or_create(&PassedOn { what, outcome }).inc();
    }

    /// Everything in the text format. `uploads` are open now.
    pub(crate) fn text(&self, uploads: usize) -> String {
        self.uploads.set(i64::try_from(uploads).unwrap_or(i64::MAX));
        let mut registry = Registry::with_prefix("lamina_registry");
        registry.register("requests", "Requests that were answered", self.requests.clone());
        let (name, help) = ("request_duration", "How long answers took, until their head was sent");
        registry.register_with_unit(name, help, Unit::Seconds, self.seconds.clone());
        registry.register("refusals", "Requests that were refused, by error code", self.refusals.clone());
        let help = "Conversions of pushed images that have ended";
        registry.register("conversions", help, self.conversions.clone());
        let help = "Manifests and blobs that were asked for where there is an upstream";
        registry.register("upstream", help, self.passed_on.clone());
        let (help, came) = ("Bytes that came from the upstream", self.upstream_received.clone());
        registry.register_with_unit("upstream_received", help, Unit::Bytes, came);
        registry.register("requests_running", "Requests that are being answered", self.running.clone());
        registry.register("connections", "Open connections", self.connections.clone());
        let help = "Bytes of bodies that came";
        registry.register_with_unit("received", help, Unit::Bytes, self.received.clone());
        registry.register_with_unit("sent", "Bytes of blobs that went", Unit::Bytes, self.sent.clone());
        registry.register("uploads_open", "Uploads that have begun and not ended", self.uploads.clone());
        let mut text = String::new();
        encode(&mut text, &registry).expect("strings take everything");
        text
    }
}

/// Counts as one while it lives.
#[derive(Debug)]
pub(crate) struct Open(Gauge);

impl Open {
    /// One more.
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A method as a label: clients may send any word, and each would be another time series.
fn name_of(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown_and_made_up_methods_are_one() {
        let metrics = Metrics::default();
        for method in ["GET", "MADE", "UP"] {
            let method = http::Method::from_bytes(method.as_bytes()).unwrap();
            metrics.answered("blob", &method, StatusCode::OK, Duration::from_millis(7));
        }
        metrics.refused("NAME_INVALID");
        metrics.sent.inc_by(12);
        let text = metrics.text(3);
        for line in [
            "lamina_registry_requests_total{route=\"blob\",method=\"GET\",status=\"200\"} 1",
            "lamina_registry_requests_total{route=\"blob\",method=\"other\",status=\"200\"} 2",
            "lamina_registry_request_duration_seconds_bucket{le=\"0.01\",route=\"blob\"} 3",
            "lamina_registry_refusals_total{code=\"NAME_INVALID\"} 1",
            "lamina_registry_sent_bytes_total 12",
            "lamina_registry_uploads_open 3",
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
        }
    }
}
