//! When tags were last asked for. A plain value that knows no clock.

use std::collections::HashMap;
use std::time::Duration;

use lamina_store::{Repo, Tag};
use tokio::time::Instant;

/// Tags of which the time is known: some 10 MiB.
const TAGS_MAX: usize = 65_536;
/// An upstream that did not answer is not asked about what is known for so long.
const AWAY: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Tags {
    fresh_for: Duration,
    asked: HashMap<(Repo, Tag), Instant>,
    away_until: Option<Instant>,
}

impl Tags {
    /// What was said is good for so long.
    pub(super) fn new(fresh_for: Duration) -> Self {
        Self { fresh_for, asked: HashMap::new(), away_until: None }
    }

    /// Whether the tag was asked for not long ago.
    pub(super) fn is_fresh(&self, repo: &Repo, tag: &Tag, now: Instant) -> bool {
        let asked = self.asked.get(&(repo.clone(), tag.clone()));
        asked.is_some_and(|asked| now.saturating_duration_since(*asked) < self.fresh_for)
    }

    /// The upstream has said what the tag means.
    pub(super) fn note_asked(&mut self, repo: &Repo, tag: &Tag, now: Instant) {
        self.away_until = None;
        if self.asked.len() >= TAGS_MAX {
            let fresh_for = self.fresh_for;
            self.asked.retain(|_, asked| now.saturating_duration_since(*asked) < fresh_for);
        }
        // where so many are fresh, this one is asked for each time
        if self.asked.len() < TAGS_MAX {
            self.asked.insert((repo.clone(), tag.clone()), now);
        }
    }

    /// Whether nobody answered just now.
    pub(super) fn is_away(&self, now: Instant) -> bool {
        self.away_until.is_some_and(|until| now < until)
    }

    /// Nobody answers.
    pub(super) fn note_away(&mut self, now: Instant) {
        self.away_until = Some(now + AWAY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_fresh_for_a_while_and_an_upstream_away_until_it_answers() {
        let (mut tags, now) = (Tags::new(Duration::from_secs(60)), Instant::now());
        let (repo, tag): (Repo, Tag) = ("app".parse().unwrap(), "v1".parse().unwrap());
        assert!(!tags.is_fresh(&repo, &tag, now));
        tags.note_asked(&repo, &tag, now);
        assert!(tags.is_fresh(&repo, &tag, now + Duration::from_secs(59)));
        assert!(!tags.is_fresh(&repo, &tag, now + Duration::from_secs(60)));
        assert!(!tags.is_fresh(&repo, &"v2".parse().unwrap(), now));
        tags.note_away(now);
        assert!(tags.is_away(now + AWAY / 2) && !tags.is_away(now + AWAY));
        tags.note_asked(&repo, &tag, now);
        assert!(!tags.is_away(now));
    }
}
