//! Users from an htpasswd file, whose passwords are hashed by bcrypt.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Passwords that are checked at the same time: each takes a core for some 50 ms to a second.
const CHECKS_MAX: usize = 2;
/// A password that was right is right for so long without being checked again, unless the file changes.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Of those, that are remembered.
const REMEMBERED_MAX: usize = 1_000;
/// What an unknown user's password is checked against where the file has no users. Nobody's hash.
const NOBODY: &str = "$2b$10$auS8oS7bM0XxCexnTZvuRewbfpiwYeiOwwqPkue2Dc6lF7UqPpfY.";
/// A hash that takes longer than this one's two to the power of cost, about ten seconds, would stop all logins.
const COST_MAX: u32 = 17;
/// A Basic credential is at most this long, in bytes of base64.
const BASIC_BYTES_MAX: usize = 4 << 10;

/// Why there are no users.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// The file cannot be read.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: std::io::Error,
    },
    /// A line is no user with a bcrypt hash.
    #[error("{path}, line {line}: not `user:` and a bcrypt hash of cost 4 to 17; make it by `htpasswd -B`")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
    },
}

/// The users of a file, which is read again when it changes.
pub struct Users {
    path: PathBuf,
    state: Mutex<State>,
    checks: Semaphore,
    /// Makes what is remembered worthless elsewhere.
    salt: [u8; 16],
}

struct State {
    hashes: Arc<HashMap<String, String>>,
    changed: Option<SystemTime>,
    remembered: HashMap<[u8; 32], Instant>,
}

impl std::fmt::Debug for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Users({})", self.path.display())
    }
}

impl Users {
    /// Reads the file. Blocks.
    pub fn open(path: PathBuf) -> Result<Self, UsersError> {
        let (hashes, changed) = (read(&path)?, changed(&path));
        let state = State { hashes: Arc::new(hashes), changed, remembered: HashMap::new() };
        let salt = *uuid::Uuid::new_v4().as_bytes();
        Ok(Self { path, state: Mutex::new(state), checks: Semaphore::new(CHECKS_MAX), salt })
    }

    /// Whether this password was right a short time ago.
    pub(super) fn is_remembered(&self, user: &str, password: &str) -> bool {
        let key = self.key(user, password);
        let changed = changed(&self.path);
        let mut state = self.state.lock();
        if state.changed != changed {
            return false;
        }
        let fresh = state.remembered.get(&key).is_some_and(|since| since.elapsed() < REMEMBERED);
        if !fresh {
            state.remembered.remove(&key);
        }
        fresh
    }

    /// Waits until a password may be checked.
    pub(super) async fn turn(&self) -> SemaphorePermit<'_> {
        self.checks.acquire().await.expect("never closed")
    }

    /// Whether this is a user and the password is right. Takes as long for a user who is none.
    pub(super) async fn verify(&self, user: &str, password: &str, _turn: SemaphorePermit<'_>) -> bool {
        self.refresh();
        let hashes = Arc::clone(&self.state.lock().hashes);
        let found = hashes.get(user).cloned();
        let known = found.is_some();
        let hash = found.unwrap_or_else(|| decoy(&hashes));
        let checked = password.to_owned();
        let right =
            tokio::task::spawn_blocking(move || bcrypt::verify(checked, &hash).unwrap_or(false)).await;
        let right = known && right.expect("checking a password does not panic");
        if right {
            let mut state = self.state.lock();
            if state.remembered.len() >= REMEMBERED_MAX {
                state.remembered.clear();
            }
            state.remembered.insert(self.key(user, password), Instant::now());
        }
        right
    }

    fn key(&self, user: &str, password: &str) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(self.salt);
        hasher.update(user.len().to_le_bytes());
        hasher.update(user);
        hasher.update(password);
        hasher.finalize().into()
    }

    /// Reads the file again where it has changed. One that cannot be read changes nothing.
    fn refresh(&self) {
        let changed = changed(&self.path);
        if self.state.lock().changed == changed {
            return;
        }
        match read(&self.path) {
            Ok(hashes) => {
                let mut state = self.state.lock();
                *state = State { hashes: Arc::new(hashes), changed, remembered: HashMap::new() };
                tracing::info!(path = %self.path.display(), "users were read again");
            }
            Err(error) => tracing::error!(%error, "users stay as they were"),
        }
    }
}

/// The hash in the file that takes longest to check: a wrong password costs no less for an unknown user.
fn decoy(hashes: &HashMap<String, String>) -> String {
    hashes.values().max_by_key(|hash| cost(hash)).map_or_else(|| NOBODY.to_owned(), String::clone)
}

fn cost(hash: &str) -> Option<u32> {
    hash.get(4..6)?.parse().ok()
}

fn changed(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|metadata| metadata.modified()).ok()
}

fn read(path: &Path) -> Result<HashMap<String, String>, UsersError> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| UsersError::File { path: path.to_owned(), error })?;
    parse(&text).map_err(|line| UsersError::Line { path: path.to_owned(), line })
}

/// *Errors*: the number of the line that is wrong.
fn parse(text: &str) -> Result<HashMap<String, String>, usize> {
    let mut users = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (user, hash) = line.split_once(':').ok_or(number + 1)?;
        let is_bcrypt = ["$2a$", "$2b$", "$2x$", "$2y$"].iter().any(|kind| hash.starts_with(kind));
        let affordable = cost(hash).is_some_and(|cost| (4..=COST_MAX).contains(&cost));
        if user.is_empty() || !is_bcrypt || hash.len() != 60 || !affordable {
            return Err(number + 1);
        }
        users.insert(user.to_owned(), hash.to_owned());
    }
    Ok(users)
}

/// User and password of a Basic credential.
pub(super) fn basic(text: &str) -> Option<(String, String)> {
    let text = Some(text.trim()).filter(|text| text.len() <= BASIC_BYTES_MAX)?;
    let decoded = String::from_utf8(BASE64_STANDARD.decode(text).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    (!user.is_empty()).then(|| (user.to_owned(), password.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `alice` and `secret`.
    const ALICE: &str = "alice:$2b$05$xwugU7Y2yEN0A9Hdu6PhIO7upbuPROJSi6Mf6mzmXWQVTNXxZ8bdG";

    #[tokio::test]
    async fn a_password_is_checked_and_a_changed_file_counts_at_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("# people\n\n{ALICE}\n")).unwrap();
        let users = Users::open(file.path().to_owned()).unwrap();
        let verified =
            async |user: &str, password: &str| users.verify(user, password, users.turn().await).await;
        assert!(!users.is_remembered("alice", "secret"));
        assert!(verified("alice", "secret").await && users.is_remembered("alice", "secret"));
        for (user, password) in [("alice", "wrong"), ("bob", "secret"), ("", ""), ("alice", "")] {
            assert!(!verified(user, password).await, "{user} {password}");
        }
        std::fs::write(file.path(), ALICE.replace("alice", "bob")).unwrap();
        file.as_file().set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
        assert!(!users.is_remembered("alice", "secret") && !verified("alice", "secret").await);
        assert!(verified("bob", "secret").await);
        // a broken file locks nobody out
        std::fs::write(file.path(), "nonsense").unwrap();
        file.as_file().set_modified(SystemTime::now() + Duration::from_secs(9)).unwrap();
        assert!(verified("bob", "secret").await);
    }

    #[test]
    fn lines_that_are_no_bcrypt_are_named() {
        for (text, line) in [
            ("x", 1),
            ("\na:{SHA}x", 2),
            ("a:$apr1$x$y", 1),
            (":$2b$", 1),
            ("a:$2b$05$short", 1),
            (&ALICE.replace("$05$", "$31$"), 1),
        ] {
            assert_eq!(parse(text), Err(line), "{text}");
        }
        assert_eq!(parse(ALICE).unwrap().len(), 1);
    }

    #[test]
    fn the_hash_of_nobody_is_a_hash() {
        assert!(!bcrypt::verify("x", NOBODY).unwrap());
    }

    #[test]
    fn credentials_that_are_none_are_none() {
        assert_eq!(basic("YWxpY2U6YTpi"), Some(("alice".into(), "a:b".into())));
        for text in ["", "!", "YWxpY2U=", "OnNlY3JldA==", "/w==", &"A".repeat(8192)] {
            assert_eq!(basic(text), None, "{text}");
        }
    }
}
