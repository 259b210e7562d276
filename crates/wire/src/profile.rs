//! Profiles and traces: what a node tells a registry of a start, and what people hand in themselves.

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use lamina_image::{Digest, Ino, PROFILE_ITEMS_MAX, Trace, TraceRun, media_type};
use prost::Message;

use crate::http_call::Payload;
use crate::{Client, WireError, proto};

/// The message of a trace of a start on the tree with this digest.
pub fn write_trace(tree: Digest, trace: &Trace) -> proto::Trace {
    proto::Trace {
        tree: tree.to_string(),
        boot: trace.boot,
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
    /// Hands a trace of a start of the image `manifest` to a registry that learns from them. It answers before it has built
    /// anything. *Errors*: [`WireError::is_not_found`] from a registry that does not.
    pub async fn send_trace(
        &self,
        repository: &str,
        manifest: Digest,
        trace: &proto::Trace,
    ) -> Result<(), WireError> {
        let url = format!("{}/lamina/v1/{repository}/traces/{manifest}", self.base());
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

    /// Replaces the profile of an image by this JSON. It answers before the boot pack is built.
    pub async fn put_profile(
        &self,
        repository: &str,
        manifest: Digest,
        json: Bytes,
    ) -> Result<(), WireError> {
        let url = self.profile_url(repository, manifest);
        self.retrying(|| async {
            let request = Request::put(&url)
                .header(header::CONTENT_TYPE, media_type::PROFILE)
                .header(header::CONTENT_LENGTH, json.len());
            let answer = self.call(request, Payload::Whole(json.clone())).await?;
            answer.expect(&[StatusCode::ACCEPTED]).await.map(drop)
        })
        .await
    }

    /// Makes a registry forget the profile and the boot pack of an image.
    pub async fn drop_profile(&self, repository: &str, manifest: Digest) -> Result<(), WireError> {
        let url = self.profile_url(repository, manifest);
        self.retrying(|| async {
            let request = Request::builder().method(Method::DELETE).uri(&url);
            self.call(request, Payload::Empty).await?.expect(&[StatusCode::ACCEPTED]).await.map(drop)
        })
        .await
    }

    fn profile_url(&self, repository: &str, manifest: Digest) -> String {
        format!("{}/lamina/v1/{repository}/profiles/{manifest}", self.base())
    }
}
