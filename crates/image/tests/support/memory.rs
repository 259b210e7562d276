//! A registry in memory, and the way of layers into it and back.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use lamina_chunk::{ChunkId, ChunkPlace, FrameId, PackId, PackRecord, Place, Sealed, pack_records};
use lamina_image::{
    ChunkSink, IngestError, IngestOptions, Ino, LayerInput, Progress, Recipe, RecipePiece, SinkError, Tree,
    ingest,
};

/// A registry in memory.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) packs: Mutex<HashMap<PackId, Bytes>>,
    pub(crate) index: Mutex<HashMap<ChunkId, ChunkPlace>>,
    pub(crate) refuse: bool,
}

impl ChunkSink for Memory {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        let index = self.index.lock().unwrap();
        Ok(ids.iter().map(|id| index.get(id).copied()).collect())
    }

    fn put(&self, pack: PackId, bytes: Bytes, records: &[PackRecord]) -> Result<(), SinkError> {
        if self.refuse {
            return Err("the disk is full".into());
        }
        assert_eq!(pack_records(&bytes).unwrap(), records);
        let mut index = self.index.lock().unwrap();
        records.iter().for_each(|record| record.verify(&bytes).unwrap());
        index.extend(records.iter().flat_map(|record| record.places(pack)));
        self.packs.lock().unwrap().insert(pack, bytes);
        Ok(())
    }
}

impl Memory {
    pub(crate) fn open(&self, id: FrameId, place: Place) -> Bytes {
        let packs = self.packs.lock().unwrap();
        let start = place.frame.offset as usize;
        let frame = packs[&place.pack].slice(start..start + place.frame.sealed_len as usize);
        Sealed::new(frame, place.frame.plain_len as usize).open(id).unwrap().bytes().clone()
    }

    pub(crate) fn rebuild(&self, recipe: &Recipe, from: u64) -> Vec<u8> {
        let mut tar = Vec::new();
        for piece in recipe.pieces(from) {
            match piece.unwrap() {
                RecipePiece::Literal(bytes) => tar.extend_from_slice(&bytes),
                RecipePiece::Frame { id, place, skip, len } => {
                    tar.extend_from_slice(&self.open(id, place)[skip as usize..(skip + len) as usize]);
                }
            }
        }
        tar
    }

    pub(crate) fn read_ino(&self, tree: &Tree, ino: Ino) -> Vec<u8> {
        let mut bytes = Vec::new();
        for extent in tree.extents(ino, 0, u64::MAX).unwrap() {
            let extent = extent.unwrap();
            assert_eq!(extent.offset, bytes.len() as u64);
            match extent.frame {
                None => bytes.resize(bytes.len() + usize::try_from(extent.len).unwrap(), 0),
                Some(number) => {
                    let (id, place) = tree.frame(number).unwrap();
                    let start = extent.skip as usize;
                    let end = start + usize::try_from(extent.len).unwrap();
                    bytes.extend_from_slice(&self.open(id, place)[start..end]);
                }
            }
        }
        bytes
    }
}

pub(crate) fn find(tree: &Tree, path: &str) -> Option<Ino> {
    path.split('/').try_fold(Ino::ROOT, |dir, name| tree.lookup(dir, name.as_bytes()).unwrap())
}

pub(crate) fn take_in(sink: &Memory, layers: Vec<Vec<u8>>) -> Result<Vec<Recipe>, IngestError> {
    let inputs = layers.into_iter().enumerate().map(|(number, bytes)| LayerInput {
        name: format!("layer {number}"),
        bytes: Box::new(std::io::Cursor::new(bytes)),
        diff_id: None,
    });
    ingest(inputs.collect(), sink, IngestOptions::default(), &Progress::default())
}

pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}
