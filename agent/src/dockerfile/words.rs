//! Pure: how buildah (its Dockerfile reader, imagebuilder) cuts a line into words and expands `$NAME`.
//!
//! These functions follow buildah 1.28, not Docker, because Kiln must know what buildah will do: which image it
//! will look up, which directory it will mount. Where later versions differ, the callers say so.

/// One cut line: the keyword as written, the flags without their quotes, the rest.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Command<'a> {
    pub(super) word: &'a str,
    pub(super) flags: Vec<String>,
    pub(super) args: &'a str,
}

/// A flag with a byte that is not ASCII, which buildah would garble.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotAscii(pub(super) String);

const fn is_blank(c: char) -> bool {
    matches!(c, '\t' | '\x0b' | '\x0c' | '\r' | ' ')
}

/// Words between blanks. Quotes do not count here, nor do they for buildah in FROM, COPY and EXPOSE.
pub(super) fn blank_separated(args: &str) -> Vec<&str> {
    args.split(is_blank).filter(|word| !word.is_empty()).collect()
}

pub(super) fn split_command(line: &str) -> Result<Command<'_>, NotAscii> {
    let line = line.trim();
    let Some((word, rest)) = line.split_once(is_blank) else {
        return Ok(Command { word: line, flags: Vec::new(), args: "" });
    };
    let (flags, args) = take_flags(rest.trim_start_matches(is_blank))?;
    Ok(Command { word, flags, args: args.trim() })
}

/// Takes the leading `--flags` of a line; quotes and backslashes in them are resolved.
fn take_flags(mut rest: &str) -> Result<(Vec<String>, &str), NotAscii> {
    let mut flags = Vec::new();
    loop {
        rest = rest.trim_start_matches(is_blank);
        if !rest.starts_with("--") {
            return Ok((flags, rest));
        }
        let (flag, after) = take_flag(rest)?;
        rest = after;
        if flag == "--" {
            return Ok((flags, rest));
        }
        flags.push(flag);
    }
}

fn take_flag(text: &str) -> Result<(String, &str), NotAscii> {
    let mut flag = String::new();
    let mut quote = None;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match (c, quote) {
            (c, _) if !c.is_ascii() => return Err(not_ascii(text)),
            (c, None) if c.is_whitespace() => return Ok((flag, &text[at..])),
            ('\'' | '"', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            ('\\', _) => match chars.next() {
                Some((_, next)) if next.is_ascii() => flag.push(next),
                Some(_) => return Err(not_ascii(text)),
                None => {}
            },
            (c, _) => flag.push(c),
        }
    }
    Ok((flag, ""))
}

fn not_ascii(text: &str) -> NotAscii {
    NotAscii(blank_separated(text).first().copied().unwrap_or_default().to_owned())
}

/// Words as ARG, ENV and LABEL take them: quotes hold blanks together and stay in the word.
pub(super) fn quoted_words(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == escape && quote != Some('\'') {
            // An escape at the very end is dropped.
            if let Some(next) = chars.next() {
                word.extend([c, next]);
            }
            continue;
        }
        match quote {
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            None if matches!(c, '\'' | '"') => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// `KEY value` and `KEY=value …` of ENV, before expansion.
pub(super) fn pairs(args: &str, escape: char) -> Vec<(String, String)> {
    let words = quoted_words(args, escape);
    let Some(first) = words.first() else { return Vec::new() };
    if !first.contains('=') {
        let (key, value) = args.split_once(is_blank).unwrap_or((args, ""));
        return vec![(key.to_owned(), value.trim_start_matches(is_blank).to_owned())];
    }
    words
        .iter()
        .filter_map(|word| word.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// The strings of a JSON array, if `args` begins with one. buildah ignores what follows it.
pub(super) fn json_strings(args: &str) -> Option<Vec<String>> {
    let args = args.trim_start();
    if !args.starts_with('[') {
        return None;
    }
    serde_json::Deserializer::from_str(args).into_iter::<Vec<String>>().next()?.ok()
}

/// The mark of a here-document in an instruction: `<<NAME`, `<<-NAME` or `<<"NAME"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeredocMark {
    pub(super) name: String,
    pub(super) strip_tabs: bool,
}

/// The here-documents that a line opens. `<<` counts at the beginning of a word only and not in quotes, so that
/// `$((1<<3))` and `<<< text` open none.
pub(super) fn heredoc_marks(line: &str, escape: char) -> Vec<HeredocMark> {
    if !balanced(line, escape) {
        return Vec::new();
    }
    quoted_words(line, escape).iter().filter_map(|word| heredoc_mark(word, escape)).collect()
}

fn balanced(line: &str, escape: char) -> bool {
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match quote {
            _ if c == escape && quote != Some('\'') => {
                chars.next();
            }
            None if matches!(c, '\'' | '"') => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
    }
    quote.is_none()
}

fn heredoc_mark(word: &str, escape: char) -> Option<HeredocMark> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (rest, strip_tabs) = rest.strip_prefix('-').map_or((rest, false), |rest| (rest, true));
    let name: String = rest.chars().filter(|c| !matches!(c, '\'' | '"') && *c != escape).collect();
    let plain = !name.is_empty() && !rest.contains('<');
    plain.then_some(HeredocMark { name, strip_tabs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_lines_as_buildah_does() {
        let owned = |flags: &[&str]| flags.iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>();
        for (line, word, flags, args) in [
            ("RUN echo  hi ", "RUN", vec![], "echo  hi"),
            ("RUN", "RUN", vec![], ""),
            (" run\techo", "run", vec![], "echo"),
            (
                "RUN --mount=type=cache,target=\"/x y\" --a 'b'",
                "RUN",
                vec!["--mount=type=cache,target=/x y", "--a"],
                "'b'",
            ),
            ("RUN --a\\ b c", "RUN", vec!["--a b"], "c"),
            ("RUN -- --x", "RUN", vec![], "--x"),
            ("RUN -x --y", "RUN", vec![], "-x --y"),
            ("COPY --from='b' a b", "COPY", vec!["--from=b"], "a b"),
            ("COPY --chown=\\", "COPY", vec!["--chown="], ""),
        ] {
            let command = split_command(line).unwrap();
            assert_eq!(command, Command { word, flags: owned(&flags), args }, "{line}");
        }
        assert!(split_command("COPY --chown=é a b").is_err());
        assert!(split_command("COPY --chown=\\é a b").is_err());
    }

    #[test]
    fn keeps_quotes_in_words() {
        for (text, expected) in [
            ("A=1 B=\"2 3\"", vec!["A=1", "B=\"2 3\""]),
            ("A='x y'z", vec!["A='x y'z"]),
            ("A=a\\ b c", vec!["A=a\\ b", "c"]),
            ("A=\"a\\\" b\" c", vec!["A=\"a\\\" b\"", "c"]),
            ("A='\\' b", vec!["A='\\'", "b"]),
            ("  ", vec![]),
            ("A=b\\", vec!["A=b"]),
        ] {
            assert_eq!(quoted_words(text, '\\'), expected, "{text}");
        }
        assert_eq!(pairs("A  1 2=3", '\\'), [("A".to_owned(), "1 2=3".to_owned())]);
        assert_eq!(pairs("A=1 B=2", '\\').len(), 2);
    }

    #[test]
    fn finds_heredocs_only_at_word_starts() {
        for (line, expected) in [
            ("RUN <<EOF", vec!["EOF"]),
            ("RUN cat <<EOF > /x", vec!["EOF"]),
            ("COPY <<A <<-'B' /dest/", vec!["A", "B"]),
            ("RUN python3 3<<\"X\"", vec!["X"]),
            ("RUN echo $((1<<3))", vec![]),
            ("RUN cat <<< text", vec![]),
            ("RUN cat <<<text", vec![]),
            ("RUN cat << EOF", vec![]),
            ("RUN echo \"<<EOF\"", vec![]),
            ("RUN echo it's <<EOF", vec![]),
            ("RUN a<<EOF", vec![]),
        ] {
            let names: Vec<String> = heredoc_marks(line, '\\').into_iter().map(|mark| mark.name).collect();
            assert_eq!(names, expected, "{line}");
        }
    }

    #[test]
    fn reads_json_arrays_of_strings_only() {
        assert_eq!(json_strings(r#"["a", "b c"] # x"#).unwrap(), ["a", "b c"]);
        assert_eq!(json_strings(r#"["a", 1]"#), None);
        assert_eq!(json_strings("[ -f x ] && y"), None);
        assert_eq!(json_strings("a b"), None);
    }
}
