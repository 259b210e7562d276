//! Readahead: who reads forward, and how far ahead of them to fetch. Pure; positions are bytes in a file, or in all
//! frames laid end to end.
//!
//! The rule: ahead of a stream that has read `run` bytes forward, up to `run` bytes are fetched, so what is fetched in
//! vain is never more than what was read. It doubles by itself while reading is dense and is nothing while it is not.
//! Reads do not come quite in the order of positions: several are under way at once, and files are read in another order
//! than they were packed in. So a stream may pass over some of what was fetched for it; that counts against `run`, and of a long
//! one against no more than its window, until as much behind it is read after all.

use std::ops::Range;

/// How readahead grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ramp {
    /// A stream that has read fewer bytes gets none.
    pub run_min: u64,
    /// No stream gets more, in bytes: what fills a link for some round trips.
    pub ahead_max: u64,
    /// No more is asked for at once, in bytes; the next read asks for more.
    pub piece_max: u64,
    /// A read this near to where a stream stands belongs to it, in bytes.
    pub slack: u64,
    /// So does one this far from a stream that has read as much, in bytes, or anywhere in what was fetched for one.
    pub reach_max: u64,
}

/// Positions followed at once; the one that moved least recently is given up for a new one.
const STREAMS_MAX: usize = 8;

#[derive(Clone, Debug)]
struct Stream {
    /// Where reading stands.
    at: u64,
    /// Bytes read on the way here, less `passed`.
    run: u64,
    /// Bytes that were passed over, and not read since.
    passed: u64,
    /// How far it was fetched.
    ahead: u64,
    moved: u64,
}

impl Stream {
    /// Whether a read belongs to it.
    fn has(&self, read: &Range<u64>, ramp: Ramp) -> bool {
        let reach = ramp.slack.max(self.run.min(ramp.reach_max));
        read.start <= self.at.saturating_add(reach).max(self.ahead)
            && read.end.saturating_add(reach) >= self.at
    }

    /// Whether a read begins, or ends, about where reading stands.
    fn is_at(&self, read: &Range<u64>, ramp: Ramp) -> bool {
        read.start <= self.at.saturating_add(ramp.slack) && read.end.saturating_add(ramp.slack) >= self.at
    }

    fn take(&mut self, read: &Range<u64>, ramp: Ramp) {
        let len = read.end - read.start;
        if read.end <= self.at {
            // once for what it was held against, and once as any read
            let after_all = len.min(self.passed);
            self.passed -= after_all;
            self.run += 2 * after_all;
            return;
        }
        let gap = read.start.saturating_sub(self.at);
        if gap > ramp.slack {
            // what a long stream has read before its window was full does not pay for jumps
            self.run = self.run.min(ramp.ahead_max).saturating_sub(gap);
            self.passed += gap;
        }
        self.run += len.min(read.end - self.at);
        self.at = read.end;
        self.ahead = self.ahead.max(self.at);
    }
}

/// What to do about a read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Advice {
    /// Fetch these bytes ahead.
    pub(crate) fetch: Option<Range<u64>>,
    /// How long the stream is that the read goes on from where it stands; of another read its own length.
    pub(crate) run: u64,
}

/// The streams in one space of positions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    streams: Vec<Stream>,
    clock: u64,
}

impl Streams {
    /// Takes note of a read in a space that ends at `end`.
    pub(crate) fn note(&mut self, read: Range<u64>, end: u64, ramp: Ramp) -> Advice {
        self.clock += 1;
        let those = self.streams.iter_mut().filter(|stream| stream.has(&read, ramp));
        let Some(stream) = those.min_by_key(|stream| stream.at.abs_diff(read.start)) else {
            return self.begin(&read);
        };
        stream.moved = self.clock;
        let is_at = stream.is_at(&read, ramp);
        stream.take(&read, ramp);
        let window = if stream.run < ramp.run_min { 0 } else { stream.run.min(ramp.ahead_max) };
        // ask in large pieces, so that requests are few
        let piece = (window / 2).min(ramp.piece_max);
        let target =
            stream.at.saturating_add(window).min(stream.ahead.saturating_add(ramp.piece_max)).min(end);
        let due = stream.ahead - stream.at <= window - piece && target > stream.ahead;
        let fetch = due.then(|| std::mem::replace(&mut stream.ahead, target)..target);
        Advice { fetch, run: if is_at { stream.run } else { read.end - read.start } }
    }

    fn begin(&mut self, read: &Range<u64>) -> Advice {
        let run = read.end - read.start;
        let stream = Stream { at: read.end, run, passed: 0, ahead: read.end, moved: self.clock };
        if self.streams.len() < STREAMS_MAX {
            self.streams.push(stream);
        } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.moved) {
            *oldest = stream;
        }
        Advice { fetch: None, run }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RAMP: Ramp = Ramp { run_min: 100, ahead_max: 1000, piece_max: 500, slack: 20, reach_max: 200 };

    fn fetches(reads: &[Range<u64>], end: u64) -> Vec<Option<Range<u64>>> {
        let mut streams = Streams::default();
        reads.iter().map(|read| streams.note(read.clone(), end, RAMP).fetch).collect()
    }

    #[test]
    fn reading_forward_ramps_up_and_everything_else_fetches_nothing() {
        let none: Vec<Option<Range<u64>>> = vec![None, None, None];
        type Case = (&'static str, Vec<Range<u64>>, Vec<Option<Range<u64>>>);
        let cases: [Case; 7] = [
            ("forward", vec![0..50, 50..100, 100..150], vec![None, Some(100..200), Some(200..300)]),
            ("with small gaps", vec![0..50, 60..110, 125..175], vec![None, Some(110..210), Some(210..325)]),
            ("out of order", vec![50..100, 0..50, 100..150], vec![None, None, Some(150..250)]),
            ("random", vec![0..50, 500..550, 250..300], none.clone()),
            ("backward", vec![200..250, 150..200, 100..150], none.clone()),
            ("one place", vec![0..50, 0..50, 0..50], none),
            (
                "two at once",
                vec![0..60, 500..560, 60..120, 560..620],
                vec![None, None, Some(120..240), Some(620..740)],
            ),
        ];
        for (name, reads, want) in cases {
            assert_eq!(fetches(&reads, 10_000), want, "{name}");
        }
    }

    #[test]
    fn a_dense_stream_is_followed_to_its_end_in_ever_larger_steps() {
        let reads: Vec<Range<u64>> = (0..100).map(|n| n * 50..n * 50 + 50).collect();
        let fetched: Vec<Range<u64>> = fetches(&reads, 5000).into_iter().flatten().collect();
        assert!(fetched.windows(2).all(|pair| pair[0].end == pair[1].start), "without gaps: {fetched:?}");
        assert_eq!(fetched.last().expect("some").end, 5000);
        assert!(fetched.len() < 20, "{fetched:?}");
    }

    #[test]
    fn reads_that_come_out_of_order_are_one_stream() {
        // as two threads give them: each pair the wrong way round, further apart than the slack
        let reads = (0..100).map(|n| n ^ 1).map(|n| n * 50..n * 50 + 50);
        let mut streams = Streams::default();
        let fetched: Vec<Range<u64>> =
            reads.filter_map(|read| streams.note(read, 5000, RAMP).fetch).collect();
        assert_eq!(streams.streams.len(), 1, "{streams:?}");
        assert!(fetched.windows(2).all(|pair| pair[0].end == pair[1].start), "without gaps: {fetched:?}");
        assert_eq!(fetched.last().expect("some").end, 5000);
    }

    #[test]
    fn what_a_stream_passes_over_counts_against_it_until_it_is_read() {
        let mut streams = Streams::default();
        let mut run = |read: Range<u64>| {
            streams.note(read, 10_000, RAMP);
            streams.streams.last().expect("one").run
        };
        assert_eq!([run(0..300), run(450..500)], [300, 300 - 150 + 50]);
        assert_eq!([run(340..390), run(390..440)], [300, 400]);
        assert_eq!([run(300..400), run(300..400)], [500, 500], "no more than was passed over");
        assert_eq!(run(5_000..5_100), 100, "out of reach: another stream");
    }

    #[test]
    fn single_reads_in_what_was_fetched_for_a_long_stream_fetch_nothing_more() {
        let mut streams = Streams::default();
        for n in 0..1000 {
            streams.note(n * 50..n * 50 + 50, 1_000_000, RAMP);
        }
        let single = |at: u64| streams.note(50_000 + at..50_001 + at, 1_000_000, RAMP);
        let advice: Vec<Advice> = [300, 700, 950, 1_200, 1_500, 2_000].map(single).into();
        assert!(advice.iter().all(|advice| advice.fetch.is_none() && advice.run == 1), "{advice:?}");
    }

    proptest! {
        #[test]
        fn what_is_fetched_ahead_is_bounded_by_what_was_read(
            reads in prop::collection::vec((0u64..5000, 1u64..200), 1..200),
        ) {
            let (mut streams, mut read_bytes, mut fetched) = (Streams::default(), 0, 0);
            for (start, len) in reads {
                read_bytes += len;
                let advice = streams.note(start..start + len, 6000, RAMP);
                if let Some(range) = advice.fetch {
                    prop_assert!(range.start < range.end && range.end <= 6000);
                    prop_assert!(range.end - range.start <= RAMP.piece_max);
                    fetched += range.end - range.start;
                }
                prop_assert!(streams.streams.len() <= STREAMS_MAX);
                // each byte of run lets at most three be fetched: the window, its growth, and what is passed over; jumps within
                // the slack move it along
                prop_assert!(fetched <= 3 * read_bytes + 8 * RAMP.ahead_max);
            }
        }
    }
}
