//! Where spans go.

use std::fmt;
use std::str::FromStr;

use clap::Args;
use http::Uri;

#[derive(Args, Clone, Debug, Default)]
pub(crate) struct OtlpArguments {
    /// Send spans of what is done to an OpenTelemetry collector, by OTLP over HTTP, to URL/v1/traces [default:
    /// $OTEL_EXPORTER_OTLP_TRACES_ENDPOINT as it is, or $OTEL_EXPORTER_OTLP_ENDPOINT/v1/traces, or nowhere]
    #[arg(long, env = "LAMINA_OTLP", value_name = "URL")]
    pub(crate) otlp: Option<OtlpUrl>,
}

/// A URL that spans can be sent to, or below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OtlpUrl(Uri);

impl OtlpUrl {
    /// Where below it spans are taken, as OTLP has it.
    pub(crate) fn traces(&self) -> Self {
        let text = format!("{}/v1/traces", self.to_string().trim_end_matches('/'));
        Self(text.parse().expect("a URL with a longer path is one"))
    }

    /// `host[:port]`.
    pub(crate) fn authority(&self) -> &str {
        self.0.authority().expect("looked at").as_str()
    }
}

impl fmt::Display for OtlpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for OtlpUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url: Uri = text.parse().map_err(|error| format!("it is not a URL: {error}"))?;
        let scheme = url.scheme_str().unwrap_or_default();
        if !matches!(scheme, "http" | "https") || url.authority().is_none() {
            return Err(
                "it must be http://host[:port] or https://host[:port], with a path where there is one".into(),
            );
        }
        // whoever lists processes sees command lines
        if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("a login does not belong in it; set OTEL_EXPORTER_OTLP_HEADERS".into());
        }
        if url.query().is_some() {
            return Err("a path is added to it, so it can have no query".into());
        }
        Ok(Self(url))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_go_below_the_url() {
        for (text, traces, authority) in [
            ("http://localhost:4318", "http://localhost:4318/v1/traces", "localhost:4318"),
            ("http://localhost:4318/", "http://localhost:4318/v1/traces", "localhost:4318"),
            ("https://o.example/otlp/", "https://o.example/otlp/v1/traces", "o.example"),
            ("http://[::1]:1", "http://[::1]:1/v1/traces", "[::1]:1"),
        ] {
            let url: OtlpUrl = text.parse().unwrap();
            assert_eq!((url.traces().to_string().as_str(), url.authority()), (traces, authority));
        }
    }

    #[test]
    fn what_is_no_url_of_a_collector_is_refused() {
        for text in [
            "",
            "localhost",
            "localhost:4318",
            "ftp://o.example",
            "http://",
            "/v1",
            "http://u:p@o.example",
            "http://o.example/?key=1",
            "http://o example",
        ] {
            assert!(text.parse::<OtlpUrl>().is_err(), "{text}");
        }
    }
}
