//! Whose layers a build may take over (pure).
//!
//! buildah compares the instructions, the content of COPY and ADD, and the base's layers. It does not compare
//! everything that decides an image (each of these was tried with 1.28.2): what a bind mount shows, the value of an
//! ARG where ENV, LABEL, USER or WORKDIR uses it, times, labels that are gone, the config of the base. What it
//! overlooks is part of the key, so such a build finds nothing that it could mistake for its own.

use std::collections::BTreeMap;

use kiln_protocol::Digest;
use kiln_protocol::request::BuildRequest;
use serde::Serialize;
use sha2::Digest as _;

use crate::dockerfile::{Dockerfile, Instruction, Keyword};
use crate::version::Version;

/// Characters of the hash that name a cache: 128 bits.
const NAME_CHARS: usize = 32;

/// Who shares a layer cache. RUN steps of one build are cached results of the next, so builds that must not trust
/// each other differ in one of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerKey {
    /// The owner of the repository.
    pub namespace: String,
    /// What is built.
    pub repository: String,
    /// The stage that is built; empty for the last one.
    pub target: String,
    /// Who may start such a build.
    pub trust: String,
}

/// What decides an image and is not compared by buildah.
#[derive(Debug, Serialize)]
pub(crate) struct Circumstances<'a> {
    pub(crate) buildah: String,
    pub(crate) format: &'static str,
    pub(crate) timestamp: Option<i64>,
    pub(crate) network: &'a kiln_protocol::request::NetworkMode,
    /// Names only: buildah sets the values by a last instruction, which it compares.
    pub(crate) labels: Vec<&'a str>,
    /// Config digests of the base images under the names that the Dockerfile uses.
    pub(crate) bases: Vec<(&'a str, &'a Digest)>,
    pub(crate) arguments: Arguments<'a>,
    pub(crate) mounted: Option<Mounted<'a>>,
}

/// Arguments as far as other instructions than RUN use them: RUN's are part of what buildah compares.
#[derive(Debug, Serialize)]
pub(crate) struct Arguments<'a> {
    values: BTreeMap<&'a str, &'a str>,
    /// Every ARG with its default that one of them uses.
    declared: Vec<&'a str>,
}

/// What a RUN sees that mounts the context or another stage: anything.
#[derive(Debug, Serialize)]
pub(crate) struct Mounted<'a> {
    pub(crate) context: Digest,
    pub(crate) dockerfile: &'a str,
    pub(crate) build_args: &'a BTreeMap<String, String>,
}

impl<'a> Circumstances<'a> {
    /// The circumstances of a request. `given` are the arguments that buildah gets besides the user's.
    pub(crate) fn new(
        buildah: Version,
        request: &'a BuildRequest,
        dockerfile: &'a Dockerfile,
        given: &'a BTreeMap<String, String>,
        triggers: &'a [String],
    ) -> Self {
        Self {
            buildah: buildah.to_string(),
            format: crate::plan::format_name(request.format),
            timestamp: request.timestamp,
            network: &request.network,
            labels: request.labels.keys().map(String::as_str).collect(),
            bases: Vec::new(),
            arguments: arguments(dockerfile, given.iter().chain(&request.build_args), triggers),
            mounted: None,
        }
    }
}

fn arguments<'a>(
    dockerfile: &'a Dockerfile,
    given: impl Iterator<Item = (&'a String, &'a String)>,
    triggers: &'a [String],
) -> Arguments<'a> {
    let texts: Vec<&str> = dockerfile.instructions().iter().flat_map(outside_of_commands).collect();
    let used = |name: &str| {
        let mentions = |text: &str| {
            [format!("${name}"), format!("${{{name}")].iter().any(|mention| text.contains(mention))
        };
        texts.iter().any(|text| mentions(text)) || triggers.iter().any(|text| mentions(text))
    };
    let values = given.map(|(name, value)| (name.as_str(), value.as_str()));
    let declared = dockerfile.instructions().iter().filter(|i| i.keyword == Keyword::Arg);
    let declared = declared.map(|i| i.args.as_str());
    Arguments {
        values: values.filter(|(name, _)| used(name)).collect(),
        declared: declared.filter(|args| names_of(args).any(used)).collect(),
    }
}

/// `A=1 B` names `A` and `B`. A word of a quoted default may look like a name too, which does no harm.
fn names_of(args: &str) -> impl Iterator<Item = &str> {
    args.split_whitespace().map(|word| word.split('=').next().unwrap_or(word))
}

/// The flags of a RUN, and the whole text of everything else.
fn outside_of_commands(instruction: &Instruction) -> Vec<&str> {
    match instruction.keyword {
        Keyword::Run => instruction.flags.iter().map(String::as_str).collect(),
        _ => vec![&instruction.text],
    }
}

/// The name of the cache on disk.
pub(crate) fn name(key: &LayerKey, circumstances: &Circumstances<'_>) -> Result<String, serde_json::Error> {
    let text = serde_json::to_vec(&(key, circumstances))?;
    let digest = Digest::from_sha256(sha2::Sha256::digest(text).into());
    Ok(digest.hex().chars().take(NAME_CHARS).collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kiln_protocol::request::{ImageFormat, NetworkMode};

    use super::*;

    fn key() -> LayerKey {
        let text = str::to_owned;
        LayerKey { namespace: text("n"), repository: text("r"), target: text(""), trust: text("t") }
    }

    fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn request(dockerfile: &str, build_args: &[(&str, &str)]) -> BuildRequest {
        BuildRequest {
            dockerfile: dockerfile.to_owned(),
            dockerfile_name: String::new(),
            build_args: pairs(build_args),
            labels: pairs(&[("l", "1")]),
            target: None,
            format: ImageFormat::Docker,
            timestamp: None,
            network: NetworkMode::Isolated,
            timeout: Duration::from_secs(1),
            root_filesystem: false,
            no_cache: false,
        }
    }

    fn named(request: &BuildRequest, triggers: &[&str]) -> String {
        let dockerfile = Dockerfile::parse(&request.dockerfile).unwrap();
        let triggers: Vec<String> = triggers.iter().map(|&t| t.to_owned()).collect();
        let given = BTreeMap::new();
        let circumstances =
            Circumstances::new(Version::new(1, 28, 2), request, &dockerfile, &given, &triggers);
        name(&key(), &circumstances).unwrap()
    }

    fn of(dockerfile: &str, build_args: &[(&str, &str)]) -> String {
        named(&request(dockerfile, build_args), &[])
    }

    #[test]
    fn arguments_of_commands_do_not_divide_caches_and_others_do() {
        let run = "FROM x\nARG A\nRUN echo $A\n";
        assert_eq!(of(run, &[("A", "1")]), of(run, &[("A", "2")]));
        for instruction in
            ["ENV X=$A", "LABEL v=${A:-0}", "USER $A", "WORKDIR /$A", "ARG B=$A", "ONBUILD ENV X=$A"]
        {
            let text = format!("FROM x\nARG A\n{instruction}\n");
            assert_ne!(of(&text, &[("A", "1")]), of(&text, &[("A", "2")]), "{instruction}");
            assert_eq!(of(&text, &[("UNUSED", "1")]), of(&text, &[("UNUSED", "2")]), "{instruction}");
        }
        assert_ne!(of("FROM x\nARG A=1\nENV X=$A\n", &[]), of("FROM x\nARG A=2\nENV X=$A\n", &[]));
        assert_eq!(of("FROM x\nRUN y\n", &[]), of("FROM x\nRUN y\nARG A=2\nRUN $A\n", &[]));
        let [one, two] = ["1", "2"].map(|value| named(&request(run, &[("A", value)]), &["ENV X=$A"]));
        assert_ne!(one, two);
    }

    #[test]
    fn circumstances_divide_caches() {
        let base = request("FROM x\nRUN y\n", &[]);
        let name = named(&base, &[]);
        let others = [
            BuildRequest { timestamp: Some(0), ..base.clone() },
            BuildRequest { format: ImageFormat::Oci, ..base.clone() },
            BuildRequest { network: NetworkMode::None, ..base.clone() },
            BuildRequest { labels: BTreeMap::new(), ..base.clone() },
        ];
        for other in others {
            assert_ne!(name, named(&other, &[]), "{other:?}");
        }
        let same = BuildRequest { labels: pairs(&[("l", "2")]), ..base.clone() };
        assert_eq!(name, named(&same, &[]));
        assert_eq!(name.len(), NAME_CHARS);
    }

    #[test]
    fn every_part_of_the_key_divides_and_none_runs_into_the_next() {
        let request = request("FROM x\n", &[]);
        let dockerfile = Dockerfile::parse(&request.dockerfile).unwrap();
        let given = BTreeMap::new();
        let circumstances = Circumstances::new(Version::new(1, 28, 2), &request, &dockerfile, &given, &[]);
        let keys = [
            key(),
            LayerKey { namespace: "nr".to_owned(), repository: String::new(), ..key() },
            LayerKey { repository: "other".to_owned(), ..key() },
            LayerKey { target: "stage".to_owned(), ..key() },
            LayerKey { trust: "other".to_owned(), ..key() },
        ];
        let names: std::collections::BTreeSet<_> =
            keys.iter().map(|key| name(key, &circumstances).unwrap()).collect();
        assert_eq!(names.len(), keys.len());
    }
}
