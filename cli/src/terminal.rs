//! Writing to the user's terminal (edge).
//!
//! Names of files and registries come from strangers: every line is made inert here, once. A closed output
//! changes nothing; the exit code still tells.

use std::io::Write as _;

use kiln_agent::logs::display::{Colours, sanitize};

/// A line on standard output.
pub(crate) fn out(text: &str) {
    write_line(&mut std::io::stdout().lock(), text, Colours::Strip);
}

/// A line on standard output that may keep its colours.
pub(crate) fn out_coloured(text: &str, colours: Colours) {
    write_line(&mut std::io::stdout().lock(), text, colours);
}

/// A line on standard error, in the name of the command.
pub(crate) fn say(text: &str) {
    write_line(&mut std::io::stderr().lock(), &format!("kiln: {text}"), Colours::Strip);
}

/// A line on standard error as it is.
pub(crate) fn hint(text: &str) {
    write_line(&mut std::io::stderr().lock(), &format!("hint: {text}"), Colours::Strip);
}

/// Text of our own, with its line feeds.
pub(crate) fn document(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

fn write_line(to: &mut impl std::io::Write, text: &str, colours: Colours) {
    let _ = writeln!(to, "{}", sanitize(text, colours));
}
