//! What a registry says in the body of a refusal (pure).

use std::fmt;

use serde::Deserialize;

/// Registries' own codes are about half as long.
const CODE_CHARACTERS: usize = 40;
/// Harbor's longest sentences, about quotas, have 150 characters.
const MESSAGE_CHARACTERS: usize = 300;

/// Code and message of the first error of a body. Displays as a suffix with the code.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    /// The registry's own error code.
    pub code: Option<String>,
    /// Its sentence: free text of a stranger, shortened and without control characters.
    pub message: Option<String>,
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    code: String,
    #[serde(default)]
    message: String,
}

impl Said {
    /// Reads an error body; what does not look like one says nothing. A message that repeats one of the
    /// secrets is left out.
    pub(crate) fn read<'a>(body: &[u8], secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let body = serde_json::from_slice::<ErrorBody>(body).ok();
        let Some(entry) = body.and_then(|body| body.errors.into_iter().next()) else {
            return Self::default();
        };
        let repeats = secrets.into_iter().any(|secret| !secret.is_empty() && entry.message.contains(secret));
        let plain = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
        let known = (1..=CODE_CHARACTERS).contains(&entry.code.len()) && entry.code.chars().all(plain);
        let message = (!entry.message.is_empty() && !repeats).then(|| shorten(&entry.message));
        Self { code: known.then_some(entry.code), message }
    }

    /// Whether code or message hold the word, in lower case.
    pub(crate) fn mentions(&self, word: &str) -> bool {
        [&self.code, &self.message].into_iter().flatten().any(|text| text.to_lowercase().contains(word))
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.code.as_ref().map_or(Ok(()), |code| write!(f, " ({code})"))
    }
}

/// Control characters and what turns the direction of writing become visible.
fn shorten(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut short = String::new();
    for c in text.trim().chars().take(MESSAGE_CHARACTERS) {
        if hidden(c) { short.extend(c.escape_unicode()) } else { short.push(c) }
    }
    if text.trim().chars().count() > MESSAGE_CHARACTERS {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Said {
        Said::read(text.as_bytes(), ["hunter2"])
    }

    #[test]
    fn only_a_plain_code_is_taken_from_an_error_body() {
        let known = said(r#"{"errors":[{"code":"NAME_UNKNOWN","message":"m"}]}"#);
        assert_eq!((known.code.as_deref(), known.message.as_deref()), (Some("NAME_UNKNOWN"), Some("m")));
        for body in [
            r#"{"errors":[{"code":"Bearer eyJhbGci"}]}"#,
            r#"{"errors":[]}"#,
            r#"{"errors":[{"code":""}]}"#,
            "<html>",
        ] {
            assert_eq!(said(body), Said::default(), "{body}");
        }
    }

    #[test]
    fn messages_are_short_visible_and_without_secrets() {
        let message = |text: &str| {
            said(&serde_json::json!({"errors": [{"code": "DENIED", "message": text}]}).to_string()).message
        };
        assert_eq!(message("a\u{1b}[2Jb\n"), Some("a\\u{1b}[2Jb".into()));
        assert_eq!(message("a\u{202e}b"), Some("a\\u{202e}b".into()));
        assert_eq!(message("password hunter2 is wrong"), None);
        assert_eq!(message(""), None);
        assert_eq!(message(&"é".repeat(301)).unwrap().chars().count(), 301);
    }

    #[test]
    fn words_are_found_in_code_and_message() {
        let said = said(r#"{"errors":[{"code":"DENIED","message":"Quota exceeded"}]}"#);
        assert!(said.mentions("quota") && said.mentions("denied") && !said.mentions("immutable"));
        assert_eq!(said.to_string(), " (DENIED)");
    }
}
