//! From arguments to exit code (edge).

use std::process::ExitCode;

use clap::Parser as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::args::{Cli, Command, substitute};
use crate::{build, check, config, doctor, prune, remote, terminal, up};

/// Exit code of a command that cannot be understood.
pub(crate) const USAGE: u8 = 2;
/// Exit code of a failure of the system.
pub(crate) const SYSTEM: u8 = 5;

/// An error with the exit code and the way out.
#[derive(Debug)]
pub(crate) struct Exit {
    pub(crate) code: u8,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Exit {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { code: USAGE, message: message.into(), hint: None }
    }

    pub(crate) fn system(message: impl Into<String>) -> Self {
        Self { code: SYSTEM, message: message.into(), hint: None }
    }

    pub(crate) fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// Runs the command.
pub(crate) fn run() -> ExitCode {
    start_tracing();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let result = match cli.command {
        Command::Build(args) if args.server.is_some() => remote::build(&args),
        Command::Build(args) => build::run(*args),
        Command::Check(args) => check::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Config(command) => config::run(&command),
        Command::Prune(args) => prune::run(&args),
        Command::Up(args) => up::run(&args),
        Command::Ls(args) => remote::list(&args),
        Command::Show(args) => remote::show(&args),
        Command::Logs(args) => remote::logs(&args),
        Command::Cancel(args) => remote::cancel(&args),
        Command::Retry(args) => remote::retry(&args),
        Command::Dead(command) => remote::dead(&command),
        Command::Queue(args) => remote::queue(&args),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(exit) => {
            print_error(&exit);
            ExitCode::from(exit.code)
        }
    }
}

fn print_error(exit: &Exit) {
    terminal::say(&exit.message);
    if let Some(hint) = &exit.hint {
        terminal::hint(hint);
    }
}

/// clap's own message, or ours for flags that people know from Docker.
fn refuse(error: &clap::Error) -> ExitCode {
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg)
        && let Some(substitute) = substitute(flag)
    {
        let exit = Exit::usage(format!("{flag} is not supported")).with_hint(substitute);
        print_error(&exit);
        return ExitCode::from(USAGE);
    }
    // A closed output changes nothing about the exit code.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE))
}

fn start_tracing() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("KILN_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
}
