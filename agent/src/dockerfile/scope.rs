//! Pure: the values that ARG and ENV give to variables, stage by stage.

use std::collections::{BTreeMap, BTreeSet};

use super::expand::expand;
use super::stages::Source;
use super::{BuildInput, Dockerfile, DockerfileError, Instruction, Keyword, Stage, words};
use crate::version::Version;

/// All values of one stage together. The kernel gives a process less than that for its environment in practice.
const MAX_SCOPE: usize = 256 * 1024;

/// From here on FROM knows `TARGETARCH` and its like without an ARG for them.
const PLATFORM_IN_FROM: Version = Version::new(1, 37, 0);

pub(super) fn expansion(line: usize, word: &str, problem: String) -> DockerfileError {
    /// A word may be as long as a line.
    const SHOWN_CHARS: usize = 80;
    DockerfileError::Expansion { line, word: word.chars().take(SHOWN_CHARS).collect(), problem }
}

/// The predefined platform arguments. The build platform is the target platform: Kiln does not cross-build.
fn platform_value(name: &str, input: &BuildInput<'_>) -> Option<String> {
    let architecture = input.architecture;
    // buildah before 1.37 takes the variant from the processor, which only arm64 nodes have.
    let variant = if architecture == "arm64" && input.buildah < PLATFORM_IN_FROM { "v8" } else { "" };
    match name.strip_prefix("TARGET").or_else(|| name.strip_prefix("BUILD"))? {
        "PLATFORM" if variant.is_empty() => Some(format!("linux/{architecture}")),
        "PLATFORM" => Some(format!("linux/{architecture}/{variant}")),
        "OS" => Some("linux".to_owned()),
        "ARCH" => Some(architecture.to_owned()),
        "VARIANT" => Some(variant.to_owned()),
        _ => None,
    }
}

/// The ARGs before the first FROM, which every FROM sees.
#[derive(Debug, Default)]
pub(super) struct HeadingArgs {
    values: BTreeMap<String, String>,
    declared: BTreeSet<String>,
    /// What FROM sees without an ARG.
    predefined: BTreeMap<String, String>,
}

impl HeadingArgs {
    pub(super) fn get(&self, name: &str) -> Option<String> {
        self.values.get(name).or_else(|| self.predefined.get(name)).cloned()
    }

    pub(super) fn is_declared(&self, name: &str) -> bool {
        self.declared.contains(name) || self.predefined.contains_key(name)
    }

    /// Whether there is an ARG for it, but no value.
    pub(super) fn is_empty(&self, name: &str) -> bool {
        self.declared.contains(name) && self.get(name).is_none_or(|value| value.is_empty())
    }
}

/// The variables at one place of a stage.
#[derive(Debug, Default, Clone)]
pub(super) struct Scope {
    args: BTreeMap<String, String>,
    env: BTreeMap<String, String>,
    bytes: usize,
}

impl Scope {
    /// What buildah puts in the place of `$name`: ENV goes before ARG.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        self.env.get(name).or_else(|| self.args.get(name)).cloned()
    }

    fn charge(&mut self, line: usize, name: &str, value: &str) -> Result<(), DockerfileError> {
        self.bytes += name.len() + value.len();
        if self.bytes > MAX_SCOPE {
            return Err(DockerfileError::ScopeTooLarge { line, limit: MAX_SCOPE });
        }
        Ok(())
    }

    fn set_arg(&mut self, line: usize, name: &str, value: String) -> Result<(), DockerfileError> {
        self.charge(line, name, &value)?;
        self.args.insert(name.to_owned(), value);
        Ok(())
    }

    fn set_env(&mut self, line: usize, name: String, value: String) -> Result<(), DockerfileError> {
        self.charge(line, &name, &value)?;
        self.env.insert(name, value);
        Ok(())
    }

    /// Takes over what an ARG or ENV of a stage sets. A word that cannot be expanded is left out: buildah will
    /// report it, and a check that needs the value will say that it is missing.
    fn apply(&mut self, instruction: &Instruction, context: &Context<'_>) -> Result<(), DockerfileError> {
        let line = instruction.start_line;
        // Every word of one instruction sees the values from before it.
        let expanded = |word: &str| expand(word, &|name| self.get(name)).ok().map(|e| e.text);
        match instruction.keyword {
            Keyword::Arg => {
                let words = words::quoted_words(&instruction.args, context.escape);
                let words: Vec<String> = words.iter().filter_map(|word| expanded(word)).collect();
                for (name, default) in words.iter().map(|word| split_arg(word)) {
                    if let Some(value) = context.arg_value(name, default) {
                        self.set_arg(line, name, value)?;
                    }
                }
            }
            Keyword::Env => {
                let pairs = words::pairs(&instruction.args, context.escape);
                let pairs =
                    pairs.iter().filter_map(|(name, value)| Some((expanded(name)?, expanded(value)?)));
                for (name, value) in pairs.collect::<Vec<_>>() {
                    self.set_env(line, name, value)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// What the value of an ARG depends on.
struct Context<'a> {
    input: &'a BuildInput<'a>,
    heading: Option<&'a HeadingArgs>,
    escape: char,
}

impl Context<'_> {
    fn arg_value(&self, name: &str, default: Option<&str>) -> Option<String> {
        let given = self.input.build_args.get(name).cloned();
        let own = given.or_else(|| default.map(str::to_owned));
        own.or_else(|| platform_value(name, self.input))
            .or_else(|| self.heading.and_then(|heading| heading.get(name)))
    }
}

fn split_arg(word: &str) -> (&str, Option<&str>) {
    word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)))
}

impl Dockerfile {
    /// The ARGs before the first FROM.
    pub(super) fn heading_args(&self, input: &BuildInput<'_>) -> Result<HeadingArgs, DockerfileError> {
        let context = Context { input, heading: None, escape: self.escape };
        let mut heading = HeadingArgs::default();
        let mut scope = Scope::default();
        for instruction in self.instructions.iter().take_while(|i| i.keyword == Keyword::Arg) {
            let line = instruction.start_line;
            let expanded = |word: String| match expand(&word, &|name| scope.get(name)) {
                Ok(expanded) => Ok(expanded.text),
                Err(problem) => Err(expansion(line, &word, problem)),
            };
            let words = words::quoted_words(&instruction.args, self.escape).into_iter();
            let words = words.map(expanded).collect::<Result<Vec<_>, _>>()?;
            for (name, default) in words.iter().map(|word| split_arg(word)) {
                heading.declared.insert(name.to_owned());
                if let Some(value) = context.arg_value(name, default) {
                    scope.set_arg(line, name, value)?;
                }
            }
        }
        heading.values = scope.args;
        if input.buildah >= PLATFORM_IN_FROM {
            heading.predefined = predefined(input);
        }
        Ok(heading)
    }

    /// Visits what buildah will run, with the variables at that place: the instructions of the needed stages and
    /// the triggers that a stage inherits from another one.
    pub(super) fn walk<'a>(
        &'a self,
        input: &BuildInput<'_>,
        mut visit: impl FnMut(&'a Instruction, &Scope) -> Result<(), DockerfileError>,
    ) -> Result<(), DockerfileError> {
        let heading = self.heading_args(input)?;
        let context = Context { input, heading: Some(&heading), escape: self.escape };
        let mut finished: BTreeMap<usize, Scope> = BTreeMap::new();
        for index in self.needed_stages(input)? {
            let Some(stage) = self.stages.get(index) else { continue };
            let mut scope = match self.base_of(stage, &heading)?.1 {
                Source::Stage(base) => inherited(finished.get(&base)),
                Source::Scratch | Source::Image(_) => Scope::default(),
            };
            for instruction in self.run_in(stage, &heading)? {
                visit(instruction, &scope)?;
                scope.apply(instruction, &context)?;
            }
            finished.insert(index, scope);
        }
        Ok(())
    }

    /// Build arguments that must be passed to buildah before 1.29 though they only repeat defaults.
    ///
    /// That buildah ignores the default of an ARG when it looks which stage a FROM means (`ARG V=x`,
    /// `FROM stage-${V}`): it skips the stage, or forgets its image, and then looks for an image of that name.
    /// With the value given as a build argument it finds the stage.
    pub fn forced_build_args(
        &self,
        input: &BuildInput<'_>,
    ) -> Result<BTreeMap<String, String>, DockerfileError> {
        const SEES_DEFAULTS: Version = Version::new(1, 29, 0);
        let mut forced = BTreeMap::new();
        if input.buildah >= SEES_DEFAULTS {
            return Ok(forced);
        }
        let heading = self.heading_args(input)?;
        for index in self.needed_stages(input)? {
            let Some(stage) = self.stages.get(index) else { continue };
            if let (name, Source::Stage(_)) = self.base_of(stage, &heading)? {
                self.force_for(stage, &name, &heading, input, &mut forced)?;
            }
        }
        Ok(forced)
    }

    fn force_for(
        &self,
        stage: &Stage,
        base: &str,
        heading: &HeadingArgs,
        input: &BuildInput<'_>,
        forced: &mut BTreeMap<String, String>,
    ) -> Result<(), DockerfileError> {
        let given = |name: &str| input.build_args.get(name).cloned();
        let Ok(seen) = expand(&stage.base, &given) else { return Ok(()) };
        if seen.text == base {
            return Ok(());
        }
        for name in seen.named {
            let Some(value) = heading.get(&name).filter(|_| given(&name).is_none()) else { continue };
            if self.redefines(&name) {
                return Err(DockerfileError::HiddenStage {
                    line: stage.line,
                    written: stage.base.clone(),
                    stage: base.to_owned(),
                    name,
                    buildah: input.buildah,
                });
            }
            forced.insert(name, value);
        }
        Ok(())
    }

    /// Whether a stage gives the ARG a default of its own, which a build argument would override.
    fn redefines(&self, name: &str) -> bool {
        let in_stages = self.stages.iter().flat_map(|stage| self.instructions_of(stage));
        let args = in_stages.filter(|instruction| instruction.keyword == Keyword::Arg);
        args.flat_map(|arg| words::quoted_words(&arg.args, self.escape))
            .any(|word| word.split_once('=').is_some_and(|(other, _)| other == name))
    }
}

/// A stage takes the environment of the stage it is built on, but not its arguments.
fn inherited(base: Option<&Scope>) -> Scope {
    let env = base.map(|base| base.env.clone()).unwrap_or_default();
    let bytes = env.iter().map(|(name, value)| name.len() + value.len()).sum();
    Scope { args: BTreeMap::new(), env, bytes }
}

fn predefined(input: &BuildInput<'_>) -> BTreeMap<String, String> {
    let names = ["TARGET", "BUILD"]
        .into_iter()
        .flat_map(|side| ["PLATFORM", "OS", "ARCH", "VARIANT"].map(|part| format!("{side}{part}")));
    names.filter_map(|name| platform_value(&name, input).map(|value| (name, value))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{BUILDAH_1_28, BUILDAH_NEW, args, input};
    use super::*;

    fn forced(text: &str, given: &[(&str, &str)], buildah: Version) -> Result<Vec<(String, String)>, usize> {
        let given = args(given);
        let input = BuildInput { buildah, ..input(&given) };
        match Dockerfile::parse(text).unwrap().forced_build_args(&input) {
            Ok(forced) => Ok(forced.into_iter().collect()),
            Err(error) => Err(error.line().unwrap()),
        }
    }

    /// The first row failed with buildah 1.28.2 and worked with the argument.
    #[test]
    fn gives_defaults_that_old_buildah_does_not_see() {
        let hidden = "ARG V=build\nFROM scratch AS build\nFROM ${V}\n";
        let build = vec![("V".to_owned(), "build".to_owned())];
        assert_eq!(forced(hidden, &[], BUILDAH_1_28), Ok(build));
        assert_eq!(forced(hidden, &[], BUILDAH_NEW), Ok(vec![]));
        assert_eq!(forced(hidden, &[("V", "build")], BUILDAH_1_28), Ok(vec![]));
        for (text, expected) in [
            ("ARG V=1\nFROM alpine:$V\n", Ok(vec![])),
            ("FROM scratch AS build\nFROM build\n", Ok(vec![])),
            ("FROM scratch AS build\nFROM ${X:-build}\n", Ok(vec![])),
            ("ARG V=build\nFROM scratch AS build\nFROM $V\nFROM scratch\n", Ok(vec![])),
            ("ARG V=build\nFROM scratch AS build\nFROM $V\nARG V=other\n", Err(3)),
        ] {
            assert_eq!(forced(text, &[], BUILDAH_1_28), expected, "{text}");
        }
    }

    /// What variables are at the end of the target stage.
    fn last_scope(text: &str, given: &[(&str, &str)]) -> Scope {
        let given = args(given);
        let file = Dockerfile::parse(&format!("{text}\nCMD end\n")).unwrap();
        let mut last = Scope::default();
        file.walk(&input(&given), |_, scope| {
            last = scope.clone();
            Ok(())
        })
        .unwrap();
        last
    }

    /// Each row was seen to give the same with LABEL in buildah 1.28.2.
    #[test]
    fn scopes_are_those_of_buildah() {
        for (text, given, expected) in [
            ("ARG A=1\nFROM scratch", vec![], None),
            ("ARG A=1\nFROM scratch\nARG A", vec![], Some("1")),
            ("ARG A=1\nFROM scratch\nARG A=2", vec![], Some("2")),
            ("ARG A=1\nFROM scratch\nARG A", vec![("A", "3")], Some("3")),
            ("FROM scratch\nARG A=2", vec![("A", "3")], Some("3")),
            ("FROM scratch", vec![("A", "3")], None),
            ("FROM scratch\nARG A=2\nENV A=4", vec![("A", "3")], Some("4")),
            ("FROM scratch\nENV A=4\nARG A=2", vec![], Some("4")),
            ("FROM scratch\nARG B=x\nARG A=${B}y", vec![], Some("xy")),
            ("FROM scratch\nARG B=x A=${B}y", vec![], Some("y")),
            ("FROM scratch\nENV B=x A=${B}y", vec![], Some("y")),
            ("FROM scratch\nENV A one  two", vec![], Some("one  two")),
            ("FROM scratch\nENV A=\"one two\" B=3", vec![], Some("one two")),
            ("FROM scratch AS a\nENV A=1\nARG B=2\nFROM a", vec![], Some("1")),
            ("FROM scratch AS a\nARG A=2\nFROM a", vec![], None),
            ("FROM scratch AS a\nENV A=1\nFROM scratch", vec![], None),
        ] {
            assert_eq!(last_scope(text, &given).get("A").as_deref(), expected, "{text}");
        }
        let platform = last_scope("FROM scratch\nARG TARGETPLATFORM\nARG TARGETARCH", &[]);
        assert_eq!(platform.get("TARGETPLATFORM").as_deref(), Some("linux/amd64"));
        assert_eq!(platform.get("TARGETARCH").as_deref(), Some("amd64"));
        assert_eq!(platform.get("TARGETOS"), None);
    }

    #[test]
    fn values_cannot_use_up_the_memory() {
        let big = "x".repeat(60_000);
        let many = ["A", "B", "C", "D", "E"].map(|name| format!("ENV {name}={big}\n")).concat();
        let file = Dockerfile::parse(&format!("FROM scratch\n{many}")).unwrap();
        let none = args(&[]);
        let error = file.walk(&input(&none), |_, _| Ok(())).unwrap_err();
        assert_eq!(error, DockerfileError::ScopeTooLarge { line: 6, limit: MAX_SCOPE });
        let doubling = "ENV A=$A$A\n".repeat(60);
        let file = Dockerfile::parse(&format!("FROM scratch\nENV A=xx\n{doubling}")).unwrap();
        assert!(file.walk(&input(&none), |_, _| Ok(())).is_ok());
    }
}
