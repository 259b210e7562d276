//! What a hostile client sends over HTTP: the right status and error code, nothing of the inside in a message, nothing
//! taken, and the registry goes on.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_image::{Descriptor, Digest, TREE_ANNOTATION, media_type};
use lamina_registry::RegistryConfig;
use lamina_testkit::noise;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{Image, Registry};

const DEADLINE: Duration = Duration::from_secs(30);

/// Sends bytes as they are and reads until the registry closes the connection.
async fn raw(address: SocketAddr, request: impl AsRef<[u8]>) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_ref()).await.unwrap();
    let mut answer = Vec::new();
    // a reset after the answer is as good as an end
    let _ = timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("it neither answers nor closes");
    String::from_utf8_lossy(&answer).into_owned()
}

fn request(method: &str, target: &str, headers: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")
}

fn status_of(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

#[tokio::test]
async fn names_that_climb_hide_something_or_are_too_long_are_refused() {
    let registry = Registry::start().await;
    let long = "a".repeat(256);
    let deep = "a/".repeat(200);
    for name in [
        "..",
        "a/..",
        "../../etc",
        "a%2fb",
        "%2e%2e",
        "a%00",
        "A",
        "a//b",
        "-a",
        "a_",
        "a!b",
        ".",
        &long,
        &deep,
        "%ff",
    ] {
        for rest in ["manifests/v1", "tags/list", "blobs/uploads/", "referrers/sha256:00"] {
            for method in ["GET", "PUT", "POST", "DELETE"] {
                let answer = raw(registry.address, request(method, &format!("/v2/{name}/{rest}"), "")).await;
                assert!([400, 404, 405].contains(&status_of(&answer)), "{method} {name}/{rest}: {answer}");
                assert!(answer.contains("\"errors\":[{"), "{answer}");
            }
        }
    }
    for tag in ["..", "%2e%2e", "-v", "a%2fb", &"v".repeat(129), "a%20b"] {
        let answer = raw(registry.address, request("GET", &format!("/v2/a/manifests/{tag}"), "")).await;
        assert!(answer.contains("NAME_INVALID") && status_of(&answer) == 400, "{tag}: {answer}");
    }
    // what is not even HTTP
    for target in [&b"/v2/\xff\xfe/tags/list"[..], b"/v2/a\x01/tags/list", b"/v2/a b/tags/list"] {
        let request = [b"GET ", target, b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"].concat();
        let answer = raw(registry.address, request).await;
        assert!([0, 400, 404].contains(&status_of(&answer)), "{answer}");
    }
    registry.get("/v2/").await.expect(StatusCode::OK);
}

#[tokio::test]
async fn digests_that_are_none_are_refused_by_every_path_that_has_one() {
    let registry = Registry::start().await;
    let upper = Digest::of(b"").to_string().to_uppercase();
    for digest in [
        "sha256:",
        "sha256:..%2f..%2fetc%2fpasswd",
        "sha256:zz",
        "sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "sha256",
        ":",
        &upper,
    ] {
        for path in [
            format!("/v2/a/blobs/{digest}"),
            format!("/v2/a/referrers/{digest}"),
            format!("/lamina/v1/a/images/{digest}"),
        ] {
            registry.get(&path).await.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
        }
        for query in [format!("digest={digest}"), format!("mount={digest}&from=b")] {
            let path = format!("/v2/a/blobs/uploads/?{query}");
            let refused = registry.send(Method::POST, &path, &[], "x").await;
            refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
        }
    }
}

#[tokio::test]
async fn lengths_and_heads_that_make_no_sense_are_refused() {
    let registry = Registry::start().await;
    let put = |headers: &str| request("PUT", "/v2/a/manifests/v1", headers);
    let many: String = (0..200).map(|number| format!("x-{number}: y\r\n")).collect();
    let long = format!("x-long: {}\r\n", "y".repeat(2 << 20));
    for (head, statuses) in [
        (put("content-length: -1\r\n"), &[400][..]),
        (put("content-length: 5, 6\r\n"), &[400]),
        (put("content-length: 5\r\ncontent-length: 6\r\n"), &[400]),
        (put("content-length: 99999999999999999999\r\n"), &[400]),
        (put("content-length: 18446744073709551614\r\n"), &[400, 413, 431]),
        (put("content-length: 104857600\r\n"), &[413]),
        (put("transfer-encoding: gzip\r\n"), &[400, 501]),
        (put("transfer-encoding: chunked\r\n") + "zz\r\n", &[400]),
        (put("transfer-encoding: chunked\r\n") + "ffffffffffffffffff\r\n", &[400]),
        (put(&many), &[431]),
        (put(&long), &[431]),
        ("BREW /v2/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_owned(), &[405]),
        ("GET /v2/\r\n\r\n".to_owned(), &[0, 400]),
        ("\r\n\r\n\0\0\0\0".to_owned(), &[0, 400]),
    ] {
        let answer = raw(registry.address, &head).await;
        let start: String = head.chars().take(120).collect();
        assert!(statuses.contains(&status_of(&answer)), "{start}: {answer}");
    }
    registry.get("/v2/").await.expect(StatusCode::OK);
}

#[tokio::test]
async fn a_manifest_of_a_hundred_mebibytes_is_refused_and_the_client_hears_of_it() {
    let registry = Registry::start().await;
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, " ".repeat(1 << 20));
    let mut stream = TcpStream::connect(registry.address).await.unwrap();
    let head = request("PUT", "/v2/a/manifests/v1", "transfer-encoding: chunked\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..100 {
        stream.write_all(chunk.as_bytes()).await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(DEADLINE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(status_of(&answer) == 413 && answer.contains("SIZE_INVALID"), "{answer}");
}

/// A manifest with `change` made to it, of which all blobs are in the repository `a`.
async fn manifest(registry: &Registry, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let image = Image::new(&[&[("a", b"1")]]);
    for blob in image.blobs() {
        registry.push_blob("a", blob).await;
    }
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    change(&mut manifest);
    manifest.to_string().into_bytes()
}

#[tokio::test]
async fn documents_made_to_cost_much_are_refused_before_they_do() {
    let registry = Registry::start().await;
    let layer = |number: u32| json!({ "mediaType": media_type::OCI_LAYER, "digest": Digest::of(&number.to_le_bytes()), "size": 1 });
    let layers = manifest(&registry, |it| it["layers"] = (0..10_000).map(layer).collect()).await;
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX,
        "manifests": (0..20_000).map(layer).collect::<Vec<_>>() });
    let (oci, index) = (media_type::OCI_MANIFEST, index.to_string().into_bytes());
    let nested =
        |open: &str, close: &str, times| [open.repeat(times), close.repeat(times)].concat().into_bytes();
    let mut deep = manifest(&registry, |_| {}).await;
    deep.pop();
    deep.extend(br#","x":"#);
    deep.extend(nested("[", "]", 100_000));
    deep.push(b'}');
    let twice = br#"{"schemaVersion":2,"schemaVersion":2,"config":1}"#.to_vec();
    let number = br#"{"schemaVersion":1e999999}"#.to_vec();
    let escapes = [br#"{"mediaType":""#.to_vec(), br"\u0000".repeat(500_000), b"\"}".to_vec()].concat();
    for (what, media_type, bytes) in [
        ("10,000 layers", oci, layers),
        ("20,000 manifests", media_type::OCI_INDEX, index),
        ("deep arrays", oci, nested("[", "]", 1_000_000)),
        ("deep objects", oci, nested("{\"a\":", "}", 300_000)),
        ("deep beside a good manifest", oci, deep),
        ("a field twice", oci, twice),
        ("a number without end", oci, number),
        ("half a million escapes", oci, escapes),
        ("nothing", oci, Vec::new()),
        ("not UTF-8", oci, vec![0xff; 100]),
    ] {
        for target in ["v1", &Digest::of(&bytes).to_string()] {
            let refused = registry.put_manifest("a", target, media_type, &bytes).await;
            assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{what}");
            refused.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
        }
    }
    registry.get("/v2/a/tags/list").await.refused(StatusCode::NOT_FOUND, "NAME_UNKNOWN");
}

#[tokio::test]
async fn an_upload_of_somebody_else_cannot_be_seen_changed_or_ended() {
    let registry = Registry::start().await;
    let bytes = Bytes::from(noise(50_000, 5));
    let digest = Digest::of(&bytes);
    let begun = registry.send(Method::POST, "/v2/a/blobs/uploads/", &[], "").await;
    let place = begun.header("location").to_owned();
    registry.send(Method::PATCH, &place, &[], bytes.slice(..30_000)).await.expect(StatusCode::ACCEPTED);
    let foreign = place.replace("/v2/a/", "/v2/b/");
    for (method, path) in [
        (Method::GET, foreign.clone()),
        (Method::PATCH, foreign.clone()),
        (Method::PUT, format!("{foreign}?digest={digest}")),
        (Method::DELETE, foreign.clone()),
    ] {
        let refused = registry.send(method, &path, &[], "evil").await;
        refused.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
    }
    let path = format!("{place}?digest={digest}");
    registry.send(Method::PUT, &path, &[], bytes.slice(30_000..)).await.expect(StatusCode::CREATED);
    assert!(registry.get(&format!("/v2/a/blobs/{digest}")).await.body == bytes);
}

#[tokio::test]
async fn a_body_that_stops_leaves_an_upload_that_goes_on_from_there() {
    let registry = Registry::start().await;
    let bytes = Bytes::from(noise(50_000, 6));
    let begun = registry.send(Method::POST, "/v2/a/blobs/uploads/", &[], "").await;
    let place = begun.header("location").to_owned();
    let mut stream = TcpStream::connect(registry.address).await.unwrap();
    let head = request("PATCH", &place, "content-length: 50000\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&bytes[..20_000]).await.unwrap();
    // half of it is closed, so the registry sees the end of what came
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
    drop(stream);
    let status = registry.get(&place).await.expect(StatusCode::NO_CONTENT);
    assert_eq!(status.header("range"), "0-19999");
    let range = [("content-range", "20000-49999")];
    let put = format!("{place}?digest={}", Digest::of(&bytes));
    registry.send(Method::PUT, &put, &range, bytes.slice(20_000..)).await.expect(StatusCode::CREATED);
}

#[tokio::test]
async fn a_manifest_or_a_blob_whose_body_stops_is_not_taken() {
    let registry = Registry::start().await;
    let good = manifest(&registry, |_| {}).await;
    let digest = Digest::of(&good);
    let blob = format!("/v2/a/blobs/uploads/?digest={}", Digest::of(b"12345"));
    for (method, target, body) in
        [("PUT", "/v2/a/manifests/v1", &good[..good.len() - 1]), ("POST", blob.as_str(), &b"12345"[..])]
    {
        let mut stream = TcpStream::connect(registry.address).await.unwrap();
        let length = body.len() + 1;
        let head = request(method, target, &format!("content-length: {length}\r\n"));
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        let _ = timeout(DEADLINE, stream.read_to_string(&mut answer)).await.unwrap();
        assert!([0, 400].contains(&status_of(&answer)), "{answer}");
    }
    registry.get("/v2/a/manifests/v1").await.expect(StatusCode::NOT_FOUND);
    registry.get(&format!("/v2/a/manifests/{digest}")).await.expect(StatusCode::NOT_FOUND);
    registry.get(&format!("/v2/a/blobs/{}", Digest::of(b"12345"))).await.expect(StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_client_that_sends_nothing_more_or_a_drop_at_a_time_is_given_up() {
    let stall_max = Duration::from_millis(200);
    let config = RegistryConfig { stall_max, head_max: stall_max, ..RegistryConfig::default() };
    let registry = Registry::start_with(config).await;
    let head = request("PUT", "/v2/a/manifests/v1", "content-length: 1000\r\n");
    // in the middle of the head, before the body, and in its middle
    for sent in [&head[..20], &head[..], &format!("{head}{{\"a\":")] {
        let answer = raw(registry.address, sent).await;
        assert!([0, 408].contains(&status_of(&answer)), "{answer}");
    }
    // a byte now and then never stands still, and yet is too slow
    let mut stream = TcpStream::connect(registry.address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let dripping = async {
        while stream.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, dripping).await.expect("it is listened to for ever");
}

#[tokio::test]
async fn connections_over_the_limit_wait_for_their_turn() {
    let config = RegistryConfig { connections_max: 2, ..RegistryConfig::default() };
    let registry = Registry::start_with(config).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(registry.address).await.unwrap();
        stream.write_all(b"GET /v2/ HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        held.push(stream);
    }
    let third = tokio::spawn(raw(registry.address, request("GET", "/v2/", "")));
    assert!(
        timeout(Duration::from_millis(200), async {
            while !third.is_finished() {
                tokio::task::yield_now().await
            }
        })
        .await
        .is_err()
    );
    held.pop();
    assert_eq!(status_of(&timeout(DEADLINE, third).await.unwrap().unwrap()), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_cannot_be_hung_on_an_image_under_any_disguise() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    let subject = registry.push("a", "v1", &image).await;
    let tree = registry.converted(subject).await.tree.unwrap().digest;
    registry.push_blob("a", &Bytes::from_static(b"{}")).await;
    let subject = json!(Descriptor::named(media_type::OCI_MANIFEST, subject, image.manifest.len() as u64));
    let forged = |change: &dyn Fn(&mut Value)| {
        let config = Descriptor::of(media_type::OCI_EMPTY, b"{}");
        let mut manifest = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST, "config": config,
            "layers": [], "subject": subject });
        change(&mut manifest);
        manifest.to_string().into_bytes()
    };
    let named = |it: &mut Value| it["annotations"][TREE_ANNOTATION] = json!(tree);
    for bytes in [
        forged(&|it| it["artifactType"] = json!(media_type::TREE)),
        forged(&|it| it["artifactType"] = json!(media_type::BOOT)),
        forged(&|it| it["artifactType"] = json!(media_type::PROFILE)),
        // whose type is that of its config
        forged(&|it| it["config"]["mediaType"] = json!(media_type::TREE)),
        forged(&|it| {
            it["artifactType"] = json!("");
            it["config"]["mediaType"] = json!(media_type::BOOT);
        }),
        forged(&|it| {
            it["artifactType"] = json!("application/x");
            named(it);
        }),
    ] {
        for target in ["sneaky", &Digest::of(&bytes).to_string()] {
            let refused = registry.put_manifest("a", target, media_type::OCI_MANIFEST, &bytes).await;
            refused.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
        }
    }
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [],
        "subject": subject, "artifactType": media_type::TREE, "annotations": { TREE_ANNOTATION: tree } });
    let refused =
        registry.put_manifest("a", "sneaky", media_type::OCI_INDEX, index.to_string().as_bytes()).await;
    refused.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
}

#[tokio::test]
async fn what_fails_inside_is_not_told_outside() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    registry.push("a", "v1", &image).await;
    // a record that somebody has damaged
    let secret = registry.damage_manifest("a", Digest::of(&image.manifest));
    let reply = registry.get("/v2/a/manifests/v1").await.expect(StatusCode::INTERNAL_SERVER_ERROR);
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    assert!(!text.contains(&secret) && !text.contains("objects/") && !text.contains("line 1"), "{text}");
    assert!(text.contains(reply.header("x-request-id")), "{text}");
}
