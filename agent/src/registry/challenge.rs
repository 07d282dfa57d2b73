//! Reads `WWW-Authenticate` headers (pure).

/// What a registry wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token from `realm`.
    Bearer { realm: String, service: Option<String> },
    /// Name and password.
    Basic,
}

/// The best challenge of all headers: tokens before passwords.
pub(crate) fn best<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut challenges: Vec<_> = headers.flat_map(parse).collect();
    challenges.sort_by_key(|challenge| matches!(challenge, Challenge::Basic));
    challenges.into_iter().next()
}

/// Every known challenge of one header. A header may hold several, separated by the same commas that
/// separate parameters.
fn parse(header: &str) -> Vec<Challenge> {
    let mut schemes: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let (word, after) = take_token(rest);
        if word.is_empty() {
            break;
        }
        if let Some(value) = after.trim_start().strip_prefix('=') {
            let (value, after) = take_value(value.trim_start());
            if let Some((_, parameters)) = schemes.last_mut() {
                parameters.push((word.to_ascii_lowercase(), value));
            }
            rest = after;
        } else {
            schemes.push((word.to_ascii_lowercase(), Vec::new()));
            rest = after;
        }
    }
    schemes.into_iter().filter_map(|(scheme, parameters)| challenge(&scheme, parameters)).collect()
}

fn challenge(scheme: &str, mut parameters: Vec<(String, String)>) -> Option<Challenge> {
    let mut take = |name: &str| {
        let position = parameters.iter().position(|(key, _)| key == name)?;
        Some(parameters.swap_remove(position).1)
    };
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer { realm: take("realm")?, service: take("service") }),
        _ => None,
    }
}

fn take_token(text: &str) -> (&str, &str) {
    let end = text.find([' ', '\t', ',', '=', '"']).unwrap_or(text.len());
    text.split_at(end)
}

/// A quoted or bare value and what follows it.
fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        // Bare values of sloppy servers hold `=` and `:`.
        let (value, rest) = text.split_at(text.find([',', ' ', '\t']).unwrap_or(text.len()));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[index + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer { realm: realm.into(), service: service.map(Into::into) }
    }

    #[test]
    fn the_headers_of_known_registries_are_read() {
        for (header, expected) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="a:b:pull""#,
                Some(bearer("https://auth.docker.io/token", Some("registry.docker.io"))),
            ),
            (r#"bearer scope="a:b:pull,push" , realm="https://a/t""#, Some(bearer("https://a/t", None))),
            (r"Bearer realm=https://a/t?x=1,service=s", Some(bearer("https://a/t?x=1", Some("s")))),
            (r#"Basic realm="x", Bearer realm="https://a/t""#, Some(bearer("https://a/t", None))),
            (r#"BASIC realm="Sonatype, \"Nexus\"""#, Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            ("Negotiate, Basic", Some(Challenge::Basic)),
            (r#"Bearer service="no realm""#, None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(best([header].into_iter()), expected, "{header}");
        }
        assert_eq!(best(["Basic", r#"Bearer realm="r""#].into_iter()), Some(bearer("r", None)));
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(header in r#"[ ,="\\a-zBé]{0,60}"#) {
            let _ = parse(&header);
        }
    }
}
