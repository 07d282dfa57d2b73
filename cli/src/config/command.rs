//! `kiln config` (edge).

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use kiln_agent::config as agent;
use kiln_agent::error::chain;
use kiln_protocol::setting::InvalidSetting;

use super::{Config, ConfigError, File, mask, read, refused, schema};
use crate::app::{Exit, USAGE};
use crate::{paths, terminal};

/// What `kiln config` does.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check a configuration file, and that the files which it names can be read
    Check(FileArgs),
    /// Print what holds, with the defaults of what the file leaves out, without secrets
    Show(FileArgs),
    /// Print the JSON Schema of the file
    Schema,
}

/// Which file.
#[derive(Debug, Args)]
pub(crate) struct FileArgs {
    /// Configuration file [default: as for other commands]
    #[arg(env = "KILN_CONFIG")]
    file: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(command: &ConfigCommand) -> Result<u8, Exit> {
    match command {
        ConfigCommand::Check(args) => check(args),
        ConfigCommand::Show(args) => show(args),
        ConfigCommand::Schema => {
            let text = serde_json::to_string_pretty(&schema()).map_err(|e| Exit::system(chain(&e)))?;
            terminal::document(&text);
            Ok(0)
        }
    }
}

fn check(args: &FileArgs) -> Result<u8, Exit> {
    let Some(path) = paths::config_file(args.file.as_deref()) else {
        terminal::out("no configuration file: the defaults hold");
        return Ok(0);
    };
    let (text, file) = read(&path).map_err(|e| unusable(&e))?;
    let problems = problems(&Config::from(file).agent);
    if problems.is_empty() {
        terminal::out(&format!("{}: fine", path.display()));
        return Ok(0);
    }
    for problem in problems {
        terminal::say(&refused(&path, &text, problem).to_string());
    }
    Ok(USAGE)
}

fn show(args: &FileArgs) -> Result<u8, Exit> {
    let path = paths::config_file(args.file.as_deref());
    let shown = effective(path.as_deref()).map_err(|e| unusable(&e))?;
    let text = toml::to_string(&shown).map_err(|e| Exit::system(chain(&e)))?;
    match path {
        Some(path) => terminal::out(&format!("# {}, and the defaults of what it leaves out", path.display())),
        None => terminal::out("# no configuration file: the defaults"),
    }
    text.lines().for_each(terminal::out);
    Ok(0)
}

fn effective(path: Option<&Path>) -> Result<File, ConfigError> {
    let Some(path) = path else { return Ok(File::default()) };
    let (_, mut file) = read(path)?;
    mask::mask(&mut file);
    Ok(file)
}

fn unusable(error: &ConfigError) -> Exit {
    Exit::usage(chain(error))
}

/// What only a look at other files tells.
fn problems(config: &agent::Config) -> Vec<InvalidSetting> {
    let missing = files(config).into_iter().filter_map(|(key, path)| {
        let error = readable(&path).err()?;
        Some(InvalidSetting::new(key, format!("{} cannot be read: {error}", path.display())))
    });
    let unsigned = config.plugin.iter().enumerate().filter(|(_, plugin)| plugin.digest.is_none());
    let unsigned = unsigned.filter(|_| config.plugins.require_digest).map(|(index, _)| {
        let reason = "missing, and plugins.require_digest wants it; sha256sum prints it";
        InvalidSetting::new(format!("plugin.{index}.digest"), reason)
    });
    missing.chain(unsigned).collect()
}

/// Every file that the configuration names.
fn files(config: &agent::Config) -> Vec<(String, PathBuf)> {
    let mut files: Vec<_> = config.build.ca.iter().map(|ca| ("build.ca".to_owned(), ca.clone())).collect();
    for (index, section) in config.registry.iter().enumerate() {
        files.extend(section.ca.iter().map(|ca| (format!("registry.{index}.ca"), ca.clone())));
        for (place, mirror) in section.mirror.iter().enumerate() {
            let key = || format!("registry.{index}.mirror.{place}.ca");
            files.extend(mirror.ca.iter().map(|ca| (key(), ca.clone())));
        }
    }
    let plugins = config.plugin.iter().enumerate();
    files.extend(plugins.map(|(n, plugin)| (format!("plugin.{n}.source"), plugin.path(&config.plugins))));
    files
}

fn readable(path: &Path) -> std::io::Result<()> {
    // A pipe would hold the opening up for ever.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a file"));
    }
    std::fs::File::open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems_of(text: &str) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let (text, parsed) = read(file.path()).unwrap();
        let told = |problem| refused(Path::new("f"), &text, problem).to_string();
        problems(&Config::from(parsed).agent).into_iter().map(told).collect()
    }

    #[test]
    fn files_that_are_named_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there");
        std::fs::write(&there, "x").unwrap();
        let (there, folder) = (there.display(), folder.path().display());
        let text = format!(
            "[build]\nca = \"{there}\"\n[plugins]\ndirectory = \"{folder}\"\nrequire_digest = true\n\
             [[registry]]\nprefix = \"docker.io\"\nca = \"{folder}\"\n\
             [[registry.mirror]]\nlocation = \"m.example\"\nca = \"{folder}/none\"\n\
             [[plugin]]\nname = \"a\"\nmode = \"enforce\"\nsource = \"file:there\"\n\
             [[plugin]]\nname = \"b\"\nmode = \"enforce\"\nsource = \"file:none\"\n"
        );
        let found = problems_of(&text);
        let wanted = [
            "f:8: registry.0.ca: ",
            "f:11: registry.0.mirror.0.ca: ",
            "f:19: plugin.1.source: ",
            "f:12: plugin.0.digest: missing",
            "f:16: plugin.1.digest: missing",
        ];
        assert_eq!(found.len(), wanted.len(), "{found:?}");
        for (found, wanted) in found.iter().zip(wanted) {
            assert!(found.starts_with(wanted), "{found} is not {wanted}");
        }
        assert_eq!(problems_of("[build]\n"), Vec::<String>::new());
    }
}
