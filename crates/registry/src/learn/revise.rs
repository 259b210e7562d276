//! What a profile becomes by what comes in, and the boot pack that follows from it. Plain functions, for threads that
//! may work long.

use bytes::Bytes;
use lamina_chunk::{Chunk, FrameId, Place};
use lamina_image::{
    BootHad, BuildError, Digest, PROFILE_BYTES_MAX, Profile, ProfileRun, Start, Starts, Tree, build_boot,
};
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
    /// What a start says.
    Start(Start),
    /// Somebody who knows, as JSON.
    Profile(Bytes),
    /// What follows from the profile of the image before.
    Predecessor(Profile),
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

/// A profile that is stored, where there is one and it is not damaged.
pub(super) fn stored(json: Option<Bytes>) -> Option<Profile> {
    let parsed = Profile::parse(&json?);
    parsed.inspect_err(|error| tracing::warn!(%error, "a stored profile is damaged")).ok()
}

/// What a trace, a protobuf message, says of the general profile and of its command's, which are stored like this. Nothing where
/// it has no pages.
pub(super) fn starts(
    tree: &Tree,
    message: Bytes,
    own: Option<&Profile>,
    general: Option<&Profile>,
) -> Result<Option<Starts>, LearnError> {
    // whoever queued it has read it once
    let message = proto::Trace::decode(message).ok();
    let Some((_, trace)) = message.as_ref().and_then(read_trace) else { return Ok(None) };
    let had = BootHad::of(trace.boot, message.is_some_and(|message| message.boot_own));
    let touched = Profile::of_trace(tree, &trace)?;
    Ok((!touched.runs.is_empty()).then(|| Starts::of(touched, had, own, general)))
}

/// The next profile; `None` where what came changes nothing.
pub(super) fn revise(stored: Option<&Profile>, source: Source) -> Result<Option<Revised>, LearnError> {
    let is_start = matches!(source, Source::Start(_));
    let next = match source {
        Source::Start(start) => learnt(stored, start),
        Source::Profile(json) => Some(Profile::parse(&json)?),
        // worth one start, however many there were: those of this image count
        Source::Predecessor(inherited) => Some(inherited.weighing(1)).filter(|profile| profile.pages() > 0),
    };
    let Some(profile) = next else { return Ok(None) };
    let json = Bytes::from(profile.to_json());
    if json.len() > PROFILE_BYTES_MAX {
        return Err(LearnError::TooLarge);
    }
    let pages_changed = stored.is_none_or(|stored| !same_pages(stored, &profile));
    let steady = is_start && stored.is_some_and(is_steady);
    Ok(Some(Revised { profile, json, pages_changed, steady }))
}

fn learnt(stored: Option<&Profile>, start: Start) -> Option<Profile> {
    let Start { touched, missed } = start;
    match stored {
        // only what a boot pack lacked, and that is gone
        None if missed => None,
        None => Some(touched),
        Some(stored) if stored.inherited && !missed && !touched.inherited => Some(touched),
        Some(stored) if missed && touched.pages() * FEW_MISSED_PART >= stored.pages() => {
            Some(stored.clone().weighing(OLD_STARTS).merged(&touched, true))
        }
        Some(stored) if missed && is_steady(stored) => None,
        Some(stored) => Some(stored.merged(&touched, missed)),
    }
}

fn is_steady(profile: &Profile) -> bool {
    profile.starts >= STEADY_STARTS && !profile.inherited
}

/// Whether the same pages of the same files are read in the same order, and the same names looked up and directories listed.
fn same_pages(one: &Profile, other: &Profile) -> bool {
    fn pages(profile: &Profile) -> impl Iterator<Item = (&str, u64)> {
        let file = |run: &ProfileRun| profile.files[run.0 as usize].as_str();
        profile.runs.iter().flat_map(move |run| (run.1..run.1 + run.2).map(move |page| (file(run), page)))
    }
    one.names == other.names && one.dirs == other.dirs && pages(one).eq(pages(other))
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
