//! Packs that artifacts of the registry's own name: these make room for others that name the new packs, and nobody else's do.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_chunk::{ChunkId, PackId};
use lamina_image::{Descriptor, Digest, Document, Index, Manifest, TREE_ANNOTATION, media_type};
use lamina_store::{GcConfig, ImageState};

use crate::repack::{OWN, at_once, delete_tag, fsck, gc, get, later, restarted, stored, tar};
use crate::support::{Image, Registry, manifest_of};

/// Pushes an image as any client would, and waits until it has its tree and nothing else is to be done for it.
async fn push(registry: &Registry, repo: &str, tag: &str, image: &Image) -> Digest {
    let digest = registry.push(repo, tag, image).await;
    assert_eq!(registry.converted(digest).await.state, ImageState::Done);
    let idle = async {
        while !registry.store.jobs().await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), idle).await.unwrap();
    digest
}

fn image(own: (u64, usize)) -> Image {
    Image::of(vec![tar(own)])
}

/// Two images of one pack that came by ordinary pushes, and the one that brought it deleted; nothing is held.
async fn mostly_dead() -> (Registry, Image, PackId) {
    let (registry, stays) = (Registry::start().await, image((3, 1_000)));
    push(&registry, "app", "gone", &image((2, OWN))).await;
    let digest = push(&registry, "app", "stays", &stays).await;
    let (_, artifact) = artifact(&registry, "app", digest).await;
    let size = |pack: &&Descriptor| pack.size;
    let old = artifact.layers.iter().filter(|layer| layer.media_type == media_type::PACK).max_by_key(size);
    let old = PackId::try_from(old.unwrap().digest).unwrap();
    delete_tag(&registry, "gone").await;
    (restarted(registry).await, stays, old)
}

/// The only artifact with a tree that hangs on an image, which is the one on record.
async fn artifact(registry: &Registry, repo: &str, image: Digest) -> (Digest, Manifest) {
    let listed = registry.get(&format!("/v2/{repo}/referrers/{image}")).await.expect(StatusCode::OK);
    let index: Index = serde_json::from_slice(&listed.body).unwrap();
    let [listed] = &index.manifests[..] else { panic!("{index:?}") };
    let record = registry.store.image(image).await.unwrap().unwrap();
    assert_eq!(record.artifact.as_ref(), Some(listed));
    assert_eq!(listed.annotations[TREE_ANNOTATION], record.tree.unwrap().digest.to_string());
    let manifest = registry.get(&format!("/v2/{repo}/manifests/{}", listed.digest)).await;
    let bytes = manifest.expect(StatusCode::OK).body;
    assert_eq!(bytes.len() as u64, listed.size);
    let Document::Manifest(manifest) = Document::parse(media_type::OCI_MANIFEST, &bytes).unwrap() else {
        panic!("an artifact is a manifest")
    };
    assert_eq!(manifest.subject.as_ref().unwrap().digest, image);
    (listed.digest, manifest)
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_of_an_ordinary_push_gets_an_artifact_of_new_packs_and_the_old_one_goes() {
    let (registry, stays, old) = mostly_dead().await;
    let image = Digest::of(&stays.manifest);
    let (before, old_artifact) = artifact(&registry, "app", image).await;
    // who was just shown it holds it
    let registry = restarted(registry).await;
    let dry = GcConfig { dry_run: true, ..at_once() };
    let dry = registry.store.keeper().gc(&dry, later()).await.unwrap();
    let report = gc(&registry).await;
    assert_eq!((dry.freed, dry.repacked), (report.freed, report.repacked));
    assert_eq!(report.repacked.packs, 1, "{report:?}");
    let (after, new_artifact) = artifact(&registry, "app", image).await;
    assert!(packs(&old_artifact).contains(&old.into()) && !packs(&new_artifact).contains(&old.into()));
    let others = |artifact: &Manifest| {
        let others = artifact.layers.iter().filter(|layer| layer.media_type != media_type::PACK);
        others.cloned().collect::<Vec<_>>()
    };
    assert_eq!(others(&old_artifact), others(&new_artifact));
    is_there(&registry, "app", &new_artifact).await;
    // who has just begun to copy the old one gets what it names
    assert_eq!(get(&registry, &format!("/v2/app/manifests/{before}")).await, StatusCode::NOT_FOUND);
    is_there(&registry, "app", &old_artifact).await;
    is_whole(&registry, "app", &stays).await;
    fsck(&registry.store).await;

    let with_old = stored(&registry);
    let report = gc(&registry).await;
    assert!(report.freed.bytes > OWN as u64 && report.repacked == Default::default(), "{report:?}");
    assert_eq!(get(&registry, &format!("/v2/app/blobs/{old}")).await, StatusCode::NOT_FOUND);
    assert!(stored(&registry) < with_old - OWN as u64);
    let registry = restarted(registry).await;
    let again = gc(&registry).await;
    assert_eq!((again.freed, again.repacked, again.quarantined), Default::default());
    assert_eq!(artifact(&registry, "app", image).await.0, after);
    is_there(&registry, "app", &new_artifact).await;
    is_whole(&registry, "app", &stays).await;
    assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);

    // the same image in another repository, and one that shares its layer
    let registry = restarted(registry).await;
    push(&registry, "other", "t", &stays).await;
    assert_eq!(artifact(&registry, "other", image).await.0, after);
    is_there(&registry, "other", &new_artifact).await;
    let relabelled = push(&registry, "app", "same", &stays.relabelled("other")).await;
    let (_, relabelled) = artifact(&registry, "app", relabelled).await;
    assert_eq!(packs(&relabelled), packs(&new_artifact));
    let registry = restarted(registry).await;
    let again = gc(&registry).await;
    assert_eq!((again.freed, again.repacked), Default::default());
    // and when all is deleted nothing is left
    for tag in ["stays", "same"] {
        delete_tag(&registry, tag).await;
    }
    registry.send(Method::DELETE, "/v2/other/manifests/t", &[], "").await.expect(StatusCode::ACCEPTED);
    let registry = restarted(registry).await;
    gc(&registry).await;
    assert_eq!(stored(&registry), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_is_replaced_in_every_repository_that_has_it() {
    let (registry, stays, old) = mostly_dead().await;
    push(&registry, "other/name", "t", &stays).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let image = Digest::of(&stays.manifest);
    for repo in ["app", "other/name"] {
        let (_, artifact) = artifact(&registry, repo, image).await;
        assert!(!packs(&artifact).contains(&old.into()));
        is_there(&registry, repo, &artifact).await;
    }
    gc(&registry).await;
    for repo in ["app", "other/name"] {
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
                registry.put_manifest("copy", "mine", media_type::OCI_MANIFEST, &bytes).await
            }
        };
        put.expect(StatusCode::CREATED);
        let registry = restarted(registry).await;
        for _ in 0..2 {
            assert_eq!(gc(&registry).await.repacked, Default::default(), "{relied_on}");
        }
        assert_eq!(artifact(&registry, "app", image).await.0, digest, "{relied_on}");
        is_there(&registry, if relied_on.starts_with("a copy") { "copy" } else { "app" }, &old).await;
        fsck(&registry.store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_names_the_old_pack_again_where_that_came_to_life_meanwhile() {
    let (registry, stays, old) = mostly_dead().await;
    let image_digest = Digest::of(&stays.manifest);
    let (before, _) = artifact(&registry, "app", image_digest).await;
    let registry = restarted(registry).await;
    let dead: ChunkId = {
        let records = registry.store.pack_records(old).await.unwrap();
        records.last().unwrap().chunks.last().unwrap().id
    };
    // a push under way was told of it
    assert!(registry.store.find_chunks(&[dead]).await[0].is_some());
    let report = gc(&registry).await;
    assert_eq!((report.repacked, report.held > 0), (Default::default(), true), "{report:?}");
    let (after, artifact_of_new) = artifact(&registry, "app", image_digest).await;
    assert_ne!(before, after);
    is_there(&registry, "app", &artifact_of_new).await;
    let again = push(&registry, "app", "again", &image((2, OWN))).await;
    let registry = restarted(registry).await;
    for _ in 0..2 {
        assert_eq!(gc(&registry).await.repacked, Default::default(), "it lives again");
    }
    assert_eq!(artifact(&registry, "app", image_digest).await.0, before);
    for digest in [image_digest, again] {
        is_there(&registry, "app", &artifact(&registry, "app", digest).await.1).await;
    }
    is_whole(&registry, "app", &stays).await;
    assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_pack_waits_in_quarantine_once_more_after_its_artifact_went() {
    let (registry, stays, old) = mostly_dead().await;
    let config = GcConfig { quarantine: Duration::from_secs(100), ..at_once() };
    let keeper = registry.store.keeper();
    let is_here = async || get(&registry, &format!("/v2/app/blobs/{old}")).await == StatusCode::OK;
    let begun = later();
    for (after, repacked, here) in
        [(0, 0, true), (101, 1, true), (102, 0, true), (201, 0, true), (203, 0, false)]
    {
        let report = keeper.gc(&config, begun + after).await.unwrap();
        assert_eq!((report.repacked.packs, is_here().await), (repacked, here), "after {after} s");
    }
    is_whole(&registry, "app", &stays).await;
    fsck(&registry.store).await;
}
