//! What this machine already has configured for registries: logins, certificates, proxies. The environment is read here.

mod hosts;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use lamina_wire::{Access, CredentialFiles, ProxySettings};

use crate::args::Common;

/// Where containerd, docker and podman keep what is special about registries, the first that knows one counting.
const HOSTS_DIRS: [&str; 3] = ["/etc/containerd/certs.d", "/etc/containers/certs.d", "/etc/docker/certs.d"];

/// How registries are reached from here. Reads directories and small files.
pub(crate) fn access(common: &Common) -> Result<Arc<Access>> {
    let files = common.auth_file.clone().map_or_else(auth_files, |file| vec![file]);
    Ok(Arc::new(Access {
        credentials: CredentialFiles { files },
        ca: common.ca.clone().into_iter().collect(),
        hosts: hosts::read(&hosts_dirs(common))?.special,
        proxy: proxies(),
    }))
}

/// Which other hosts have what a registry has, as the same directories say.
pub(crate) fn mirrors(common: &Common) -> Result<BTreeMap<String, Vec<String>>> {
    Ok(hosts::read(&hosts_dirs(common))?.mirrors)
}

fn hosts_dirs(common: &Common) -> Vec<PathBuf> {
    match &common.hosts_dir {
        Some(directory) => vec![directory.clone()],
        None => HOSTS_DIRS.iter().map(PathBuf::from).collect(),
    }
}

/// Auth files in the order of containers-auth.json(5); docker's own goes first where DOCKER_CONFIG asks for it.
fn auth_files() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(file) = variable("REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let home = variable("HOME");
    let user = rustix::process::geteuid().as_raw();
    let runtime = variable("XDG_RUNTIME_DIR").map(|directory| directory.join("containers"));
    let config = variable("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|home| home.join(".config")));
    let files = [
        variable("DOCKER_CONFIG").map(|directory| directory.join("config.json")),
        Some(runtime.unwrap_or_else(|| format!("/run/containers/{user}").into()).join("auth.json")),
        config.map(|directory| directory.join("containers/auth.json")),
        home.map(|home| home.join(".docker/config.json")),
    ];
    files.into_iter().flatten().collect()
}

/// As curl reads them: HTTP_PROXY counts in lower case only, since servers set it from a header named Proxy.
fn proxies() -> ProxySettings {
    let variable = |names: &[&str]| {
        let mut values = names.iter().filter_map(|name| std::env::var_os(name)?.into_string().ok());
        values.find(|value| !value.is_empty()).unwrap_or_default()
    };
    ProxySettings {
        http: variable(&["http_proxy", "all_proxy", "ALL_PROXY"]),
        https: variable(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]),
        no: variable(&["no_proxy", "NO_PROXY"]),
    }
}
