//! Repairs while an artifact hangs on an image whose place another one has taken.

use http::StatusCode;
use lamina_chunk::{Moved, PackId};
use lamina_image::{Digest, media_type};
use lamina_store::{ImageState, Store, StoreConfig};

use super::{artifact, hanging, is_idle, is_there, is_whole, mostly_dead};
use crate::repack::{fsck, gc, moved_path, restarted};
use crate::support::Registry;

/// Changes one byte in the middle of a blob.
fn damage(registry: &Registry, digest: Digest) {
    let blob = registry.directory().join("objects/blobs/sha256").join(digest.hex());
    let mut bytes = std::fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(blob, bytes).unwrap();
}

/// Repairs with the registry stopped, and starts it again. Gives how much is left to do.
async fn repaired(registry: Registry) -> (Registry, usize) {
    registry.store.close().await.unwrap();
    let (directory, stopped) = registry.stop().await;
    let store = Store::open_directory(&directory, StoreConfig::new(directory.join("index"))).await.unwrap();
    let report = store.keeper().repair(&store, &|_| {}).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    (stopped.start().await, report.left())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_damaged_while_an_old_artifact_hangs_too_is_made_again_and_one_artifact_is_left() {
    for part in ["tree", "recipe", "old pack", "new pack", "old artifact", "new artifact"] {
        let (registry, stays, old) = mostly_dead().await;
        let image = Digest::of(&stays.manifest);
        let registry = restarted(registry).await;
        assert_eq!(gc(&registry).await.repacked.packs, 1);
        let [(now, new), (superseded, _)] = &hanging(&registry, "app", image).await[..] else {
            panic!("two")
        };
        let of = |kind| new.layers.iter().find(|layer| layer.media_type == kind).unwrap().digest;
        let digest = match part {
            "tree" => of(media_type::TREE),
            "recipe" => of(media_type::RECIPE),
            "old pack" => old.into(),
            "new pack" => new_pack(&registry, old).await,
            "old artifact" => *superseded,
            _ => *now,
        };
        damage(&registry, digest);
        let (registry, left) = repaired(registry).await;
        assert_eq!(left, 0, "{part}");
        assert_eq!(registry.converted(image).await.state, ImageState::Done);
        is_idle(&registry).await;
        let (_, artifact) = artifact(&registry, "app", image).await;
        is_there(&registry, "app", &artifact).await;
        is_whole(&registry, "app", &stays).await;
        fsck(&registry.store).await;
    }
}

/// Where the frames of a pack went.
async fn new_pack(registry: &Registry, old: PackId) -> Digest {
    let record = registry.get(&moved_path("app", old)).await.expect(StatusCode::OK);
    Moved::parse(&record.body).unwrap().pack().into()
}
