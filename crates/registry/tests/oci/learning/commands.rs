//! Profiles of single commands beside the general one of their image.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use lamina_image::{COMMAND_ANNOTATION, COMMANDS_MAX, CommandKey};

use super::*;

fn key(text: &str) -> CommandKey {
    text.parse().unwrap()
}

fn client(registry: &Registry) -> Client {
    Client::new(&registry.address.to_string(), ClientConfig::default()).unwrap()
}

/// What hangs on an image, by command; the general one under the empty name.
type ByCommand = BTreeMap<String, Value>;

impl Pushed {
    /// Tells of a start of a command; `own` where its boot pack was the command's.
    async fn tell_of(&self, registry: &Registry, command: &str, trace: &Trace, own: bool) {
        let trace = proto::Trace { boot_own: own, ..write_trace(self.tree_digest, trace) };
        client(registry).send_trace(self.repo, self.digest, Some(&key(command)), &trace).await.unwrap();
    }

    async fn by_command(&self, registry: &Registry, kind: &str) -> ByCommand {
        let hung = self.hung(registry, kind).await.into_iter();
        let named = hung
            .map(|one| (one["annotations"][COMMAND_ANNOTATION].as_str().unwrap_or_default().to_owned(), one));
        named.collect()
    }

    /// Profiles and boot packs by command, as soon as there is one of each for all of these, and nothing else.
    async fn learnt(&self, registry: &Registry, commands: &[&str]) -> (BTreeMap<String, Profile>, ByCommand) {
        let begun = Instant::now();
        loop {
            let hung = self.hung(registry, media_type::PROFILE).await.len();
            let artifacts = self.by_command(registry, media_type::PROFILE).await;
            let boots = self.by_command(registry, media_type::BOOT).await;
            if hung == commands.len() && [&artifacts, &boots].iter().all(|one| one.keys().eq(commands)) {
                let mut profiles = BTreeMap::new();
                for (command, artifact) in artifacts {
                    let digest = artifact["annotations"][PROFILE_ANNOTATION].as_str().unwrap();
                    let path = format!("/v2/{}/blobs/{digest}", self.repo);
                    let json = registry.get(&path).await.expect(StatusCode::OK).body;
                    profiles.insert(command, Profile::parse(&json).unwrap());
                }
                return (profiles, boots);
            }
            assert!(begun.elapsed() < DEADLINE, "{:?} {:?}", artifacts.keys(), boots.keys());
            tokio::task::yield_now().await;
        }
    }

    /// The same, as soon as the profile of one of them is so.
    async fn until_learnt(
        &self,
        registry: &Registry,
        commands: &[&str],
        command: &str,
        so: impl Fn(&Profile) -> bool,
    ) -> BTreeMap<String, Profile> {
        let begun = Instant::now();
        loop {
            let (profiles, _) = self.learnt(registry, commands).await;
            if so(&profiles[command]) {
                return profiles;
            }
            assert!(begun.elapsed() < DEADLINE, "{command}: {:?}", profiles[command]);
        }
    }

    /// Bytes of each file in the boot pack that an artifact names.
    async fn booted(&self, registry: &Registry, artifact: &Value, files: &Files) -> BTreeMap<String, u32> {
        let annotations = &artifact["annotations"];
        let size: u64 = annotations[BOOT_BYTES_ANNOTATION].as_str().unwrap().parse().unwrap();
        let status = serde_json::json!({ "boot": { "digest": annotations[BOOT_ANNOTATION], "size": size } });
        let mut bytes = BTreeMap::new();
        for (path, _, len) in self.boot(registry, &status, files).await.0 {
            *bytes.entry(path).or_default() += len;
        }
        bytes
    }
}

fn expected(files: &[(&str, u32)]) -> BTreeMap<String, u32> {
    files.iter().map(|(path, pages)| ((*path).to_owned(), pages * 4096)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_commands_get_a_boot_pack_each_and_the_general_one_has_both() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    pushed.tell_of(&registry, "serve", &pushed.trace(&[("lib/one", 0, 10)]), false).await;
    pushed.learnt(&registry, &["", "serve"]).await;
    pushed.tell_of(&registry, "train", &pushed.trace(&[("lib/two", 5, 20)]), false).await;
    let all = ["", "serve", "train"];
    pushed.until_learnt(&registry, &all, "", |general| general.starts == 2).await;
    let (profiles, boots) = pushed.learnt(&registry, &all).await;
    assert_eq!((profiles["serve"].pages(), profiles["train"].pages(), profiles[""].pages()), (10, 20, 30));
    for (command, files_of) in [
        ("serve", &[("lib/one", 10)][..]),
        ("train", &[("lib/two", 20)]),
        ("", &[("lib/one", 10), ("lib/two", 20)]),
    ] {
        let booted = pushed.booted(&registry, &boots[command], &files).await;
        assert_eq!(booted, expected(files_of), "{command}");
    }
    // the image's status is that of the general one, and lists the others
    let status = pushed.until(&registry, |status| status["commands"].is_object()).await;
    assert_eq!(status["boot"]["digest"], boots[""]["annotations"][BOOT_ANNOTATION]);
    for command in ["serve", "train"] {
        let boot = &status["commands"][command]["boot"]["digest"];
        assert_eq!(boot, &boots[command]["annotations"][BOOT_ANNOTATION]);
    }
    // a start of no known command is everybody's and nobody's
    pushed.tell(&registry, &pushed.trace(&[("lib/one", 0, 30)])).await;
    let profiles = pushed.until_learnt(&registry, &all, "", |general| general.starts == 3).await;
    assert_eq!((profiles["serve"].pages(), profiles["train"].pages(), profiles[""].pages()), (10, 20, 50));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_is_completed_by_the_boot_pack_that_its_start_had() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    pushed.tell(&registry, &pushed.trace(&[("lib/one", 0, 100)])).await;
    pushed.after_starts(&registry, 1).await;
    let booted = |runs: &[(&str, u64, u64)]| Trace { boot: true, ..pushed.trace(runs) };
    // a first start on the general boot pack is a guess, with what that lacked
    pushed.tell_of(&registry, "train", &booted(&[("lib/two", 0, 40)]), false).await;
    let all = ["", "train"];
    let profiles = pushed.until_learnt(&registry, &all, "", |general| general.starts == 2).await;
    assert_eq!((profiles["train"].pages(), profiles["train"].inherited), (140, true));
    assert_eq!((profiles[""].pages(), profiles[""].inherited), (140, false));
    // a start without a boot pack knows better
    pushed.tell_of(&registry, "train", &pushed.trace(&[("lib/two", 0, 50)]), false).await;
    let profiles = pushed.until_learnt(&registry, &all, "", |general| general.starts == 3).await;
    assert_eq!((profiles["train"].pages(), profiles["train"].inherited), (50, false));
    // and one on the command's own lacked only this, while of all starts it had that as well
    pushed.tell_of(&registry, "train", &booted(&[("lib/holes", 0, 64)]), true).await;
    let profiles = pushed.until_learnt(&registry, &all, "", |general| general.starts == 4).await;
    assert_eq!(profiles["train"].pages(), 50 + 64);
    let general = &profiles[""];
    let seen = |path: &str| general.runs.iter().find(|run| general.files[run.0 as usize] == path).unwrap().3;
    // the page that all of them read: without a boot pack, guessed, said so, and taken from the command's own
    assert_eq!((seen("lib/one"), seen("lib/two"), seen("lib/holes")), (2, 3, 1));
    // who misses next to nothing of the general boot pack needs none of its own
    pushed.tell_of(&registry, "idle", &booted(&[("etc/motd", 0, 1)]), false).await;
    pushed.until_learnt(&registry, &all, "", |general| general.starts == 5).await;
}

static SECONDS: AtomicU64 = AtomicU64::new(1_000);

/// A clock on which nothing happens at the same time as anything else.
fn ticking() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(SECONDS.fetch_add(1, Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_too_many_commands_those_revised_longest_ago_are_dropped() {
    let config = RegistryConfig { trace_every: Duration::ZERO, clock: ticking, ..RegistryConfig::default() };
    let (registry, files) = (Registry::start_with(config).await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let names: Vec<String> = (10..10 + COMMANDS_MAX + 2).map(|number| format!("c{number}")).collect();
    let mut known = vec![""];
    for (name, page) in names[..COMMANDS_MAX].iter().zip(0..) {
        pushed.tell_of(&registry, name, &pushed.trace(&[("lib/one", page, 1)]), false).await;
        known.push(name);
        pushed.learnt(&registry, &known).await;
    }
    // the first is heard of again, so the second has waited longest
    pushed.tell_of(&registry, "c10", &pushed.trace(&[("lib/two", 0, 9)]), false).await;
    pushed.until_learnt(&registry, &known, "c10", |profile| profile.starts == 2).await;
    for (new, old) in [("c26", "c11"), ("c27", "c12")] {
        pushed.tell_of(&registry, new, &pushed.trace(&[("lib/two", 0, 9)]), false).await;
        known.retain(|command| *command != old);
        known.push(new);
        pushed.learnt(&registry, &known).await;
    }
    assert_eq!(known.len(), COMMANDS_MAX + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_none_is_refused_whoever_sends_it() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let trace = write_trace(pushed.tree_digest, &pushed.trace(&[("lib/one", 0, 10)])).encode_to_vec();
    let json = r#"{"version":1,"starts":1,"names":[],"files":["lib/one"],"runs":[[0,0,9,1]]}"#;
    let long = "x".repeat(65);
    for bad in ["", "..", "..%2F..%2Fetc", "a%0A", "%00", "a%20b", "%1b[2J", "-x", "%C3%A4", &long] {
        for (method, what, body) in [
            (Method::POST, "traces", trace.clone()),
            (Method::PUT, "profiles", json.as_bytes().to_vec()),
            (Method::DELETE, "profiles", Vec::new()),
        ] {
            let path = format!("/lamina/v1/app/{what}/{}?command={bad}", pushed.digest);
            let reply = registry.send(method, &path, &[], body).await;
            let said = reply.refused(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID");
            assert!(said.contains("no command key") && said.len() < 1000, "{bad}: {said}");
        }
    }
    assert!(pushed.hung(&registry, media_type::PROFILE).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_put_and_drop_the_profile_of_one_command_and_drop_all() {
    let (registry, files) = (eager().await, files());
    let pushed = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    let client = client(&registry);
    let json = |pages: u64| {
        format!(r#"{{"version":1,"starts":1,"names":[],"files":["lib/one"],"runs":[[0,0,{pages},1]]}}"#)
    };
    for (command, pages) in [(Some(key("a")), 3), (Some(key("b")), 4), (None, 5)] {
        client.put_profile("app", pushed.digest, command.as_ref(), json(pages).into()).await.unwrap();
    }
    let (profiles, _) = pushed.learnt(&registry, &["", "a", "b"]).await;
    let pages: Vec<u64> = profiles.values().map(Profile::pages).collect();
    assert_eq!(pages, [5, 3, 4]);
    client.drop_profile("app", pushed.digest, Some(&key("a"))).await.unwrap();
    pushed.learnt(&registry, &["", "b"]).await;
    client.drop_profile("app", pushed.digest, None).await.unwrap();
    pushed.learnt(&registry, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_tag_inherits_the_profile_of_every_command() {
    let (registry, mut files) = (eager().await, files());
    let old = Pushed::new(&registry, "app", "v1", &image_of(&files)).await;
    old.tell_of(&registry, "serve", &old.trace(&[("lib/one", 0, 10)]), false).await;
    old.tell_of(&registry, "train", &old.trace(&[("lib/two", 5, 20), ("lib/holes", 0, 9)]), false).await;
    let all = ["", "serve", "train"];
    old.until_learnt(&registry, &all, "", |general| general.starts == 2).await;
    files.remove(3);
    let new = Pushed::new(&registry, "app", "v2", &image_of(&files)).await;
    let (profiles, boots) = new.learnt(&registry, &all).await;
    assert!(profiles.values().all(|profile| profile.inherited && profile.starts == 1));
    let pages: Vec<u64> = profiles.values().map(Profile::pages).collect();
    assert_eq!(pages, [30, 10, 20], "without the file that is gone");
    assert_eq!(new.booted(&registry, &boots["train"], &files).await, expected(&[("lib/two", 20)]));
    // a start of one of them corrects that, and the general one
    new.tell_of(&registry, "train", &new.trace(&[("lib/two", 5, 7)]), false).await;
    let profiles = new.until_learnt(&registry, &all, "", |general| !general.inherited).await;
    assert_eq!((profiles["train"].pages(), profiles["train"].inherited), (7, false));
    assert_eq!((profiles["serve"].pages(), profiles["serve"].inherited), (10, true));
}
