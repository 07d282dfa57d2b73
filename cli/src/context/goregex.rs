//! Go regular expressions, as far as ignore patterns can spell them, for the `regex` crate (pure).
//!
//! Docker turns a pattern with wildcards into a Go regular expression and leaves part of what is special there
//! unescaped. So `\d`, `x{2}`, `a|b*` and `[[:alpha:]]` mean in an ignore file what they mean in Go, and builds
//! rely on the outcome, knowingly or not. The `regex` crate reads some of these differently (nested classes,
//! Unicode `\d`, `{a,b}` is an error), so each construct is parsed by Go's rules and written out explicitly.

use std::fmt::Write as _;

use regex::bytes::{Regex, RegexBuilder};

/// Go's own bound for `{n,m}`.
const MAX_REPEAT: u32 = 1000;
/// A pattern of `{1000}`s must not take the memory of a whole build.
const MAX_COMPILED_BYTES: usize = 1 << 20;

/// Why the expression is not one, in words that fit behind the pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadRegex(&'static str);

/// Compiles an expression written for Go; the haystack must be valid UTF-8.
pub(super) fn compile(go: &str) -> Result<Regex, BadRegex> {
    // What is left to fail is a class name or a size: everything else was checked by the translation.
    RegexBuilder::new(&translate(go)?).size_limit(MAX_COMPILED_BYTES).build().map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => BadRegex("the pattern takes more than 1 MiB once compiled"),
        _ => BadRegex("unknown character class or code point"),
    })
}

fn translate(go: &str) -> Result<String, BadRegex> {
    let mut translator = Translator { rest: go, out: String::new(), last: Last::Nothing };
    while let Some(c) = translator.next() {
        translator.step(c)?;
    }
    Ok(translator.out)
}

/// What a repetition that follows would repeat.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Nothing,
    Atom,
    /// Go refuses to repeat a repetition.
    Repetition,
}

struct Translator<'a> {
    rest: &'a str,
    out: String,
    last: Last,
}

impl Translator<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    fn eat(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn push(&mut self, text: &str, last: Last) {
        self.out.push_str(text);
        self.last = last;
    }

    fn step(&mut self, c: char) -> Result<(), BadRegex> {
        match c {
            '(' => self.push("(?:", Last::Nothing),
            '|' => self.push("|", Last::Nothing),
            ')' => self.push(")", Last::Atom),
            '.' => self.push(".", Last::Atom),
            // Grouped, because both syntaxes allow to repeat an assertion but only Go without brackets.
            '^' => self.push("(?:^)", Last::Atom),
            '$' => self.push("(?:$)", Last::Atom),
            '*' | '+' | '?' => self.repeat(c.encode_utf8(&mut [0; 4]))?,
            '{' => self.braces()?,
            '[' => self.class()?,
            '\\' => self.escape()?,
            _ => self.literal(c),
        }
        Ok(())
    }

    fn literal(&mut self, c: char) {
        self.push(&regex::escape(c.encode_utf8(&mut [0; 4])), Last::Atom);
    }

    fn repeat(&mut self, operator: &str) -> Result<(), BadRegex> {
        match self.last {
            Last::Nothing => Err(BadRegex("a repetition of nothing")),
            Last::Repetition => Err(BadRegex("a repetition of a repetition")),
            Last::Atom => {
                self.push(operator, Last::Repetition);
                Ok(())
            }
        }
    }

    /// `{` begins a repetition if it looks like one and is an ordinary character otherwise.
    fn braces(&mut self) -> Result<(), BadRegex> {
        let Some((count, rest)) =
            self.rest.split_once('}').and_then(|(body, rest)| Some((bounds(body)?, rest)))
        else {
            self.literal('{');
            return Ok(());
        };
        self.rest = rest;
        match count {
            (min, None) if min <= MAX_REPEAT => self.repeat(&format!("{{{min},}}")),
            (min, Some(max)) if min <= max && max <= MAX_REPEAT => self.repeat(&format!("{{{min},{max}}}")),
            _ => Err(BadRegex("a repetition above 1000 or with bounds in the wrong order")),
        }
    }

    fn escape(&mut self) -> Result<(), BadRegex> {
        let c = self.next().ok_or(BadRegex("a trailing backslash"))?;
        match c {
            'A' => self.push("(?:^)", Last::Atom),
            'z' => self.push("(?:$)", Last::Atom),
            'b' => self.push(r"(?-u:\b)", Last::Atom),
            'B' => self.push(r"(?-u:\B)", Last::Atom),
            'Q' => self.quotation(),
            'p' | 'P' => {
                let class = self.unicode_class(c)?;
                self.push(&class, Last::Atom);
            }
            _ => {
                let class = perl_class(c).map(str::to_owned);
                let atom =
                    class.map_or_else(|| self.code_point(c).map(|code| format!("\\x{{{code:X}}}")), Ok)?;
                self.push(&atom, Last::Atom);
            }
        }
        Ok(())
    }

    /// `\Q…\E`; without the end it runs to the end of the expression.
    fn quotation(&mut self) {
        let (text, rest) = self.rest.split_once("\\E").unwrap_or((self.rest, ""));
        self.rest = rest;
        if self.last == Last::Repetition {
            self.last = Last::Atom;
        }
        for c in text.chars() {
            self.literal(c);
        }
    }

    fn class(&mut self) -> Result<(), BadRegex> {
        let mut class = String::from(if self.eat("^") { "[^" } else { "[" });
        // A bracket that comes first is an ordinary member.
        self.member(&mut class)?;
        while !self.eat("]") {
            self.member(&mut class)?;
        }
        class.push(']');
        self.push(&class, Last::Atom);
        Ok(())
    }

    fn member(&mut self, class: &mut String) -> Result<(), BadRegex> {
        if let Some(set) = self.set()? {
            class.push_str(&set);
            return Ok(());
        }
        let low = self.class_char()?;
        let is_range = self.rest.starts_with('-') && self.rest.len() > 1 && !self.rest.starts_with("-]");
        let high = if is_range && self.eat("-") { self.class_char()? } else { low };
        if high < low {
            return Err(BadRegex("a character range that runs backwards"));
        }
        // Writing to a String cannot fail.
        let _ = write!(class, "\\x{{{low:X}}}-\\x{{{high:X}}}");
        Ok(())
    }

    /// A member that stands for several characters: `[:alpha:]`, `\pL`, `\d`.
    fn set(&mut self) -> Result<Option<String>, BadRegex> {
        if let Some((name, rest)) = self.rest.strip_prefix("[:").and_then(|rest| rest.split_once(":]")) {
            self.rest = rest;
            return posix_class(name).map(Some);
        }
        let escaped = self.rest.strip_prefix('\\').and_then(|rest| rest.chars().next());
        match escaped {
            Some(c @ ('p' | 'P')) => {
                self.rest = &self.rest[2..];
                self.unicode_class(c).map(Some)
            }
            Some(c) => Ok(perl_class(c).map(|class| {
                self.rest = &self.rest[2..];
                class.to_owned()
            })),
            None => Ok(None),
        }
    }

    fn class_char(&mut self) -> Result<u32, BadRegex> {
        const OPEN: BadRegex = BadRegex("a character class without its `]`");
        match self.next().ok_or(OPEN)? {
            '\\' => {
                let c = self.next().ok_or(OPEN)?;
                self.code_point(c)
            }
            c => Ok(u32::from(c)),
        }
    }

    /// The name behind `\p` or `\P`.
    fn unicode_class(&mut self, kind: char) -> Result<String, BadRegex> {
        const UNKNOWN: BadRegex = BadRegex("unknown Unicode class");
        let name = if self.eat("{") {
            let (name, rest) = self.rest.split_once('}').ok_or(UNKNOWN)?;
            self.rest = rest;
            name.to_owned()
        } else {
            self.next().ok_or(UNKNOWN)?.to_string()
        };
        let (name, inverted) = name.strip_prefix('^').map_or((&name[..], false), |name| (name, true));
        let kind = if (kind == 'P') == inverted { 'p' } else { 'P' };
        // The `regex` crate would also read properties such as `sc=Greek`, which Go does not know.
        if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            Ok(format!("\\{kind}{{{name}}}"))
        } else {
            Err(UNKNOWN)
        }
    }

    /// The character that an escape names, `c` being the one behind the backslash.
    fn code_point(&mut self, c: char) -> Result<u32, BadRegex> {
        const UNKNOWN: BadRegex = BadRegex("unknown escape");
        match c {
            'a' => Ok(0x07),
            'f' => Ok(0x0C),
            't' => Ok(0x09),
            'n' => Ok(0x0A),
            'r' => Ok(0x0D),
            'v' => Ok(0x0B),
            'x' => self.hexadecimal().ok_or(UNKNOWN),
            // One digit other than 0 would be a back reference, which Go does not have.
            '1'..='7' if !self.rest.starts_with(|c| matches!(c, '0'..='7')) => Err(UNKNOWN),
            '0'..='7' => Ok(self.octal(c)),
            _ if c.is_ascii() && !c.is_ascii_alphanumeric() => Ok(u32::from(c)),
            _ => Err(UNKNOWN),
        }
    }

    fn octal(&mut self, first: char) -> u32 {
        let more = self.rest.bytes().take(2).take_while(|b| matches!(b, b'0'..=b'7')).count();
        let (digits, rest) = self.rest.split_at(more);
        self.rest = rest;
        let value = digits.bytes().fold(0, |value, b| value * 8 + u32::from(b - b'0'));
        first.to_digit(8).unwrap_or_default() * 8_u32.pow(u32::try_from(more).unwrap_or_default()) + value
    }

    fn hexadecimal(&mut self) -> Option<u32> {
        let digits = if self.eat("{") {
            let (digits, rest) = self.rest.split_once('}')?;
            self.rest = rest;
            digits
        } else {
            let (digits, rest) = self.rest.split_at_checked(2)?;
            self.rest = rest;
            digits
        };
        // `from_str_radix` would accept a sign.
        let value =
            digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok());
        value.flatten().filter(|code| *code <= u32::from(char::MAX))
    }
}

/// The bounds in `{min}`, `{min,}` or `{min,max}`; anything else is no repetition.
fn bounds(body: &str) -> Option<(u32, Option<u32>)> {
    match body.split_once(',') {
        None => number(body).map(|count| (count, Some(count))),
        Some((min, "")) => Some((number(min)?, None)),
        Some((min, max)) => Some((number(min)?, Some(number(max)?))),
    }
}

fn number(digits: &str) -> Option<u32> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let leading_zero = digits.len() > 1 && digits.starts_with('0');
    // Too large for the type is also too large to be allowed.
    (plain && !leading_zero).then(|| digits.parse().unwrap_or(u32::MAX))
}

/// Go's `\d` and its kin know ASCII only.
fn perl_class(c: char) -> Option<&'static str> {
    Some(match c {
        'd' => "[0-9]",
        'D' => "[^0-9]",
        's' => r"[\t\n\x0C\r ]",
        'S' => r"[^\t\n\x0C\r ]",
        'w' => "[0-9A-Za-z_]",
        'W' => "[^0-9A-Za-z_]",
        _ => return None,
    })
}

fn posix_class(name: &str) -> Result<String, BadRegex> {
    const NAMES: [&str; 14] = [
        "alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space",
        "upper", "word", "xdigit",
    ];
    if NAMES.contains(&name.strip_prefix('^').unwrap_or(name)) {
        Ok(format!("[:{name}:]"))
    } else {
        Err(BadRegex("unknown character class between `[:` and `:]`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(go: &str, yes: &[&str], no: &[&str]) {
        let regex = compile(go).unwrap_or_else(|error| panic!("{go}: {error}"));
        for text in yes {
            assert!(regex.is_match(text.as_bytes()), "{go} should match {text:?} ({regex})");
        }
        for text in no {
            assert!(!regex.is_match(text.as_bytes()), "{go} should not match {text:?} ({regex})");
        }
    }

    #[test]
    fn what_the_two_syntaxes_share() {
        check("^(.*/)?a[^/]*$", &["a", "x/y/ab"], &["a/b", "xa"]);
        check("^[^/]*$", &["", "a\nb"], &["a/b"]);
        check("^a.*$", &["abc"], &["a\nb"]);
        check(r"^a\.b\$$", &["a.b$"], &["axb$"]);
    }

    #[test]
    fn braces_repeat_only_when_they_look_like_it() {
        check("^a{2}$", &["aa"], &["a", "a{2}"]);
        check("^a{1,2}$", &["a", "aa"], &["", "aaa"]);
        check("^a{1,}$", &["a", "aaaa"], &[""]);
        for literal in ["{a,b}", "{}", "{,2}", "{01}", "{ 1}", "{1", "{1,2", "{1;2}", "x{-1}"] {
            check(&format!("^{literal}$"), &[literal], &["a", ""]);
        }
        for bad in
            ["^a{1001}$", "^a{2,1}$", "^a{99999999999}$", "^a{1,99999999999}$", "a*{2}", "a{2}{2}", "|{2}"]
        {
            assert!(compile(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn classes_follow_go() {
        check("^[[^/]*]x$", &["]x", "[^/]x"], &["ax", "x"]);
        check("^[]a]$", &["]", "a"], &["b"]);
        check("^[^]a]$", &["b", "/", "\n"], &["]", "a"]);
        check("^[a-]$", &["a", "-"], &["b"]);
        check("^[-a]$", &["a", "-"], &["b"]);
        check("^[a&&b]$", &["a", "&", "b"], &["c"]);
        check("^[+--~~]$", &["+", ",", "-", "~"], &["b", "."]);
        check(r"^[\]\-\\]$", &["]", "-", "\\"], &["a"]);
        check("^[[:alpha:]_]$", &["a", "Z", "_"], &["1", "é", ":"]);
        check("^[[:^digit:]]$", &["a"], &["1"]);
        check("^[[:a]$", &["[", ":", "a"], &["b"]);
        check(r"^[\d\x41\102é-ζ]$", &["7", "A", "B", "α"], &["C", "a"]);
        check(r"^[^\D]$", &["7"], &["a"]);
        check("^[+-.]$", &["+", ",", "-", "."], &["/"]);
        for bad in ["[", "[]", "[^", "[b-a]", "[[:nope:]]", r"[\q]", r"[a-\d]", r"[\Qa\E]", "[a"] {
            assert!(compile(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn escapes_follow_go() {
        check(r"^\d\w\s$", &["7_ ", "7a\t"], &["٣a ", "7é ", "7a\u{b}", "7a\u{a0}"]);
        check(r"^\D\W\S$", &["a-b"], &["1-b"]);
        check(r"^\x41\x{263A}\101\07\012$", &["A☺A\u{7}\n"], &["x41"]);
        check(r"^\pL\p{Greek}\P{Greek}\p{^L}$", &["aαa1"], &["1αa1", "aaa1"]);
        check(r"^\Qa*{2}\E{2}$", &["a*{2}}"], &["a*{2}"]);
        check(r"^\Qa$", &["xa$", "a$b"].map(|s| s.trim_start_matches('x')), &["a"]);
        check(r"^a\b/\Bb", &[], &["a/b"]);
        check(r"\Aa\z", &["a"], &["ab", "ba"]);
        check(r"^é\b", &[], &["é"]);
        check(r"^\*\-\_\/$", &["*-_/"], &[]);
        for bad in [
            r"\",
            r"\q",
            r"\1",
            r"\8",
            r"\x4",
            r"\x{}",
            r"\x{110000}",
            r"\x{+41}",
            r"\C",
            r"\Z",
            r"\é",
            r"\pX",
            r"\p{sc=Greek}",
            r"\p{",
            r"\E",
        ] {
            assert!(compile(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn alternatives_bind_weaker_than_the_anchors() {
        check("^a|b[^/]*$", &["ax", "xb"], &["xa"]);
        check("^a||c$", &["x"], &[]);
    }

    #[test]
    fn a_huge_expression_is_refused() {
        assert!(compile(&r"\pL{1000}".repeat(100)).unwrap_err().to_string().contains("1 MiB"));
    }
}
