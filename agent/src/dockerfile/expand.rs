//! Pure: the expansion of `$NAME` in one word, with buildah's rules for quotes and escapes.
//!
//! buildah knows `$NAME`, `${NAME}`, `${NAME:-default}` and `${NAME:+value}` and fails on the rest of Docker's
//! forms; the escape is always a backslash, whatever the escape directive says. Unset and empty are the same to
//! it; `missing` keeps them apart for the error message.

use std::iter::Peekable;
use std::str::Chars;

/// Deep nesting of `${a:-${b:-…}}` is nobody's intention; unlimited, it would use up the stack.
const MAX_DEPTH: usize = 32;

/// No value may grow beyond this, because `ENV B=$A$A` doubles with every line.
pub(super) const MAX_VALUE: usize = 64 * 1024;

/// An expanded word.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Expanded {
    /// The result.
    pub(super) text: String,
    /// Variables that were taken as they are but have no value at all.
    pub(super) missing: Vec<String>,
    /// Every variable that the word names.
    pub(super) named: Vec<String>,
}

/// Expands `word`; `value_of` answers for one variable.
pub(super) fn expand(word: &str, value_of: &dyn Fn(&str) -> Option<String>) -> Result<Expanded, String> {
    let mut expander = Expander { chars: word.chars().peekable(), value_of, depth: 0 };
    expander.until(None)
}

struct Expander<'a> {
    chars: Peekable<Chars<'a>>,
    value_of: &'a dyn Fn(&str) -> Option<String>,
    depth: usize,
}

impl Expanded {
    fn push(&mut self, c: char) -> Result<(), String> {
        self.text.push(c);
        self.limit()
    }

    fn join(&mut self, other: Self) -> Result<(), String> {
        self.text.push_str(&other.text);
        self.missing.extend(other.missing);
        self.named.extend(other.named);
        self.limit()
    }

    fn limit(&self) -> Result<(), String> {
        if self.text.len() > MAX_VALUE { Err(format!("more than {MAX_VALUE} bytes")) } else { Ok(()) }
    }
}

impl Expander<'_> {
    /// Expands up to `stop`, which is consumed, or to the end if there is none.
    fn until(&mut self, stop: Option<char>) -> Result<Expanded, String> {
        let mut out = Expanded::default();
        while let Some(c) = self.chars.next() {
            match c {
                c if stop == Some(c) => return Ok(out),
                '\'' => self.single_quoted(&mut out)?,
                '"' => self.double_quoted(&mut out)?,
                '$' => out.join(self.dollar()?)?,
                '\\' => {
                    if let Some(next) = self.chars.next() {
                        out.push(next)?;
                    }
                }
                c => out.push(c)?,
            }
        }
        match stop {
            Some(stop) => Err(format!("no `{stop}` at the end")),
            None => Ok(out),
        }
    }

    fn single_quoted(&mut self, out: &mut Expanded) -> Result<(), String> {
        for c in self.chars.by_ref() {
            if c == '\'' {
                return Ok(());
            }
            out.push(c)?;
        }
        Err("no ' at the end".to_owned())
    }

    fn double_quoted(&mut self, out: &mut Expanded) -> Result<(), String> {
        while let Some(c) = self.chars.next() {
            match c {
                '"' => return Ok(()),
                '$' => out.join(self.dollar()?)?,
                '\\' => match self.chars.next_if(|next| matches!(next, '"' | '$' | '\\')) {
                    Some(escaped) => out.push(escaped)?,
                    // A backslash at the end is dropped, any other stays.
                    None if self.chars.peek().is_some() => out.push('\\')?,
                    None => {}
                },
                c => out.push(c)?,
            }
        }
        Err("no \" at the end".to_owned())
    }

    /// What follows a `$`.
    fn dollar(&mut self) -> Result<Expanded, String> {
        if self.chars.next_if_eq(&'{').is_none() {
            let name = self.name();
            return Ok(if name.is_empty() {
                Expanded { text: "$".to_owned(), ..Expanded::default() }
            } else {
                self.plain(name)
            });
        }
        let name = self.name();
        match self.chars.next() {
            Some('}') => Ok(self.plain(name)),
            Some(':') => self.modified(name),
            _ => Err(format!("`${{{name}` is followed by neither }} nor :")),
        }
    }

    fn plain(&self, name: String) -> Expanded {
        let value = (self.value_of)(&name);
        Expanded {
            missing: if value.is_none() { vec![name.clone()] } else { Vec::new() },
            text: value.unwrap_or_default(),
            named: vec![name],
        }
    }

    /// `${name:-word}` and `${name:+word}`, from after the colon.
    fn modified(&mut self, name: String) -> Result<Expanded, String> {
        let modifier = self.chars.next();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} levels of ${{}}"));
        }
        let word = self.until(Some('}'))?;
        self.depth -= 1;
        let value = (self.value_of)(&name).unwrap_or_default();
        let mut result = match (modifier, value.is_empty()) {
            (Some('-'), true) | (Some('+'), false) => word,
            (Some('-' | '+'), _) => {
                let named = word.named;
                let text = if modifier == Some('-') { value } else { String::new() };
                Expanded { text, missing: Vec::new(), named }
            }
            _ => return Err(format!("`${{{name}:` is followed by neither - nor +")),
        };
        result.named.push(name);
        Ok(result)
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.chars.next_if(|c| c.is_alphanumeric() || *c == '_') {
            name.push(c);
            if name.len() == 1 && c.is_ascii_digit() {
                break;
            }
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value_of(name: &str) -> Option<String> {
        match name {
            "A" => Some("1".to_owned()),
            "EMPTY" => Some(String::new()),
            "Q" => Some("x y".to_owned()),
            _ => None,
        }
    }

    /// Each row was seen to give the same with `FROM` in buildah 1.28.2.
    #[test]
    fn expands_as_buildah_does() {
        for (word, expected) in [
            ("alpine", "alpine"),
            ("alpine:$A", "alpine:1"),
            ("alpine:${A}0", "alpine:10"),
            ("$A$A", "11"),
            ("${NO:-d}", "d"),
            ("${EMPTY:-d}", "d"),
            ("${A:-d}", "1"),
            ("${A:+yes}", "yes"),
            ("${NO:+yes}", ""),
            ("${NO:-${A:-x}}", "1"),
            ("${NO:-a$A}", "a1"),
            ("'$A'", "$A"),
            ("\"$A\"", "1"),
            ("\"\\$A\"", "$A"),
            ("\"a\\b\"", "a\\b"),
            ("\\$A", "$A"),
            ("a\\", "a"),
            ("$", "$"),
            ("$-x", "$-x"),
            ("$1x", "x"),
            ("${Q}", "x y"),
        ] {
            assert_eq!(expand(word, &value_of).map(|e| e.text), Ok(expected.to_owned()), "{word}");
        }
    }

    #[test]
    fn fails_where_buildah_fails() {
        let deep = "${NO:-".repeat(MAX_DEPTH + 1) + &"}".repeat(MAX_DEPTH + 1);
        for word in ["${A-x}", "${A", "${A:?x}", "${A#x}", "'a", "\"a", "${NO:-'}", deep.as_str()] {
            assert!(expand(word, &value_of).is_err(), "{word}");
        }
    }

    #[test]
    fn names_what_is_missing_and_used() {
        let names = |word: &str| expand(word, &value_of).map(|e| (e.missing, e.named)).unwrap();
        assert_eq!(names("$NO$A"), (vec!["NO".to_owned()], vec!["NO".to_owned(), "A".to_owned()]));
        assert_eq!(names("${NO:-x}").0, Vec::<String>::new());
        assert_eq!(names("${NO:-$NO2}").0, ["NO2"]);
        assert_eq!(names("${A:-$NO2}").0, Vec::<String>::new());
        assert_eq!(names("$EMPTY").0, Vec::<String>::new());
    }

    #[test]
    fn a_value_cannot_grow_without_end() {
        let big = |_: &str| Some("x".repeat(MAX_VALUE));
        assert!(expand("$A", &big).is_ok());
        assert!(expand("$A$A", &big).is_err());
    }
}
