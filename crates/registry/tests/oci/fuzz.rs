//! Requests made by chance: whatever comes, the registry answers as the specification says and goes on.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_image::{Algorithm, Digest};
use lamina_testkit::noise;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Duration, timeout};

use crate::support::Registry;

/// Error codes that a client may be told: those of distribution-spec 1.1.
const CODES: [&str; 14] = [
    "BLOB_UNKNOWN",
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "UNAUTHORIZED",
    "DENIED",
    "UNSUPPORTED",
    "TOOMANYREQUESTS",
];

/// Values of a strategy, the same in every run; a failure says which by its number.
fn values<S: Strategy>(strategy: &S, count: usize) -> impl Iterator<Item = S::Value> {
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRunner::deterministic().new_rng());
    (0..count).map(move |_| strategy.new_tree(&mut runner).unwrap().current())
}

fn segment() -> impl Strategy<Value = String> {
    let digest = Digest::of(b"known").to_string();
    prop_oneof![
        4 => Just("a".to_owned()),
        3 => prop::sample::select(vec![
            "blobs", "manifests", "uploads", "tags", "list", "referrers", "images", "traces", "profiles", "_catalog",
            "chunks", "layers", "v1", "..", ".", "", "%2e%2e", "%2f", "sha256:00",
        ]).prop_map(str::to_owned),
        2 => Just(digest),
        1 => "[!-~]{1,40}".prop_map(|text| text.replace(['#', '?', '/', '"', '<', '>', '\\', '^', '`', '{', '|', '}'], "")),
    ]
}

fn query() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["digest", "mount", "from", "n", "last", "tag", "artifactType", "x"]);
    let value = prop_oneof![
        Just(Digest::of(b"known").to_string()),
        Just(Digest::by(Algorithm::Sha512, b"known").to_string()),
        Just("a".to_owned()),
        Just("18446744073709551616".to_owned()),
        "[a-zA-Z0-9%+=._:-]{0,30}",
    ];
    let pairs = prop::collection::vec((name, value), 0..4);
    pairs.prop_map(|pairs| pairs.iter().map(|(name, value)| format!("{name}={value}&")).collect())
}

type Fuzzed = (Method, String, Vec<(&'static str, String)>, Vec<u8>);

fn requests() -> impl Strategy<Value = Fuzzed> {
    let method = prop::sample::select(vec![
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::OPTIONS,
    ]);
    let prefix = prop::sample::select(vec!["/v2/", "/v2/", "/v2/", "/lamina/v1/", "/"]);
    let path = prop::collection::vec(segment(), 0..6).prop_map(|parts| parts.join("/"));
    let target = (prefix, path, query()).prop_map(|(prefix, path, query)| format!("{prefix}{path}?{query}"));
    let name =
        prop::sample::select(vec!["content-type", "content-range", "range", "if-none-match", "accept"]);
    let value = prop_oneof![
        Just("application/vnd.oci.image.manifest.v1+json".to_owned()),
        Just("application/vnd.oci.image.index.v1+json".to_owned()),
        "(bytes[= ])?[0-9]{0,20}-[0-9]{0,20}(/[0-9*]{0,5})?",
        "[ -~]{0,40}",
    ];
    let headers = prop::collection::vec((name, value), 0..3);
    let body = prop_oneof![
        Just(Vec::new()),
        Just(b"known".to_vec()),
        Just(br#"{"schemaVersion":2,"manifests":[]}"#.to_vec()),
        r#"[\[\]{}":,a-z0-9]{0,60}"#.prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 0..200),
    ];
    (method, target, headers, body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_request_gets_an_answer_that_the_specification_knows() {
    let registry = Registry::start().await;
    for (number, (method, target, headers, body)) in values(&requests(), 1500).enumerate() {
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let reply = registry.send(method.clone(), &target, &headers, body).await;
        let what = format!("{number}: {method} {target} {headers:?}: {} {:?}", reply.status, reply.body);
        assert!(!reply.status.is_server_error(), "{what}");
        if reply.status.is_client_error() && method != Method::HEAD {
            let document: serde_json::Value = serde_json::from_slice(&reply.body).expect(&what);
            for error in document["errors"].as_array().expect(&what) {
                assert!(CODES.contains(&error["code"].as_str().expect(&what)), "{what}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_bytes_on_a_connection_end_it_and_nothing_else() {
    let registry = Registry::start().await;
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        Just(b"GET /v2/ HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        Just(b"PUT /v2/a/manifests/v HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n".to_vec()),
        Just(b"\r\n5\r\nhello\r\n0\r\n\r\n".to_vec()),
        "[A-Z]{1,8} /[!-~]{0,30} HTTP/[0-9]\\.[0-9]\r\n".prop_map(String::into_bytes),
        "[a-zA-Z-]{1,20}:[ -~]{0,40}\r\n".prop_map(String::into_bytes),
    ];
    for (number, pieces) in values(&prop::collection::vec(piece, 1..6), 300).enumerate() {
        let mut stream = TcpStream::connect(registry.address).await.unwrap();
        // the registry may have closed it already
        let _ = stream.write_all(&pieces.concat()).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let read = timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "{number}: it neither answers nor closes: {pieces:?}");
    }
    registry.get("/v2/").await.expect(StatusCode::OK);
}

/// One step of a client that uploads, or errs.
#[derive(Clone, Debug)]
enum Step {
    Begin,
    /// Sends the next `len` bytes, at an offset that is wrong by `off`, if it says where they belong.
    Patch {
        len: usize,
        off: Option<i64>,
    },
    Status,
    Cancel,
    /// Ends it with `len` more bytes, under its digest or another one.
    Put {
        len: usize,
        right: bool,
        algorithm: Algorithm,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![8 => 0usize..3_000, 1 => 8_000_000usize..9_000_000];
    let algorithm = prop_oneof![Just(Algorithm::Sha256), Just(Algorithm::Sha512)];
    let step = prop_oneof![
        2 => Just(Step::Begin),
        5 => (len.clone(), prop::option::of(prop_oneof![4 => Just(0i64), 1 => -5i64..5])).prop_map(|(len, off)| Step::Patch { len, off }),
        1 => Just(Step::Status),
        1 => Just(Step::Cancel),
        2 => (len, prop::bool::weighted(0.7), algorithm)
            .prop_map(|(len, right, algorithm)| Step::Put { len, right, algorithm }),
    ];
    prop::collection::vec(step, 1..14)
}

/// What a client believes of its upload.
#[derive(Default)]
struct Model {
    place: Option<String>,
    sent: Vec<u8>,
    /// Whether the registry should know it.
    open: bool,
    blobs: BTreeMap<String, Bytes>,
}

impl Model {
    async fn take(&mut self, registry: &Registry, step: Step, seed: u64) {
        let place = match (&step, &self.place) {
            (Step::Begin, _) => {
                let begun = registry.send(Method::POST, "/v2/a/blobs/uploads/", &[], "").await;
                self.place = Some(begun.expect(StatusCode::ACCEPTED).header("location").to_owned());
                (self.sent, self.open) = (Vec::new(), true);
                return;
            }
            (_, None) => return,
            (_, Some(place)) => place.clone(),
        };
        match step {
            Step::Begin => unreachable!("handled above"),
            Step::Patch { len, off } => {
                let bytes = noise(len, seed);
                let start = self.sent.len() as i64 + off.unwrap_or(0);
                let range = format!("{start}-{}", start + len as i64 - 1);
                let says = off.is_some() && start >= 0 && len > 0;
                let headers: Vec<(&str, &str)> =
                    says.then_some(("content-range", range.as_str())).into_iter().collect();
                let reply = registry.send(Method::PATCH, &place, &headers, bytes.clone()).await;
                let wrong = says && off != Some(0);
                match (self.open, wrong) {
                    (false, _) => drop(reply.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN")),
                    (true, true) => drop(reply.expect(StatusCode::RANGE_NOT_SATISFIABLE)),
                    (true, false) => {
                        reply.expect(StatusCode::ACCEPTED);
                        self.sent.extend(bytes);
                    }
                }
            }
            Step::Status => {
                let reply = registry.get(&place).await;
                if self.open {
                    let last = self.sent.len().saturating_sub(1);
                    assert_eq!(reply.expect(StatusCode::NO_CONTENT).header("range"), format!("0-{last}"));
                } else {
                    reply.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
                }
            }
            Step::Cancel => {
                let reply = registry.send(Method::DELETE, &place, &[], "").await;
                reply.expect(if self.open { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND });
                self.open = false;
            }
            Step::Put { len, right, algorithm } => {
                let bytes = noise(len, seed);
                let whole = [self.sent.as_slice(), &bytes].concat();
                let digest = Digest::by(algorithm, if right { &whole } else { b"something else" });
                let reply = registry.send(Method::PUT, &format!("{place}?digest={digest}"), &[], bytes).await;
                match (self.open, right) {
                    (false, _) => drop(reply.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN")),
                    (true, false) => drop(reply.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID")),
                    (true, true) => {
                        reply.expect(StatusCode::CREATED);
                        self.blobs.insert(digest.to_string(), whole.into());
                    }
                }
                self.open = false;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_sequence_of_upload_requests_ends_in_the_bytes_that_were_taken() {
    let registry = Registry::start().await;
    for (number, steps) in values(&steps(), 60).enumerate() {
        let mut model = Model::default();
        for (step_number, step) in steps.into_iter().enumerate() {
            model.take(&registry, step, (number * 100 + step_number) as u64).await;
        }
        for (digest, bytes) in model.blobs {
            let read = registry.get(&format!("/v2/a/blobs/{digest}")).await.expect(StatusCode::OK);
            assert!(read.body == bytes, "sequence {number}: other bytes under {digest}");
        }
    }
}
