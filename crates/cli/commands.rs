//! One file a command.

mod artifact;
pub(crate) mod doctor;
pub(crate) mod fsck;
pub(crate) mod gc;
pub(crate) mod inside;
pub(crate) mod inspect;
pub(crate) mod mount;
pub(crate) mod node;
pub(crate) mod pin;
pub(crate) mod prefetch;
pub(crate) mod profile;
pub(crate) mod push;
pub(crate) mod registry;
pub(crate) mod run;
mod signals;
pub(crate) mod stats;

use anyhow::Result;
use clap::CommandFactory;
use lamina_wire::{ClientConfig, Scheme};
use tokio::signal::unix::{SignalKind, signal};

use crate::access::access;
use crate::args::{Arguments, Common, CompletionsArguments};

/// Somebody pressed Ctrl-C, and everything was cleaned up.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// A program that was run for the user ended with this code, which becomes our own. It has said why itself.
#[derive(Debug, thiserror::Error)]
#[error("the command ended with {0}")]
pub(crate) struct Ended(pub(crate) u8);

/// Ready at Ctrl-C or SIGTERM. These do nothing by themselves from this call on, whether what it gives is awaited or not; it must
/// be within a runtime.
pub(crate) fn interrupted() -> impl Future<Output = ()> {
    let watched = |kind| signal(kind).expect("signals can be watched");
    let (mut interrupt, mut terminate) = (watched(SignalKind::interrupt()), watched(SignalKind::terminate()));
    async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

/// How to speak to registries.
pub(crate) fn client_config(common: &Common) -> Result<ClientConfig> {
    let scheme = match (common.plain_http, &common.ca) {
        (true, _) => Scheme::PlainHttp,
        (false, Some(_)) => Scheme::Tls,
        (false, None) => Scheme::Automatic,
    };
    Ok(ClientConfig { scheme, access: access(common)?, ..ClientConfig::default() })
}

pub(crate) fn completions(arguments: CompletionsArguments) -> Result<()> {
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "lamina", &mut std::io::stdout());
    Ok(())
}

/// Bytes for a person, in MiB.
pub(crate) fn mib(bytes: u64) -> String {
    let tenths = bytes * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}
