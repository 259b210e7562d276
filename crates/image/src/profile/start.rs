//! What one start says of two profiles: that of its command, and that of all commands, the general one.

use super::Profile;

/// A start on the general boot pack that missed fewer pages than one in so many of it needs no pack of its own.
const OWN_PART: u64 = 50;

/// Which boot pack a start had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootHad {
    /// None.
    None,
    /// The general one.
    General,
    /// That of its command.
    Own,
}

impl BootHad {
    /// By what a trace says of itself: whether it had one, and whether that was its command's.
    pub fn of(boot: bool, own: bool) -> Self {
        match (boot, own) {
            (false, _) => Self::None,
            (true, false) => Self::General,
            (true, true) => Self::Own,
        }
    }
}

/// What one start says of a profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// What it touched.
    pub touched: Profile,
    /// Whether that is only what the profile's boot pack lacked.
    pub missed: bool,
}

/// What a start of a command says of the profile of that command, and of the general one. `None` where it says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Starts {
    /// Of the command's profile.
    pub own: Option<Start>,
    /// Of the general one.
    pub general: Option<Start>,
}

impl Starts {
    /// Of a trace's pages, `touched`, and the two profiles as they are. A trace of a start with a boot pack has only what that
    /// lacked, so it is completed by the profile that the boot pack was made of.
    pub fn of(touched: Profile, booted: BootHad, own: Option<&Profile>, general: Option<&Profile>) -> Self {
        match booted {
            BootHad::None => {
                let start = Start { touched, missed: false };
                Self { own: Some(start.clone()), general: Some(start) }
            }
            BootHad::General => Self {
                own: match own {
                    Some(_) => Some(Start { touched: touched.clone(), missed: true }),
                    None => general.and_then(|general| first(&touched, general)),
                },
                general: Some(Start { touched, missed: true }),
            },
            BootHad::Own => Self {
                general: own.map(|own| Start { touched: completed(&touched, own), missed: false }),
                own: Some(Start { touched, missed: true }),
            },
        }
    }
}

/// The first that is known of a command: a guess, until a start without a boot pack says what it touches and what not. Nothing
/// where the general boot pack had nearly all of it.
fn first(missed: &Profile, general: &Profile) -> Option<Start> {
    if missed.pages() * OWN_PART < general.pages() {
        return None;
    }
    let touched = Profile { inherited: true, ..completed(missed, general) };
    Some(Start { touched, missed: false })
}

/// One start that touched what is known, and what was missed.
fn completed(missed: &Profile, known: &Profile) -> Profile {
    let merged = known.clone().weighing(1).merged(missed, true);
    Profile { inherited: known.inherited, ..merged }.weighing(1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn profile(starts: u32, inherited: bool, runs: &str) -> Profile {
        let json = format!(
            r#"{{"version":1,"starts":{starts},"inherited":{inherited},"names":[],"files":["a","b"],"runs":{runs}}}"#
        );
        Profile::parse(json.as_bytes()).unwrap()
    }

    /// How many pages of each file.
    fn pages(profile: &Profile) -> BTreeMap<&str, u64> {
        let mut pages = BTreeMap::new();
        for run in &profile.runs {
            *pages.entry(profile.files[run.0 as usize].as_str()).or_default() += run.2;
        }
        pages
    }

    #[test]
    fn a_start_without_a_boot_pack_says_the_same_of_both() {
        let touched = profile(1, false, "[[0,0,3,1]]");
        let starts = Starts::of(touched.clone(), BootHad::None, None, None);
        assert_eq!(starts.own, Some(Start { touched, missed: false }));
        assert_eq!(starts.own, starts.general);
    }

    #[test]
    fn the_first_start_of_a_command_on_the_general_boot_pack_is_a_guess_of_what_that_has_and_what_it_missed()
    {
        let general = profile(7, false, "[[0,0,100,7]]");
        let missed = profile(1, false, "[[1,5,2,1]]");
        let starts = Starts::of(missed.clone(), BootHad::General, None, Some(&general));
        let own = starts.own.unwrap();
        assert_eq!(pages(&own.touched), BTreeMap::from([("a", 100), ("b", 2)]));
        assert!(own.touched.inherited && own.touched.starts == 1 && !own.missed);
        assert_eq!(starts.general, Some(Start { touched: missed, missed: true }));
        // who missed next to nothing is served well enough
        let missed = profile(1, false, "[[1,5,1,1]]");
        assert_eq!(Starts::of(missed.clone(), BootHad::General, None, Some(&general)).own, None);
        assert_eq!(Starts::of(missed, BootHad::General, None, None).own, None);
    }

    #[test]
    fn a_start_on_its_commands_boot_pack_touched_for_all_others_what_that_has_and_what_it_missed() {
        let own = profile(8, false, "[[0,0,10,8],[0,50,1,3]]");
        let general = profile(16, false, "[[1,0,500,16]]");
        let missed = profile(1, false, "[[1,5,2,1]]");
        let starts = Starts::of(missed.clone(), BootHad::Own, Some(&own), Some(&general));
        assert_eq!(starts.own, Some(Start { touched: missed.clone(), missed: true }));
        let start = starts.general.unwrap();
        assert_eq!(pages(&start.touched), BTreeMap::from([("a", 11), ("b", 2)]));
        assert!(start.touched.starts == 1 && start.touched.runs.iter().all(|run| run.3 == 1));
        assert!(!start.missed && !start.touched.inherited);
        // nobody knows what the boot pack had
        assert_eq!(Starts::of(missed, BootHad::Own, None, Some(&general)).general, None);
    }

    #[test]
    fn what_is_made_of_a_guess_is_one() {
        let guess = profile(1, true, "[[0,0,10,1]]");
        let starts = Starts::of(profile(1, false, "[[1,5,2,1]]"), BootHad::Own, Some(&guess), None);
        assert!(starts.general.unwrap().touched.inherited);
    }
}
