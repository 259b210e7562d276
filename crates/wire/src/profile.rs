//! Profiles and traces: what a node tells a registry of a start, and what people hand in themselves.

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use lamina_image::{CommandKey, Digest, Ino, PROFILE_ITEMS_MAX, Trace, TraceRun, media_type};
use prost::Message;

use crate::http_call::Payload;
use crate::{Client, WireError, proto};

/// The message of a trace of a start on the tree with this digest. Whether its boot pack was its command's own is for the caller
/// to add.
pub fn write_trace(tree: Digest, trace: &Trace) -> proto::Trace {
    proto::Trace {
        tree: tree.to_string(),
        boot: trace.boot,
        boot_own: false,
        name_dirs: trace.names.iter().map(|(dir, _)| dir.0).collect(),
        names: trace.names.iter().map(|(_, name)| name.clone()).collect(),
        run_inos: trace.runs.iter().map(|run| run.ino.0).collect(),
        run_firsts: trace.runs.iter().map(|run| run.first).collect(),
        run_pages: trace.runs.iter().map(|run| run.pages).collect(),
    }
}

/// The trace in a message, and its tree's digest. `None` where the columns are not equally long or too long, or the digest is
/// none. Whether the numbers mean anything is for who has the tree to say.
pub fn read_trace(message: &proto::Trace) -> Option<(Digest, Trace)> {
    let (names, runs) = (message.names.len(), message.run_inos.len());
    let fits = names == message.name_dirs.len()
        && runs == message.run_firsts.len()
        && runs == message.run_pages.len()
        && names <= PROFILE_ITEMS_MAX
        && runs <= PROFILE_ITEMS_MAX;
    if !fits {
        return None;
    }
    let columns = message.run_inos.iter().zip(&message.run_firsts).zip(&message.run_pages);
    let trace = Trace {
        names: message.name_dirs.iter().map(|dir| Ino(*dir)).zip(message.names.iter().cloned()).collect(),
        runs: columns
            .map(|((ino, first), pages)| TraceRun { ino: Ino(*ino), first: *first, pages: *pages })
            .collect(),
        boot: message.boot,
    };
    Some((message.tree.parse().ok()?, trace))
}

impl Client {
    /// Hands a trace of a start of the image `manifest`, of `command` if that is known, to a registry that learns from them. It
    /// answers before it has built anything. *Errors*: [`WireError::is_not_found`] from a registry that does not.
    pub async fn send_trace(
        &self,
        repository: &str,
        manifest: Digest,
        command: Option<&CommandKey>,
        trace: &proto::Trace,
    ) -> Result<(), WireError> {
        let url = format!("{}/lamina/v1/{repository}/traces/{manifest}{}", self.base(), query(command));
        let body = Bytes::from(trace.encode_to_vec());
        self.retrying(|| async {
            let request = Request::post(&url)
                .header(header::CONTENT_TYPE, proto::CONTENT_TYPE)
                .header(header::CONTENT_LENGTH, body.len());
            let answer = self.call(request, Payload::Whole(body.clone())).await?;
            answer.expect(&[StatusCode::ACCEPTED]).await.map(drop)
        })
        .await
    }

    /// Replaces the profile of a command of an image, or the image's general one, by this JSON. It answers before the boot pack is built.
    pub async fn put_profile(
        &self,
        repository: &str,
        manifest: Digest,
        command: Option<&CommandKey>,
        json: Bytes,
    ) -> Result<(), WireError> {
        let url = self.profile_url(repository, manifest, command);
        self.retrying(|| async {
            let request = Request::put(&url)
                .header(header::CONTENT_TYPE, media_type::PROFILE)
                .header(header::CONTENT_LENGTH, json.len());
            let answer = self.call(request, Payload::Whole(json.clone())).await?;
            answer.expect(&[StatusCode::ACCEPTED]).await.map(drop)
        })
        .await
    }

    /// Makes a registry forget the profile and the boot pack of a command of an image; without one, all profiles and boot packs
    /// of the image.
    pub async fn drop_profile(
        &self,
        repository: &str,
        manifest: Digest,
        command: Option<&CommandKey>,
    ) -> Result<(), WireError> {
        let url = self.profile_url(repository, manifest, command);
        self.retrying(|| async {
            let request = Request::builder().method(Method::DELETE).uri(&url);
            self.call(request, Payload::Empty).await?.expect(&[StatusCode::ACCEPTED]).await.map(drop)
        })
        .await
    }

    fn profile_url(&self, repository: &str, manifest: Digest, command: Option<&CommandKey>) -> String {
        format!("{}/lamina/v1/{repository}/profiles/{manifest}{}", self.base(), query(command))
    }
}

/// A key needs no escapes.
fn query(command: Option<&CommandKey>) -> String {
    command.map_or_else(String::new, |command| format!("?command={command}"))
}
