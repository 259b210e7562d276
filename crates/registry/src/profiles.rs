//! What is told of starts: traces from nodes, profiles from people. Checked here, learnt in the background.

use bytes::Bytes;
use http::StatusCode;
use lamina_image::{Digest, PROFILE_BYTES_MAX, ParseCommandKeyError, Profile};
use lamina_store::Repo;
use lamina_wire::{proto, read_trace};
use prost::Message;
use tokio::sync::SemaphorePermit;
use tokio::task::spawn_blocking;

use crate::ApiError;
use crate::api::{Answer, Api, Head, empty};
use crate::body::Inbound;
use crate::queue::{Of, Pushed, Work};

/// A trace is at most this long, in bytes: half a million names and runs.
const TRACE_BYTES_MAX: usize = 16 << 20;

/// What a good trace is good for.
enum Told {
    Something,
    /// The start had all it needed.
    Nothing,
}

impl Api {
    /// `POST /lamina/v1/<repository>/traces/<digest>`.
    pub(crate) async fn take_trace(&self, of: Of, body: Inbound) -> Answer {
        let (image, tree) = (of.image, self.tree_of(&of).await?);
        if self.learner.was_traced(&of) {
            tracing::debug!(%image, "a trace was dropped: the last one came just before");
            body.ignored(TRACE_BYTES_MAX).await?;
            return Ok(empty(StatusCode::ACCEPTED, &[]));
        }
        let _permit = self.take_in()?;
        let bytes = body.whole(TRACE_BYTES_MAX).await?;
        let checked = bytes.clone();
        let _turn = self.checks.acquire().await.expect("never closed");
        let told =
            spawn_blocking(move || check_trace(checked, tree)).await.expect("checking does not panic")?;
        match told {
            Told::Something => self.learn(of, Work::Trace(bytes)),
            Told::Nothing => Ok(empty(StatusCode::ACCEPTED, &[])),
        }
    }

    /// `PUT /lamina/v1/<repository>/profiles/<digest>`.
    pub(crate) async fn put_profile(&self, of: Of, body: Inbound) -> Answer {
        self.tree_of(&of).await?;
        let _permit = self.take_in()?;
        let bytes = body.whole(PROFILE_BYTES_MAX).await?;
        let checked = bytes.clone();
        let _turn = self.checks.acquire().await.expect("never closed");
        let parsed = spawn_blocking(move || Profile::parse(&checked).map(drop)).await;
        parsed.expect("parsing does not panic").map_err(|error| ApiError::Invalid(error.to_string()))?;
        self.learn(of, Work::Replace(bytes))
    }

    /// `DELETE /lamina/v1/<repository>/profiles/<digest>`.
    pub(crate) async fn drop_profile(&self, of: Of) -> Answer {
        let unknown = || ApiError::ManifestUnknown(format!("{} {}", of.repo, of.image));
        self.store.manifest_link(&of.repo, of.image).await?.ok_or_else(unknown)?;
        self.learn(of, Work::Forget)
    }

    fn learn(&self, of: Of, work: Work) -> Answer {
        match self.learner.push(of, work) {
            Pushed::Queued | Pushed::Dropped => Ok(empty(StatusCode::ACCEPTED, &[])),
            Pushed::Full => Err(ApiError::Busy),
        }
    }

    fn take_in(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        self.intake.try_acquire().map_err(|_| ApiError::Busy)
    }

    /// The tree of an image in this repository.
    async fn tree_of(&self, of: &Of) -> Result<Digest, ApiError> {
        let Of { repo, image, .. } = of;
        let image = *image;
        let unknown = || ApiError::ManifestUnknown(format!("{repo} {image}"));
        self.store.manifest_link(repo, image).await?.ok_or_else(unknown)?;
        let record = self.store.image(image).await?;
        Ok(record.and_then(|record| record.tree).ok_or(ApiError::NoTree(image))?.digest)
    }
}

/// What a request is about: with `?command=KEY`, that command of the image.
pub(crate) fn about(head: &Head, repo: Repo, image: Digest) -> Result<Of, ApiError> {
    let command = head.query.value("command").map(str::parse).transpose();
    let command = command.map_err(|error: ParseCommandKeyError| ApiError::Invalid(error.to_string()))?;
    Ok(Of { repo, image, command })
}

fn check_trace(bytes: Bytes, tree: Digest) -> Result<Told, ApiError> {
    let message = proto::Trace::decode(bytes);
    let message = message.map_err(|error| ApiError::Invalid(format!("the trace does not parse: {error}")))?;
    let (of, trace) = read_trace(&message).ok_or_else(|| {
        let text = "the trace makes no sense: its columns are not equally long, or over the limit, or its tree is no digest";
        ApiError::Invalid(text.to_owned())
    })?;
    if of != tree {
        return Err(ApiError::Invalid(format!("the trace is of tree {of}, but the image's tree is {tree}")));
    }
    Ok(if trace.runs.is_empty() { Told::Nothing } else { Told::Something })
}
