//! What our own clients ask: which chunks and layers are known, and what became of an image.

use futures_util::stream::{self, StreamExt, TryStreamExt};
use http::{HeaderValue, Response, StatusCode, header};
use lamina_chunk::ChunkId;
use lamina_image::{Digest, Document};
use lamina_store::{Blob, ImageState, Repo};
use lamina_wire::{proto, write_places};
use prost::Message;

use crate::api::{Answer, Api, Head, json};
use crate::body::{Body, Inbound, full};
use crate::route::parse_digest;
use crate::{ApiError, learn};

/// A digest as text, and what protobuf adds.
const DIGEST_TEXT_BYTES: usize = 80;
/// Layer records that are read at the same time.
const READS: usize = 16;

impl Api {
    /// `POST /lamina/v1/<repository>/chunks`.
    pub(crate) async fn find_chunks(&self, head: &Head, repo: &Repo, body: Inbound) -> Answer {
        let bytes = body.whole(proto::IDS_PER_REQUEST * 32 + 16).await?;
        let request = proto::ChunksRequest::decode(bytes).map_err(not_protobuf)?;
        if request.ids.len() % 32 != 0 || request.ids.len() > proto::IDS_PER_REQUEST * 32 {
            let text =
                format!("ids are {} bytes, not up to {} times 32", request.ids.len(), proto::IDS_PER_REQUEST);
            return Err(ApiError::Invalid(text));
        }
        let ids = request.ids.chunks_exact(32);
        let ids: Vec<_> = ids.map(|id| ChunkId::from_bytes(id.try_into().expect("32 bytes"))).collect();
        let places = self.store.find_chunks(&ids).await;
        Ok(protobuf(&write_places(&self.visible(&head.caller, repo, places).await?)))
    }

    /// `POST /lamina/v1/<repository>/layers`.
    pub(crate) async fn find_layers(&self, head: &Head, repo: &Repo, body: Inbound) -> Answer {
        let bytes = body.whole(proto::LAYERS_PER_REQUEST * DIGEST_TEXT_BYTES).await?;
        let request = proto::LayersRequest::decode(bytes).map_err(not_protobuf)?;
        if request.digests.len() > proto::LAYERS_PER_REQUEST {
            let text =
                format!("{} layers are more than {}", request.digests.len(), proto::LAYERS_PER_REQUEST);
            return Err(ApiError::Invalid(text));
        }
        let digests: Vec<Digest> =
            request.digests.iter().map(|digest| parse_digest(digest)).collect::<Result<_, _>>()?;
        let known = stream::iter(digests.into_iter().map(|digest| async move {
            let mut layer = self.store.layer(digest).await?;
            if let (Some(found), true) = (&layer, self.access.is_some())
                && self.holder(&head.caller, repo, found.recipe).await?.is_none()
            {
                layer = None;
            }
            Ok::<_, ApiError>(layer.map(|layer| proto::Layer {
                digest: digest.to_string(),
                recipe: layer.recipe.to_string(),
                diff_id: layer.diff_id.to_string(),
                tar_bytes: layer.tar_bytes,
            }))
        }));
        let known = known.buffered(READS).try_filter_map(|layer| async move { Ok(layer) });
        Ok(protobuf(&proto::LayersResponse { layers: known.try_collect().await? }))
    }

    /// `GET /lamina/v1/<repository>/images/<digest>`.
    pub(crate) async fn image_status(&self, repo: &Repo, digest: Digest) -> Answer {
        let unknown = || ApiError::ManifestUnknown(format!("{repo} {digest}"));
        self.store.manifest_link(repo, digest).await?.ok_or_else(unknown)?;
        let coming = || self.upstream.as_ref()?.images.record(repo, digest, self.config().now());
        let mut image = self.store.image(digest).await?.or_else(coming).ok_or_else(unknown)?;
        if let Some(counts) = self.converter.counts(digest) {
            image.counts = counts;
        }
        let mut status = serde_json::to_value(&image).expect("a record has string keys");
        if let (ImageState::Done, Some(status)) = (image.state, status.as_object_mut()) {
            status.extend(learn::status(&self.store, repo, digest).await?);
            status.insert("rebuilt".to_owned(), serde_json::json!(self.rebuilt_layers(repo, digest).await?));
        }
        Ok(json(StatusCode::OK, status.to_string()))
    }

    /// The layers of an image that are not stored, but made again whenever somebody asks for them.
    async fn rebuilt_layers(&self, repo: &Repo, image: Digest) -> Result<Vec<Digest>, ApiError> {
        let Some((media_type, bytes)) = self.store.manifest(repo, image).await? else {
            return Ok(Vec::new());
        };
        let Document::Manifest(manifest) = Document::parse(&media_type, &bytes)? else {
            return Ok(Vec::new());
        };
        let look_up = manifest.layers.into_iter().map(|layer| async move {
            let blob = self.store.blob(layer.digest).await?;
            Ok::<_, ApiError>(matches!(blob, Some(Blob::Rebuilt { .. })).then_some(layer.digest))
        });
        let rebuilt = stream::iter(look_up).buffered(READS);
        rebuilt.try_filter_map(|layer| async move { Ok(layer) }).try_collect().await
    }
}

fn not_protobuf(error: prost::DecodeError) -> ApiError {
    ApiError::Invalid(format!("the request does not parse: {error}"))
}

fn protobuf(message: &impl Message) -> Response<Body> {
    let mut response = Response::new(full(message.encode_to_vec()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(proto::CONTENT_TYPE));
    response
}
