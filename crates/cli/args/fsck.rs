//! `lamina fsck`.

use clap::Args;

use super::StorageArguments;

#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 nothing is damaged, 3 all that was damaged was repaired, 4 something damaged is left, 1 it could not be done."
)]
pub(crate) struct FsckArguments {
    #[command(flatten)]
    pub(crate) storage: StorageArguments,
    /// Take what is damaged out of the way, make again what can be made again, and build the index anew. No registry may be
    /// at work on the storage
    #[arg(long)]
    pub(crate) repair: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
