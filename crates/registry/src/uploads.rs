//! Uploads of blobs: in one request, in two, or part by part.

use http::{StatusCode, header};
use lamina_image::{Algorithm, Digest};
use lamina_store::{Repo, Session};
use uuid::Uuid;

use crate::api::{Answer, Api, Head, empty};
use crate::body::Inbound;
use crate::range::part;
use crate::route::parse_digest;
use crate::{Action, ApiError};

/// How the specification writes that `received` bytes are here. It has no way to say none.
pub(crate) fn range_of(received: u64) -> String {
    format!("0-{}", received.saturating_sub(1))
}

fn location(repo: &Repo, id: Uuid) -> String {
    format!("/v2/{repo}/blobs/uploads/{id}")
}

fn accepted(status: StatusCode, repo: &Repo, session: &Session) -> Answer {
    let headers = [
        ("location", location(repo, session.id())),
        ("range", range_of(session.received())),
        ("docker-upload-uuid", session.id().to_string()),
    ];
    Ok(empty(status, &headers))
}

fn created(repo: &Repo, digest: Digest) -> Answer {
    let location = format!("/v2/{repo}/blobs/{digest}");
    Ok(empty(StatusCode::CREATED, &[("location", location), ("docker-content-digest", digest.to_string())]))
}

impl Api {
    /// `POST`: begins an upload, does all of it where the digest is given, or finds the blob of `mount`.
    pub(crate) async fn begin_upload(&self, head: &Head, repo: &Repo, body: Inbound) -> Answer {
        if let Some(mount) = head.query.value("mount") {
            let digest = parse_digest(mount)?;
            let from = head.query.value("from").filter(|from| !from.is_empty());
            let from = from.map(str::parse::<Repo>).transpose()?;
            if self.mount(head, repo, digest, from).await? {
                return created(repo, digest);
            }
        }
        let Some(digest) = head.query.value("digest") else {
            let session = self.store.begin_upload_by(repo, algorithm(head)?)?;
            return accepted(StatusCode::ACCEPTED, repo, &session);
        };
        let digest = parse_digest(digest)?;
        let mut session = self.store.begin_upload_by(repo, digest.algorithm())?;
        match receive(&mut session, body).await {
            Ok(()) => drop(session.finish(digest).await?),
            // nobody knows its id, so nobody could go on
            Err(error) => {
                session.cancel().await;
                return Err(error);
            }
        }
        created(repo, digest)
    }

    /// Makes a blob of another repository belong to this one too; of any repository, where none is named. False where it
    /// is not there.
    async fn mount(
        &self,
        head: &Head,
        repo: &Repo,
        digest: Digest,
        from: Option<Repo>,
    ) -> Result<bool, ApiError> {
        let from = match from {
            // to whoever may not read it, it is not there
            Some(from) => Some(from).filter(|from| self.may_mount(head, from)),
            None => self.holder(&head.caller, repo, digest).await?,
        };
        let Some(from) = from else { return Ok(false) };
        let found = self.store.take_blob_in(&from, digest).await?.is_some();
        if found {
            self.store.link_blobs(repo, [digest]).await?;
        }
        Ok(found)
    }

    fn may_mount(&self, head: &Head, from: &Repo) -> bool {
        self.access.as_ref().is_none_or(|access| access.may(&head.caller, from, Action::Pull))
    }

    /// `PATCH`: the next part.
    pub(crate) async fn append_upload(&self, head: &Head, repo: &Repo, id: Uuid, body: Inbound) -> Answer {
        let mut session = self.store.resume_upload(repo, id)?;
        check_order(head, repo, &session)?;
        session = received(session, body).await?;
        accepted(StatusCode::ACCEPTED, repo, &session)
    }

    /// `PUT`: the last part, which may be empty, and the digest of all.
    pub(crate) async fn finish_upload(&self, head: &Head, repo: &Repo, id: Uuid, body: Inbound) -> Answer {
        let digest = head.query.value("digest");
        let digest =
            digest.ok_or_else(|| ApiError::DigestInvalid("the parameter digest is missing".to_owned()))?;
        let digest = parse_digest(digest)?;
        let mut session = self.store.resume_upload(repo, id)?;
        check_order(head, repo, &session)?;
        session = received(session, body).await?;
        session.finish(digest).await?;
        created(repo, digest)
    }

    /// `GET`: how far it is.
    pub(crate) fn upload_status(&self, repo: &Repo, id: Uuid) -> Answer {
        accepted(StatusCode::NO_CONTENT, repo, &self.store.resume_upload(repo, id)?)
    }

    /// `DELETE`: forgets it.
    pub(crate) async fn cancel_upload(&self, repo: &Repo, id: Uuid) -> Answer {
        self.store.resume_upload(repo, id)?.cancel().await;
        Ok(empty(StatusCode::NO_CONTENT, &[]))
    }
}

/// What the client will name the blob by, where it says so.
fn algorithm(head: &Head) -> Result<Algorithm, ApiError> {
    match head.query.value("digest-algorithm") {
        None | Some("sha256") => Ok(Algorithm::Sha256),
        Some("sha512") => Ok(Algorithm::Sha512),
        Some(other) => {
            let other: String = other.chars().take(32).collect();
            Err(ApiError::DigestInvalid(format!(
                "{other:?} is not a digest algorithm here; use sha256 or sha512"
            )))
        }
    }
}

/// A part that says where it belongs must belong to the end.
fn check_order(head: &Head, repo: &Repo, session: &Session) -> Result<(), ApiError> {
    let Some(header) = head.header(header::CONTENT_RANGE) else { return Ok(()) };
    let range = part(header);
    let range = range.ok_or_else(|| ApiError::Invalid(format!("{header:?} is not a content range")))?;
    let received = session.received();
    if range.start == received {
        return Ok(());
    }
    Err(ApiError::OutOfOrder { received, location: location(repo, session.id()) })
}

/// Takes a part's bytes. Where the client goes away they stay, and it may go on from there; where the store fails the
/// upload is given up.
async fn received(mut session: Session, body: Inbound) -> Result<Session, ApiError> {
    match receive(&mut session, body).await {
        Ok(()) => Ok(session),
        Err(error @ ApiError::Store(_)) => {
            session.cancel().await;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

async fn receive(session: &mut Session, mut body: Inbound) -> Result<(), ApiError> {
    while let Some(bytes) = body.next().await? {
        session.write(bytes).await?;
    }
    Ok(())
}
