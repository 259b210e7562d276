//! Records in memory that hardly ever change under their key: what hangs on manifests, which is named by digest.
//!
//! A listing has to show that one is there, and that it is the one that was read, which is a request; but who starts an image waits for
//! the records behind it as well, one request more to an object store. Values of tags are not here: a tag that was deleted and
//! collected begins with number 1 again.

use std::num::NonZeroUsize;

use bytes::Bytes;
use lru::LruCache;
use object_store::ObjectMeta;
use object_store::path::Path;
use parking_lot::Mutex;

/// A longer one is read each time. Almost all have a few hundred bytes.
const RECORD_BYTES_MAX: usize = 8 << 10;
/// So many are held, those that were asked for last: with their keys 1 MiB as a rule, and 17 MiB at most.
const RECORDS_MAX: NonZeroUsize = NonZeroUsize::new(2048).expect("not zero");

/// The records, each with what the listing said of it.
#[derive(Debug)]
pub(crate) struct Listed(Mutex<LruCache<Path, (ObjectMeta, Bytes)>>);

impl Default for Listed {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(RECORDS_MAX)))
    }
}

impl Listed {
    /// The one that a listing shows so: of this length, time, and entity tag.
    pub(crate) fn get(&self, object: &ObjectMeta) -> Option<Bytes> {
        let mut records = self.0.lock();
        let (seen, bytes) = records.get(&object.location)?;
        (seen == object).then(|| bytes.clone())
    }

    /// Takes one that was read after this was listed, if it is short.
    pub(crate) fn keep(&self, object: ObjectMeta, bytes: &Bytes) {
        if bytes.len() <= RECORD_BYTES_MAX {
            // without what else was read with it
            self.0.lock().put(object.location.clone(), (object, Bytes::copy_from_slice(bytes)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::TryStreamExt;
    use object_store::memory::InMemory;

    use crate::objects::Objects;

    use super::*;

    async fn listed(objects: &Objects) -> Vec<ObjectMeta> {
        let mut found: Vec<_> = objects.list(&Path::from("a")).try_collect().await.expect("no error");
        found.sort_unstable_by_key(|object| object.size);
        found
    }

    #[tokio::test]
    async fn a_short_record_is_read_once_and_a_long_one_or_one_that_was_written_again_each_time() {
        let objects = Objects::new(Arc::new(InMemory::new()));
        let (short, long) = (Path::from("a/short"), Path::from("a/long"));
        objects.put_json(&short, &"a").await.expect("no error");
        objects.put_json(&long, &"a".repeat(RECORD_BYTES_MAX)).await.expect("no error");
        let seen = listed(&objects).await;
        for object in &seen {
            assert!(objects.listed_json::<String>(object).await.expect("no error").is_some());
            objects.delete(&object.location).await.expect("no error");
        }
        assert_eq!(objects.listed_json::<String>(&seen[0]).await.expect("no error").as_deref(), Some("a"));
        assert_eq!(objects.listed_json::<String>(&seen[1]).await.expect("no error"), None);
        objects.put_json(&short, &"b").await.expect("no error");
        let again = listed(&objects).await;
        assert_eq!(objects.listed_json::<String>(&again[0]).await.expect("no error").as_deref(), Some("b"));
    }

    #[test]
    fn there_are_only_so_many() {
        let listed = Listed::default();
        let object = |number: usize| ObjectMeta {
            location: Path::from(number.to_string()),
            last_modified: std::time::UNIX_EPOCH.into(),
            size: 1,
            e_tag: None,
            version: None,
        };
        for number in 0..=RECORDS_MAX.get() {
            listed.keep(object(number), &Bytes::from_static(b"1"));
        }
        assert!(listed.get(&object(0)).is_none() && listed.get(&object(1)).is_some());
        assert_eq!(listed.0.lock().len(), RECORDS_MAX.get());
    }
}
