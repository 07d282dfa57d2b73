//! Masks credentials whose place gives them away: in URLs and authorization headers (pure).

use super::MASK;

/// Query parameters that grant access, in lower case.
const PARAMETERS: &[&str] = &[
    "access_token",
    "awsaccesskeyid",
    "client_secret",
    "password",
    "private_token",
    "sig",
    "signature",
    "token",
    "x-amz-credential",
    "x-amz-security-token",
    "x-amz-signature",
    "x-goog-credential",
    "x-goog-signature",
];

/// Words before a credential in a header.
const SCHEMES: &[&str] = &["bearer", "basic"];

/// Shorter words after `Basic` or `Bearer` are prose.
const SHORTEST_TOKEN: usize = 8;

/// The text without user info in URLs, signed query parameters and authorization headers: for messages of
/// tools that were not given a secret of the build but print what they connect to.
pub fn redact_text(text: &str) -> String {
    tokens(&parameters(&user_info(text)))
}

/// `https://user:password@host` becomes `https://***@host`.
fn user_info(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, authority) = rest.split_at(at + 3);
        out.push_str(before);
        let end = authority.find(ends_authority).unwrap_or(authority.len());
        rest = authority;
        // A password may hold an unescaped `@`; the host begins after the last one.
        if let Some(host) = authority[..end].rfind('@') {
            out.push_str(MASK);
            rest = &authority[host..];
        }
    }
    out.push_str(rest);
    out
}

fn ends_authority(c: char) -> bool {
    c.is_whitespace() || matches!(c, '/' | '?' | '#' | '"' | '\'' | '`' | '<' | '>')
}

/// `?token=abc&x=y` becomes `?token=***&x=y`.
fn parameters(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['?', '&']) {
        let (before, query) = rest.split_at(at + 1);
        out.push_str(before);
        rest = query;
        let end = query.find(ends_parameter).unwrap_or(query.len());
        if let Some((name, _)) = query[..end].split_once('=')
            && PARAMETERS.contains(&name.to_ascii_lowercase().as_str())
        {
            out.extend([name, "=", MASK]);
            rest = &query[end..];
        }
    }
    out.push_str(rest);
    out
}

fn ends_parameter(c: char) -> bool {
    c.is_whitespace() || matches!(c, '?' | '&' | '#' | '"' | '\'' | '`' | '<' | '>' | ';')
}

/// `Authorization: Bearer abc…` becomes `Authorization: Bearer ***`.
fn tokens(text: &str) -> String {
    // Of the same length, so that places agree.
    let lower = text.to_ascii_lowercase();
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    while let Some(start) = next_token(&lower, done) {
        out.push_str(&text[done..start]);
        let length = text[start..].find(|c| !is_token(c)).unwrap_or(text.len() - start);
        done = start;
        if length >= SHORTEST_TOKEN {
            out.push_str(MASK);
            done += length;
        }
    }
    out.push_str(&text[done..]);
    out
}

/// Where the word after the next `Basic` or `Bearer` begins.
fn next_token(lower: &str, from: usize) -> Option<usize> {
    let mut spaces = lower[from..].match_indices(' ').map(|(at, _)| from + at);
    let after_scheme = |at: &usize| SCHEMES.iter().any(|scheme| lower[..*at].ends_with(scheme));
    spaces.find(after_scheme).map(|at| at + 1)
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~' | '+' | '/' | '=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_go_and_everything_else_stays() {
        let table = [
            ("plain text, a?b&c=d", "plain text, a?b&c=d"),
            ("get https://u:p@host/x: 401", "get https://***@host/x: 401"),
            ("http://token@host", "http://***@host"),
            ("http://u:p@ss@host:1/a@b", "http://***@host:1/a@b"),
            ("a://b c@d e://f@g", "a://b c@d e://***@g"),
            ("https://h/x?a=1&X-Amz-Signature=0af&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
            ("https://h/x?sig=s%2B\"", "https://h/x?sig=***\""),
            ("?token=a&token=b", "?token=***&token=***"),
            ("Authorization: Bearer abcdefgh.ij, ok", "Authorization: Bearer ***, ok"),
            ("header basic dXNlcjpwdw==", "header basic ***"),
            ("a basic idea", "a basic idea"),
            ("bearer basic bearer", "bearer basic bearer"),
            ("://@", "://***@"),
        ];
        for (text, expected) in table {
            assert_eq!(redact_text(text), expected, "{text}");
        }
    }
}
