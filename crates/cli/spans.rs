//! What this process does, as spans, to an OpenTelemetry collector: OTLP, protobuf over HTTP.
//!
//! Spans are made by `tracing` where the work is done. Without a collector the filter of the log turns them away before they
//! exist, at the cost of a load and a compare. With one, those of our own crates go there down to `debug`, and no events: what is
//! logged stays in the log.
//!
//! Nobody who works waits for a collector. Spans that have ended go into a queue of 2048, from which a thread of the SDK sends 512
//! at a time, or what there is after 5 s (`OTEL_BSP_*` change that). What does not fit is dropped, and so is what a collector does
//! not take after a few tries; that is said now and then. The end of the process waits [`FLUSH`] for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use async_trait::async_trait;
use lamina_wire::{ClientConfig, Post};
use opentelemetry::trace::TracerProvider;
use opentelemetry::{Key, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tracing::{Level, Subscriber, info, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::registry::LookupSpan;

use crate::args::{Arguments, Command, OtlpUrl};
use crate::commands::client_config;

/// A collector has this long to take a batch.
const ANSWER: Duration = Duration::from_secs(5);
/// What it says then is some words.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Between two warnings that spans do not arrive.
const WARN_EVERY: Duration = Duration::from_secs(300);
/// How long the end waits for the last spans: a collector near by takes them in milliseconds, and programs may be waiting for the
/// node that comes after this one.
const FLUSH: Duration = Duration::from_millis(500);
/// What the SDK calls a service that nobody has named.
const UNNAMED: &str = "unknown_service";

/// Sends spans until it is ended.
pub(crate) struct Spans(SdkTracerProvider);

impl Spans {
    /// Where a command is one that does what spans are made for, and somebody wants them. *Errors*: a URL that is none, for the
    /// holder of a node as well, which itself sends nothing.
    pub(crate) fn start(arguments: &Arguments, runtime: &Handle) -> Result<Option<Self>> {
        let (otlp, service, sends) = match &arguments.command {
            Command::Registry(it) => (&it.otlp, "lamina-registry", true),
            Command::Node(it) if it.command.is_none() => (&it.settings.otlp, "lamina-node", it.held),
            // it may be its own daemon
            Command::Mount(it) => (&it.settings.otlp, "lamina-node", it.foreground),
            _ => return Ok(None),
        };
        let Some(url) = destination(otlp.otlp.as_ref())?.filter(|_| sends) else { return Ok(None) };
        let client = client_config(&arguments.common)?;
        let provider = provider(&url, service, client, runtime);
        Ok(Some(Self(provider.with_context(|| format!("no spans can be sent to {url}"))?)))
    }

    /// What takes spans in.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let ours = filter_fn(|metadata| {
            metadata.is_span() && *metadata.level() <= Level::DEBUG && metadata.target().starts_with("lamina")
        });
        let layer = tracing_opentelemetry::layer().with_tracer(self.0.tracer("lamina"));
        // what is entered and left with each poll of a future is not worth a clock
        let layer = layer.with_tracked_inactivity(false).with_context_activation(false);
        let layer = layer.with_location(false).with_threads(false).with_target(false);
        layer.with_filter(ours.with_max_level_hint(LevelFilter::DEBUG))
    }

    /// Sends what is left, for as long as the end can wait. Blocks.
    pub(crate) fn end(self) {
        // the client has said it where it failed
        let _ = self.0.shutdown_with_timeout(FLUSH);
    }
}

/// The URL that spans are sent to: the option's, else that of OpenTelemetry's variables.
fn destination(named: Option<&OtlpUrl>) -> Result<Option<OtlpUrl>> {
    if let Some(url) = named {
        return Ok(Some(url.traces()));
    }
    let variable = |name: &'static str| {
        let text = std::env::var_os(name).filter(|text| !text.is_empty());
        let text = text.map(|text| text.to_string_lossy().into_owned());
        // without the text, which may have a login in it
        let parsed = text.map(|text| text.parse::<OtlpUrl>().map_err(|error| anyhow!("{name}: {error}")));
        parsed.transpose()
    };
    match variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")? {
        Some(url) => Ok(Some(url)),
        None => Ok(variable("OTEL_EXPORTER_OTLP_ENDPOINT")?.map(|url| url.traces())),
    }
}

fn provider(
    url: &OtlpUrl,
    service: &'static str,
    client: ClientConfig,
    runtime: &Handle,
) -> Result<SdkTracerProvider> {
    let post = Post::new(&client, url.authority())?;
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(url.to_string())
        .with_protocol(Protocol::HttpBinary)
        .with_http_client(Sender { post, runtime: runtime.clone(), state: Arc::default() })
        .build()?;
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter);
    Ok(provider.with_resource(resource(service)).build())
}

/// Who speaks: what OpenTelemetry's variables say, and what they leave out.
fn resource(service: &'static str) -> Resource {
    let said = Resource::builder().build();
    let is_named = said
        .get(&Key::from_static_str("service.name"))
        .is_some_and(|name| !name.as_str().starts_with(UNNAMED));
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let own = [
        ("service.name", (!is_named).then(|| service.to_owned())),
        ("service.version", Some(env!("CARGO_PKG_VERSION").to_owned())),
        ("host.name", Some(host)),
        ("process.pid", Some(std::process::id().to_string())),
    ];
    let own = own.into_iter().filter_map(|(key, value)| Some(KeyValue::new(key, value?)));
    Resource::builder().with_attributes(own).build()
}

/// Our own HTTP client, for the SDK's thread, which is in no runtime.
#[derive(Debug)]
struct Sender {
    post: Post,
    runtime: Handle,
    state: Arc<Mutex<State>>,
}

/// How sending goes.
#[derive(Debug, Default)]
struct State {
    failing: bool,
    warned: Option<Instant>,
}

#[async_trait]
impl HttpClient for Sender {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (post, url) = (self.post.clone(), request.uri().to_string());
        let sent = self.runtime.spawn(async move { post.send(request, ANSWER, ANSWER_BYTES_MAX).await });
        let sent = sent.await?;
        let refused = |response: &Response<Bytes>| format!("{url}: {}", response.status());
        self.state.lock().note(match &sent {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(refused(response)),
            Err(error) => Some(error.to_string()),
        });
        Ok(sent?)
    }
}

impl State {
    /// Says that spans do not arrive, though not each time.
    fn note(&mut self, reason: Option<String>) {
        let was_failing = std::mem::replace(&mut self.failing, reason.is_some());
        match reason {
            None if was_failing => info!("spans arrive again"),
            Some(reason) if self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY) => {
                self.warned = Some(Instant::now());
                warn!(reason, "spans do not arrive, and are dropped; see --otlp");
            }
            _ => {}
        }
    }
}
