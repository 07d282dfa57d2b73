//! What people see while a build runs (edge).

use std::io::IsTerminal as _;

use kiln_agent::executor::Event;
use kiln_agent::logs::display::Colours;
use kiln_protocol::reason::EndState;
use kiln_protocol::result::{BuildResult, Failure, SealedImage};

use crate::args::Progress;
use crate::terminal;

/// Prints events: log lines on standard output, everything else on standard error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    quiet: bool,
    colours: Colours,
    /// Standard output carries an archive and nothing else.
    stdout_taken: bool,
}

impl Printer {
    pub(crate) fn new(progress: Progress, stdout_taken: bool) -> Self {
        let terminal = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let colours = if terminal && progress == Progress::Auto { Colours::Keep } else { Colours::Strip };
        Self { quiet: progress == Progress::Quiet, colours, stdout_taken }
    }

    /// Shows one event. A closed output changes nothing.
    pub(crate) fn show(self, event: &Event) {
        if self.quiet {
            return;
        }
        match event {
            Event::Line(line) => self.line(line),
            Event::Phase(phase) => self.say(&format!("[{}]", phase.label())),
            Event::Note(note) => self.say(note),
        }
    }

    /// A line of the log.
    pub(crate) fn line(self, line: &str) {
        match (self.quiet, self.stdout_taken) {
            (true, _) => {}
            (false, true) => terminal::say(line),
            (false, false) => terminal::out_coloured(line, self.colours),
        }
    }

    /// A line about the build, not of it.
    pub(crate) fn say(self, text: &str) {
        if !self.quiet {
            terminal::say(text);
        }
    }

    /// The end of a build that a server published.
    pub(crate) fn published(self, digest: &str, destinations: &[String]) {
        if self.quiet {
            terminal::out(digest);
            return;
        }
        terminal::say(&format!("manifest {digest}"));
        for destination in destinations {
            terminal::say(&format!("published {destination}"));
        }
    }

    /// The end of a successful build.
    pub(crate) fn success(self, image: &SealedImage, result: &BuildResult, written: &[String]) {
        if self.quiet {
            if !self.stdout_taken {
                terminal::out(image.config_digest.as_str());
            }
            return;
        }
        let spent: u64 = result.phases.iter().map(|p| p.milliseconds).sum();
        let seconds = std::time::Duration::from_millis(spent).as_secs_f32();
        terminal::say(&format!("image {} ({} bytes, {seconds:.1} s)", image.config_digest, image.size));
        terminal::say(&format!("manifest {}", image.manifest_digest));
        if let Some(steps) = result.steps {
            terminal::say(&format!("cached {}/{} steps", steps.cached, steps.total));
        }
        for target in written {
            terminal::say(&format!("wrote {target}"));
        }
        if written.is_empty() {
            terminal::say("no target was asked for (-t or -o): the image was built and discarded");
        }
    }
}

/// The end of a build that did not succeed, for the person who has to mend it.
pub(crate) fn failure(failure: &Failure, last_lines: &[String], dockerfile: &str, log: &std::path::Path) {
    let cancelled = failure.reason.end_state() == EndState::Cancelled;
    let ended = if cancelled { "stopped" } else { "failed" };
    terminal::say(&format!("build {ended} in phase {} ({})", failure.phase.label(), failure.reason));
    if let Some(location) = &failure.location {
        terminal::say(&format!("  {dockerfile}:{}: {}", location.line, location.text));
    }
    terminal::say(&format!("  {}", failure.message));
    if !cancelled && !last_lines.is_empty() {
        terminal::say("last lines of the log:");
        for line in last_lines {
            terminal::say(&format!("  | {line}"));
        }
    }
    if let Some(hint) = &failure.hint {
        terminal::say(&format!("hint: {hint}"));
    }
    terminal::say(&format!("log: {}", log.display()));
}
