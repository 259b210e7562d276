//! What can be said on the command line. Nothing here is acted on.

mod fsck;
mod gc;
mod limits;
mod otlp;
mod profile;
mod run;
mod storage;
mod upstream;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use lamina_image::CommandKey;
use lamina_wire::Reference;

pub(crate) use self::fsck::FsckArguments;
pub(crate) use self::gc::{GcArguments, GcSettings};
pub(crate) use self::limits::RegistryLimits;
pub(crate) use self::otlp::{OtlpArguments, OtlpUrl};
pub(crate) use self::profile::{
    ProfileArguments, ProfileCommand, ProfileDrop, ProfileExport, ProfileImport, ProfilePush, ProfileRecord,
    ProfileShow,
};
pub(crate) use self::run::{InsideArguments, RunArguments};
pub(crate) use self::storage::StorageArguments;
pub(crate) use self::upstream::UpstreamArguments;
use crate::source::SourceName;

/// Container images as deduplicated chunks, started before they have arrived.
#[derive(Parser, Debug)]
#[command(version, name = "lamina", max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "Examples:
  lamina registry --storage /var/lib/lamina
  lamina push oci:layout:v1 localhost:5000/team/torch:v1
  lamina run localhost:5000/team/torch:v1 -- python3 train.py
  lamina mount localhost:5000/team/torch:v1 /mnt/torch
  lamina unmount /mnt/torch

Every option can also be set as LAMINA_<OPTION> or, under its own name, in a TOML file (--config).";

#[derive(Args, Clone, Debug)]
pub(crate) struct Common {
    /// Speak plain HTTP to registries that are not on loopback, or serve it there
    #[arg(long, global = true, env = "LAMINA_PLAIN_HTTP", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) plain_http: bool,
    /// What to log to stderr: error, warn, info, debug, trace, or a filter as tracing has them
    #[arg(
        long,
        global = true,
        env = "LAMINA_LOG",
        default_value = "warn,audit=info,fuser=error",
        value_name = "FILTER"
    )]
    pub(crate) log: String,
    /// How log lines look
    #[arg(long, global = true, env = "LAMINA_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// A TOML file with options under their own names [default: /etc/lamina/config.toml, where it exists]
    #[arg(long, global = true, env = "LAMINA_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Logins for registries [default: what docker and podman use: $REGISTRY_AUTH_FILE, or
    /// $DOCKER_CONFIG/config.json, $XDG_RUNTIME_DIR/containers/auth.json, ~/.config/containers/auth.json,
    /// ~/.docker/config.json]
    #[arg(long, global = true, env = "LAMINA_AUTH_FILE", value_name = "FILE")]
    pub(crate) auth_file: Option<PathBuf>,
    /// A directory with containerd's hosts.toml or certificates for registries, below HOST[:PORT]/ [default:
    /// /etc/containerd/certs.d, /etc/containers/certs.d and /etc/docker/certs.d]
    #[arg(long, global = true, env = "LAMINA_HOSTS_DIR", value_name = "DIR")]
    pub(crate) hosts_dir: Option<PathBuf>,
    /// Trust the certificates in this PEM file as well, and speak TLS on loopback too
    #[arg(long, global = true, env = "LAMINA_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Serve a registry: any OCI client pushes to it and pulls from it
    Registry(RegistryArguments),
    /// Cut an image into chunks, send those that the registry lacks, and tag it
    Push(PushArguments),
    /// Mount an image read-only, without waiting for its contents
    Mount(MountArguments),
    /// Unmount an image
    Unmount(UnmountArguments),
    Run(RunArguments),
    #[command(hide = true)]
    Inside(InsideArguments),
    /// Run the daemon that owns a cache directory (`lamina mount` starts one by itself)
    Node(NodeArguments),
    /// Show an image's layers, its tree, and how far its conversion is
    Inspect(InspectArguments),
    /// Bring an image into the cache without mounting it
    Prefetch(PrefetchArguments),
    /// Keep an image's frames in the cache, whatever else is read; without an image, show what is pinned
    Pin(PinArguments),
    /// Show what mounts have read, from where, and how long it took
    Stats(StatsArguments),
    /// Look at this machine: what works, what does not, and what to do
    Doctor(DoctorArguments),
    /// See, record and exchange what starts of an image touch: boot packs are made from it
    Profile(ProfileArguments),
    /// Collect garbage: what no tag leads to any more
    Gc(GcArguments),
    /// Hash everything in a storage again, say what is damaged and which images that touches, and repair it
    Fsck(FsckArguments),
    /// Print a completion script for a shell
    Completions(CompletionsArguments),
}

#[derive(Args, Debug)]
pub(crate) struct RegistryArguments {
    /// The address to listen on
    #[arg(long, env = "LAMINA_LISTEN", default_value = "127.0.0.1:5000", value_name = "ADDRESS:PORT")]
    pub(crate) listen: SocketAddr,
    #[command(flatten)]
    pub(crate) storage: StorageArguments,
    #[command(flatten)]
    pub(crate) upstream: UpstreamArguments,
    /// How often garbage is collected; 0 for never
    #[arg(long, env = "LAMINA_GC_EVERY", default_value = "24h", value_name = "TIME", value_parser = gc::duration)]
    pub(crate) gc_every: std::time::Duration,
    #[command(flatten)]
    pub(crate) gc: GcSettings,
    #[command(flatten)]
    pub(crate) limits: RegistryLimits,
    /// Serve by TLS, with the certificate in this PEM file and those that lead from it to its authority; read again when it
    /// changes
    #[arg(long, env = "LAMINA_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of the certificate, in a PEM file
    #[arg(long, env = "LAMINA_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) otlp: OtlpArguments,
}

#[derive(Args, Debug)]
pub(crate) struct PushArguments {
    /// oci:DIR[:tag], oci-archive:FILE[:tag], docker-archive:FILE[:name:tag], docker://REF or dir:ROOTFS
    #[arg(value_parser = |text: &str| text.parse::<SourceName>().map_err(|error| error.to_string()))]
    pub(crate) source: SourceName,
    /// Where to push it: [host[:port]/]repository[:tag]
    pub(crate) reference: Reference,
    /// Also upload the compressed layers, and keep the manifest and its digest as they are
    #[arg(long, env = "LAMINA_KEEP_LAYERS", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) keep_layers: bool,
    /// Which image of an index: os/architecture[/variant] [default: this machine's]
    #[arg(long, env = "LAMINA_PLATFORM", value_name = "PLATFORM")]
    pub(crate) platform: Option<String>,
    /// zstd level to seal with
    #[arg(long, env = "LAMINA_LEVEL", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(crate) level: i32,
    /// Print the summary as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct CacheArguments {
    /// The cache directory, on a local disk; all mounts that name the same one share it
    #[arg(
        id = "cache",
        long = "cache",
        env = "LAMINA_CACHE",
        default_value = "/var/cache/lamina",
        value_name = "DIR"
    )]
    pub(crate) directory: PathBuf,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct NodeSettings {
    /// The most that cached frames take on disk, in MiB
    #[arg(long, env = "LAMINA_CACHE_MIB", default_value_t = 20 << 10, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(16..))]
    pub(crate) cache_mib: u64,
    /// How long a reader waits for bytes before it gets an error, in seconds
    #[arg(long, env = "LAMINA_DEADLINE", default_value_t = 30, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) deadline: u64,
    /// The kernel's readahead while reading is sparse, in KiB [default: what measured best]
    #[arg(long, env = "LAMINA_READ_AHEAD_KB", value_name = "KIB", value_parser = clap::value_parser!(u32).range(4..=1024))]
    pub(crate) read_ahead_kb: Option<u32>,
    /// Serve counters to Prometheus under /metrics at this address [default: nowhere]
    #[arg(long, env = "LAMINA_METRICS", value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) otlp: OtlpArguments,
    /// Where else a registry's contents are, asked before it and in the order given; can be repeated. MIRROR is
    /// [http://]host[:port]
    #[arg(long = "mirror", env = "LAMINA_MIRROR", value_name = "REGISTRY=MIRROR", value_delimiter = ',',
        value_parser = mirror)]
    pub(crate) mirrors: Vec<(String, String)>,
}

/// `REGISTRY=MIRROR`.
fn mirror(text: &str) -> Result<(String, String), String> {
    let (registry, mirror) = text.split_once('=').ok_or("it must be REGISTRY=MIRROR")?;
    let plain = |host: &str| !host.is_empty() && !host.contains(['/', ' ', '@']);
    let host = mirror.strip_prefix("http://").or(mirror.strip_prefix("https://")).unwrap_or(mirror);
    match plain(registry) && plain(host) {
        true => Ok((registry.to_owned(), mirror.to_owned())),
        false => {
            Err("both must be host[:port], the mirror with http:// before it where it speaks no TLS".into())
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct MountArguments {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// An empty directory
    pub(crate) directory: PathBuf,
    /// Stay in the foreground, and unmount at Ctrl-C
    #[arg(short, long)]
    pub(crate) foreground: bool,
    /// Refuse an image whose manifest does not name its tree
    #[arg(long, env = "LAMINA_REQUIRE_BOUND", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) require_bound: bool,
    /// What is going to run there, by a key of up to 64 letters, digits and `._-`: its boot pack is used where there is one, and
    /// its start is remembered under it [default: nobody knows; the boot pack of all starts together]
    #[arg(long, env = "LAMINA_COMMAND", value_name = "KEY")]
    pub(crate) command: Option<CommandKey>,
    /// Do without a boot pack: fetch what is read when it is read
    #[arg(long, env = "LAMINA_NO_BOOT", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) no_boot: bool,
    /// Do not record what the start touches, nor tell the registry
    #[arg(long, env = "LAMINA_NO_TRACE", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) no_trace: bool,
    /// What to fetch though nobody reads it, once the start is over and while nobody reads: none, touched (the rest of the
    /// files that were read, or that the boot pack has a part of) or all
    #[arg(long, env = "LAMINA_FILL", default_value = "none", value_name = "POLICY", value_parser = ["none", "touched", "all"])]
    pub(crate) fill: String,
    /// The most that filling takes of the link, in MiB a second [default: what readers leave]
    #[arg(long, env = "LAMINA_FILL_RATE", value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) fill_rate: Option<u64>,
    /// Fetch the whole image in bulk, and return only when it is here
    #[arg(long, env = "LAMINA_EAGER", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue, conflicts_with_all = ["require_lazy", "fill"])]
    pub(crate) eager: bool,
    /// Have the kernel read files of 1 MiB and more by itself once they are on disk as a whole, as fast as local files. They take
    /// room in the cache a second time, nobody checks what is read of them, and the start is not recorded
    #[arg(long, env = "LAMINA_PASSTHROUGH", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) passthrough: bool,
    /// Fetch nothing in bulk, not even what is left of an image of which a start has read half
    #[arg(long, env = "LAMINA_REQUIRE_LAZY", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) require_lazy: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) settings: NodeSettings,
    /// Print what was mounted as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct UnmountArguments {
    /// Where the image is mounted
    pub(crate) directory: PathBuf,
    /// Take it away even if programs have files open in it: they keep them
    #[arg(long)]
    pub(crate) lazy: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
}

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct NodeArguments {
    #[command(subcommand)]
    pub(crate) command: Option<NodeCommand>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) settings: NodeSettings,
    /// End some seconds after the last mount has gone
    #[arg(long, hide = true)]
    pub(crate) exit_when_idle: bool,
    /// This process was started by its holder
    #[arg(long, hide = true)]
    pub(crate) held: bool,
    /// Be the holder of a daemon whose holder has died
    #[arg(long, hide = true, value_name = "PID", conflicts_with = "held")]
    pub(crate) adopt: Option<u32>,
}

#[derive(Subcommand, Debug)]
pub(crate) enum NodeCommand {
    /// Put this program, or another, in the running daemon's place, with its mounts in use
    Upgrade(NodeUpgrade),
}

#[derive(Args, Debug)]
pub(crate) struct NodeUpgrade {
    /// The program [default: this one]
    pub(crate) program: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
}

#[derive(Args, Debug)]
pub(crate) struct InspectArguments {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Reference,
    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct StatsArguments {
    /// Where an image is mounted [default: all mounts of the cache]; then also how much of its boot pack was used
    pub(crate) directory: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    /// Show rates, drawn anew every second, until Ctrl-C
    #[arg(short, long, conflicts_with_all = ["json", "directory"])]
    pub(crate) watch: bool,
    /// The seconds between two pictures of --watch
    #[arg(long, default_value_t = 1, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// Print them as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(false))]
pub(crate) struct PrefetchArguments {
    /// The image: [host[:port]/]repository[:tag|@digest]
    #[arg(group = "what")]
    pub(crate) reference: Option<Reference>,
    /// Pause all filling of the cache, that of mounts included
    #[arg(long, group = "what")]
    pub(crate) pause: bool,
    /// Go on with it
    #[arg(long, group = "what")]
    pub(crate) resume: bool,
    /// Fetch only while nobody reads
    #[arg(long, env = "LAMINA_IDLE", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) idle: bool,
    /// The most that it takes of the link, in MiB a second
    #[arg(long, env = "LAMINA_FILL_RATE", value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) fill_rate: Option<u64>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) settings: NodeSettings,
    /// Print what came as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct PinArguments {
    /// The image: [host[:port]/]repository[:tag|@digest]
    pub(crate) reference: Option<Reference>,
    /// Take the pin away: its frames may be evicted again
    #[arg(long, requires = "reference")]
    pub(crate) remove: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) settings: NodeSettings,
    /// Print what is pinned as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArguments {
    /// Registries to look at, host[:port], or images on them [default: those that the running node has to do with]
    #[arg(value_name = "REGISTRY|IMAGE")]
    pub(crate) registries: Vec<String>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    /// The most that cached frames take on disk, in MiB
    #[arg(long, env = "LAMINA_CACHE_MIB", default_value_t = 20 << 10, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(16..))]
    pub(crate) cache_mib: u64,
    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct CompletionsArguments {
    /// bash, elvish, fish, powershell or zsh
    pub(crate) shell: clap_complete::Shell,
}
