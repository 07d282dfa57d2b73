//! Pure: the settings and what is wrong with them.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::pattern::MAX_CHARS;

/// Patterns of one list, and repositories with a prefix.
const MAX_ENTRIES: usize = 100;

/// What the operator set. Every key may be left out; what is left out is not required.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// A tag must match one of these, if there are any.
    pub allow: Vec<String>,
    /// A tag must match none of these.
    pub deny: Vec<String>,
    /// Which tags must be semantic versions.
    pub semver: Semver,
    /// Repository pattern to what its tags begin with.
    pub prefix: BTreeMap<String, String>,
    /// Whether a tag that is a released version may point to another image later.
    pub move_releases: bool,
}

/// Which tags must be semantic versions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Semver {
    /// None.
    #[default]
    Off,
    /// Every tag; pre-releases too.
    Any,
    /// Every tag; no pre-releases.
    Release,
}

impl Settings {
    /// Reads settings, or says everything that is wrong with them.
    pub fn parse(json: &str) -> Result<Self, Vec<String>> {
        let settings: Self = serde_json::from_str(json).map_err(|error| vec![explain(&error)])?;
        let problems = settings.problems();
        if problems.is_empty() { Ok(settings) } else { Err(problems) }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let prefixes: Vec<String> = self.prefix.keys().cloned().collect();
        for (key, patterns) in [("allow", &self.allow), ("deny", &self.deny), ("prefix", &prefixes)] {
            if patterns.len() > MAX_ENTRIES {
                problems.push(format!("{key}: {} entries; at most {MAX_ENTRIES}", patterns.len()));
            }
            problems.extend(patterns.iter().filter_map(|pattern| wrong_pattern(key, pattern)));
        }
        for (repository, prefix) in &self.prefix {
            if !prefix.chars().all(is_tag_character) || prefix.is_empty() {
                let rule = "letters, digits, _ . -, at least one";
                problems
                    .push(format!("prefix.\"{repository}\": `{prefix}` cannot begin a tag; write {rule}"));
            }
        }
        problems
    }
}

fn wrong_pattern(key: &str, pattern: &str) -> Option<String> {
    if pattern.is_empty() {
        return Some(format!("{key}: an empty pattern matches nothing; leave it out"));
    }
    let chars = pattern.chars().count();
    if chars > MAX_CHARS {
        return Some(format!("{key}: a pattern of {chars} characters; at most {MAX_CHARS}"));
    }
    let fits =
        |c: char| is_tag_character(c) || matches!(c, '*' | '?') || (key == "prefix" && "/:".contains(c));
    let wrong = pattern.chars().find(|c| !fits(*c))?;
    Some(format!("{key}: `{pattern}` never matches, because of `{wrong}`; globs have * and ? only"))
}

const fn is_tag_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}

/// The reader's message without its place in the JSON text, which the operator never wrote.
fn explain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_set_is_fine() {
        assert_eq!(Settings::parse("{}").unwrap(), Settings::default());
    }

    #[test]
    fn everything_can_be_set() {
        let text = r#"{"allow":["v*"],"deny":["latest"],"semver":"release","prefix":{"team/**":"t-"},
            "move_releases":true}"#;
        let settings = Settings::parse(text).unwrap();
        assert_eq!((settings.semver, settings.move_releases), (Semver::Release, true));
        assert_eq!(settings.prefix["team/**"], "t-");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, wanted) in [
            (r#"{"alow":[]}"#, "unknown field `alow`"),
            (r#"{"semver":"yes"}"#, "unknown variant `yes`, expected one of `off`, `any`, `release`"),
            (r#"{"allow":"v*"}"#, "invalid type"),
            (r#"{"allow":["^v[0-9]+$"]}"#, "allow: `^v[0-9]+$` never matches, because of `^`"),
            (r#"{"deny":[""]}"#, "deny: an empty pattern"),
            (r#"{"prefix":{"team/**":"a/b"}}"#, "prefix.\"team/**\": `a/b` cannot begin a tag"),
        ] {
            let problems = Settings::parse(text).unwrap_err();
            assert!(problems[0].contains(wanted), "{text}: {problems:?}");
            assert!(!problems[0].contains("line"), "{problems:?}");
        }
        let long = format!(r#"{{"deny":["{}"]}}"#, "a".repeat(MAX_CHARS + 1));
        assert!(Settings::parse(&long).unwrap_err()[0].contains("at most 256"));
    }

    #[test]
    fn every_problem_is_said_at_once() {
        assert_eq!(Settings::parse(r#"{"allow":[""],"deny":["a b"]}"#).unwrap_err().len(), 2);
    }
}
