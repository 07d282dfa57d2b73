//! Pure: what a guest says, checked like the input of a user before anybody sees it.

use kiln_protocol::verdict::{Note, Violation};

use super::bindings::types;
use super::state::Ended;

/// Violations of one verdict, and warnings of one report: more than a person reads.
pub(super) const MAX_VIOLATIONS: usize = 200;
/// Notes of one report.
pub(super) const MAX_NOTES: usize = 100;
/// Bytes of a message, a note's value or an address.
const MAX_TEXT_BYTES: usize = 4096;
/// Bytes of a rule, a severity or a note's key.
const MAX_NAME_BYTES: usize = 128;

/// The violations of a verdict.
pub(super) fn violations(all: &[types::Violation]) -> Result<Vec<Violation>, Ended> {
    if all.len() > MAX_VIOLATIONS {
        return Err(Ended::Output("more than 200 violations"));
    }
    all.iter().map(violation).collect()
}

/// One violation or warning.
pub(super) fn violation(from: &types::Violation) -> Result<Violation, Ended> {
    Ok(Violation {
        rule: name(&from.rule)?,
        message: text(&from.message)?,
        severity: name(&from.severity)?,
        at: from.at.map(|at| (at.line, at.column)),
        help_url: from.help_url.as_deref().map(text).transpose()?,
    })
}

/// One note.
pub(super) fn note(key: &str, value: &str) -> Result<Note, Ended> {
    Ok(Note { key: name(key)?, value: text(value)? })
}

/// A text for people without what a terminal would act on.
pub(super) fn text(from: &str) -> Result<String, Ended> {
    if from.len() > MAX_TEXT_BYTES {
        return Err(Ended::Output("a text of more than 4096 bytes"));
    }
    Ok(inert(from))
}

fn name(from: &str) -> Result<String, Ended> {
    if from.len() > MAX_NAME_BYTES {
        return Err(Ended::Output("a name of more than 128 bytes"));
    }
    Ok(inert(from).replace('\n', " "))
}

/// As much of a text as a message has room for.
pub(super) fn shortened(from: &str) -> String {
    const SHOWN_CHARS: usize = 500;
    let short: String = from.chars().take(SHOWN_CHARS).collect();
    inert(&short)
}

/// Control characters, and marks that change the direction of what follows, become visible.
fn inert(from: &str) -> String {
    let acts = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    from.chars().map(|c| if acts(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(message: &str, rule: &str) -> types::Violation {
        types::Violation {
            rule: rule.to_owned(),
            message: message.to_owned(),
            severity: "error".to_owned(),
            at: Some(types::Position { line: 3, column: 1 }),
            help_url: None,
        }
    }

    #[test]
    fn limits_hold_exactly() {
        assert!(violations(&vec![one("m", "r"); MAX_VIOLATIONS]).is_ok());
        assert!(violations(&vec![one("m", "r"); MAX_VIOLATIONS + 1]).is_err());
        assert!(violation(&one(&"m".repeat(MAX_TEXT_BYTES), "r")).is_ok());
        assert!(violation(&one(&"m".repeat(MAX_TEXT_BYTES + 1), "r")).is_err());
        assert!(violation(&one("m", &"r".repeat(MAX_NAME_BYTES + 1))).is_err());
    }

    #[test]
    fn nothing_reaches_a_terminal_that_it_acts_on() {
        let found = violation(&one("a\u{1b}[2J\u{9b}b\r\nc\u{202e}d", "r\nr")).unwrap();
        assert_eq!(found.message, "a\u{fffd}[2J\u{fffd}b\u{fffd}\nc\u{fffd}d");
        assert_eq!((found.rule.as_str(), found.at), ("r r", Some((3, 1))));
    }
}
