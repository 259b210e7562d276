//! Lists: repositories, tags of a repository, and what hangs on a manifest.

use http::{HeaderValue, Response, StatusCode, header};
use lamina_image::{Descriptor, Digest, Index, media_type};
use lamina_store::Repo;
use serde_json::json;

use crate::api::{Answer, Api, Head, json};
use crate::body::Body;
use crate::query::encode;
use crate::route::parse_digest;
use crate::{Action, ApiError};

/// Tags or repositories in one answer, whatever was asked for.
const NAMES_MAX: usize = 10_000;

impl Api {
    /// `GET _catalog`, in pages: the repositories that have manifests.
    pub(crate) async fn list_repositories(&self, head: &Head) -> Answer {
        let (n, last) = page(head)?;
        let shown = |repo: &Repo| {
            self.access.as_ref().is_none_or(|access| access.may(&head.caller, repo, Action::Pull))
        };
        let (repositories, more) = self.store.repositories(last, n, shown).await?;
        let names: Vec<&str> = repositories.iter().map(Repo::as_str).collect();
        let mut response = json(StatusCode::OK, json!({ "repositories": &names }).to_string());
        if let (true, Some(last)) = (more, names.last()) {
            next(&mut response, &format!("/v2/_catalog?n={n}&last={last}"));
        }
        Ok(response)
    }

    /// `GET tags/list`, in pages.
    pub(crate) async fn list_tags(&self, head: &Head, repo: &Repo) -> Answer {
        let (n, last) = page(head)?;
        let all = self.store.tags(repo).await?;
        if all.is_empty() && !self.store.has_repository(repo).await? {
            return Err(ApiError::NameUnknown(repo.to_string()));
        }
        let mut tags: Vec<&str> = all.iter().map(|(tag, _)| tag.as_str()).filter(|tag| *tag > last).collect();
        let more = tags.len() > n;
        tags.truncate(n);
        let mut response = json(StatusCode::OK, json!({ "name": repo.as_str(), "tags": &tags }).to_string());
        if let (true, Some(last)) = (more, tags.last()) {
            next(&mut response, &format!("/v2/{repo}/tags/list?n={n}&last={last}"));
        }
        Ok(response)
    }

    /// `GET referrers`: an index of what hangs on a manifest, which itself need not be here.
    pub(crate) async fn list_referrers(&self, head: &Head, repo: &Repo, subject: Digest) -> Answer {
        let last = head.query.value("last").map(parse_digest).transpose()?;
        let (mut manifests, more) = self.store.referrers_after(repo, subject, last).await?;
        let last = manifests.last().filter(|_| more).map(|manifest| manifest.digest);
        self.leave_out_superseded(subject, &mut manifests).await?;
        let filter = head.query.value("artifactType");
        if let Some(filter) = filter {
            manifests.retain(|manifest| manifest.artifact_type.as_deref() == Some(filter));
        }
        let index = Index {
            schema_version: 2,
            media_type: Some(media_type::OCI_INDEX.to_owned()),
            artifact_type: None,
            manifests,
            subject: None,
            annotations: Default::default(),
        };
        let text = serde_json::to_vec(&index).expect("an index has string keys");
        let mut response = json(StatusCode::OK, text);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type::OCI_INDEX));
        if filter.is_some() {
            headers.insert("oci-filters-applied", HeaderValue::from_static("artifactType"));
        }
        if let Some(last) = last {
            let filter = filter.map(|kind| format!("&artifactType={}", encode(kind))).unwrap_or_default();
            next(&mut response, &format!("/v2/{repo}/referrers/{subject}?last={last}{filter}"));
        }
        Ok(response)
    }

    /// Leaves out artifacts that a collection has superseded, where the one that took their place is among `manifests`, a page of what
    /// hangs on an image: a client that copies all that it is shown would be refused them, and with them the copy. Whoever knows one
    /// by its digest gets it until it is collected.
    ///
    /// distribution-spec 1.1, "Listing Referrers", asks that all that is listed hangs there, and not that all is listed that does. To
    /// clients it is as if these were collected already; and nodes find in the other one the same tree, and where each pack went.
    pub(crate) async fn leave_out_superseded(
        &self,
        image: Digest,
        manifests: &mut Vec<Descriptor>,
    ) -> Result<(), ApiError> {
        // each mount asks for this list: the usual one costs no more
        if manifests.iter().filter_map(Descriptor::hung_tree).count() < 2 {
            return Ok(());
        }
        let Some(record) = self.store.image(image).await? else { return Ok(()) };
        let (Some(tree), Some(now)) = (record.tree, record.artifact) else { return Ok(()) };
        // one that came since the list was read is not in it
        if manifests.iter().any(|manifest| manifest.digest == now.digest) {
            manifests.retain(|it| it.digest == now.digest || it.hung_tree() != Some(tree.digest));
        }
        Ok(())
    }
}

/// How many names are wanted, and after which.
fn page(head: &Head) -> Result<(usize, &str), ApiError> {
    let wrong = |_| ApiError::Invalid("the parameter n is not a number".to_owned());
    let n = head.query.value("n").map(str::parse::<usize>).transpose().map_err(wrong)?;
    Ok((n.unwrap_or(NAMES_MAX).min(NAMES_MAX), head.query.value("last").unwrap_or_default()))
}

/// Says where the list goes on.
fn next(response: &mut Response<Body>, path: &str) {
    let link = format!("<{path}>; rel=\"next\"");
    response.headers_mut().insert(header::LINK, link.parse().expect("validated names and digits"));
}
