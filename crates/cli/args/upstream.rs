//! Whose images a registry passes on.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use lamina_wire::Reference;

use super::gc::duration;

#[derive(Args, Clone, Debug)]
pub(crate) struct UpstreamArguments {
    /// Pass on the images of this registry, [http[s]://]host[:port]: what is asked for and not here is fetched there, checked,
    /// kept, and converted in the background, so that it can be mounted lazily once all of it has come. Nothing can be pushed
    /// here then. Logins are those of --auth-file, and whoever may read here reads by them: see the table [access]. Plain HTTP
    /// only to loopback, or with --plain-http
    #[arg(long, env = "LAMINA_UPSTREAM", value_name = "URL", value_parser = parse)]
    pub(crate) upstream: Option<UpstreamUrl>,
    /// How long it counts what the upstream has said of a tag; after that it is asked whether the tag has moved. While it does
    /// not answer, what it said last is served. 0 to ask each time
    #[arg(long, env = "LAMINA_UPSTREAM_REVALIDATE", default_value = "60s", value_name = "TIME", value_parser = duration)]
    pub(crate) upstream_revalidate: Duration,
    /// Where blobs are that are on their way from the upstream, as long as they are [default: `spool` beside the chunk index]
    #[arg(long, env = "LAMINA_UPSTREAM_SPOOL", value_name = "DIR")]
    pub(crate) upstream_spool: Option<PathBuf>,
}

/// A registry, and whether to speak TLS to it where somebody said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UpstreamUrl {
    /// `host[:port]`.
    pub(crate) host: String,
    pub(crate) is_tls: Option<bool>,
}

fn parse(text: &str) -> Result<UpstreamUrl, String> {
    let (is_tls, rest) = match text.split_once("://") {
        None => (None, text),
        Some(("https", rest)) => (Some(true), rest),
        Some(("http", rest)) => (Some(false), rest),
        Some((scheme, _)) => return Err(format!("registries do not speak {scheme}")),
    };
    let host = rest.strip_suffix('/').unwrap_or(rest);
    // as it would stand in a reference
    let named = format!("{host}/a").parse::<Reference>().is_ok_and(|reference| reference.host == host);
    if !named {
        return Err("it must be [http[s]://]host[:port], without a path".to_owned());
    }
    Ok(UpstreamUrl { host: host.to_owned(), is_tls })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_is_a_host_and_perhaps_a_scheme() {
        for (text, host, is_tls) in [
            ("docker.io", "docker.io", None),
            ("https://ghcr.io/", "ghcr.io", Some(true)),
            ("http://127.0.0.1:5000", "127.0.0.1:5000", Some(false)),
            ("localhost:5000", "localhost:5000", None),
        ] {
            assert_eq!(parse(text), Ok(UpstreamUrl { host: host.to_owned(), is_tls }), "{text}");
        }
        for text in ["", "https://", "ftp://a.b", "https://a.b/c", "a", "https://user@a.b", "a.b?c"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
