//! One measured start, and what makes it count.

use std::fmt;

use anyhow::Result;
use serde_json::{Value, json};

/// Images of so many compressed bytes have parts that a start never touches.
const LARGE_IMAGE_BYTES: u64 = 1 << 30;
/// What a node may receive without having fetched anything: acknowledgements and health checks.
pub(crate) const NEAR_NOTHING_BYTES: u64 = 256 << 10;

/// One start of one system.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample {
    /// From nothing to the workload's exit.
    pub(crate) seconds: f64,
    /// From nothing to when the workload could be started: mounted or pulled.
    pub(crate) ready_seconds: f64,
    /// Bytes of IP packets that came to the node meanwhile.
    pub(crate) received_bytes: u64,
    /// Bytes of IP packets that the node sent.
    pub(crate) sent_bytes: u64,
    /// Why the sample does not count.
    pub(crate) void: Option<String>,
    /// What the system itself says about the run.
    pub(crate) counters: Option<Value>,
}

/// What the bytes on the link have to show.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Evidence {
    /// The layers were pulled, whole.
    Pulled,
    /// Only what was needed came, but something did.
    Lazy,
    /// All was there already.
    Local,
}

/// The samples of one line of the table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) samples: Vec<Sample>,
}

impl Sample {
    /// A start that failed, which is a sample that does not count.
    pub(crate) fn from_result(result: Result<Self>) -> Self {
        result.unwrap_or_else(|error| Self { void: Some(format!("{error:#}")), ..Self::default() })
    }

    /// Voids the sample unless the bytes received are `evidence` for an image with `layer_bytes` of layers.
    pub(crate) fn check(mut self, evidence: Evidence, layer_bytes: u64) -> Self {
        let received = self.received_bytes;
        // A small image may be needed whole.
        let lazy_max = if layer_bytes >= LARGE_IMAGE_BYTES { layer_bytes / 2 } else { layer_bytes };
        let (is_shown, claim) = match evidence {
            Evidence::Pulled => (received >= layer_bytes / 10 * 9, "pulled the layers"),
            Evidence::Lazy => {
                ((NEAR_NOTHING_BYTES..lazy_max).contains(&received), "fetched a part of the image")
            }
            Evidence::Local => (received < NEAR_NOTHING_BYTES, "had everything already"),
        };
        if !is_shown {
            self.void_because(&format!("{received} bytes received do not show that it {claim}"));
        }
        self
    }

    /// Voids the sample, if nothing has before.
    pub(crate) fn void_because(&mut self, reason: &str) {
        self.void.get_or_insert_with(|| reason.to_owned());
    }

    /// All of it, for a file.
    pub(crate) fn json(&self) -> Value {
        json!({
            "seconds": self.seconds,
            "ready_seconds": self.ready_seconds,
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "void": self.void,
            "counters": self.counters,
        })
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reason) = &self.void {
            write!(f, "VOID: {reason} ")?;
        }
        let received = self.received_bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "{:.2} s, ready after {:.2} s, {received:.1} MiB received",
            self.seconds, self.ready_seconds
        )
    }
}

impl Row {
    /// Whether there is a sample that counts.
    pub(crate) fn is_valid(&self) -> bool {
        self.valid().next().is_some()
    }

    /// Median, least and greatest of the seconds; nothing without a sample that counts.
    pub(crate) fn seconds(&self) -> Option<[f64; 3]> {
        spread(self.valid().map(|sample| sample.seconds))
    }

    /// Median of the MiB received.
    pub(crate) fn received_mib(&self) -> Option<f64> {
        let mib = |sample: &Sample| sample.received_bytes as f64 / f64::from(1 << 20);
        spread(self.valid().map(mib)).map(|[median, ..]| median)
    }

    fn valid(&self) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(|sample| sample.void.is_none())
    }
}

/// Median, least and greatest.
fn spread(values: impl Iterator<Item = f64>) -> Option<[f64; 3]> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (first, last) = (*values.first()?, *values.last()?);
    let median = f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
    Some([median, first, last])
}
