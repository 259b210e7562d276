//! Two registries over one bucket, with clients of both, while collections delete beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lamina_image::{Descriptor, Digest, Manifest, media_type};
use lamina_testkit::s3::S3;
use lamina_wire::{Client, ClientConfig, Version, WireError};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::server::{Server, is_whole, report};

const REPOSITORY: &str = "team/app";
const CLIENTS: usize = 8;
/// Of each client; 1,000 of all.
const UPDATES: usize = 125;
/// For each client, what is there before, each under a tag of its own, and nobody holds any more.
const OLD: usize = 25;
/// Tags that all clients write.
const SHARED: usize = 8;
/// Of so many updates one is of an image with a layer, which is converted.
const IMAGES_EVERY: usize = 25;

/// What each tag was ever meant to name.
type Written = Arc<Mutex<BTreeMap<String, BTreeSet<Digest>>>>;

/// Something to push: a manifest and its blobs.
struct Pushed {
    blobs: Vec<Bytes>,
    manifest: Bytes,
    digest: Digest,
}

impl Pushed {
    /// An artifact of one small blob.
    fn artifact(text: &str) -> Self {
        let (config, blob) = (Bytes::from_static(b"{}"), Bytes::from(format!("blob of {text}")));
        let layer = Descriptor::of("application/octet-stream", &blob);
        Self::of(config, "application/vnd.oci.empty.v1+json", vec![layer], vec![blob])
    }

    /// An image of one small layer.
    fn image(text: &str) -> Result<Self> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, "file", text.as_bytes())?;
        let tar = Bytes::from(tar.into_inner()?);
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(&tar)] },
        });
        let layer = Descriptor::of(media_type::OCI_LAYER, &tar);
        Ok(Self::of(config.to_string().into(), media_type::OCI_CONFIG, vec![layer], vec![tar]))
    }

    fn of(config: Bytes, kind: &str, layers: Vec<Descriptor>, mut blobs: Vec<Bytes>) -> Self {
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type::OCI_MANIFEST.to_owned()),
            artifact_type: (kind != media_type::OCI_CONFIG).then(|| "application/x-test".to_owned()),
            config: Descriptor::of(kind, &config),
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        let manifest = Bytes::from(serde_json::to_vec(&manifest).expect("a manifest has string keys"));
        blobs.push(config);
        Self { digest: Digest::of(&manifest), manifest, blobs }
    }

    /// As clients do: what is there is not sent.
    async fn push(&self, client: &Client, version: &Version) -> Result<(), WireError> {
        for blob in &self.blobs {
            let digest = Digest::of(blob);
            if !client.has_blob(REPOSITORY, digest).await? {
                client.push_blob(REPOSITORY, digest, blob.clone()).await?;
            }
        }
        client.push_manifest(REPOSITORY, version, media_type::OCI_MANIFEST, self.manifest.clone()).await
    }
}

/// Pulls what a version names, hashing everything. Gives the manifest's digest.
async fn pull(client: &Client, version: &Version) -> Result<Digest> {
    let fetched = client.manifest(REPOSITORY, version).await?;
    let manifest: Manifest = serde_json::from_slice(&fetched.bytes)?;
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        let bytes =
            client.blob(REPOSITORY, blob.digest, 1 << 20).await.with_context(|| format!("{version}"))?;
        ensure!(Digest::of(&bytes) == blob.digest, "{} came as other bytes", blob.digest);
    }
    Ok(Digest::of(&fetched.bytes))
}

fn tag(name: String) -> Version {
    Version::Tag(name)
}

/// The tag of something that was there before.
fn old(client: usize, at: usize) -> String {
    format!("old-{}-{at}", client % CLIENTS)
}

/// One client: it writes a tag of its own, which it reads back through the other registry, and tags that all write. What was
/// there before loses its tags to it, and every other one is pushed again while it is collected.
async fn update(number: usize, clients: [Client; 2], written: Written) -> Result<(String, Digest)> {
    let own = format!("own-{number}");
    let mut last = None;
    for round in 0..UPDATES {
        let (here, there) = (&clients[(number + round) % 2], &clients[(number + round + 1) % 2]);
        let text = format!("{number}-{round}");
        let pushed = match round {
            _ if round % IMAGES_EVERY == 0 => Pushed::image(&text)?,
            // every other one that its neighbour has taken a tag from some updates ago
            _ if round % 10 == 6 => Pushed::artifact(&old(number + 1, round / 5 - 1)),
            _ => Pushed::artifact(&text),
        };
        let name = match round % 5 {
            0 | 1 => format!("shared-{}", (number * 31 + round) % SHARED),
            2 => old(number, round / 5),
            _ => own.clone(),
        };
        written.lock().entry(name.clone()).or_default().insert(pushed.digest);
        pushed.push(here, &tag(name.clone())).await.with_context(|| format!("push {text} as {name}"))?;
        if name == own {
            last = Some(pushed.digest);
            let seen = pull(there, &tag(name)).await.with_context(|| format!("{text} through the other"))?;
            ensure!(seen == pushed.digest, "{own} is {seen}, not {}", pushed.digest);
        } else {
            // it may have moved on by now, and what it named may be gone
            match there.manifest(REPOSITORY, &tag(name.clone())).await {
                Ok(seen) => {
                    ensure!(written.lock()[&name].contains(&seen.digest), "{name} is {}", seen.digest)
                }
                Err(error) => ensure!(error.is_not_found(), "{name}: {error}"),
            }
        }
    }
    Ok((own, last.context("it has written")?))
}

/// Collects until it is told to stop, at once and without mercy. Gives how many manifests it has deleted.
fn collect(s3: &S3, stop: &AtomicBool) -> Result<u64> {
    let mut freed = 0;
    while !stop.load(Ordering::Acquire) {
        let report: Value = report(s3, "gc", &["--gc-grace", "0", "--gc-quarantine", "0"])?;
        freed += report["freed"]["manifests"].as_u64().context("a number")?;
    }
    Ok(freed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_thousand_updates_by_two_registries_under_collections_none_is_lost_and_none_torn() -> Result<()>
{
    let s3 = Arc::new(S3::start()?);
    let scratch = tempfile::tempdir()?;
    let written = Written::default();
    // what a registry holds that is no more, nobody holds
    let before = Server::start(&s3, &scratch.path().join("before"))?;
    let client = Client::new(&before.address, ClientConfig::default())?;
    for (number, at) in (0..CLIENTS).flat_map(|number| (0..OLD).map(move |at| (number, at))) {
        let (name, pushed) = (old(number, at), Pushed::artifact(&old(number, at)));
        pushed.push(&client, &tag(name.clone())).await?;
        written.lock().entry(name).or_default().insert(pushed.digest);
    }
    before.stop()?;
    let servers = [
        Server::start(&s3, &scratch.path().join("one"))?,
        Server::start(&s3, &scratch.path().join("other"))?,
    ];
    let clients = || -> Result<[Client; 2]> {
        let client = |server: &Server| Client::new(&server.address, ClientConfig::default());
        Ok([client(&servers[0])?, client(&servers[1])?])
    };
    let stop = Arc::new(AtomicBool::new(false));
    let collecting = tokio::task::spawn_blocking({
        let (s3, stop) = (Arc::clone(&s3), Arc::clone(&stop));
        move || collect(&s3, &stop)
    });
    let mut updating = Vec::new();
    for number in 0..CLIENTS {
        updating.push(tokio::spawn(update(number, clients()?, Arc::clone(&written))));
    }
    let mut own = BTreeMap::new();
    for client in updating {
        own.extend([client.await??]);
    }
    stop.store(true, Ordering::Release);
    ensure!(collecting.await?? > 0, "nothing was collected meanwhile");

    let written = written.lock().clone();
    for client in clients()? {
        for (name, values) in &written {
            let seen = pull(&client, &tag(name.clone())).await.with_context(|| name.clone())?;
            ensure!(values.contains(&seen), "{name} is {seen}, which nobody wrote");
            ensure!(
                own.get(name).is_none_or(|last| *last == seen),
                "{name} is {seen}, not what was written last"
            );
        }
    }
    is_whole(&s3)?;
    servers.into_iter().try_for_each(Server::stop)
}
