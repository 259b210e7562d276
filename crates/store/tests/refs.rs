//! Tags against a model, and against writers that were asleep.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::TryStreamExt;
use lamina_image::Digest;
use lamina_store::{Reference, Repo, Store, StoreConfig, StoreError, Tag};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path;
use proptest::prelude::*;

async fn store(objects: &Arc<InMemory>, directory: &tempfile::TempDir) -> Store {
    let objects = Arc::clone(objects) as Arc<dyn ObjectStore>;
    Store::open(objects, StoreConfig::new(directory.path().join("index"))).await.unwrap()
}

fn manifest(number: u8) -> Digest {
    Digest::from_bytes([number; 32])
}

#[derive(Clone, Debug)]
enum Step {
    Set {
        tag: u8,
        manifest: u8,
    },
    Delete {
        tag: u8,
    },
    /// Swaps with a value that was read `ago` reads before.
    Swap {
        tag: u8,
        ago: usize,
        manifest: u8,
    },
    List,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..3, 0u8..4).prop_map(|(tag, manifest)| Step::Set { tag, manifest }),
        (0u8..3).prop_map(|tag| Step::Delete { tag }),
        (0u8..3, 0usize..30, 0u8..4).prop_map(|(tag, ago, manifest)| Step::Swap { tag, ago, manifest }),
        Just(Step::List),
    ]
}

/// What a tag is, and how often it was written.
#[derive(Clone, Copy, Default)]
struct Model {
    manifest: Option<Digest>,
    writes: u64,
}

async fn check(steps: Vec<Step>) {
    let (directory, objects) = (tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
    let store = store(&objects, &directory).await;
    let repo: Repo = "a/b".parse().unwrap();
    let tags: Vec<Tag> = ["x", "y", "z"].iter().map(|tag| tag.parse().unwrap()).collect();
    let mut model = BTreeMap::<u8, Model>::new();
    let mut reads = BTreeMap::<u8, Vec<Reference>>::new();
    for step in steps {
        match step {
            Step::Set { tag, manifest: number } => {
                let value = Some(manifest(number));
                let changed = store.set_tag(&repo, &tags[usize::from(tag)], value).await.unwrap();
                apply(model.entry(tag).or_default(), value, changed);
            }
            Step::Delete { tag } => {
                let changed = store.set_tag(&repo, &tags[usize::from(tag)], None).await.unwrap();
                apply(model.entry(tag).or_default(), None, changed);
            }
            Step::Swap { tag, ago, manifest: number } => {
                let seen = reads.entry(tag).or_default();
                let now = store.reference(&repo, &tags[usize::from(tag)]).await.unwrap();
                seen.push(now);
                let seen = seen[seen.len().saturating_sub(ago + 1)];
                let swapped = store.swap(&repo, &tags[usize::from(tag)], seen, Some(manifest(number))).await;
                let model = model.entry(tag).or_default();
                match swapped {
                    Ok(()) => {
                        assert_eq!(seen.number, model.writes, "an old value was good enough");
                        *model = Model { manifest: Some(manifest(number)), writes: model.writes + 1 };
                    }
                    Err(StoreError::Contended(_)) => assert_ne!(seen.number, model.writes),
                    Err(error) => panic!("{error}"),
                }
            }
            Step::List => {
                let listed = store.tags(&repo).await.unwrap();
                let expected: Vec<(Tag, Digest)> = model
                    .iter()
                    .filter_map(|(tag, model)| Some((tags[usize::from(*tag)].clone(), model.manifest?)))
                    .collect();
                assert_eq!(listed, expected);
            }
        }
    }
    let kept: Vec<_> = objects.list(Some(&Path::from("refs"))).try_collect().await.unwrap();
    assert!(kept.len() <= 3 * 17, "{} values are still there", kept.len());
}

fn apply(model: &mut Model, value: Option<Digest>, changed: bool) {
    assert_eq!(changed, model.manifest != value);
    *model = Model { manifest: value, writes: model.writes + u64::from(changed) };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn tags_behave_like_a_map_with_compare_and_swap(steps in prop::collection::vec(step(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check(steps));
    }
}

#[tokio::test]
async fn a_writer_that_slept_over_many_changes_never_believes_that_it_won() {
    let (directory, objects) = (tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
    let store = store(&objects, &directory).await;
    let (repo, tag): (Repo, Tag) = ("a".parse().unwrap(), "v1".parse().unwrap());
    store.set_tag(&repo, &tag, Some(manifest(1))).await.unwrap();
    let seen = store.reference(&repo, &tag).await.unwrap();
    for number in 2..60 {
        store.set_tag(&repo, &tag, Some(manifest(number))).await.unwrap();
    }
    let late = store.swap(&repo, &tag, seen, Some(manifest(99))).await;
    assert!(matches!(late, Err(StoreError::Contended(_))));
    assert_eq!(store.reference(&repo, &tag).await.unwrap().manifest, Some(manifest(59)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_writers_with_one_value_in_mind_one_wins() {
    let (directory, objects) = (tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
    let store = store(&objects, &directory).await;
    let (repo, tag): (Repo, Tag) = ("a".parse().unwrap(), "v1".parse().unwrap());
    let seen = store.reference(&repo, &tag).await.unwrap();
    let writers: Vec<_> = (0..20)
        .map(|number| {
            let (store, repo, tag) = (store.clone(), repo.clone(), tag.clone());
            tokio::spawn(async move { store.swap(&repo, &tag, seen, Some(manifest(number))).await.is_ok() })
        })
        .collect();
    let mut winners = Vec::new();
    for (number, writer) in (0..).zip(writers) {
        if writer.await.unwrap() {
            winners.push(manifest(number));
        }
    }
    let now = store.reference(&repo, &tag).await.unwrap();
    assert_eq!((winners, now.number), (vec![now.manifest.unwrap()], 1));
}

#[tokio::test]
async fn what_tags_named_comes_newest_first_and_deletions_are_left_out() {
    let (directory, objects) = (tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
    let store = store(&objects, &directory).await;
    let (repo, x, y): (Repo, Tag, Tag) = ("a".parse().unwrap(), "x".parse().unwrap(), "y".parse().unwrap());
    for (tag, value) in [(&x, Some(1)), (&y, Some(2)), (&x, None), (&x, Some(3))] {
        store.set_tag(&repo, tag, value.map(manifest)).await.unwrap();
    }
    let all = [(x.clone(), manifest(3)), (y, manifest(2)), (x, manifest(1))];
    assert_eq!(store.tag_values(&repo, 10).await.unwrap(), all);
    // the deletion counts, and names nothing
    assert_eq!(store.tag_values(&repo, 2).await.unwrap(), all[..1]);
    assert_eq!(store.tag_values(&"a/b".parse().unwrap(), 10).await.unwrap(), []);
}
