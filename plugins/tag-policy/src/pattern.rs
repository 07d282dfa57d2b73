//! Pure: globs for tags and repositories.

/// Longest pattern that settings may have; matching is quadratic in it at worst.
pub const MAX_CHARS: usize = 256;

/// Whether `text` matches `pattern`: `?` is any character, `*` any number of them but no slash, `**` also slashes.
pub fn matches(pattern: &str, text: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    // reach[i]: the pattern so far matches the first i characters.
    let mut reach = vec![false; text.len() + 1];
    reach[0] = true;
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        let across = rest.starts_with("**");
        rest = &rest[if across { 2 } else { c.len_utf8() }..];
        reach = match c {
            '*' => spread(&reach, &text, across),
            _ => step(&reach, &text, c),
        };
    }
    reach[text.len()]
}

fn spread(reach: &[bool], text: &[char], across: bool) -> Vec<bool> {
    let mut next = reach.to_vec();
    for (i, c) in text.iter().enumerate() {
        next[i + 1] |= next[i] && (across || *c != '/');
    }
    next
}

fn step(reach: &[bool], text: &[char], wanted: char) -> Vec<bool> {
    let mut next = vec![false; reach.len()];
    for (i, c) in text.iter().enumerate() {
        next[i + 1] = reach[i] && (*c == wanted || (wanted == '?' && *c != '/'));
    }
    next
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn globs() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("", "a", false),
            ("latest", "latest", true),
            ("latest", "latest2", false),
            ("v*", "v", true),
            ("v*", "v1.2", true),
            ("v*", "1.2", false),
            ("*-rc?", "1.0-rc1", true),
            ("*-rc?", "1.0-rc", false),
            ("team/*", "team/app", true),
            ("team/*", "team/app/web", false),
            ("team/**", "team/app/web", true),
            ("*.*.*", "1.2", false),
            ("ä?", "äö", true),
            ("****a****b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
