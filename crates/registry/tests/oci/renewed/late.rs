//! Artifacts that are hung on an image when another one has taken their place, and where that is not done to its end.

use http::StatusCode;
use lamina_image::Digest;
use lamina_store::GcConfig;

use super::{artifact, hanging, is_there, mostly_dead, push};
use crate::repack::{at_once, fsck, gc, get, later, restarted};
use crate::support::{Image, Registry};

/// The image in one more repository, whose artifact is the old one alone: whoever hung it there has read the image's record before
/// another one took its place. Gives it.
async fn hung_late(registry: Registry, stays: &Image) -> (Registry, Digest) {
    push(&registry, "late", "t", stays).await;
    let image = Digest::of(&stays.manifest);
    let (before, _) = artifact(&registry, "late", image).await;
    let kept = |kind: &str| registry.directory().join(format!("objects/repos/late/{kind}"));
    let (manifest, hung) =
        (kept("manifests").join(before.hex()), kept("referrers").join(image.hex()).join(before.hex()));
    let late = [manifest, hung].map(|path| (std::fs::read(&path).unwrap(), path));
    late.iter().for_each(|(_, path)| std::fs::remove_file(path).unwrap());
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    for (bytes, path) in &late {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    (registry, before)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_artifact_that_was_hung_late_gets_the_new_one_beside_it() {
    let (registry, stays, old) = mostly_dead().await;
    let image = Digest::of(&stays.manifest);
    let (registry, before) = hung_late(registry, &stays).await;
    for _ in 0..2 {
        gc(&registry).await;
    }
    for repo in ["app", "late"] {
        let (now, new) = artifact(&registry, repo, image).await;
        assert_ne!(now, before);
        is_there(&registry, repo, &new).await;
        assert_eq!(get(&registry, &format!("/v2/{repo}/blobs/{old}")).await, StatusCode::NOT_FOUND);
    }
    fsck(&registry.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_artifact_that_a_crash_left_hanging_on_nothing_is_hung_by_the_next_collection() {
    let (registry, stays, old) = mostly_dead().await;
    let image = Digest::of(&stays.manifest);
    let (registry, before) = hung_late(registry, &stays).await;
    let config = GcConfig { keep_untagged: true, ..at_once() };
    registry.store.keeper().gc(&config, later()).await.unwrap();
    let [(now, _), (still, _)] = &hanging(&registry, "late", image).await[..] else { panic!("two") };
    assert_eq!(*still, before);
    let hung = registry.directory().join("objects/repos/late/referrers").join(image.hex()).join(now.hex());
    std::fs::remove_file(hung).unwrap();
    let mut registry = registry;
    for _ in 0..2 {
        registry = restarted(registry).await;
        registry.store.keeper().gc(&config, later()).await.unwrap();
    }
    let (left, new) = artifact(&registry, "late", image).await;
    assert_eq!(left, *now);
    is_there(&registry, "late", &new).await;
    assert_eq!(get(&registry, &format!("/v2/late/blobs/{old}")).await, StatusCode::NOT_FOUND);
    fsck(&registry.store).await;
}
