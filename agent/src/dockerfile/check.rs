//! Pure: what this buildah cannot build, and what no build may ask for.

use std::collections::BTreeSet;

use kiln_protocol::request::ImageFormat;

use super::features::{self, ADD_GIT, Feature, Flag, HEREDOC, SYMBOLIC_CHMOD};
use super::scope::Scope;
use super::stages::Source;
use super::{BuildInput, Dockerfile, DockerfileError, Instruction, Keyword, mounts, options, words};
use crate::version::Version;

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The build must not start.
    Error,
    /// The build may fail.
    Warning,
}

/// One thing that stands in the way of a build.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The line, 1-based.
    pub line: usize,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// The problems found so far.
pub(super) struct Findings {
    problems: BTreeSet<Problem>,
    /// Lines and names of `from` that mean an image.
    images: BTreeSet<(usize, String)>,
}

impl Findings {
    pub(super) fn push(
        &mut self,
        line: usize,
        severity: Severity,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.problems.insert(Problem { line, severity, message: message.into(), hint: hint.into() });
    }

    pub(super) fn error(&mut self, line: usize, message: impl Into<String>, hint: impl Into<String>) {
        self.push(line, Severity::Error, message, hint);
    }

    /// Notes that `buildah` lacks a feature, if it does.
    pub(super) fn lacks(&mut self, line: usize, feature: &Feature, buildah: Version) {
        let Feature { name, since, instead } = feature;
        match features::lack(feature, buildah) {
            Some(Severity::Error) => {
                self.error(line, format!("buildah {buildah} does not know {name}, {since} does"), *instead);
            }
            Some(Severity::Warning) => {
                let message =
                    format!("the Debian and Ubuntu packages of buildah {buildah} do not know {name}");
                self.push(line, Severity::Warning, message, *instead);
            }
            None => {}
        }
    }

    fn refused(&mut self, error: &DockerfileError) {
        let line = error.line().unwrap_or(1);
        let message = error.to_string();
        let message = message.strip_prefix(&format!("line {line}: ")).unwrap_or(&message);
        self.error(line, message, error.hint().unwrap_or_default());
    }

    /// Whether `from` on this line is an image rather than a stage.
    pub(super) fn is_image(&self, line: usize, name: &str) -> bool {
        self.images.contains(&(line, name.to_owned()))
    }
}

impl Dockerfile {
    /// Everything that is known to fail or to be refused before a slot starts, by line. Images that cannot be
    /// named are found by [`Dockerfile::references`], missing secrets by [`Dockerfile::secret_ids`].
    ///
    /// Stages that buildah will not build are not looked at, but for here-documents, which change how everything
    /// behind them is read.
    pub fn check(&self, input: &BuildInput<'_>, format: ImageFormat) -> Vec<Problem> {
        let mut out = Findings { problems: BTreeSet::new(), images: self.images_in_from(input) };
        for instruction in self.instructions.iter().filter(|instruction| !instruction.heredocs.is_empty()) {
            out.lacks(instruction.start_line, &HEREDOC, input.buildah);
        }
        let walked = self.walk(input, |instruction, scope| {
            check_instruction(instruction, scope, input.buildah, format, &mut out);
            Ok(())
        });
        if let Err(error) = walked.and_then(|()| self.check_platforms(input, &mut out)) {
            out.refused(&error);
        }
        out.problems.into_iter().collect()
    }

    fn check_platforms(&self, input: &BuildInput<'_>, out: &mut Findings) -> Result<(), DockerfileError> {
        let heading = self.heading_args(input)?;
        let native = format!("linux/{}", input.architecture);
        for index in self.needed_stages(input)? {
            let Some(stage) = self.stages.get(index) else { continue };
            let (meant, seen) = self.platforms_of(stage, input, &heading);
            if meant != seen && meant.as_deref().is_some_and(|meant| meant != native) {
                let message = format!("buildah {} does not see the ARG in FROM --platform", input.buildah);
                out.error(stage.line, message, "write the platform itself, or give it with `--build-arg`");
            }
        }
        Ok(())
    }

    fn images_in_from(&self, input: &BuildInput<'_>) -> BTreeSet<(usize, String)> {
        let mut images = BTreeSet::new();
        let Ok(needed) = self.needed_stages(input) else { return images };
        for stage in self.stages.iter().filter(|stage| needed.contains(&stage.index)) {
            for from in
                self.instructions_of(stage).iter().filter_map(|i| mounts::from_names(i).ok()).flatten()
            {
                if let Ok(Source::Image(_)) = self.resolve_from(stage, &from) {
                    images.insert((from.line, from.name));
                }
            }
        }
        images
    }
}

fn check_instruction(
    instruction: &Instruction,
    scope: &Scope,
    buildah: Version,
    format: ImageFormat,
    out: &mut Findings,
) {
    check_format(instruction, format, out);
    check_flags(instruction, buildah, out);
    match instruction.keyword {
        Keyword::Run => check_mounts(instruction, scope, buildah, out),
        Keyword::Add | Keyword::Copy => check_sources(instruction, buildah, out),
        _ => {}
    }
    if let Some(trigger) = &instruction.trigger {
        check_instruction(trigger, scope, buildah, format, out);
    }
}

fn check_format(instruction: &Instruction, format: ImageFormat, out: &mut Findings) {
    let dropped = matches!(instruction.keyword, Keyword::Healthcheck | Keyword::Onbuild | Keyword::Shell);
    if format == ImageFormat::Oci && dropped {
        let message = format!("the OCI image format has no {}", instruction.keyword);
        out.error(instruction.start_line, message, "use `--format docker`, or remove the instruction");
    }
}

fn check_flags(instruction: &Instruction, buildah: Version, out: &mut Findings) {
    let (line, keyword) = (instruction.start_line, instruction.keyword);
    for flag in &instruction.flags {
        let (name, value) = flag.split_once('=').map_or((flag.as_str(), None), |(n, v)| (n, Some(v)));
        let name = name.trim_start_matches('-');
        match features::flag(keyword, name) {
            Some(Flag::Known) => check_value(instruction, name, value, buildah, out),
            Some(Flag::Since(feature)) => {
                out.lacks(line, &feature, buildah);
                check_value(instruction, name, value, buildah, out);
            }
            Some(Flag::Refused(why)) => out.error(line, format!("{keyword} --{name} is refused"), why),
            None => {
                let newer = options::is_newer_than_known(buildah);
                let severity = if newer { Severity::Warning } else { Severity::Error };
                let message = format!("buildah does not know the flag --{name} of {keyword}");
                let hint = format!("{keyword} takes {}", features::flags_of(keyword).join(", "));
                out.push(line, severity, message, hint);
            }
        }
    }
}

fn check_value(
    instruction: &Instruction,
    name: &str,
    value: Option<&str>,
    buildah: Version,
    out: &mut Findings,
) {
    let line = instruction.start_line;
    let is_switch = matches!(name, "link" | "parents" | "keep-git-dir");
    match (name, value) {
        (_, None | Some("")) if !is_switch => {
            let message = format!("{} --{name} needs a value", instruction.keyword);
            out.error(line, message, format!("write `--{name}=value`"));
        }
        ("chmod", Some(mode)) if !mode.contains('$') && !is_octal(mode) => {
            out.lacks(line, &SYMBOLIC_CHMOD, buildah);
        }
        ("network", Some("host")) => {
            out.error(
                line,
                "RUN --network=host is refused",
                "leave it out: a RUN step has the slot's network",
            );
        }
        _ => {}
    }
}

fn is_octal(mode: &str) -> bool {
    !mode.is_empty() && mode.bytes().all(|byte| matches!(byte, b'0'..=b'7'))
}

fn check_mounts(instruction: &Instruction, scope: &Scope, buildah: Version, out: &mut Findings) {
    // The names are checked too: `from` may be unusable without a variable in it.
    if let Err(error) = mounts::from_names(instruction) {
        return out.refused(&error);
    }
    let expanded = mounts::mounts_of(instruction)
        .and_then(|mounts| mounts.iter().map(|mount| mount.expanded(scope)).collect::<Result<Vec<_>, _>>());
    match expanded {
        Ok(mounts) => options::check(&mounts, buildah, out),
        Err(error) => out.refused(&error),
    }
}

/// Remote sources. A plain URL is fine: ADD fetches it within the slot's network.
fn check_sources(instruction: &Instruction, buildah: Version, out: &mut Findings) {
    let line = instruction.start_line;
    let mut words = words::json_strings(&instruction.args).unwrap_or_else(|| {
        words::blank_separated(&instruction.args).into_iter().map(str::to_owned).collect()
    });
    words.pop();
    for source in &words {
        let over_http = source.starts_with("http://") || source.starts_with("https://");
        if instruction.keyword == Keyword::Copy && over_http {
            out.error(line, "COPY cannot fetch a URL", "use ADD");
        } else if instruction.keyword == Keyword::Add && over_http && is_git(source) {
            // Older versions store the web page that the URL shows.
            out.lacks(line, &ADD_GIT, buildah);
        } else if ["git@", "git://", "ssh://"].iter().any(|scheme| source.starts_with(scheme)) {
            let hint = "use https, or clone it in a RUN step with a secret mount";
            out.error(line, format!("buildah cannot fetch `{source}`"), hint);
        }
    }
}

fn is_git(url: &str) -> bool {
    let end = url.find(['#', '?']).unwrap_or(url.len());
    url.get(..end).is_some_and(|url| url.strip_suffix(".git").is_some())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{BUILDAH_1_28, BUILDAH_NEW, args, input};
    use super::*;

    fn problems(text: &str, buildah: Version, format: ImageFormat) -> Vec<Problem> {
        let given = args(&[("GIVEN", "ok")]);
        let input = BuildInput { buildah, ..input(&given) };
        Dockerfile::parse(text).unwrap().check(&input, format)
    }

    /// Runs `instruction` as the second line and gives the messages of errors and warnings.
    fn messages(instruction: &str, buildah: Version) -> (Vec<String>, Vec<String>) {
        let text = format!("FROM scratch\n{instruction}\n");
        let (mut errors, mut warnings) = (Vec::new(), Vec::new());
        for problem in problems(&text, buildah, ImageFormat::Docker) {
            assert_eq!(problem.line, 2, "{instruction}: {problem:?}");
            assert!(!problem.hint.is_empty(), "{instruction}: {problem:?}");
            match problem.severity {
                Severity::Error => errors.push(problem.message),
                Severity::Warning => warnings.push(problem.message),
            }
        }
        (errors, warnings)
    }

    #[test]
    fn ordinary_instructions_have_no_problem() {
        for instruction in [
            "RUN --mount=type=cache,target=/root/.cache make",
            "RUN --mount=type=cache,id=apt-1.x_y,target=/c,sharing=locked,uid=1,gid=1,mode=0700 make",
            "RUN --mount=target=/src make",
            "RUN --mount=type=bind,source=src/a,dst=/src,rw make",
            "RUN --mount=type=bind,from=nginx,source=/etc,target=/e,ro make",
            "RUN --mount=type=tmpfs,target=/t,tmpfs-size=1m make",
            "RUN --mount=type=secret,id=npm,required=true,mode=0400 --mount=type=cache,target=/c make",
            "ARG A=x\nRUN --mount=type=cache,id=$A,target=/c make",
            "ARG GIVEN\nRUN --mount=type=cache,id=${GIVEN},target=/c make",
            "ENV A=/x\nRUN --mount=target=$A/y make",
            "COPY --chown=1:1 --chmod=755 --from=nginx /a /b",
            "COPY --chmod=$M a b",
            "ADD https://example.com/a.tar.gz /a",
            "ADD --chmod=0644 http://example.com/x.git.zip /a",
            "HEALTHCHECK --interval=1s --timeout=1s --start-period=1s --retries=2 CMD x",
            "ONBUILD COPY a b",
            "SHELL [\"/bin/sh\"]",
        ] {
            assert_eq!(
                problems(&format!("FROM scratch\n{instruction}\n"), BUILDAH_1_28, ImageFormat::Docker),
                []
            );
        }
    }

    /// An instruction, a word of its error with 1.28.2, and the first version without error.
    #[test]
    fn features_name_the_version_that_has_them() {
        for (instruction, word, since) in [
            ("RUN <<E\nx\nE", "here-documents, 1.33.0 does", (1, 33)),
            ("COPY <<E /x\ny\nE", "here-documents", (1, 33)),
            ("COPY --link a b", "--link, 1.41.0 does", (1, 41)),
            ("ADD --link=true a b", "--link", (1, 41)),
            ("COPY --exclude=x a b", "--exclude, 1.38.0", (1, 38)),
            ("COPY --parents a b", "COPY --parents, 1.40.0", (1, 40)),
            ("ADD --checksum=sha256:1 http://x/y z", "ADD --checksum, 1.33.0", (1, 33)),
            ("ADD --keep-git-dir=true a b", "--keep-git-dir", (1, 46)),
            ("ADD https://x/y.git z", "git repository, 1.38.0", (1, 38)),
            ("ADD [\"https://x/y.git#main\", \"z\"]", "git repository", (1, 38)),
            ("COPY --chmod=u+x a b", "--chmod with letters", (1, 46)),
            ("RUN --network=none x", "RUN --network, 1.30.0", (1, 30)),
            ("HEALTHCHECK --start-interval=1s CMD x", "--start-interval, 1.36.0", (1, 36)),
            ("RUN --mount=type=cache,target=c x", "without a leading /, 1.29.0", (1, 29)),
            ("RUN --mount=type=secret,id=a,env=A x", "environment variables, 1.44.0", (1, 44)),
            ("RUN --mount=type=cache,from=nginx,target=/c x", "cache mount from an image, 1.39.0", (1, 39)),
        ] {
            let (errors, _) = messages(instruction, BUILDAH_1_28);
            assert!(errors.len() == 1 && errors[0].contains(word), "{instruction}: {errors:?}");
            assert!(errors[0].starts_with("buildah 1.28.2 does not know"), "{errors:?}");
            let since = Version::new(since.0, since.1, 0);
            assert_eq!(messages(instruction, since).0, Vec::<String>::new(), "{instruction}");
            let before = Version::new(since.major, since.minor - 1, 9);
            assert_eq!(messages(instruction, before).0.len(), 1, "{instruction}");
        }
    }

    #[test]
    fn packages_that_lag_behind_are_warned_of() {
        for (version, warnings) in [((1, 33), 1), ((1, 34), 1), ((1, 35), 0)] {
            let version = Version::new(version.0, version.1, 7);
            assert_eq!(messages("RUN <<E\nx\nE", version).1.len(), warnings, "{version}");
        }
    }

    /// An instruction and a word of its error, whatever the version.
    #[test]
    fn some_things_are_refused_by_every_version() {
        for (instruction, word) in [
            ("RUN --mount=source=../x,target=/x y", "contains `..`"),
            ("RUN --mount=source=a/../../x,target=/x y", "contains `..`"),
            ("RUN --mount=src=/etc,target=/x y", "is absolute"),
            ("RUN --mount=source=/,target=/x y", "is absolute"),
            ("RUN --mount=from=nginx,source=/a/../b,target=/x y", "contains `..`"),
            ("RUN --mount=source=x,target=/x/../y z", "contains `..`"),
            ("RUN --mount=type=cache,target=/../x y", "contains `..`"),
            ("RUN --mount=type=cache,id=../x,target=/x y", "not a plain name"),
            ("RUN --mount=type=cache,id=a/b,target=/x y", "not a plain name"),
            ("RUN --mount=type=cache,id=/x,target=/x y", "not a plain name"),
            ("RUN --mount=type=cache,id=.x,target=/x y", "not a plain name"),
            ("RUN --mount=type=cache,sharing=private,target=/x y", "cache sharing `private`"),
            ("RUN --mount=type=cache y", "without a target"),
            ("RUN --mount=type=secret,id=../x y", "not a plain name"),
            ("RUN --mount=type=secret y", "without an id"),
            ("RUN --mount=type=secret,id=x,required y", "required needs a value"),
            ("RUN --mount=type=secret,id=x,target=/a/../b y", "contains `..`"),
            ("RUN --mount=type=ssh y", "no ssh agent"),
            ("RUN --mount=type=volume,target=/x y", "no mount type `volume`"),
            ("RUN --mount=type=tmpfs,target=/x --mount=target=/y z", "without a type"),
            ("RUN --mount=target=/x,target=/y z", "target is given twice"),
            ("RUN --mount=target=/x,dst=/y z", "target is given twice"),
            ("RUN --mount=$X,target=/y z", "not the name of an option"),
            ("RUN --mount=type=$X,target=/y z", "must be a plain word"),
            ("RUN --mount=target=$X z", "does not define X"),
            ("ARG X=a,b\nRUN --mount=target=/$X z", "contains a comma"),
            ("RUN --mount=target=\\\"/x\\\" z", "quotes and backslashes"),
            ("ARG X=../y\nRUN --mount=source=$X,target=/x z", "contains `..`"),
            ("ARG X=../y\nRUN --mount=type=cache,id=$X,target=/x z", "not a plain name"),
            ("RUN --security=insecure x", "RUN --security is refused"),
            ("RUN --device=/dev/kvm x", "RUN --device is refused"),
            ("RUN --network=host x", "--network=host is refused"),
            ("RUN --mount x", "--mount needs a value"),
            ("RUN --foo=bar x", "does not know the flag --foo"),
            ("COPY --chown a b", "--chown needs a value"),
            ("COPY --keep-git-dir a b", "does not know the flag --keep-git-dir"),
            ("ADD --from=x a b", "ADD --from is refused"),
            ("HEALTHCHECK --every=1s CMD x", "does not know the flag --every"),
            ("COPY https://x/y z", "COPY cannot fetch a URL"),
            ("ADD git@example.com:x/y.git z", "cannot fetch"),
            ("ADD ssh://git@example.com/x z", "cannot fetch"),
            ("ONBUILD RUN --mount=source=/x,target=/x y", "is absolute"),
            ("ONBUILD RUN --mount=type=cache,id=../x,target=/x y", "not a plain name"),
        ] {
            for buildah in [BUILDAH_1_28, BUILDAH_NEW] {
                let text = format!("FROM scratch\n{instruction}\n");
                let found = problems(&text, buildah, ImageFormat::Docker);
                let hit = found.iter().find(|p| p.severity == Severity::Error && p.message.contains(word));
                assert!(hit.is_some_and(|p| !p.hint.is_empty()), "{instruction} {buildah}: {found:?}");
            }
        }
    }

    #[test]
    fn unknown_options_and_flags_are_errors_only_where_the_tables_hold() {
        let later = Version::new(1, 46, 0);
        let option = "RUN --mount=type=tmpfs,size=1m,target=/x y";
        assert!(messages(option, BUILDAH_1_28).0[0].contains("may not know the option size"));
        assert_eq!((messages(option, BUILDAH_NEW).0.len(), messages(option, BUILDAH_NEW).1.len()), (0, 1));
        let flag = "COPY --new a b";
        assert_eq!((messages(flag, BUILDAH_NEW).0.len(), messages(flag, BUILDAH_NEW).1.len()), (1, 0));
        assert_eq!((messages(flag, later).0.len(), messages(flag, later).1.len()), (0, 1));
    }

    #[test]
    fn a_platform_that_buildah_would_overlook() {
        for (platform, buildah, expected) in [
            ("$P", BUILDAH_1_28, 1),
            ("$P", BUILDAH_NEW, 0),
            ("$NATIVE", BUILDAH_1_28, 0),
            ("$BUILDPLATFORM", BUILDAH_1_28, 0),
            ("linux/arm64", BUILDAH_1_28, 0),
        ] {
            let text = format!("ARG P=linux/arm64\nARG NATIVE=linux/amd64\nFROM --platform={platform} a\n");
            assert_eq!(problems(&text, buildah, ImageFormat::Docker).len(), expected, "{platform} {buildah}");
        }
    }

    #[test]
    fn oci_has_no_healthcheck_onbuild_and_shell() {
        let text =
            "FROM a AS x\nSHELL [\"/x\"]\nFROM b AS y\nHEALTHCHECK NONE\nONBUILD SHELL [\"/y\"]\nCMD z\n";
        let lines = |text: &str, format| -> Vec<_> {
            problems(text, BUILDAH_1_28, format).into_iter().map(|p| (p.line, p.message)).collect()
        };
        let no = |line, keyword| (line, format!("the OCI image format has no {keyword}"));
        assert_eq!(lines(text, ImageFormat::Docker), []);
        assert_eq!(lines(text, ImageFormat::Oci), [no(4, "HEALTHCHECK"), no(5, "ONBUILD"), no(5, "SHELL")]);
        let used = text.replace("FROM b", "FROM x");
        assert_eq!(lines(&used, ImageFormat::Oci)[0], no(2, "SHELL"));
    }

    #[test]
    fn stages_that_are_not_built_are_not_checked() {
        let text = "FROM a AS x\nCOPY --link a b\nFROM b\nRUN y\n";
        assert_eq!(problems(text, BUILDAH_1_28, ImageFormat::Oci), []);
        assert_eq!(problems(text, Version::new(1, 26, 0), ImageFormat::Oci).len(), 1);
        let heredoc = "FROM a AS x\nRUN <<E\nE\nFROM b\n";
        assert_eq!(problems(heredoc, BUILDAH_1_28, ImageFormat::Docker).len(), 1);
    }
}
