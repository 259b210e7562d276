//! What a profile becomes by what comes in, and the boot pack that follows from it. Plain functions, for threads that
//! may work long.

use bytes::Bytes;
use lamina_chunk::{Chunk, FrameId, Place};
use lamina_image::{BuildError, Digest, PROFILE_BYTES_MAX, Profile, ProfileRun, Tree, build_boot};
use lamina_wire::{proto, read_trace};
use prost::Message;

use super::LearnError;

/// Pages in a boot pack: 1 GiB. It is built in memory, and what a start reads after so much is no start any more.
const BOOT_PAGES_MAX: u64 = 1 << 18;

/// So many starts say what there is to say: one more that reads the same is not written down.
const STEADY_STARTS: u32 = 8;
/// A start with a boot pack that missed less than one page in so many has not shown anything new.
const FEW_MISSED_PART: u64 = 50;
/// So much does all that was known weigh against a start that shows something new: as one of four it is not rare.
const OLD_STARTS: u32 = 3;

/// Where something new comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// A start, as a protobuf message.
    Trace(Bytes),
    /// Somebody who knows, as JSON.
    Profile(Bytes),
    /// The profile of the image before, as JSON.
    Predecessor(Bytes),
}

/// A profile that is to be stored.
#[derive(Debug)]
pub(super) struct Revised {
    pub(super) profile: Profile,
    pub(super) json: Bytes,
    /// Whether another boot pack follows from it than from the one before.
    pub(super) pages_changed: bool,
    /// Whether so many starts are known that nobody needs to hear of one more that reads the same.
    pub(super) steady: bool,
}

/// The next profile; `None` where what came changes nothing.
pub(super) fn revise(
    tree: &Tree,
    stored: Option<&[u8]>,
    source: Source,
) -> Result<Option<Revised>, LearnError> {
    let stored = stored.and_then(|json| {
        let parsed = Profile::parse(json);
        parsed.inspect_err(|error| tracing::warn!(%error, "a stored profile is damaged")).ok()
    });
    let is_trace = matches!(source, Source::Trace(_));
    let next = match source {
        Source::Trace(message) => learnt(tree, stored.as_ref(), message)?,
        Source::Profile(json) => Some(Profile::parse(&json)?),
        Source::Predecessor(json) => {
            // worth one start, however many there were: those of this image count
            let inherited = weighing(Profile::parse(&json)?.inherited_by(tree)?, 1);
            Some(inherited).filter(|profile| profile.pages() > 0)
        }
    };
    let Some(profile) = next else { return Ok(None) };
    let json = Bytes::from(profile.to_json());
    if json.len() > PROFILE_BYTES_MAX {
        return Err(LearnError::TooLarge);
    }
    let pages_changed = stored.as_ref().is_none_or(|stored| !same_pages(stored, &profile));
    let steady = is_trace && stored.as_ref().is_some_and(is_steady);
    Ok(Some(Revised { profile, json, pages_changed, steady }))
}

fn learnt(tree: &Tree, stored: Option<&Profile>, message: Bytes) -> Result<Option<Profile>, LearnError> {
    // whoever queued it has read it once
    let message = proto::Trace::decode(message).ok();
    let Some((_, trace)) = message.as_ref().and_then(read_trace) else { return Ok(None) };
    drop(message);
    let new = Profile::of_trace(tree, &trace)?;
    if new.runs.is_empty() {
        return Ok(None);
    }
    Ok(match stored {
        // only what a boot pack lacked, and that is gone
        None if trace.boot => None,
        None => Some(new),
        Some(stored) if stored.inherited && !trace.boot => Some(new),
        Some(stored) if trace.boot && new.pages() * FEW_MISSED_PART >= stored.pages() => {
            Some(weighing(stored.clone(), OLD_STARTS).merged(&new, true))
        }
        Some(stored) if trace.boot && is_steady(stored) => None,
        Some(stored) => Some(stored.merged(&new, trace.boot)),
    })
}

fn is_steady(profile: &Profile) -> bool {
    profile.starts >= STEADY_STARTS && !profile.inherited
}

/// The same profile, as if it came from at most so many starts.
fn weighing(mut profile: Profile, starts_max: u32) -> Profile {
    let starts = u64::from(profile.starts.max(1));
    if profile.starts > starts_max {
        for run in &mut profile.runs {
            let seen = (u64::from(run.3) * u64::from(starts_max)).div_ceil(starts);
            run.3 = u32::try_from(seen).unwrap_or(starts_max).min(starts_max);
        }
        profile.starts = starts_max;
    }
    profile
}

/// Whether the same pages of the same files are read in the same order after the same names were looked up.
fn same_pages(one: &Profile, other: &Profile) -> bool {
    fn pages(profile: &Profile) -> impl Iterator<Item = (&str, u64)> {
        let file = |run: &ProfileRun| profile.files[run.0 as usize].as_str();
        profile.runs.iter().flat_map(move |run| (run.1..run.1 + run.2).map(move |page| (file(run), page)))
    }
    one.names == other.names && pages(one).eq(pages(other))
}

/// The boot pack of a profile, of its first 1 GiB.
pub(super) fn build(
    tree: &Tree,
    digest: Digest,
    profile: Profile,
    open: impl FnMut(FrameId, Place) -> Result<Chunk, LearnError>,
) -> Result<Option<Vec<u8>>, LearnError> {
    let profile = profile.first_pages(BOOT_PAGES_MAX);
    build_boot(tree, digest, &profile, open).map_err(|error| match error {
        BuildError::Tree(error) => error.into(),
        BuildError::Frame(error) => error,
        BuildError::TooLarge => LearnError::TooLarge,
    })
}
