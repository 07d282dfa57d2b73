//! Build arguments, labels, secrets and outputs as the user writes them (edge).

use std::collections::BTreeMap;

use kiln_agent::config::Config;
use kiln_agent::executor::Secret;
use kiln_protocol::request::{BuildRequest, ImageFormat, SECRET_ID_RULE, is_secret_id};

use crate::app::Exit;
use crate::args::BuildArgs;
use crate::dockerfile;

/// `BuildKit`'s bound for one secret.
const MAX_SECRET_BYTES: u64 = 500 * 1024;
/// One argument of the kernel's argv is at most 128 KiB; the flag itself takes some.
const MAX_VALUE_BYTES: usize = 120 * 1024;

/// What a build is asked for by its flags, without files of its result.
pub(crate) fn request(
    args: &BuildArgs,
    source: &dockerfile::Source,
    config: &Config,
    format: ImageFormat,
) -> Result<BuildRequest, Exit> {
    Ok(BuildRequest {
        dockerfile: source.text.clone(),
        dockerfile_name: source.name.clone(),
        build_args: build_args(&args.build_arg, |name| std::env::var(name).ok())?,
        labels: labels(&args.label)?,
        target: args.target.clone(),
        format,
        timestamp: args.timestamp,
        network: args.network.map_or(config.build.network, Into::into),
        timeout: args.timeout.unwrap_or(config.build.timeout),
        root_filesystem: false,
        no_cache: args.no_cache,
    })
}

/// `NAME=VALUE`, or a bare `NAME` whose value `lookup` knows. An unset bare name is dropped, as Docker does.
pub(crate) fn build_args(
    given: &[String],
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, String>, Exit> {
    let mut args = BTreeMap::new();
    for text in given {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text.as_str(), lookup(text)),
        };
        check_name("--build-arg", name)?;
        if let Some(value) = value {
            check_value("--build-arg", name, &value)?;
            args.insert(name.to_owned(), value);
        }
    }
    Ok(args)
}

/// `NAME=VALUE`; a bare name has an empty value.
pub(crate) fn labels(given: &[String]) -> Result<BTreeMap<String, String>, Exit> {
    let mut labels = BTreeMap::new();
    for text in given {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(Exit::usage(format!(
                "--label `{text}`: the name is empty or has blanks; write NAME=VALUE"
            )));
        }
        check_value("--label", name, value)?;
        labels.insert(name.to_owned(), value.to_owned());
    }
    Ok(labels)
}

fn check_name(flag: &str, name: &str) -> Result<(), Exit> {
    let mut chars = name.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    if first && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')) {
        return Ok(());
    }
    Err(Exit::usage(format!("{flag} `{name}`: a name is a letter or _, then letters, digits, _ . -")))
}

fn check_value(flag: &str, name: &str, value: &str) -> Result<(), Exit> {
    if value.contains('\0') {
        return Err(Exit::usage(format!("{flag} {name}: the value has a NUL byte")));
    }
    if value.len() > MAX_VALUE_BYTES {
        let message =
            format!("{flag} {name}: {} bytes are more than the limit of {MAX_VALUE_BYTES}", value.len());
        return Err(Exit::usage(message).with_hint("put it into a file of the context"));
    }
    Ok(())
}

/// `id=NAME,src=FILE`, `id=NAME,env=VARIABLE`, `id=NAME` (the variable of that name).
pub(crate) fn secrets(
    given: &[String],
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Secret>, Exit> {
    let mut secrets: Vec<Secret> = Vec::new();
    for text in given {
        let secret = secret(text, &lookup)?;
        if secrets.iter().any(|s| s.id == secret.id) {
            return Err(Exit::usage(format!("--secret id={} was given twice", secret.id)));
        }
        secrets.push(secret);
    }
    Ok(secrets)
}

fn secret(text: &str, lookup: &impl Fn(&str) -> Option<String>) -> Result<Secret, Exit> {
    let (mut id, mut src, mut env) = (None, None, None);
    for field in text.split(',') {
        match field.split_once('=') {
            Some(("id", value)) => id = Some(value),
            Some(("src" | "source", value)) => src = Some(value),
            Some(("env", value)) => env = Some(value),
            Some(("type", "file" | "env")) => {}
            _ => {
                let message = format!("--secret `{text}`: `{field}` is not understood");
                return Err(Exit::usage(message).with_hint("write id=NAME,src=FILE or id=NAME,env=VARIABLE"));
            }
        }
    }
    let id = id.ok_or_else(|| Exit::usage(format!("--secret `{text}`: id=NAME is missing")))?;
    if !is_secret_id(id) {
        return Err(Exit::usage(format!("--secret id={id}: {SECRET_ID_RULE}")));
    }
    let value = match (src, env) {
        (Some(path), None) => read_secret(id, path)?,
        (None, env) => {
            let name = env.unwrap_or(id);
            let unset = || Exit::usage(format!("--secret id={id}: the variable {name} is not set"));
            lookup(name).ok_or_else(unset)?.into_bytes()
        }
        (Some(_), Some(_)) => {
            return Err(Exit::usage(format!("--secret id={id}: give src or env, not both")));
        }
    };
    Ok(Secret { id: id.to_owned(), value })
}

fn read_secret(id: &str, path: &str) -> Result<Vec<u8>, Exit> {
    use std::io::Read as _;
    let failed = |e: std::io::Error| Exit::usage(format!("--secret id={id}: read {path}: {e}"));
    let mut value = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_SECRET_BYTES + 1).read_to_end(&mut value).map_err(failed)?;
    if value.len() as u64 > MAX_SECRET_BYTES {
        return Err(Exit::usage(format!("--secret id={id}: {path} has more than {MAX_SECRET_BYTES} bytes")));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        (name == "SET").then(|| "from-env".to_owned())
    }

    #[test]
    fn a_bare_build_arg_takes_the_callers_value_or_vanishes() {
        let given = ["A=1", "SET", "UNSET", "B=x=y", "C="].map(str::to_owned);
        let args = build_args(&given, env).unwrap();
        let expected = [("A", "1"), ("B", "x=y"), ("C", ""), ("SET", "from-env")];
        assert_eq!(args.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn bad_build_args_name_the_rule() {
        for bad in ["A B=1", "=x", "-x=1", "", "A\n=1", "1A=2"] {
            assert!(build_args(&[bad.to_owned()], env).is_err(), "{bad:?}");
        }
        assert!(build_args(&["A=\0".to_owned()], env).unwrap_err().message.contains("NUL"));
        assert!(
            build_args(&[format!("A={}", "x".repeat(200_000))], env).unwrap_err().message.contains("limit")
        );
    }

    #[test]
    fn secrets_come_from_files_or_variables() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(temp.path(), "from-file").unwrap();
        let given =
            [format!("id=a,src={}", temp.path().display()), "id=b,env=SET".to_owned(), "id=SET".to_owned()];
        let values: Vec<_> = secrets(&given, env).unwrap().into_iter().map(|s| (s.id, s.value)).collect();
        assert_eq!(values[0], ("a".to_owned(), b"from-file".to_vec()));
        assert_eq!(values[1].1, b"from-env");
        assert_eq!(values[2].1, b"from-env");
        for bad in [
            "src=x",
            "id=../x,env=SET",
            "id=a,env=NOPE",
            "id=a,src=/no/such",
            "id=a,foo=1",
            "id=a,src=x,env=SET",
        ] {
            assert!(secrets(&[bad.to_owned()], env).is_err(), "{bad}");
        }
        let twice = ["id=SET".to_owned(), "id=SET".to_owned()];
        assert!(secrets(&twice, env).unwrap_err().message.contains("twice"));
    }
}
