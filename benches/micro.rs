//! The small: what one core does with chunks, frames, packs and trees. `cargo bench --bench micro`

use std::hint::black_box;
use std::io::Cursor;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lamina_chunk::{
    Chunk, ChunkId, ChunkPlace, Level, PackBuilder, PackId, PackRecord, PackedChunk, Sealed, Sealer,
    next_cut, pack_records,
};
use lamina_image::{
    ChunkSink, IngestOptions, Ino, LayerInput, Progress, SinkError, Tree, derive_tree, ingest, pack_tree,
    unpack_tree,
};

/// Bytes that compress about as libraries do: records of noise and repetition.
fn library_like(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes()[..3]);
        bytes.extend_from_slice(&[0x48, 0x8b, 0x05, state.to_le_bytes()[7] & 3, 0]);
    }
    bytes.truncate(len);
    bytes
}

/// Bytes that compress as source code does: words of a small vocabulary.
fn text_like(len: usize) -> Vec<u8> {
    const WORDS: [&[u8]; 8] =
        [b"self", b"return ", b"tensor", b"(", b"):\n    ", b"import ", b".shape", b" = "];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(WORDS[usize::from(state.to_le_bytes()[3] & 7)]);
    }
    bytes.truncate(len);
    bytes
}

fn chunks(criterion: &mut Criterion) {
    let file = library_like(64 << 20);
    let mut group = criterion.benchmark_group("chunk");
    group.sample_size(10).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Bytes(file.len() as u64));
    group.bench_function("cut 64 MiB", |bencher| {
        bencher.iter(|| {
            let mut at = 0;
            while let Some(len) = next_cut(&file[at..], at == 0, true) {
                at += len;
            }
            at
        });
    });
    for kib in [64usize, 256] {
        group.throughput(Throughput::Bytes(kib as u64 * 1024));
        group.bench_function(BenchmarkId::new("name", format!("{kib} KiB")), |bencher| {
            bencher.iter(|| ChunkId::of(black_box(&file[..kib << 10])));
        });
        for (like, bytes) in [("library", library_like(kib << 10)), ("text", text_like(kib << 10))] {
            let chunk = Chunk::cut(Bytes::from(bytes));
            let mut sealer = Sealer::new(Level::default());
            let sealed = sealer.seal(&chunk);
            group.bench_function(BenchmarkId::new(format!("seal {like}"), format!("{kib} KiB")), |bencher| {
                bencher.iter(|| sealer.seal(&chunk));
            });
            group.bench_function(BenchmarkId::new(format!("open {like}"), format!("{kib} KiB")), |bencher| {
                bencher.iter(|| sealed.open(chunk.id()).expect("sound"));
            });
        }
    }
}

/// Frames of some 32 MiB, as a writer has them.
fn frames() -> Vec<(ChunkId, Sealed)> {
    let file = library_like(48 << 20);
    let mut sealer = Sealer::new(Level::default());
    let chunks = file.chunks(256 << 10).map(|bytes| Chunk::cut(Bytes::copy_from_slice(bytes)));
    chunks.map(|chunk| (chunk.id(), sealer.seal(&chunk))).collect()
}

fn pack_of(frames: &[(ChunkId, Sealed)]) -> Bytes {
    let mut builder = PackBuilder::with_capacity(40 << 20);
    for (id, sealed) in frames {
        let len = u32::try_from(sealed.plain_len()).expect("small");
        builder.push(*id, sealed, vec![PackedChunk { id: *id, len }]);
    }
    builder.finish().0
}

fn packs(criterion: &mut Criterion) {
    let frames = frames();
    let pack = pack_of(&frames);
    let mut group = criterion.benchmark_group("pack");
    group.sample_size(10).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Bytes(pack.len() as u64));
    group.bench_function("write", |bencher| bencher.iter(|| pack_of(&frames)));
    group.throughput(Throughput::Elements(frames.len() as u64));
    group.bench_function("read the index", |bencher| bencher.iter(|| pack_records(&pack).expect("sound")));
}

fn ranges(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let directory = tempfile::tempdir().expect("a directory");
    let config = lamina_store::StoreConfig::new(directory.path().join("index"));
    let store =
        runtime.block_on(lamina_store::Store::open_directory(directory.path(), config)).expect("opened");
    let pack = pack_of(&frames());
    let digest = lamina_image::Digest::of(&pack);
    runtime.block_on(store.put_blob(pack)).expect("put");
    let mut group = criterion.benchmark_group("store");
    group.sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300));
    for kib in [64u64, 1024] {
        group.throughput(Throughput::Bytes(kib << 10));
        group.bench_function(BenchmarkId::new("range", format!("{kib} KiB")), |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    let blob = store.blob(digest).await.expect("asked").expect("there");
                    let range = 4096..4096 + (kib << 10);
                    let stream = store.read_blob(digest, blob, range).await.expect("read").into_stream();
                    futures_util::StreamExt::collect::<Vec<_>>(stream).await.len()
                })
            });
        });
    }
}

/// Takes everything and keeps nothing.
#[derive(Default)]
struct Nowhere(Mutex<u64>);

impl ChunkSink for Nowhere {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        Ok(vec![None; ids.len()])
    }

    fn put(&self, _pack: PackId, bytes: Bytes, _records: &[PackRecord]) -> Result<(), SinkError> {
        *self.0.lock().expect("not poisoned") += bytes.len() as u64;
        Ok(())
    }
}

/// The flat tree of an image of this many empty files, 10,000 in each directory, and one of 8 MiB, `large`.
fn flat_tree(files: usize) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, contents: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, contents).expect("a Vec takes every byte");
    };
    add("large", &library_like(8 << 20));
    for number in 0..files {
        add(&format!("{:04}/{number:07}", number / 10_000), b"");
    }
    let bytes: Box<dyn std::io::Read + Send> = Box::new(Cursor::new(tar.into_inner().expect("written")));
    let input = LayerInput { name: "layer".into(), bytes, diff_id: None };
    let recipes = ingest(vec![input], &Nowhere::default(), IngestOptions::default(), &Progress::default());
    derive_tree(&recipes.expect("taken in")).expect("a tree")
}

fn trees(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tree");
    group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for files in [1_000, 1_000_000] {
        let flat = Bytes::from(flat_tree(files));
        group.bench_function(BenchmarkId::new("open", files), |bencher| {
            bencher.iter(|| Tree::open(flat.clone()).expect("sound"));
        });
        let tree = Tree::open(flat.clone()).expect("sound");
        let directory = tree.lookup(Ino::ROOT, b"0000").expect("read").expect("there");
        group.bench_function(BenchmarkId::new("lookup", files), |bencher| {
            bencher.iter(|| tree.lookup(directory, black_box(b"0000777")).expect("read").expect("there"));
        });
        group.bench_function(BenchmarkId::new("absent lookup", files), |bencher| {
            bencher.iter(|| tree.lookup(directory, black_box(b"0000777x")).expect("read"));
        });
        let names = tree.entries(directory).expect("read");
        group.throughput(Throughput::Elements(u64::from(names.len())));
        group.bench_function(BenchmarkId::new(format!("readdir {}", names.len()), files), |bencher| {
            bencher.iter(|| names.iter().filter(Result::is_ok).count());
        });
        let large = tree.lookup(Ino::ROOT, b"large").expect("read").expect("there");
        let extents = || tree.extents(large, 0, u64::MAX).expect("read").count();
        group.throughput(Throughput::Elements(extents() as u64));
        group.bench_function(BenchmarkId::new(format!("all {} extents", extents()), files), |bencher| {
            bencher.iter(extents);
        });
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("extents of 4 KiB", files), |bencher| {
            bencher.iter(|| tree.extents(large, black_box(5 << 20), (5 << 20) + 4096).expect("read").count());
        });
        let blob = pack_tree(&flat);
        group.throughput(Throughput::Bytes(flat.len() as u64));
        group.bench_function(BenchmarkId::new("unpack", files), |bencher| {
            bencher.iter(|| unpack_tree(&blob).expect("sound"));
        });
        group.throughput(Throughput::Elements(1));
    }
}

criterion_group!(benches, chunks, packs, ranges, trees);
criterion_main!(benches);
