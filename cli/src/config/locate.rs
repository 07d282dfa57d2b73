//! Where a key stands in a TOML text, and what a misspelt one may mean (pure).

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Names that are less alike than this are different words.
const ALIKE: f64 = 0.8;

/// The line of an offset, counted from 1.
pub(super) fn line(text: &str, offset: usize) -> usize {
    text.get(..offset).unwrap_or_default().matches('\n').count() + 1
}

/// The reason of the parser, with the name that was probably meant.
pub(super) fn reason(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let nearest = quoted.next().filter(|_| message.starts_with("unknown ")).and_then(|wrong| {
        let likeness = |name: &str| strsim::jaro_winkler(wrong, name);
        let alike = quoted.filter(|name| likeness(name) >= ALIKE);
        alike.max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
    });
    match nearest {
        Some(name) => format!("{message}; did you mean `{name}`?"),
        None => message.to_owned(),
    }
}

/// A text with the places of its keys.
pub(super) struct Document<'a>(DeTable<'a>);

impl<'a> Document<'a> {
    /// Nothing if the text is no TOML.
    pub(super) fn new(text: &'a str) -> Option<Self> {
        DeTable::parse(text).ok().map(|table| Self(table.into_inner()))
    }

    /// The key, with its sections, whose name or value stands there.
    pub(super) fn key_at(&self, offset: usize) -> Option<String> {
        let mut path = Vec::new();
        in_table(&self.0, offset, &mut path).then(|| path.join("."))
    }

    /// Where the key begins, or the last of its sections that the text has.
    pub(super) fn offset_of(&self, key: &str) -> usize {
        let mut parts = key.split('.');
        let Some((name, mut value)) = parts.next().and_then(|part| self.0.get_key_value(part)) else {
            return 0;
        };
        let mut offset = name.span().start;
        for part in parts {
            let inner = match value.get_ref() {
                DeValue::Table(table) => table.get_key_value(part).map(|(name, at)| (name.span().start, at)),
                DeValue::Array(list) => {
                    part.parse().ok().and_then(|n: usize| list.get(n)).map(|at| (at.span().start, at))
                }
                _ => None,
            };
            let Some(found) = inner else { break };
            (offset, value) = found;
        }
        offset
    }
}

/// Looks inside first: a section is not one stretch of text, so its own span says nothing about its keys.
fn in_table(table: &DeTable<'_>, offset: usize, path: &mut Vec<String>) -> bool {
    table.iter().any(|(key, value)| {
        path.push(key.get_ref().to_string());
        let found = in_value(value, offset, path) || key.span().contains(&offset);
        if !found {
            path.pop();
        }
        found
    })
}

fn in_value(value: &Spanned<DeValue<'_>>, offset: usize, path: &mut Vec<String>) -> bool {
    let inside = match value.get_ref() {
        DeValue::Table(table) => in_table(table, offset, path),
        DeValue::Array(list) => list.iter().enumerate().any(|(index, item)| {
            path.push(index.to_string());
            let found = in_value(item, offset, path);
            if !found {
                path.pop();
            }
            found
        }),
        _ => false,
    };
    inside || value.span().contains(&offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[build]\nlimits.pids = 3\n[[plugin]]\nname = 'a'\n[[plugin]]\nname = 'b'\n\
                        match = { repository = 'c' }\nhooks = [\n  'd',\n]\n[network]\n";

    fn around(needle: &str) -> String {
        Document::new(TEXT).unwrap().key_at(TEXT.find(needle).unwrap()).unwrap_or_default()
    }

    #[test]
    fn every_place_has_a_key() {
        for (needle, key) in [
            ("3", "build.limits.pids"),
            ("pids", "build.limits.pids"),
            ("limits", "build.limits"),
            ("'a'", "plugin.0.name"),
            ("'b'", "plugin.1.name"),
            ("'c'", "plugin.1.match.repository"),
            ("'d'", "plugin.1.hooks.0"),
            ("[network]", "network"),
        ] {
            assert_eq!(around(needle), key, "{needle}");
        }
    }

    #[test]
    fn every_key_has_a_place() {
        let document = Document::new(TEXT).unwrap();
        for (key, wanted) in [
            ("build.limits.pids", 2),
            ("build.timeout", 1),
            ("plugin.0.name", 4),
            ("plugin.0.source", 3),
            ("plugin.1", 5),
            ("plugin.1.match.repository", 7),
            ("plugin.1.hooks.0", 9),
            ("plugin.9", 3),
            ("logs.keep", 1),
        ] {
            assert_eq!(line(TEXT, document.offset_of(key)), wanted, "{key}");
        }
        assert!(Document::new("[build").is_none());
    }

    #[test]
    fn what_is_misspelt_is_guessed() {
        for (message, guess) in [
            ("unknown field `tiemout`, expected one of `attempts`, `timeout`", Some("timeout")),
            ("unknown variant `isolate`, expected one of `none`, `isolated`", Some("isolated")),
            ("unknown field `fuel`, expected one of `attempts`, `timeout`", None),
            ("`soon` is not `sooner`", None),
        ] {
            let wanted =
                guess.map_or(message.to_owned(), |name| format!("{message}; did you mean `{name}`?"));
            assert_eq!(reason(message), wanted);
        }
    }
}
