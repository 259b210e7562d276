//! Clients that copy an image with what hangs on it, while an artifact hangs there whose place another one has taken.

use http::{Method, StatusCode};
use lamina_image::{Digest, Document, media_type};

use super::{artifact, hanging, is_there, is_whole, listed, mostly_dead};
use crate::repack::{gc, get, restarted};
use crate::support::Registry;

/// Copies a manifest and its blobs from one repository to another, as any client does.
async fn copy(registry: &Registry, from: &str, to: &str, manifest: Digest) {
    let bytes = registry.get(&format!("/v2/{from}/manifests/{manifest}")).await.expect(StatusCode::OK).body;
    let Document::Manifest(document) = Document::parse(media_type::OCI_MANIFEST, &bytes).unwrap() else {
        panic!("it is a manifest")
    };
    for blob in document.layers.iter().chain([&document.config]) {
        let path = format!("/v2/{to}/blobs/uploads/?mount={}&from={from}", blob.digest);
        registry.send(Method::POST, &path, &[], "").await.expect(StatusCode::CREATED);
    }
    let put = registry.put_manifest(to, &manifest.to_string(), media_type::OCI_MANIFEST, &bytes).await;
    put.expect(StatusCode::CREATED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_copied_with_all_that_is_listed_on_it_while_an_old_artifact_hangs_too() {
    let (registry, stays, _) = mostly_dead().await;
    let image = Digest::of(&stays.manifest);
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let [(now, new), (superseded, old)] = &hanging(&registry, "app", image).await[..] else { panic!("two") };
    copy(&registry, "app", "copy", image).await;
    for listed in listed(&registry, "app", image).await {
        copy(&registry, "app", "copy", listed).await;
    }
    assert_eq!(artifact(&registry, "copy", image).await.0, *now);
    is_there(&registry, "copy", new).await;
    is_whole(&registry, "copy", &stays).await;
    // who knows the old one by its name has it
    assert_eq!(listed(&registry, "app", image).await, [*now]);
    assert_eq!(get(&registry, &format!("/v2/app/manifests/{superseded}")).await, StatusCode::OK);
    is_there(&registry, "app", old).await;
    // and where it hangs alone it is what there is
    let kept = registry.directory().join("objects/repos/app/referrers").join(image.hex());
    std::fs::remove_file(kept.join(now.hex())).unwrap();
    assert_eq!(listed(&registry, "app", image).await, [*superseded]);
}
