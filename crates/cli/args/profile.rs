//! `lamina profile …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use lamina_image::CommandKey;
use lamina_wire::Reference;

use super::{CacheArguments, NodeSettings};

#[derive(Args, Debug)]
pub(crate) struct ProfileArguments {
    #[command(subcommand)]
    pub(crate) command: ProfileCommand,
}

#[derive(Subcommand, Debug)]
pub(crate) enum ProfileCommand {
    /// Show what starts of an image read, in order, and its boot pack
    Show(ProfileShow),
    /// Write an image's profile as JSON
    Export(ProfileExport),
    /// Replace an image's profile
    Import(ProfileImport),
    /// Make the profile and the boot pack of an image here, and hang them on it in a registry that does not learn
    Push(ProfilePush),
    /// Make the registry forget an image's profiles and boot packs, or those of one command
    Drop(ProfileDrop),
    /// Run a command in an image, and record exactly what it touches
    Record(ProfileRecord),
}

#[derive(Args, Debug)]
pub(crate) struct OfCommand {
    /// What was learnt of one command, by its key, instead of what was of all starts together; `lamina profile show` lists keys
    #[arg(long, value_name = "KEY")]
    pub(crate) command: Option<CommandKey>,
}

#[derive(Args, Debug)]
pub(crate) struct ProfileShow {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// List all files, not only those that are touched first
    #[arg(long)]
    pub(crate) all: bool,
    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) of: OfCommand,
}

#[derive(Args, Debug)]
pub(crate) struct ProfileExport {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// Where to write it [default: stdout]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) of: OfCommand,
}

#[derive(Args, Debug)]
pub(crate) struct ProfileImport {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// What `lamina profile export` wrote
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) of: OfCommand,
}

#[derive(Args, Debug)]
pub(crate) struct ProfilePush {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// What `lamina profile export` wrote [default: what starts on this node have touched since the last push]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) of: OfCommand,
}

#[derive(Args, Debug)]
pub(crate) struct ProfileDrop {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// Only those of this command, by its key [default: all]
    #[arg(long, value_name = "KEY")]
    pub(crate) command: Option<CommandKey>,
}

#[derive(Args, Debug)]
pub(crate) struct ProfileRecord {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// Refuse an image whose manifest does not name its tree
    #[arg(long, env = "LAMINA_REQUIRE_BOUND", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) require_bound: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) settings: NodeSettings,
    /// The key under which the start is remembered, beside the image's general profile [default: made of the program's name and
    /// a hash of its arguments]
    #[arg(long = "command", value_name = "KEY")]
    pub(crate) key: Option<CommandKey>,
    /// What to run, as root, in the image's environment and working directory; its exit code is passed on
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}
