//! Patterns of topic exchanges (pure).

/// Whether a topic pattern matches a routing key: `*` stands for one word, `#` for any number of words, words
/// are separated by dots.
pub fn matches(pattern: &str, key: &str) -> bool {
    let pattern: Vec<&str> = words(pattern).collect();
    // reached[i]: the first i words of the pattern match the words of the key read so far.
    let mut reached = vec![false; pattern.len() + 1];
    reached[0] = true;
    skip_hashes(&pattern, &mut reached);
    for word in words(key) {
        reached = step(&pattern, &reached, word);
        skip_hashes(&pattern, &mut reached);
    }
    reached[pattern.len()]
}

/// An empty text has no words, not one empty word.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split('.').filter(move |_| !text.is_empty())
}

fn step(pattern: &[&str], reached: &[bool], word: &str) -> Vec<bool> {
    let mut next = vec![false; reached.len()];
    for (at, part) in pattern.iter().enumerate().filter(|(at, _)| reached[*at]) {
        match *part {
            "#" => next[at] = true,
            "*" => next[at + 1] = true,
            exact => next[at + 1] |= exact == word,
        }
    }
    next
}

/// A `#` also stands for no word.
fn skip_hashes(pattern: &[&str], reached: &mut [bool]) {
    for (at, part) in pattern.iter().enumerate() {
        if *part == "#" && reached[at] {
            reached[at + 1] = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_the_protocol_says() {
        for (pattern, key, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.b", "a", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("*", "", false),
            ("a.*", "a.", true),
            ("#", "", true),
            ("#", "a.b.c", true),
            ("a.#", "a", true),
            ("a.#", "a.b.c", true),
            ("a.#", "b", false),
            ("#.c", "a.b.c", true),
            ("#.c", "c", true),
            ("#.c", "a.c.b", false),
            ("a.#.c", "a.c", true),
            ("a.#.c", "a.b.b.c", true),
            ("a.#.*", "a", false),
            ("a.#.*", "a.b", true),
            ("#.b.#", "a.b.c", true),
            ("#.#", "", true),
            ("", "", true),
            ("", "a", false),
            ("a.b", "a.*", false),
            ("a*", "ab", false),
        ] {
            assert_eq!(matches(pattern, key), expected, "pattern `{pattern}`, key `{key}`");
        }
    }

    #[test]
    fn many_hashes_cost_no_exponential_time() {
        let pattern = vec!["#"; 120].join(".") + ".x";
        assert!(!matches(&pattern, &vec!["a"; 120].join(".")));
    }
}
