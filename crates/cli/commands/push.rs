//! `lamina push`: cut here, send what is missing, name it last.
//!
//! Order: packs, recipes, tree, config, then the manifest under its tag. Whatever was sent before an interruption is
//! known to the registry at the next try, so that only the rest goes out again.

mod documents;
mod sink;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::StreamExt;
use lamina_chunk::Level;
use lamina_image::{
    Digest, IngestError, IngestOptions, LayerInput, Platform, Progress, Recipe, derive_tree, ingest,
    pack_tree,
};
use lamina_wire::{Client, KnownLayer, Reference, Version};
use tokio_util::io::ReaderStream;

use self::documents::{Documents, write_documents};
use self::sink::RegistrySink;
use super::{Interrupted, client_config, interrupted, mib};
use crate::args::{Common, PushArguments};
use crate::progress::Bar;
use crate::source::{Source, host_platform, open};

/// No recipe is longer: 512 MiB, a layer of some 300 GiB.
const RECIPE_BYTES_MAX: u64 = 512 << 20;

/// What a push did, for the end of it.
struct Summary {
    manifest: Digest,
    tree: Digest,
    layers: usize,
    layers_known: usize,
    seconds: f64,
    sent: u64,
}

/// Pushes a source to a registry.
pub(crate) async fn run(arguments: PushArguments, common: Common) -> Result<()> {
    let begun = Instant::now();
    if let Version::Digest(digest) = arguments.reference.version {
        bail!("push to a tag: {digest} names what is there already");
    }
    let platform = platform(arguments.platform.as_deref())?;
    let config = client_config(&common);
    let name = arguments.source.clone();
    let chosen = platform.clone();
    let source = tokio::task::spawn_blocking(move || open(&name, &chosen, config)).await??;
    let client = Client::new(&arguments.reference.host, config)?;
    let progress = Arc::new(Progress::default());
    let push = Push {
        client,
        reference: arguments.reference.clone(),
        source: Arc::from(source),
        platform,
        progress: Arc::clone(&progress),
        options: IngestOptions { level: Level(arguments.level), ..IngestOptions::default() },
        keep_layers: arguments.keep_layers,
    };
    let bar = Bar::watch(&progress, push.total());
    let summary = tokio::select! {
        summary = push.run(&bar) => summary?,
        () = interrupted() => {
            // threads notice this at their next block; packs that were sent stay, for the next try
            progress.stop.store(true, Relaxed);
            bail!(Interrupted);
        }
    };
    drop(bar);
    print(&arguments, &progress, &Summary { seconds: begun.elapsed().as_secs_f64(), ..summary });
    Ok(())
}

fn platform(text: Option<&str>) -> Result<Platform> {
    let Some(text) = text else { return Ok(host_platform()) };
    let mut parts = text.split('/');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(os), Some(architecture), variant, None) if !os.is_empty() && !architecture.is_empty() => {
            Ok(Platform {
                os: os.into(),
                architecture: architecture.into(),
                variant: variant.map(Into::into),
            })
        }
        _ => bail!("{text:?} is not a platform; write os/architecture, like linux/amd64"),
    }
}

fn print(arguments: &PushArguments, progress: &Progress, summary: &Summary) {
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
    let (read, tar) = (count(&progress.read), count(&progress.tar));
    let (chunks, new, known) = (count(&progress.chunks), count(&progress.new), count(&progress.known));
    if arguments.json {
        let report = serde_json::json!({
            "reference": arguments.reference.to_string(),
            "manifest": summary.manifest,
            "tree": summary.tree,
            "layers": summary.layers,
            "layers_known": summary.layers_known,
            "read_bytes": read,
            "tar_bytes": tar,
            "chunks": chunks,
            "chunks_new": new,
            "chunks_known": known,
            "new_bytes": count(&progress.new_bytes),
            "sent_bytes": summary.sent,
            "seconds": summary.seconds,
        });
        println!("{report}");
        return;
    }
    println!("{}@{}", arguments.reference, summary.manifest);
    println!(
        "{} layers ({} known), {} read, {} unpacked, {chunks} chunks: {new} new, {known} known; {} sent in {:.1} s",
        summary.layers,
        summary.layers_known,
        mib(read),
        mib(tar),
        mib(summary.sent),
        summary.seconds,
    );
}

/// One push.
struct Push {
    client: Client,
    reference: Reference,
    source: Arc<dyn Source>,
    platform: Platform,
    progress: Arc<Progress>,
    options: IngestOptions,
    keep_layers: bool,
}

impl Push {
    /// How many bytes will be read, where every layer says how long it is.
    fn total(&self) -> Option<u64> {
        self.source.image().layers.iter().map(|layer| layer.len).sum()
    }

    async fn run(&self, bar: &Bar) -> Result<Summary> {
        let known = self.known_layers().await?;
        let layers_known = known.iter().flatten().count();
        let recipes = self.recipes(known).await?;
        bar.stage("sending the tree");
        let (for_tree, flat) = self.tree(recipes).await?;
        let packed = tokio::task::spawn_blocking(move || Bytes::from(pack_tree(&flat))).await?;
        let tree = Digest::of(&packed);
        let repository = &self.reference.repository;
        let mut sent = self.progress.sent.load(Relaxed);
        for recipe in &for_tree {
            sent += self.blob(Digest::of(recipe.blob()), recipe.blob().clone()).await?;
        }
        sent += self.blob(tree, packed.clone()).await?;
        let image = self.source.image();
        let documents =
            write_documents(image, &for_tree, (tree, packed.len()), &self.platform, self.keep_layers)?;
        let Documents { config, media_type, manifest } = documents;
        sent += self.blob(Digest::of(&config), config.clone()).await?;
        if self.keep_layers {
            sent += self.original_layers().await?;
        }
        bar.stage("the registry checks");
        let digest = Digest::of(&manifest);
        sent += manifest.len() as u64;
        self.client.push_manifest(repository, &self.reference.version, &media_type, manifest).await?;
        let layers = image.layers.len();
        Ok(Summary { manifest: digest, tree, layers, layers_known, seconds: 0.0, sent })
    }

    /// Which layers need not be read, in order.
    async fn known_layers(&self) -> Result<Vec<Option<KnownLayer>>> {
        let layers = &self.source.image().layers;
        let names = |number: usize| {
            let layer = &layers[number];
            [layer.diff_id, layer.descriptor.as_ref().map(|descriptor| descriptor.digest)]
                .into_iter()
                .flatten()
        };
        let asked: Vec<Digest> = (0..layers.len()).flat_map(names).collect();
        let known = match asked.is_empty() {
            true => Vec::new(),
            false => self.client.known_layers(&asked).await.with_context(|| {
                format!("{} does not answer as a Lamina registry does", self.client.base())
            })?,
        };
        let find = |number: usize| {
            let found = known.iter().find(|layer| names(number).any(|name| name == layer.digest))?;
            // a config that names another tar than the layer has is found out by reading it
            layers[number].diff_id.is_none_or(|diff_id| diff_id == found.diff_id).then_some(*found)
        };
        Ok((0..layers.len()).map(find).collect())
    }

    /// The recipe of each layer: fetched where the registry has it, made from the layer where not.
    async fn recipes(&self, known: Vec<Option<KnownLayer>>) -> Result<Vec<Recipe>> {
        let mut recipes = Vec::with_capacity(known.len());
        for layer in &known {
            recipes.push(match layer {
                Some(layer) => {
                    let repository = &self.reference.repository;
                    let blob = self.client.blob(repository, layer.recipe, RECIPE_BYTES_MAX).await?;
                    Some(
                        Recipe::parse(blob)
                            .with_context(|| format!("the registry's recipe {}", layer.recipe))?,
                    )
                }
                None => None,
            });
        }
        let missing: Vec<usize> = (0..known.len()).filter(|number| recipes[*number].is_none()).collect();
        if !missing.is_empty() {
            let made = self.cut(missing.clone()).await?;
            missing.into_iter().zip(made).for_each(|(number, recipe)| recipes[number] = Some(recipe));
        }
        Ok(recipes.into_iter().map(|recipe| recipe.expect("each was fetched or made")).collect())
    }

    async fn cut(&self, numbers: Vec<usize>) -> Result<Vec<Recipe>> {
        let source = Arc::clone(&self.source);
        let (progress, options) = (Arc::clone(&self.progress), self.options);
        let sink = RegistrySink::new(self.client.clone(), self.reference.repository.clone());
        let made = tokio::task::spawn_blocking(move || {
            let image = source.image();
            let input = |number: &usize| {
                let layer = &image.layers[*number];
                let digest = layer.descriptor.as_ref().map(|descriptor| descriptor.digest).or(layer.diff_id);
                let name = digest.map_or("the root file system".into(), |digest| format!("layer {digest}"));
                Ok(LayerInput { name, bytes: source.layer(*number)?, diff_id: layer.diff_id })
            };
            let inputs = numbers.iter().map(input).collect::<Result<Vec<_>>>()?;
            ingest(inputs, &sink, options, &progress).map_err(|error| match error {
                IngestError::Stopped => Interrupted.into(),
                error => anyhow::Error::from(error),
            })
        });
        made.await?
    }

    async fn tree(&self, recipes: Vec<Recipe>) -> Result<(Vec<Recipe>, Vec<u8>)> {
        let derived = tokio::task::spawn_blocking(move || derive_tree(&recipes).map(|flat| (recipes, flat)));
        derived.await?.context("the layers do not make a file system")
    }

    /// Uploads a blob if the registry lacks it, and says how many bytes that took.
    async fn blob(&self, digest: Digest, bytes: Bytes) -> Result<u64> {
        let repository = &self.reference.repository;
        if self.client.has_blob(repository, digest).await? {
            return Ok(0);
        }
        let len = bytes.len() as u64;
        self.client.push_blob(repository, digest, bytes).await?;
        Ok(len)
    }

    /// Uploads the compressed layers as they are.
    async fn original_layers(&self) -> Result<u64> {
        let mut sent = 0;
        let repository = &self.reference.repository;
        for (number, layer) in self.source.image().layers.iter().enumerate() {
            let descriptor =
                layer.descriptor.as_ref().context("this source has no compressed layers to keep")?;
            let (digest, size) = (descriptor.digest, descriptor.size);
            if self.client.has_blob(repository, digest).await? {
                continue;
            }
            let source = Arc::clone(&self.source);
            let reader = tokio::task::spawn_blocking(move || source.layer(number)).await??;
            let stream = ReaderStream::with_capacity(sink::AsyncReader::new(reader), 1 << 20);
            self.client.push_blob_stream(repository, digest, size, stream.boxed()).await?;
            sent += size;
        }
        Ok(sent)
    }
}
