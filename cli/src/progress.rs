//! What people see while a build runs (edge).

use std::io::{IsTerminal as _, Write as _};

use kiln_agent::executor::{Event, Finished};
use kiln_agent::logs::display::{Colours, sanitize};
use kiln_protocol::result::{BuildResult, Failure, SealedImage};

use crate::args::Progress;

/// Prints events: log lines on standard output, everything else on standard error.
#[derive(Debug)]
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
    pub(crate) fn show(&self, event: &Event) {
        if self.quiet {
            return;
        }
        match event {
            Event::Line(line) if self.stdout_taken => tell(&sanitize(line, self.colours)),
            Event::Line(line) => {
                let _ = writeln!(std::io::stdout(), "{}", sanitize(line, self.colours));
            }
            Event::Phase(phase) => self.say(&format!("[{}]", phase.label())),
            Event::Note(note) => self.say(note),
        }
    }

    /// A line about the build, not of it.
    pub(crate) fn say(&self, text: &str) {
        if !self.quiet {
            tell(text);
        }
    }

    /// The end of a successful build.
    pub(crate) fn success(&self, image: &SealedImage, result: &BuildResult, written: &[String]) {
        if self.quiet {
            if !self.stdout_taken {
                let _ = writeln!(std::io::stdout(), "{}", image.config_digest);
            }
            return;
        }
        let spent: u64 = result.phases.iter().map(|p| p.milliseconds).sum();
        let seconds = std::time::Duration::from_millis(spent).as_secs_f32();
        tell(&format!("image {} ({} bytes, {seconds:.1} s)", image.config_digest, image.size));
        tell(&format!("manifest {}", image.manifest_digest));
        for target in written {
            tell(&format!("wrote {target}"));
        }
        if written.is_empty() {
            tell("no output was asked for (-o): the image was built and discarded");
        }
    }
}

/// The end of a build that did not succeed, for the person who has to mend it.
pub(crate) fn failure(failure: &Failure, finished: &Finished, dockerfile: &str, log: &std::path::Path) {
    tell(&format!("build failed in phase {} ({})", failure.phase.label(), failure.reason));
    if let Some(location) = &failure.location {
        tell(&format!("  {dockerfile}:{}: {}", location.line, sanitize(&location.text, Colours::Strip)));
    }
    tell(&format!("  {}", sanitize(&failure.message, Colours::Strip)));
    if failure.reason.end_state() != kiln_protocol::reason::EndState::Cancelled
        && !finished.last_lines.is_empty()
    {
        tell("last lines of the log:");
        for line in &finished.last_lines {
            tell(&format!("  | {}", sanitize(line, Colours::Strip)));
        }
    }
    if let Some(hint) = &failure.hint {
        tell(&format!("hint: {hint}"));
    }
    tell(&format!("log: {}", log.display()));
}

fn tell(text: &str) {
    // Nobody reads a closed standard error; the exit code still tells.
    let _ = writeln!(std::io::stderr(), "kiln: {text}");
}
