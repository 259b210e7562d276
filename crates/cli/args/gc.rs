//! `lamina gc`, and what the registry's timer has of it.

use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use lamina_store::{GcConfig, Originals};

use super::StorageArguments;

#[derive(Args, Debug)]
pub(crate) struct GcArguments {
    #[command(flatten)]
    pub(crate) storage: StorageArguments,
    #[command(flatten)]
    pub(crate) settings: GcSettings,
    /// Delete nothing, and say what would be
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// After how long a registry that does not answer is taken for dead
    #[arg(long, hide = true, value_name = "TIME", value_parser = duration)]
    pub(crate) lost_after: Option<Duration>,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is garbage, and when it goes.
#[derive(Args, Clone, Debug)]
pub(crate) struct GcSettings {
    /// What came later than this is never collected: pushes may be on their way with it. As 30m, 12h, 7d
    #[arg(long, env = "LAMINA_GC_GRACE", default_value = "24h", value_name = "TIME", value_parser = duration)]
    pub(crate) gc_grace: Duration,
    /// How long garbage is kept after it was first seen, in case somebody tags it again
    #[arg(long, env = "LAMINA_GC_QUARANTINE", default_value = "24h", value_name = "TIME", value_parser = duration)]
    pub(crate) gc_quarantine: Duration,
    /// Keep manifests that no tag leads to; only what was deleted is garbage then
    #[arg(long, env = "LAMINA_GC_KEEP_UNTAGGED", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) gc_keep_untagged: bool,
    /// What becomes of the layers that were pushed, once they are cut. `keep`: all stay as they came. `drop`: collections
    /// drop those that are plain tars, each once it was made again from its chunks, byte for byte, as it is from then on
    /// for whoever asks. Compressed layers stay: no later version of a compressor has to make the same bytes again
    #[arg(long, env = "LAMINA_ORIGINALS", default_value = "keep", value_name = "POLICY",
        value_parser = PossibleValuesParser::new(["keep", "drop"]).map(|policy| originals(&policy)))]
    pub(crate) originals: Originals,
    /// Packs of which less than this many percent is still used are written anew without the rest; 0 for never
    #[arg(long, env = "LAMINA_REPACK_BELOW", default_value = "50", value_name = "PERCENT",
        value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) repack_below: u8,
}

impl GcSettings {
    /// How to collect.
    pub(crate) fn config(&self) -> GcConfig {
        GcConfig {
            grace: self.gc_grace,
            quarantine: self.gc_quarantine,
            keep_untagged: self.gc_keep_untagged,
            originals: self.originals,
            repack_below: self.repack_below,
            ..GcConfig::default()
        }
    }
}

fn originals(policy: &str) -> Originals {
    if policy == "drop" { Originals::Drop } else { Originals::Keep }
}

/// `30s`, `15m`, `24h`, `7d`; a number alone is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time; write 30s, 15m, 24h or 7d");
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_numbers_with_a_unit() {
        for (text, seconds) in
            [("0", 0), ("90", 90), ("30s", 30), ("15m", 900), ("24h", 86_400), ("7d", 604_800)]
        {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "h", "1w", "-1h", "1.5h", "99999999999999999999d", "18446744073709551615d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
