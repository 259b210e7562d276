//! What a collector is told.

use std::fs;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::{Image, Layer};
use lamina_testkit::noise;
use lamina_testkit::process::until;

use crate::collector::{Collector, Manner, Span};
use crate::rig::{DEADLINE, Rig, programs, skopeo, text};

const NODE: &str = "lamina-node";

fn image(layer: impl FnOnce(Layer) -> Layer) -> Image {
    Image::new().layer(layer)
}

/// The only span of a name.
fn one<'a>(spans: &'a [Span], name: &str) -> Result<&'a Span> {
    let mut found = spans.iter().filter(|span| span.name == name);
    let one = found.next().with_context(|| format!("no span {name}: {spans:#?}"))?;
    ensure!(found.next().is_none(), "more than one span {name}: {spans:#?}");
    Ok(one)
}

fn has(name: &'static str) -> impl Fn(&[Span]) -> bool {
    move |spans| spans.iter().any(|span| span.name == name)
}

#[test]
fn a_mount_its_steps_its_boot_pack_and_its_fetches_are_spans_of_one_whole() -> Result<()> {
    let rig = Rig::new()?;
    let cat = programs(Layer::new(), &["/bin/cat"])?;
    let image = image(|_| cat)
        .layer(|layer| layer.file("booted", noise(1_000_000, 1)).file("read", noise(1_000_000, 2)));
    let (source, name) = (rig.layout("layout", &image)?, rig.name("a:t"));
    rig.ok(&["push", &source, &name])?;
    // by another node, so that this one has nothing of it
    let other = text(&rig.path("other"));
    let recorded = rig.lamina(&["profile", "record", "--cache", &other, &name, "--", "cat", "/booted"])?;
    ensure!(recorded.status.success(), "{}", String::from_utf8_lossy(&recorded.stderr));
    until("the boot pack", DEADLINE, || {
        Ok((!rig.json(&["profile", "show", &name])?["boot"].is_null()).then_some(()))
    })?;

    let collector = Collector::new(Manner::Takes)?;
    let mounted = rig.path("mount");
    rig.ok(&["mount", "--otlp", &collector.url(), &name, &text(&mounted)])?;
    until("pages out of the boot pack", DEADLINE, || {
        Ok((rig.json(&["stats"])?["mounts"][0]["counters"]["boot_us"].as_u64() > Some(0)).then_some(()))
    })?;
    ensure!(fs::read(mounted.join("read"))? == noise(1_000_000, 2));
    rig.unmount()?;
    rig.node_ended()?;

    let spans = collector.spans("the mount", has("mount"))?;
    let mount = one(&spans, "mount")?;
    ensure!(mount.parent.is_empty() && mount.failure.is_none(), "{mount:?}");
    ensure!(mount.field("image") == name && mount.field("directory") == text(&mounted), "{mount:?}");
    ensure!(mount.field("manifest").starts_with("sha256:") && mount.field("offline") == "false", "{mount:?}");
    for step in ["resolve", "tree", "attach", "serve"] {
        let step = one(&spans, step)?;
        ensure!(step.is_within(mount), "{step:?} is not within {mount:?}");
        ensure!(mount.from_ns <= step.from_ns && step.to_ns <= mount.to_ns, "{step:?} outlives {mount:?}");
    }
    ensure!(
        one(&spans, "tree")?.field("from") == "network"
            && one(&spans, "tree")?.field("digest") == mount.field("tree")
    );
    let boot = one(&spans, "boot")?;
    ensure!(boot.is_within(mount) && boot.failure.is_none() && boot.field("own") == "false", "{boot:?}");
    let fetches = |class: &str| {
        let of = spans.iter().filter(|span| span.name == "fetch" && span.field("class") == class);
        of.collect::<Vec<_>>()
    };
    let [pack] = fetches("boot")[..] else { anyhow::bail!("not one fetch of the boot pack: {spans:#?}") };
    ensure!(
        pack.is_within(boot) && pack.field("pack") == boot.field("pack"),
        "{pack:?} is not within {boot:?}"
    );
    ensure!(
        pack.field("bytes") == boot.field("bytes") && pack.field("received") == boot.field("bytes"),
        "{pack:?}"
    );
    let demanded = fetches("demand");
    ensure!(!demanded.is_empty(), "no fetch for a reader: {spans:#?}");
    for fetch in demanded {
        ensure!(fetch.is_within(mount) && fetch.field("host") == rig.address, "{fetch:?}");
        ensure!(fetch.field("received") == fetch.field("bytes"), "{fetch:?}");
    }
    ensure!(spans.iter().all(|span| span.service == NODE), "{spans:#?}");
    Ok(())
}

#[test]
fn requests_and_conversions_of_a_registry_are_spans() -> Result<()> {
    let collector = Collector::new(Manner::Takes)?;
    let mut rig = Rig::with_environment(vec![("LAMINA_OTLP", collector.url())])?;
    let source = rig.layout("layout", &image(|layer| layer.file("file", noise(100_000, 1))))?;
    let target = format!("docker://{}", rig.name("a:t"));
    skopeo(&["copy", "--dest-tls-verify=false", &source, &target])?;
    ensure!(rig.converted("a:t")?["conversion"]["state"] == "done");
    let missing = rig.fails(&["inspect", &rig.name("a:none")])?;
    ensure!(missing.contains("not found"), "{missing}");
    rig.registry.take().context("it runs")?.stop(DEADLINE)?;

    let spans = collector.spans("the conversion", has("convert"))?;
    let convert = one(&spans, "convert")?;
    ensure!(
        convert.service == "lamina-registry" && convert.field("repo") == "a" && convert.failure.is_none(),
        "{convert:?}"
    );
    let requests = |method: &str, route: &str, status: &str| {
        let fields = [("method", method), ("route", route), ("status_code", status)];
        let is = |span: &&Span, (name, value): (&str, &str)| {
            let group = if name == "status_code" {
                "response."
            } else if name == "method" {
                "request."
            } else {
                ""
            };
            span.field(&format!("http.{group}{name}")) == value
        };
        spans
            .iter()
            .filter(|span| span.name == "request" && fields.iter().all(|field| is(span, *field)))
            .count()
    };
    ensure!(requests("PUT", "manifest", "201") == 1, "{spans:#?}");
    ensure!(requests("GET", "manifest", "404") > 0, "{spans:#?}");
    ensure!(
        spans.iter().all(|span| span.failure.is_none()),
        "a client's mistake is none of the registry's: {spans:#?}"
    );
    Ok(())
}

#[test]
fn a_mount_that_fails_says_so_and_the_variables_of_opentelemetry_do() -> Result<()> {
    let collector = Collector::new(Manner::Takes)?;
    let environment = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url()),
        ("OTEL_SERVICE_NAME", "gpu-pool".to_owned()),
        ("OTEL_RESOURCE_ATTRIBUTES", "zone=7".to_owned()),
    ];
    let rig = Rig::with_environment(environment)?;
    let said = rig.fails(&["mount", &rig.name("none:t"), &text(&rig.path("mount"))])?;
    rig.node_ended()?;
    let spans = collector.spans("the mount", has("mount"))?;
    let (mount, resolve) = (one(&spans, "mount")?, one(&spans, "resolve")?);
    ensure!(resolve.is_within(mount) && resolve.failure == mount.failure, "{spans:#?}");
    let failure = mount.failure.as_deref().unwrap_or_default();
    ensure!(!failure.is_empty() && said.contains(failure), "{said} {mount:?}");
    ensure!(mount.service == "gpu-pool", "{mount:?}");
    Ok(())
}
