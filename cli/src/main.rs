//! The `kiln` command (edge).

mod app;
mod args;
mod build;
mod check;
mod config;
mod context;
mod credentials;
mod dockerfile;
mod doctor;
mod embedded;
mod inputs;
mod packing;
mod pair;
mod paths;
mod progress;
mod prune;
mod remote;
mod signals;
mod terminal;
mod up;

fn main() -> std::process::ExitCode {
    // Before anything else: this process image also serves as the slot's single-threaded shim.
    if std::env::args_os().nth(1).is_some_and(|a| a == kiln_agent::slot::SHIM_ARGUMENT) {
        return u8::try_from(kiln_agent::slot::shim_main()).unwrap_or(1).into();
    }
    // A process that holds push credentials does nothing else.
    if std::env::args_os().nth(1).is_some_and(|a| a == kiln_agent::publish::PUBLISH_ARGUMENT) {
        return u8::try_from(kiln_agent::publish::publish_main()).unwrap_or(1).into();
    }
    app::run()
}
