//! Range headers: `Range` of a download (RFC 9110, 14.2) and `Content-Range` of an upload's part.

use std::ops::Range;

/// What a download asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All of it: no header, or one that RFC 9110 tells us to ignore.
    Whole,
    /// These bytes, which lie inside and are at least one.
    Part(Range<u64>),
    /// Nothing that is there.
    Outside,
}

/// Reads a `Range` header for a blob of `size` bytes. Several ranges in one header are answered with the whole.
pub(crate) fn wanted(header: Option<&str>, size: u64) -> Wanted {
    let Some(ranges) = header.and_then(|header| header.trim().strip_prefix("bytes=")) else {
        return Wanted::Whole;
    };
    let Some((first, last)) = ranges.split_once('-') else { return Wanted::Whole };
    let (first, last) = (first.trim(), last.trim());
    let part = match (number(first), number(last)) {
        // RFC 9110 lets a server ignore or refuse a range whose end comes first: a client that asked so is better told
        (Some(first), Some(last)) => first..last.saturating_add(1).min(size),
        (Some(first), None) if last.is_empty() => first..size,
        (None, Some(suffix)) if first.is_empty() => size.saturating_sub(suffix)..size,
        _ => return Wanted::Whole,
    };
    if part.start < part.end { Wanted::Part(part) } else { Wanted::Outside }
}

/// Reads a `Range` header that names first and last byte, in order, and nothing more.
pub(crate) fn bounded(header: &str) -> Option<Range<u64>> {
    let (first, last) = header.trim().strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = (number(first.trim())?, number(last.trim())?);
    (first <= last && last < u64::MAX).then(|| first..last + 1)
}

/// Reads the `Content-Range` of a part, `first-last`, as distribution-spec writes it; also `bytes first-last/size`, as
/// HTTP does.
pub(crate) fn part(header: &str) -> Option<Range<u64>> {
    let text = header.trim();
    let text = text.strip_prefix("bytes ").or_else(|| text.strip_prefix("bytes=")).unwrap_or(text);
    let text = text.split_once('/').map_or(text, |(range, _)| range);
    let (first, last) = text.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    (first <= last && last < u64::MAX).then(|| first..last + 1)
}

/// Digits and nothing else: `u64::from_str` would take a plus sign.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_has_them() {
        use Wanted::{Outside, Part, Whole};
        for (header, expected) in [
            ("bytes=0-0", Part(0..1)),
            ("bytes=2-5", Part(2..6)),
            ("bytes=2-500", Part(2..10)),
            ("bytes=2-", Part(2..10)),
            ("bytes=-3", Part(7..10)),
            ("bytes=-30", Part(0..10)),
            ("bytes=-0", Outside),
            ("bytes=10-", Outside),
            ("bytes=10-20", Outside),
            ("bytes=99999999999999999999999-", Outside),
            ("bytes=5-2", Outside),
            ("bytes=5-4", Outside),
            ("bytes=-", Whole),
            ("bytes=+1-2", Whole),
            ("bytes=0-1,3-4", Whole),
            ("lines=0-1", Whole),
            ("", Whole),
        ] {
            assert_eq!(wanted(Some(header), 10), expected, "{header}");
        }
        assert_eq!(wanted(None, 10), Whole);
        for (header, expected) in [
            ("bytes=2-5", Some(2..6)),
            ("bytes=2-500", Some(2..501)),
            ("bytes=5-2", None),
            ("bytes=2-", None),
            ("bytes=-3", None),
            ("bytes=0-1,3-4", None),
            ("bytes=0-18446744073709551615", None),
        ] {
            assert_eq!(bounded(header), expected, "{header}");
        }
        assert_eq!(wanted(Some("bytes=0-"), 0), Outside);
    }

    #[test]
    fn parts_are_read_in_both_spellings() {
        assert_eq!(part("0-9"), Some(0..10));
        assert_eq!(part("bytes 5-9/100"), Some(5..10));
        for bad in ["", "-", "9-0", "a-b", "5", "0-18446744073709551615", "-1-2"] {
            assert_eq!(part(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_the_answer_lies_inside(header in "(bytes=)?[0-9,-]{0,24}", size: u64) {
            if let Wanted::Part(range) = wanted(Some(&header), size) {
                prop_assert!(range.start < range.end && range.end <= size);
            }
            if let Some(range) = part(&header) {
                prop_assert!(range.start < range.end);
            }
        }

        #[test]
        fn a_well_formed_range_is_answered_exactly(first in 0u64..1000, len in 1u64..1000, beyond in 0u64..1000) {
            let header = format!("bytes={first}-{}", first + len - 1);
            prop_assert_eq!(wanted(Some(&header), first + len + beyond), Wanted::Part(first..first + len));
        }
    }
}
