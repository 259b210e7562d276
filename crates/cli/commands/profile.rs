//! `lamina profile`: what starts of an image touch, as its registry knows it.

mod push;
mod record;
mod show;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use lamina_image::{
    CommandKey, Descriptor, Digest, Document, PROFILE_ANNOTATION, PROFILE_BYTES_MAX, Process, Profile,
    media_type,
};
use lamina_node::image_process;
use lamina_wire::{Client, Reference};

use super::client_config;
use crate::args::{Common, ProfileArguments, ProfileCommand, ProfileDrop, ProfileExport, ProfileImport};
use crate::source::{Remote, host_platform};

pub(crate) async fn run(arguments: ProfileArguments, common: Common) -> Result<()> {
    match arguments.command {
        ProfileCommand::Show(it) => show::run(it, &common).await,
        ProfileCommand::Export(it) => export(it, &common).await,
        ProfileCommand::Import(it) => import(it, &common).await,
        ProfileCommand::Push(it) => push::run(it, &common).await,
        ProfileCommand::Drop(it) => drop_profile(it, &common).await,
        ProfileCommand::Record(it) => record::run(it, &common).await,
    }
}

/// An image that its registry has.
pub(super) struct Image<'a> {
    client: Client,
    reference: &'a Reference,
    pub(super) manifest: Digest,
    subject: Descriptor,
    document: Document,
}

impl<'a> Image<'a> {
    pub(super) async fn find(reference: &'a Reference, common: &Common) -> Result<Self> {
        let client = Client::new(&reference.host, client_config(common)?)?;
        let (fetched, document) = Remote::manifest(&client, reference, &host_platform()).await?;
        let subject = Descriptor::named(&fetched.media_type, fetched.digest, fetched.bytes.len() as u64);
        Ok(Self { client, reference, manifest: fetched.digest, subject, document })
    }

    fn repository(&self) -> &str {
        &self.reference.repository
    }

    /// How it wants its programs run.
    pub(super) async fn process(&self) -> Result<Process> {
        let Document::Manifest(manifest) = &self.document else {
            bail!("{} has no image for this machine", self.reference);
        };
        Ok(image_process(&self.client, self.reference, manifest).await?)
    }

    /// What of an artifact type hangs on the image.
    async fn hung(&self, kind: &str) -> Result<Vec<Descriptor>> {
        Ok(self.client.referrers(self.repository(), self.manifest, kind).await?)
    }

    /// The profile of a command, or the general one, and its JSON as it is stored, where there is one.
    async fn profile(&self, command: Option<&CommandKey>) -> Result<Option<(Profile, Bytes)>> {
        let hung = self.hung(media_type::PROFILE).await?;
        let mut own = hung.iter().filter(|one| CommandKey::is_named(command, &one.annotations));
        let Some(text) = own.find_map(|one| one.annotations.get(PROFILE_ANNOTATION)) else {
            return Ok(None);
        };
        let digest = text.parse().with_context(|| format!("the profile of {}", self.reference))?;
        let json = self.client.blob(self.repository(), digest, PROFILE_BYTES_MAX as u64).await?;
        let profile = Profile::parse(&json).with_context(|| format!("the profile of {}", self.reference))?;
        Ok(Some((profile, json)))
    }
}

fn no_profile(reference: &Reference, command: Option<&CommandKey>) -> anyhow::Error {
    match command {
        None => anyhow!(
            "{reference} has no profile yet; start it once, or `lamina profile record {reference} -- COMMAND`"
        ),
        Some(command) => anyhow!(
            "{reference} has no profile of the command {command}; `lamina profile show {reference}` lists those that have one"
        ),
    }
}

async fn export(arguments: ProfileExport, common: &Common) -> Result<()> {
    let ProfileExport { reference, file, of } = &arguments;
    let command = of.command.as_ref();
    let found = Image::find(reference, common).await?.profile(command).await?;
    let (_, json) = found.ok_or_else(|| no_profile(reference, command))?;
    match file {
        Some(path) => std::fs::write(path, &json).with_context(|| path.display().to_string()),
        None => {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&json)?;
            Ok(stdout.write_all(b"\n")?)
        }
    }
}

/// A profile from a file, and its JSON.
fn read_profile(path: &Path) -> Result<(Profile, Bytes)> {
    let named = || path.display().to_string();
    let mut json = Vec::new();
    // one more than is taken, so that the parser sees that it is too long
    File::open(path).with_context(named)?.take(PROFILE_BYTES_MAX as u64 + 1).read_to_end(&mut json)?;
    Ok((Profile::parse(&json).with_context(named)?, json.into()))
}

async fn import(arguments: ProfileImport, common: &Common) -> Result<()> {
    let (profile, json) = read_profile(&arguments.file)?;
    let image = Image::find(&arguments.reference, common).await?;
    let command = arguments.of.command.as_ref();
    match image.client.put_profile(image.repository(), image.manifest, command, json).await {
        Err(error) if error.is_unserved() => push::push(&image, &image.tree().await?, command, profile).await,
        put => Ok(put?),
    }
}

async fn drop_profile(arguments: ProfileDrop, common: &Common) -> Result<()> {
    let image = Image::find(&arguments.reference, common).await?;
    let command = arguments.command.as_ref();
    match image.client.drop_profile(image.repository(), image.manifest, command).await {
        Err(error) if error.is_unserved() => push::take_all_down(&image, command).await,
        dropped => Ok(dropped?),
    }
}
