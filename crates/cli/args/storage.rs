//! Where a registry keeps everything, for every command that opens it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use lamina_store::Storage;

use super::Common;

/// Below it, each bucket has its index of chunks.
const INDEXES: &str = "/var/lib/lamina/index";

#[derive(Args, Clone, Debug)]
pub(crate) struct StorageArguments {
    /// Where everything is: a directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.
    /// Endpoint and credentials of a bucket come from the environment, as AWS_ENDPOINT, AWS_ACCESS_KEY_ID and so on
    #[arg(long, env = "LAMINA_STORAGE", default_value = "/var/lib/lamina/registry", value_name = "DIR|URL")]
    storage: String,
    /// The directory of the chunk index, which can be deleted at any time. Each process needs its own [default: `index`
    /// below the storage directory; for a bucket, a directory below /var/lib/lamina/index]
    #[arg(long, env = "LAMINA_INDEX", value_name = "DIR")]
    index: Option<PathBuf>,
}

impl StorageArguments {
    /// What the text means, with what the environment says of buckets.
    pub(crate) fn parse(&self, common: &Common) -> Result<Storage> {
        Ok(Storage::parse(&self.storage, std::env::vars(), common.plain_http)?)
    }

    /// Where the index of chunks is.
    pub(crate) fn index(&self, storage: &Storage) -> PathBuf {
        match (&self.index, storage) {
            (Some(index), _) => index.clone(),
            (None, Storage::Directory(directory)) => directory.join("index"),
            (None, Storage::Bucket(_)) => {
                let name = self.storage.replace("://", "-").replace('/', "-");
                PathBuf::from(INDEXES).join(name.trim_end_matches('-'))
            }
        }
    }
}
