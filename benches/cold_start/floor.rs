//! What no cold start can be faster than.

use crate::sample::Row;
use crate::stage::Stage;

/// What [`seconds`] is, for people.
pub(crate) const MEANING: &str = "the warm run, or its bytes over the link";

/// The warm time, or two round trips and the bytes that a start with a boot pack receives at the rate of the link: whichever
/// is longer. Nothing unless both were measured.
pub(crate) fn seconds(stage: &Stage, rows: &[Row]) -> Option<f64> {
    let row = |name: &str| rows.iter().find(|row| row.name == name);
    let [warm, ..] = row("warm")?.seconds()?;
    let bits = row("boot")?.received_mib()? * f64::from(1 << 20) * 8.0;
    let round_trips = 4.0 * stage.spec.delay_one_way.as_secs_f64();
    Some(warm.max(round_trips + bits / (stage.spec.rate_mbit * 1e6)))
}
