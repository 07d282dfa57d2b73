//! `kiln check` (edge): what can be known without a slot.

use std::collections::BTreeSet;

use kiln_agent::agent::buildah_version;
use kiln_agent::dockerfile::{BuildInput, Dockerfile, DockerfileError};
use kiln_agent::error::chain;
use kiln_agent::executor::architecture;
use kiln_protocol::request::ImageFormat;

use crate::app::Exit;
use crate::args::CheckArgs;
use crate::{context, dockerfile, inputs, terminal};

/// Exit code when something was found.
const PROBLEMS: u8 = 1;

/// What was found, as the lines to print.
#[derive(Default)]
struct Findings {
    problems: Vec<String>,
    facts: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &CheckArgs) -> Result<u8, Exit> {
    let mut findings = Findings::default();
    let source = dockerfile::read(&args.context, args.file.as_deref())?;
    check_dockerfile(args, &source, &mut findings)?;
    check_context(args, &source, &mut findings)?;
    print(&findings);
    Ok(if findings.problems.is_empty() { 0 } else { PROBLEMS })
}

fn check_dockerfile(
    args: &CheckArgs,
    source: &dockerfile::Source,
    findings: &mut Findings,
) -> Result<(), Exit> {
    let buildah = buildah_version().map_err(|e| Exit::system(chain(&e)).with_hint(e.hint()))?;
    let build_args = inputs::build_args(&args.build_arg, |name| std::env::var(name).ok())?;
    let parsed = match Dockerfile::parse(&source.text) {
        Ok(parsed) => parsed,
        Err(error) => {
            findings.problems.push(describe(source, &error));
            return Ok(());
        }
    };
    let input = BuildInput {
        build_args: &build_args,
        target: args.target.as_deref(),
        buildah,
        architecture: architecture(),
    };
    for problem in parsed.check(&input, ImageFormat::from(args.format)) {
        findings
            .problems
            .push(format!("{}:{}: {} ({})", source.name, problem.line, problem.message, problem.hint));
    }
    match parsed.references(&input) {
        Ok(references) => {
            let names: BTreeSet<String> = references.iter().map(|r| r.reference.to_string()).collect();
            findings.facts.extend(names.into_iter().map(|name| format!("base image {name}")));
        }
        Err(error) => findings.problems.push(describe(source, &error)),
    }
    findings.facts.push(format!("buildah {buildah}"));
    Ok(())
}

fn describe(source: &dockerfile::Source, error: &DockerfileError) -> String {
    let line = error.line().map_or_else(String::new, |line| format!(":{line}"));
    let hint = error.hint().map_or_else(String::new, |hint| format!(" ({hint})"));
    format!("{}{line}: {}{hint}", source.name, chain(error))
}

fn check_context(args: &CheckArgs, source: &dockerfile::Source, findings: &mut Findings) -> Result<(), Exit> {
    let ignore = match context::load(&args.context, source.path.as_deref()) {
        Ok(ignore) => ignore,
        Err(error) => {
            findings.problems.push(chain(&error));
            return Ok(());
        }
    };
    let scan =
        context::scan(&args.context, &ignore).map_err(|e| Exit { code: 1, ..Exit::usage(chain(&e)) })?;
    findings.problems.extend(scan.problems.iter().map(|problem| chain(problem)));
    findings.facts.extend(scan.skipped);
    findings.facts.push(format!("context {} entries, {} bytes; the largest:", scan.entries, scan.bytes));
    findings
        .facts
        .extend(scan.largest.iter().map(|(path, bytes)| format!("  {bytes:>12} {}", path.display())));
    Ok(())
}

fn print(findings: &Findings) {
    for fact in &findings.facts {
        terminal::out(fact);
    }
    for problem in &findings.problems {
        terminal::out(&format!("problem: {problem}"));
    }
    match findings.problems.len() {
        0 => terminal::out("no problems found"),
        1 => terminal::out("1 problem found"),
        count => terminal::out(&format!("{count} problems found")),
    }
}
