//! From a build to the argv of buildah (pure).
//!
//! Only flags that the oldest supported buildah (1.26) has are used, unless a newer one needs another.
//! Every value is passed as `--flag=value`, and `--` precedes the context, so no value can become a flag.

use std::collections::BTreeMap;

use kiln_protocol::request::{BuildRequest, ImageFormat};

use crate::version::Version;

/// Older versions leave the inner build running after SIGTERM, which may even finish and tag.
pub const OLDEST_BUILDAH: Version = Version { major: 1, minor: 26, patch: 0 };
/// Where the distribution puts it; slots see only system directories.
pub const BUILDAH: &str = "/usr/bin/buildah";

/// Paths inside a slot. `slot/root.rs` mounts them.
pub mod path {
    /// The unpacked context.
    pub const CONTEXT: &str = "/job/ctx";
    /// The Dockerfile under a neutral name: a `*.in` one would go through the C preprocessor.
    pub const DOCKERFILE: &str = "/etc/kiln/Dockerfile";
    /// The context is already filtered, with Docker's rules.
    pub const NO_IGNORE: &str = "/etc/kiln/no-ignore";
    /// Image id of the finished build.
    pub const IMAGE_ID: &str = "/job/run/image-id";
    /// The exported root filesystem.
    pub const ROOT_FILESYSTEM: &str = "/job/export/rootfs.tar";
    /// Names under which the Dockerfile finds its base images.
    pub const NAMES: &str = "/n";
    /// Build secrets, one file each.
    pub const SECRETS: &str = "/secrets";
    /// Certificates for RUN.
    pub const CA_BUNDLE: &str = "/etc/kiln/ca.pem";
    /// The standard output of whoever opens it: the agent's log pipe.
    pub const LOG: &str = "/proc/self/fd/1";
}

/// What the argv depends on besides the request.
#[derive(Debug, Clone, Copy)]
pub struct PlanInput<'a> {
    /// What the client asked for.
    pub request: &'a BuildRequest,
    /// The stage to build, as buildah names it.
    pub target: Option<&'a str>,
    /// Arguments that buildah must be told besides the user's.
    pub forced_args: &'a BTreeMap<String, String>,
    /// Open files of one process in RUN; buildah's own default is 1024.
    pub open_files: u64,
    /// Number of read-only image stores mounted at `/b/0` …: of base images, then of cached layers.
    pub stores: usize,
    /// What is done about layers.
    pub layers: Layers,
    /// Ids of the secrets that were given.
    pub secret_ids: &'a [String],
    /// Files of RUN's root that show the operator's CA bundle.
    pub ca_targets: &'a [String],
}

/// What a build makes layers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layers {
    /// One for the whole stage: no other build is to find them.
    One,
    /// One for each instruction, all made anew.
    New,
    /// One for each instruction, those that are found taken over.
    Cached,
}

impl Layers {
    const fn flags(self) -> &'static [&'static str] {
        match self {
            Self::One => &["--layers=false"],
            Self::New => &["--layers=true", "--no-cache"],
            Self::Cached => &["--layers=true"],
        }
    }
}

/// Options that every call of one job shares.
fn common(stores: usize, names: bool) -> Vec<String> {
    let mut argv = vec![
        BUILDAH.to_owned(),
        "--storage-driver=overlay".to_owned(),
        "--root=/job/root".to_owned(),
        "--runroot=/job/run/containers".to_owned(),
    ];
    if names {
        argv.push(format!("--storage-opt=overlay.imagestore={}", path::NAMES));
    }
    argv.extend((0..stores).map(|index| format!("--storage-opt=overlay.imagestore=/b/{index}")));
    argv
}

/// `buildah build`.
pub fn build(input: &PlanInput<'_>) -> Vec<String> {
    let mut argv = common(input.stores, true);
    argv.extend(
        [
            "build",
            "--isolation=chroot",
            // A process with CAP_SYS_CHROOT leaves a chroot; CAP_MKNOD serves nobody in a user namespace.
            "--cap-drop=CAP_SYS_CHROOT",
            "--cap-drop=CAP_MKNOD",
            "--pull=never",
            "--jobs=1",
        ]
        .map(str::to_owned),
    );
    argv.extend(input.layers.flags().iter().map(|&flag| flag.to_owned()));
    argv.push(format!("--ulimit=nofile={0}:{0}", input.open_files));
    argv.push(format!("--format={}", format_name(input.request.format)));
    argv.push(format!("--logfile={}", path::LOG));
    argv.push(format!("--iidfile={}", path::IMAGE_ID));
    argv.push(format!("--ignorefile={}", path::NO_IGNORE));
    argv.push(format!("--file={}", path::DOCKERFILE));
    argv.extend(request_flags(input));
    argv.push("--".to_owned());
    argv.push(path::CONTEXT.to_owned());
    argv
}

fn request_flags(input: &PlanInput<'_>) -> Vec<String> {
    let request = input.request;
    let mut argv = Vec::new();
    argv.extend(input.target.iter().map(|target| format!("--target={target}")));
    argv.extend(request.timestamp.iter().map(|seconds| format!("--timestamp={seconds}")));
    let build_args = input.forced_args.iter().chain(&request.build_args);
    argv.extend(build_args.map(|(name, value)| format!("--build-arg={name}={value}")));
    argv.extend(request.labels.iter().map(|(name, value)| format!("--label={name}={value}")));
    argv.extend(input.secret_ids.iter().map(|id| format!("--secret=id={id},src={}/{id}", path::SECRETS)));
    argv.extend(input.ca_targets.iter().map(|target| format!("--volume={}:{target}:ro", path::CA_BUNDLE)));
    if request.root_filesystem {
        argv.push(format!("--output=type=tar,dest={}", path::ROOT_FILESYSTEM));
    }
    argv
}

/// `buildah pull` of the fetched layout at `/in` into an empty store.
pub fn import() -> Vec<String> {
    let mut argv = common(0, false);
    argv.extend(["pull".to_owned(), "--quiet".to_owned(), "dir:/in".to_owned()]);
    argv
}

/// The environment of every call. Nothing of the agent's own is passed on.
pub fn environment(proxy: &[(String, String)]) -> Vec<(String, String)> {
    let fixed = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("LANG", "C.UTF-8"),
        ("HOME", "/job/home"),
        ("TMPDIR", "/job/tmp"),
        ("XDG_RUNTIME_DIR", "/job/xdg"),
        ("CONTAINERS_CONF", "/etc/containers/containers.conf"),
        ("CONTAINERS_REGISTRIES_CONF", "/etc/containers/registries.conf"),
        ("CONTAINERS_STORAGE_CONF", "/etc/containers/storage.conf"),
    ];
    fixed.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).chain(proxy.iter().cloned()).collect()
}

/// buildah's name of a format.
pub const fn format_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Docker => "docker",
        ImageFormat::Oci => "oci",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::request::NetworkMode;
    use std::time::Duration;

    fn request() -> BuildRequest {
        let pairs = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        BuildRequest {
            dockerfile: "FROM scratch\n".to_owned(),
            dockerfile_name: "Dockerfile".to_owned(),
            build_args: pairs(&[("A", "1"), ("B", "--privileged")]),
            labels: pairs(&[("l", "v w")]),
            target: None,
            format: ImageFormat::Docker,
            timestamp: Some(0),
            network: NetworkMode::Isolated,
            timeout: Duration::from_secs(1),
            root_filesystem: true,
            no_cache: false,
        }
    }

    fn built(request: &BuildRequest) -> Vec<String> {
        built_with(request, Layers::One)
    }

    fn built_with(request: &BuildRequest, layers: Layers) -> Vec<String> {
        let forced = BTreeMap::from([("A".to_owned(), "default".to_owned())]);
        build(&PlanInput {
            request,
            target: Some("0"),
            forced_args: &forced,
            open_files: 65_536,
            stores: 2,
            layers,
            secret_ids: &["token".to_owned()],
            ca_targets: &["/etc/ssl/certs/ca-certificates.crt".to_owned()],
        })
    }

    const GOLDEN: &str = "\
/usr/bin/buildah
--storage-driver=overlay
--root=/job/root
--runroot=/job/run/containers
--storage-opt=overlay.imagestore=/n
--storage-opt=overlay.imagestore=/b/0
--storage-opt=overlay.imagestore=/b/1
build
--isolation=chroot
--cap-drop=CAP_SYS_CHROOT
--cap-drop=CAP_MKNOD
--pull=never
--jobs=1
--layers=false
--ulimit=nofile=65536:65536
--format=docker
--logfile=/proc/self/fd/1
--iidfile=/job/run/image-id
--ignorefile=/etc/kiln/no-ignore
--file=/etc/kiln/Dockerfile
--target=0
--timestamp=0
--build-arg=A=default
--build-arg=A=1
--build-arg=B=--privileged
--label=l=v w
--secret=id=token,src=/secrets/token
--volume=/etc/kiln/ca.pem:/etc/ssl/certs/ca-certificates.crt:ro
--output=type=tar,dest=/job/export/rootfs.tar
--
/job/ctx";

    #[test]
    fn the_argv_holds_every_wish_as_one_argument() {
        assert_eq!(built(&request()).join("\n"), GOLDEN);
    }

    #[test]
    fn layers_are_made_and_taken_over_only_where_asked_for() {
        for (layers, flags) in [
            (Layers::New, &["--layers=true", "--no-cache"][..]),
            (Layers::Cached, &["--layers=true"]),
            (Layers::One, &["--layers=false"]),
        ] {
            let argv = built_with(&request(), layers);
            let found = argv.iter().filter(|a| a.starts_with("--layers") || *a == "--no-cache");
            assert!(found.eq(flags), "{layers:?}");
        }
    }

    /// How buildah reads the value of a flag.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Value {
        /// None, `true` or `false`.
        Switch,
        /// The rest of the argument.
        Text,
        /// As text; given again, it adds.
        Texts,
        /// Parts between commas, so a comma in a value would make two of it.
        Parts,
    }

    const GLOBAL_FLAGS: &[(&str, Value)] = &[
        ("storage-driver", Value::Text),
        ("root", Value::Text),
        ("runroot", Value::Text),
        ("storage-opt", Value::Parts),
    ];

    const BUILD_FLAGS: &[(&str, Value)] = &[
        ("build-arg", Value::Texts),
        ("cap-drop", Value::Parts),
        ("file", Value::Parts),
        ("format", Value::Text),
        ("ignorefile", Value::Text),
        ("iidfile", Value::Text),
        ("isolation", Value::Text),
        ("jobs", Value::Text),
        ("label", Value::Texts),
        ("layers", Value::Switch),
        ("logfile", Value::Text),
        ("no-cache", Value::Switch),
        // Current versions take several.
        ("output", Value::Text),
        ("pull", Value::Text),
        ("secret", Value::Texts),
        ("target", Value::Text),
        ("timestamp", Value::Text),
        ("ulimit", Value::Parts),
        ("volume", Value::Texts),
    ];

    fn assert_known(flags: &[String], known: &[(&str, Value)]) {
        let mut seen = Vec::new();
        for flag in flags {
            let text = flag.strip_prefix("--").unwrap_or_else(|| panic!("{flag} is no flag"));
            let (name, value) =
                text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
            let found = known.iter().find(|(known, _)| *known == name);
            let (_, kind) = found.unwrap_or_else(|| panic!("{flag} is not in every version"));
            match kind {
                Value::Switch => assert!(matches!(value, None | Some("true" | "false")), "{flag}"),
                Value::Text => assert!(value.is_some() && !seen.contains(&name), "{flag}"),
                Value::Texts => assert!(value.is_some(), "{flag}"),
                Value::Parts => assert!(value.is_some_and(|value| !value.contains(',')), "{flag}"),
            }
            seen.push(name);
        }
    }

    /// Debian 12 has 1.28.2; upstream was past 1.44 when this was written. Both read these flags alike, and none is
    /// newer than 1.26, so one argv serves all. Every build of the suites proves it for the installed version.
    #[test]
    fn every_flag_means_the_same_to_the_oldest_and_to_a_current_version() {
        let mut request = request();
        request.build_args.insert("C".to_owned(), "a,b".to_owned());
        request.labels.insert("list".to_owned(), "a,b".to_owned());
        for layers in [Layers::One, Layers::New, Layers::Cached] {
            let argv = built_with(&request, layers);
            let command = argv.iter().position(|a| a == "build").unwrap();
            let end = argv.iter().position(|a| a == "--").unwrap();
            assert_known(&argv[1..command], GLOBAL_FLAGS);
            assert_known(&argv[command + 1..end], BUILD_FLAGS);
        }
        let argv = import();
        let command = argv.iter().position(|a| a == "pull").unwrap();
        assert_known(&argv[1..command], GLOBAL_FLAGS);
        assert_known(&argv[command + 1..argv.len() - 1], &[("quiet", Value::Switch)]);
    }

    #[test]
    #[should_panic(expected = "--cap-drop=A,B")]
    fn a_comma_where_it_separates_is_noticed() {
        assert_known(&["--cap-drop=A,B".to_owned()], BUILD_FLAGS);
    }

    #[test]
    #[should_panic(expected = "--metadata-file=/x is not in every version")]
    fn a_flag_of_new_versions_is_noticed() {
        assert_known(&["--metadata-file=/x".to_owned()], BUILD_FLAGS);
    }

    #[test]
    fn import_touches_only_the_slot() {
        assert_eq!(
            import().join(" "),
            "/usr/bin/buildah --storage-driver=overlay --root=/job/root --runroot=/job/run/containers \
             pull --quiet dir:/in"
        );
    }

    #[test]
    fn the_environment_is_ours_alone() {
        let env = environment(&[("http_proxy".to_owned(), "http://proxy:1".to_owned())]);
        assert!(env.iter().any(|(k, v)| k == "HOME" && v == "/job/home"));
        assert_eq!(env.last().map(|(k, _)| k.as_str()), Some("http_proxy"));
        assert!(!env.iter().any(|(k, _)| k == "USER"));
    }
}
