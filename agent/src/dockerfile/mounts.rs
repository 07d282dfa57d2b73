//! Pure: `RUN --mount` and `--from`: what they take from where.
//!
//! buildah cuts a mount at every comma and knows no quotes, and it expands variables in the whole text first. A
//! variable may therefore stand only where it cannot become another field, and never in `from` and `type`, where
//! Docker allows none either.

use super::expand::expand;
use super::reference::copies_from;
use super::scope::Scope;
use super::{BuildInput, Dockerfile, DockerfileError, Instruction, Keyword};

/// A bind mount of a part of the context.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BindSource {
    /// The line of the RUN.
    pub line: usize,
    /// The path within the context, `.` for all of it. buildah follows a symbolic link in it, also one that leads
    /// out of the context.
    pub path: String,
}

/// A secret that a RUN step mounts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecretUse {
    /// The line of the RUN.
    pub line: usize,
    /// The id that `--secret id=` must give.
    pub id: String,
    /// Whether the step fails without it. buildah leaves out a secret that is neither given nor required.
    pub required: bool,
}

/// A name in `from`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FromName {
    pub(super) line: usize,
    pub(super) name: String,
    pub(super) in_mount: bool,
}

/// One `--mount`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) line: usize,
    pub(super) text: String,
    /// Options with one name for each meaning: `target` for `dst` and `destination`, `source` for `src`.
    pub(super) fields: Vec<(String, Option<String>)>,
}

impl Mount {
    pub(super) fn kind(&self) -> &str {
        self.get("type").unwrap_or("bind")
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name)?.1.as_deref()
    }

    fn error(&self, problem: impl Into<String>) -> DockerfileError {
        DockerfileError::Mount { line: self.line, mount: self.text.clone(), problem: problem.into() }
    }

    fn parse(line: usize, text: &str) -> Result<Self, DockerfileError> {
        let mut mount = Self { line, text: text.to_owned(), fields: Vec::new() };
        if text.contains(['\'', '"', '\\']) {
            return Err(mount.error("quotes and backslashes are not allowed"));
        }
        for field in text.split(',') {
            let (name, value) =
                field.split_once('=').map_or((field, None), |(name, value)| (name, Some(value)));
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphabetic() || c == '-') {
                return Err(mount.error(format!("`{name}` is not the name of an option")));
            }
            let name = canonical(name);
            if mount.fields.iter().any(|(other, _)| other == name) {
                return Err(mount.error(format!("{name} is given twice")));
            }
            if name == "type" && value.is_some_and(|value| value.contains('$')) {
                return Err(mount.error("the type must be a plain word"));
            }
            mount.fields.push((name.to_owned(), value.map(str::to_owned)));
        }
        Ok(mount)
    }

    /// The mount with its variables replaced.
    pub(super) fn expanded(&self, scope: &Scope) -> Result<Self, DockerfileError> {
        let mut mount = self.clone();
        for (name, value) in &mut mount.fields {
            let Some(value) = value.as_mut().filter(|value| value.contains('$')) else { continue };
            let expanded = expand(value, &|name| scope.get(name)).map_err(|problem| self.error(problem))?;
            // The base image may define it, with any value.
            if let Some(missing) = expanded.missing.first() {
                return Err(self.error(format!("this stage does not define {missing}")));
            }
            if expanded.text.contains(',') {
                return Err(self.error(format!("the value of {name} contains a comma")));
            }
            *value = expanded.text;
        }
        Ok(mount)
    }

    /// The path in the context that is mounted, if it is one.
    fn context_path(&self) -> Option<String> {
        (self.kind() == "bind" && self.get("from").is_none()).then(|| {
            let source = self.get("source").unwrap_or_default();
            let parts: Vec<&str> = source.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
            if parts.is_empty() { ".".to_owned() } else { parts.join("/") }
        })
    }
}

fn canonical(name: &str) -> &str {
    match name {
        "dst" | "destination" => "target",
        "src" => "source",
        "readonly" => "ro",
        "readwrite" => "rw",
        name => name,
    }
}

/// The mounts of a RUN, variables not yet replaced.
pub(super) fn mounts_of(instruction: &Instruction) -> Result<Vec<Mount>, DockerfileError> {
    if instruction.keyword != Keyword::Run {
        return Ok(Vec::new());
    }
    let texts = instruction.flags.iter().filter_map(|flag| flag.strip_prefix("--mount="));
    texts.map(|text| Mount::parse(instruction.start_line, text)).collect()
}

/// The names in the `--from` and `from=` of an instruction.
pub(super) fn from_names(instruction: &Instruction) -> Result<Vec<FromName>, DockerfileError> {
    let line = instruction.start_line;
    if copies_from(instruction) {
        let is_from = |flag: &&String| *flag == "--from" || flag.starts_with("--from=");
        let flags: Vec<&String> = instruction.flags.iter().filter(is_from).collect();
        return match flags.as_slice() {
            [] => Ok(Vec::new()),
            // buildah pulls the first of several and copies from the last.
            [flag] => Ok(vec![plain_name(line, flag.strip_prefix("--from="), false)?]),
            _ => Err(DockerfileError::FromCount { line }),
        };
    }
    let mounts = mounts_of(instruction)?;
    let fields = mounts.iter().flat_map(|mount| &mount.fields).filter(|(name, _)| name == "from");
    fields.map(|(_, value)| plain_name(line, value.as_deref(), true)).collect()
}

fn plain_name(line: usize, name: Option<&str>, in_mount: bool) -> Result<FromName, DockerfileError> {
    let name = name.filter(|name| !name.is_empty()).ok_or(DockerfileError::FromCount { line })?;
    if name.contains(|c: char| matches!(c, '$' | '\'' | '"' | '\\') || c.is_whitespace()) {
        return Err(DockerfileError::FromNotPlain { line, written: name.to_owned() });
    }
    Ok(FromName { line, name: name.to_owned(), in_mount })
}

impl Dockerfile {
    /// The parts of the context that RUN steps of the build mount. The caller must make sure that no component of
    /// such a path is a symbolic link: only the packed context shows that.
    pub fn bind_sources(&self, input: &BuildInput<'_>) -> Result<Vec<BindSource>, DockerfileError> {
        let mut sources = Vec::new();
        self.walk(input, |instruction, scope| {
            for mount in all_mounts(instruction)? {
                let line = mount.line;
                sources.extend(mount.expanded(scope)?.context_path().map(|path| BindSource { line, path }));
            }
            Ok(())
        })?;
        Ok(sources)
    }

    /// The secrets that RUN steps of the build mount.
    pub fn secret_ids(&self, input: &BuildInput<'_>) -> Result<Vec<SecretUse>, DockerfileError> {
        let mut secrets = Vec::new();
        self.walk(input, |instruction, scope| {
            for mount in mounts_of(instruction)?.iter().filter(|mount| mount.kind() == "secret") {
                let mount = mount.expanded(scope)?;
                let required = mount.get("required").is_some_and(is_true);
                let use_of = |id: &str| SecretUse { line: mount.line, id: id.to_owned(), required };
                secrets.extend(mount.get("id").map(use_of));
            }
            Ok(())
        })?;
        Ok(secrets)
    }

    /// Whether any RUN of the file, needed or not, has a cache mount.
    pub fn uses_cache_mounts(&self) -> bool {
        self.mount_texts().any(|mount| mount.split(',').any(|field| field == "type=cache"))
    }

    /// Whether any RUN of the file, needed or not, mounts the context, a stage or an image: buildah does not look
    /// at what such a mount shows when it looks for a cached layer (seen with 1.28.2).
    pub fn uses_bind_mounts(&self) -> bool {
        let is_bind = |mount: &str| {
            let kind = mount.split(',').find_map(|field| field.strip_prefix("type="));
            kind.is_none_or(|kind| kind == "bind") || mount.split(',').any(|field| field.starts_with("from="))
        };
        self.mount_texts().any(is_bind)
    }

    fn mount_texts(&self) -> impl Iterator<Item = &str> {
        let instructions = self.instructions.iter().map(|i| i.trigger.as_deref().unwrap_or(i));
        instructions.flat_map(|i| &i.flags).filter_map(|flag| flag.strip_prefix("--mount="))
    }
}

/// The mounts of an instruction and of the trigger that it sets, which a later stage may run.
fn all_mounts(instruction: &Instruction) -> Result<Vec<Mount>, DockerfileError> {
    mounts_of(instruction.trigger.as_deref().unwrap_or(instruction))
}

/// The words that Go takes for true.
fn is_true(value: &str) -> bool {
    matches!(value, "1" | "t" | "T" | "TRUE" | "true" | "True")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{args, input};
    use super::*;

    #[test]
    fn binds_of_the_context_are_listed() {
        let text = "FROM scratch AS a\nENV D=src\nRUN --mount=target=/x a\nRUN --mount=source=./$D//b/,target=/x a\n\
            RUN --mount=type=cache,target=/c --mount=type=bind,from=nginx,source=/e,target=/e b\n\
            ONBUILD RUN --mount=src=t,target=/t x\nFROM a\nRUN --mount=target=/y,source=$D y\nFROM z AS unused\n\
            RUN --mount=source=no,target=/n z\nFROM scratch\nCOPY --from=1 / /\n";
        let none = args(&[]);
        let found = Dockerfile::parse(text).unwrap().bind_sources(&input(&none)).unwrap();
        let found: Vec<_> = found.iter().map(|source| (source.line, source.path.as_str())).collect();
        assert_eq!(found, [(3, "."), (4, "src/b"), (6, "t"), (6, "t"), (8, "src")]);
    }

    #[test]
    fn mounts_that_show_something_are_found() {
        for (mount, binds) in [
            ("target=/x", true),
            ("type=bind,from=a,target=/x", true),
            ("type=cache,from=a,target=/x", true),
            ("type=cache,target=/x", false),
            ("type=secret,id=x", false),
            ("type=tmpfs,target=/x", false),
        ] {
            for trigger in ["", "ONBUILD "] {
                let text = format!("FROM x\nRUN a\n{trigger}RUN --mount={mount} b\n");
                assert_eq!(Dockerfile::parse(&text).unwrap().uses_bind_mounts(), binds, "{text}");
            }
        }
    }

    #[test]
    fn secrets_are_listed() {
        let text = "FROM scratch\nARG ID=npm\nRUN --mount=type=secret,id=$ID,required=true x\n\
            RUN --mount=type=secret,id=b,target=/b --mount=type=secret,id=c,required=false y\n";
        let none = args(&[]);
        let found = Dockerfile::parse(text).unwrap().secret_ids(&input(&none)).unwrap();
        let found: Vec<_> = found.iter().map(|s| (s.line, s.id.as_str(), s.required)).collect();
        assert_eq!(found, [(3, "npm", true), (4, "b", false), (4, "c", false)]);
    }
}
