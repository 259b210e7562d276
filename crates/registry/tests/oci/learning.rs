//! Profiles and boot packs: what a registry makes of what nodes tell it.

use std::collections::HashMap;
use std::time::Duration;

use http::{Method, StatusCode};
use lamina_image::{
    BOOT_ANNOTATION, BOOT_BYTES_ANNOTATION, BOOT_HEAD_BYTES, BootHead, Digest, Ino, PROFILE_ANNOTATION,
    Profile, TREE_ANNOTATION, Trace, TraceRun, Tree, media_type, unpack_tree,
};
use lamina_registry::RegistryConfig;
use lamina_testkit::library::Library;
use lamina_testkit::noise;
use lamina_wire::{Client, ClientConfig, proto, write_trace};
use prost::Message;
use serde_json::Value;
use tokio::time::Instant;

use crate::support::{Image, Registry, Reply};

mod commands;
mod preludes;

/// Longer takes no step of a test on any machine.
const DEADLINE: Duration = Duration::from_secs(60);

type Files = [(&'static str, Vec<u8>)];

fn files() -> Vec<(&'static str, Vec<u8>)> {
    let mut holes = vec![0; 400_000];
    holes[200_000..260_000].copy_from_slice(&noise(60_000, 3));
    vec![
        ("etc/motd", b"hello\n".to_vec()),
        ("lib/one", noise(2_000_000, 1)),
        ("lib/two", noise(700_000, 2)),
        ("lib/holes", holes),
    ]
}

fn image_of(files: &Files) -> Image {
    let files: Vec<(&str, &[u8])> = files.iter().map(|(path, bytes)| (*path, &bytes[..])).collect();
    Image::new(&[&files])
}

/// A registry that takes every trace.
async fn eager() -> Registry {
    Registry::start_with(RegistryConfig { trace_every: Duration::ZERO, ..RegistryConfig::default() }).await
}

/// An image in a registry, with its tree.
struct Pushed {
    repo: &'static str,
    digest: Digest,
    tree_digest: Digest,
    tree: Tree,
}

impl Pushed {
    async fn new(registry: &Registry, repo: &'static str, tag: &str, image: &Image) -> Self {
        let digest = registry.push(repo, tag, image).await;
        let tree_digest = registry.converted(digest).await.tree.unwrap().digest;
        let blob = registry.get(&format!("/v2/{repo}/blobs/{tree_digest}")).await.expect(StatusCode::OK).body;
        let tree = Tree::open(unpack_tree(&blob).unwrap().into()).unwrap();
        Self { repo, digest, tree_digest, tree }
    }

    fn ino(&self, path: &str) -> Ino {
        let step = |at, name: &str| self.tree.lookup(at, name.as_bytes()).unwrap().unwrap();
        path.split('/').fold(Ino::ROOT, step)
    }

    fn trace(&self, runs: &[(&str, u64, u64)]) -> Trace {
        let run = |(path, first, pages): &(&str, u64, u64)| TraceRun {
            ino: self.ino(path),
            first: *first,
            pages: *pages,
        };
        let names = vec![(Ino::ROOT, b"lib".to_vec()), (Ino::ROOT, b"absent".to_vec())];
        Trace { names, runs: runs.iter().map(run).collect(), boot: false }
    }

    async fn send(&self, registry: &Registry, trace: &proto::Trace) -> Reply {
        let path = format!("/lamina/v1/{}/traces/{}", self.repo, self.digest);
        registry.send(Method::POST, &path, &[], trace.encode_to_vec()).await
    }

    async fn tell(&self, registry: &Registry, trace: &Trace) {
        self.send(registry, &write_trace(self.tree_digest, trace)).await.expect(StatusCode::ACCEPTED);
    }

    /// The image's status as soon as it is so.
    async fn until(&self, registry: &Registry, so: impl Fn(&Value) -> bool) -> Value {
        let (begun, path) = (Instant::now(), format!("/lamina/v1/{}/images/{}", self.repo, self.digest));
        loop {
            let status = registry.get(&path).await.expect(StatusCode::OK).json();
            if so(&status) {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "{status}");
            tokio::task::yield_now().await;
        }
    }

    async fn after_starts(&self, registry: &Registry, starts: u32) -> Value {
        self.until(registry, |status| status["profile"]["starts"] == starts && status["boot"].is_object())
            .await
    }

    async fn hung(&self, registry: &Registry, kind: &str) -> Vec<Value> {
        let kind = kind.replace('+', "%2B");
        let path = format!("/v2/{}/referrers/{}?artifactType={kind}", self.repo, self.digest);
        registry.get(&path).await.expect(StatusCode::OK).json()["manifests"].as_array().unwrap().clone()
    }

    /// The artifacts of a kind as soon as the old ones are gone.
    async fn alone(&self, registry: &Registry, kind: &str) -> Vec<Value> {
        let begun = Instant::now();
        loop {
            let hung = self.hung(registry, kind).await;
            if hung.len() == 1 {
                return hung;
            }
            assert!(begun.elapsed() < DEADLINE, "{hung:?}");
        }
    }

    async fn profile(&self, registry: &Registry) -> Profile {
        let hung = self.alone(registry, media_type::PROFILE).await;
        let digest = hung[0]["annotations"][PROFILE_ANNOTATION].as_str().unwrap();
        Profile::parse(&registry.get(&format!("/v2/{}/blobs/{digest}", self.repo)).await.body).unwrap()
    }

    /// Opens the boot pack that the status names. Gives its runs by path, each matched against the files' bytes, and
    /// its names.
    async fn boot(
        &self,
        registry: &Registry,
        status: &Value,
        files: &Files,
    ) -> (Vec<(String, u64, u32)>, Vec<String>) {
        let path = format!("/v2/{}/blobs/{}", self.repo, status["boot"]["digest"].as_str().unwrap());
        let blob = registry.get(&path).await.expect(StatusCode::OK).body;
        assert_eq!(blob.len() as u64, status["boot"]["size"]);
        let head = BootHead::parse(&blob[..BOOT_HEAD_BYTES], self.tree_digest).unwrap();
        let table = &blob[BOOT_HEAD_BYTES..BOOT_HEAD_BYTES + head.table_len()];
        let table = head.records(table).unwrap().table(&self.tree).unwrap();
        let contents: HashMap<Ino, _> = files.iter().map(|file| (self.ino(file.0), file)).collect();
        let mut runs = Vec::new();
        for frame in &table.frames {
            let from = usize::try_from(frame.offset).unwrap();
            let plain = frame.open(&blob[from..from + frame.sealed_len as usize]).unwrap();
            for run in &table.runs[frame.runs.clone()] {
                let (path, bytes) = contents[&run.ino];
                let (offset, skip, len) = (run.offset as usize, run.skip as usize, run.len as usize);
                assert!(plain[skip..skip + len] == bytes[offset..offset + len], "{path} at {offset}");
                runs.push(((*path).to_owned(), run.offset, run.len));
            }
        }
        (runs, table.names)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_makes_a_profile_and_a_boot_pack_of_the_files_bytes() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let wanted = [("lib/two", 100, 71), ("etc/motd", 0, 1), ("lib/one", 0, 300), ("lib/holes", 40, 30)];
    pushed.tell(&registry, &pushed.trace(&wanted)).await;
    let status = pushed.after_starts(&registry, 1).await;
    assert_eq!((&status["profile"]["pages"], &status["profile"]["inherited"]), (&402.into(), &false.into()));

    let (mut runs, names) = pushed.boot(&registry, &status, &files).await;
    runs.sort();
    // a run ends where its frame does
    runs.dedup_by(|next, run| {
        let goes_on = run.0 == next.0 && run.1 + u64::from(run.2) == next.1;
        run.2 += if goes_on { next.2 } else { 0 };
        goes_on
    });
    let expected = [
        ("etc/motd", 0, 6),
        ("lib/holes", 40 * 4096, 30 * 4096),
        ("lib/one", 0, 300 * 4096),
        ("lib/two", 100 * 4096, 700_000 - 100 * 4096),
    ];
    assert_eq!(runs, expected.map(|(path, offset, len)| (path.to_owned(), offset, len)));
    assert_eq!(names[..2], ["lib", "absent"]);

    let boot = pushed.hung(&registry, media_type::BOOT).await;
    assert_eq!(boot.len(), 1);
    let annotations = &boot[0]["annotations"];
    assert_eq!(annotations[BOOT_ANNOTATION], status["boot"]["digest"]);
    assert_eq!(annotations[BOOT_BYTES_ANNOTATION], status["boot"]["size"].to_string());
    assert_eq!(annotations[TREE_ANNOTATION], pushed.tree_digest.to_string());
    assert_eq!(pushed.hung(&registry, media_type::TREE).await.len(), 1, "the tree still hangs there");
    let artifact = format!("/v2/app/manifests/{}", boot[0]["digest"].as_str().unwrap());
    let artifact = registry.get(&artifact).await.expect(StatusCode::OK).json();
    assert_eq!(artifact["subject"]["digest"], pushed.digest.to_string());
    assert_eq!(artifact["layers"][0]["digest"], status["boot"]["digest"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traces_are_merged_and_old_artifacts_go() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    pushed.tell(&registry, &pushed.trace(&[("lib/one", 0, 10)])).await;
    let first = pushed.after_starts(&registry, 1).await;
    // a start that had all it needed changes nothing
    pushed.tell(&registry, &Trace { boot: true, ..pushed.trace(&[]) }).await;
    pushed.tell(&registry, &Trace { boot: true, ..pushed.trace(&[("lib/two", 5, 2)]) }).await;
    pushed.until(&registry, |status| status["profile"]["starts"] == 2).await;
    let second = pushed.until(&registry, |status| status["boot"]["digest"] != first["boot"]["digest"]).await;
    assert_eq!((&second["profile"]["starts"], &second["profile"]["pages"]), (&2.into(), &12.into()));
    let (runs, _) = pushed.boot(&registry, &second, &files).await;
    assert_eq!(runs.iter().map(|run| run.2).sum::<u32>(), 12 * 4096);
    pushed.alone(&registry, media_type::BOOT).await;
    assert_eq!(pushed.profile(&registry).await.starts, 2);
    // the same pages again: another profile, but no other boot pack
    pushed.tell(&registry, &pushed.trace(&[("lib/one", 0, 10)])).await;
    let third = pushed.until(&registry, |status| status["profile"]["starts"] == 3).await;
    assert_eq!(third["boot"], second["boot"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_trace_is_refused_with_a_reason() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let other = Pushed::new(&registry, "app", "other", &Image::new(&[&[("a", b"b")]])).await;
    let good = write_trace(pushed.tree_digest, &pushed.trace(&[("lib/one", 0, 10)]));
    let code = "BLOB_UPLOAD_INVALID";
    let foreign = proto::Trace { tree: other.tree_digest.to_string(), ..good.clone() };
    let refused = pushed.send(&registry, &foreign).await;
    assert!(refused.refused(StatusCode::BAD_REQUEST, code).contains("the image's tree is"));
    for bad in [
        proto::Trace { run_pages: vec![1, 2], ..good.clone() },
        proto::Trace { name_dirs: Vec::new(), ..good.clone() },
        proto::Trace { tree: "sha256:no".to_owned(), ..good.clone() },
        proto::Trace {
            run_inos: vec![1; 600_000],
            run_firsts: vec![1; 600_000],
            run_pages: vec![1; 600_000],
            ..good.clone()
        },
    ] {
        let refused = pushed.send(&registry, &bad).await.refused(StatusCode::BAD_REQUEST, code);
        assert!(refused.contains("makes no sense"), "{refused}");
    }
    let path = format!("/lamina/v1/app/traces/{}", pushed.digest);
    registry.send(Method::POST, &path, &[], "no trace").await.refused(StatusCode::BAD_REQUEST, code);
    let long = vec![0; (16 << 20) + 1];
    registry
        .send(Method::POST, &path, &[], long)
        .await
        .refused(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID");

    // numbers that mean nothing are left out, and the rest is taken
    let absurd = |ino, first, pages| TraceRun { ino: Ino(ino), first, pages };
    let mut trace = pushed.trace(&[("lib/one", 0, 10)]);
    let last = u64::MAX;
    trace.runs.extend([absurd(0, 0, 1), absurd(last, last, last), absurd(2, last, 2), absurd(1, 0, 1)]);
    trace.runs.push(absurd(pushed.ino("lib/two").0, 0, last));
    trace.names.extend([(Ino(last), b"x".to_vec()), (Ino::ROOT, b"../x".to_vec()), (Ino::ROOT, vec![0xff])]);
    pushed.tell(&registry, &trace).await;
    let status = pushed.after_starts(&registry, 1).await;
    assert_eq!(status["profile"]["pages"], 10 + 171);
    let (_, names) = pushed.boot(&registry, &status, &files).await;
    assert_eq!(names, ["lib", "absent", "lib/one", "lib/two"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_here_or_has_no_tree_cannot_be_learnt_of() {
    let registry = eager().await;
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files())).await;
    let body = write_trace(pushed.tree_digest, &pushed.trace(&[("lib/one", 0, 10)])).encode_to_vec();
    let unknown = Digest::of(b"unknown");
    for (method, path) in [
        (Method::POST, format!("/lamina/v1/app/traces/{unknown}")),
        (Method::POST, format!("/lamina/v1/nobody/traces/{}", pushed.digest)),
        (Method::PUT, format!("/lamina/v1/app/profiles/{unknown}")),
        (Method::DELETE, format!("/lamina/v1/app/profiles/{unknown}")),
    ] {
        let reply = registry.send(method, &path, &[], body.clone()).await;
        reply.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    }
    let tree = pushed.hung(&registry, media_type::TREE).await[0]["digest"].as_str().unwrap().to_owned();
    let path = format!("/lamina/v1/app/traces/{tree}");
    let reply = registry.send(Method::POST, &path, &[], body).await;
    reply.refused(StatusCode::CONFLICT, "UNSUPPORTED");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_put_profiles_and_drop_them() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let client = Client::new(&registry.address.to_string(), ClientConfig::default()).unwrap();
    client
        .send_trace(
            "app",
            pushed.digest,
            None,
            &write_trace(pushed.tree_digest, &pushed.trace(&[("lib/one", 0, 9)])),
        )
        .await
        .unwrap();
    pushed.after_starts(&registry, 1).await;
    let json =
        r#"{"version":1,"starts":7,"names":["etc"],"files":["lib/two","gone"],"runs":[[0,1,2,7],[1,0,5,7]]}"#;
    client.put_profile("app", pushed.digest, None, json.into()).await.unwrap();
    let replaced = |status: &Value| status["profile"]["starts"] == 7 && status["profile"]["pages"] == 7;
    pushed.until(&registry, replaced).await;
    let begun = Instant::now();
    loop {
        let status = pushed.until(&registry, |status| status["boot"].is_object()).await;
        let (runs, names) = pushed.boot(&registry, &status, &files).await;
        if runs == [("lib/two".to_owned(), 4096, 8192)] && names == ["etc", "lib/two", "gone"] {
            break;
        }
        assert!(begun.elapsed() < DEADLINE, "{runs:?}");
    }
    for bad in ["", "{}", r#"{"version":1,"starts":1,"names":["../x"],"files":[],"runs":[]}"#] {
        let refused = client.put_profile("app", pushed.digest, None, bad.into()).await;
        assert!(refused.unwrap_err().to_string().contains("profile"), "{bad}");
    }
    client.drop_profile("app", pushed.digest, None).await.unwrap();
    let dropped = |status: &Value| status.get("profile").is_none() && status.get("boot").is_none();
    pushed.until(&registry, dropped).await;
    assert!(pushed.hung(&registry, media_type::PROFILE).await.is_empty());
    assert!(client.drop_profile("app", Digest::of(b""), None).await.unwrap_err().is_not_found());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_tag_inherits_and_its_first_start_corrects_it() {
    let (registry, mut files) = (eager().await, files());
    let old = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    old.tell(&registry, &old.trace(&[("lib/one", 0, 100), ("lib/two", 100, 71), ("lib/holes", 0, 9)])).await;
    old.after_starts(&registry, 1).await;
    files[2].1 = noise(500_000, 9);
    files.remove(3);
    for tag in ["v2", "v1"] {
        files[0].1 = tag.as_bytes().to_vec();
        let new = Pushed::new(&registry, "app", tag, &image_of(&files)).await;
        let status = new.after_starts(&registry, 1).await;
        assert_eq!(status["profile"]["inherited"], true);
        let (runs, _) = new.boot(&registry, &status, &files).await;
        assert_eq!(
            runs.iter().map(|run| u64::from(run.2)).sum::<u64>(),
            100 * 4096 + 500_000 - 100 * 4096,
            "{tag}"
        );
        new.tell(&registry, &new.trace(&[("lib/one", 50, 20)])).await;
        let status = new.until(&registry, |status| status["profile"]["inherited"] == false).await;
        assert_eq!((&status["profile"]["starts"], &status["profile"]["pages"]), (&1.into(), &20.into()));
        // the next one inherits from the first again
        let client = Client::new(&registry.address.to_string(), ClientConfig::default()).unwrap();
        client.drop_profile("app", new.digest, None).await.unwrap();
        new.until(&registry, |status| status.get("profile").is_none()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_library_that_was_built_anew_the_pages_are_inherited_where_its_symbols_are_now() {
    let registry = eager().await;
    // its text begins at page 1, and the function at another place of it
    let library = |version: &str, function: u64| {
        let library = Library::new().section(".head", &noise(4096 - 64, 1));
        let library = library.section(".text", &noise(400_000, 2)).symbol("f", ".text", function * 4096);
        vec![("lib/libf.so", library.bytes()), ("etc/motd", version.as_bytes().to_vec())]
    };
    let old = Pushed::new(&registry, "app", "v1", &image_of(&library("v1", 50))).await;
    old.tell(&registry, &old.trace(&[("lib/libf.so", 53, 2)])).await;
    old.after_starts(&registry, 1).await;
    let files = library("v2", 70);
    let new = Pushed::new(&registry, "app", "v2", &image_of(&files)).await;
    let status = new.after_starts(&registry, 1).await;
    assert_eq!(status["profile"]["inherited"], true);
    let (runs, _) = new.boot(&registry, &status, &files).await;
    assert_eq!(runs, [("lib/libf.so".to_owned(), 73 * 4096, 2 * 4096)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_many_starts_are_known_one_that_misses_much_is_heard() {
    let (registry, files) = (eager().await, files());
    let client = Client::new(&registry.address.to_string(), ClientConfig::default()).unwrap();
    let old = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let json = r#"{"version":1,"starts":16,"names":[],"files":["lib/one"],"runs":[[0,0,200,16]]}"#;
    client.put_profile("app", old.digest, None, json.into()).await.unwrap();
    let known = old.after_starts(&registry, 16).await;
    // the worker goes by the order of arrival: once the second is learnt, so is the first
    for (misses, pages) in [(3, 200), (4, 204)] {
        old.tell(&registry, &Trace { boot: true, ..old.trace(&[("lib/two", 0, misses)]) }).await;
        let other = Image::new(&[&[("a", format!("{misses}").as_bytes())]]);
        let other = Pushed::new(&registry, "other", "v1", &other).await;
        other.tell(&registry, &Trace { names: Vec::new(), ..other.trace(&[("a", 0, 1)]) }).await;
        other.until(&registry, |status| status["profile"]["inherited"] == false).await;
        let status = old.until(&registry, |status| status["profile"].is_object()).await;
        assert_eq!(status["profile"]["pages"], pages, "{misses}");
        assert_eq!(status["boot"] == known["boot"], misses == 3);
    }
    // an inherited profile counts as one start
    client.put_profile("app", old.digest, None, json.into()).await.unwrap();
    old.until(&registry, |status| status["profile"]["starts"] == 16).await;
    let new = Pushed::new(&registry, "app", "v2", &image_of(&[files[0].clone(), files[1].clone()])).await;
    new.after_starts(&registry, 1).await;
    new.tell(&registry, &Trace { boot: true, ..new.trace(&[("etc/motd", 0, 1)]) }).await;
    let status = new.until(&registry, |status| status["profile"]["starts"] == 2).await;
    assert_eq!(status["profile"]["pages"], 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_trace_a_thousand_times_is_learnt_once_an_interval() {
    let config = RegistryConfig { trace_every: Duration::from_secs(3600), ..RegistryConfig::default() };
    let registry = Registry::start_with(config).await;
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files())).await;
    let other = Pushed::new(&registry, "other", "v1", &Image::new(&[&[("a", b"b")]])).await;
    let trace = pushed.trace(&[("lib/one", 0, 400)]);
    for _ in 0..1000 {
        pushed.tell(&registry, &trace).await;
    }
    // the worker goes by the order of arrival: once this is learnt, so is all before
    other.tell(&registry, &Trace { names: Vec::new(), ..other.trace(&[("a", 0, 1)]) }).await;
    other.after_starts(&registry, 1).await;
    let status = pushed.after_starts(&registry, 1).await;
    assert_eq!(status["profile"]["starts"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn profiles_and_boot_packs_of_somebody_else_cannot_be_hung_on_an_image() {
    let registry = eager().await;
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files())).await;
    let stranger = registry.push("app", "v2", &Image::new(&[&[("a", b"b")]])).await;
    pushed.tell(&registry, &pushed.trace(&[("lib/one", 0, 10)])).await;
    pushed.after_starts(&registry, 1).await;
    for kind in [media_type::PROFILE, media_type::BOOT] {
        let own = pushed.hung(&registry, kind).await[0]["digest"].as_str().unwrap().to_owned();
        let bytes = registry.get(&format!("/v2/app/manifests/{own}")).await.expect(StatusCode::OK).body;
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let plain = "application/vnd.example";
        for forged in [
            text.replace(&pushed.digest.hex(), &stranger.hex()),
            text.replace(&format!("\"artifactType\":\"{kind}\""), &format!("\"artifactType\":\"{plain}\"")),
        ] {
            assert_ne!(forged, text);
            let target = Digest::of(forged.as_bytes()).to_string();
            let reply =
                registry.put_manifest("app", &target, media_type::OCI_MANIFEST, forged.as_bytes()).await;
            reply.refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID");
        }
        let again = registry.put_manifest("app", &own, media_type::OCI_MANIFEST, &bytes).await;
        again.expect(StatusCode::CREATED);
    }
}
