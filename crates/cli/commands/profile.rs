//! `lamina profile`: what starts of an image touch, as its registry knows it.

mod push;
mod record;
mod show;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use lamina_image::{
    Descriptor, Digest, Document, PROFILE_ANNOTATION, PROFILE_BYTES_MAX, Profile, media_type,
};
use lamina_wire::{Client, Reference};

use super::client_config;
use crate::args::{Common, ProfileArguments, ProfileCommand};
use crate::source::{Remote, host_platform};

pub(crate) async fn run(arguments: ProfileArguments, common: Common) -> Result<()> {
    match arguments.command {
        ProfileCommand::Show(it) => show::run(it, &common).await,
        ProfileCommand::Export(it) => export(&it.reference, it.file.as_deref(), &common).await,
        ProfileCommand::Import(it) => import(&it.reference, &it.file, &common).await,
        ProfileCommand::Push(it) => push::run(it, &common).await,
        ProfileCommand::Drop(it) => drop_profile(&it.reference, &common).await,
        ProfileCommand::Record(it) => record::run(it, &common).await,
    }
}

/// An image that its registry has.
struct Image<'a> {
    client: Client,
    reference: &'a Reference,
    manifest: Digest,
    subject: Descriptor,
    document: Document,
}

impl<'a> Image<'a> {
    async fn find(reference: &'a Reference, common: &Common) -> Result<Self> {
        let client = Client::new(&reference.host, client_config(common)?)?;
        let (fetched, document) = Remote::manifest(&client, reference, &host_platform()).await?;
        let subject = Descriptor::named(&fetched.media_type, fetched.digest, fetched.bytes.len() as u64);
        Ok(Self { client, reference, manifest: fetched.digest, subject, document })
    }

    fn repository(&self) -> &str {
        &self.reference.repository
    }

    /// The profile and its JSON as it is stored, where there is one.
    async fn profile(&self) -> Result<Option<(Profile, Bytes)>> {
        let referrers = self.client.referrers(self.repository(), self.manifest, media_type::PROFILE).await?;
        let Some(text) = referrers.iter().find_map(|one| one.annotations.get(PROFILE_ANNOTATION)) else {
            return Ok(None);
        };
        let digest = text.parse().with_context(|| format!("the profile of {}", self.reference))?;
        let json = self.client.blob(self.repository(), digest, PROFILE_BYTES_MAX as u64).await?;
        let profile = Profile::parse(&json).with_context(|| format!("the profile of {}", self.reference))?;
        Ok(Some((profile, json)))
    }
}

fn no_profile(reference: &Reference) -> anyhow::Error {
    anyhow!(
        "{reference} has no profile yet; start it once, or `lamina profile record {reference} -- COMMAND`"
    )
}

async fn export(reference: &Reference, file: Option<&Path>, common: &Common) -> Result<()> {
    let found = Image::find(reference, common).await?.profile().await?;
    let (_, json) = found.ok_or_else(|| no_profile(reference))?;
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

async fn import(reference: &Reference, path: &Path, common: &Common) -> Result<()> {
    let (profile, json) = read_profile(path)?;
    let image = Image::find(reference, common).await?;
    match image.client.put_profile(image.repository(), image.manifest, json).await {
        Err(error) if error.is_unserved() => push::push(&image, profile).await,
        put => Ok(put?),
    }
}

async fn drop_profile(reference: &Reference, common: &Common) -> Result<()> {
    let image = Image::find(reference, common).await?;
    match image.client.drop_profile(image.repository(), image.manifest).await {
        Err(error) if error.is_unserved() => push::take_all_down(&image).await,
        dropped => Ok(dropped?),
    }
}
