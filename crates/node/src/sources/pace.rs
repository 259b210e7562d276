//! How fast a host usually answers, and how many requests beyond the necessary it may be sent. Pure.

use std::time::Duration;

/// Until a host has answered this often, nobody knows what is usual.
const KNOWN_AFTER: u32 = 8;
/// What is usual before that.
const UNKNOWN: Duration = Duration::from_secs(1);
/// Nothing shorter is called unusual: a busy machine is that slow by itself.
const USUAL_MIN: Duration = Duration::from_millis(50);
/// Nothing longer is called usual.
const USUAL_MAX: Duration = Duration::from_secs(2);

/// A running estimate of the time to the head of an answer, as TCP keeps one of its round trip (RFC 6298).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Latency {
    answers: u32,
    mean_s: f64,
    deviation_s: f64,
}

impl Latency {
    /// Takes note of one answer.
    pub(crate) fn note(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        if self.answers == 0 {
            (self.mean_s, self.deviation_s) = (took, took / 2.0);
        } else {
            self.deviation_s += ((took - self.mean_s).abs() - self.deviation_s) / 4.0;
            self.mean_s += (took - self.mean_s) / 8.0;
        }
        self.answers = self.answers.saturating_add(1);
    }

    /// An answer that takes longer than this is unusual.
    pub(crate) fn usual(&self) -> Duration {
        if self.answers < KNOWN_AFTER {
            return UNKNOWN;
        }
        let usual = Duration::try_from_secs_f64(self.mean_s + 4.0 * self.deviation_s).unwrap_or(USUAL_MAX);
        usual.clamp(USUAL_MIN, USUAL_MAX)
    }
}

/// Each request earns this part of another one, in thousandths: a host that is slow because it is busy gets a tenth more, not
/// twice as much.
const EARNED: u32 = 100;
/// And no more than this is saved up, in thousandths: some bad luck at once is covered.
const SAVED_MAX: u32 = 10_000;

/// Requests that may be sent in vain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    saved: u32,
}

impl Default for Budget {
    fn default() -> Self {
        Self { saved: SAVED_MAX }
    }
}

impl Budget {
    /// A request was sent that had to be.
    pub(crate) fn earn(&mut self) {
        self.saved = (self.saved + EARNED).min(SAVED_MAX);
    }

    /// Whether one more may be sent.
    pub(crate) fn spend(&mut self) -> bool {
        let left = self.saved.checked_sub(1000);
        self.saved = left.unwrap_or(self.saved);
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_usual_follows_what_was_seen() {
        let mut latency = Latency::default();
        assert_eq!(latency.usual(), UNKNOWN);
        for _ in 0..100 {
            latency.note(Duration::from_millis(1));
        }
        assert_eq!(latency.usual(), USUAL_MIN);
        for _ in 0..100 {
            latency.note(Duration::from_millis(400));
        }
        let usual = latency.usual();
        assert!((Duration::from_millis(390)..Duration::from_millis(700)).contains(&usual), "{usual:?}");
        for _ in 0..100 {
            latency.note(Duration::from_secs(60));
        }
        assert_eq!(latency.usual(), USUAL_MAX);
    }

    #[test]
    fn a_tenth_more_than_necessary_is_sent_in_the_long_run() {
        let mut budget = Budget::default();
        let mut spent = 0;
        for _ in 0..1000 {
            budget.earn();
            spent += u32::from(budget.spend());
        }
        assert_eq!(spent, 100 + SAVED_MAX / 1000 - 1);
    }
}
