//! A boot pack on its way: fetched, and opened as it comes.
//!
//! Nothing here needs a mount, or the tree: what comes first is opened while the mount is still being made, and is there when
//! the program begins.

use std::io;
use std::num::NonZero;
use std::pin::pin;
use std::sync::{Arc, mpsc as jobs};
use std::thread::available_parallelism;

use bytes::Bytes;
use futures_util::stream::{FuturesOrdered, StreamExt};
use lamina_cache::Source;
use lamina_image::{BOOT_BYTES_MAX, BOOT_HEAD_BYTES, BootError, BootFrame, BootHead, BootPack, BootRecords};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::trace;

use super::buffers::{Buffers, Spare};
use super::crew::{self, Crew, Role, step_back};
use super::fetch::Fetching;
use super::opened::Opened;
use super::{BootFailure, OPENED};

/// Frames that are opened side by side: each takes 2 ms, and comes in three over 1 Gbit/s. More than there are processors would all
/// be late.
const OPENING_MAX: usize = 4;

/// So much is opened as soon as it comes, in bytes: a ms of work, and what a program reads first. Three frames, where the first has 64 KiB
/// and each after it twice as much.
const AT_ONCE_BYTES: u64 = 448 << 10;

/// Memory for boot packs, 8 MiB while nothing starts: what one boot used is there for the next.
#[derive(Debug)]
pub struct BootRooms(Arc<Spare>);

/// What a boot pack needs that is not known yet. Dropping it gives that back.
#[derive(Debug)]
pub struct BootRoom(Arc<Buffers>);

/// A boot pack that is on its way. Dropping it ends that.
#[derive(Debug)]
pub struct BootStream {
    pack: BootPack,
    records: Option<oneshot::Receiver<BootRecords>>,
    frames: Option<mpsc::Receiver<OpenedFrame>>,
    opened: Arc<Opened>,
    crew: Arc<Crew>,
    task: JoinHandle<Result<(), BootFailure>>,
}

/// A frame's number, and its plaintext.
pub(super) type OpenedFrame = (u32, Bytes);

impl BootRooms {
    /// Makes the memory for one, in the background.
    pub fn prepare() -> Self {
        let spare = Arc::<Spare>::default();
        let prepared = Arc::clone(&spare);
        behind_others(move || prepared.prepare());
        Self(spare)
    }

    /// Room for one: what is there, and where that is less than a small start takes, more, which is made in the background.
    pub fn take(&self) -> BootRoom {
        let buffers = self.0.take();
        if buffers.missing() > 0 {
            let prepared = Arc::clone(&buffers);
            behind_others(move || prepared.prepare());
        }
        BootRoom(buffers)
    }
}

/// Does `work` on a thread of its own, if there can be one; what a mount itself has to do comes first.
fn behind_others(work: impl FnOnce() + Send + 'static) {
    let _ = crew::spawn(move || {
        step_back();
        work();
    });
}

impl BootStream {
    /// Begins to fetch `pack` from `source`, with one request, and to open it; all but its beginning only as soon as `free` is over: what
    /// the mount itself waits for needs the processors first. Must be called inside a tokio runtime.
    pub fn start(
        pack: BootPack,
        source: Arc<dyn Source>,
        BootRoom(buffers): BootRoom,
        free: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let ((head, records), (queue, frames)) = (oneshot::channel(), mpsc::channel(OPENED));
        let opened = Arc::<Opened>::default();
        let fetching = Fetching::start(pack, source);
        let crew = Arc::<Crew>::default();
        let opening = Opening { pack, fetching, opened: Arc::clone(&opened), crew: Arc::clone(&crew) };
        let task = tokio::spawn(opening.run(buffers, free, head, queue));
        Self { pack, records: Some(records), frames: Some(frames), opened, crew, task }
    }

    /// What is on its way.
    pub fn pack(&self) -> BootPack {
        self.pack
    }

    /// What was opened of it so far.
    pub(super) fn opened(&self) -> &Arc<Opened> {
        &self.opened
    }

    /// The threads that do its work.
    pub(super) fn crew(&self) -> &Arc<Crew> {
        &self.crew
    }

    /// Its table, once.
    pub(super) async fn records(&mut self) -> Result<BootRecords, BootFailure> {
        match self.records.take().expect("asked for once").await {
            Ok(records) => Ok(records),
            Err(_) => Err(self.end().await.err().unwrap_or(BootFailure::Refused)),
        }
    }

    /// Its frames as they are opened, in order, to be taken once. They end with the last one, or with what goes wrong.
    pub(super) fn frames(&mut self) -> mpsc::Receiver<OpenedFrame> {
        self.frames.take().expect("asked for once")
    }

    /// How it ended, once.
    pub(super) async fn end(&mut self) -> Result<(), BootFailure> {
        (&mut self.task).await.unwrap_or(Err(BootFailure::Refused))
    }
}

impl Drop for BootStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Opening {
    pack: BootPack,
    fetching: Fetching,
    opened: Arc<Opened>,
    crew: Arc<Crew>,
}

/// A frame to be opened, and for whom.
struct Job {
    frame: BootFrame,
    sealed: Bytes,
    opened: oneshot::Sender<Result<Bytes, BootError>>,
}

impl Opening {
    /// Takes all of it, and hands it on.
    async fn run(
        mut self,
        buffers: Arc<Buffers>,
        free: impl Future<Output = ()>,
        head: oneshot::Sender<BootRecords>,
        queue: mpsc::Sender<OpenedFrame>,
    ) -> Result<(), BootFailure> {
        let records = self.records().await?;
        let frames = records.frames().to_vec();
        // who does not want it any more drops this too
        let _ = head.send(records);
        let side_by_side = available_parallelism().map_or(1, NonZero::get).min(OPENING_MAX);
        let openers = self.openers(side_by_side, &buffers).map_err(|_| BootFailure::Refused)?;
        self.open(&frames, openers, free, queue).await
    }

    async fn take(&mut self, len: usize) -> Result<Bytes, BootFailure> {
        let taken = self.fetching.take(len).await;
        self.opened.taken(self.fetching.taken());
        taken
    }

    /// What is in the pack.
    async fn records(&mut self) -> Result<BootRecords, BootFailure> {
        let BootPack { bytes, tree, .. } = self.pack;
        if !(BOOT_HEAD_BYTES as u64..=BOOT_BYTES_MAX).contains(&bytes) {
            return Err(BootFailure::Length(bytes));
        }
        let head = BootHead::parse(&self.take(BOOT_HEAD_BYTES).await?, tree)?;
        if (BOOT_HEAD_BYTES + head.table_len()) as u64 > bytes {
            return Err(BootFailure::Length(bytes));
        }
        let records = head.records(&self.take(head.table_len()).await?)?;
        if records.blob_bytes() == bytes { Ok(records) } else { Err(BootFailure::Length(bytes)) }
    }

    /// At most `count` threads that open frames, until nobody has any more for them, and how many they are. *Errors*: there are none.
    fn openers(&self, count: usize, buffers: &Arc<Buffers>) -> io::Result<(jobs::SyncSender<Job>, usize)> {
        let (sender, jobs) = jobs::sync_channel::<Job>(count);
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..count {
            let (jobs, buffers) = (Arc::clone(&jobs), Arc::clone(buffers));
            let made = self.crew.spawn(Role::Opens, move || {
                let next = || jobs.lock().recv().ok();
                while let Some(Job { frame, sealed, opened }) = next() {
                    let mut plain = buffers.take(frame.plain_len as usize);
                    let done = frame.open_into(&sealed, &mut plain).map(|()| buffers.share(plain));
                    // who does not wait any more has ended the boot
                    let _ = opened.send(done);
                }
            });
            match made {
                Ok(_) => {}
                Err(error) if number == 0 => return Err(error),
                Err(_) => return Ok((sender, number)),
            }
        }
        Ok((sender, count))
    }

    /// Has frames opened as they come, so many side by side, and hands them on in order.
    async fn open(
        mut self,
        frames: &[BootFrame],
        (jobs, side_by_side): (jobs::SyncSender<Job>, usize),
        free: impl Future<Output = ()>,
        queue: mpsc::Sender<OpenedFrame>,
    ) -> Result<(), BootFailure> {
        let mut frames = frames.iter();
        let mut opening = FuturesOrdered::<oneshot::Receiver<Result<Bytes, BootError>>>::new();
        let (mut number, mut plain_bytes) = (0, 0);
        let (mut free, mut is_free) = (pin!(free), false);
        loop {
            let next = frames.as_slice().first();
            let at_once = |frame: &BootFrame| plain_bytes + u64::from(frame.plain_len) <= AT_ONCE_BYTES;
            let len = next.filter(|frame| is_free || at_once(frame)).map(|frame| frame.sealed_len as usize);
            tokio::select! {
                biased;
                Some(plain) = opening.next() => {
                    let plain = plain.map_err(|_| BootFailure::Refused)??;
                    trace!(frame = number, "opened");
                    // for the reads that wait, before anything that may block
                    self.opened.add(number, plain.clone());
                    if queue.send((number, plain)).await.is_err() {
                        return Err(BootFailure::Refused);
                    }
                    number += 1;
                }
                () = &mut free, if !is_free => is_free = true,
                sealed = self.take(len.unwrap_or(0)), if len.is_some() && opening.len() < side_by_side => {
                    let (sealed, frame) = (sealed?, frames.next().expect("just seen").clone());
                    plain_bytes += u64::from(frame.plain_len);
                    trace!(bytes = self.fetching.taken(), "came");
                    let (opened, done) = oneshot::channel();
                    jobs.send(Job { frame, sealed, opened }).map_err(|_| BootFailure::Refused)?;
                    opening.push_back(done);
                }
                else => return Ok(()),
            }
        }
    }
}
