//! Registries: whether they answer, whether they know us, and what time they have.

use std::time::{Duration, Instant, SystemTime};

use lamina_wire::{Client, ClientConfig, Reference, WireError};

use super::Check;

/// A registry that does not answer in this time is called absent.
const ANSWER: Duration = Duration::from_secs(5);
/// Certificates and tokens begin to be refused at a few minutes.
const SKEW: Duration = Duration::from_secs(60);

/// Looks at a registry `host[:port]`, or at an image on it.
pub(super) async fn checks(name: &str, config: ClientConfig) -> Vec<Check> {
    let image: Option<Reference> = name.contains('/').then(|| name.parse().ok()).flatten();
    let host = image.as_ref().map_or(name, |image| &image.host);
    let config = ClientConfig { connect: ANSWER, answer: ANSWER, tries: 1, ..config };
    let client = match Client::new(host, config) {
        Ok(client) => client,
        Err(error) => return vec![Check::bad("registry", error.to_string(), "install ca-certificates")],
    };
    let begun = Instant::now();
    let pong = match client.ping().await {
        Ok(pong) => pong,
        Err(error) => {
            let advice = "see that it runs, that the name resolves, and that a firewall lets it through";
            return vec![Check::bad("registry", error.to_string(), advice)];
        }
    };
    let ms = begun.elapsed().as_millis();
    let mut checks = vec![Check::ok("registry", format!("{} answered in {ms} ms", client.base()))];
    if let Some(theirs) = pong.date {
        checks.push(clock(host, theirs));
    }
    checks.extend(credentials(&client, image.as_ref(), pong.status).await);
    checks
}

fn clock(host: &str, theirs: SystemTime) -> Check {
    let ours = SystemTime::now();
    let skew = ours.duration_since(theirs).or_else(|_| theirs.duration_since(ours)).unwrap_or_default();
    let found = format!("{} s from {host}'s", skew.as_secs());
    match skew > SKEW {
        true => Check::bad("clock", found, "set it: certificates and tokens are refused by their dates"),
        false => Check::ok("clock", found),
    }
}

async fn credentials(client: &Client, image: Option<&Reference>, status: u16) -> Option<Check> {
    let Some(image) = image else {
        return (status == 401).then(|| {
            let advice = "name an image on it to see whether this machine's credentials open it";
            Check::ok("credentials", format!("{} wants some; {advice}", client.base()))
        });
    };
    Some(match client.manifest(&image.repository, &image.version).await {
        Ok(found) => Check::ok("credentials", format!("{image} can be read, it is {}", found.digest)),
        Err(error @ WireError::Denied { .. }) => Check::bad(
            "credentials",
            error.to_string(),
            "log in: `docker login`, `podman login` or `skopeo login`",
        ),
        Err(error) => Check::bad("image", error.to_string(), "push it, or see how it is spelt"),
    })
}
