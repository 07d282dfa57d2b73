//! Pure: the second, independent reading of a Dockerfile by `parse-dockerfile`.
//!
//! `parse-dockerfile` follows Docker's own parser, the reader in `lines` follows buildah's. What both take for the
//! same list of instructions leaves no room for a file that shows Kiln one base image and buildah another. Where
//! they differ the file is refused, with these exceptions that `lines` resolves first:
//!
//! | input | `parse-dockerfile` 0.1.9 | buildah 1.28 |
//! | --- | --- | --- |
//! | `RUN cat <<EOF`, several here-documents | sees none, or only the first | as instructions (1.33: all of them) |
//! | `# syntax=` before `` # escape=` `` | escape holds | escape is overlooked |
//! | blanks before `` # escape=` `` | overlooked | holds |
//! | a line of 64 KiB or more | reads it | end of the file, silently |
//! | a lone continuation at the end | ignores it | unknown instruction |
//! | the same stage name twice | error | the later one wins |
//! | `ARG` without a name | error | crashes |
//! | `CMD --flag x` | an argument | drops `--flag` |
//! | quotes in flags | kept | resolved |
//! | `ENTRYPOINT []`, `CMD []` | error | clears the base's |

use parse_dockerfile::Instruction as Parsed;

use super::lines::Source;
use super::{DockerfileError, Instruction, Keyword};

/// Compares the instructions that Kiln read with those that `parse-dockerfile` reads.
pub(super) fn check(source: &Source, instructions: &[Instruction]) -> Result<(), DockerfileError> {
    let text = with_something_in_empty_lists(&source.without_heredocs, instructions);
    let parsed = parse_dockerfile::parse(&text).map_err(|error| syntax(&error, source))?;
    let escape = parsed.parser_directives.escape.as_ref().map_or('\\', |escape| escape.value.value);
    if escape != source.escape {
        return Err(DockerfileError::EscapeUnclear);
    }
    let lines = LineIndex::new(&text);
    let mut theirs = parsed.instructions.iter().map(|instruction| {
        let (keyword, start) = keyword_of(instruction)?;
        Some((keyword, lines.line_of(start)))
    });
    for ours in instructions {
        if theirs.next().flatten() != Some((ours.keyword, ours.start_line)) {
            return Err(DockerfileError::Ambiguous { line: ours.start_line });
        }
    }
    match theirs.next() {
        None => Ok(()),
        Some(extra) => Err(DockerfileError::Ambiguous { line: extra.map_or(1, |(_, line)| line) }),
    }
}

/// `ENTRYPOINT []` and `CMD []` clear what the base image has; the second reader takes them for mistakes.
fn with_something_in_empty_lists(text: &str, instructions: &[Instruction]) -> String {
    let is_empty = |i: &&Instruction| i.args.chars().filter(|c| !c.is_whitespace()).eq("[]".chars());
    let lines: Vec<usize> = instructions.iter().filter(is_empty).map(|i| i.end_line).collect();
    if lines.is_empty() {
        return text.to_owned();
    }
    let filled = text.split('\n').zip(1..).map(|(line, number)| {
        if lines.contains(&number) { line.replacen('[', "[\"\"", 1) } else { line.to_owned() }
    });
    filled.collect::<Vec<_>>().join("\n")
}

/// The error without its place, which `DockerfileError` tells itself.
fn syntax(error: &parse_dockerfile::Error, source: &Source) -> DockerfileError {
    let line = error.line().max(1);
    let text = source.without_heredocs.split('\n').nth(line - 1).unwrap_or_default();
    // A no-break space looks like a blank and is none to Docker; its message would show nothing.
    let odd = text.starts_with(|c: char| c.is_whitespace() && !c.is_ascii());
    let message = if odd {
        "the line begins with a space that is not a blank".to_owned()
    } else {
        let message = format!("{error:#}");
        message.strip_prefix(&format!("line {line}: ")).map_or(message.clone(), str::to_owned)
    };
    DockerfileError::Syntax { line, message }
}

/// The starts of the lines, so that finding the line of a byte does not read the file again.
struct LineIndex(Vec<usize>);

impl LineIndex {
    fn new(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    fn line_of(&self, byte: usize) -> usize {
        self.0.partition_point(|newline| *newline < byte) + 1
    }
}

fn keyword_of(instruction: &Parsed<'_>) -> Option<(Keyword, usize)> {
    Some(match instruction {
        Parsed::Add(i) => (Keyword::Add, i.add.span.start),
        Parsed::Arg(i) => (Keyword::Arg, i.arg.span.start),
        Parsed::Cmd(i) => (Keyword::Cmd, i.cmd.span.start),
        Parsed::Copy(i) => (Keyword::Copy, i.copy.span.start),
        Parsed::Entrypoint(i) => (Keyword::Entrypoint, i.entrypoint.span.start),
        Parsed::Env(i) => (Keyword::Env, i.env.span.start),
        Parsed::Expose(i) => (Keyword::Expose, i.expose.span.start),
        Parsed::From(i) => (Keyword::From, i.from.span.start),
        Parsed::Healthcheck(i) => (Keyword::Healthcheck, i.healthcheck.span.start),
        Parsed::Label(i) => (Keyword::Label, i.label.span.start),
        Parsed::Maintainer(i) => (Keyword::Maintainer, i.maintainer.span.start),
        Parsed::Onbuild(i) => (Keyword::Onbuild, i.onbuild.span.start),
        Parsed::Run(i) => (Keyword::Run, i.run.span.start),
        Parsed::Shell(i) => (Keyword::Shell, i.shell.span.start),
        Parsed::Stopsignal(i) => (Keyword::Stopsignal, i.stopsignal.span.start),
        Parsed::User(i) => (Keyword::User, i.user.span.start),
        Parsed::Volume(i) => (Keyword::Volume, i.volume.span.start),
        Parsed::Workdir(i) => (Keyword::Workdir, i.workdir.span.start),
        _ => return None,
    })
}
