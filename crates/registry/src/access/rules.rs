//! Rules: which users may do what in which repositories.

use std::fmt;
use std::str::FromStr;

use lamina_store::Repo;

/// What is done in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Read.
    Pull,
    /// Write.
    Push,
    /// Take away.
    Delete,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Delete => "delete",
        })
    }
}

/// A rule says something else than a rule may.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Not an action.
    #[error("{0:?} is not pull, push or delete")]
    Action(String),
    /// Not a scope of deduplication.
    #[error("{0:?} is not repository, namespace or all")]
    Scope(String),
    /// Not a pattern of repositories.
    #[error("{0:?} is no pattern of repositories: write a name, * for one part of it, ** for the rest")]
    Pattern(String),
}

impl FromStr for Action {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        match text {
            "pull" => Ok(Self::Pull),
            "push" => Ok(Self::Push),
            "delete" => Ok(Self::Delete),
            other => Err(RuleError::Action(other.to_owned())),
        }
    }
}

/// Whom a rule is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Everybody, also nobody in particular.
    Anonymous,
    /// Every user.
    Users,
    /// This user.
    User(String),
}

/// What some may do in some repositories. Rules only ever allow; what none allows is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    patterns: Vec<Vec<String>>,
    who: Vec<Who>,
    actions: Vec<Action>,
}

impl Rule {
    /// `patterns` are names of repositories, with `*` for one part and, at the end, `**` for any number of them.
    pub fn new(patterns: &[String], who: Vec<Who>, actions: Vec<Action>) -> Result<Self, RuleError> {
        let patterns = patterns.iter().map(|text| pattern(text)).collect::<Result<_, _>>()?;
        Ok(Self { patterns, who, actions })
    }

    fn is_for(&self, user: Option<&str>) -> bool {
        self.who.iter().any(|who| match who {
            Who::Anonymous => true,
            Who::Users => user.is_some(),
            Who::User(name) => user == Some(name),
        })
    }
}

fn pattern(text: &str) -> Result<Vec<String>, RuleError> {
    let parts: Vec<String> = text.split('/').map(str::to_owned).collect();
    let wrong = || RuleError::Pattern(text.to_owned());
    for (number, part) in parts.iter().enumerate() {
        let last = number + 1 == parts.len();
        let wild = part == "*" || (part == "**" && last);
        if !wild && part.parse::<Repo>().is_err() {
            return Err(wrong());
        }
    }
    Ok(parts)
}

fn matches(pattern: &[String], repo: &Repo) -> bool {
    let mut parts = repo.as_str().split('/');
    for wanted in pattern {
        match (wanted.as_str(), parts.next()) {
            ("**", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(part)) if wanted == part => {}
            _ => return false,
        }
    }
    parts.next().is_none()
}

/// Whether any rule allows it; without rules, whether it is a user.
pub(super) fn allow(rules: &[Rule], user: Option<&str>, repo: &Repo, action: Action) -> bool {
    if rules.is_empty() {
        return user.is_some();
    }
    let mut fitting = rules.iter().filter(|rule| rule.actions.contains(&action) && rule.is_for(user));
    fitting.any(|rule| rule.patterns.iter().any(|pattern| matches(pattern, repo)))
}

/// Whether there is anything for nobody in particular.
pub(super) fn admits_nobody(rules: &[Rule]) -> bool {
    rules.iter().any(|rule| rule.who.contains(&Who::Anonymous))
}

/// How far deduplication reaches. What reaches further saves more, and lets whoever pushes find out whether something is
/// there: packs are shared, and shared packs are read whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DedupScope {
    /// Each repository on its own.
    Repository,
    /// Repositories whose names have the same first part.
    #[default]
    Namespace,
    /// All of them: for registries whose users may see everything.
    All,
}

impl DedupScope {
    /// Whether one repository may use what the other has.
    pub(crate) fn joins(self, one: &Repo, other: &Repo) -> bool {
        match self {
            Self::Repository => one == other,
            Self::Namespace => one.as_str().split('/').next() == other.as_str().split('/').next(),
            Self::All => true,
        }
    }
}

impl FromStr for DedupScope {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        match text {
            "repository" => Ok(Self::Repository),
            "namespace" => Ok(Self::Namespace),
            "all" => Ok(Self::All),
            other => Err(RuleError::Scope(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(name: &str) -> Repo {
        name.parse().unwrap()
    }

    #[test]
    fn patterns_match_whole_parts_of_names() {
        for (text, name, expected) in [
            ("a", "a", true),
            ("a", "a/b", false),
            ("a/*", "a/b", true),
            ("a/*", "a", false),
            ("a/*", "a/b/c", false),
            ("*/b", "x/b", true),
            ("a/**", "a/b/c", true),
            ("a/**", "a", false),
            ("a/**", "ab/c", false),
            ("**", "a/b/c", true),
        ] {
            assert_eq!(matches(&pattern(text).unwrap(), &repo(name)), expected, "{text} {name}");
        }
        for text in ["", "a//b", "**/a", "a*", "A", "../a"] {
            assert!(pattern(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_no_rule_allows_is_refused_and_without_rules_users_may_everything() {
        let rule = |patterns: &str, who, actions: &[Action]| {
            Rule::new(&[patterns.to_owned()], vec![who], actions.to_vec()).unwrap()
        };
        let rules = [
            rule("public/**", Who::Anonymous, &[Action::Pull]),
            rule("team/*", Who::Users, &[Action::Pull]),
            rule("team/*", Who::User("alice".into()), &[Action::Push]),
        ];
        for (user, name, action, expected) in [
            (None, "public/a", Action::Pull, true),
            (Some("bob"), "public/a", Action::Pull, true),
            (None, "public/a", Action::Push, false),
            (None, "team/a", Action::Pull, false),
            (Some("bob"), "team/a", Action::Pull, true),
            (Some("bob"), "team/a", Action::Push, false),
            (Some("alice"), "team/a", Action::Push, true),
            (Some("alice"), "team/a", Action::Delete, false),
            (Some("alice"), "other", Action::Pull, false),
        ] {
            assert_eq!(allow(&rules, user, &repo(name), action), expected, "{user:?} {name} {action}");
        }
        assert!(allow(&[], Some("bob"), &repo("a"), Action::Delete));
        assert!(!allow(&[], None, &repo("a"), Action::Pull));
        assert!(admits_nobody(&rules) && !admits_nobody(&rules[1..]));
    }

    #[test]
    fn a_scope_joins_what_it_says() {
        let (one, near, far) = (repo("a/x"), repo("a/y"), repo("b/x"));
        let joined = |scope: DedupScope| [&one, &near, &far].map(|other| scope.joins(&one, other));
        assert_eq!(joined(DedupScope::Repository), [true, false, false]);
        assert_eq!(joined(DedupScope::Namespace), [true, true, false]);
        assert_eq!(joined(DedupScope::All), [true, true, true]);
    }
}
