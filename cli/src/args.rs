//! Arguments of the command (edge).

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_protocol::request::{ImageFormat, NetworkMode};

use crate::config::ConfigCommand;
use crate::remote;

/// Builds container images without a daemon: rootless, sealed, nothing left behind.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 success, 1 the build failed, 2 usage or a refused request, 3 a policy denied it, 4 unauthorized, \
5 the system failed, 124 timeout, 130 cancelled.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image from a Dockerfile and a context
    Build(Box<BuildArgs>),
    /// Say everything about a Dockerfile and a context that can be known without building
    Check(CheckArgs),
    /// Say what this machine offers for sealed builds, what is missing, and how to get it
    Doctor(DoctorArgs),
    /// Check and show the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Delete what can be made again: base images, cache mounts, old logs
    Prune(PruneArgs),
    /// Run a server that builds for this machine, until a signal
    Up(UpArgs),
    /// List the builds of a server
    Ls(remote::ListArgs),
    /// Show a build of a server
    Show(remote::ShowArgs),
    /// Print the log of a build of a server
    Logs(remote::LogsArgs),
    /// Cancel builds of a server
    Cancel(remote::CancelArgs),
    /// Submit a build of a server once more
    Retry(remote::RetryArgs),
    /// Builds that a server has given up
    #[command(subcommand)]
    Dead(remote::DeadCommand),
    /// List what waits on a server, and why
    Queue(remote::QueueArgs),
}

/// Where settings and state are.
#[derive(Debug, Clone, Args)]
pub(crate) struct Places {
    /// Configuration file [default: $`XDG_CONFIG_HOME/kiln/config.toml`, then /etc/kiln/config.toml]
    #[arg(long, value_name = "FILE", env = "KILN_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Data directory [default: $`XDG_STATE_HOME/kiln`]
    #[arg(long, value_name = "DIR", env = "KILN_DATA")]
    pub(crate) data: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct BuildArgs {
    /// Directory with the files that COPY and ADD may use
    pub(crate) context: PathBuf,
    /// Dockerfile, also outside the context; `-` reads standard input [default: CONTEXT/Dockerfile]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Set a build argument; a bare name takes its value from the environment of this command
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub(crate) build_arg: Vec<String>,
    /// Add a label to the image
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// Publish to this tag, registry/repository:tag; may be repeated. A name without a registry names the image in
    /// a docker-archive
    #[arg(short, long, value_name = "TAG")]
    pub(crate) tag: Vec<String>,
    /// Policy plugin that must let the build pass: FILE or FILE,settings=FILE.json
    #[arg(long, value_name = "FILE")]
    pub(crate) plugin: Vec<String>,
    /// Stage to build
    #[arg(long, value_name = "STAGE")]
    pub(crate) target: Option<String>,
    /// Run every instruction, and keep the new layers in place of the cached ones
    #[arg(long)]
    pub(crate) no_cache: bool,
    /// Accepted for Docker's sake: every build asks the registry for the present digest of its base images
    #[arg(long)]
    pub(crate) pull: bool,
    /// Give RUN --mount=type=secret a value: id=NAME,src=FILE or id=NAME,env=VARIABLE
    #[arg(long, value_name = "SPEC")]
    pub(crate) secret: Vec<String>,
    /// Image format [default: docker, or oci if an output asks for it]
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
    /// Seconds since 1970 for every time in the image
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", allow_negative_numbers = true)]
    pub(crate) timestamp: Option<i64>,
    /// What RUN reaches [default: build.network, isolated]
    #[arg(long, value_enum)]
    pub(crate) network: Option<Network>,
    /// docker-archive:FILE, oci:DIR, oci-archive:FILE, dir:DIR, or the target's files:
    /// type=local,dest=DIR, type=tar,dest=FILE
    #[arg(short, long, value_name = "OUTPUT")]
    pub(crate) output: Vec<String>,
    /// Registry credentials [default: $`REGISTRY_AUTH_FILE`, containers/auth.json, ~/.docker/config.json]
    #[arg(long, value_name = "FILE")]
    pub(crate) authfile: Option<PathBuf>,
    /// The build ends after this long [default: build.timeout, 60m]
    #[arg(long, value_name = "DURATION", value_parser = kiln_protocol::setting::parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Tries at a build whose failure may pass, 1 to 20 [default: build.attempts, 4]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) attempts: Option<u32>,
    /// How much to print
    #[arg(long, value_enum, default_value_t = Progress::Auto)]
    pub(crate) progress: Progress,
    /// Print only the image id
    #[arg(short, long, conflicts_with = "progress")]
    pub(crate) quiet: bool,
    /// Write what was built as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata_file: Option<PathBuf>,
    /// Write the image id
    #[arg(long, value_name = "FILE")]
    pub(crate) iidfile: Option<PathBuf>,
    /// Build on this server and publish from there: unix:PATH or `http://127.0.0.1:PORT`
    #[arg(long, value_name = "ADDRESS", env = "KILN_SERVER")]
    pub(crate) server: Option<remote::ServerAddress>,
    #[command(flatten)]
    pub(crate) access: remote::Access,
    #[command(flatten)]
    pub(crate) places: Places,
    /// Docker's flags whose meaning Kiln has anyway.
    #[arg(long, hide = true)]
    pub(crate) rm: bool,
    /// See `rm`.
    #[arg(long, hide = true)]
    pub(crate) force_rm: bool,
    /// Only this machine's own platform.
    #[arg(long, hide = true)]
    pub(crate) platform: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Directory with the files that COPY and ADD may use
    pub(crate) context: PathBuf,
    /// Dockerfile [default: CONTEXT/Dockerfile]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Set a build argument, as for `build`
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub(crate) build_arg: Vec<String>,
    /// Stage to check
    #[arg(long, value_name = "STAGE")]
    pub(crate) target: Option<String>,
    /// Image format
    #[arg(long, value_enum, default_value_t = Format::Docker)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print a script that prepares this machine; read it, then run it as root
    #[arg(long)]
    pub(crate) print_setup: bool,
    #[command(flatten)]
    pub(crate) places: Places,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Also listen on this port of loopback; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Serve metrics for Prometheus on this port of loopback; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<std::net::SocketAddr>,
    /// Builds that run at once
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) slots: u32,
    #[command(flatten)]
    pub(crate) places: Places,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Delete everything that no running build uses, not only what exceeds `data.max_bytes`
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) places: Places,
}

/// Values of `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Docker,
    Oci,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Docker => Self::Docker,
            Format::Oci => Self::Oci,
        }
    }
}

/// Values of `--network`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Network {
    /// The outside and internal servers, not this host
    Isolated,
    /// Nothing
    None,
    /// This host's own network with everything on its loopback
    UnsafeHost,
}

impl From<Network> for NetworkMode {
    fn from(network: Network) -> Self {
        match network {
            Network::Isolated => Self::Isolated,
            Network::None => Self::None,
            Network::UnsafeHost => Self::UnsafeHost,
        }
    }
}

/// Values of `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Progress {
    /// Colours on a terminal, plain text elsewhere
    Auto,
    /// Every line as it is
    Plain,
    /// Only the image id
    Quiet,
}

/// Flags of `docker build` that Kiln refuses, with what to do instead.
const REFUSED: &[(&str, &str)] = &[
    ("--push", "-t registry/repository:tag publishes by itself; leave the flag out"),
    ("--load", "Kiln has no daemon to load into; use -o docker-archive:FILE, then `docker load -i FILE`"),
    ("--ssh", "no agent socket reaches a sealed slot; give a deploy key with --secret id=NAME,src=FILE"),
    ("--cache-from", "layers are kept on this machine by themselves; leave the flag out"),
    ("--cache-to", "layers are kept on this machine by themselves; leave the flag out"),
    ("--build-context", "use a stage or an image with COPY --from"),
    ("--builder", "Kiln has no builder instances; leave the flag out"),
    ("--add-host", "use a name server, or write /etc/hosts in the RUN that needs it"),
    ("--allow", "no entitlement widens a slot; leave the flag out"),
    ("--attest", "provenance and SBOM are not made yet; leave the flag out"),
    ("--provenance", "provenance is not made yet; leave the flag out"),
    ("--sbom", "no SBOM is made yet; leave the flag out"),
    ("--annotation", "use --label"),
    ("--cgroup-parent", "limits come from build.limits in the configuration"),
    ("--memory", "limits come from build.limits in the configuration"),
    ("-m", "limits come from build.limits in the configuration"),
    ("--memory-swap", "limits come from build.limits in the configuration"),
    ("--cpu-period", "limits come from build.limits in the configuration"),
    ("--cpu-quota", "limits come from build.limits in the configuration"),
    ("--cpu-shares", "limits come from build.limits in the configuration"),
    ("--cpuset-cpus", "limits come from build.limits in the configuration"),
    ("--shm-size", "limits come from build.limits in the configuration"),
    ("--ulimit", "limits come from build.limits in the configuration"),
    ("--isolation", "every build runs in a sealed slot; leave the flag out"),
    ("--security-opt", "every build runs in a sealed slot; leave the flag out"),
    ("--squash", "use a multi-stage Dockerfile"),
    ("--compress", "contexts do not travel to a daemon; leave the flag out"),
    ("--call", "use `kiln check`"),
    ("--check", "use `kiln check`"),
    ("--no-cache-filter", "use --no-cache, which is for all stages"),
];

/// What to use instead of a flag that Docker has and Kiln refuses.
pub(crate) fn substitute(flag: &str) -> Option<&'static str> {
    let name = flag.split('=').next().unwrap_or(flag);
    REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, substitute)| *substitute)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_sound_and_refused_flags_are_not_defined() {
        let command = Cli::command();
        command.clone().debug_assert();
        let build = command.find_subcommand("build").unwrap();
        for (flag, _) in REFUSED {
            let name = flag.trim_start_matches('-');
            let known = build.get_arguments().any(|a| {
                a.get_long() == Some(name) || (name.len() == 1 && a.get_short() == name.chars().next())
            });
            assert!(!known, "{flag} is defined and refused");
        }
    }

    #[test]
    fn refused_flags_have_a_substitute_also_with_a_value() {
        assert!(substitute("--cache-from=x").unwrap().contains("layers are kept"));
        assert!(substitute("--nonsense").is_none());
    }
}
