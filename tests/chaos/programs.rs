//! Programs that read, map and run files of mounts, and know what should be in them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::Advice;

use crate::faults::Chance;

/// Paths and contents.
pub(crate) type Truth = BTreeMap<String, Vec<u8>>;

/// Makes this test's own binary the program that maps files.
pub(crate) const MAP: &str = "--map-files-of";
/// A program that is copied into every image, and run from there.
pub(crate) const TOOL: &str = "/usr/bin/sha256sum";
/// No read, page or program waits longer: the longest fault, a node or registry that starts on a busy machine, and the pauses
/// between attempts.
pub(crate) const STALL_MAX: Duration = Duration::from_secs(45);

/// What one program does, and since when.
struct Doing {
    what: Mutex<(String, Instant)>,
    longest_ms: AtomicU64,
    count: AtomicU64,
}

impl Doing {
    fn begin(&self, what: String) {
        let mut now = self.what.lock().expect("no thread panics with it");
        let took = u64::try_from(now.1.elapsed().as_millis()).unwrap_or(u64::MAX);
        if self.count.fetch_add(1, Ordering::SeqCst) > 0 {
            self.longest_ms.fetch_max(took, Ordering::SeqCst);
        }
        *now = (what, Instant::now());
    }
}

type Threads = Vec<(Arc<Doing>, JoinHandle<Result<()>>)>;

/// All programs.
pub(crate) struct Programs {
    stop: Arc<AtomicBool>,
    threads: Mutex<Threads>,
}

/// What a program does until it is told to stop, saying what it is at.
type Work = Box<dyn FnOnce(&AtomicBool, &Doing) -> Result<()> + Send>;

impl Programs {
    /// One reader for each mount, one that runs the tool and one that maps for every other.
    pub(crate) fn start(mounts: &[(PathBuf, &Truth)], seed: u64) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Threads::new();
        let mut add = |work: Work| {
            let what = Mutex::new(("begin".to_owned(), Instant::now()));
            let (longest_ms, count) = (AtomicU64::new(0), AtomicU64::new(0));
            let doing = Arc::new(Doing { what, longest_ms, count });
            let (own, stop) = (Arc::clone(&doing), Arc::clone(&stop));
            threads.push((doing, std::thread::spawn(move || work(&stop, &own))));
        };
        for (number, (directory, truth)) in mounts.iter().enumerate() {
            let (at, files) = (directory.clone(), (*truth).clone());
            let chance = Chance::new(seed.wrapping_add(number as u64 * 7919));
            add(Box::new(move |stop, doing| read_on(stop, doing, &at, &files, chance)));
            let (at, files) = (directory.clone(), (*truth).clone());
            match number % 2 {
                0 => add(Box::new(move |stop, doing| run_on(stop, doing, &at, &files))),
                _ => add(Box::new(move |stop, doing| let_map(stop, doing, &at, &files))),
            }
        }
        Ok(Self { stop, threads: Mutex::new(threads) })
    }

    /// Whether all is well so far. *Errors*: a program found what should not be, or is stuck.
    pub(crate) fn check(&self) -> Result<()> {
        let mut threads = self.threads.lock().expect("no thread panics with it");
        for at in 0..threads.len() {
            let (doing, thread) = &threads[at];
            let (what, since) = doing.what.lock().expect("no thread panics with it").clone();
            ensure!(since.elapsed() < STALL_MAX, "stuck for {:?}: {what}", since.elapsed());
            if thread.is_finished() {
                let (_, thread) = threads.swap_remove(at);
                thread.join().expect("programs do not panic").context(what)?;
                bail!("a program has ended early");
            }
        }
        Ok(())
    }

    /// Ends all of them; what they did.
    pub(crate) fn stop(&self) -> Result<String> {
        self.stop.store(true, Ordering::SeqCst);
        let begun = Instant::now();
        let mut threads = self.threads.lock().expect("no thread panics with it");
        let (mut count, mut longest) = (0, 0);
        for (doing, thread) in threads.drain(..) {
            while !thread.is_finished() {
                let what = doing.what.lock().expect("no thread panics with it").0.clone();
                ensure!(begun.elapsed() < STALL_MAX, "does not end: {what}");
                std::thread::park_timeout(Duration::from_millis(5));
            }
            thread.join().expect("programs do not panic")?;
            count += doing.count.load(Ordering::SeqCst);
            longest = longest.max(doing.longest_ms.load(Ordering::SeqCst));
        }
        ensure!(count > 100, "hardly anything was read: {count}");
        Ok(format!("{count} files read, mapped or run, none wrong; the longest took {longest} ms"))
    }
}

/// Drops what the kernel has of a file.
fn forget_pages(file: &File) -> Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
}

fn read_on(stop: &AtomicBool, doing: &Doing, at: &Path, truth: &Truth, mut chance: Chance) -> Result<()> {
    let names: Vec<&String> = truth.keys().collect();
    while !stop.load(Ordering::SeqCst) {
        let pick = chance.below(names.len() as u64 + 20) as usize;
        let (name, random) = match names.get(pick) {
            Some(name) => (*name, false),
            None => (names[pick % 2], true),
        };
        let contents = &truth[name];
        let path = at.join(name);
        doing.begin(format!("read {}", path.display()));
        let mut file = File::open(&path).with_context(|| path.display().to_string())?;
        if random {
            for _ in 0..16 {
                let from = chance.below(contents.len() as u64);
                let mut bytes = [0; 3000];
                let len = file
                    .read_at(&mut bytes, from)
                    .with_context(|| format!("{} at {from}", path.display()))?;
                let from = from as usize;
                ensure!(len == bytes.len().min(contents.len() - from), "{}: short at {from}", path.display());
                ensure!(bytes[..len] == contents[from..from + len], "{}: wrong at {from}", path.display());
            }
        } else {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
            ensure!(bytes == *contents, "{}: wrong bytes", path.display());
        }
        forget_pages(&file)?;
    }
    Ok(())
}

/// Runs the image's own program on the image's files.
fn run_on(stop: &AtomicBool, doing: &Doing, at: &Path, truth: &Truth) -> Result<()> {
    let known = Command::new(TOOL).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let expected = hash(known, &truth["shared"])?;
    while !stop.load(Ordering::SeqCst) {
        let tool = at.join("tool");
        doing.begin(format!("run {}", tool.display()));
        let output = Command::new(&tool).arg(at.join("shared")).stdin(Stdio::null()).output();
        let output = output.with_context(|| tool.display().to_string())?;
        let said = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}: {complaint}", tool.display(), output.status);
        ensure!(said.split(' ').next() == Some(&expected), "{}: {said}", tool.display());
        forget_pages(&File::open(at.join("shared"))?)?;
    }
    Ok(())
}

/// What the tool says of some bytes.
fn hash(mut tool: Child, contents: &[u8]) -> Result<String> {
    tool.stdin.take().context("a pipe")?.write_all(contents)?;
    let output = tool.wait_with_output()?;
    Ok(String::from_utf8(output.stdout)?.split(' ').next().context("a hash")?.to_owned())
}

/// Lets a process map files: a page that cannot be had ends it by a signal.
fn let_map(stop: &AtomicBool, doing: &Doing, at: &Path, truth: &Truth) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let wanted = directory.path().join("big");
    fs::write(&wanted, &truth["big"])?;
    let mut child = Command::new(std::env::current_exe()?)
        .arg(MAP)
        .arg(at)
        .stdin(Stdio::from(File::open(wanted)?))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = child.stdout.take().context("a pipe")?;
    let mut byte = [0];
    while !stop.load(Ordering::SeqCst) {
        doing.begin(format!("map {}", at.join("big").display()));
        if said.read(&mut byte)? == 0 {
            bail!("{}: the program that maps it: {}", at.join("big").display(), child.wait()?);
        }
        ensure!(byte == *b".", "{}: wrong bytes in a map", at.join("big").display());
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// The process: maps `big`, page by page in another order each time, compares it with its standard input, and says so.
pub(crate) fn map_on(directory: &Path) -> ExitCode {
    let mut wanted = Vec::new();
    let read = std::io::stdin().read_to_end(&mut wanted);
    let Ok(file) = read.and_then(|_| File::open(directory.join("big"))) else { return ExitCode::FAILURE };
    let mut chance = Chance::new(wanted.len() as u64);
    loop {
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others could truncate it")]
        // SAFETY: nobody can write to a mount, and a page that cannot be had ends this process, which is what it is for
        let Ok(map) = (unsafe { memmap2::Mmap::map(&file) }) else { return ExitCode::FAILURE };
        let pages = wanted.len() / 4096;
        let (start, step) = (chance.below(pages as u64) as usize, 997);
        let right = (0..pages.min(300)).all(|n| {
            let at = (start + n * step) % pages * 4096;
            map[at..at + 4096] == wanted[at..at + 4096]
        });
        drop(map);
        if forget_pages(&file).is_err() || print(if right { "." } else { "!" }).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}

fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Reads everything.
pub(crate) fn compare(directory: &Path, truth: &Truth) -> Result<()> {
    for (name, contents) in truth {
        let path = directory.join(name);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        forget_pages(&file)?;
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(bytes == *contents, "{}: wrong bytes", path.display());
    }
    Ok(())
}
