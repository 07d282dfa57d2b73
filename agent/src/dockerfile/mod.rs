//! Pure: what a Dockerfile says, understood before anything runs.
//!
//! Kiln needs three answers without starting a slot: which images the build will look up (the agent fetches them,
//! buildah runs with `--pull=never`), what this buildah cannot build or may not, and which line a later error of
//! buildah means. All three must agree with what buildah does rather than with what Docker documents, so the file
//! is read with buildah's rules (`lines`, `words`, `expand`) and a second time by `parse-dockerfile`
//! (`crosscheck`); a file on which the two disagree is refused. Facts about buildah were taken from version 1.28
//! and tried with 1.28.2 unless another version is named.

mod check;
mod crosscheck;
mod error;
mod expand;
mod features;
mod keyword;
mod lines;
mod locate;
mod mounts;
mod options;
mod parts;
mod reference;
mod scope;
mod stages;
mod words;

use std::collections::BTreeMap;
use std::ops::Range;

pub use check::{Problem, Severity};
pub use error::DockerfileError;
pub use keyword::Keyword;
pub use lines::Heredoc;
pub use mounts::{BindSource, SecretUse};
pub use reference::{BaseReference, Usage};

use crate::version::Version;

/// More stages than any real file has; every stage may keep a copy of its variables.
const MAX_STAGES: usize = 200;

/// More instructions than any real file has; the triggers of a stage count again in every stage built on it.
const MAX_INSTRUCTIONS: usize = 10_000;

/// What besides its text decides what a Dockerfile means.
#[derive(Debug, Clone, Copy)]
pub struct BuildInput<'a> {
    /// `--build-arg`, names with values.
    pub build_args: &'a BTreeMap<String, String>,
    /// `--target`: the name of a stage in any case, or its number. The last stage without one.
    pub target: Option<&'a str>,
    /// The buildah that will build.
    pub buildah: Version,
    /// The architecture of the node as images name it (`amd64`, `arm64`).
    pub architecture: &'a str,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// Its keyword.
    pub keyword: Keyword,
    /// The whole instruction as buildah reads it: continuations joined, comments dropped.
    pub text: String,
    /// Its flags, quotes resolved.
    pub flags: Vec<String>,
    /// What follows the keyword and the flags.
    pub args: String,
    /// The line it begins on, 1-based.
    pub start_line: usize,
    /// The line it ends on, here-documents included.
    pub end_line: usize,
    /// Its here-documents.
    pub heredocs: Vec<Heredoc>,
    /// The instruction behind ONBUILD.
    pub trigger: Option<Box<Instruction>>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its number, from 0.
    pub index: usize,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// The image or stage it is built on, as written.
    pub base: String,
    /// The line of its FROM.
    pub line: usize,
    /// Its instructions, FROM first, as indexes into [`Dockerfile::instructions`].
    pub instructions: Range<usize>,
}

impl Stage {
    /// The name buildah gives it: its own, or its number. This is what `--target` must be.
    pub fn buildah_name(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.index.to_string())
    }
}

/// A Dockerfile that was read without errors.
#[derive(Debug, Clone)]
pub struct Dockerfile {
    instructions: Vec<Instruction>,
    stages: Vec<Stage>,
    escape: char,
}

impl Dockerfile {
    /// Reads a Dockerfile. `# syntax=` is ignored, as buildah ignores it.
    pub fn parse(text: &str) -> Result<Self, DockerfileError> {
        let source = lines::read(text)?;
        let instructions = source.lines.iter().map(instruction).collect::<Result<Vec<_>, _>>()?;
        let stages = stages::split(&instructions)?;
        crosscheck::check(&source, &instructions)?;
        Ok(Self { instructions, stages, escape: source.escape })
    }

    /// Reads the ONBUILD triggers of a base image, which buildah runs as if they stood behind its FROM. Their line
    /// is their number plus 1; the stage they stand in is built on `scratch`.
    pub fn parse_triggers(triggers: &[String]) -> Result<Self, DockerfileError> {
        Self::parse(&format!("FROM scratch\n{}\n", triggers.join("\n")))
    }

    /// Every instruction in the order of the file.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }

    /// Every stage in the order of the file. There is at least one.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    fn instructions_of(&self, stage: &Stage) -> &[Instruction] {
        self.instructions.get(stage.instructions.clone()).unwrap_or_default()
    }

    /// The names of the stages before `end`, for messages.
    fn stage_names(&self, end: usize) -> Vec<String> {
        self.stages.iter().take(end).map(Stage::buildah_name).collect()
    }
}

fn instruction(line: &lines::LogicalLine) -> Result<Instruction, DockerfileError> {
    let (start, end) = (line.start, line.end);
    let mut instruction = read_instruction(&line.text, start, end)?;
    if instruction.keyword == Keyword::Onbuild {
        let mut trigger = read_instruction(&instruction.args, start, end)?;
        if matches!(trigger.keyword, Keyword::Onbuild | Keyword::From | Keyword::Maintainer) {
            return Err(DockerfileError::OnbuildTrigger { line: start, keyword: trigger.keyword });
        }
        trigger.heredocs.clone_from(&line.heredocs);
        instruction.trigger = Some(Box::new(trigger));
    }
    instruction.heredocs.clone_from(&line.heredocs);
    Ok(instruction)
}

fn read_instruction(text: &str, line: usize, end_line: usize) -> Result<Instruction, DockerfileError> {
    let word = text.split_whitespace().next().unwrap_or_default();
    let keyword = match Keyword::parse(word) {
        Some(keyword) => keyword,
        None if word.is_empty() => {
            return Err(DockerfileError::NoArguments { line, keyword: Keyword::Onbuild });
        }
        None => return Err(unknown(word, line)),
    };
    let command = words::split_command(text)
        .map_err(|words::NotAscii(flag)| DockerfileError::FlagNotAscii { line, keyword, flag })?;
    // The keyword must be the word that buildah sees: other white space does not end it.
    if !command.word.eq_ignore_ascii_case(word) {
        return Err(unknown(command.word, line));
    }
    if let Some(flag) = command.flags.iter().find(|flag| !keyword.takes_flags() || !is_plain_flag(flag)) {
        return Err(DockerfileError::UnexpectedFlag { line, keyword, flag: flag.clone() });
    }
    Ok(Instruction {
        keyword,
        text: text.to_owned(),
        flags: command.flags,
        args: command.args.to_owned(),
        start_line: line,
        end_line,
        heredocs: Vec::new(),
        trigger: None,
    })
}

fn unknown(word: &str, line: usize) -> DockerfileError {
    /// An unknown word may be a whole line of something else.
    const SHOWN_CHARS: usize = 60;
    DockerfileError::UnknownInstruction {
        line,
        word: word.chars().take(SHOWN_CHARS).collect(),
        nearest: Keyword::nearest(word),
    }
}

/// buildah expands variables in the whole flag, its name included: `--$X=…` could become any flag.
fn is_plain_flag(flag: &str) -> bool {
    let name = flag.split_once('=').map_or(flag, |(name, _)| name);
    name.strip_prefix("--").is_some_and(|name| {
        name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c == '-')
    })
}

#[cfg(test)]
mod tests;
