//! Images that come with their tree: what `lamina push` sends.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_chunk::{ChunkId, ChunkPlace, PackBuilder, PackId, PackRecord, Sealed};
use lamina_image::{
    ChunkSink, Descriptor, Digest, IngestOptions, LayerInput, Manifest, Progress, RECIPE_ANNOTATION, Recipe,
    SinkError, TREE_ANNOTATION, TREE_BYTES_ANNOTATION, TreeNames, derive_tree, ingest, media_type, pack_tree,
};
use lamina_store::ImageState;
use lamina_testkit::noise;
use lamina_wire::proto;
use prost::Message;

use crate::support::{Image, Registry, Reply, config_of, manifest_of, run, tar_of};

/// A client's answer to "where is this chunk?".
type Known = fn(&[PackRecord], ChunkId) -> Option<ChunkPlace>;

/// A client that asks nobody and keeps its packs.
struct Sink {
    packs: Mutex<Vec<(PackId, Bytes, Vec<PackRecord>)>>,
    known: Known,
}

impl ChunkSink for Sink {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        let packs = self.packs.lock().unwrap();
        let records: Vec<PackRecord> = packs.iter().flat_map(|(_, _, records)| records.clone()).collect();
        Ok(ids.iter().map(|id| (self.known)(&records, *id)).collect())
    }

    fn put(&self, pack: PackId, bytes: Bytes, records: &[PackRecord]) -> Result<(), SinkError> {
        self.packs.lock().unwrap().push((pack, bytes, records.to_vec()));
        Ok(())
    }
}

fn cut(tars: &[Bytes], sink: &dyn ChunkSink) -> Vec<Recipe> {
    let layers = tars.iter().map(|tar| LayerInput {
        name: "a layer".to_owned(),
        bytes: Box::new(&tar[..]),
        diff_id: None,
    });
    ingest(layers.collect(), sink, IngestOptions::default(), &Progress::default()).unwrap()
}

/// Everything that a push sends, to be sent as it is or changed first.
pub(crate) struct Bound {
    packs: Vec<Bytes>,
    recipes: Vec<Bytes>,
    pub(crate) tree: Bytes,
    config: Bytes,
    layers: Vec<Descriptor>,
}

impl Bound {
    pub(crate) fn new(tars: &[Bytes]) -> Self {
        let sink = Sink { packs: Mutex::default(), known: |_, _| None };
        let recipes = cut(tars, &sink);
        let tree = pack_tree(&derive_tree(&recipes).unwrap()).into();
        let layers = recipes
            .iter()
            .map(|recipe| Descriptor::named(media_type::OCI_LAYER, recipe.diff_id(), recipe.tar_bytes()));
        let packs = sink.packs.into_inner().unwrap().into_iter().map(|(_, bytes, _)| bytes).collect();
        let layers = layers.collect();
        let recipes = recipes.iter().map(|recipe| recipe.blob().clone()).collect();
        Self { packs, recipes, tree, config: config_of(tars, ""), layers }
    }

    async fn push(&self, registry: &Registry, tag: &str) -> (Digest, Reply) {
        let bytes = self.push_blobs(registry).await;
        let reply = registry.put_manifest("app", tag, media_type::OCI_MANIFEST, &bytes).await;
        (Digest::of(&bytes), reply)
    }

    /// Pushes everything but the manifest, and gives that.
    pub(crate) async fn push_blobs(&self, registry: &Registry) -> Bytes {
        for blob in self.packs.iter().chain(&self.recipes).chain([&self.tree, &self.config]) {
            registry.push_blob("app", blob).await;
        }
        let mut layers = self.layers.clone();
        for (layer, recipe) in layers.iter_mut().zip(&self.recipes) {
            layer.annotations.insert(RECIPE_ANNOTATION.to_owned(), Digest::of(recipe).to_string());
        }
        let mut manifest = manifest_of(&self.config, layers);
        manifest.annotations.insert(TREE_ANNOTATION.to_owned(), Digest::of(&self.tree).to_string());
        manifest.annotations.insert(TREE_BYTES_ANNOTATION.to_owned(), self.tree.len().to_string());
        serde_json::to_vec(&manifest).unwrap().into()
    }

    /// Pushes it and wants it refused, with nothing to be seen afterwards. Gives the message.
    async fn refused(&self, registry: &Registry) -> String {
        let (digest, reply) = self.push(registry, "v1").await;
        let message = reply.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
        registry.get("/v2/app/manifests/v1").await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
        let path = format!("/v2/app/manifests/{digest}");
        registry.get(&path).await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
        let last = self.layers.last().unwrap().digest;
        registry.get(&format!("/v2/app/blobs/{last}")).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
        assert_eq!(registry.store.image(digest).await.unwrap(), None);
        message
    }
}

fn tars() -> Vec<Bytes> {
    let (one, two) = (noise(2_000_000, 1), noise(90_000, 2));
    vec![
        tar_of(&[("lib/one", &one), ("etc/motd", b"hi")]),
        tar_of(&[("lib/two", &two), ("lib/.wh.one", b"")]),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_with_its_tree_is_taken_and_any_client_pulls_its_layers() {
    let registry = Registry::start().await;
    let tars = tars();
    let bound = Bound::new(&tars);
    let (digest, reply) = bound.push(&registry, "v1").await;
    reply.expect(StatusCode::CREATED);
    let record = registry.store.image(digest).await.unwrap().unwrap();
    assert_eq!((record.state, record.artifact), (ImageState::Done, None));
    assert_eq!(record.tree.unwrap().digest, Digest::of(&bound.tree));
    for tar in &tars {
        let rebuilt =
            registry.get(&format!("/v2/app/blobs/{}", Digest::of(tar))).await.expect(StatusCode::OK);
        assert!(rebuilt.body == tar);
    }
    let back = tempfile::tempdir().unwrap();
    let target = format!("oci:{}:v1", back.path().display());
    run("skopeo", &["copy", "--src-tls-verify=false", &registry.reference("app:v1"), &target]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_and_layers_of_a_pushed_image_are_offered_as_known() {
    let registry = Registry::start().await;
    let tars = tars();
    let bound = Bound::new(&tars);
    bound.push(&registry, "v1").await.1.expect(StatusCode::CREATED);
    let id = ChunkId::of(&noise(90_000, 2)[..]);
    let records: Vec<PackRecord> =
        bound.packs.iter().flat_map(|pack| lamina_chunk::pack_records(pack).unwrap()).collect();
    let known = records[0].chunks[0].id;
    let ids = [*known.as_bytes(), [9; 32], *id.as_bytes()].concat();
    let request = proto::ChunksRequest { ids }.encode_to_vec();
    let reply =
        registry.send(Method::POST, "/lamina/v1/app/chunks", &[], request).await.expect(StatusCode::OK);
    let reply = proto::ChunksResponse::decode(reply.body).unwrap();
    assert_eq!((reply.frame[0], reply.frame[1]), (1, 0));
    assert_eq!(reply.packs, Digest::of(&bound.packs[0]).as_bytes());

    let unknown = Digest::of(b"unknown").to_string();
    let digests = vec![unknown, bound.layers[1].digest.to_string()];
    let request = proto::LayersRequest { digests }.encode_to_vec();
    let reply =
        registry.send(Method::POST, "/lamina/v1/app/layers", &[], request).await.expect(StatusCode::OK);
    let reply = proto::LayersResponse::decode(reply.body).unwrap();
    assert_eq!(reply.layers.len(), 1);
    assert_eq!(reply.layers[0].recipe, Digest::of(&bound.recipes[1]).to_string());

    let too_many = proto::ChunksRequest { ids: vec![0; 32 * 4097] }.encode_to_vec();
    registry
        .send(Method::POST, "/lamina/v1/app/chunks", &[], too_many)
        .await
        .expect(StatusCode::PAYLOAD_TOO_LARGE);
    registry.send(Method::POST, "/lamina/v1/app/layers", &[], "\u{7}").await.expect(StatusCode::BAD_REQUEST);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_that_the_recipes_do_not_make_is_refused() {
    let registry = Registry::start().await;
    let mut bound = Bound::new(&tars());
    bound.tree = Bound::new(&[tar_of(&[("bin/evil", b"1")])]).tree;
    let message = bound.refused(&registry).await;
    assert!(message.contains("not the tree that the recipes"), "{message}");
    bound.tree = Bytes::from_static(b"\x09\0\0\0\0\0\0\0garbage");
    bound.refused(&registry).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recipe_that_rebuilds_other_bytes_is_refused() {
    let registry = Registry::start().await;
    let tars = tars();
    let mut bound = Bound::new(&tars);
    let other =
        Bound::new(&[tars[0].clone(), tar_of(&[("lib/two", &noise(90_000, 3)), ("lib/.wh.one", b"")])]);
    // the other layer's recipe under this layer's name; the lengths are the same
    let mut recipe = other.recipes[1].to_vec();
    recipe[32..64].copy_from_slice(Digest::of(&tars[1]).as_bytes());
    bound.recipes[1] = recipe.into();
    bound.packs.extend(other.packs);
    bound.tree = other.tree;
    let message = bound.refused(&registry).await;
    assert!(message.contains("rebuilds a tar that hashes to"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recipe_that_lies_about_a_place_is_refused() {
    let registry = Registry::start().await;
    // two files of one length; the client says that the second lies where the first does
    let tars = [tar_of(&[("one", &noise(60_000, 1))]), tar_of(&[("two", &noise(60_000, 2))])];
    let honest = Bound::new(&tars[..1]);
    honest.push(&registry, "honest").await.1.expect(StatusCode::CREATED);
    let sink = Sink {
        packs: Mutex::default(),
        known: |records, id| {
            let pack = PackId::from_bytes([0; 32]);
            let (_, place) = records.first()?.places(pack).next()?;
            Some(ChunkPlace { frame_id: id, ..place })
        },
    };
    let records = lamina_chunk::pack_records(&honest.packs[0]).unwrap();
    let pack = PackId::try_from(Digest::of(&honest.packs[0])).unwrap();
    sink.packs.lock().unwrap().push((pack, honest.packs[0].clone(), records));
    let recipes = cut(&tars[1..], &sink);
    let mut bound = Bound::new(&tars[1..]);
    bound.packs.clear();
    bound.tree = pack_tree(&derive_tree(&recipes).unwrap()).into();
    bound.recipes = recipes.iter().map(|recipe| recipe.blob().clone()).collect();
    bound.refused(&registry).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_manifest_tells_of_the_names_in_its_tree_must_be_true() {
    let registry = Registry::start().await;
    let bound = Bound::new(&tars());
    let bytes = bound.push_blobs(&registry).await;
    let names = TreeNames::of(&bound.tree).unwrap();
    let wrong = TreeNames { digest: Digest::of(b"others"), ..names };
    let longer = TreeNames { bytes: names.bytes + 1, ..names };
    let [digest, len] = names.notes();
    let junk = (digest.0.clone(), "junk".to_owned());
    let told = [
        &wrong.notes()[..],
        &longer.notes(),
        &[digest],
        std::slice::from_ref(&len),
        &[junk, len.clone()],
        &names.notes(),
    ];
    for (nth, notes) in told.into_iter().enumerate() {
        let is_true = nth == 5;
        let mut manifest: Manifest = serde_json::from_slice(&bytes).unwrap();
        manifest.annotations.extend(notes.iter().cloned());
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let reply = registry.put_manifest("app", "v1", media_type::OCI_MANIFEST, &bytes).await;
        if is_true {
            reply.expect(StatusCode::CREATED);
        } else {
            let message = reply.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
            assert!(message.contains("dev.lamina.tree.names"), "{message}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_that_are_missing_or_damaged_are_refused_and_never_offered() {
    let registry = Registry::start().await;
    let tars = tars();
    let good = Bound::new(&tars);
    let missing = Bound { packs: vec![], ..Bound::new(&tars) };
    let message = missing.refused(&registry).await;
    assert!(message.contains(&Digest::of(&good.packs[0]).to_string()), "{message}");

    let mut pack = good.packs[0].to_vec();
    let records = lamina_chunk::pack_records(&pack).unwrap();
    pack[1_000] ^= 1;
    let damaged = registry.push_blob("app", &pack.into()).await.digest;
    assert!(!registry.store.is_pack(damaged).await.unwrap());
    let ids: Vec<ChunkId> =
        records.iter().flat_map(|record| record.chunks.iter().map(|chunk| chunk.id)).collect();
    assert!(registry.store.find_chunks(&ids).await.iter().all(Option::is_none));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_not_the_plain_tar_of_the_config_is_refused() {
    let registry = Registry::start().await;
    let tars = tars();
    let image = Image::new(&[&[("a", b"1")]]);
    registry.push_blob("app", &image.layers[0]).await;
    let mut bound = Bound::new(&tars);
    let honest = bound.layers.clone();
    bound.layers[0] = Descriptor::of(media_type::OCI_LAYER, &image.layers[0]);
    // the layers are there as blobs, so only the config can tell
    for tar in &tars {
        registry.push_blob("app", tar).await;
    }
    let (_, reply) = bound.push(&registry, "v1").await;
    let message = reply.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
    assert!(message.contains("the config says"), "{message}");
    bound.layers = honest;
    bound.push(&registry, "v1").await.1.expect(StatusCode::CREATED);
}

/// The same frames under an index that gives a chunk of one of them another name.
fn with_a_lying_index(pack: &Bytes) -> Bytes {
    let mut builder = PackBuilder::default();
    let mut lied = false;
    for mut record in lamina_chunk::pack_records(pack).unwrap() {
        let start = record.frame.offset as usize;
        let bytes = pack.slice(start..start + record.frame.sealed_len as usize);
        let sealed = Sealed::new(bytes, record.frame.plain_len as usize);
        if let (false, [_, _, ..]) = (lied, &record.chunks[..]) {
            record.chunks[1].id = ChunkId::of(b"wanted by somebody else");
            lied = true;
        }
        builder.push(record.id, &sealed, record.chunks);
    }
    assert!(lied, "no frame of the pack has two chunks");
    builder.finish().0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_whose_index_gives_a_chunk_another_name_is_refused() {
    let registry = Registry::start().await;
    let tars = tars();
    let honest = Bound::new(&tars);
    let pack = with_a_lying_index(&honest.packs[0]);
    // by the honest index, which the frames still fit
    let records = lamina_chunk::pack_records(&honest.packs[0]).unwrap();
    let recipes = cut(&tars, &Moved { records, pack: PackId::try_from(Digest::of(&pack)).unwrap() });
    let mut bound = Bound::new(&tars);
    bound.packs = vec![pack];
    bound.tree = pack_tree(&derive_tree(&recipes).unwrap()).into();
    bound.recipes = recipes.iter().map(|recipe| recipe.blob().clone()).collect();
    let message = bound.refused(&registry).await;
    assert!(message.contains("damaged"), "{message}");
    let wanted = ChunkId::of(b"wanted by somebody else");
    assert_eq!(registry.store.find_chunks(&[wanted]).await, [None]);
}

/// Says of every chunk that it lies where these records have it, but in this pack.
struct Moved {
    records: Vec<PackRecord>,
    pack: PackId,
}

impl ChunkSink for Moved {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        let places: HashMap<ChunkId, ChunkPlace> =
            self.records.iter().flat_map(|record| record.places(self.pack)).collect();
        Ok(ids.iter().map(|id| places.get(id).copied()).collect())
    }

    fn put(&self, pack: PackId, _: Bytes, _: &[PackRecord]) -> Result<(), SinkError> {
        panic!("every chunk is known, and yet {pack} was made")
    }
}
