//! Trees for images that came without.

use http::StatusCode;
use lamina_image::{Digest, TREE_ANNOTATION, TREE_BYTES_ANNOTATION, Tree, media_type, unpack_tree};
use lamina_store::ImageState;
use lamina_testkit::noise;

use crate::support::{Image, Registry};

fn image() -> Image {
    let (one, two) = (noise(2_000_000, 1), noise(700_000, 2));
    Image::new(&[
        &[("etc/motd", b"hello\n"), ("lib/one", &one), ("lib/gone", b"x")],
        &[("lib/.wh.gone", b""), ("lib/two", &two), ("lib/one-again", &one)],
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pushed_image_gets_a_tree_as_a_referrer() {
    let registry = Registry::start().await;
    let image = image();
    let digest = registry.push("app", "v1", &image).await;
    let record = registry.converted(digest).await;
    assert_eq!((record.state, &record.reason), (ImageState::Done, &None));
    assert_eq!((record.counts.layers_cut, record.counts.layers_known), (2, 0));
    let tree = record.tree.unwrap();

    let listed = registry
        .get(&format!("/v2/app/referrers/{digest}?artifactType={}", media_type::TREE.replace('+', "%2B")))
        .await;
    let listed = listed.json();
    let found = &listed["manifests"][0];
    assert_eq!(found["annotations"][TREE_ANNOTATION], tree.digest.to_string());
    assert_eq!(found["annotations"][TREE_BYTES_ANNOTATION], tree.size.to_string());
    let artifact = registry.get(&format!("/v2/app/manifests/{}", found["digest"].as_str().unwrap())).await;
    assert_eq!(artifact.expect(StatusCode::OK).json()["subject"]["digest"], digest.to_string());

    let blob = registry.get(&format!("/v2/app/blobs/{}", tree.digest)).await.expect(StatusCode::OK);
    let tree = Tree::open(unpack_tree(&blob.body).unwrap().into()).unwrap();
    let lib = tree.lookup(lamina_image::Ino::ROOT, b"lib").unwrap().unwrap();
    assert!(tree.lookup(lib, b"one").unwrap().is_some());
    assert!(tree.lookup(lib, b"gone").unwrap().is_none());
    let status = registry.get(&format!("/lamina/v1/app/images/{digest}")).await.expect(StatusCode::OK);
    assert_eq!(status.json()["state"], "done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn known_layers_are_not_cut_again_and_their_plain_tars_can_be_read() {
    let registry = Registry::start().await;
    let image = image();
    let digest = registry.push("app", "v1", &image).await;
    registry.converted(digest).await;
    let other = registry.push("app", "v2", &image.relabelled("second")).await;
    let record = registry.converted(other).await;
    assert_eq!((record.counts.layers_cut, record.counts.layers_known), (0, 2));
    assert_eq!((record.counts.chunks, record.counts.bytes_read), (0, 0));
    for tar in &image.tars {
        let path = format!("/v2/app/blobs/{}", Digest::of(tar));
        let rebuilt = registry.get(&path).await.expect(StatusCode::OK);
        assert!(rebuilt.body == tar, "another tar was rebuilt");
        for (start, end) in [(0, 0), (511, 513), (1_000, tar.len() - 1), (tar.len() - 1, tar.len() - 1)] {
            let range = format!("bytes={start}-{end}");
            let part = registry.send(http::Method::GET, &path, &[("range", &range)], "").await;
            assert!(part.expect(StatusCode::PARTIAL_CONTENT).body == tar.slice(start..=end), "{range}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_repository_gets_the_tree_at_once() {
    let registry = Registry::start().await;
    let image = image();
    let digest = registry.push("one", "v1", &image).await;
    registry.converted(digest).await;
    registry.push("two", "v1", &image).await;
    let listed = registry.get(&format!("/v2/two/referrers/{digest}")).await;
    assert_eq!(listed.json()["manifests"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_goes_on_with_jobs_and_finds_the_index_as_it_was() {
    let registry = Registry::start().await;
    let image = image();
    let digest = registry.push("app", "v1", &image).await;
    // whether the worker was faster or not, the next one has to end it
    let registry = registry.restart().await;
    assert_eq!(registry.converted(digest).await.state, ImageState::Done);
    let other = registry.push("app", "v2", &Image::new(&[&[("lib/one", &noise(2_000_000, 1))]])).await;
    let counts = registry.converted(other).await.counts;
    assert_eq!((counts.chunks_new, counts.pack_bytes), (0, 0), "chunks of a pack from before were not found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_not_what_its_config_says_fails_with_a_reason() {
    let registry = Registry::start().await;
    let mut image = image();
    let mut lying = image.relabelled("lying");
    lying.tars[1] = image.tars[0].clone();
    lying = lying.relabelled("lying");
    let digest = registry.push("app", "v1", &lying).await;
    let record = registry.converted(digest).await;
    assert_eq!(record.state, ImageState::Failed);
    assert!(record.reason.unwrap().contains("its plain tar is"));
    // the layers themselves stay good for an image that tells the truth
    image = image.relabelled("honest");
    let digest = registry.push("app", "v2", &image).await;
    assert_eq!(registry.converted(digest).await.state, ImageState::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_layer_fails_with_a_reason_and_the_image_stays_pullable() {
    let registry = Registry::start().await;
    let mut image = image();
    let half = image.layers[1].len() / 2;
    image.layers[1] = image.layers[1].slice(..half);
    let image = image.relabelled("cut off");
    let digest = registry.push("app", "v1", &image).await;
    let record = registry.converted(digest).await;
    assert_eq!(record.state, ImageState::Failed);
    let reason = record.reason.unwrap();
    assert!(reason.contains(&Digest::of(&image.layers[1]).to_string()), "{reason}");
    assert_eq!(registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK).body, image.manifest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_of_somebody_else_cannot_be_hung_on_an_image() {
    let registry = Registry::start().await;
    let (image, other) = (image(), Image::new(&[&[("evil", b"1")]]));
    let digest = registry.push("app", "v1", &image).await;
    let record = registry.converted(digest).await;
    let stranger = registry.push("app", "v2", &other).await;
    let foreign = registry.converted(stranger).await.artifact.unwrap();
    let bytes = registry.get(&format!("/v2/app/manifests/{}", foreign.digest)).await.body;
    let text = String::from_utf8(bytes.to_vec()).unwrap().replace(&stranger.hex(), &digest.hex());
    let target = Digest::of(text.as_bytes()).to_string();
    let refused = registry.put_manifest("app", &target, media_type::OCI_MANIFEST, text.as_bytes()).await;
    refused.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
    // its own may come back, as it does when a repository is copied
    let own = record.artifact.unwrap();
    let bytes = registry.get(&format!("/v2/app/manifests/{}", own.digest)).await.body;
    let again =
        registry.put_manifest("copy", &own.digest.to_string(), media_type::OCI_MANIFEST, &bytes).await;
    again.expect(StatusCode::CREATED);
}
