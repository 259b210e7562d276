//! `lamina push`: cut here, send what is missing, name it last.
//!
//! Order: packs, recipes, tree, config, then the manifest under its tag. Whatever was sent before an interruption is
//! known to the registry at the next try, so that only the rest goes out again. A registry of another kind gets the layers
//! as well, and an artifact on the image that holds the rest (see `foreign.rs`).

mod documents;
mod foreign;
mod sink;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::StreamExt;
use lamina_chunk::Level;
use lamina_image::{
    Descriptor, Digest, IngestError, IngestOptions, LayerInput, Platform, Progress, Recipe, derive_tree,
    ingest, pack_tree,
};
use lamina_wire::{Client, KnownLayer, Reference, Version};
use tokio_util::io::ReaderStream;

use self::documents::{Documents, Shape, write_documents};
use self::foreign::{Earlier, push_artifacts};
use self::sink::RegistrySink;
use super::{Interrupted, client_config, interrupted, mib};
use crate::args::{Common, PushArguments};
use crate::progress::Bar;
use crate::source::{Source, host_platform, open};

/// No recipe is longer: 512 MiB, a layer of some 300 GiB.
const RECIPE_BYTES_MAX: u64 = 512 << 20;
/// How often a layer is sent at most.
const LAYER_TRIES: u32 = 3;

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
    let config = client_config(&common)?;
    let name = arguments.source.clone();
    let chosen = platform.clone();
    let from = config.clone();
    let source = tokio::task::spawn_blocking(move || open(&name, &chosen, from)).await??;
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
        let Home { known, mut earlier } = self.home().await?;
        let layers_known = known.iter().flatten().count();
        if let Some(earlier) = earlier.as_mut().filter(|_| layers_known < known.len()) {
            earlier.read_packs(&self.client, &self.reference.repository).await?;
        }
        let earlier = earlier.map(Arc::new);
        let recipes = self.recipes(known, earlier.as_ref()).await?;
        bar.stage("sending the tree");
        let (for_tree, flat) = self.tree(recipes).await?;
        let packed = tokio::task::spawn_blocking(move || Bytes::from(pack_tree(&flat))).await?;
        let tree = Descriptor::of_tree(&packed);
        let mut sent = self.progress.sent.load(Relaxed);
        for recipe in &for_tree {
            sent += self.blob(Digest::of(recipe.blob()), recipe.blob().clone()).await?;
        }
        sent += self.blob(tree.digest, packed).await?;
        let shape = Shape { keep_manifest: self.keep_layers, rebuilt: earlier.is_none() };
        let image = self.source.image();
        let documents = write_documents(image, &for_tree, &tree, &self.platform, shape)?;
        sent += self.blob(Digest::of(&documents.config), documents.config.clone()).await?;
        if self.keep_layers || earlier.is_some() {
            bar.stage("sending the layers");
            sent += self.original_layers(&for_tree).await?;
        }
        if let Some(earlier) = &earlier {
            sent += self.hang_artifacts(earlier, &documents, &tree, &for_tree).await?;
        }
        bar.stage("the registry checks");
        let digest = Digest::of(&documents.manifest);
        sent += documents.manifest.len() as u64;
        let Documents { media_type, manifest, .. } = documents;
        let Reference { repository, version, .. } = &self.reference;
        self.client.push_manifest(repository, version, &media_type, manifest).await?;
        let layers = image.layers.len();
        Ok(Summary { manifest: digest, tree: tree.digest, layers, layers_known, seconds: 0.0, sent })
    }

    /// Puts the image under its digest, and what holds its tree, recipes and packs on it; only the tag is missing then.
    async fn hang_artifacts(
        &self,
        earlier: &Earlier,
        documents: &Documents,
        tree: &Descriptor,
        recipes: &[Recipe],
    ) -> Result<u64> {
        let (media_type, manifest) = (&documents.media_type, &documents.manifest);
        let repository = &self.reference.repository;
        let subject = Descriptor::of(media_type, manifest);
        let version = Version::Digest(subject.digest);
        self.client.push_manifest(repository, &version, media_type, manifest.clone()).await?;
        push_artifacts(&self.client, repository, earlier.artifacts(&subject, tree, recipes)?).await
    }

    /// Which layers need not be read, in order, and what kind of registry says so.
    async fn home(&self) -> Result<Home> {
        let layers = &self.source.image().layers;
        let names = |number: usize| {
            let layer = &layers[number];
            [layer.diff_id, layer.descriptor.as_ref().map(|descriptor| descriptor.digest)]
                .into_iter()
                .flatten()
        };
        let asked: Vec<Digest> = (0..layers.len()).flat_map(names).collect();
        let told = self.client.known_layers(&self.reference.repository, &asked).await?;
        let earlier = match told {
            Some(_) => None,
            None => Some(Earlier::find(&self.client, &self.reference).await?),
        };
        let known = told.as_deref().or(earlier.as_ref().map(Earlier::layers)).unwrap_or_default();
        let find = |number: usize| {
            let found = known.iter().find(|layer| names(number).any(|name| name == layer.digest))?;
            // a config that names another tar than the layer has is found out by reading it
            layers[number].diff_id.is_none_or(|diff_id| diff_id == found.diff_id).then_some(*found)
        };
        let found: Vec<Option<KnownLayer>> = (0..layers.len()).map(find).collect();
        let mut usable = Vec::with_capacity(found.len());
        for layer in found {
            usable.push(match layer {
                Some(layer) if self.reaches(layer.recipe).await? => Some(layer),
                _ => None,
            });
        }
        Ok(Home { known: usable, earlier })
    }

    /// Whether a blob is in the repository, or can be had from another one.
    async fn reaches(&self, digest: Digest) -> Result<bool> {
        let repository = &self.reference.repository;
        Ok(self.client.has_blob(repository, digest).await?
            || self.client.mount_blob(repository, digest).await?)
    }

    /// The recipe of each layer: fetched where the registry has it, made from the layer where not.
    async fn recipes(
        &self,
        known: Vec<Option<KnownLayer>>,
        earlier: Option<&Arc<Earlier>>,
    ) -> Result<Vec<Recipe>> {
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
            let made = self.cut(missing.clone(), earlier.cloned()).await?;
            missing.into_iter().zip(made).for_each(|(number, recipe)| recipes[number] = Some(recipe));
        }
        Ok(recipes.into_iter().map(|recipe| recipe.expect("each was fetched or made")).collect())
    }

    async fn cut(&self, numbers: Vec<usize>, earlier: Option<Arc<Earlier>>) -> Result<Vec<Recipe>> {
        let source = Arc::clone(&self.source);
        // other registries check nothing
        let options = IngestOptions { is_checked_after: earlier.is_none(), ..self.options };
        let progress = Arc::clone(&self.progress);
        let sink = RegistrySink::new(self.client.clone(), self.reference.repository.clone(), earlier);
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

    /// Uploads the layers as they are.
    async fn original_layers(&self, recipes: &[Recipe]) -> Result<u64> {
        let mut sent = 0;
        for (number, layer) in self.source.image().layers.iter().enumerate() {
            let (digest, size) = match &layer.descriptor {
                Some(descriptor) => (descriptor.digest, descriptor.size),
                None => (recipes[number].diff_id(), recipes[number].tar_bytes()),
            };
            if self.client.has_blob(&self.reference.repository, digest).await? {
                continue;
            }
            self.layer(number, digest, size).await?;
            sent += size;
        }
        Ok(sent)
    }

    /// Uploads one layer. Begins again where the connection breaks: the source can be read once more.
    async fn layer(&self, number: usize, digest: Digest, size: u64) -> Result<()> {
        let mut left = LAYER_TRIES;
        loop {
            left -= 1;
            let source = Arc::clone(&self.source);
            let reader = tokio::task::spawn_blocking(move || source.layer(number)).await??;
            let stream = ReaderStream::with_capacity(sink::AsyncReader::new(reader), 1 << 20);
            let repository = &self.reference.repository;
            match self.client.push_blob_stream(repository, digest, size, stream.boxed()).await {
                Err(error) if error.is_passing() && left > 0 => {
                    tracing::warn!(%error, "sending the layer again");
                }
                sent => return Ok(sent?),
            }
        }
    }
}

/// What kind of registry an image goes to.
struct Home {
    /// The layers that it knows.
    known: Vec<Option<KnownLayer>>,
    /// What the repository has, of a registry that is not Lamina's.
    earlier: Option<Earlier>,
}
