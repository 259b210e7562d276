//! The bytes of many pairs of files, compared by several threads.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Comparison, Difference};

/// Bytes read from either side at a time: large enough for the disk, small enough for the CPU's cache.
const PIECE_BYTES: usize = 512 << 10;
/// More threads would only compete for the same disk.
const THREADS_MAX: usize = 8;

/// Two regular files of the same length.
pub(super) struct Pair {
    pub(super) path: PathBuf,
    pub(super) left: PathBuf,
    pub(super) right: PathBuf,
    pub(super) bytes: u64,
}

/// Adds the differences in order of `pairs`, the bytes that were compared, and what could not be read.
pub(super) fn compare(pairs: &[Pair], found: &mut Comparison) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let next = AtomicUsize::new(0);
    let differences = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffers = [vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]];
                while let Some((index, pair)) = nth(pairs, next.fetch_add(1, Ordering::Relaxed)) {
                    let what = match first_difference(pair, &mut buffers) {
                        Ok(None) => continue,
                        Ok(Some(offset)) => format!("contents differ from byte {offset}"),
                        Err(error) => format!("cannot be read: {error}"),
                    };
                    let difference = Difference { path: pair.path.clone(), what };
                    differences.lock().expect("no thread panics with it").push((index, difference));
                }
            });
        }
    });
    let mut differences = differences.into_inner().expect("no thread panics with it");
    differences.sort_unstable_by_key(|(index, _)| *index);
    found.differences.extend(differences.into_iter().map(|(_, difference)| difference));
    found.bytes += pairs.iter().map(|pair| pair.bytes).sum::<u64>();
}

fn nth(pairs: &[Pair], index: usize) -> Option<(usize, &Pair)> {
    pairs.get(index).map(|pair| (index, pair))
}

/// Where the two files differ first; a file that ends before its stated length differs there.
fn first_difference(pair: &Pair, [left, right]: &mut [Vec<u8>; 2]) -> io::Result<Option<u64>> {
    let (mut left_file, mut right_file) = (File::open(&pair.left)?, File::open(&pair.right)?);
    let mut offset = 0;
    loop {
        let lens = [fill(&mut left_file, left)?, fill(&mut right_file, right)?];
        let (left, right) = (&left[..lens[0]], &right[..lens[1]]);
        if left != right {
            let same = left.iter().zip(right).take_while(|(left, right)| left == right).count();
            return Ok(Some(offset + same as u64));
        }
        offset += left.len() as u64;
        if left.len() < PIECE_BYTES {
            return Ok((offset != pair.bytes).then_some(offset));
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}
