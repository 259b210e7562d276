//! Where a store keeps its objects: a directory of this machine, or a bucket.
//!
//! Whatever it is must write an object only if there is none, and say so: tags rely on it. A bucket is asked once, when
//! it is opened. Buckets may be shared by any number of processes; a directory has one that serves it, while others may
//! collect and check it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::local::LocalFileSystem;
use object_store::prefix::PrefixStore;
use object_store::{ClientConfigKey, Error, ObjectStore, PutMode};
use url::Url;

use crate::objects::Objects;
use crate::{StoreError, keys};

/// How long a connection may take, and how long an answer may stand still. There is no limit on a whole answer: layers
/// are long.
const TIMEOUTS: [(ClientConfigKey, &str); 3] = [
    (ClientConfigKey::ConnectTimeout, "10 seconds"),
    (ClientConfigKey::ReadTimeout, "30 seconds"),
    (ClientConfigKey::Timeout, "1 day"),
];
/// Amazon copies an object of up to 5 GiB in one request (API reference, CopyObject).
const S3_COPY_BYTES_MAX: u64 = 5 << 30;
/// Azure copies up to 256 MiB before it answers (Blob service REST API, Copy Blob From URL).
const AZURE_COPY_BYTES_MAX: u64 = 256 << 20;

/// Where objects are, before anything is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In `objects` below this directory.
    Directory(PathBuf),
    /// In a bucket.
    Bucket(Bucket),
}

/// A bucket, and how to get in.
#[derive(Clone, PartialEq, Eq)]
pub struct Bucket {
    url: Url,
    settings: Vec<(String, String)>,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // the settings hold secrets
        write!(f, "Bucket({})", self.url)
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Bucket(bucket) => write!(f, "{}", bucket.url),
        }
    }
}

impl Storage {
    /// Reads `s3://bucket/prefix`, `gs://…` or `az://…`; anything without `://` is a directory.
    ///
    /// `settings` are endpoint, region, credentials and the like under the names that the providers' own tools read from
    /// the environment (`AWS_ENDPOINT`, `AWS_ACCESS_KEY_ID`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_KEY`, …);
    /// others are ignored. An endpoint is spoken to in plain HTTP where it says `http://` and is on loopback, or where
    /// `plain_http` allows it.
    ///
    /// # Errors
    /// [`StoreError::Storage`] where it is another kind of URL.
    pub fn parse(
        text: &str,
        settings: impl IntoIterator<Item = (String, String)>,
        plain_http: bool,
    ) -> Result<Self, StoreError> {
        let Some((scheme, _)) = text.split_once("://") else { return Ok(Self::Directory(text.into())) };
        let wrong = |reason: String| StoreError::Storage { storage: text.to_owned(), reason };
        let Some(prefix) = settings_of(scheme) else {
            return Err(wrong(
                "write a directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix".into(),
            ));
        };
        let url: Url = text.parse().map_err(|error: url::ParseError| wrong(error.to_string()))?;
        if url.host_str().is_none_or(str::is_empty) {
            return Err(wrong("it names no bucket".to_owned()));
        }
        let named = |name: &str| name.to_ascii_uppercase().starts_with(prefix);
        let mut settings: Vec<_> = settings.into_iter().filter(|(name, _)| named(name)).collect();
        let endpoints = settings.iter().filter(|(name, _)| name.to_ascii_uppercase().contains("ENDPOINT"));
        if plain_http || endpoints.into_iter().any(|(_, endpoint)| is_loopback(endpoint)) {
            settings.push(("allow_http".to_owned(), "true".to_owned()));
        }
        Ok(Self::Bucket(Bucket { url, settings }))
    }

    /// Makes what is missing and connects.
    ///
    /// # Errors
    /// [`StoreError::Unconditional`] where the bucket ignores conditions on writes; [`StoreError::Storage`] where it
    /// cannot be used at all.
    pub(crate) async fn objects(&self) -> Result<Objects, StoreError> {
        match self {
            Self::Directory(directory) => directory_objects(directory),
            Self::Bucket(bucket) => bucket.objects().await,
        }
    }
}

/// What the names of a provider's settings begin with.
fn settings_of(scheme: &str) -> Option<&'static str> {
    match scheme {
        "s3" => Some("AWS_"),
        "gs" => Some("GOOGLE_"),
        "az" => Some("AZURE_"),
        _ => None,
    }
}

fn is_loopback(endpoint: &str) -> bool {
    let Ok(url) = endpoint.parse::<Url>() else { return false };
    match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

pub(crate) fn directory_objects(directory: &Path) -> Result<Objects, StoreError> {
    let wrong = |error| StoreError::Directory { path: directory.display().to_string(), error };
    let objects = directory.join("objects");
    std::fs::create_dir_all(&objects).map_err(wrong)?;
    let objects = LocalFileSystem::new_with_prefix(objects)?.with_fsync(true);
    Ok(Objects::new(Arc::new(objects)))
}

impl Bucket {
    async fn objects(&self) -> Result<Objects, StoreError> {
        // whoever came first has chosen; the rest of this program uses the same
        let _ = rustls::crypto::ring::default_provider().install_default();
        let wrong =
            |error: Error| StoreError::Storage { storage: self.url.to_string(), reason: error.to_string() };
        let timeouts = TIMEOUTS.map(|(key, value)| (key.as_ref().to_owned(), value.to_owned()));
        let settings = timeouts.into_iter().chain(self.settings.iter().cloned());
        let (store, prefix) = object_store::parse_url_opts(&self.url, settings).map_err(wrong)?;
        let store: Arc<dyn ObjectStore> = Arc::new(PrefixStore::new(store, prefix));
        self.try_conditions(&store).await?;
        let copy_bytes_max = match self.url.scheme() {
            "s3" => S3_COPY_BYTES_MAX,
            "az" => AZURE_COPY_BYTES_MAX,
            _ => u64::MAX,
        };
        Ok(Objects::new(store).with_copies_up_to(copy_bytes_max))
    }

    /// Writes an object twice, where it is not there. Some servers take both, and would lose tags.
    async fn try_conditions(&self, store: &Arc<dyn ObjectStore>) -> Result<(), StoreError> {
        let wrong =
            |error: Error| StoreError::Storage { storage: self.url.to_string(), reason: error.to_string() };
        let key = keys::trial(uuid::Uuid::new_v4());
        let write = || store.put_opts(&key, "{}".into(), PutMode::Create.into());
        write().await.map_err(wrong)?;
        let again = write().await;
        Objects::new(Arc::clone(store)).delete(&key).await?;
        match again {
            Err(Error::AlreadyExists { .. }) => Ok(()),
            Ok(_) | Err(Error::NotImplemented { .. }) => Err(StoreError::Unconditional(self.url.to_string())),
            Err(error) => Err(wrong(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, settings: &[(&str, &str)]) -> Result<Storage, StoreError> {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Storage::parse(text, settings, false)
    }

    #[test]
    fn what_is_no_url_is_a_directory() {
        for text in ["/var/lib/lamina", "data", "./s3:/x"] {
            assert_eq!(parse(text, &[]).unwrap(), Storage::Directory(text.into()));
        }
    }

    #[test]
    fn another_scheme_or_no_bucket_is_refused_with_what_to_write() {
        for text in ["http://host/x", "S3X://b", "s3:///prefix", "ftp://a/b"] {
            let refused = parse(text, &[]);
            assert!(matches!(refused, Err(StoreError::Storage { .. })), "{text}: {refused:?}");
        }
    }

    #[test]
    fn only_the_settings_of_its_provider_are_taken_and_none_is_printed() {
        let settings = [("AWS_SECRET_ACCESS_KEY", "hush"), ("PATH", "/bin"), ("AZURE_CLIENT_ID", "x")];
        let Storage::Bucket(bucket) = parse("s3://b/p", &settings).unwrap() else { panic!("not a bucket") };
        assert_eq!(bucket.settings, [("AWS_SECRET_ACCESS_KEY".to_owned(), "hush".to_owned())]);
        assert_eq!(format!("{bucket:?}"), "Bucket(s3://b/p)");
    }

    #[test]
    fn plain_http_is_for_loopback() {
        let allows = |endpoint: &str| {
            let Storage::Bucket(bucket) = parse("s3://b", &[("AWS_ENDPOINT_URL", endpoint)]).unwrap() else {
                panic!("not a bucket")
            };
            bucket.settings.iter().any(|(name, _)| name == "allow_http")
        };
        for near in ["http://127.0.0.1:9000", "http://localhost:1", "http://[::1]:1"] {
            assert!(allows(near), "{near}");
        }
        for far in ["http://10.0.0.1:9000", "http://s3.example.org", "127.0.0.1"] {
            assert!(!allows(far), "{far}");
        }
    }
}
