//! Pull-through: a registry before another one, both real.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use http::{Method, StatusCode};
use lamina_image::{Descriptor, Digest, Index, TREE_ANNOTATION, media_type};
use lamina_registry::{
    Access, AccessConfig, Action, DedupScope, RegistryConfig, Rule, UpstreamConfig, Users, Who,
};
use lamina_store::{GcConfig, ImageState, ManifestPut, Repo};
use lamina_testkit::noise;
use lamina_wire::{Client, ClientConfig, WireError};

use crate::between::{Between, Fault};
use crate::bound::Bound;
use crate::support::{Image, Registry};

mod moved;

const HOUR: Duration = Duration::from_secs(3600);

/// A registry, another one that passes on what it has, and what stands between.
struct Chain {
    upstream: Registry,
    between: Between,
    registry: Registry,
    _spool: tempfile::TempDir,
}

impl Chain {
    async fn start(revalidate: Duration) -> Self {
        Self::guarded(revalidate, None).await
    }

    async fn guarded(revalidate: Duration, access: Option<Arc<Access>>) -> Self {
        let (upstream, spool) = (Registry::start().await, tempfile::tempdir().unwrap());
        let between = Between::start(upstream.address).await;
        let client = ClientConfig { tries: 2, ..ClientConfig::default() };
        let client = Client::new(&between.address.to_string(), client).unwrap();
        let passing = UpstreamConfig { client, revalidate, spool: spool.path().to_owned() };
        let config = RegistryConfig { upstream: Some(passing), access, ..RegistryConfig::default() };
        Self { upstream, between, registry: Registry::start_with(config).await, _spool: spool }
    }

    /// A client that sees a broken answer as an error.
    fn client(&self) -> Client {
        let config = ClientConfig { tries: 1, ..ClientConfig::default() };
        Client::new(&self.registry.address.to_string(), config).unwrap()
    }

    /// Reads a blob to its end, or to where it breaks.
    async fn read(&self, digest: Digest) -> Result<Vec<u8>, WireError> {
        let blob = self.client().blob_stream("app", digest).await?;
        blob.bytes
            .try_fold(Vec::new(), |mut all, piece| async move {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
    }

    async fn counted(&self, line: &str) -> u64 {
        let text = self.registry.get("/metrics").await.expect(StatusCode::OK).body;
        let text = String::from_utf8(text.to_vec()).unwrap();
        let found = text.lines().find_map(|found| found.strip_prefix(line));
        found.map_or(0, |count| count.trim().parse().unwrap())
    }

    async fn is_stored(&self, digest: Digest) -> bool {
        self.registry.store.blob(digest).await.unwrap().is_some()
    }
}

fn image() -> Image {
    let big = noise(3_000_000, 1);
    Image::new(&[&[("etc/motd", b"hello\n"), ("lib/one", &big)], &[("lib/.wh.one", b""), ("lib/two", &big)]])
}

fn blob(digest: Digest) -> String {
    format!("/v2/app/blobs/{digest}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_passed_on_is_the_upstreams_byte_for_byte_and_asked_for_once() {
    let chain = Chain::start(HOUR).await;
    let image = image();
    let digest = chain.upstream.push("app", "v1", &image).await;
    let manifests = ["/v2/app/manifests/v1".to_owned(), format!("/v2/app/manifests/{digest}")];
    let blobs = image.blobs().map(|bytes| blob(Digest::of(bytes)));
    for path in manifests.into_iter().chain(blobs) {
        for _ in 0..2 {
            for method in [Method::HEAD, Method::GET] {
                let there = chain.upstream.send(method.clone(), &path, &[], "").await.expect(StatusCode::OK);
                let here = chain.registry.send(method.clone(), &path, &[], "").await.expect(StatusCode::OK);
                assert_eq!(here.body, there.body, "{method} {path}");
                for name in ["content-type", "content-length", "etag", "docker-content-digest"] {
                    assert_eq!(here.header(name), there.header(name), "{method} {path}");
                }
            }
        }
        assert!(chain.between.asked(&format!("GET {path}")) <= 1, "{path}");
    }
    // by its digest, once the upstream has said what the tag means
    assert_eq!(
        (chain.between.asked("HEAD /v2/app/manifests"), chain.between.asked("GET /v2/app/manifests")),
        (1, 1)
    );
    let bytes: usize = image.blobs().chain([&image.manifest]).map(|bytes| bytes.len()).sum();
    assert_eq!(chain.counted("lamina_registry_upstream_received_bytes_total").await, bytes as u64);
    assert!(chain.counted("lamina_registry_upstream_total{what=\"blob\",outcome=\"hit\"}").await > 0);
    assert_eq!(chain.counted("lamina_registry_upstream_total{what=\"blob\",outcome=\"miss\"}").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_many_clients_want_is_asked_for_once_and_read_while_it_comes() {
    let chain = Chain::start(HOUR).await;
    let bytes = bytes::Bytes::from(noise(5_000_000, 2));
    let digest = chain.upstream.push_blob("app", &bytes).await.digest;
    chain.between.treat(|line| if line.contains("/blobs/") { Fault::Hold } else { Fault::None });
    let client = chain.client();
    let mut first = client.blob_stream("app", digest).await.unwrap();
    assert_eq!(first.len, Some(bytes.len() as u64));
    let mut begun = first.bytes.next().await.unwrap().unwrap().to_vec();
    // who comes while it is under way reads it from its beginning as well
    let mut second = client.blob_stream("app", digest).await.unwrap();
    assert_eq!(second.bytes.next().await.unwrap().unwrap()[..1000], bytes[..1000]);
    assert!(!chain.is_stored(digest).await);
    let path = blob(digest);
    let others = (0..8).map(|_| chain.registry.get(&path));
    chain.between.let_go();
    for other in futures_util::future::join_all(others).await {
        assert_eq!(other.expect(StatusCode::OK).body, bytes);
    }
    while let Some(piece) = first.bytes.next().await {
        begun.extend_from_slice(&piece.unwrap());
    }
    assert_eq!(begun, bytes);
    assert_eq!(chain.between.asked("/blobs/"), 1);
    assert!(chain.is_stored(digest).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_come_is_served_though_the_upstream_is_gone_and_what_has_not_is_an_error_that_says_so() {
    let mut chain = Chain::start(Duration::ZERO).await;
    let image = image();
    let digest = chain.upstream.push("app", "v1", &image).await;
    chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
    for bytes in image.blobs() {
        chain.registry.get(&blob(Digest::of(bytes))).await.expect(StatusCode::OK);
    }
    chain.between.end().await;
    for _ in 0..2 {
        let here = chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
        assert_eq!(here.header("docker-content-digest"), digest.to_string());
    }
    assert_eq!(chain.counted("lamina_registry_upstream_total{what=\"manifest\",outcome=\"stale\"}").await, 2);
    for bytes in image.blobs() {
        assert_eq!(chain.registry.get(&blob(Digest::of(bytes))).await.expect(StatusCode::OK).body, bytes);
    }
    for path in ["/v2/app/manifests/v2".to_owned(), blob(Digest::of(b"another"))] {
        let said = chain.registry.get(&path).await.refused(StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN");
        assert!(said.contains("upstream") && said.contains(&chain.between.address.to_string()), "{said}");
    }
    assert!(chain.counted("lamina_registry_upstream_total{what=\"blob\",outcome=\"error\"}").await > 0);
    // a registry that has just started knows as much
    let registry = chain.registry.restart().await;
    registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
}

#[tokio::test]
async fn what_the_upstream_does_not_have_is_unknown_here() {
    let chain = Chain::start(HOUR).await;
    chain.upstream.push("app", "v1", &image()).await;
    let none = Digest::of(b"none");
    for target in ["v2".to_owned(), none.to_string()] {
        let path = format!("/v2/app/manifests/{target}");
        chain.registry.get(&path).await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    }
    chain.registry.get(&blob(none)).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
    chain.registry.send(Method::HEAD, &blob(none), &[], "").await.expect(StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_blob_of_one_repository_is_not_given_to_who_asks_in_another() {
    let chain = Chain::start(HOUR).await;
    let bytes = bytes::Bytes::from(noise(100_000, 3));
    let digest = chain.upstream.push_blob("app", &bytes).await.digest;
    chain.registry.get(&blob(digest)).await.expect(StatusCode::OK);
    let elsewhere = format!("/v2/other/blobs/{digest}");
    chain.registry.get(&elsewhere).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
    // once the upstream has it there too, it does not come again
    chain.upstream.push_blob("other", &bytes).await;
    assert_eq!(chain.registry.get(&elsewhere).await.expect(StatusCode::OK).body, bytes);
    assert_eq!(chain.between.asked(&format!("GET {}", blob(digest))), 1);
    assert_eq!(chain.between.asked(&format!("GET {elsewhere}")), 0);
}

#[tokio::test]
async fn credentials_that_the_upstream_refuses_are_the_error() {
    let chain = Chain::start(HOUR).await;
    let digest = chain.upstream.push("app", "v1", &image()).await;
    for status in [401, 403] {
        chain.between.treat(move |_| Fault::Status(status));
        for path in ["/v2/app/manifests/v1".to_owned(), blob(digest)] {
            let said = chain.registry.get(&path).await.refused(StatusCode::FORBIDDEN, "DENIED");
            assert!(said.contains("the upstream refuses") && said.contains(&status.to_string()), "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_is_another_one_is_neither_served_whole_nor_stored() {
    let chain = Chain::start(HOUR).await;
    // shorter and longer than what an upload keeps in memory
    for (len, seed) in [(1, 3), (100_000, 4), (20_000_000, 5)] {
        let bytes = bytes::Bytes::from(noise(len, seed));
        let digest = chain.upstream.push_blob("app", &bytes).await.digest;
        chain.between.treat(|line| if line.contains("/blobs/") { Fault::Flip } else { Fault::None });
        let read = chain.read(digest).await;
        assert!(read.is_err(), "{} bytes came", read.unwrap().len());
        let part = chain.registry.send(Method::GET, &blob(digest), &[("range", "bytes=0-0")], "").await;
        part.refused(StatusCode::BAD_GATEWAY, "UNKNOWN");
        assert!(!chain.is_stored(digest).await);
        assert_eq!(chain.registry.store.uploads_open(), 0);
        chain.between.treat(|_| Fault::None);
        assert_eq!(chain.read(digest).await.unwrap(), bytes);
    }
}

#[tokio::test]
async fn a_manifest_that_is_another_one_is_neither_served_nor_stored() {
    let chain = Chain::start(HOUR).await;
    let digest = chain.upstream.push("app", "v1", &image()).await;
    chain.between.treat(|_| Fault::Flip);
    for target in ["v1".to_owned(), digest.to_string()] {
        let path = format!("/v2/app/manifests/{target}");
        chain.registry.get(&path).await.refused(StatusCode::BAD_GATEWAY, "UNKNOWN");
    }
    assert!(!chain.is_stored(digest).await);
    assert!(chain.registry.store.tags(&"app".parse().unwrap()).await.unwrap().is_empty());
    chain.between.treat(|_| Fault::None);
    chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_breaks_off_is_gone_on_with_and_one_that_never_ends_is_not_stored() {
    let chain = Chain::start(HOUR).await;
    let bytes = bytes::Bytes::from(noise(20_000_000, 6));
    let digest = chain.upstream.push_blob("app", &bytes).await.digest;
    chain.between.treat(|line| if line.contains("/blobs/") { Fault::Cut } else { Fault::None });
    let read = chain.read(digest).await;
    assert!(read.is_err(), "{} bytes came", read.unwrap().len());
    assert!(!chain.is_stored(digest).await);
    assert_eq!(chain.registry.store.uploads_open(), 0);
    // only what is missing is asked for again
    chain.between.treat(|line| if line.ends_with("in part") { Fault::None } else { Fault::Cut });
    let parts = chain.between.asked("in part");
    assert_eq!(chain.read(digest).await.unwrap(), bytes);
    assert_eq!(chain.between.asked("in part"), parts + 1);
    assert!(chain.is_stored(digest).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tag_that_has_moved_is_seen_once_what_was_said_of_it_is_old() {
    for (revalidate, moves) in [(HOUR, false), (Duration::ZERO, true)] {
        let chain = Chain::start(revalidate).await;
        let old = chain.upstream.push("app", "v1", &image()).await;
        chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
        chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
        assert_eq!(chain.between.asked("GET /v2/app/manifests"), 1, "it had not moved");
        let new = chain.upstream.push("app", "v1", &image().relabelled("second")).await;
        let now = chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
        let expected = if moves { new } else { old };
        assert_eq!(now.header("docker-content-digest"), expected.to_string(), "{revalidate:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tag_that_is_known_does_not_wait_for_a_manifest_that_does_not_end() {
    let chain = Chain::start(Duration::ZERO).await;
    let old = chain.upstream.push("app", "v1", &image()).await;
    chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
    chain.upstream.push("app", "v1", &image().relabelled("second")).await;
    chain.between.treat(|line| if line.starts_with("GET") { Fault::Hold } else { Fault::None });
    let begun = tokio::time::Instant::now();
    let now = chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
    assert_eq!(now.header("docker-content-digest"), old.to_string());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn pushes_are_refused_and_change_nothing() {
    let chain = Chain::start(HOUR).await;
    let image = image();
    let digest = Digest::of(&image.manifest);
    for (method, path) in [
        (Method::POST, "/v2/app/blobs/uploads/".to_owned()),
        (Method::POST, format!("/v2/app/blobs/uploads/?digest={digest}")),
        (Method::PUT, "/v2/app/manifests/v1".to_owned()),
        (Method::PUT, format!("/v2/app/manifests/{digest}")),
        (Method::POST, "/lamina/v1/app/layers".to_owned()),
        (Method::POST, "/lamina/v1/app/chunks".to_owned()),
    ] {
        let kind = [("content-type", media_type::OCI_MANIFEST)];
        let said = chain.registry.send(method, &path, &kind, image.manifest.clone()).await;
        let said = said.refused(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED");
        assert!(said.contains("takes no pushes"), "{said}");
    }
    assert!(!chain.is_stored(digest).await);
    assert_eq!(chain.registry.store.uploads_open(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reads_a_manifest_has_its_image_brought_and_converted() {
    let chain = Chain::start(HOUR).await;
    let image = image();
    let digest = chain.upstream.push("app", "v1", &image).await;
    chain.between.treat(|line| if line.contains("/blobs/") { Fault::Hold } else { Fault::None });
    let status = format!("/lamina/v1/app/images/{digest}");
    chain.registry.send(Method::HEAD, "/v2/app/manifests/v1", &[], "").await.expect(StatusCode::OK);
    chain.registry.get(&status).await.expect(StatusCode::NOT_FOUND);
    chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
    assert_eq!(chain.registry.get(&status).await.expect(StatusCode::OK).json()["state"], "converting");
    chain.between.let_go();
    let begun = tokio::time::Instant::now();
    while chain.registry.store.image(digest).await.unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not come");
        tokio::task::yield_now().await;
    }
    assert_eq!(chain.registry.converted(digest).await.state, ImageState::Done);
    let kind = media_type::TREE.replace('+', "%2B");
    let hung = chain.registry.get(&format!("/v2/app/referrers/{digest}?artifactType={kind}")).await.json();
    assert!(hung["manifests"][0]["annotations"][TREE_ANNOTATION].is_string(), "{hung}");
    for bytes in image.blobs() {
        assert_eq!(chain.between.asked(&format!("GET {}", blob(Digest::of(bytes)))), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_blobs_do_not_come_says_so() {
    let chain = Chain::start(HOUR).await;
    let digest = chain.upstream.push("app", "v1", &image()).await;
    chain.between.treat(|line| if line.contains("/blobs/") { Fault::Status(404) } else { Fault::None });
    chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
    let (status, begun) = (format!("/lamina/v1/app/images/{digest}"), tokio::time::Instant::now());
    let status = loop {
        let status = chain.registry.get(&status).await.expect(StatusCode::OK).json();
        if status["state"] == "failed" {
            break status;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{status}");
    };
    assert!(status["reason"].as_str().unwrap().contains("did not come from the upstream"), "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_index_those_images_come_that_somebody_asks_for() {
    let chain = Chain::start(HOUR).await;
    let (one, two) = (image(), image().relabelled("second"));
    let descriptors: Vec<Descriptor> =
        [&one, &two].map(|image| Descriptor::of(media_type::OCI_MANIFEST, &image.manifest)).into();
    for image in [&one, &two] {
        chain.upstream.push("app", "part", image).await;
    }
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.to_owned()),
        artifact_type: None,
        manifests: descriptors.clone(),
        subject: None,
        annotations: Default::default(),
    };
    let index = serde_json::to_vec(&index).unwrap();
    chain
        .upstream
        .put_manifest("app", "all", media_type::OCI_INDEX, &index)
        .await
        .expect(StatusCode::CREATED);
    let here = chain.registry.get("/v2/app/manifests/all").await.expect(StatusCode::OK);
    assert_eq!((here.header("content-type"), &here.body[..]), (media_type::OCI_INDEX, &index[..]));
    assert_eq!(chain.between.asked("GET /v2/app/manifests"), 1);
    let path = format!("/v2/app/manifests/{}", descriptors[1].digest);
    assert_eq!(chain.registry.get(&path).await.expect(StatusCode::OK).body, two.manifest);
    let repo: Repo = "app".parse().unwrap();
    assert!(chain.registry.store.manifest_link(&repo, descriptors[0].digest).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_that_the_upstream_has_made_is_not_taken_for_one_that_was_made_here() {
    let chain = Chain::start(HOUR).await;
    let digest = chain.upstream.push("app", "v1", &image()).await;
    let made = chain.upstream.converted(digest).await.artifact.unwrap().digest;
    let path = format!("/v2/app/manifests/{made}");
    chain.registry.get(&path).await.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
    let hung = chain.registry.get(&format!("/v2/app/referrers/{digest}")).await.json();
    assert_eq!(hung["manifests"], serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_own_tree_is_false_is_deleted_and_does_not_come_again() {
    let chain = Chain::start(Duration::ZERO).await;
    let image = image();
    let mut bound = Bound::new(&image.tars);
    bound.tree = Bound::new(&image.tars[..1]).tree;
    let bytes = bound.push_blobs(&chain.upstream).await;
    // a registry of ours would not take it
    let (repo, digest): (Repo, _) = ("app".parse().unwrap(), Digest::of(&bytes));
    let manifest =
        ManifestPut { digest, media_type: media_type::OCI_MANIFEST.to_owned(), bytes, referrer: None };
    chain.upstream.store.put_manifest(&repo, manifest).await.unwrap();
    chain.upstream.store.set_tag(&repo, &"v1".parse().unwrap(), Some(digest)).await.unwrap();
    chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
    let begun = tokio::time::Instant::now();
    while chain.registry.store.manifest_link(&repo, digest).await.unwrap().is_some() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it stays");
        tokio::task::yield_now().await;
    }
    assert!(chain.registry.store.tags(&repo).await.unwrap().is_empty());
    for target in ["v1".to_owned(), digest.to_string()] {
        let path = format!("/v2/app/manifests/{target}");
        let said = chain.registry.get(&path).await.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
        assert!(said.contains("refuses") && said.contains(&digest.to_string()), "{said}");
    }
    assert_eq!(chain.between.asked("GET /v2/app/manifests"), 1);
    assert!(chain.registry.store.manifest_link(&repo, digest).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tag_leads_to_stays_and_what_it_has_left_is_collected() {
    let chain = Chain::start(Duration::ZERO).await;
    let (old, new) = (image(), image().relabelled("second"));
    for image in [&old, &new] {
        let digest = chain.upstream.push("app", "v1", image).await;
        chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
        let begun = tokio::time::Instant::now();
        while chain.registry.store.image(digest).await.unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not come");
            tokio::task::yield_now().await;
        }
        chain.registry.converted(digest).await;
    }
    // another process holds nothing of what came
    chain.registry.store.close().await.unwrap();
    let registry = chain.registry.restart().await;
    let zero = Duration::ZERO;
    let lost_after = Duration::from_secs(5);
    let gc = GcConfig { grace: zero, quarantine: zero, lost_after, ..GcConfig::default() };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    registry.store.keeper().gc(&gc, now + 1).await.unwrap();
    let (old, new) = (Digest::of(&old.manifest), Digest::of(&new.manifest));
    assert!(registry.store.blob(old).await.unwrap().is_none());
    for digest in
        image().blobs().map(|bytes| Digest::of(bytes)).filter(|digest| *digest != Digest::of(&image().config))
    {
        assert!(registry.store.blob(digest).await.unwrap().is_some());
    }
    registry.get(&format!("/v2/app/manifests/{new}")).await.expect(StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_was_deleted_here_comes_again_and_has_its_tree() {
    let chain = Chain::start(HOUR).await;
    let digest = chain.upstream.push("app", "v1", &image()).await;
    let path = format!("/v2/app/manifests/{digest}");
    for _ in 0..2 {
        chain.registry.get("/v2/app/manifests/v1").await.expect(StatusCode::OK);
        let (repo, begun): (Repo, _) = ("app".parse().unwrap(), tokio::time::Instant::now());
        while chain.registry.store.referrers(&repo, digest).await.unwrap().is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it gets no tree");
            tokio::task::yield_now().await;
        }
        chain.registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
    }
}

#[tokio::test]
async fn who_may_not_read_here_has_nothing_asked_upstream() {
    // alice, secret
    let users = tempfile::NamedTempFile::new().unwrap();
    let line = "alice:$2b$05$xwugU7Y2yEN0A9Hdu6PhIO7upbuPROJSi6Mf6mzmXWQVTNXxZ8bdG\n";
    std::fs::write(users.path(), line).unwrap();
    let rule = Rule::new(&["app".to_owned()], vec![Who::Users], vec![Action::Pull]).unwrap();
    let access = Access::new(AccessConfig {
        users: Users::open(users.path().to_owned()).unwrap(),
        rules: vec![rule],
        dedup: DedupScope::All,
        token_lifetime: HOUR,
        token_key: vec![7; 32],
        external_url: None,
        is_secure: false,
    });
    let chain = Chain::guarded(HOUR, Some(Arc::new(access))).await;
    let digest = chain.upstream.push("app", "v1", &image()).await;
    chain.upstream.push("other", "v1", &image()).await;
    for path in ["/v2/app/manifests/v1".to_owned(), blob(digest)] {
        chain.registry.get(&path).await.refused(StatusCode::UNAUTHORIZED, "UNAUTHORIZED");
    }
    let alice = [("authorization", "Basic YWxpY2U6c2VjcmV0")];
    let other = chain.registry.send(Method::GET, "/v2/other/manifests/v1", &alice, "").await;
    other.refused(StatusCode::FORBIDDEN, "DENIED");
    assert_eq!(chain.between.asked("/v2/"), 0);
    let app = chain.registry.send(Method::GET, "/v2/app/manifests/v1", &alice, "").await;
    app.expect(StatusCode::OK);
}
