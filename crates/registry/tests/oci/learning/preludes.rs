//! What is sent in one go to whoever starts an image.

use lamina_image::{PRELUDE_LENGTH_BYTES, PreludeHead, TreeNames};
use lamina_wire::COMMAND_HEADER;

use super::*;

/// With what a node asks for a manifest.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.lamina.prelude.v1;q=1";

/// The head of a prelude, and what comes behind it.
fn head_of(reply: &Reply) -> (PreludeHead, &[u8]) {
    let (length, rest) = reply.body.split_first_chunk::<PRELUDE_LENGTH_BYTES>().unwrap();
    let (head, behind) = rest.split_at(PreludeHead::length(*length).unwrap());
    (PreludeHead::parse(head).unwrap(), behind)
}

/// The parts of a prelude by their media types, in order, each with its bytes.
fn parts(reply: &Reply) -> Vec<(String, Vec<u8>)> {
    assert_eq!(reply.header("content-type"), media_type::PRELUDE);
    assert_eq!((reply.header("vary"), reply.header("cache-control")), ("accept, lamina-command", "no-store"));
    let (head, mut rest) = head_of(reply);
    let parts = [head.manifest()].into_iter().chain(head.behind());
    let parts = parts.map(|part| {
        let (bytes, behind) = rest.split_at(usize::try_from(part.size).unwrap());
        rest = behind;
        assert_eq!(part.digest, Digest::of(bytes));
        (part.media_type.clone(), bytes.to_vec())
    });
    let parts = parts.collect();
    assert!(rest.is_empty());
    parts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_takes_preludes_gets_manifest_names_and_boot_pack_at_once_and_all_others_the_manifest() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let (path, blobs) = ("/v2/app/manifests/v1", "/v2/app/blobs");
    let ask = async |headers: &[(&str, &str)]| {
        registry.send(Method::GET, path, headers, "").await.expect(StatusCode::OK)
    };
    let manifest = registry.get(path).await.expect(StatusCode::OK);
    assert_eq!(manifest.header("content-type"), media_type::OCI_MANIFEST);
    let blob = registry.get(&format!("{blobs}/{}", pushed.tree_digest)).await.expect(StatusCode::OK).body;
    let names = TreeNames::of(&blob).unwrap();
    let names = blob[..usize::try_from(names.bytes).unwrap()].to_vec();
    let (is_manifest, is_tree, is_boot) = (
        (media_type::OCI_MANIFEST.to_owned(), manifest.body.to_vec()),
        (media_type::TREE.to_owned(), names),
        |bytes: &[u8]| (media_type::BOOT.to_owned(), bytes.to_vec()),
    );
    let before = ask(&[("accept", ACCEPT)]).await;
    assert_eq!(before.header("docker-content-digest"), pushed.digest.to_string());
    assert_eq!(parts(&before), [is_manifest.clone(), is_tree.clone()], "there is no boot pack yet");

    pushed.tell(&registry, &pushed.trace(&[("lib/one", 0, 300)])).await;
    let status = pushed.after_starts(&registry, 1).await;
    let boot = format!("{blobs}/{}", status["boot"]["digest"].as_str().unwrap());
    let boot = registry.get(&boot).await.expect(StatusCode::OK).body;
    for headers in [&[("accept", ACCEPT)][..], &[("accept", ACCEPT), (COMMAND_HEADER, "other")]] {
        let all = [is_manifest.clone(), is_tree.clone(), is_boot(&boot)];
        assert!(parts(&ask(headers).await) == all, "{headers:?}");
    }
    let unwanted = format!("*/*, {}; q=0.0", media_type::PRELUDE);
    for accept in ["*/*", media_type::OCI_MANIFEST, "application/*", &unwanted] {
        let plain = ask(&[("accept", accept)]).await;
        assert!(plain.body == manifest.body && plain.header("content-type") == media_type::OCI_MANIFEST);
        assert_eq!(plain.header("vary"), "accept, lamina-command");
    }
    let head = registry.send(Method::HEAD, path, &[("accept", ACCEPT)], "").await.expect(StatusCode::OK);
    assert_eq!(head.header("content-type"), media_type::OCI_MANIFEST);
    assert_eq!(head.header("content-length"), manifest.body.len().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_finds_its_own_boot_pack_in_its_prelude() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let client = Client::new(&registry.address.to_string(), ClientConfig::default()).unwrap();
    let trace = write_trace(pushed.tree_digest, &pushed.trace(&[("lib/two", 0, 100)]));
    let key = "own".parse().unwrap();
    client.send_trace("app", pushed.digest, Some(&key), &trace).await.unwrap();
    let begun = Instant::now();
    let boot = loop {
        let asked = [("accept", ACCEPT), (COMMAND_HEADER, "own")];
        let reply = registry.send(Method::GET, "/v2/app/manifests/v1", &asked, "").await;
        let (head, _) = head_of(&reply);
        let boot = head.behind().iter().find(|part| part.media_type == media_type::BOOT);
        if let Some(boot) = boot.filter(|boot| boot.annotations.contains_key("dev.lamina.command")) {
            break boot.clone();
        }
        assert!(begun.elapsed() < DEADLINE, "{head:?}");
        tokio::task::yield_now().await;
    };
    assert_eq!(boot.annotations["dev.lamina.command"], "own");
    assert_eq!(boot.annotations[BOOT_ANNOTATION], boot.digest.to_string());
}
