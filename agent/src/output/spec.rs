//! What `-o` may say (pure).

use std::path::{Path, PathBuf};

use kiln_protocol::request::ImageFormat;

use super::reference::{check_image_name, check_oci_name};

/// Every accepted form, for messages.
pub const ACCEPTED: &str = "docker-archive:FILE[:NAME:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG], dir:DIR, \
     type=local,dest=DIR, type=tar,dest=FILE, type=docker,dest=FILE, type=oci,dest=FILE (FILE `-` is standard output)";

/// Where a stream of bytes goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A file, replaced as a whole.
    File(PathBuf),
    /// Standard output.
    Stdout,
}

impl Destination {
    fn parse(text: &str) -> Self {
        if text == "-" { Self::Stdout } else { Self::File(PathBuf::from(text)) }
    }
}

/// What the user wants to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputSpec {
    /// The image.
    Image(ImageOutput),
    /// The root filesystem of the target, without the image around it.
    Files(FilesOutput),
}

/// A form of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageOutput {
    /// What `docker save` writes and `docker load` reads.
    DockerArchive {
        /// The archive.
        destination: Destination,
        /// `name:tag` that `docker load` gives the image.
        reference: Option<String>,
    },
    /// An OCI image layout.
    OciDirectory {
        /// The directory.
        directory: PathBuf,
        /// Name of the image in the layout's index.
        reference: Option<String>,
    },
    /// An OCI image layout in a tar archive.
    OciArchive {
        /// The archive.
        destination: Destination,
        /// Name of the image in the layout's index.
        reference: Option<String>,
    },
    /// Manifest and blobs side by side, as skopeo's `dir:` has them.
    Directory {
        /// The directory.
        directory: PathBuf,
    },
}

/// A form of the root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilesOutput {
    /// A tar archive.
    Tar(Destination),
    /// A directory.
    Directory(PathBuf),
}

/// Why an output is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// None of the forms.
    #[error("output `{text}` is not known; accepted: {ACCEPTED}")]
    Unknown {
        /// What the user wrote.
        text: String,
    },
    /// A form without its path.
    #[error("output `{text}` names no destination; accepted: {ACCEPTED}")]
    NoDestination {
        /// What the user wrote.
        text: String,
    },
    /// An option that this type does not have.
    #[error("output option `{option}` is not known for type={kind}; accepted: {accepted}")]
    Option {
        /// The option as written.
        option: String,
        /// The type.
        kind: String,
        /// The options that it has.
        accepted: &'static str,
    },
    /// An option given twice.
    #[error("output option `{key}` is given twice")]
    Twice {
        /// Its name.
        key: String,
    },
    /// An option with a value that it cannot have.
    #[error("output option `{key}={value}` is not valid; expected {expected}")]
    Value {
        /// Its name.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// A name that registries would not accept.
    #[error("`{name}` is not a valid image name; expected {expected}")]
    Name {
        /// The name.
        name: String,
        /// Its form.
        expected: &'static str,
    },
    /// Something of docker that Kiln does differently.
    #[error("output `{text}` is not supported: {instead}")]
    Unsupported {
        /// What the user wrote.
        text: String,
        /// What to write instead.
        instead: &'static str,
    },
    /// `--format docker` and an OCI output.
    #[error(
        "--format docker and an OCI output exclude each other; use --format oci, or docker-archive: or dir:"
    )]
    FormatConflict,
}

const PUSH_LATER: &str = "pushing comes with -t in the next release; until then write docker-archive:FILE, \
     oci:DIR or dir:DIR and push that with `skopeo copy`";
const NO_DAEMON: &str =
    "there is no daemon to load into; write docker-archive:FILE, then `docker load -i FILE`";
const NOTHING: &str = "without -o nothing is written";
const ONE_LAYOUT: &str = "docker's format is one file; use type=oci,tar=false for a directory, or dir:DIR";
/// Words that start an output; alone they are a mistake, not the name of a directory.
const TRANSPORTS: [&str; 8] = [
    "docker-archive",
    "oci-archive",
    "oci",
    "dir",
    "docker",
    "docker-daemon",
    "containers-storage",
    "registry",
];

impl OutputSpec {
    /// Reads one `-o`.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        if let Some((transport, rest)) = text.split_once(':')
            && TRANSPORTS.contains(&transport)
        {
            return parse_transport(text, transport, rest);
        }
        if text.split(',').any(|field| field.contains('=')) {
            return Options::parse(text)?.resolve();
        }
        parse_path(text)
    }

    /// The format that this output can only have, if it decides one.
    pub fn implied_format(&self) -> Option<ImageFormat> {
        match self {
            Self::Image(ImageOutput::OciDirectory { .. } | ImageOutput::OciArchive { .. }) => {
                Some(ImageFormat::Oci)
            }
            Self::Image(_) | Self::Files(_) => None,
        }
    }

    /// The format to build with: the user's own wish, else what the output implies, else docker.
    pub fn format(&self, wish: Option<ImageFormat>) -> Result<ImageFormat, SpecError> {
        match (wish, self.implied_format()) {
            (Some(wish), Some(implied)) if wish != implied => Err(SpecError::FormatConflict),
            (wish, implied) => Ok(wish.or(implied).unwrap_or(ImageFormat::Docker)),
        }
    }

    /// Whether the target's files are wanted instead of the image.
    pub fn wants_root_filesystem(&self) -> bool {
        matches!(self, Self::Files(_))
    }

    /// Whether the output leaves through standard output, which then carries nothing else.
    pub fn uses_stdout(&self) -> bool {
        match self {
            Self::Image(
                ImageOutput::DockerArchive { destination, .. } | ImageOutput::OciArchive { destination, .. },
            )
            | Self::Files(FilesOutput::Tar(destination)) => *destination == Destination::Stdout,
            Self::Image(_) | Self::Files(FilesOutput::Directory(_)) => false,
        }
    }
}

fn parse_transport(text: &str, transport: &str, rest: &str) -> Result<OutputSpec, SpecError> {
    let (path, name) = match rest.split_once(':') {
        Some((path, name)) => (path, Some(name)),
        None => (rest, None),
    };
    let path_given = !(if transport == "dir" { rest } else { path }).is_empty();
    let image = match transport {
        "docker-archive" => docker_archive(path, name)?,
        "oci" => ImageOutput::OciDirectory { directory: path.into(), reference: oci_name(name)? },
        "oci-archive" => oci_archive(path, name)?,
        "dir" => ImageOutput::Directory { directory: rest.into() },
        "docker" | "registry" => return Err(unsupported(text, PUSH_LATER)),
        "docker-daemon" => return Err(unsupported(text, NO_DAEMON)),
        _ => return Err(SpecError::Unknown { text: text.to_owned() }),
    };
    if path_given {
        Ok(OutputSpec::Image(image))
    } else {
        Err(SpecError::NoDestination { text: text.to_owned() })
    }
}

/// Docker's short forms: `-` is a tar archive on standard output, anything else a directory.
fn parse_path(text: &str) -> Result<OutputSpec, SpecError> {
    if text.is_empty() || TRANSPORTS.contains(&text) {
        return Err(SpecError::NoDestination { text: text.to_owned() });
    }
    if text.contains(':') {
        return Err(SpecError::Unknown { text: text.to_owned() });
    }
    Ok(OutputSpec::Files(match Destination::parse(text) {
        Destination::Stdout => FilesOutput::Tar(Destination::Stdout),
        Destination::File(path) => FilesOutput::Directory(path),
    }))
}

fn docker_archive(path: &str, name: Option<&str>) -> Result<ImageOutput, SpecError> {
    let reference = name.map(check_image_name).transpose()?;
    Ok(ImageOutput::DockerArchive { destination: Destination::parse(path), reference })
}

fn oci_archive(path: &str, name: Option<&str>) -> Result<ImageOutput, SpecError> {
    Ok(ImageOutput::OciArchive { destination: Destination::parse(path), reference: oci_name(name)? })
}

fn oci_name(name: Option<&str>) -> Result<Option<String>, SpecError> {
    name.map(check_oci_name).transpose()
}

fn unsupported(text: &str, instead: &'static str) -> SpecError {
    SpecError::Unsupported { text: text.to_owned(), instead }
}

/// `key=value,…`, as buildx users write it.
struct Options<'a> {
    text: &'a str,
    kind: &'a str,
    destination: Option<&'a str>,
    name: Option<&'a str>,
    tar: Option<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(text: &'a str) -> Result<Self, SpecError> {
        let kind = text.split(',').find_map(|field| field.strip_prefix("type=")).unwrap_or_default();
        let mut options = Self { text, kind, destination: None, name: None, tar: None };
        let mut type_seen = None;
        for field in text.split(',') {
            let (key, value) = field.split_once('=').unwrap_or((field, ""));
            let slot = match key {
                "type" => &mut type_seen,
                "dest" => &mut options.destination,
                "name" if matches!(kind, "docker" | "oci") => &mut options.name,
                "tar" if matches!(kind, "docker" | "oci") => &mut options.tar,
                // Refused by their type, whatever else they carry.
                _ if matches!(kind, "image" | "registry" | "cacheonly") => continue,
                "push" if value == "true" => return Err(unsupported(text, PUSH_LATER)),
                _ => return Err(options.unknown(field)),
            };
            if slot.replace(value).is_some() {
                return Err(SpecError::Twice { key: key.to_owned() });
            }
        }
        Ok(options)
    }

    fn unknown(&self, option: &str) -> SpecError {
        let (option, kind) = (option.to_owned(), self.kind.to_owned());
        let accepted = match self.kind {
            "docker" => "type, dest, name",
            "oci" => "type, dest, name, tar",
            "local" | "tar" => "type, dest (a path with a comma cannot be written in this form)",
            _ => return SpecError::Unknown { text: self.text.to_owned() },
        };
        SpecError::Option { option, kind, accepted }
    }

    fn resolve(&self) -> Result<OutputSpec, SpecError> {
        let image = match self.kind {
            "local" => return Ok(OutputSpec::Files(FilesOutput::Directory(self.path()?.into()))),
            "tar" => return Ok(OutputSpec::Files(FilesOutput::Tar(Destination::parse(self.path()?)))),
            "docker" if self.destination.is_none() => return Err(unsupported(self.text, NO_DAEMON)),
            "docker" if !self.as_archive()? => return Err(unsupported(self.text, ONE_LAYOUT)),
            "docker" => docker_archive(self.path()?, self.name)?,
            "oci" if self.as_archive()? => oci_archive(self.path()?, self.name)?,
            "oci" => {
                let directory = Path::new(self.path()?).to_owned();
                ImageOutput::OciDirectory { directory, reference: oci_name(self.name)? }
            }
            "image" | "registry" => return Err(unsupported(self.text, PUSH_LATER)),
            "cacheonly" => return Err(unsupported(self.text, NOTHING)),
            _ => return Err(SpecError::Unknown { text: self.text.to_owned() }),
        };
        Ok(OutputSpec::Image(image))
    }

    fn path(&self) -> Result<&'a str, SpecError> {
        self.destination
            .filter(|path| !path.is_empty())
            .ok_or_else(|| SpecError::NoDestination { text: self.text.to_owned() })
    }

    fn as_archive(&self) -> Result<bool, SpecError> {
        match self.tar {
            None | Some("true") => Ok(true),
            Some("false") => Ok(false),
            Some(value) => {
                Err(SpecError::Value { key: "tar", value: value.to_owned(), expected: "true or false" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(path: &str, name: Option<&str>) -> OutputSpec {
        let (destination, reference) = (Destination::parse(path), name.map(str::to_owned));
        OutputSpec::Image(ImageOutput::DockerArchive { destination, reference })
    }

    fn oci(path: &str, name: Option<&str>) -> OutputSpec {
        let (directory, reference) = (path.into(), name.map(str::to_owned));
        OutputSpec::Image(ImageOutput::OciDirectory { directory, reference })
    }

    fn oci_tar(path: &str, name: Option<&str>) -> OutputSpec {
        let (destination, reference) = (Destination::parse(path), name.map(str::to_owned));
        OutputSpec::Image(ImageOutput::OciArchive { destination, reference })
    }

    #[test]
    fn accepted_outputs() {
        let files = |path: &str| OutputSpec::Files(FilesOutput::Directory(path.into()));
        let tar = |path: &str| OutputSpec::Files(FilesOutput::Tar(Destination::parse(path)));
        let dir = |path: &str| OutputSpec::Image(ImageOutput::Directory { directory: path.into() });
        for (text, expected) in [
            ("docker-archive:a.tar", archive("a.tar", None)),
            ("docker-archive:/x/a=b.tar:app", archive("/x/a=b.tar", Some("app:latest"))),
            (
                "docker-archive:a.tar:r.example:5000/n/app:1.0",
                archive("a.tar", Some("r.example:5000/n/app:1.0")),
            ),
            ("docker-archive:-", archive("-", None)),
            ("oci:out", oci("out", None)),
            ("oci:out:v1", oci("out", Some("v1"))),
            ("oci:out:r.example/app:v1", oci("out", Some("r.example/app:v1"))),
            ("oci-archive:out.tar:v1", oci_tar("out.tar", Some("v1"))),
            ("dir:out", dir("out")),
            ("dir:out:a=1", dir("out:a=1")),
            ("type=local,dest=out", files("out")),
            ("dest=out,type=local", files("out")),
            ("type=tar,dest=out.tar", tar("out.tar")),
            ("type=tar,dest=-", tar("-")),
            ("type=docker,dest=a.tar", archive("a.tar", None)),
            ("type=docker,dest=a.tar,name=app:1", archive("a.tar", Some("app:1"))),
            ("type=oci,dest=a.tar", oci_tar("a.tar", None)),
            ("type=oci,dest=a,tar=false,name=v1", oci("a", Some("v1"))),
            ("out", files("out")),
            ("./out/x", files("./out/x")),
            ("-", tar("-")),
        ] {
            assert_eq!(OutputSpec::parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refused_outputs_say_what_is_accepted() {
        for (text, expected) in [
            ("", "accepted: docker-archive:FILE"),
            ("oci", "names no destination"),
            ("docker-archive:", "names no destination"),
            ("dir:", "names no destination"),
            ("oci::tag", "names no destination"),
            ("tarball:x", "is not known; accepted: docker-archive:FILE"),
            ("containers-storage:x", "is not known; accepted: docker-archive:FILE"),
            ("docker://r.example/app", "comes with -t in the next release"),
            ("type=registry,name=r.example/app", "comes with -t in the next release"),
            ("type=image,name=app,push=true", "comes with -t in the next release"),
            ("type=oci,dest=a,push=true", "comes with -t in the next release"),
            ("docker-daemon:app:1", "docker load -i FILE"),
            ("type=docker", "docker load -i FILE"),
            ("type=docker,dest=x,tar=false", "dir:DIR"),
            ("type=cacheonly", "without -o nothing is written"),
            ("type=local", "names no destination"),
            ("type=local,dest=", "names no destination"),
            ("type=tar", "names no destination"),
            ("type=local,dest=a,b", "a path with a comma"),
            ("type=local,dest=a,mode=max", "accepted: type, dest"),
            ("type=oci,dest=a,compression=zstd", "accepted: type, dest, name, tar"),
            ("type=oci,dest=a,dest=b", "`dest` is given twice"),
            ("type=oci,type=oci,dest=b", "`type` is given twice"),
            ("type=oci,dest=a,tar=maybe", "true or false"),
            ("type=zip,dest=a", "is not known; accepted: docker-archive:FILE"),
            ("dest=a", "is not known; accepted: docker-archive:FILE"),
            ("docker-archive:a.tar:App", "not a valid image name"),
            ("oci:a:b c", "not a valid image name"),
        ] {
            let error = OutputSpec::parse(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error:?} should contain {expected:?}");
        }
    }

    #[test]
    fn an_oci_output_implies_its_format_and_docker_contradicts_it() {
        use ImageFormat::{Docker, Oci};
        for (text, wish, expected) in [
            ("oci:x", None, Ok(Oci)),
            ("oci-archive:x", Some(Oci), Ok(Oci)),
            ("oci:x", Some(Docker), Err(SpecError::FormatConflict)),
            ("type=oci,dest=x", Some(Docker), Err(SpecError::FormatConflict)),
            ("docker-archive:x", None, Ok(Docker)),
            ("docker-archive:x", Some(Oci), Ok(Oci)),
            ("dir:x", Some(Oci), Ok(Oci)),
            ("type=local,dest=x", None, Ok(Docker)),
        ] {
            assert_eq!(OutputSpec::parse(text).unwrap().format(wish), expected, "{text}");
        }
    }

    #[test]
    fn standard_output_and_files_are_known_before_the_build() {
        for (text, stdout, files) in [
            ("-", true, true),
            ("type=oci,dest=-", true, false),
            ("docker-archive:-", true, false),
            ("type=tar,dest=x", false, true),
            ("oci:x", false, false),
            ("out", false, true),
        ] {
            let spec = OutputSpec::parse(text).unwrap();
            assert_eq!((spec.uses_stdout(), spec.wants_root_filesystem()), (stdout, files), "{text}");
        }
    }
}
