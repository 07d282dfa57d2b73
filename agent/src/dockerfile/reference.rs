//! Pure: the external images that a build needs, each as buildah will look it up.

use oci_spec::distribution::Reference;

use super::expand::expand;
use super::scope::HeadingArgs;
use super::stages::Source;
use super::{BuildInput, Dockerfile, DockerfileError, Instruction, Keyword, Stage, features, mounts};
use crate::version::Version;

/// Transports that read something of the node. `docker` is not among them: `docker:dind` is an image, and
/// `docker://…` is caught by its `//`.
const TRANSPORTS: [&str; 9] = [
    "atomic",
    "containers-storage",
    "dir",
    "docker-archive",
    "docker-daemon",
    "oci",
    "oci-archive",
    "sif",
    "tarball",
];

/// Where an image is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// `FROM`.
    From,
    /// `COPY --from` or `ADD --from`.
    Copy,
    /// `RUN --mount=…,from=`.
    Mount,
}

/// An image that the build needs, once for every place that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseReference {
    /// The line that names it.
    pub line: usize,
    /// The name as written.
    pub written: String,
    /// The name after expansion: what buildah will look for.
    pub lookup: String,
    /// The same as a full reference: `docker.io`, `library/` and `latest` where the name leaves them out.
    pub reference: Reference,
    /// Where it is used.
    pub usage: Usage,
    /// `FROM --platform`, if it is not empty after expansion. buildah 1.28 goes on with it in the stages behind.
    pub platform: Option<String>,
}

impl Dockerfile {
    /// Every external image that the build of the target needs: nothing may be fetched during the build.
    pub fn references(&self, input: &BuildInput<'_>) -> Result<Vec<BaseReference>, DockerfileError> {
        self.refuse_unknown_heredocs(input)?;
        let heading = self.heading_args(input)?;
        let mut references = Vec::new();
        for index in self.needed_stages(input)? {
            let Some(stage) = self.stages.get(index) else { continue };
            if let (lookup, Source::Image(_)) = self.base_of(stage, &heading)? {
                references.push(BaseReference {
                    line: stage.line,
                    written: stage.base.clone(),
                    reference: parse(stage.line, &lookup)?,
                    lookup,
                    usage: Usage::From,
                    platform: self.platforms_of(stage, input, &heading).0,
                });
            }
            for instruction in self.run_in(stage, &heading)? {
                for from in mounts::from_names(instruction)? {
                    if let Source::Image(lookup) = self.resolve_from(stage, &from)? {
                        references.push(used_by(&from, lookup)?);
                    }
                }
            }
        }
        Ok(references)
    }

    /// The lines of a here-document are instructions to a buildah that does not know it, FROM included.
    fn refuse_unknown_heredocs(&self, input: &BuildInput<'_>) -> Result<(), DockerfileError> {
        let needs = features::HEREDOC.since;
        match self.instructions.iter().find(|instruction| !instruction.heredocs.is_empty()) {
            Some(instruction) if input.buildah < needs => Err(DockerfileError::HeredocUnsupported {
                line: instruction.start_line,
                buildah: input.buildah,
                needs,
            }),
            _ => Ok(()),
        }
    }

    /// `FROM --platform` of a stage: as the file means it, and as buildah sees it. Before 1.37 that knows only
    /// build arguments there, and takes an unknown variable for the platform of the node.
    pub(super) fn platforms_of(
        &self,
        stage: &Stage,
        input: &BuildInput<'_>,
        heading: &HeadingArgs,
    ) -> (Option<String>, Option<String>) {
        const SEES_ARGS: Version = Version::new(1, 37, 0);
        let flags = self.instructions_of(stage).first().map(|from| from.flags.as_slice()).unwrap_or_default();
        let Some(written) = flags.iter().rev().find_map(|flag| flag.strip_prefix("--platform=")) else {
            return (None, None);
        };
        let given = |name: &str| input.build_args.get(name).cloned();
        let platform = |value: &dyn Fn(&str) -> Option<String>| {
            expand(written, value).ok().map(|platform| platform.text).filter(|text| !text.is_empty())
        };
        let meant = platform(&|name| given(name).or_else(|| heading.get(name)));
        let seen = if input.buildah < SEES_ARGS { platform(&given) } else { meant.clone() };
        (meant, seen)
    }
}

fn used_by(from: &mounts::FromName, lookup: String) -> Result<BaseReference, DockerfileError> {
    Ok(BaseReference {
        line: from.line,
        written: from.name.clone(),
        reference: parse(from.line, &lookup)?,
        lookup,
        usage: if from.in_mount { Usage::Mount } else { Usage::Copy },
        platform: None,
    })
}

/// A registry reference, or the reason why `name` is none.
pub(super) fn parse(line: usize, name: &str) -> Result<Reference, DockerfileError> {
    let invalid = |reason: &str| DockerfileError::InvalidReference {
        line,
        name: name.to_owned(),
        reason: reason.to_owned(),
    };
    let transport = name.split_once(':').map(|(transport, _)| transport);
    if name.contains("//") || transport.is_some_and(|transport| TRANSPORTS.contains(&transport)) {
        return Err(DockerfileError::NotARegistryReference { line, name: name.to_owned() });
    }
    if is_image_id(name) {
        return Err(DockerfileError::ImageId { line, name: name.to_owned() });
    }
    // The parser takes letters of any script in a tag; registries do not.
    if !name.is_ascii() {
        return Err(invalid("only ASCII characters are allowed"));
    }
    let reference: Reference = name.parse().map_err(|_| invalid("write it as host/repository:tag"))?;
    if reference.repository().chars().any(|c| c.is_ascii_uppercase()) {
        return Err(invalid("a repository is written in lower case"));
    }
    Ok(reference)
}

/// buildah takes such a name for the id of an image in its own store.
fn is_image_id(name: &str) -> bool {
    let hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.strip_prefix("sha256:").is_some() || (name.len() == 64 && hex(name)) || {
        name.strip_prefix('@').is_some_and(hex)
    }
}

/// Whether an instruction names its source with `--from`.
pub(super) fn copies_from(instruction: &Instruction) -> bool {
    matches!(instruction.keyword, Keyword::Add | Keyword::Copy)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{BUILDAH_1_28, BUILDAH_NEW, args, input};
    use super::*;

    fn references(text: &str, given: &[(&str, &str)]) -> Result<Vec<BaseReference>, DockerfileError> {
        Dockerfile::parse(text)?.references(&input(&args(given)))
    }

    fn names(text: &str, given: &[(&str, &str)]) -> Result<Vec<String>, DockerfileError> {
        Ok(references(text, given)?.iter().map(|r| format!("{} {}", r.line, r.reference.whole())).collect())
    }

    #[test]
    fn names_every_image_that_buildah_looks_up() {
        for (text, given, expected) in [
            ("FROM alpine", vec![], vec!["1 docker.io/library/alpine:latest"]),
            ("FROM 'alpine'", vec![], vec!["1 docker.io/library/alpine:latest"]),
            ("from grafana/k6:1 as k", vec![], vec!["1 docker.io/grafana/k6:1"]),
            ("FROM docker:dind", vec![], vec!["1 docker.io/library/docker:dind"]),
            ("FROM localhost/x", vec![], vec!["1 localhost/x:latest"]),
            ("FROM reg:5000/a/b:c", vec![], vec!["1 reg:5000/a/b:c"]),
            ("FROM index.docker.io/x", vec![], vec!["1 docker.io/library/x:latest"]),
            ("FROM scratch", vec![], vec![]),
            ("ARG V=3\nFROM alpine:$V", vec![], vec!["2 docker.io/library/alpine:3"]),
            ("ARG V=3\nFROM alpine:$V", vec![("V", "4")], vec!["2 docker.io/library/alpine:4"]),
            ("ARG V\nFROM alpine:${V:-5}", vec![], vec!["2 docker.io/library/alpine:5"]),
            ("ARG A=1\nARG B=${A}2\nFROM i:${B:+y}${C:-no}", vec![], vec!["3 docker.io/library/i:yno"]),
            ("ARG V=\"3\"\nFROM \"alpine:${V}\"", vec![], vec!["2 docker.io/library/alpine:3"]),
            ("ARG R\nFROM ${R}alpine", vec![], vec!["2 docker.io/library/alpine:latest"]),
            ("ARG R\nFROM ${R}alpine", vec![("R", "reg:1/")], vec!["2 reg:1/alpine:latest"]),
            ("ARG TARGETARCH\nFROM a:$TARGETARCH", vec![], vec!["2 docker.io/library/a:amd64"]),
            ("ARG A=x B=y\nFROM $A:$B", vec![], vec!["2 docker.io/library/x:y"]),
            ("FROM a AS b\nFROM b", vec![], vec!["1 docker.io/library/a:latest"]),
            ("FROM a AS b\nFROM c", vec![], vec!["2 docker.io/library/c:latest"]),
            ("FROM golang AS golang", vec![], vec!["1 docker.io/library/golang:latest"]),
            (
                "FROM scratch\nCOPY --from=nginx:1 / /\nADD --from=x a /\nRUN --mount=type=bind,from=y,target=/y z",
                vec![],
                vec![
                    "2 docker.io/library/nginx:1",
                    "3 docker.io/library/x:latest",
                    "4 docker.io/library/y:latest",
                ],
            ),
            (
                "FROM scratch AS a\nONBUILD COPY --from=x / /\nFROM a",
                vec![],
                vec!["2 docker.io/library/x:latest"],
            ),
            ("FROM scratch\nCOPY --from=scratch / /", vec![], vec![]),
        ] {
            assert_eq!(names(text, &given), Ok(expected.into_iter().map(str::to_owned).collect()), "{text}");
        }
    }

    #[test]
    fn digests_and_platforms_are_kept() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let text = format!("FROM --platform=$BUILDPLATFORM x:1@{digest}\n");
        let found = &references(&text, &[]).unwrap()[0];
        assert_eq!(
            (found.lookup.as_str(), found.reference.digest()),
            (&*format!("x:1@{digest}"), Some(&*digest))
        );
        assert_eq!((found.platform.as_deref(), found.usage), (None, Usage::From));
        let other = references("ARG P=linux/arm64\nFROM --platform=$P x\n", &[]).unwrap();
        assert_eq!(other[0].platform.as_deref(), Some("linux/arm64"));
    }

    /// A word of the error for each, and its line.
    #[test]
    fn refuses_what_is_no_registry_reference() {
        let id = format!("FROM {}", "0a".repeat(32));
        let short_id = format!("FROM sha256:{}", "0".repeat(12));
        for (text, line, word) in [
            ("FROM dir:/etc", 1, "only registry references"),
            ("FROM dir:v1", 1, "only registry references"),
            ("FROM oci:/x:y", 1, "only registry references"),
            ("FROM oci-archive:/x", 1, "only registry references"),
            ("FROM docker-archive:/x", 1, "only registry references"),
            ("FROM docker-daemon:x:y", 1, "only registry references"),
            ("FROM containers-storage:x", 1, "only registry references"),
            ("FROM sif:/x", 1, "only registry references"),
            ("FROM docker://x", 1, "only registry references"),
            ("FROM https://x/y", 1, "only registry references"),
            ("ARG T=dir\nFROM $T:/x", 2, "only registry references"),
            ("FROM scratch\nCOPY --from=dir:/x / /", 2, "only registry references"),
            ("FROM scratch\nRUN --mount=target=/x,from=oci:/x y", 2, "only registry references"),
            (id.as_str(), 1, "image id"),
            (short_id.as_str(), 1, "image id"),
            ("FROM Alpine", 1, "not a valid image reference"),
            ("FROM FOO/bar", 1, "not a valid image reference"),
            ("FROM alpine:", 1, "not a valid image reference"),
            ("FROM alpine:é", 1, "not a valid image reference"),
            ("FROM -x", 1, "not a valid image reference"),
            ("FROM ../x", 1, "not a valid image reference"),
            ("FROM /x", 1, "not a valid image reference"),
            ("FROM a@sha256:1234", 1, "not a valid image reference"),
            ("FROM alpine:$V", 1, "no ARG V"),
            ("FROM alpine$V", 1, "no ARG V"),
            ("ARG V=1\nFROM a\nARG W=2\nFROM b:$W", 4, "no ARG W"),
            ("FROM a:$TARGETARCH", 1, "no ARG TARGETARCH"),
            ("ARG V\nFROM alpine:$V", 2, "needs a value for ARG V"),
            ("ARG V=\nFROM $V", 2, "needs a value for ARG V"),
            ("ARG V=1\nFROM a:${V-2}", 2, "cannot expand"),
            ("ARG V=1\nFROM a:${V", 2, "cannot expand"),
            ("ARG V=${W-2}\nFROM a", 1, "cannot expand"),
            ("FROM scratch AS x\nFROM scratch\nCOPY --from=$X / /", 3, "not a plain name"),
            ("FROM scratch\nRUN --mount=target=/x,from=$X y", 2, "not a plain name"),
            ("FROM scratch\nCOPY --from= / /", 2, "exactly one value"),
            ("FROM scratch\nCOPY --from / /", 2, "exactly one value"),
            ("FROM scratch\nCOPY --from=a --from=b / /", 2, "exactly one value"),
            ("FROM scratch\nCOPY --from=1 / /", 2, "no stage `1`"),
            ("FROM scratch\nCOPY --from=0 / /", 2, "no stage `0`"),
            ("FROM scratch\nCOPY --from=b / /\nFROM x AS b\nFROM 'x'\nCOPY --from=0 / /", 2, "defined later"),
            ("FROM scratch AS Build\nFROM scratch\nCOPY --from=build / /", 3, "upper and lower case"),
            ("FROM scratch AS Build\nFROM build", 2, "upper and lower case"),
            ("FROM scratch AS x\nFROM 0", 2, "stage number"),
            ("FROM scratch AS x\nFROM scratch\nRUN --mount=from=0,target=/x y", 3, "stage number"),
            ("FROM scratch\nRUN <<E\nE\n", 2, "here-documents"),
        ] {
            let error = references(text, &[]).unwrap_err();
            assert_eq!(error.line(), Some(line), "{text}: {error}");
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn an_unknown_target_names_the_stages() {
        let none = args(&[]);
        let file = Dockerfile::parse("FROM a AS x\nFROM b\n").unwrap();
        let input = BuildInput { target: Some("y"), ..input(&none) };
        let error = file.references(&input).unwrap_err();
        assert_eq!(error.hint().unwrap(), "the stages are x, 1");
    }

    #[test]
    fn later_versions_know_more() {
        let none = args(&[]);
        let new = BuildInput { buildah: BUILDAH_NEW, ..input(&none) };
        let lookup =
            |text: &str| Dockerfile::parse(text).unwrap().references(&new).map(|r| r[0].lookup.clone());
        assert_eq!(lookup("FROM a:$TARGETARCH").unwrap(), "a:amd64");
        assert_eq!(lookup("FROM a\nRUN <<E\nFROM dir:/\nE").unwrap(), "a");
        let arm = |buildah| {
            let input = BuildInput { architecture: "arm64", buildah, ..input(&none) };
            let file = Dockerfile::parse("ARG TARGETPLATFORM\nFROM a:${TARGETPLATFORM}").unwrap();
            file.heading_args(&input).unwrap().get("TARGETPLATFORM").unwrap()
        };
        assert_eq!(
            (arm(BUILDAH_1_28).as_str(), arm(BUILDAH_NEW).as_str()),
            ("linux/arm64/v8", "linux/arm64")
        );
    }
}
