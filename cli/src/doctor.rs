//! `kiln doctor` (edge).

use kiln_agent::doctor::{self, Finding, Standing};

use crate::app::{Exit, SYSTEM};
use crate::args::DoctorArgs;
use crate::{paths, terminal};

/// Prepares a machine: read it before you run it.
const SETUP: &str = include_str!("setup.sh");

/// Runs the command.
pub(crate) fn run(args: &DoctorArgs) -> Result<u8, Exit> {
    if args.print_setup {
        terminal::document(SETUP.trim_end());
        return Ok(0);
    }
    let config = paths::load_config(&args.places)?.agent;
    let data = paths::data_dir(&args.places)?;
    let findings = paths::runtime()?.block_on(doctor::examine(config, &data));
    for finding in &findings {
        print(&line(finding));
    }
    let unfit = findings.iter().any(|f| f.standing == Standing::Missing);
    print(if unfit {
        "this machine cannot run sealed builds yet"
    } else {
        "this machine runs sealed builds"
    });
    Ok(if unfit { SYSTEM } else { 0 })
}

fn line(finding: &Finding) -> String {
    let standing = match finding.standing {
        Standing::Good => "ok",
        Standing::Limited => "limited",
        Standing::Missing => "missing",
    };
    let remedy = finding.remedy.as_ref().map_or_else(String::new, |remedy| format!(" -> {remedy}"));
    format!("{standing:<8} {}: {}{remedy}", finding.name, finding.found)
}

fn print(text: &str) {
    terminal::out(text);
}
