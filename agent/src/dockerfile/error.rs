//! Pure: what can be wrong with a Dockerfile, with the line and the way out.

use super::Keyword;
use crate::version::Version;

/// Why a Dockerfile cannot be built. Lines are 1-based; `hint` is the way out where there is one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are the words of the message")]
pub enum DockerfileError {
    /// The file is larger than Kiln reads.
    #[error("the Dockerfile has {bytes} bytes, the limit is {limit}")]
    TooLarge { bytes: usize, limit: usize },
    /// buildah stops reading at such a line without an error, and builds the first part of the file.
    #[error("line {line} has {bytes} bytes, buildah reads lines of up to {limit}")]
    LineTooLong { line: usize, bytes: usize, limit: usize },
    /// There is no instruction at all.
    #[error("the Dockerfile has no instruction")]
    Empty,
    /// There is no stage.
    #[error("the Dockerfile has no FROM")]
    NoFrom,
    /// More stages or instructions than any real file has.
    #[error("line {line}: more than {limit} {what}")]
    TooMany { line: usize, what: &'static str, limit: usize },
    /// A word that is no instruction.
    #[error("line {line}: unknown instruction `{word}`")]
    UnknownInstruction { line: usize, word: String, nearest: Option<Keyword> },
    /// Only ARG may come before the first FROM.
    #[error("line {line}: {keyword} before the first FROM")]
    BeforeFrom { line: usize, keyword: Keyword },
    /// The second reading (`parse-dockerfile`) found an error.
    #[error("line {line}: {message}")]
    Syntax { line: usize, message: String },
    /// buildah and other builders would read different instructions.
    #[error("line {line}: builders disagree about where the instruction begins")]
    Ambiguous { line: usize },
    /// An escape directive that buildah refuses.
    #[error("line {line}: the escape directive is `{value}`, it must be ` or \\")]
    EscapeValue { line: usize, value: String },
    /// A second escape directive.
    #[error("line {line}: a second escape directive")]
    EscapeTwice { line: usize },
    /// An escape directive that only some builders follow: behind `# syntax=`, or behind blanks.
    #[error("line 1: builders disagree about the escape directive")]
    EscapeUnclear,
    /// A line with nothing but a continuation character.
    #[error("line {line}: a continuation without an instruction")]
    LoneContinuation { line: usize },
    /// The end of a here-document is missing.
    #[error("line {line}: the here-document `{name}` has no end")]
    HeredocWithoutEnd { line: usize, name: String },
    /// A flag where the instruction takes none, or a flag with a name that is not plain.
    #[error("line {line}: {keyword} does not take the flag `{flag}`")]
    UnexpectedFlag { line: usize, keyword: Keyword, flag: String },
    /// buildah reads flags byte by byte and garbles everything else.
    #[error("line {line}: the flag `{flag}` of {keyword} is not ASCII")]
    FlagNotAscii { line: usize, keyword: Keyword, flag: String },
    /// An instruction without its arguments.
    #[error("line {line}: {keyword} needs an argument")]
    NoArguments { line: usize, keyword: Keyword },
    /// Instructions that cannot be triggers.
    #[error("line {line}: {keyword} cannot be an ONBUILD trigger")]
    OnbuildTrigger { line: usize, keyword: Keyword },
    /// FROM with something other than one image and perhaps a name.
    #[error("line {line}: FROM takes an image, or an image, `AS` and a name")]
    FromArguments { line: usize },
    /// A stage name that Docker refuses.
    #[error("line {line}: `{name}` cannot be the name of a stage")]
    StageName { line: usize, name: String },
    /// Two stages with one name.
    #[error("line {line}: the stage name `{name}` is already that of line {first}")]
    DuplicateStage { line: usize, name: String, first: usize },
    /// A `$` expression that buildah does not understand.
    #[error("line {line}: cannot expand `{word}`: {problem}")]
    Expansion { line: usize, word: String, problem: String },
    /// Values of ARG and ENV that add up to too much.
    #[error("line {line}: the values of ARG and ENV take more than {limit} bytes")]
    ScopeTooLarge { line: usize, limit: usize },
    /// A variable in FROM that has no ARG before the first FROM.
    #[error("line {line}: `{written}` uses {name}, but no ARG {name} stands before the first FROM")]
    UndeclaredArg { line: usize, written: String, name: String },
    /// An ARG without a value makes the name of an image invalid.
    #[error("line {line}: `{written}` needs a value for ARG {name}")]
    ArgWithoutValue { line: usize, written: String, name: String },
    /// A variable where Docker and Kiln allow none.
    #[error("line {line}: `{written}` in `from` is not a plain name")]
    FromNotPlain { line: usize, written: String },
    /// `from` without a value, or twice.
    #[error("line {line}: `from` needs exactly one value")]
    FromCount { line: usize },
    /// Another transport, or a name that is not a registry reference.
    #[error("line {line}: `{name}` is refused: only registry references can be used")]
    NotARegistryReference { line: usize, name: String },
    /// An image id, which means something else on every node.
    #[error("line {line}: `{name}` is an image id: only registry references can be used")]
    ImageId { line: usize, name: String },
    /// A name that is no image reference.
    #[error("line {line}: `{name}` is not a valid image reference")]
    InvalidReference { line: usize, name: String, reason: String },
    /// A number or name that no earlier stage has.
    #[error("line {line}: there is no stage `{name}` before this line")]
    NoSuchStage { line: usize, name: String, known: Vec<String> },
    /// The stage comes later.
    #[error("line {line}: the stage `{name}` is defined later, on line {defined}")]
    LaterStage { line: usize, name: String, defined: usize },
    /// buildah compares stage names exactly.
    #[error("line {line}: `{name}` differs from the stage `{stage}` in upper and lower case only")]
    StageCase { line: usize, name: String, stage: String },
    /// A stage number where buildah takes only names.
    #[error("line {line}: buildah does not take the stage number {number} here")]
    StageNumber { line: usize, number: String, name: Option<String> },
    /// `--target` names no stage.
    #[error("there is no stage `{name}` to build")]
    NoSuchTarget { name: String, known: Vec<String> },
    /// buildah before 1.29 does not see that FROM means a stage, and the way around it would change a stage.
    #[error(
        "line {line}: buildah {buildah} does not see that `{written}` means the stage `{stage}`, and ARG {name} has another default in a stage"
    )]
    HiddenStage { line: usize, written: String, stage: String, name: String, buildah: Version },
    /// A here-document on a buildah that reads its lines as instructions.
    #[error("line {line}: buildah {buildah} does not know here-documents, {needs} does")]
    HeredocUnsupported { line: usize, buildah: Version, needs: Version },
    /// A mount that cannot be understood.
    #[error("line {line}: the mount `{mount}` cannot be read: {problem}")]
    Mount { line: usize, mount: String, problem: String },
}

impl DockerfileError {
    /// The line the error is about, if it is about one.
    pub fn line(&self) -> Option<usize> {
        use DockerfileError as E;
        match self {
            E::TooLarge { .. } | E::Empty | E::NoFrom | E::NoSuchTarget { .. } => None,
            E::EscapeUnclear => Some(1),
            E::LineTooLong { line, .. }
            | E::TooMany { line, .. }
            | E::UnknownInstruction { line, .. }
            | E::BeforeFrom { line, .. }
            | E::Syntax { line, .. }
            | E::Ambiguous { line }
            | E::EscapeValue { line, .. }
            | E::EscapeTwice { line }
            | E::LoneContinuation { line }
            | E::HeredocWithoutEnd { line, .. }
            | E::UnexpectedFlag { line, .. }
            | E::FlagNotAscii { line, .. }
            | E::NoArguments { line, .. }
            | E::OnbuildTrigger { line, .. }
            | E::FromArguments { line }
            | E::StageName { line, .. }
            | E::DuplicateStage { line, .. }
            | E::Expansion { line, .. }
            | E::ScopeTooLarge { line, .. }
            | E::UndeclaredArg { line, .. }
            | E::ArgWithoutValue { line, .. }
            | E::FromNotPlain { line, .. }
            | E::FromCount { line }
            | E::NotARegistryReference { line, .. }
            | E::ImageId { line, .. }
            | E::InvalidReference { line, .. }
            | E::NoSuchStage { line, .. }
            | E::LaterStage { line, .. }
            | E::StageCase { line, .. }
            | E::StageNumber { line, .. }
            | E::HiddenStage { line, .. }
            | E::HeredocUnsupported { line, .. }
            | E::Mount { line, .. } => Some(*line),
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        use DockerfileError as E;
        Some(match self {
            E::LineTooLong { .. } => "split the line with a continuation".to_owned(),
            E::Empty | E::NoFrom => "begin with `FROM image`, or `FROM scratch`".to_owned(),
            E::UnknownInstruction { nearest, .. } => format!("did you mean {}?", nearest.as_ref()?),
            E::BeforeFrom { .. } => "only ARG may come before FROM".to_owned(),
            E::EscapeUnclear => "make `# escape=` the first line, with nothing before the #".to_owned(),
            E::UnexpectedFlag { keyword, .. } if !keyword.takes_flags() => {
                format!("{keyword} takes no flags; an argument that begins with -- needs the JSON form")
            }
            E::FromArguments { .. } => "a comment needs a line of its own".to_owned(),
            E::StageName { .. } => {
                "begin with a letter and go on with letters, digits, `_`, `-` and `.`".to_owned()
            }
            E::Expansion { .. } => {
                "buildah expands $NAME, ${NAME}, ${NAME:-default} and ${NAME:+value}".to_owned()
            }
            E::UndeclaredArg { name, .. } => format!("write `ARG {name}=value` before the first FROM"),
            E::ArgWithoutValue { name, .. } => {
                format!("give `--build-arg {name}=value`, or a default: `ARG {name}=value`")
            }
            E::FromNotPlain { .. } => "define a stage `FROM ${IMAGE} AS name` and use its name".to_owned(),
            E::NotARegistryReference { .. } | E::ImageId { .. } => {
                "push the image to a registry and name it as host/repository:tag".to_owned()
            }
            E::InvalidReference { reason, .. } => reason.clone(),
            E::NoSuchStage { known, .. } | E::NoSuchTarget { known, .. } => known_stages(known),
            E::LaterStage { .. } => {
                "move the stage up; an image of that name needs its full reference".to_owned()
            }
            E::StageCase { stage, .. } => format!("write `{stage}`"),
            E::StageNumber { name: Some(name), .. } => format!("write the name `{name}`"),
            E::StageNumber { name: None, .. } => "name the stage with `AS` and use the name".to_owned(),
            E::HiddenStage { stage, .. } => format!("write `FROM {stage}`, or use buildah 1.29 or later"),
            E::Mount { .. } => "write option=value,option=value with plain values; a variable needs an ARG or ENV in the stage".to_owned(),
            E::HeredocUnsupported { .. } => "write the lines with `&& \\`, or copy a file".to_owned(),
            _ => return None,
        })
    }
}

fn known_stages(known: &[String]) -> String {
    if known.is_empty() {
        return "no stage comes before it".to_owned();
    }
    format!("the stages are {}", known.join(", "))
}
