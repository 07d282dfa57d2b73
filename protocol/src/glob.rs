//! Globs over paths and repositories (pure).

use regex::{Regex, RegexBuilder};

/// No path that people write is longer, and the compiled form grows with it.
const MAX_BYTES: usize = 1024;
/// Far above what a glob of that length needs.
const MAX_COMPILED_BYTES: usize = 1 << 20;

/// A glob: `?` and `*` stay within one part of a path, `**` does not; every other character is itself.
#[derive(Debug, Clone)]
pub struct Glob {
    text: String,
    /// None matches everything.
    regex: Option<Regex>,
}

/// The text is not a glob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGlob {
    /// Empty, which nobody means.
    #[error("an empty pattern matches nothing; `**` matches everything")]
    Empty,
    /// Longer than any path.
    #[error("a pattern of {0} bytes is too long; at most {MAX_BYTES}")]
    TooLong(usize),
}

impl Glob {
    /// Reads a glob. Matching takes time linear in the text that is matched.
    pub fn new(text: &str) -> Result<Self, InvalidGlob> {
        if text.is_empty() {
            return Err(InvalidGlob::Empty);
        }
        let too_long = InvalidGlob::TooLong(text.len());
        if text.len() > MAX_BYTES {
            return Err(too_long);
        }
        let built = RegexBuilder::new(&pattern(text)).size_limit(MAX_COMPILED_BYTES).build();
        Ok(Self { text: text.to_owned(), regex: Some(built.map_err(|_| too_long)?) })
    }

    /// `**`.
    pub fn everything() -> Self {
        Self { text: "**".to_owned(), regex: None }
    }

    /// Whether the whole of `path` matches.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.as_ref().is_none_or(|regex| regex.is_match(path))
    }

    /// Whether a repository matches, with the host of its registry or without it.
    pub fn matches_repository(&self, repository: &str) -> bool {
        self.matches(repository) || without_host(repository).is_some_and(|path| self.matches(path))
    }
}

impl std::fmt::Display for Glob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'de> serde::Deserialize<'de> for Glob {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        Self::new(&String::deserialize(input)?).map_err(serde::de::Error::custom)
    }
}

impl serde::Serialize for Glob {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.text)
    }
}

/// The text decides everything else.
impl PartialEq for Glob {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Glob {}

impl schemars::JsonSchema for Glob {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Glob".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "`?` and `*` stay within one part of a path, `**` does not",
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_BYTES
        })
    }
}

/// The first part is a host if it has what no first part of a repository has.
fn without_host(repository: &str) -> Option<&str> {
    let (host, path) = repository.split_once('/')?;
    (host.contains(['.', ':']) || host == "localhost").then_some(path)
}

fn pattern(glob: &str) -> String {
    let mut pattern = String::from("(?s)^");
    let mut rest = glob;
    while let Some(c) = rest.chars().next() {
        let (part, length) = match c {
            '*' if rest.starts_with("**/") && (pattern.ends_with('^') || pattern.ends_with('/')) => {
                ("(?:.*/)?".to_owned(), 3)
            }
            '*' if rest.starts_with("**") => (".*".to_owned(), 2),
            '*' => ("[^/]*".to_owned(), 1),
            '?' => ("[^/]".to_owned(), 1),
            other => (regex::escape(other.encode_utf8(&mut [0; 4])), other.len_utf8()),
        };
        pattern.push_str(&part);
        rest = &rest[length..];
    }
    pattern.push('$');
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (glob, path, expected) in [
            ("**", "", true),
            ("**", "a/b", true),
            ("*", "a", true),
            ("*", "a/b", false),
            ("**/package.json", "package.json", true),
            ("**/package.json", "a/b/package.json", true),
            ("**/package.json", "a/xpackage.json", false),
            ("src/**/test", "src/test", true),
            ("src/**/test", "src/a/b/test", true),
            ("src/**", "src/a/b", true),
            ("src/**", "srcs/a", false),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("a.c", "abc", false),
            ("[a]", "a", false),
            ("line\n*", "line\nx", true),
        ] {
            assert_eq!(Glob::new(glob).unwrap().matches(path), expected, "{glob} {path}");
        }
    }

    #[test]
    fn repositories_match_with_and_without_their_host() {
        for (glob, repository, expected) in [
            ("team-a/**", "r.example.com/team-a/app", true),
            ("team-a/**", "localhost/team-a/app", true),
            ("team-a/**", "team-a/app", true),
            ("team-a/**", "other/team-a/app", false),
            ("r.example.com/**", "r.example.com/team-a/app", true),
            ("r.example.com/**", "x.example.com/r.example.com/app", true),
            ("**", "", true),
        ] {
            assert_eq!(
                Glob::new(glob).unwrap().matches_repository(repository),
                expected,
                "{glob} {repository}"
            );
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        assert_eq!(Glob::new("").unwrap_err(), InvalidGlob::Empty);
        assert_eq!(Glob::new(&"a".repeat(1025)).unwrap_err(), InvalidGlob::TooLong(1025));
        assert!(Glob::new(&"**/".repeat(341)).is_ok());
    }
}
