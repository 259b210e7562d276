//! Records in memory that never change under their key: values of tags, which are numbered, and what hangs on manifests, which is named
//! by digest.
//!
//! A listing has to show that one is there, which is a request; but who starts an image waits for the records behind it as well, one
//! request more to an object store for each kind of them.

use std::num::NonZeroUsize;

use bytes::Bytes;
use lru::LruCache;
use object_store::path::Path;
use parking_lot::Mutex;

/// A longer one is read each time. Almost all have a few hundred bytes.
const RECORD_BYTES_MAX: usize = 8 << 10;
/// So many are held, those that were asked for last: with their keys 1 MiB as a rule, and 17 MiB at most.
const RECORDS_MAX: NonZeroUsize = NonZeroUsize::new(2048).expect("not zero");

/// The records.
#[derive(Debug)]
pub(crate) struct Listed(Mutex<LruCache<Path, Bytes>>);

impl Default for Listed {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(RECORDS_MAX)))
    }
}

impl Listed {
    pub(crate) fn get(&self, key: &Path) -> Option<Bytes> {
        self.0.lock().get(key).cloned()
    }

    /// Takes one, if it is short.
    pub(crate) fn keep(&self, key: &Path, bytes: Bytes) {
        if bytes.len() <= RECORD_BYTES_MAX {
            // without what else was read with it
            self.0.lock().put(key.clone(), Bytes::copy_from_slice(&bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use crate::objects::Objects;

    use super::*;

    #[tokio::test]
    async fn a_short_record_is_read_once_and_one_that_is_not_there_or_long_each_time() {
        let objects = Objects::new(Arc::new(InMemory::new()));
        let (short, long) = (Path::from("short"), Path::from("long"));
        assert_eq!(objects.listed_json::<String>(&short).await.expect("no error"), None);
        let text = "a".repeat(RECORD_BYTES_MAX);
        objects.put_json(&short, &"a").await.expect("no error");
        objects.put_json(&long, &text).await.expect("no error");
        for key in [&short, &long] {
            assert!(objects.listed_json::<String>(key).await.expect("no error").is_some());
            objects.delete(key).await.expect("no error");
        }
        assert_eq!(objects.listed_json::<String>(&short).await.expect("no error").as_deref(), Some("a"));
        assert_eq!(objects.listed_json::<String>(&long).await.expect("no error"), None);
        assert_eq!(objects.json::<String>(&short).await.expect("no error"), None, "only where it was listed");
    }

    #[test]
    fn there_are_only_so_many() {
        let listed = Listed::default();
        let key = |number: usize| Path::from(number.to_string());
        for number in 0..=RECORDS_MAX.get() {
            listed.keep(&key(number), Bytes::from_static(b"1"));
        }
        assert!(listed.get(&key(0)).is_none() && listed.get(&key(1)).is_some());
        assert_eq!(listed.0.lock().len(), RECORDS_MAX.get());
    }
}
