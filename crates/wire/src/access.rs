//! What it takes to be let in somewhere: credentials, certificates, the way through a proxy. All of it is handed in.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::credentials::CredentialFiles;

/// How registries are reached, for all of them.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Where to look for credentials when a registry asks for one.
    pub credentials: CredentialFiles,
    /// PEM files with certificates that are trusted beside the system's.
    pub ca: Vec<PathBuf>,
    /// What is special about single registries, by `host[:port]`.
    pub hosts: BTreeMap<String, HostAccess>,
    /// The way out.
    pub proxy: ProxySettings,
}

/// What is special about one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostAccess {
    /// `http[s]://host[:port]`, where it is not what the registry's name says.
    pub server: Option<String>,
    /// PEM files with certificates that are trusted for it.
    pub ca: Vec<PathBuf>,
    /// Who this machine is to it.
    pub client: Option<ClientCertificate>,
    /// Whether its certificate may be anything.
    pub skip_verify: bool,
}

/// PEM files of a certificate and its key; they may be the same file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, and those that lead from it to its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Proxies as `http://[user:password@]host:port`, empty for none. Loopback addresses are never asked for through one.
#[derive(Clone, Default)]
pub struct ProxySettings {
    /// For `http://` URLs.
    pub http: String,
    /// For `https://` URLs.
    pub https: String,
    /// Names, domains, addresses and networks to reach without one, with commas between them.
    pub no: String,
}

impl std::fmt::Debug for ProxySettings {
    /// Without the proxies, which may hold passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProxySettings").field("no", &self.no).finish_non_exhaustive()
    }
}
