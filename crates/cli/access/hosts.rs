//! Directories with one directory a registry: containerd's `hosts.toml` (docs/hosts.md there), or certificates alone, as
//! docker and podman have them (containers-certs.d(5)).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use lamina_wire::{ClientCertificate, HostAccess};
use serde::Deserialize;

/// No such file is longer, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What directories say.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    /// What is special about single hosts.
    pub(super) special: BTreeMap<String, HostAccess>,
    /// Other hosts to read from first, by registry, in the file's order.
    pub(super) mirrors: BTreeMap<String, Vec<String>>,
}

/// Reads directories. One that does not exist has nothing to say.
pub(super) fn read(directories: &[PathBuf]) -> Result<Hosts> {
    let mut all = Hosts::default();
    for directory in directories {
        let named = || directory.display().to_string();
        let entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(named),
        };
        for entry in entries {
            let path = entry.with_context(named)?.path();
            if let Some(name) = path.file_name().and_then(OsStr::to_str).filter(|_| path.is_dir()) {
                registry(&registry_name(name), &path, &mut all)?;
            }
        }
    }
    Ok(all)
}

/// `host_5000_` stands for `host:5000` where file systems dislike colons.
fn registry_name(directory: &str) -> String {
    match directory.strip_suffix('_').and_then(|name| name.rsplit_once('_')) {
        Some((host, port)) if port.parse::<u16>().is_ok() => format!("{host}:{port}"),
        _ => directory.to_owned(),
    }
}

fn registry(name: &str, path: &Path, all: &mut Hosts) -> Result<()> {
    let file = path.join("hosts.toml");
    let found = match file.metadata() {
        Ok(metadata) if metadata.len() > FILE_BYTES_MAX => bail!("{}: it is too long", file.display()),
        Ok(_) => {
            let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let Said { hosts, mirrors } =
                parse(name, path, &text).with_context(|| file.display().to_string())?;
            if !mirrors.is_empty() {
                all.mirrors.entry(name.to_owned()).or_insert(mirrors);
            }
            hosts
        }
        Err(_) => vec![(name.to_owned(), certificates(path)?)],
    };
    for (host, access) in found {
        all.special.entry(host).or_insert(access);
    }
    Ok(())
}

/// `*.crt` are authorities, `*.cert` with `*.key` is who this machine is.
fn certificates(path: &Path) -> Result<HostAccess> {
    let mut access = HostAccess::default();
    for entry in std::fs::read_dir(path).with_context(|| path.display().to_string())? {
        let file = entry?.path();
        match file.extension().and_then(OsStr::to_str) {
            Some("crt") => access.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.exists() {
                    bail!("{} has no key {} beside it", file.display(), key.display());
                }
                access.client = Some(ClientCertificate { certificate: file, key });
            }
            _ => {}
        }
    }
    access.ca.sort();
    Ok(access)
}

#[derive(Deserialize)]
struct HostsFile {
    server: Option<String>,
    #[serde(flatten)]
    own: Settings,
    #[serde(default)]
    host: toml::Table,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Settings {
    ca: Option<OneOrMore>,
    client: Option<Client>,
    skip_verify: bool,
    /// What a host is used for; everything where it does not say.
    capabilities: Option<Vec<String>>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(PathBuf),
    More(Vec<PathBuf>),
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Client {
    /// Certificate and key in one file.
    One(PathBuf),
    /// The same, several; one is used.
    More(Vec<PathBuf>),
    /// Pairs of certificate and key.
    Pairs(Vec<Vec<PathBuf>>),
}

/// What one file says.
struct Said {
    /// The hosts that it is about, the registry itself the last of them.
    hosts: Vec<(String, HostAccess)>,
    /// Those to read from before it.
    mirrors: Vec<String>,
}

fn parse(name: &str, directory: &Path, text: &str) -> Result<Said> {
    let file: HostsFile = toml::from_str(text)?;
    let server = file.server.unwrap_or_else(|| format!("https://{name}"));
    let (own_host, base) = host_of(&server)?;
    let mut own = settings(&file.own, directory)?;
    own.server = Some(base.clone());
    let (mut found, mut mirrors) = (Vec::new(), Vec::new());
    for (url, one) in file.host {
        let (host, base_of_this) = host_of(&url)?;
        let one: Settings = one.try_into()?;
        let mut access = settings(&one, directory)?;
        if host == own_host {
            own = access;
            continue;
        }
        if one.capabilities.as_ref().is_none_or(|all| all.iter().any(|one| one == "pull")) {
            mirrors.push(base_of_this.clone());
        }
        access.server = Some(base_of_this);
        found.push((host, access));
    }
    own.server = Some(base);
    found.push((name.to_owned(), own));
    Ok(Said { hosts: found, mirrors })
}

/// `host[:port]` of a URL, and the URL without its path.
fn host_of(url: &str) -> Result<(String, String)> {
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
        None => ("https", url),
        _ => bail!("{url:?} is not an http:// or https:// URL"),
    };
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty() || host.contains(['@', ' ', '?', '#']) {
        bail!("{url:?} is not the URL of a host");
    }
    Ok((host.to_owned(), format!("{scheme}://{host}")))
}

fn settings(settings: &Settings, directory: &Path) -> Result<HostAccess> {
    let at = |path: &PathBuf| directory.join(path);
    let ca = match &settings.ca {
        None => Vec::new(),
        Some(OneOrMore::One(path)) => vec![at(path)],
        Some(OneOrMore::More(paths)) => paths.iter().map(at).collect(),
    };
    let pair = |certificate: &PathBuf, key: &PathBuf| ClientCertificate {
        certificate: at(certificate),
        key: if key.as_os_str().is_empty() { at(certificate) } else { at(key) },
    };
    let client = match &settings.client {
        None => None,
        Some(Client::One(path)) => Some(pair(path, path)),
        Some(Client::More(paths)) => paths.first().map(|path| pair(path, path)),
        Some(Client::Pairs(pairs)) => match pairs.first().map(Vec::as_slice) {
            None => None,
            Some([both]) => Some(pair(both, both)),
            Some([certificate, key]) => Some(pair(certificate, key)),
            Some(_) => bail!("client must be pairs of a certificate and a key"),
        },
    };
    Ok(HostAccess { server: None, ca, client, skip_verify: settings.skip_verify })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> BTreeMap<String, HostAccess> {
        parse("r.example:5000", Path::new("/d"), text).unwrap().hosts.into_iter().collect()
    }

    #[test]
    fn a_hosts_file_says_where_a_registry_is_whom_to_trust_and_who_we_are() {
        let all = parsed(
            r#"
            server = "https://real.example"
            ca = "own.crt"
            [host."https://mirror.example:8443/path"]
              capabilities = ["pull", "resolve"]
              ca = ["a.crt", "/abs/b.crt"]
              client = [["c.cert", "c.key"], ["d.pem", ""]]
            [host."http://plain.example"]
              skip_verify = true
              client = "both.pem"
            "#,
        );
        let own = &all["r.example:5000"];
        assert_eq!(own.server.as_deref(), Some("https://real.example"));
        assert_eq!(own.ca, [PathBuf::from("/d/own.crt")]);
        let mirror = &all["mirror.example:8443"];
        assert_eq!(mirror.ca, [PathBuf::from("/d/a.crt"), PathBuf::from("/abs/b.crt")]);
        let client = mirror.client.as_ref().unwrap();
        assert_eq!((&client.certificate, &client.key), (&"/d/c.cert".into(), &"/d/c.key".into()));
        let plain = &all["plain.example"];
        assert!(plain.skip_verify && plain.server.as_deref() == Some("http://plain.example"));
        assert_eq!(plain.client.as_ref().unwrap().key, PathBuf::from("/d/both.pem"));
    }

    #[test]
    fn a_host_entry_for_the_server_itself_is_about_the_server() {
        let all = parsed(
            "server = \"https://r.example:5000\"\n[host.\"https://r.example:5000\"]\nca = \"x.crt\"\n",
        );
        assert_eq!(all.len(), 1);
        assert_eq!(all["r.example:5000"].ca, [PathBuf::from("/d/x.crt")]);
        assert_eq!(parsed("")["r.example:5000"].server.as_deref(), Some("https://r.example:5000"));
    }

    #[test]
    fn mirrors_are_read_from_in_the_order_of_the_file() {
        let text = r#"
            [host."https://z.example"]
            [host."http://a.example:5000"]
              capabilities = ["pull"]
            [host."https://push.example"]
              capabilities = ["push"]
        "#;
        let mirrors = parse("r.example", Path::new("/d"), text).unwrap().mirrors;
        assert_eq!(mirrors, ["https://z.example", "http://a.example:5000"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in
            ["server = 1", "server = \"ftp://x\"", "[host.\"https://\"]", "[host.\"https://u@h\"]", "ca = 1"]
        {
            assert!(parse("r", Path::new("/d"), text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_port_may_stand_between_underscores() {
        for (directory, name) in
            [("r_5000_", "r:5000"), ("r:5000", "r:5000"), ("a_b", "a_b"), ("a_b_", "a_b_")]
        {
            assert_eq!(registry_name(directory), name);
        }
    }

    #[test]
    fn certificates_alone_are_read_as_docker_keeps_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.example");
        std::fs::create_dir(&path).unwrap();
        for name in ["b.crt", "a.crt", "c.cert", "c.key", "other"] {
            std::fs::write(path.join(name), "").unwrap();
        }
        let all = read(&[directory.path().to_owned(), "/does/not/exist".into()]).unwrap();
        let access = &all.special["r.example"];
        assert_eq!(access.ca, [path.join("a.crt"), path.join("b.crt")]);
        assert_eq!(access.client.as_ref().unwrap().key, path.join("c.key"));
        std::fs::remove_file(path.join("c.key")).unwrap();
        assert!(read(&[directory.path().to_owned()]).unwrap_err().to_string().contains("no key"));
    }
}
