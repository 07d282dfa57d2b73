//! Names of images inside an archive or layout (pure).

use super::spec::SpecError;

/// Longest tag that registries accept.
const MAX_TAG: usize = 128;
/// Longest name that registries accept, and the bound for names in a layout's index.
const MAX_NAME: usize = 255;
const IMAGE_NAME: &str = "[HOST[:PORT]/]NAME[:TAG] in lower case, without digest";
const OCI_NAME: &str = "letters, digits and -._:@/+ only";

/// Checks what `docker load` will call the image; the tag is `latest` where there is none.
pub(super) fn check_image_name(text: &str) -> Result<String, SpecError> {
    let invalid = || SpecError::Name { name: text.to_owned(), expected: IMAGE_NAME };
    let last_slash = text.rfind('/').map_or(0, |at| at + 1);
    let (name, tag) = match text[last_slash..].rfind(':') {
        Some(at) => (&text[..last_slash + at], &text[last_slash + at + 1..]),
        None => (text, "latest"),
    };
    let (host, path) = split_host(name);
    let valid = host.is_none_or(is_host)
        && path.split('/').all(is_path_component)
        && is_tag(tag)
        && name.len() <= MAX_NAME;
    if valid { Ok(format!("{name}:{tag}")) } else { Err(invalid()) }
}

/// Checks the name of an image in the index of a layout.
pub(super) fn check_oci_name(text: &str) -> Result<String, SpecError> {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:@/+".contains(&b));
    if plain && !text.is_empty() && text.len() <= MAX_NAME {
        Ok(text.to_owned())
    } else {
        Err(SpecError::Name { name: text.to_owned(), expected: OCI_NAME })
    }
}

/// The first component is a host if it could not be part of a name.
fn split_host(name: &str) -> (Option<&str>, &str) {
    match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (Some(first), rest),
        _ => (None, name),
    }
}

fn is_host(text: &str) -> bool {
    let (host, port) = text.rsplit_once(':').unwrap_or((text, "0"));
    let valid_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(valid_label) && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
}

/// Lower-case words, joined by one dot, one or two underscores, or any number of dashes.
fn is_path_component(text: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separators = text.split(is_word).filter(|separator| !separator.is_empty());
    let joined = |s: &str| matches!(s, "." | "_" | "__") || s.chars().all(|c| c == '-');
    text.starts_with(is_word) && text.ends_with(is_word) && separators.into_iter().all(joined)
}

fn is_tag(text: &str) -> bool {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    first && text.len() <= MAX_TAG && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_names() {
        for (text, expected) in [
            ("app", "app:latest"),
            ("app:1.0_a-b", "app:1.0_a-b"),
            ("a/b__c/d--e.f:x", "a/b__c/d--e.f:x"),
            ("localhost/app", "localhost/app:latest"),
            ("Host.example:5000/app", "Host.example:5000/app:latest"),
            ("10.0.0.1:5000/app:1", "10.0.0.1:5000/app:1"),
        ] {
            assert_eq!(check_image_name(text).as_deref(), Ok(expected));
        }
        let long = "a".repeat(256);
        for text in [
            "",
            ":",
            ":1",
            "app:",
            "App",
            "a//b",
            "/a",
            "a/",
            "a b",
            "a..b",
            "-a",
            "a_",
            "a___b",
            "a:b:c",
            "a@sha256:00",
            "h.x:/a",
            "h.x:80a/b",
            "-h.x/a",
            "../a",
            "a\n",
            "ä",
            "app:-1",
            &long,
        ] {
            assert!(check_image_name(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn names_in_a_layout() {
        for text in ["v1", "r.example:5000/app:v1", "a+b@c"] {
            assert_eq!(check_oci_name(text).as_deref(), Ok(text));
        }
        for text in ["", "a b", "a\0", "a,b", "ä", &"a".repeat(256)] {
            assert!(check_oci_name(text).is_err(), "{text:?}");
        }
    }
}
