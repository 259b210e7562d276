//! What goes wrong between two processes.

use std::time::Duration;

use lamina_image::Digest;

/// Why a registry did not answer as hoped. Every message names the URL, and what to do where that is known.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// No connection, or it broke. Another try may help.
    #[error("{url}: {reason}; is the registry running, and is this its address?")]
    Unreachable {
        /// What was asked.
        url: String,
        /// What the system said.
        reason: String,
    },
    /// No answer in time. Another try may help.
    #[error("{url}: no answer within {waited:?}")]
    Timeout {
        /// What was asked.
        url: String,
        /// How long it was waited.
        waited: Duration,
    },
    /// The registry wants to know who is asking. Another try will not help.
    #[error("{url}: {status}: {message}; {credential}")]
    Denied {
        /// What was asked.
        url: String,
        /// 401 or 403.
        status: u16,
        /// What the registry said.
        message: String,
        /// Whose credential was sent and where it came from, or where one was looked for.
        credential: String,
    },
    /// A credential is configured but cannot be had. Another try will not help.
    #[error("the credential for {host} cannot be had: {origin}: {reason}")]
    Credential {
        /// The registry.
        host: String,
        /// The file or the helper.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate, a key or an address that is configured for a registry cannot be used.
    #[error("{host} cannot be reached as it is configured: {reason}")]
    Configured {
        /// The registry.
        host: String,
        /// What is wrong, with the file's name.
        reason: String,
    },
    /// The registry does not have it. Another try will not help.
    #[error("{url}: not found: {message}")]
    NotFound {
        /// What was asked.
        url: String,
        /// What the registry said.
        message: String,
    },
    /// Any other refusal. Another try may help where the status is 429 or 5xx.
    #[error("{url}: {status}: {message}")]
    Status {
        /// What was asked.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the registry said.
        message: String,
    },
    /// The bytes are not those asked for. From another source they may be.
    #[error(
        "{url}: the registry sent other bytes than {digest}; something between here and there changes them"
    )]
    WrongBytes {
        /// What was asked.
        url: String,
        /// What it must hash to.
        digest: Digest,
    },
    /// More or fewer bytes than were asked for, or than are taken.
    #[error("{url}: {found} bytes came where {expected} were expected")]
    Length {
        /// What was asked.
        url: String,
        /// How many bytes were expected; at most, where nobody could know better.
        expected: u64,
        /// How many came before it was given up.
        found: u64,
    },
    /// The answer does not mean anything here. Another try will not help.
    #[error("{url}: the answer makes no sense: {reason}; is this an OCI registry?")]
    Answer {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Whoever answers there is neither a Lamina registry nor any other. Another try will not help.
    #[error(
        "{url} does not answer as a Lamina registry does, nor as any OCI registry: {reason}; is this its address?"
    )]
    NoRegistry {
        /// What was asked.
        url: String,
        /// How it answered.
        reason: String,
    },
    /// Plain HTTP is spoken on loopback, and elsewhere only on demand.
    #[error(
        "{0} answers no TLS and is not on loopback; if plain HTTP is what you want there, say --plain-http"
    )]
    PlainHttp(String),
}

impl WireError {
    /// Whether the same request may succeed if it is sent again.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::WrongBytes { .. }
            | Self::Length { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }

    /// Whether a registry has no such path, as far as one can tell: what one that is not Lamina's says to a question of ours.
    pub fn is_unserved(&self) -> bool {
        match self {
            Self::NotFound { .. } | Self::Answer { .. } => true,
            Self::Status { status, .. } => matches!(status, 400..=499) && *status != 429,
            _ => false,
        }
    }

    /// Whether the registry said that it does not have what was asked for.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}
