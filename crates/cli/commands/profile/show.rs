//! `lamina profile show`.

use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, Result};
use lamina_image::{
    BOOT_ANNOTATION, BOOT_HEAD_BYTES, BootHead, BootPack, CommandKey, PAGE_BYTES, Profile, media_type,
};

use super::{Image, no_profile};
use crate::args::{Common, ProfileShow};
use crate::commands::mib;

/// Files listed without `--all`.
const FILES_SHOWN: usize = 20;

/// Prints what starts of an image touch, and what there is to make them faster.
pub(super) async fn run(arguments: ProfileShow, common: &Common) -> Result<()> {
    let reference = &arguments.reference;
    let command = arguments.of.command.as_ref();
    let image = Image::find(reference, common).await?;
    let (profile, boot, commands) =
        tokio::try_join!(image.profile(command), boot(&image, command), commands(&image))?;
    let profile = profile.map(|(profile, _)| profile);
    if arguments.json {
        let boot = boot.map(|boot| serde_json::json!({ "digest": boot.blob, "bytes": boot.bytes }));
        let report = serde_json::json!({
            "reference": reference.to_string(),
            "manifest": image.manifest,
            "command": command.map(CommandKey::as_str),
            "commands": commands.iter().map(CommandKey::as_str).collect::<Vec<_>>(),
            "profile": profile.as_ref().map(to_json),
            "boot": boot,
        });
        println!("{report}");
        return Ok(());
    }
    let profile = profile.ok_or_else(|| no_profile(reference, command))?;
    let frames = match &boot {
        Some(boot) => Some(frames(&image, boot).await?),
        None => None,
    };
    match command {
        Some(command) => println!("{reference} for {command}"),
        None => println!("{reference}"),
    }
    print_profile(&profile);
    match boot.zip(frames) {
        Some((boot, frames)) => {
            println!("boot pack  {}, {} in {frames} frames", boot.blob, mib(boot.bytes))
        }
        None => println!("boot pack  none yet"),
    }
    if command.is_none() && !commands.is_empty() {
        let commands: Vec<_> = commands.iter().map(CommandKey::as_str).collect();
        println!("commands   {}", commands.join("\n           "));
    }
    print_files(&profile, if arguments.all { usize::MAX } else { FILES_SHOWN });
    Ok(())
}

/// The commands that have a profile of their own, in the order of their keys.
async fn commands(image: &Image<'_>) -> Result<BTreeSet<CommandKey>> {
    let hung = image.hung(media_type::PROFILE).await?;
    Ok(hung.iter().filter_map(|one| CommandKey::named_by(&one.annotations)).collect())
}

async fn boot(image: &Image<'_>, command: Option<&CommandKey>) -> Result<Option<BootPack>> {
    let hung = image.hung(media_type::BOOT).await?;
    let mut own = hung.iter().filter(|one| CommandKey::is_named(command, &one.annotations));
    let Some(named) = own.find(|one| one.annotations.contains_key(BOOT_ANNOTATION)) else { return Ok(None) };
    let wrong = || format!("what the registry says of the boot pack of {}", image.reference);
    BootPack::named_by(&named.annotations).with_context(wrong).map(Some)
}

/// How many frames a boot pack has. One request.
async fn frames(image: &Image<'_>, boot: &BootPack) -> Result<u32> {
    let range = 0..BOOT_HEAD_BYTES as u64;
    let head = image.client.blob_range(image.repository(), boot.blob, range).await?;
    let head = BootHead::parse(&head, boot.tree);
    Ok(head.with_context(|| format!("the boot pack {}", boot.blob))?.frames())
}

fn print_profile(profile: &Profile) {
    let inherited = if profile.inherited { ", of an earlier image; no start of this one yet" } else { "" };
    println!("starts     {}{inherited}", profile.starts);
    println!("names      {}", profile.names.len());
    let pages = profile.pages();
    println!("files      {}, {pages} pages of them ({})", profile.files.len(), mib(pages * PAGE_BYTES));
}

fn print_files(profile: &Profile, shown: usize) {
    let files = by_first_touch(profile);
    println!("\n   pages         MiB  file, the first touched first");
    for (path, pages) in files.iter().take(shown) {
        println!("{pages:>8} {:>11}  {path}", mib(pages * PAGE_BYTES).trim_end_matches(" MiB"));
    }
    if files.len() > shown {
        println!("and {} more; --all lists them", files.len() - shown);
    }
}

fn to_json(profile: &Profile) -> serde_json::Value {
    let files = by_first_touch(profile).into_iter();
    let files: Vec<_> =
        files.map(|(path, pages)| serde_json::json!({ "path": path, "pages": pages })).collect();
    serde_json::json!({
        "starts": profile.starts,
        "inherited": profile.inherited,
        "files": files,
        "pages": profile.pages(),
        "names": profile.names.len(),
    })
}

/// The files that are read, with how many pages of each.
fn by_first_touch(profile: &Profile) -> Vec<(&str, u64)> {
    let mut places = HashMap::new();
    let mut files: Vec<(&str, u64)> = Vec::new();
    for run in &profile.runs {
        let place = *places.entry(run.0).or_insert_with(|| {
            files.push((&profile.files[run.0 as usize], 0));
            files.len() - 1
        });
        files[place].1 += run.2;
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_by_their_first_page_with_all_their_pages() {
        let json = br#"{"version":1,"starts":2,"names":[],"files":["a","unread","b"],
            "runs":[[2,0,3,2],[0,5,1,1],[2,9,4,2]]}"#;
        let profile = Profile::parse(json).unwrap();
        assert_eq!(by_first_touch(&profile), [("b", 7), ("a", 1)]);
    }
}
