//! A registry that repacks what is mostly dead, under mounts that were there before and for those that come after.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use lamina_chunk::{Frame, MOVED_BYTES_MAX, Moved, MovedFrame, PackId};
use lamina_image::{Descriptor, Digest, Document, Manifest, media_type};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::until;
use lamina_wire::{CREATED_ANNOTATION, Client, ClientConfig, Version};

use crate::docker_registry::DockerRegistry;
use crate::proxy::{Fault, Proxy};
use crate::rig::{DEADLINE, Rig, skopeo, text};

/// Files that images share, each between two that only the first has.
const SHARED: u64 = 8;
const SHARED_BYTES: usize = 200_000;
const OWN_BYTES: usize = 900_000;

fn shared(number: u64) -> Vec<u8> {
    noise(SHARED_BYTES, number)
}

fn image(own: usize) -> Image {
    Image::new().layer(|layer| {
        (0..SHARED).fold(layer.dir("lib"), |layer, number| {
            let layer = layer.file(format!("lib/{number}-own"), noise(own, 100 + number + own as u64));
            layer.file(format!("lib/{number}-shared"), shared(number))
        })
    })
}

fn push(rig: &Rig, name: &str, own: usize) -> Result<()> {
    let source = rig.layout(&format!("layout-{name}"), &image(own))?;
    rig.ok(&["push", &source, &rig.name(&format!("app:{name}"))]).map(drop)
}

/// Every file of the image that stays is what it was.
fn is_right(mounted: &Path) -> Result<()> {
    for number in 0..SHARED {
        let (own, same) = (format!("lib/{number}-own"), format!("lib/{number}-shared"));
        ensure!(fs::read(mounted.join(&own))? == noise(1_000, 100 + number + 1_000), "{own}");
        ensure!(fs::read(mounted.join(&same))? == shared(number), "{same}");
    }
    Ok(())
}

/// Collects until a pack was repacked: what was written in this second is young.
fn repack(rig: &Rig) -> Result<serde_json::Value> {
    let storage = text(&rig.path("storage"));
    let gc = ["gc", "--storage", &storage, "--gc-grace", "0", "--gc-quarantine", "0"];
    until("a pack to be repacked", DEADLINE, || {
        let report = rig.json(&gc)?;
        Ok((report["repacked"]["packs"].as_u64() > Some(0)).then_some(report))
    })
}

/// Deletes the image that goes.
fn delete_gone(rig: &mut Rig) -> Result<()> {
    let gone = format!("docker://{}", rig.name("app:gone"));
    skopeo(&["delete", "--tls-verify=false", &gone])?;
    // who was just told what is there holds it: another process does not
    drop(rig.registry.take());
    rig.start_registry_on(&rig.address.clone())
}

fn forget_cache(rig: &Rig) -> Result<()> {
    rig.unmount()?;
    rig.node_ended()?;
    Ok(fs::remove_dir_all(rig.path("cache"))?)
}

#[test]
fn mounts_before_and_after_a_repack_read_every_file_right() -> Result<()> {
    let mut rig = Rig::new()?;
    push(&rig, "gone", OWN_BYTES)?;
    push(&rig, "stays", 1_000)?;
    // mounted, and nothing of it read
    let before = rig.mount_plain("app:stays")?;
    delete_gone(&mut rig)?;
    let report = repack(&rig)?;
    let (bytes, left) = (&report["repacked"]["bytes"], &report["repacked"]["bytes_left"]);
    let (bytes, left) = (bytes.as_u64().context("bytes")?, left.as_u64().context("bytes")?);
    ensure!(bytes > SHARED * OWN_BYTES as u64 && left < bytes / 2, "{report}");
    is_right(&before)?;
    forget_cache(&rig)?;

    let after = rig.mount_plain("app:stays")?;
    is_right(&after)?;
    let asked = rig.counter("verify_failures")?;
    ensure!(asked == 0, "{asked} frames came wrong");
    forget_cache(&rig)?;

    // the same image again: its layers are known, under the old places
    let source = rig.layout("layout-again", &image(1_000))?;
    let again = rig.json(&["push", &source, &rig.name("other/again:t")])?;
    ensure!(again["layers_known"] == again["layers"], "{again}");
    is_right(&rig.mount_plain("other/again:t")?)?;
    forget_cache(&rig)?;

    // in bulk, and then with nobody to ask
    rig.ok(&["prefetch", &rig.name("app:stays")])?;
    rig.node_ended()?;
    drop(rig.registry.take());
    is_right(&rig.mount_plain("app:stays")?)?;
    rig.unmount()?;

    rig.start_registry_on(&rig.address.clone())?;
    let storage = text(&rig.path("storage"));
    let said = rig.ok(&["gc", "--storage", &storage, "--gc-grace", "0", "--gc-quarantine", "0"])?;
    ensure!(!said.contains("repacked"), "there was nothing left to do: {said}");
    let fsck = rig.json(&["fsck", "--storage", &storage])?;
    ensure!(fsck["damaged"].as_array().is_some_and(Vec::is_empty), "{fsck}");
    Ok(())
}

/// The same by any client's push, and converted.
fn push_ordinary(rig: &Rig, name: &str, own: usize) -> Result<()> {
    let source = rig.layout(&format!("layout-{}", name.replace([':', '/'], "-")), &image(own))?;
    skopeo(&["copy", "--dest-tls-verify=false", &source, &format!("docker://{}", rig.name(name))])?;
    let status = rig.converted(name)?;
    ensure!(status["conversion"]["state"] == "done", "{status}");
    Ok(())
}

/// What any client gets of the image that stays: the index of a layout, which names all.
fn pulled(rig: &Rig, layout: &str) -> Result<Vec<u8>> {
    let (from, to) = (format!("docker://{}", rig.name("app:stays")), text(&rig.path(layout)));
    skopeo(&["copy", "--src-tls-verify=false", &from, &format!("oci:{to}:t")])?;
    Ok(fs::read(rig.path(layout).join("index.json"))?)
}

/// Collects until the pack that was repacked is gone, with the artifact that names it.
fn old_pack_goes(rig: &Rig) -> Result<()> {
    let storage = text(&rig.path("storage"));
    let gc = ["gc", "--storage", &storage, "--gc-grace", "0", "--gc-quarantine", "0"];
    until("the old pack to go", DEADLINE, || {
        let freed = rig.json(&gc)?["freed"]["bytes"].as_u64().context("bytes")?;
        Ok((freed > SHARED * OWN_BYTES as u64).then_some(()))
    })
}

#[test]
fn after_ordinary_pushes_too_mounts_before_and_after_a_repack_read_every_file_right() -> Result<()> {
    let mut rig = Rig::new()?;
    push_ordinary(&rig, "app:gone", OWN_BYTES)?;
    push_ordinary(&rig, "app:stays", 1_000)?;
    let pulled_before = pulled(&rig, "pulled-before")?;
    let before = rig.mount_plain("app:stays")?;
    delete_gone(&mut rig)?;
    repack(&rig)?;
    old_pack_goes(&rig)?;
    is_right(&before)?;
    forget_cache(&rig)?;
    is_right(&rig.mount_plain("app:stays")?)?;
    let wrong = rig.counter("verify_failures")?;
    ensure!(wrong == 0, "{wrong} frames came wrong");
    forget_cache(&rig)?;
    ensure!(pulled(&rig, "pulled-after")? == pulled_before, "an ordinary pull gives something else");
    // the same image elsewhere
    push_ordinary(&rig, "other/again:t", 1_000)?;
    is_right(&rig.mount_plain("other/again:t")?)?;
    forget_cache(&rig)?;
    let storage = text(&rig.path("storage"));
    let fsck = rig.json(&["fsck", "--storage", &storage])?;
    ensure!(fsck["damaged"].as_array().is_some_and(Vec::is_empty), "{fsck}");
    Ok(())
}

/// An image of which a pack was repacked, copied to a registry that knows nothing of that, with what hangs the tree on it.
struct Copied {
    rig: Rig,
    home: DockerRegistry,
    image: Digest,
    artifact: Manifest,
}

impl Copied {
    fn new() -> Result<Self> {
        let mut rig = Rig::new()?;
        push_ordinary(&rig, "app:gone", OWN_BYTES)?;
        push_ordinary(&rig, "app:stays", 1_000)?;
        delete_gone(&mut rig)?;
        repack(&rig)?;
        old_pack_goes(&rig)?;
        let home = DockerRegistry::start(&rig.path("home"), "")?;
        let (from, to) = (rig.name("app:stays"), home.name("app:stays"));
        let quiet = ["copy", "-q", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"];
        skopeo(&[&quiet[..], &[&format!("docker://{from}"), &format!("docker://{to}")]].concat())?;
        let copying = copy_artifact(&rig.address, &home.address);
        let (image, artifact) = tokio::runtime::Runtime::new()?.block_on(copying)?;
        Ok(Self { rig, home, image, artifact })
    }

    /// Hangs another artifact on the image that is listed before those from earlier. Gives it.
    fn hang_first(&self, mut artifact: Manifest, created: u64) -> Result<Digest> {
        artifact.annotations.insert(CREATED_ANNOTATION.to_owned(), created.to_string());
        let (bytes, annotations) = (Bytes::from(serde_json::to_vec(&artifact)?), artifact.annotations);
        let named = Descriptor::of(media_type::OCI_MANIFEST, &bytes);
        let named = Descriptor { artifact_type: artifact.artifact_type, annotations, ..named };
        let (to, digest) = (Client::new(&self.home.address, ClientConfig::default())?, named.digest);
        tokio::runtime::Runtime::new()?.block_on(async {
            to.push_referrer("app", self.image, named, bytes).await?;
            let listed = to.referrers("app", self.image, media_type::TREE).await?;
            ensure!(listed.len() > 1 && listed[0].digest == digest, "{listed:?}");
            Ok(digest)
        })
    }

    fn push_blob(&self, bytes: Vec<u8>) -> Result<()> {
        let (to, digest) = (Client::new(&self.home.address, ClientConfig::default())?, Digest::of(&bytes));
        let pushing = to.push_blob("app", digest, bytes.into());
        Ok(tokio::runtime::Runtime::new()?.block_on(pushing).map(drop)?)
    }
}

/// Copies what hangs the tree on the image under `app:stays` from one registry to another, with all that it names. Gives the image and
/// that.
async fn copy_artifact(from: &str, to: &str) -> Result<(Digest, Manifest)> {
    let (from, to) = (Client::new(from, ClientConfig::default())?, Client::new(to, ClientConfig::default())?);
    let image = from.manifest("app", &Version::Tag("stays".to_owned())).await?.digest;
    let listed = from.referrers("app", image, media_type::TREE).await?;
    ensure!(listed.len() == 1, "{listed:?}");
    let artifact = from.manifest("app", &Version::Digest(listed[0].digest)).await?;
    let Document::Manifest(manifest) = Document::parse(&artifact.media_type, &artifact.bytes)? else {
        bail!("an artifact is a manifest")
    };
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        let bytes = from.blob("app", blob.digest, blob.size).await?;
        to.push_blob("app", blob.digest, bytes).await?;
    }
    to.push_referrer("app", image, listed[0].clone(), artifact.bytes).await?;
    Ok((image, manifest))
}

#[test]
fn an_image_that_was_copied_with_what_hangs_on_it_is_read_where_nobody_knows_of_moved_packs() -> Result<()> {
    let copied = Copied::new()?;
    let gone = copied.hang_first(copied.artifact.clone(), u64::MAX)?;
    let Copied { mut rig, home, .. } = copied;
    let to = home.name("app:stays");
    // the list of what hangs there is kept by clients, and still has it
    let gone = format!("docker://{}@{gone}", home.name("app"));
    skopeo(&["delete", "--tls-verify=false", &gone])?;
    drop(rig.registry.take());

    let mounted = rig.path("mount");
    rig.ok(&["mount", "--no-trace", &to, &text(&mounted)])?;
    is_right(&mounted)?;
    forget_cache(&rig)?;
    // also where nobody reads it, under a mount and without one
    rig.ok(&["mount", "--no-trace", "--fill", "all", &to, &text(&mounted)])?;
    until("the mount to be filled", DEADLINE, || {
        let fills = rig.json(&["stats"])?["fills"].clone();
        let state = fills[0]["state"].as_str().unwrap_or_default().to_owned();
        ensure!(state != "failed", "{fills}");
        Ok((state == "done").then_some(()))
    })?;
    forget_cache(&rig)?;
    rig.ok(&["prefetch", &to])?;
    rig.node_ended()?;
    drop(home);
    rig.ok(&["mount", "--no-trace", &to, &text(&mounted)])?;
    is_right(&mounted)?;
    rig.unmount()
}

/// The record of the only pack that was moved.
fn moved(rig: &Rig) -> Result<Moved> {
    let mut records = fs::read_dir(rig.path("storage/objects/moved"))?;
    let record = records.next().context("a record")??;
    ensure!(records.next().is_none(), "one pack was moved");
    Ok(Moved::parse(&fs::read(record.path())?)?)
}

/// Frames that lay in an old pack so, but one after the other where the record says.
fn frames(of: &[MovedFrame]) -> impl Iterator<Item = Frame> {
    of.iter().map(|at| Frame { offset: at.offset, sealed_len: at.sealed_len, plain_len: at.sealed_len })
}

/// What is false of where a pack went, in so many ways.
fn lies(truth: &Moved) -> Result<[(&'static str, Moved); 3]> {
    let all = truth.frames();
    ensure!(all.len() > 2, "{all:?}");
    Ok([
        ("other frames", Moved::new(truth.pack(), frames(&all[1..]))),
        ("the last frame alone", Moved::new(truth.pack(), frames(&all[all.len() - 1..]))),
        ("a pack that nobody has", Moved::new(PackId::from_bytes([9; 32]), frames(all))),
    ])
}

#[test]
fn an_artifact_that_lies_about_where_a_pack_went_does_not_hide_the_one_that_is_right() -> Result<()> {
    let copied = Copied::new()?;
    let layers = &copied.artifact.layers;
    let at = layers.iter().position(|layer| layer.moved_pack().is_some()).context("a record")?;
    let old = layers[at].moved_pack().context("a record")?;
    let lies = lies(&moved(&copied.rig)?)?.map(|(what, lie)| (what, lie.to_bytes()));
    let (name, point) = (copied.home.name("app:stays"), text(&copied.rig.path("mount")));
    let others = [("no record", b"{}".to_vec()), ("more than is taken", vec![0; MOVED_BYTES_MAX + 1])];
    for (number, (what, lie)) in (1..).zip(lies.into_iter().chain(others)) {
        let mut artifact = copied.artifact.clone();
        artifact.layers[at] = Descriptor::of_moved(old, &lie);
        copied.push_blob(lie)?;
        // those of before hang there too
        copied.hang_first(artifact, number)?;
        copied.rig.ok(&["mount", "--no-boot", "--no-trace", &name, &point])?;
        is_right(&copied.rig.path("mount")).with_context(|| what)?;
        forget_cache(&copied.rig)?;
    }
    Ok(())
}

#[test]
fn a_mirror_that_lies_about_where_a_pack_went_costs_no_reader_his_bytes() -> Result<()> {
    let mut rig = Rig::new()?;
    push(&rig, "gone", OWN_BYTES)?;
    push(&rig, "stays", 1_000)?;
    delete_gone(&mut rig)?;
    repack(&rig)?;
    for (what, lie) in lies(&moved(&rig)?)? {
        // with the packs, and without
        for packs in [Fault::None, Fault::Status(404)] {
            let lie: &[u8] = Box::leak(lie.to_bytes().into_boxed_slice());
            let mirror = Proxy::start(&rig.address, move |request| match request.ranged {
                true => packs,
                false if request.line.contains("/moved/") => Fault::Say(lie),
                false => Fault::None,
            })?;
            let (name, point) = (rig.name("app:stays"), rig.path("mount"));
            let mirrors = format!("{}={}", rig.address, mirror.address);
            rig.ok(&["mount", "--no-boot", "--no-trace", "--mirror", &mirrors, &name, &text(&point)])?;
            is_right(&point).with_context(|| format!("{what}, {packs:?}"))?;
            mirror.faulted()?;
            forget_cache(&rig)?;
        }
    }
    Ok(())
}

#[test]
fn a_dry_run_says_what_would_be_repacked_and_a_frame_that_is_gone_is_an_error_and_not_zeros() -> Result<()> {
    let mut rig = Rig::new()?;
    push(&rig, "gone", OWN_BYTES)?;
    push(&rig, "stays", 1_000)?;
    // mounted while it was there, and nothing of it read
    let mounted = rig.mount_plain("app:gone")?;
    delete_gone(&mut rig)?;
    let storage = text(&rig.path("storage"));
    let dry = ["gc", "--dry-run", "--storage", &storage, "--gc-grace", "0", "--gc-quarantine", "0"];
    let said = until("a pack to be mostly dead", DEADLINE, || {
        let said = rig.ok(&dry)?;
        Ok(said.contains("would repack").then_some(said))
    })?;
    ensure!(said.contains("of 1 packs"), "{said}");
    let off = rig.ok(&[&dry[..], &["--repack-below", "0"]].concat())?;
    ensure!(!off.contains("would repack"), "{off}");
    repack(&rig)?;
    for number in 0..SHARED {
        ensure!(fs::read(mounted.join(format!("lib/{number}-shared")))? == shared(number), "{number}");
        let own = fs::read(mounted.join(format!("lib/{number}-own")));
        ensure!(
            own.as_ref().is_err_and(|error| error.raw_os_error() == Some(5)),
            "{:?}",
            own.map(|own| own.len())
        );
    }
    rig.unmount()
}
