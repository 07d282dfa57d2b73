//! Pure: the stages of a Dockerfile, which of them a build needs, and what their `from` names mean.

use std::collections::BTreeSet;

use super::expand::{Expanded, expand};
use super::scope::{self, HeadingArgs};
use super::{
    BuildInput, Dockerfile, DockerfileError, Instruction, Keyword, MAX_INSTRUCTIONS, MAX_STAGES, Stage,
    mounts, words,
};
use crate::version::Version;

/// Builds the stages that the target needs and no others. Before, every stage up to the target was built.
const SKIPS_UNUSED_STAGES: Version = Version::new(1, 27, 0);

/// What a name in FROM or in a `from` means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// An earlier stage.
    Stage(usize),
    /// The empty image.
    Scratch,
    /// An image of this name.
    Image(String),
}

/// Cuts instructions into stages.
pub(super) fn split(instructions: &[Instruction]) -> Result<Vec<Stage>, DockerfileError> {
    if instructions.is_empty() {
        return Err(DockerfileError::Empty);
    }
    let mut stages: Vec<Stage> = Vec::new();
    for (at, instruction) in instructions.iter().enumerate() {
        if at == MAX_INSTRUCTIONS {
            let line = instruction.start_line;
            return Err(DockerfileError::TooMany { line, what: "instructions", limit: MAX_INSTRUCTIONS });
        }
        if instruction.keyword == Keyword::From {
            let stage = stage(stages.len(), at, instruction)?;
            check_name(&stages, &stage)?;
            stages.push(stage);
        }
        match stages.last_mut() {
            Some(stage) => stage.instructions.end = at + 1,
            None if instruction.keyword == Keyword::Arg => {}
            None => {
                let (line, keyword) = (instruction.start_line, instruction.keyword);
                return Err(DockerfileError::BeforeFrom { line, keyword });
            }
        }
    }
    if stages.is_empty() { Err(DockerfileError::NoFrom) } else { Ok(stages) }
}

fn stage(index: usize, at: usize, from: &Instruction) -> Result<Stage, DockerfileError> {
    let line = from.start_line;
    if index == MAX_STAGES {
        return Err(DockerfileError::TooMany { line, what: "stages", limit: MAX_STAGES });
    }
    if let Some(flag) = from.flags.iter().find(|flag| !flag.starts_with("--platform=")) {
        let flag = flag.clone();
        return Err(DockerfileError::UnexpectedFlag { line, keyword: Keyword::From, flag });
    }
    let (base, name) = match words::blank_separated(&from.args).as_slice() {
        [base] => ((*base).to_owned(), None),
        [base, keyword, name] if keyword.eq_ignore_ascii_case("as") => {
            ((*base).to_owned(), Some((*name).to_owned()))
        }
        _ => return Err(DockerfileError::FromArguments { line }),
    };
    Ok(Stage { index, name, base, line, instructions: at..at + 1 })
}

fn check_name(stages: &[Stage], new: &Stage) -> Result<(), DockerfileError> {
    let Some(name) = &new.name else { return Ok(()) };
    let plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !name.eq_ignore_ascii_case("scratch");
    if !plain {
        return Err(DockerfileError::StageName { line: new.line, name: name.clone() });
    }
    let same = |stage: &&Stage| stage.name.as_ref().is_some_and(|other| other.eq_ignore_ascii_case(name));
    match stages.iter().find(same) {
        Some(first) => {
            Err(DockerfileError::DuplicateStage { line: new.line, name: name.clone(), first: first.line })
        }
        None => Ok(()),
    }
}

impl Dockerfile {
    /// Lines of the FROM of every base whose files a RUN works on, directly or through stages built on stages.
    pub fn lines_of_running_bases(&self) -> BTreeSet<usize> {
        let mut roots: Vec<usize> = Vec::new();
        let mut lines = BTreeSet::new();
        for stage in &self.stages {
            let names = |other: &&Stage| other.buildah_name().eq_ignore_ascii_case(&stage.base);
            let parent = self.stages[..stage.index].iter().rev().find(names);
            let root = parent.and_then(|parent| roots.get(parent.index).copied()).unwrap_or(stage.line);
            roots.push(root);
            if self.instructions_of(stage).iter().any(|i| i.keyword == super::Keyword::Run) {
                lines.insert(root);
            }
        }
        lines
    }

    /// The most layers that an image of this build can have if every instruction makes its own, on bases with
    /// `of_bases` layers and triggers at most.
    pub fn most_layers(&self, of_bases: usize) -> usize {
        let mut layers: Vec<usize> = Vec::new();
        for stage in &self.stages {
            // A base with a variable may be any earlier stage. Its triggers count here again.
            let below = self.stages[..stage.index].iter().zip(&layers);
            let may_be = |other: &Stage| {
                stage.base.contains('$') || other.buildah_name().eq_ignore_ascii_case(&stage.base)
            };
            let below = below.filter(|(other, _)| may_be(other));
            let below = below.map(|(other, count)| count + self.triggers_of(other)).max().unwrap_or(0);
            let own = self.instructions_of(stage).iter().filter(|i| i.keyword.may_make_a_layer()).count();
            layers.push(below.max(of_bases) + own);
        }
        layers.into_iter().max().unwrap_or(of_bases)
    }

    fn triggers_of(&self, stage: &Stage) -> usize {
        self.instructions_of(stage).iter().filter(|i| i.trigger.is_some()).count()
    }

    /// The stage to build. Like Docker, and unlike buildah, this takes a name in any case and a number; give
    /// buildah the stage's [`Stage::buildah_name`].
    pub fn target(&self, target: Option<&str>) -> Result<&Stage, DockerfileError> {
        let stage = match target {
            None => self.stages.last(),
            Some(name) => {
                let named =
                    |stage: &&Stage| stage.name.as_deref().is_some_and(|n| n.eq_ignore_ascii_case(name));
                self.stages.iter().find(named).or_else(|| self.stages.get(number(name)?))
            }
        };
        stage.ok_or_else(|| DockerfileError::NoSuchTarget {
            name: target.unwrap_or_default().to_owned(),
            known: self.stage_names(self.stages.len()),
        })
    }

    /// The numbers of the stages that buildah will build for the target, in their order.
    pub fn needed_stages(&self, input: &BuildInput<'_>) -> Result<BTreeSet<usize>, DockerfileError> {
        let target = self.target(input.target)?.index;
        if input.buildah < SKIPS_UNUSED_STAGES {
            return Ok((0..=target).collect());
        }
        let heading = self.heading_args(input)?;
        let mut needed = BTreeSet::new();
        let mut open = vec![target];
        while let Some(index) = open.pop() {
            if needed.insert(index) {
                open.extend(self.stages_used_by(index, &heading)?);
            }
        }
        Ok(needed)
    }

    fn stages_used_by(&self, index: usize, heading: &HeadingArgs) -> Result<Vec<usize>, DockerfileError> {
        let mut used = Vec::new();
        let mut add = |source| {
            if let Source::Stage(stage) = source {
                used.push(stage);
            }
        };
        let Some(stage) = self.stages.get(index) else { return Ok(used) };
        add(self.base_of(stage, heading)?.1);
        for instruction in self.run_in(stage, heading)? {
            for name in mounts::from_names(instruction)? {
                add(self.resolve_from(stage, &name)?);
            }
        }
        Ok(used)
    }

    /// The instructions that buildah runs in a stage: its own, and before them the triggers of its base if that is
    /// a stage of this file. (The triggers of a base image are known only once it is fetched.)
    pub(super) fn run_in<'a>(
        &'a self,
        stage: &'a Stage,
        heading: &HeadingArgs,
    ) -> Result<impl Iterator<Item = &'a Instruction>, DockerfileError> {
        let base = match self.base_of(stage, heading)?.1 {
            Source::Stage(base) => self.stages.get(base),
            Source::Scratch | Source::Image(_) => None,
        };
        let of_base = base.map_or(&[][..], |base| self.instructions_of(base));
        let triggers = of_base.iter().filter_map(|instruction| instruction.trigger.as_deref());
        Ok(triggers.chain(self.instructions_of(stage)))
    }

    /// What a stage is built on: the name after expansion and what it means.
    pub(super) fn base_of(
        &self,
        stage: &Stage,
        heading: &HeadingArgs,
    ) -> Result<(String, Source), DockerfileError> {
        let expanded = Self::expanded_base(stage, heading)?;
        let name = expanded.text;
        let source = self.resolve_base(stage, &name)?;
        let empty = expanded.named.iter().find(|name| heading.is_empty(name));
        match (&source, empty) {
            // An ARG without a value is fine where the rest is a name: `FROM ${REGISTRY}alpine`.
            (Source::Image(image), Some(empty)) if super::reference::parse(stage.line, image).is_err() => {
                let (written, name) = (stage.base.clone(), empty.clone());
                Err(DockerfileError::ArgWithoutValue { line: stage.line, written, name })
            }
            _ => Ok((name, source)),
        }
    }

    /// FROM sees the ARGs before the first FROM and nothing else.
    fn expanded_base(stage: &Stage, heading: &HeadingArgs) -> Result<Expanded, DockerfileError> {
        let (line, written) = (stage.line, &stage.base);
        let expanded = expand(written, &|name| heading.get(name))
            .map_err(|problem| scope::expansion(line, written, problem))?;
        match expanded.missing.iter().find(|name| !heading.is_declared(name)) {
            // buildah would put nothing in its place; a mistyped name is the only reason to have it.
            Some(name) => {
                Err(DockerfileError::UndeclaredArg { line, written: written.clone(), name: name.clone() })
            }
            None => Ok(expanded),
        }
    }

    fn resolve_base(&self, stage: &Stage, name: &str) -> Result<Source, DockerfileError> {
        if number(name).is_some() {
            let name = number(name).and_then(|number| self.stages.get(number)?.name.clone());
            let number = stage.base.clone();
            return Err(DockerfileError::StageNumber { line: stage.line, number, name });
        }
        // A stage may have the name of its own base (`FROM golang AS golang`): only earlier stages count.
        self.resolve_name(stage.line, stage.index, name)
    }

    /// What `from` in COPY, ADD or a mount means: a number, a stage, `scratch` or an image.
    pub(super) fn resolve_from(
        &self,
        stage: &Stage,
        from: &mounts::FromName,
    ) -> Result<Source, DockerfileError> {
        let line = from.line;
        if let Some(number) = number(&from.name) {
            return self.resolve_number(stage, from, number);
        }
        let later = |other: &&Stage| other.name.as_ref() == Some(&from.name);
        if let Some(later) = self.stages.iter().skip(stage.index).find(later) {
            // buildah would take the name for that of an image.
            let (name, defined) = (from.name.clone(), later.line);
            return Err(DockerfileError::LaterStage { line, name, defined });
        }
        self.resolve_name(line, stage.index, &from.name)
    }

    fn resolve_number(
        &self,
        stage: &Stage,
        from: &mounts::FromName,
        number: usize,
    ) -> Result<Source, DockerfileError> {
        let line = from.line;
        let Some(found) = self.stages.get(number).filter(|found| found.index < stage.index) else {
            // buildah crashes here.
            let (name, known) = (from.name.clone(), self.stage_names(stage.index));
            return Err(DockerfileError::NoSuchStage { line, name, known });
        };
        match (&found.name, from.in_mount) {
            // In a mount buildah skips a named stage that is used by number, and looks for an image `0`.
            (Some(name), true) => Err(DockerfileError::StageNumber {
                line,
                number: from.name.clone(),
                name: Some(name.clone()),
            }),
            _ => Ok(Source::Stage(number)),
        }
    }

    fn resolve_name(&self, line: usize, before: usize, name: &str) -> Result<Source, DockerfileError> {
        let earlier = || self.stages.iter().take(before);
        if let Some(stage) = earlier().find(|stage| stage.name.as_deref() == Some(name)) {
            return Ok(Source::Stage(stage.index));
        }
        if name == "scratch" {
            return Ok(Source::Scratch);
        }
        let in_other_case =
            |stage: &&Stage| stage.name.as_ref().is_some_and(|n| n.eq_ignore_ascii_case(name));
        match earlier().find(in_other_case) {
            Some(stage) => {
                let (name, stage) = (name.to_owned(), stage.buildah_name());
                Err(DockerfileError::StageCase { line, name, stage })
            }
            None => Ok(Source::Image(name.to_owned())),
        }
    }
}

/// A stage number: digits only, as Docker takes it (buildah also takes a sign).
fn number(name: &str) -> Option<usize> {
    name.bytes().all(|byte| byte.is_ascii_digit()).then(|| name.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::super::tests::{BUILDAH_1_28, args, input};
    use super::*;

    #[test]
    fn layers_are_counted_along_stages() {
        for (text, expected) in [
            ("FROM a\nRUN x\nENV A=b\nCOPY a /\nWORKDIR /x\n", 13),
            ("FROM a AS one\nRUN x\nRUN y\nFROM one\nRUN x\nFROM b\nRUN x\n", 13),
            ("FROM a AS one\nRUN x\nONBUILD RUN y\nFROM $B\nRUN x\n", 13),
            ("FROM scratch\n", 10),
        ] {
            assert_eq!(Dockerfile::parse(text).unwrap().most_layers(10), expected, "{text}");
        }
    }

    #[test]
    fn cuts_stages() {
        let file =
            Dockerfile::parse("ARG V=1\nFROM a:$V AS Build\nRUN x\nRUN y\nFROM b\nCOPY --from=Build /x /\n");
        let stages = file.unwrap().stages().to_vec();
        assert_eq!(stages.len(), 2);
        assert_eq!((stages[0].name.as_deref(), stages[0].base.as_str()), (Some("Build"), "a:$V"));
        assert_eq!((stages[0].line, stages[0].instructions.clone()), (2, 1..4));
        assert_eq!(
            (stages[1].index, stages[1].name.as_deref(), stages[1].buildah_name()),
            (1, None, "1".to_owned())
        );
    }

    fn needed(text: &str, target: Option<&str>, buildah: Version) -> Vec<usize> {
        let none = args(&[]);
        let input = BuildInput { target, buildah, ..input(&none) };
        Dockerfile::parse(text).unwrap().needed_stages(&input).unwrap().into_iter().collect()
    }

    #[test]
    fn only_stages_that_the_target_needs() {
        let file = "FROM a AS base\nFROM b AS tool\nFROM c AS unused\nFROM base AS app\nRUN --mount=from=tool,target=/t x\nFROM d AS test\nCOPY --from=app / /\nFROM e\n";
        let old = Version::new(1, 26, 0);
        for (target, buildah, expected) in [
            (None, BUILDAH_1_28, vec![5]),
            (Some("app"), BUILDAH_1_28, vec![0, 1, 3]),
            (Some("APP"), BUILDAH_1_28, vec![0, 1, 3]),
            (Some("3"), BUILDAH_1_28, vec![0, 1, 3]),
            (Some("test"), BUILDAH_1_28, vec![0, 1, 3, 4]),
            (Some("base"), BUILDAH_1_28, vec![0]),
            (Some("base"), old, vec![0]),
            (Some("app"), old, vec![0, 1, 2, 3]),
        ] {
            assert_eq!(needed(file, target, buildah), expected, "{target:?} {buildah}");
        }
    }

    #[test]
    fn finds_stages_by_every_way() {
        for (text, expected) in [
            ("FROM a\nFROM b\nCOPY --from=0 / /", vec![0, 1]),
            ("FROM a AS x\nFROM b\nCOPY --from=0 / /", vec![0, 1]),
            ("FROM a\nFROM b\nRUN --mount=from=0,target=/x y", vec![0, 1]),
            ("FROM a AS x\nFROM b\nCOPY --from=\"x\" / /", vec![0, 1]),
            ("FROM golang AS golang\nFROM b\nCOPY --from=golang / /", vec![0, 1]),
            ("FROM a AS golang\nFROM golang AS x\nFROM x", vec![0, 1, 2]),
            ("ARG V=x\nFROM a AS x\nFROM $V", vec![0, 1]),
            ("FROM a AS x\nFROM b AS y\nONBUILD COPY --from=x / /\nFROM y", vec![0, 1, 2]),
            ("FROM a AS x\nFROM b AS y\nONBUILD COPY --from=x / /\nFROM b", vec![2]),
            ("FROM a AS x\nFROM b\nCOPY --from=nginx / /", vec![1]),
            ("FROM a AS x\nFROM b\nRUN echo --from=x", vec![1]),
        ] {
            assert_eq!(needed(text, None, BUILDAH_1_28), expected, "{text}");
        }
    }
}
