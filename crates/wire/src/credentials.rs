//! Credentials as docker, podman and skopeo keep them: auth files, and the helpers that these name.
//!
//! Files are read each time when a registry asks who is there: a node lives longer than a login. Formats:
//! containers-auth.json(5), and docker's `config.json` (docker CLI reference, "Credential helpers").

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::HeaderValue;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;

/// No auth file is longer, in bytes: some thousand logins.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// A helper that asks a person or a locked keychain may take its time; one that hangs must not hang a mount.
const HELPER: Duration = Duration::from_secs(20);
/// What docker files Docker Hub under.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// What a helper says, on stdout and with exit code 1, where it has none
/// (github.com/docker/docker-credential-helpers, "Development").
const NOT_FOUND: &str = "credentials not found";
/// The user name under which a helper hands out an identity token.
const TOKEN_USER: &str = "<token>";

/// Where credentials are looked for.
#[derive(Clone, Debug, Default)]
pub struct CredentialFiles {
    /// In this order; those that do not exist are passed over.
    pub files: Vec<PathBuf>,
}

/// Who to be for a registry. Its `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Credential {
    pub(crate) secret: Secret,
    /// Whose it is and where it comes from, for messages.
    pub(crate) origin: String,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Secret {
    Password {
        user: String,
        password: String,
    },
    /// A refresh token of OAuth 2.
    Identity(String),
    /// A bearer token that needs no token server.
    Bearer(String),
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credential({})", self.origin)
    }
}

impl Credential {
    /// The value of an `Authorization` header that needs no token server; `None` for an identity token.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let text = match &self.secret {
            Secret::Password { user, password } => {
                format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")))
            }
            Secret::Bearer(token) => format!("Bearer {token}"),
            Secret::Identity(_) => return None,
        };
        sensitive(&text)
    }
}

/// A header value that is never logged. `None` where the text cannot be one.
pub(crate) fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Why a credential that is configured cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {reason}")]
pub(crate) struct CredentialError {
    pub(crate) origin: String,
    pub(crate) reason: String,
}

impl CredentialFiles {
    /// The credential for a repository: the most specific entry of the first file that has one.
    pub(crate) async fn find(
        &self,
        host: &str,
        repository: &str,
    ) -> Result<Option<Credential>, CredentialError> {
        for path in &self.files {
            let failed = |reason: String| CredentialError { origin: path.display().to_string(), reason };
            let bytes = match read(path).await {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error.to_string())),
            };
            let file: AuthFile = serde_json::from_slice(&bytes)
                .map_err(|error| failed(format!("it is not an auth file: {error}")))?;
            match file.find(host, repository).map_err(|reason| failed(reason.to_owned()))? {
                Some(Found::Secret(secret)) => return Ok(Some(named(secret, &path.display().to_string()))),
                Some(Found::Helper { name, asked }) => {
                    if let Some(credential) = ask_helper(&name, &asked, path).await? {
                        return Ok(Some(credential));
                    }
                }
                None => {}
            }
        }
        Ok(None)
    }

    /// For messages: where a credential was looked for.
    pub(crate) fn places(&self) -> String {
        let paths: Vec<String> = self.files.iter().map(|path| path.display().to_string()).collect();
        if paths.is_empty() { "no auth file is set".to_owned() } else { paths.join(", ") }
    }
}

fn named(secret: Secret, place: &str) -> Credential {
    let origin = match &secret {
        Secret::Password { user, .. } => format!("the credential of {user:?} from {place}"),
        Secret::Identity(_) => format!("the identity token from {place}"),
        Secret::Bearer(_) => format!("the registry token from {place}"),
    };
    Credential { secret, origin }
}

async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    use tokio::io::AsyncReadExt;
    let file = tokio::fs::File::open(path).await?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(std::io::Error::other(format!("it is longer than {FILE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// The file as docker and podman write it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AuthFile {
    auths: BTreeMap<String, Option<AuthEntry>>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    /// Base64 of `user:password`.
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

impl std::fmt::Debug for AuthEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthEntry")
    }
}

/// What a file says of a repository.
#[derive(PartialEq, Eq)]
enum Found {
    Secret(Secret),
    Helper { name: String, asked: String },
}

impl std::fmt::Debug for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Secret(_)) { "Secret" } else { "Helper" })
    }
}

impl AuthFile {
    /// A helper of the registry goes first, then entries from `host/name/space` up to `host`, then the helper of all.
    fn find(&self, host: &str, repository: &str) -> Result<Option<Found>, &'static str> {
        let hub = ["docker.io", "index.docker.io", "registry-1.docker.io"].contains(&host);
        let asked = if hub { DOCKER_HUB } else { host };
        let helper = |name: &String| Found::Helper { name: name.clone(), asked: asked.to_owned() };
        if let Some(name) = self.helpers.get(host).or_else(|| self.helpers.get(asked)) {
            return Ok(Some(helper(name)));
        }
        let mut name = format!("{host}/{repository}");
        loop {
            if let Some(Some(entry)) = self.auths.get(&name)
                && let Some(secret) = entry.secret()?
            {
                return Ok(Some(Found::Secret(secret)));
            }
            match name.rfind('/') {
                Some(end) => name.truncate(end),
                None => break,
            }
        }
        // docker has had URLs for keys
        let same = |key: &str| {
            let bare = key.trim_start_matches("https://").trim_start_matches("http://");
            bare.split('/').next() == Some(host) && key.contains("://") || key == asked
        };
        let old = self.auths.iter().filter(|(key, _)| same(key)).filter_map(|(_, entry)| entry.as_ref());
        for entry in old {
            if let Some(secret) = entry.secret()? {
                return Ok(Some(Found::Secret(secret)));
            }
        }
        Ok((!self.store.is_empty()).then(|| helper(&self.store)))
    }
}

impl AuthEntry {
    /// `None` where the entry is empty, as docker leaves it where a helper has the secret.
    fn secret(&self) -> Result<Option<Secret>, &'static str> {
        if !self.registrytoken.is_empty() {
            return Ok(Some(Secret::Bearer(self.registrytoken.clone())));
        }
        if !self.identitytoken.is_empty() {
            return Ok(Some(Secret::Identity(self.identitytoken.clone())));
        }
        if !self.username.is_empty() {
            let (user, password) = (self.username.clone(), self.password.clone());
            return Ok(Some(Secret::Password { user, password }));
        }
        if self.auth.is_empty() {
            return Ok(None);
        }
        let wrong = "an entry's auth is not the base64 of user:password";
        let decoded = BASE64_STANDARD.decode(self.auth.trim()).map_err(|_| wrong)?;
        let decoded = String::from_utf8(decoded).map_err(|_| wrong)?;
        let (user, password) = decoded.split_once(':').ok_or(wrong)?;
        let (user, password) = (user.to_owned(), password.trim_end_matches('\0').to_owned());
        Ok(Some(Secret::Password { user, password }))
    }
}

/// Runs `docker-credential-<name> get`.
async fn ask_helper(name: &str, asked: &str, file: &Path) -> Result<Option<Credential>, CredentialError> {
    let program = format!("docker-credential-{name}");
    let origin = format!("{program}, which {} names", file.display());
    let failed = |reason: String| CredentialError { origin: origin.clone(), reason };
    if name.is_empty() || name.contains('/') {
        return Err(failed("this is no name of a helper".to_owned()));
    }
    let run = async {
        let mut child = tokio::process::Command::new(&program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut stdin = child.stdin.take().expect("it is piped");
        // a helper that ends without reading is heard all the same
        let _ = stdin.write_all(asked.as_bytes()).await;
        drop(stdin);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(HELPER, run).await;
    let output = output.map_err(|_| failed(format!("it did not answer within {HELPER:?}")))?;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said: String = String::from_utf8_lossy(&output.stdout).chars().take(200).collect();
        let said = said.trim();
        return if said.starts_with(NOT_FOUND) {
            Ok(None)
        } else {
            Err(failed(format!("it failed: {said}")))
        };
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let answer: Result<Answer, _> = serde_json::from_slice(&output.stdout);
    let Answer { username, secret } =
        answer.map_err(|error| failed(format!("its answer does not parse: {error}")))?;
    let secret = match username == TOKEN_USER {
        true => Secret::Identity(secret),
        false => Secret::Password { user: username, password: secret },
    };
    Ok(Some(named(secret, &program)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(text: &str) -> AuthFile {
        serde_json::from_str(text).unwrap()
    }

    fn user(found: Option<Found>) -> String {
        match found {
            Some(Found::Secret(Secret::Password { user, password })) => format!("{user}:{password}"),
            Some(Found::Secret(Secret::Identity(token))) => format!("identity {token}"),
            Some(Found::Secret(Secret::Bearer(token))) => format!("bearer {token}"),
            Some(Found::Helper { name, asked }) => format!("{name} for {asked}"),
            None => "nobody".to_owned(),
        }
    }

    #[test]
    fn the_most_specific_entry_counts_and_a_helper_of_the_registry_before_all() {
        let encoded = |text: &str| BASE64_STANDARD.encode(text);
        let text = format!(
            r#"{{"auths": {{
                "r.example": {{"auth": "{}"}},
                "r.example/team": {{"auth": "{}"}},
                "r.example/team/torch": {{"username": "torch", "password": "p"}},
                "https://old.example/v1/": {{"auth": "{}"}},
                "https://index.docker.io/v1/": {{"auth": "{}"}},
                "token.example": {{"identitytoken": "i"}},
                "bearer.example": {{"registrytoken": "b"}},
                "empty.example": {{}}, "null.example": null
            }}, "credHelpers": {{"helped.example": "pass"}}, "credsStore": "all"}}"#,
            encoded("host:p"),
            encoded("team:p:with:colons"),
            encoded("old:p"),
            encoded("hub:p"),
        );
        let file = file(&text);
        for (host, repository, expected) in [
            ("r.example", "a", "host:p"),
            ("r.example", "teams/a", "host:p"),
            ("r.example", "team/a/b", "team:p:with:colons"),
            ("r.example", "team/torch", "torch:p"),
            ("old.example", "a", "old:p"),
            ("docker.io", "library/debian", "hub:p"),
            ("token.example", "a", "identity i"),
            ("bearer.example", "a", "bearer b"),
            ("helped.example", "a", "pass for helped.example"),
            ("empty.example", "a", "all for empty.example"),
            ("null.example", "a", "all for null.example"),
            ("example", "a", "all for example"),
        ] {
            assert_eq!(user(file.find(host, repository).unwrap()), expected, "{host}/{repository}");
        }
    }

    #[test]
    fn an_entry_that_is_garbage_is_an_error_and_shows_nothing_of_it() {
        for auth in ["!", "YQ==", "/w=="] {
            let file = file(&format!(r#"{{"auths": {{"r": {{"auth": "{auth}"}}}}}}"#));
            let error = file.find("r", "a").unwrap_err();
            assert!(error.contains("user:password") && !error.contains(auth), "{error}");
        }
        let credential = named(Secret::Password { user: "u".into(), password: "secret".into() }, "f");
        assert!(!format!("{credential:?} {:?}", credential.header()).contains("secret"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>, host in "[a-z./:]{0,20}", name in "[a-z/]{0,20}") {
            if let Ok(file) = serde_json::from_slice::<AuthFile>(&bytes) {
                let _ = file.find(&host, &name);
            }
        }
    }
}
