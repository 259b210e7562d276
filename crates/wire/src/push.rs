//! What a push needs: uploads, and the questions about chunks and layers.

use std::collections::HashMap;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use http::{Request, StatusCode, header};
use lamina_chunk::{ChunkId, ChunkPlace, Frame, FrameId, PackId, Place};
use lamina_image::{Digest, MANIFEST_BYTES_MAX};
use prost::Message;

use crate::http_call::{Answer, Payload};
use crate::proto::{
    CONTENT_TYPE, ChunksRequest, ChunksResponse, IDS_PER_REQUEST, LAYERS_PER_REQUEST, LayersRequest,
    LayersResponse,
};
use crate::{Client, Version, WireError, proto};

/// An answer about chunks or layers is at most 1 MiB long: 4,096 frames of 60 bytes, as many packs, 3 numbers each.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// A layer that the registry can rebuild.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownLayer {
    /// The digest that was asked for.
    pub digest: Digest,
    /// Its recipe's blob.
    pub recipe: Digest,
    /// The sha256 of its plain tar.
    pub diff_id: Digest,
    /// The length of its plain tar, in bytes.
    pub tar_bytes: u64,
}

impl Client {
    /// Uploads a blob that is in memory, if the registry does not have it. Two requests.
    pub async fn push_blob(&self, repository: &str, digest: Digest, bytes: Bytes) -> Result<(), WireError> {
        self.retrying(|| async {
            let location = self.begin_upload(repository).await?;
            let request = Request::put(with_digest(&location, digest))
                .header(header::CONTENT_LENGTH, bytes.len())
                .header(header::CONTENT_TYPE, "application/octet-stream");
            // a pack of 64 MiB takes a minute over 10 Mbit/s
            let answer = self.upload(request, Payload::Whole(bytes.clone())).await?;
            answer.expect(&[StatusCode::CREATED]).await.map(drop)
        })
        .await
    }

    /// Uploads a blob of known length as it comes. Not repeated on failure: the stream cannot be read again.
    pub async fn push_blob_stream(
        &self,
        repository: &str,
        digest: Digest,
        len: u64,
        bytes: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), WireError> {
        let location = self.begin_upload(repository).await?;
        let request = Request::patch(&location)
            .header(header::CONTENT_LENGTH, len)
            .header(header::CONTENT_TYPE, "application/octet-stream");
        let answer = self.upload(request, Payload::Stream(bytes)).await?;
        let answer = answer.expect(&[StatusCode::ACCEPTED]).await?;
        let location = answer.location()?.to_string();
        let request = Request::put(with_digest(&location, digest)).header(header::CONTENT_LENGTH, 0);
        self.call(request, Payload::Empty).await?.expect(&[StatusCode::CREATED]).await.map(drop)
    }

    /// Makes a blob that the registry has in another repository belong to this one too. False where it has none that
    /// may be read. One request, or two.
    pub async fn mount_blob(&self, repository: &str, digest: Digest) -> Result<bool, WireError> {
        let url = format!("{}/v2/{repository}/blobs/uploads/?mount={digest}", self.base());
        let request = Request::post(url).header(header::CONTENT_LENGTH, 0);
        let answer = self.call(request, Payload::Empty).await?;
        let answer = answer.expect(&[StatusCode::CREATED, StatusCode::ACCEPTED]).await?;
        if answer.status() == StatusCode::CREATED {
            return Ok(true);
        }
        // it began an upload instead, which nobody wants; where this fails it expires
        if let Ok(location) = answer.location() {
            let request = Request::delete(location.to_string());
            let _ = self.call(request, Payload::Empty).await;
        }
        Ok(false)
    }

    async fn begin_upload(&self, repository: &str) -> Result<String, WireError> {
        let url = format!("{}/v2/{repository}/blobs/uploads/", self.base());
        let request = Request::post(url).header(header::CONTENT_LENGTH, 0);
        let answer = self.call(request, Payload::Empty).await?.expect(&[StatusCode::ACCEPTED]).await?;
        Ok(answer.location()?.to_string())
    }

    /// Puts a manifest under a tag or its digest. May take long: the registry checks what it did not cut itself.
    pub async fn push_manifest(
        &self,
        repository: &str,
        version: &Version,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<(), WireError> {
        self.put_manifest(repository, version, media_type, bytes).await.map(drop)
    }

    /// The same, with what the registry answered.
    pub(crate) async fn put_manifest(
        &self,
        repository: &str,
        version: &Version,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Answer, WireError> {
        debug_assert!(bytes.len() <= MANIFEST_BYTES_MAX);
        let url = format!("{}/v2/{repository}/manifests/{version}", self.base());
        let request = Request::put(url)
            .header(header::CONTENT_TYPE, media_type)
            .header(header::CONTENT_LENGTH, bytes.len());
        let answer = self.upload(request, Payload::Whole(bytes)).await?;
        answer.expect(&[StatusCode::CREATED]).await
    }

    /// The tags of a repository, as far as one answer lists them; none where it does not exist.
    pub async fn tags(&self, repository: &str) -> Result<Vec<String>, WireError> {
        #[derive(serde::Deserialize)]
        struct List {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let url = format!("{}/v2/{repository}/tags/list", self.base());
        let listed = self.retrying(|| async {
            let answer = self.call(Request::get(&url), Payload::Empty).await?;
            answer.expect(&[StatusCode::OK]).await?.bytes(MANIFEST_BYTES_MAX as u64).await
        });
        let bytes = match listed.await {
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            bytes => bytes?,
        };
        let list: List = serde_json::from_slice(&bytes)
            .map_err(|error| WireError::Answer { url, reason: error.to_string() })?;
        Ok(list.tags.unwrap_or_default())
    }

    /// Where each of these chunks is, `None` for those that the registry lacks, or does not offer to who pushes to this
    /// repository. One request for 4,096.
    pub async fn known_chunks(
        &self,
        repository: &str,
        ids: &[ChunkId],
    ) -> Result<Vec<Option<ChunkPlace>>, WireError> {
        let mut places = Vec::with_capacity(ids.len());
        for ids in ids.chunks(IDS_PER_REQUEST) {
            let ids: Vec<u8> = ids.iter().flat_map(|id| *id.as_bytes()).collect();
            let count = ids.len() / 32;
            let answer: ChunksResponse = self.ask(repository, "chunks", &ChunksRequest { ids }).await?;
            let found = read_places(&answer).filter(|found| found.len() == count);
            let url = format!("{}/lamina/v1/{repository}/chunks", self.base());
            places.extend(found.ok_or(WireError::Answer { url, reason: "its places do not add up".into() })?);
        }
        Ok(places)
    }

    /// Those of these layers that the registry can rebuild for this repository; `None` where it is an OCI registry of another kind, which cannot
    /// say. One request for 1,000, and at least one.
    pub async fn known_layers(
        &self,
        repository: &str,
        digests: &[Digest],
    ) -> Result<Option<Vec<KnownLayer>>, WireError> {
        match self.ask_layers(repository, digests).await {
            Err(error) if error.is_unserved() => self.check_api().await.map(|()| None),
            layers => layers.map(Some),
        }
    }

    /// Whether an OCI registry answers, and lets this client in.
    async fn check_api(&self) -> Result<(), WireError> {
        let url = format!("{}/v2/", self.base());
        let asked = self.retrying(|| async {
            self.call(Request::get(&url), Payload::Empty).await?.expect(&[StatusCode::OK]).await.map(drop)
        });
        asked.await.map_err(|error| match error.is_unserved() {
            true => WireError::NoRegistry { url: url.clone(), reason: error.to_string() },
            false => error,
        })
    }

    async fn ask_layers(&self, repository: &str, digests: &[Digest]) -> Result<Vec<KnownLayer>, WireError> {
        let mut layers = Vec::new();
        // no question is also a question: whether this is a registry of ours
        let none: [&[Digest]; 1] = [&[]];
        let questions = digests.chunks(LAYERS_PER_REQUEST);
        let questions = none.into_iter().take(usize::from(digests.is_empty())).chain(questions);
        for digests in questions {
            let digests = digests.iter().map(Digest::to_string).collect();
            let answer: LayersResponse = self.ask(repository, "layers", &LayersRequest { digests }).await?;
            for layer in answer.layers {
                let url = format!("{}/lamina/v1/{repository}/layers", self.base());
                let wrong =
                    |_| WireError::Answer { url: url.clone(), reason: "a layer without a digest".into() };
                layers.push(KnownLayer {
                    digest: layer.digest.parse().map_err(wrong)?,
                    recipe: layer.recipe.parse().map_err(wrong)?,
                    diff_id: layer.diff_id.parse().map_err(wrong)?,
                    tar_bytes: layer.tar_bytes,
                });
            }
        }
        Ok(layers)
    }

    /// What the registry says of an image's conversion, as JSON.
    pub async fn image_status(&self, repository: &str, manifest: Digest) -> Result<Bytes, WireError> {
        let url = format!("{}/lamina/v1/{repository}/images/{manifest}", self.base());
        self.retrying(|| async {
            let answer = self.call(Request::get(&url), Payload::Empty).await?;
            answer.expect(&[StatusCode::OK]).await?.bytes(ANSWER_BYTES_MAX).await
        })
        .await
    }

    async fn ask<Q: Message, A: Message + Default>(
        &self,
        repository: &str,
        what: &str,
        question: &Q,
    ) -> Result<A, WireError> {
        let url = format!("{}/lamina/v1/{repository}/{what}", self.base());
        let body = Bytes::from(question.encode_to_vec());
        let answer = self
            .retrying(|| async {
                let request = Request::post(&url)
                    .header(header::CONTENT_TYPE, CONTENT_TYPE)
                    .header(header::CONTENT_LENGTH, body.len());
                let answer = self.call(request, Payload::Whole(body.clone())).await?;
                answer.expect(&[StatusCode::OK]).await?.bytes(ANSWER_BYTES_MAX).await
            })
            .await?;
        A::decode(answer).map_err(|error| WireError::Answer { url, reason: error.to_string() })
    }
}

/// Makes an answer of places; both ends are in this file so that they stay in step.
pub fn write_places(places: &[Option<ChunkPlace>]) -> ChunksResponse {
    let mut answer = ChunksResponse::default();
    let (mut packs, mut frames) = (HashMap::new(), HashMap::new());
    let position = |count: usize| u32::try_from(count).expect("at most 4096 places");
    for place in places {
        let Some(ChunkPlace { frame_id, place, skip, len }) = place else {
            answer.frame.push(0);
            answer.skip.push(0);
            answer.len.push(0);
            continue;
        };
        let pack = *packs.entry(place.pack).or_insert_with(|| {
            answer.packs.extend_from_slice(place.pack.as_bytes());
            position(answer.packs.len() / 32 - 1)
        });
        let frame = *frames.entry(*frame_id).or_insert_with(|| {
            let Frame { offset, sealed_len, plain_len } = place.frame;
            let id = frame_id.as_bytes().to_vec();
            answer.frames.push(proto::Frame { id, pack, offset, sealed_len, plain_len });
            position(answer.frames.len())
        });
        answer.frame.push(frame);
        answer.skip.push(*skip);
        answer.len.push(*len);
    }
    answer
}

fn read_places(answer: &ChunksResponse) -> Option<Vec<Option<ChunkPlace>>> {
    let (packs, rest) = answer.packs.as_chunks::<32>();
    let count = answer.frame.len();
    if !rest.is_empty() || answer.skip.len() != count || answer.len.len() != count {
        return None;
    }
    let place = |position: usize| {
        let Some(number) = answer.frame[position].checked_sub(1) else { return Some(None) };
        let frame = answer.frames.get(number as usize)?;
        let proto::Frame { offset, sealed_len, plain_len, .. } = *frame;
        let place = Place {
            pack: PackId::from_bytes(*packs.get(frame.pack as usize)?),
            frame: Frame { offset, sealed_len, plain_len },
        };
        let frame_id = FrameId::from_bytes(frame.id.as_slice().try_into().ok()?);
        let found = ChunkPlace { frame_id, place, skip: answer.skip[position], len: answer.len[position] };
        found.is_possible().then_some(Some(found))
    };
    (0..count).map(place).collect()
}

/// The upload's URL with the digest that finishes it.
fn with_digest(location: &str, digest: Digest) -> String {
    let separator = if location.contains('?') { '&' } else { '?' };
    format!("{location}{separator}digest={digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_through_the_wire_as_they_were() {
        let place = |number: u8| ChunkPlace {
            frame_id: FrameId::of(&[number / 2]),
            place: Place {
                pack: PackId::from_bytes([number / 4; 32]),
                frame: Frame { offset: u32::from(number / 2) * 10, sealed_len: 10, plain_len: 20 },
            },
            skip: u32::from(number % 2) * 10,
            len: 10,
        };
        let places: Vec<_> = (0..20).map(|number| (number % 3 > 0).then(|| place(number))).collect();
        let answer = write_places(&places);
        assert!(answer.frames.len() < 14, "frames are named once");
        assert_eq!(read_places(&answer), Some(places));
    }

    #[test]
    fn an_answer_that_does_not_add_up_is_refused() {
        let place = Place {
            pack: PackId::from_bytes([1; 32]),
            frame: Frame { offset: 0, sealed_len: 1, plain_len: 1 },
        };
        let good = write_places(&[Some(ChunkPlace { frame_id: FrameId::of(b""), place, skip: 0, len: 1 })]);
        let broken: [fn(&mut ChunksResponse); 5] = [
            |answer| answer.packs.truncate(31),
            |answer| answer.frame[0] = 9,
            |answer| answer.skip.clear(),
            |answer| answer.frames[0].pack = 7,
            |answer| answer.len[0] = 2,
        ];
        for change in broken {
            let mut answer = good.clone();
            change(&mut answer);
            assert_eq!(read_places(&answer), None);
        }
    }
}
