//! The thread that carries packets: a queue for each direction, a wire that is busy for each byte, and a delay.
//!
//! Packets never overtake each other and are never dropped: what the wire cannot take stays in the sender's
//! device, where the kernel's own queue is the bottleneck that TCP sees.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::LinkSpec;

/// How far ahead of the clock the wire may be booked; more waits in the sender's device.
const BACKLOG: Duration = Duration::from_millis(50);
/// Packets in one direction, at most: 100 ms of the smallest ones at 70 Mbit/s, of full ones at 20 Gbit/s.
const PACKETS_MAX: usize = 16_384;
/// Packets taken from one device before the other has its turn.
const BURST: usize = 64;
/// The largest IP packet, and more than any MTU here.
const PACKET_BYTES_MAX: usize = 65_536;
/// How long to wait before a device that had no room is tried again.
const FULL_WAIT: Duration = Duration::from_micros(50);
/// The longest sleep with nothing to do.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// The link stands for physics, which does not lose its turn to a busy decompressor.
const NICE: i32 = -10;

/// Bytes that have arrived.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) to_node: AtomicU64,
    pub(super) to_server: AtomicU64,
}

/// Both directions of one link.
pub(super) struct Shaper {
    to_node: Lane,
    to_server: Lane,
    server: OwnedFd,
    node: OwnedFd,
    counters: Arc<Counters>,
}

/// One direction.
struct Lane {
    nanos_per_byte: f64,
    delay: Duration,
    /// When the wire has sent all it was given.
    busy: Instant,
    waiting: VecDeque<Packet>,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
}

struct Packet {
    arrives: Instant,
    bytes: Vec<u8>,
}

impl Shaper {
    pub(super) fn new(spec: LinkSpec, server: OwnedFd, node: OwnedFd, counters: Arc<Counters>) -> Self {
        let now = Instant::now();
        Self { to_node: Lane::new(spec, now), to_server: Lane::new(spec, now), server, node, counters }
    }

    /// Carries packets until the other end of the pipe `stop` is closed.
    pub(super) fn run(mut self, stop: BorrowedFd<'_>) {
        // Both only make the link more exact, so a refusal is no error.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let _ = rustix::process::setpriority_process(None, NICE);
        let mut scratch = vec![0; PACKET_BYTES_MAX];
        loop {
            let now = Instant::now();
            let first =
                self.to_node.turn(now, &self.server, &self.node, &mut scratch, &self.counters.to_node);
            let second =
                self.to_server.turn(now, &self.node, &self.server, &mut scratch, &self.counters.to_server);
            let now = Instant::now();
            let wait = first.min(second).saturating_duration_since(now);
            let mut events = [
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::new(&self.server, self.to_node.interest(now)),
                PollFd::new(&self.node, self.to_server.interest(now)),
            ];
            let timeout = Timespec::try_from(wait).expect("at most a second");
            match poll(&mut events, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => panic!("poll on the link: {error}"),
            }
            if !events[0].revents().is_empty() {
                return;
            }
        }
    }
}

impl Lane {
    fn new(spec: LinkSpec, now: Instant) -> Self {
        Self {
            nanos_per_byte: 8_000.0 / spec.rate_mbit,
            delay: spec.delay_one_way,
            busy: now,
            waiting: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// Delivers what is due, takes what the wire has room for, and says when to come back at the latest.
    fn turn(
        &mut self,
        now: Instant,
        from: &OwnedFd,
        to: &OwnedFd,
        scratch: &mut [u8],
        delivered: &AtomicU64,
    ) -> Instant {
        if !self.deliver(now, to, delivered) {
            return now + FULL_WAIT;
        }
        self.take(from, scratch);
        let next = self.waiting.front().map_or(now + IDLE_WAIT, |packet| packet.arrives);
        if self.has_room(now) { next } else { next.min(self.busy.checked_sub(BACKLOG).unwrap_or(now)) }
    }

    /// Whether the other device took all that was due.
    fn deliver(&mut self, now: Instant, to: &OwnedFd, delivered: &AtomicU64) -> bool {
        while self.waiting.front().is_some_and(|packet| packet.arrives <= now) {
            let packet = self.waiting.front().expect("just seen");
            match rustix::io::write(to, &packet.bytes) {
                Err(Errno::AGAIN) => return false,
                // A device that is down or a packet it refuses is a packet lost, as on any wire.
                Err(_) => {}
                Ok(len) => {
                    delivered.fetch_add(len as u64, Ordering::Relaxed);
                }
            }
            let packet = self.waiting.pop_front().expect("just seen");
            self.spare.push(packet.bytes);
        }
        true
    }

    fn take(&mut self, from: &OwnedFd, scratch: &mut [u8]) {
        for _ in 0..BURST {
            if !self.has_room(Instant::now()) {
                return;
            }
            let Ok(len) = rustix::io::read(from, &mut *scratch) else { return };
            // Looked at after the read, so that no packet is ever early, however late this thread gets its turn.
            let now = Instant::now();
            let on_wire = Duration::from_nanos((len as f64 * self.nanos_per_byte) as u64);
            self.busy = self.busy.max(now) + on_wire;
            let mut bytes = self.spare.pop().unwrap_or_default();
            bytes.clear();
            bytes.extend_from_slice(&scratch[..len]);
            self.waiting.push_back(Packet { arrives: self.busy + self.delay, bytes });
        }
    }

    fn has_room(&self, now: Instant) -> bool {
        self.busy.saturating_duration_since(now) < BACKLOG && self.waiting.len() < PACKETS_MAX
    }

    fn interest(&self, now: Instant) -> PollFlags {
        if self.has_room(now) { PollFlags::IN } else { PollFlags::empty() }
    }
}
