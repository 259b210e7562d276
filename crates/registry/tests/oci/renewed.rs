//! Packs that artifacts of the registry's own name: others that name the new packs take the place of these, and nobody else's go.

mod copied;
mod late;
mod repaired;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_chunk::{ChunkId, Moved, PackId};
use lamina_image::{
    Descriptor, Digest, Document, Index, Manifest, RECIPE_ANNOTATION, TREE_ANNOTATION, media_type,
};
use lamina_store::{GcConfig, ImageState, Repo};
use lamina_testkit::noise;

use crate::repack::{OWN, at_once, fsck, gc, get, later, moved_path, restarted, stored, tar};
use crate::support::{Image, Registry, manifest_of, tar_of};

/// Pushes an image as any client would, and waits until it has its tree and nothing else is to be done for it.
async fn push(registry: &Registry, repo: &str, tag: &str, image: &Image) -> Digest {
    let digest = registry.push(repo, tag, image).await;
    assert_eq!(registry.converted(digest).await.state, ImageState::Done);
    is_idle(registry).await;
    digest
}

/// Waits until no image waits for its tree.
async fn is_idle(registry: &Registry) {
    let idle = async {
        while !registry.store.jobs().await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), idle).await.unwrap();
}

async fn delete(registry: &Registry, repo: &str, manifest: Digest) {
    let path = format!("/v2/{repo}/manifests/{manifest}");
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
}

fn image(own: (u64, usize)) -> Image {
    Image::of(vec![tar(own)])
}

/// Two images of one pack that came by ordinary pushes, and the one that brought it deleted; nothing is held.
async fn mostly_dead() -> (Registry, Image, PackId) {
    let (registry, stays) = (Registry::start().await, image((3, 1_000)));
    let gone = push(&registry, "app", "gone", &image((2, OWN))).await;
    let digest = push(&registry, "app", "stays", &stays).await;
    let [(_, artifact)] = &hanging(&registry, "app", digest).await[..] else { panic!("one artifact") };
    let size = |pack: &&Descriptor| pack.size;
    let old = artifact.layers.iter().filter(|layer| layer.media_type == media_type::PACK).max_by_key(size);
    let old = PackId::try_from(old.unwrap().digest).unwrap();
    delete(&registry, "app", gone).await;
    (restarted(registry).await, stays, old)
}

/// The artifacts with a tree that hang on an image, the one on its record first.
async fn hanging(registry: &Registry, repo: &str, image: Digest) -> Vec<(Digest, Manifest)> {
    let hung = registry.store.referrers(&repo.parse().unwrap(), image).await.unwrap();
    let record = registry.store.image(image).await.unwrap().unwrap();
    let tree = record.tree.unwrap().digest.to_string();
    let mut found = Vec::new();
    for listed in hung {
        assert_eq!(listed.annotations[TREE_ANNOTATION], tree);
        let manifest = registry.get(&format!("/v2/{repo}/manifests/{}", listed.digest)).await;
        let bytes = manifest.expect(StatusCode::OK).body;
        assert_eq!(bytes.len() as u64, listed.size);
        let Document::Manifest(manifest) = Document::parse(media_type::OCI_MANIFEST, &bytes).unwrap() else {
            panic!("an artifact is a manifest")
        };
        assert_eq!(manifest.subject.as_ref().unwrap().digest, image);
        found.push((listed.digest, manifest));
    }
    let on_record = record.artifact.unwrap().digest;
    found.sort_by_key(|(digest, _)| *digest != on_record);
    found
}

/// What a client is shown of that.
async fn listed(registry: &Registry, repo: &str, image: Digest) -> Vec<Digest> {
    let listed = registry.get(&format!("/v2/{repo}/referrers/{image}")).await.expect(StatusCode::OK);
    let index: Index = serde_json::from_slice(&listed.body).unwrap();
    index.manifests.into_iter().map(|listed| listed.digest).collect()
}

/// The only one, which is on record, and which clients are shown.
async fn artifact(registry: &Registry, repo: &str, image: Digest) -> (Digest, Manifest) {
    let mut all = hanging(registry, repo, image).await;
    assert_eq!(all.len(), 1, "{all:?}");
    let record = registry.store.image(image).await.unwrap().unwrap();
    assert_eq!(record.artifact.unwrap().digest, all[0].0);
    assert_eq!(listed(registry, repo, image).await, [all[0].0]);
    all.remove(0)
}

fn packs(artifact: &Manifest) -> BTreeSet<Digest> {
    let packs = artifact.layers.iter().filter(|layer| layer.media_type == media_type::PACK);
    packs.map(|layer| layer.digest).collect()
}

/// Everything that an artifact names comes from the repository, as long as it says.
async fn is_there(registry: &Registry, repo: &str, artifact: &Manifest) {
    for layer in &artifact.layers {
        let blob = registry.get(&format!("/v2/{repo}/blobs/{}", layer.digest)).await.expect(StatusCode::OK);
        assert_eq!((Digest::of(&blob.body), blob.body.len() as u64), (layer.digest, layer.size));
    }
}

/// Every layer comes as it was pushed, and as its plain tar from chunks alone.
async fn is_whole(registry: &Registry, repo: &str, image: &Image) {
    for blob in image.tars.iter().chain(&image.layers) {
        let path = format!("/v2/{repo}/blobs/{}", Digest::of(blob));
        assert!(registry.get(&path).await.expect(StatusCode::OK).body == blob);
    }
}

/// What there is, and when it was written; without what processes say to collectors.
fn objects(registry: &Registry) -> BTreeMap<String, SystemTime> {
    let (root, mut open, mut found) =
        (registry.directory().join("objects"), vec![registry.directory().join("objects")], BTreeMap::new());
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            match path.is_dir() {
                true if name == "collecting" => {}
                true => open.push(path),
                false => drop(found.insert(name, path.metadata().unwrap().modified().unwrap())),
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_of_an_ordinary_push_gets_an_artifact_of_new_packs_and_the_old_one_goes() {
    for keep_untagged in [false, true] {
        let config = GcConfig { keep_untagged, ..at_once() };
        let (registry, stays, old) = mostly_dead().await;
        let image = Digest::of(&stays.manifest);
        let (before, old_artifact) = artifact(&registry, "app", image).await;
        // who was just shown it holds it
        let registry = restarted(registry).await;
        let dry = GcConfig { dry_run: true, ..config.clone() };
        let dry = registry.store.keeper().gc(&dry, later()).await.unwrap();
        let report = registry.store.keeper().gc(&config, later()).await.unwrap();
        assert_eq!((dry.freed, dry.repacked), (report.freed, report.repacked));
        assert_eq!(report.repacked.packs, 1, "{report:?}");
        // both hang, and who has just begun to copy the old one gets what it names
        let [(after, new), (still, _)] = &hanging(&registry, "app", image).await[..] else { panic!("two") };
        assert_eq!(*still, before);
        assert!(packs(&old_artifact).contains(&old.into()) && !packs(new).contains(&old.into()));
        for artifact in [&old_artifact, new] {
            is_there(&registry, "app", artifact).await;
        }
        let others = |artifact: &Manifest| {
            let ours = [media_type::PACK, media_type::MOVED];
            let others = artifact.layers.iter().filter(|layer| !ours.contains(&layer.media_type.as_str()));
            others.cloned().collect::<Vec<_>>()
        };
        assert_eq!(others(&old_artifact), others(new));
        // whoever has the new one alone knows where the old pack went
        let record = new.layers.iter().find(|layer| layer.moved_pack() == Some(old)).unwrap();
        let record =
            registry.get(&format!("/v2/app/blobs/{}", record.digest)).await.expect(StatusCode::OK).body;
        assert_eq!(record, registry.get(&moved_path("app", old)).await.expect(StatusCode::OK).body);
        assert!(packs(new).contains(&Moved::parse(&record).unwrap().pack().into()));
        is_whole(&registry, "app", &stays).await;
        fsck(&registry.store).await;

        let (with_old, registry) = (stored(&registry), restarted(registry).await);
        let report = registry.store.keeper().gc(&config, later()).await.unwrap();
        assert!(report.freed.bytes > OWN as u64 && report.repacked == Default::default(), "{report:?}");
        assert_eq!(get(&registry, &format!("/v2/app/manifests/{before}")).await, StatusCode::NOT_FOUND);
        assert_eq!(get(&registry, &format!("/v2/app/blobs/{old}")).await, StatusCode::NOT_FOUND);
        assert!(stored(&registry) < with_old - OWN as u64);
        assert_eq!(artifact(&registry, "app", image).await.0, *after);
        is_there(&registry, "app", new).await;
        is_whole(&registry, "app", &stays).await;
        let registry = restarted(registry).await;
        let left = objects(&registry);
        let again = registry.store.keeper().gc(&config, later()).await.unwrap();
        assert_eq!((again.freed, again.repacked, again.quarantined), Default::default());
        assert_eq!(objects(&registry), left);
        assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pushed_after_a_repack_gets_the_new_packs_and_the_records_at_once() {
    let (registry, stays, _) = mostly_dead().await;
    let image = Digest::of(&stays.manifest);
    for _ in 0..2 {
        gc(&registry).await;
    }
    let (now, new) = artifact(&registry, "app", image).await;
    let registry = restarted(registry).await;
    push(&registry, "other", "t", &stays).await;
    assert_eq!(artifact(&registry, "other", image).await.0, now);
    is_there(&registry, "other", &new).await;
    // another image of the same layers
    let relabelled = push(&registry, "app", "same", &stays.relabelled("other")).await;
    let (_, artifact_of_same) = artifact(&registry, "app", relabelled).await;
    assert_eq!(artifact_of_same.layers, new.layers);
    is_there(&registry, "app", &artifact_of_same).await;
    let registry = restarted(registry).await;
    let left = objects(&registry);
    gc(&registry).await;
    assert_eq!(objects(&registry), left);
    // and when all is deleted nothing is left
    for (repo, digest) in [("app", image), ("app", relabelled), ("other", image)] {
        delete(&registry, repo, digest).await;
    }
    let registry = restarted(registry).await;
    gc(&registry).await;
    assert_eq!(stored(&registry), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_is_moved_twice_is_reached_by_two_records() {
    let registry = Registry::start().await;
    let files: Vec<Vec<u8>> = (0..12).map(|number| noise(200_000, number)).collect();
    let first = |count: usize| {
        let names: Vec<String> = (0..count).map(|number| format!("f{number}")).collect();
        let files: Vec<(&str, &[u8])> =
            names.iter().zip(&files).map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
        Image::of(vec![tar_of(&files)])
    };
    let mut registry = registry;
    let mut images = Vec::new();
    for (tag, count) in [("all", 12), ("some", 4), ("one", 1)] {
        images.push(push(&registry, "app", tag, &first(count)).await);
    }
    let (_, before) = artifact(&registry, "app", images[2]).await;
    let old = PackId::try_from(*packs(&before).first().unwrap()).unwrap();
    for gone in &images[..2] {
        delete(&registry, "app", *gone).await;
        registry = restarted(registry).await;
        assert_eq!(gc(&registry).await.repacked.packs, 1);
        gc(&registry).await;
    }
    let (_, new) = artifact(&registry, "app", images[2]).await;
    is_there(&registry, "app", &new).await;
    is_whole(&registry, "app", &first(1)).await;
    let (mut at, mut moves) = (old, 0);
    while let Some(record) = new.layers.iter().find(|layer| layer.moved_pack() == Some(at)) {
        let record = registry.get(&format!("/v2/app/blobs/{}", record.digest)).await.expect(StatusCode::OK);
        (at, moves) = (Moved::parse(&record.body).unwrap().pack(), moves + 1);
    }
    assert_eq!((moves, packs(&new).contains(&at.into())), (2, true), "{new:?}");
    fsck(&registry.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_is_replaced_in_every_repository_that_has_it() {
    let (registry, stays, old) = mostly_dead().await;
    push(&registry, "other/name", "t", &stays).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    gc(&registry).await;
    let image = Digest::of(&stays.manifest);
    for repo in ["app", "other/name"] {
        let (_, artifact) = artifact(&registry, repo, image).await;
        assert!(!packs(&artifact).contains(&old.into()));
        is_there(&registry, repo, &artifact).await;
        assert_eq!(get(&registry, &format!("/v2/{repo}/blobs/{old}")).await, StatusCode::NOT_FOUND);
        is_whole(&registry, repo, &stays).await;
    }
    fsck(&registry.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_that_somebody_relies_on_by_its_name_stays_with_all_that_it_names() {
    for relied_on in ["a tag", "an index", "a signature", "a copy without its image"] {
        let (registry, stays, _) = mostly_dead().await;
        let image = Digest::of(&stays.manifest);
        let (digest, old) = artifact(&registry, "app", image).await;
        let bytes = registry.get(&format!("/v2/app/manifests/{digest}")).await.body;
        let named = Descriptor::of(media_type::OCI_MANIFEST, &bytes);
        let put = match relied_on {
            "a tag" => registry.put_manifest("app", "mine", media_type::OCI_MANIFEST, &bytes).await,
            "an index" => {
                let index = serde_json::json!({ "schemaVersion": 2, "manifests": [named] }).to_string();
                registry.put_manifest("app", "all", media_type::OCI_INDEX, index.as_bytes()).await
            }
            "a signature" => {
                let config = Bytes::from_static(b"{}");
                registry.push_blob("app", &config).await;
                let signature = Manifest {
                    artifact_type: Some("application/vnd.example.signature".to_owned()),
                    subject: Some(named),
                    ..manifest_of(&config, Vec::new())
                };
                let signature = serde_json::to_vec(&signature).unwrap();
                let target = Digest::of(&signature).to_string();
                registry.put_manifest("app", &target, media_type::OCI_MANIFEST, &signature).await
            }
            _ => {
                for layer in old.layers.iter().chain([&old.config]) {
                    let blob = registry.get(&format!("/v2/app/blobs/{}", layer.digest)).await.body;
                    registry.push_blob("copy", &blob).await;
                }
                let target = digest.to_string();
                registry.put_manifest("copy", &target, media_type::OCI_MANIFEST, &bytes).await
            }
        };
        put.expect(StatusCode::CREATED);
        let registry = restarted(registry).await;
        let config = GcConfig { keep_untagged: true, ..at_once() };
        let left = objects(&registry);
        for round in 0..2 {
            let report = registry.store.keeper().gc(&config, later()).await.unwrap();
            assert_eq!(report.repacked, Default::default(), "{relied_on}");
            // nothing is tried that cannot succeed
            let new = objects(&registry).into_keys().filter(|name| !left.contains_key(name)).count();
            assert_eq!(new, 0, "{relied_on}, {round}");
        }
        assert_eq!(artifact(&registry, "app", image).await.0, digest, "{relied_on}");
        is_there(&registry, if relied_on.starts_with("a copy") { "copy" } else { "app" }, &old).await;
        fsck(&registry.store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_tags_an_old_artifact_before_it_goes_keeps_it_with_all_that_it_names() {
    let (registry, stays, _) = mostly_dead().await;
    let image = Digest::of(&stays.manifest);
    let (before, old) = artifact(&registry, "app", image).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let bytes = registry.get(&format!("/v2/app/manifests/{before}")).await.body;
    let put = registry.put_manifest("app", "mine", media_type::OCI_MANIFEST, &bytes).await;
    put.expect(StatusCode::CREATED);
    let registry = restarted(registry).await;
    for _ in 0..2 {
        gc(&registry).await;
    }
    assert_eq!(hanging(&registry, "app", image).await.len(), 2);
    is_there(&registry, "app", &old).await;
    assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_a_push_under_way_was_told_of_is_not_even_copied() {
    let (registry, stays, old) = mostly_dead().await;
    let image_digest = Digest::of(&stays.manifest);
    let (before, _) = artifact(&registry, "app", image_digest).await;
    let registry = restarted(registry).await;
    let dead = last_chunk(&registry, old).await;
    assert!(registry.store.find_chunks(&[dead]).await[0].is_some());
    for _ in 0..2 {
        let (there, report) = (objects(&registry), gc(&registry).await);
        assert_eq!((report.repacked, report.held > 0), (Default::default(), true), "{report:?}");
        let mut left = objects(&registry).into_keys().filter(|name| name.starts_with("blobs/"));
        assert!(left.all(|name| there.contains_key(&name)), "something was copied");
        assert_eq!(artifact(&registry, "app", image_digest).await.0, before);
    }
    // nor does the next push find less
    assert_eq!(registry.store.find_chunks(&[dead]).await[0].unwrap().place.pack, old);
    push(&registry, "app", "again", &image((2, OWN))).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked, Default::default(), "it lives again");
    is_whole(&registry, "app", &stays).await;
    assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);
}

async fn last_chunk(registry: &Registry, pack: PackId) -> ChunkId {
    let records = registry.store.pack_records(pack).await.unwrap();
    records.last().unwrap().chunks.last().unwrap().id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_pack_that_was_moved_nothing_is_offered_while_it_is_here_or_comes_again() {
    let (mut registry, stays, old) = mostly_dead().await;
    let dead = last_chunk(&registry, old).await;
    let bytes =
        std::fs::read(registry.directory().join(format!("objects/blobs/sha256/{}", Digest::from(old).hex())));
    let bytes = Bytes::from(bytes.unwrap());
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let records = registry.store.pack_records(old).await.unwrap();
    for how in ["it is here", "it is pushed again", "it is made again"] {
        match how {
            "it is pushed again" => {
                registry.push_blob("app", &bytes).await;
                registry.store.admit_pack(old).await.unwrap();
            }
            "it is made again" => registry.store.put_pack(old, bytes.clone(), &records).await.unwrap(),
            _ => {}
        }
        assert_eq!(registry.store.find_chunks(&[dead]).await, [None], "{how}");
        registry = restarted(registry).await;
        assert_eq!(registry.store.find_chunks(&[dead]).await, [None], "{how}, another process");
    }
    // so it goes though what it has is pushed anew
    push(&registry, "app", "again", &image((2, OWN))).await;
    let registry = restarted(registry).await;
    for _ in 0..2 {
        gc(&registry).await;
    }
    assert_eq!(get(&registry, &format!("/v2/app/blobs/{old}")).await, StatusCode::NOT_FOUND);
    is_whole(&registry, "app", &stays).await;
    is_whole(&registry, "app", &image((2, OWN))).await;
    assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_has_what_its_record_lacks_is_named_again() {
    let (registry, stays, gone) = (Registry::start().await, image((3, 1_000)), image((2, OWN)));
    let gone_digest = push(&registry, "app", "gone", &gone).await;
    push(&registry, "app", "stays", &stays).await;
    let (_, of_gone) = artifact(&registry, "app", gone_digest).await;
    let [tree, recipe] = [media_type::TREE, media_type::RECIPE]
        .map(|kind| of_gone.layers.iter().find(|layer| layer.media_type == kind).unwrap().clone());
    let blob = async |of: &Descriptor| registry.get(&format!("/v2/app/blobs/{}", of.digest)).await.body;
    let (old, blobs) = (*packs(&of_gone).first().unwrap(), [blob(&tree).await, blob(&recipe).await]);
    delete(&registry, "app", gone_digest).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    // somebody has recipes that name all of the old pack, which an artifact has kept
    for blob in blobs.iter().chain([&gone.config]) {
        registry.push_blob("app", blob).await;
    }
    let mut layer = Descriptor::of(media_type::OCI_LAYER, &gone.tars[0]);
    layer.annotations.insert(RECIPE_ANNOTATION.to_owned(), recipe.digest.to_string());
    let mut bound = manifest_of(&gone.config, vec![layer]);
    bound.annotations.insert(TREE_ANNOTATION.to_owned(), tree.digest.to_string());
    let bound = serde_json::to_vec(&bound).unwrap();
    let put = registry.put_manifest("app", "bound", media_type::OCI_MANIFEST, &bound).await;
    put.expect(StatusCode::CREATED);
    let registry = restarted(registry).await;
    for _ in 0..2 {
        assert_eq!(gc(&registry).await.repacked, Default::default());
    }
    let (_, again) = artifact(&registry, "app", Digest::of(&stays.manifest)).await;
    assert!(packs(&again).contains(&old), "{again:?}");
    assert!(again.layers.iter().all(|layer| layer.moved_pack().is_none()), "{again:?}");
    is_there(&registry, "app", &again).await;
    is_whole(&registry, "app", &stays).await;
    assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_of_which_the_index_is_most_is_not_mostly_dead() {
    let registry = Registry::start().await;
    let names: Vec<String> = (0..2_000).map(|number| format!("f{number}")).collect();
    let contents: Vec<String> = (0..2_000).map(|number| format!("{number}")).collect();
    let files: Vec<(&str, &[u8])> =
        names.iter().zip(&contents).map(|(name, text)| (name.as_str(), text.as_bytes())).collect();
    push(&registry, "app", "t", &Image::of(vec![tar_of(&files)])).await;
    let registry = restarted(registry).await;
    let left = objects(&registry);
    let config = GcConfig { quarantine: Duration::from_secs(100), ..at_once() };
    registry.store.keeper().gc(&config, later()).await.unwrap();
    // nor does it wait for anything
    assert_eq!(objects(&registry), left);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_artifact_and_its_pack_wait_in_quarantine_like_all_garbage() {
    let (registry, stays, old) = mostly_dead().await;
    let image = Digest::of(&stays.manifest);
    let config = GcConfig { quarantine: Duration::from_secs(100), ..at_once() };
    let mut registry = registry;
    let begun = later();
    // it is found; it is due, and moved; its artifact is found; and is due
    for (after, repacked, artifacts, here) in
        [(0, 0, 1, true), (101, 1, 2, true), (102, 0, 2, true), (201, 0, 2, true), (203, 0, 1, false)]
    {
        registry = restarted(registry).await;
        let report = registry.store.keeper().gc(&config, begun + after).await.unwrap();
        let is_here = get(&registry, &format!("/v2/app/blobs/{old}")).await == StatusCode::OK;
        let hang = hanging(&registry, "app", image).await;
        let found = (report.repacked.packs, hang.len(), is_here);
        assert_eq!(found, (repacked, artifacts, here), "after {after} s");
        for (_, artifact) in hang {
            is_there(&registry, "app", &artifact).await;
        }
    }
    is_whole(&registry, "app", &stays).await;
    fsck(&registry.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_registry_takes_no_such_artifact_and_makes_its_own() {
    let (registry, stays, _) = mostly_dead().await;
    for _ in 0..2 {
        gc(&registry).await;
    }
    let image = Digest::of(&stays.manifest);
    let (digest, renewed) = artifact(&registry, "app", image).await;
    let bytes = registry.get(&format!("/v2/app/manifests/{digest}")).await.body;
    // as a client copies an image with all that hangs on it
    let other = Registry::start().await;
    push(&other, "app", "t", &stays).await;
    for blob in renewed.layers.iter().chain([&renewed.config]) {
        let blob = registry.get(&format!("/v2/app/blobs/{}", blob.digest)).await.expect(StatusCode::OK).body;
        other.push_blob("app", &blob).await;
    }
    let put = other.put_manifest("app", &digest.to_string(), media_type::OCI_MANIFEST, &bytes).await;
    put.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
    let (own, artifact) = artifact(&other, "app", image).await;
    assert_ne!(own, digest);
    is_there(&other, "app", &artifact).await;
    is_whole(&other, "app", &stays).await;
    let repo: Repo = "app".parse().unwrap();
    assert!(other.store.manifest_link(&repo, digest).await.unwrap().is_none());
    fsck(&other.store).await;
}
