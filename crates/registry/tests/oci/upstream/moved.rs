//! Packs that the upstream has repacked.

use std::time::Duration;

use http::{Method, StatusCode};
use lamina_chunk::{Frame, Moved, PackId};
use lamina_image::Digest;
use lamina_store::GcConfig;

use super::{Chain, HOUR};
use crate::between::Fault;
use crate::repack::{Pushed, tar};
use crate::support::Registry;

/// An upstream whose image `stays` leans on a pack that was repacked: the image, and that pack.
async fn repacked() -> (Chain, Pushed, PackId) {
    let chain = Chain::start(HOUR).await;
    Pushed::new(&chain.upstream.store, chain.upstream.address, "gone", vec![tar((2, 3_000_000))])
        .await
        .unwrap();
    let stays = vec![tar((3, 1_000))];
    let stays = Pushed::new(&chain.upstream.store, chain.upstream.address, "stays", stays).await.unwrap();
    chain.upstream.send(Method::DELETE, "/v2/app/manifests/gone", &[], "").await.expect(StatusCode::ACCEPTED);
    chain.upstream.store.close().await.unwrap();
    let (zero, lost_after) = (Duration::ZERO, Duration::from_secs(5));
    let gc = GcConfig { grace: zero, quarantine: zero, lost_after, ..GcConfig::default() };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let report = chain.upstream.store.keeper().gc(&gc, now + 1).await.unwrap();
    assert_eq!(report.repacked.packs, 1, "{report:?}");
    let moved = std::fs::read_dir(chain.upstream.directory().join("objects/moved")).unwrap().next();
    let old = Digest::from_hex(moved.unwrap().unwrap().file_name().to_str().unwrap()).unwrap();
    (chain, stays, PackId::try_from(old).unwrap())
}

/// Asks for the image, and waits until it is known what becomes of it.
async fn brought(registry: &Registry) -> serde_json::Value {
    let manifest = registry.get("/v2/app/manifests/stays").await.expect(StatusCode::OK);
    let path = format!("/lamina/v1/app/images/{}", Digest::of(&manifest.body));
    let begun = tokio::time::Instant::now();
    loop {
        let status = registry.get(&path).await;
        if status.status == StatusCode::OK && state(&status.json()) != "converting" {
            return status.json();
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing becomes of it");
        tokio::task::yield_now().await;
    }
}

fn state(status: &serde_json::Value) -> &str {
    status["state"].as_str().unwrap_or("converting")
}

fn moved_file(registry: &Registry, pack: PackId) -> std::path::PathBuf {
    registry.directory().join("objects/moved").join(Digest::from(pack).hex())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_upstream_says_falsely_of_where_a_pack_went_is_not_kept_and_is_not_the_images_fault() {
    let (chain, stays, old) = repacked().await;
    let truth = Moved::parse(&std::fs::read(moved_file(&chain.upstream, old)).unwrap()).unwrap();
    let frames = truth.frames().iter().skip(1);
    let frames =
        frames.map(|at| Frame { offset: at.offset, sealed_len: at.sealed_len, plain_len: at.sealed_len });
    let lie = Moved::new(truth.pack(), frames).to_bytes().leak();
    chain.between.treat(|line| match line.contains("/moved/") {
        true => Fault::Say(lie),
        false => Fault::None,
    });
    let status = brought(&chain.registry).await;
    let reason = status["reason"].as_str().unwrap_or_default();
    assert!(state(&status) == "failed" && reason.contains(&old.to_string()), "{status}");
    assert!(!moved_file(&chain.registry, old).exists());
    // once somebody says better, the image comes
    chain.between.treat(|_| Fault::None);
    let Chain { registry, upstream: _upstream, between: _between, _spool } = chain;
    let registry = registry.restart().await;
    let status = brought(&registry).await;
    assert_eq!(state(&status), "done", "{status}");
    stays.is_whole(&registry.store, registry.address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_leads_to_no_pack_makes_room_for_one_that_does() {
    let (chain, stays, old) = repacked().await;
    let truth = std::fs::read(moved_file(&chain.upstream, old)).unwrap();
    let frame = Frame { offset: 0, sealed_len: 9, plain_len: 9 };
    let nowhere = Moved::new(PackId::from_bytes([9; 32]), [frame]);
    let here = moved_file(&chain.registry, old);
    std::fs::create_dir_all(here.parent().unwrap()).unwrap();
    std::fs::write(&here, nowhere.to_bytes()).unwrap();
    let status = brought(&chain.registry).await;
    assert_eq!(state(&status), "done", "{status}");
    assert_eq!(std::fs::read(&here).unwrap(), truth);
    stays.is_whole(&chain.registry.store, chain.registry.address).await;
}

#[tokio::test]
async fn an_image_of_packs_that_the_upstream_has_repacked_comes_whole() {
    let (chain, stays, _) = repacked().await;
    let status = brought(&chain.registry).await;
    assert_eq!(state(&status), "done", "{status}");
    stays.is_whole(&chain.registry.store, chain.registry.address).await;
    let old = stays.recipes[0].frames().iter().map(|(_, place)| place.pack);
    for pack in old.collect::<std::collections::BTreeSet<_>>() {
        let path = format!("/lamina/v1/app/moved/{pack}");
        let (there, here) = (chain.upstream.get(&path).await, chain.registry.get(&path).await);
        assert_eq!((there.status, there.body), (here.status, here.body));
    }
    let fsck = chain.registry.store.keeper().fsck(&|_| {}).await.unwrap();
    assert!(fsck.damaged.is_empty(), "{fsck:#?}");
}
