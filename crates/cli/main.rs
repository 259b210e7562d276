//! `lamina`: registry, node and command line in one binary.

mod access;
mod args;
mod commands;
mod config;
mod progress;
mod source;
mod spans;

use std::io::IsTerminal;
use std::process::ExitCode;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::args::{Arguments, Command, LogFormat};
use crate::spans::Spans;

/// Something went wrong.
const FAILED: u8 = 1;
/// The same where the usual code could be the program's: as docker has it.
const RUN_FAILED: u8 = 125;
/// Ended by Ctrl-C or SIGTERM, as shells count it.
const INTERRUPTED: u8 = 130;
/// Ended by SIGPIPE, as shells count it.
const CLOSED_PIPE: i32 = 141;
/// Buffers from this size on, in bytes, are mappings of their own: those of a mount's event loops (16 MiB each) are, and those
/// of frames and requests (up to 1 MiB, many a second) are not.
const MAPPED_BYTES_MIN: libc::c_int = 4 << 20;

fn main() -> ExitCode {
    end_at_closed_pipes();
    let arguments = match config::parse() {
        Ok(arguments) => arguments,
        Err(error) => return complain(&error, FAILED),
    };
    if matches!(arguments.command, Command::Mount(_) | Command::Node(_)) {
        give_large_buffers_back();
    }
    let runs = matches!(arguments.command, Command::Run(_) | Command::Inside(_));
    let failure = if runs { RUN_FAILED } else { FAILED };
    // a holder does next to nothing, and must not be in the way; an init may have but one thread; who asks a daemon needs no other
    let mut runtime = match &arguments.command {
        Command::Inside(_) => tokio::runtime::Builder::new_current_thread(),
        Command::Node(node) if !node.held => tokio::runtime::Builder::new_current_thread(),
        Command::Mount(mount) if !mount.foreground => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.enable_all().build();
    let result = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let spans = Spans::start(&arguments, runtime.handle())?;
        start_logging(&arguments, spans.as_ref());
        let result = runtime.block_on(run(arguments));
        if let Some(spans) = spans {
            spans.end();
        }
        // threads that still read a slow disk or network must not hold the end up; nor is the runtime taken away from
        // under them, which would make them panic: they end with the process
        std::mem::forget(runtime);
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<commands::Interrupted>() => {
            eprintln!("lamina: interrupted");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => match error.downcast_ref::<commands::Ended>() {
            Some(ended) => ExitCode::from(ended.0),
            None => complain(&error, failure),
        },
    }
}

/// Free memory at the end of a heap beyond this, in bytes, goes back to the kernel: enough for what comes and goes all the time.
const TRIMMED_BYTES_MIN: libc::c_int = 16 << 20;

/// Heaps that threads share. glibc makes up to eight for each core, and a buffer that is allocated in one thread and freed in another
/// leaves a hole in each.
const HEAPS_MAX: libc::c_int = 2;

/// Keeps glibc from raising the size from which buffers are mappings of their own, as it does whenever one is freed
/// (mallopt(3), `M_MMAP_THRESHOLD`). Beyond it the buffers of a mount come from the heap of whichever thread makes it, and
/// what is freed there stays: 100 MiB after some hundred mounts. Elsewhere (a push, a registry) glibc may: large buffers come and go
/// all the time there, and mapping each anew costs a tenth of a push. And keeps it from making a heap for each thread: four starts
/// of torch left 270 MiB in twelve of them.
fn give_large_buffers_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "a setting of the C library")]
    // SAFETY: mallopt takes numbers only, and no other thread runs yet
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS_MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
        // setting one keeps the other at its start, 128 KiB
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIMMED_BYTES_MIN);
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let common = arguments.common;
    match arguments.command {
        Command::Registry(it) => commands::registry::run(it, common).await,
        Command::Push(it) => commands::push::run(it, common).await,
        Command::Mount(it) => commands::mount::run(it, common).await,
        Command::Unmount(it) => commands::mount::unmount(it).await,
        Command::Run(it) => commands::run::run(it, common).await,
        Command::Inside(it) => commands::inside::init(it).await,
        Command::Node(it) => commands::node::run(it, common).await,
        Command::Inspect(it) => commands::inspect::run(it, common).await,
        Command::Stats(it) => commands::stats::run(it).await,
        Command::Prefetch(it) => commands::prefetch::run(it, common).await,
        Command::Pin(it) => commands::pin::run(it, common).await,
        Command::Doctor(it) => commands::doctor::run(it, common).await,
        Command::Profile(it) => commands::profile::run(it, common).await,
        Command::Gc(it) => commands::gc::run(it, common).await,
        Command::Fsck(it) => commands::fsck::run(it, common).await,
        Command::Completions(it) => commands::completions(it),
    }
}

/// Says what went wrong, once, with its causes unless a message already contains the next.
fn complain(error: &anyhow::Error, code: u8) -> ExitCode {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if message.is_empty() {
            message = cause;
        } else if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    eprintln!("lamina: {message}");
    let unstarted = error.downcast_ref::<commands::inside::Unstarted>();
    ExitCode::from(unstarted.map_or(code, |unstarted| unstarted.code))
}

fn start_logging(arguments: &Arguments, spans: Option<&Spans>) {
    let filter = EnvFilter::try_new(&arguments.common.log).unwrap_or_else(|_| EnvFilter::new("warn"));
    // a log on a full disk must not take the daemon with it: what cannot be written is dropped
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let log = log.log_internal_errors(false).with_ansi(std::io::stderr().is_terminal());
    let log: Box<dyn Layer<Registry> + Send + Sync> = match arguments.common.log_format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => {
            log.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
        }
    };
    // with nobody to send them to, no span is made that the log does not show
    match spans {
        None => tracing_subscriber::registry().with(log).with(filter).init(),
        Some(spans) => {
            tracing_subscriber::registry().with(log.with_filter(filter)).with(spans.layer()).init()
        }
    }
}

/// Writing to a closed pipe (`lamina inspect … | head`) ends the process as it does every other tool.
///
/// By the panic that it causes, not by the signal: that would come for sockets too, and whoever closes a connection would
/// end a registry or a node.
fn end_at_closed_pipes() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            std::process::exit(CLOSED_PIPE);
        }
        usual(panic);
    }));
}
