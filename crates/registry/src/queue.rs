//! What waits to be learnt: at most one job an image and command, and a bound on all of them.
//!
//! A plain value that knows no clock. What people ask for goes before what nodes tell, and that before what another
//! image knows; of the same rank, the later wish of people replaces the earlier one, and of traces the first stays.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use lamina_image::{COMMANDS_MAX, CommandKey, Digest};
use lamina_store::Repo;
use tokio::time::Instant;

/// Jobs that wait: a minute or two of work.
const JOBS_MAX: usize = 64;
/// Bytes of all messages that wait: eight of the longest traces, hundreds of ordinary ones.
const BYTES_MAX: usize = 128 << 20;
/// Images of which the time of the last trace is known.
const TIMES_MAX: usize = 4096;

/// What there is to do for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Take over the profile of its predecessor, where it has none.
    Inherit,
    /// Merge this trace, a protobuf message.
    Trace(Bytes),
    /// Take this profile, in JSON.
    Replace(Bytes),
    /// Remove profile and boot pack of the command; of no command, all there are.
    Forget,
}

impl Work {
    fn rank(&self) -> u8 {
        match self {
            Self::Inherit => 0,
            Self::Trace(_) => 1,
            Self::Replace(_) | Self::Forget => 2,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Inherit | Self::Forget => 0,
            Self::Trace(bytes) | Self::Replace(bytes) => bytes.len(),
        }
    }
}

/// One image of one repository, and one command of it, or none in particular.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Of {
    pub(crate) repo: Repo,
    pub(crate) image: Digest,
    pub(crate) command: Option<CommandKey>,
}

impl Of {
    fn is_same_image(&self, other: &Self) -> bool {
        self.repo == other.repo && self.image == other.image
    }
}

/// What there is to do, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) of: Of,
    pub(crate) work: Work,
}

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// It waits for its turn.
    Queued,
    /// It is not needed: something at least as good waits, or a trace was just taken.
    Dropped,
    /// There is no room.
    Full,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    jobs: VecDeque<Job>,
    bytes: usize,
    traced: BTreeMap<Of, Instant>,
}

impl Queue {
    /// Whether a trace of this image and command would be dropped: one was taken less than `every` ago, or one of each of so
    /// many other commands as an image may have. Keys are whatever nodes say, and cost them nothing.
    pub(crate) fn was_traced(&self, of: &Of, now: Instant, every: Duration) -> bool {
        let recent = |last: &Instant| now.saturating_duration_since(*last) < every;
        if of.command.is_none() || self.traced.get(of).is_some_and(recent) {
            return self.traced.get(of).is_some_and(recent);
        }
        let image = Of { command: None, ..of.clone() };
        let commands = self.traced.range(image..).take_while(|(other, _)| other.is_same_image(of));
        commands.filter(|(other, last)| other.command.is_some() && recent(last)).count() >= COMMANDS_MAX
    }

    /// Adds a job. Of traces of one image and command, one is taken for each `every`.
    pub(crate) fn push(&mut self, job: Job, now: Instant, every: Duration) -> Pushed {
        let is_trace = matches!(job.work, Work::Trace(_));
        if is_trace && self.was_traced(&job.of, now, every) {
            return Pushed::Dropped;
        }
        if job.work == Work::Forget && job.of.command.is_none() {
            self.give_up(&job.of);
        }
        let waiting = self.jobs.iter().position(|old| old.of == job.of);
        let old_len = match waiting.map(|at| &self.jobs[at].work) {
            Some(old) if old.rank() > job.work.rank() => return Pushed::Dropped,
            Some(old) if old.rank() == job.work.rank() && old.rank() < 2 => return Pushed::Dropped,
            Some(old) => old.len(),
            None if self.jobs.len() == JOBS_MAX => return Pushed::Full,
            None => 0,
        };
        let bytes = self.bytes - old_len + job.work.len();
        if bytes > BYTES_MAX || (is_trace && !self.note(&job, now, every)) {
            return Pushed::Full;
        }
        if job.work.rank() == 2 {
            // what nodes tell after people have spoken is new
            let all = job.of.command.is_none();
            self.traced.retain(|of, _| *of != job.of && !(all && of.is_same_image(&job.of)));
        }
        self.bytes = bytes;
        match waiting {
            Some(at) => self.jobs[at] = job,
            None => self.jobs.push_back(job),
        }
        Pushed::Queued
    }

    /// Drops all that waits for an image.
    fn give_up(&mut self, of: &Of) {
        self.jobs.retain(|job| !job.of.is_same_image(of));
        self.bytes = self.jobs.iter().map(|job| job.work.len()).sum();
    }

    /// The job that waits longest.
    pub(crate) fn pop(&mut self) -> Option<Job> {
        let job = self.jobs.pop_front()?;
        self.bytes -= job.work.len();
        Some(job)
    }

    /// Notes that a trace was taken. False where too many others were within `every`.
    fn note(&mut self, job: &Job, now: Instant, every: Duration) -> bool {
        if self.traced.len() >= TIMES_MAX {
            self.traced.retain(|_, last| now.saturating_duration_since(*last) < every);
        }
        let room = self.traced.len() < TIMES_MAX;
        if room {
            self.traced.insert(job.of.clone(), now);
        }
        room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(3);

    fn job(image: u16, work: Work) -> Job {
        let mut digest = [0; 32];
        digest[..2].copy_from_slice(&image.to_le_bytes());
        Job {
            of: Of { repo: "app".parse().unwrap(), image: Digest::from_bytes(digest), command: None },
            work,
        }
    }

    fn job_of(command: &str, work: Work) -> Job {
        let job = job(1, work);
        Job { of: Of { command: Some(command.parse().unwrap()), ..job.of }, ..job }
    }

    fn trace(len: usize) -> Work {
        Work::Trace(vec![0; len].into())
    }

    #[test]
    fn of_many_traces_one_is_taken_for_each_interval() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        assert_eq!(queue.push(job(1, trace(1)), now, EVERY), Pushed::Queued);
        for _ in 0..1000 {
            queue.pop();
            assert_eq!(queue.push(job(1, trace(1)), now + EVERY / 2, EVERY), Pushed::Dropped);
        }
        assert_eq!(queue.push(job(2, trace(1)), now + EVERY / 2, EVERY), Pushed::Queued);
        assert_eq!(queue.push(job(1, trace(1)), now + EVERY, EVERY), Pushed::Queued);
    }

    #[test]
    fn an_image_waits_once_and_people_go_before_nodes() {
        let now = Instant::now();
        let replace = |byte: u8| Work::Replace(vec![byte].into());
        for (first, then, pushed, waits) in [
            (Work::Inherit, trace(1), Pushed::Queued, trace(1)),
            (trace(1), trace(2), Pushed::Dropped, trace(1)),
            (trace(1), Work::Inherit, Pushed::Dropped, trace(1)),
            (trace(1), replace(1), Pushed::Queued, replace(1)),
            (replace(1), replace(2), Pushed::Queued, replace(2)),
            (replace(1), trace(1), Pushed::Dropped, replace(1)),
            (replace(1), Work::Forget, Pushed::Queued, Work::Forget),
            (Work::Forget, replace(1), Pushed::Queued, replace(1)),
        ] {
            let mut queue = Queue::default();
            assert_eq!(queue.push(job(1, first.clone()), now, EVERY), Pushed::Queued);
            let later = now + EVERY * 2;
            assert_eq!(queue.push(job(1, then.clone()), later, EVERY), pushed, "{first:?} {then:?}");
            assert_eq!(queue.pop().unwrap().work, waits, "{first:?} {then:?}");
            assert_eq!((queue.pop(), queue.bytes), (None, 0));
        }
    }

    #[test]
    fn each_command_of_an_image_is_heard_by_itself_but_not_any_number_of_them() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for number in 0..COMMANDS_MAX {
            let job = job_of(&format!("c{number}"), trace(1));
            assert_eq!(queue.push(job.clone(), now, EVERY), Pushed::Queued);
            assert_eq!(queue.push(job, now, EVERY), Pushed::Dropped);
        }
        let more = job_of("more", trace(1));
        assert_eq!(queue.push(more.clone(), now, EVERY), Pushed::Dropped);
        assert_eq!(queue.push(job(1, trace(1)), now, EVERY), Pushed::Queued, "no command in particular");
        assert_eq!(queue.push(job(2, trace(1)), now, EVERY), Pushed::Queued, "another image");
        assert_eq!(queue.push(more, now + EVERY, EVERY), Pushed::Queued);
    }

    #[test]
    fn who_forgets_all_gives_up_what_waits_of_every_command() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.push(job_of("a", Work::Replace(vec![0; 9].into())), now, EVERY);
        queue.push(job(2, trace(5)), now, EVERY);
        queue.push(job_of("b", trace(7)), now, EVERY);
        assert_eq!(queue.push(job_of("a", Work::Forget), now, EVERY), Pushed::Queued);
        assert_eq!(queue.jobs.len(), 3, "one command alone");
        assert_eq!(queue.push(job(1, Work::Forget), now, EVERY), Pushed::Queued);
        assert_eq!((queue.jobs.len(), queue.bytes), (2, 5));
        assert_eq!(
            queue.push(job_of("b", trace(7)), now, EVERY),
            Pushed::Queued,
            "a start after that is new"
        );
    }

    #[test]
    fn jobs_bytes_and_times_are_bounded() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for image in 0..64 {
            assert_eq!(queue.push(job(image, Work::Inherit), now, EVERY), Pushed::Queued);
        }
        assert_eq!(queue.push(job(64, trace(1)), now, EVERY), Pushed::Full);
        assert_eq!(queue.push(job(0, trace(BYTES_MAX)), now, EVERY), Pushed::Queued);
        assert_eq!(queue.push(job(1, trace(1)), now, EVERY), Pushed::Full);
        while queue.pop().is_some() {}
        for image in 1..4096 {
            assert_eq!(queue.push(job(image, trace(1)), now, EVERY), Pushed::Queued);
            queue.pop();
        }
        assert_eq!(queue.push(job(5000, trace(1)), now, EVERY), Pushed::Full);
        assert_eq!(queue.push(job(5000, trace(1)), now + EVERY, EVERY), Pushed::Queued);
        assert_eq!(queue.traced.len(), 1);
    }
}
