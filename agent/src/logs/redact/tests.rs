use proptest::prelude::*;

use super::*;

fn secret(name: &str, bytes: impl AsRef<[u8]>) -> SecretValue {
    SecretValue { name: name.to_owned(), bytes: bytes.as_ref().to_vec() }
}

/// What the masks mean, without any cleverness.
fn model(needles: &[Vec<u8>], text: &[u8]) -> Vec<u8> {
    let mut masked = vec![false; text.len()];
    for needle in needles {
        for (at, window) in text.windows(needle.len()).enumerate() {
            if window == needle {
                masked[at..at + needle.len()].fill(true);
            }
        }
    }
    let open = (MIN_SECRET_BYTES..=text.len())
        .rev()
        .find(|n| needles.iter().any(|needle| needle.starts_with(&text[text.len() - n..])));
    if let Some(open) = open {
        let from = text.len() - open;
        masked[from..].fill(true);
    }
    let mut out = Vec::new();
    for (at, &byte) in text.iter().enumerate() {
        if !masked[at] {
            out.push(byte);
        } else if at == 0 || !masked[at - 1] {
            out.extend_from_slice(MASK.as_bytes());
        }
    }
    out
}

/// The output for `text` in chunks of the given lengths (repeated), and that nothing is held back that need
/// not be.
fn stream(redactor: &Redactor, needles: &[Vec<u8>], text: &[u8], chunks: &[usize]) -> Vec<u8> {
    let mut redactor = redactor.fresh();
    let mut out = Vec::new();
    let mut rest = text;
    let mut read = 0;
    for &length in chunks.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (chunk, left) = rest.split_at(length.min(rest.len()));
        redactor.push(chunk, &mut out);
        (rest, read) = (left, read + chunk.len());
        let held = redactor.held();
        let open = |n: usize| needles.iter().any(|needle| needle.starts_with(&text[read - n..read]));
        assert!(held == 0 || (held..=read).any(open), "holds {held} bytes that cannot become a secret");
    }
    redactor.finish(&mut out);
    out
}

fn contains(text: &[u8], needle: &[u8]) -> bool {
    text.windows(needle.len()).any(|window| window == needle)
}

/// Needles over two letters overlap, nest and repeat themselves all the time.
fn needles() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(prop::sample::select(b"ab".to_vec()), 6..14), 1..5)
}

fn planted(needles: Vec<Vec<u8>>) -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<u8>)> {
    let noise = prop::collection::vec(prop::sample::select(b"aabbc\n".to_vec()), 0..12);
    let piece = (noise, prop::sample::select(needles.clone()), 0..16_usize, any::<bool>());
    prop::collection::vec(piece, 0..6).prop_map(move |pieces| {
        let mut text = Vec::new();
        for (noise, needle, cut, from_start) in pieces {
            text.extend(noise);
            let cut = cut.min(needle.len());
            text.extend(if from_start { &needle[..cut] } else { &needle[cut / 2..] });
        }
        (needles.clone(), text)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_split_gives_what_the_model_gives(
        (needles, text) in needles().prop_flat_map(planted),
        chunks in prop::collection::vec(1..20_usize, 1..6),
    ) {
        let redactor = Redactor::over(needles.clone());
        let expected = model(&needles, &text);
        prop_assert_eq!(&stream(&redactor, &needles, &text, &[usize::MAX]), &expected);
        prop_assert_eq!(&stream(&redactor, &needles, &text, &chunks), &expected);
        prop_assert_eq!(&stream(&redactor, &needles, &text, &[1]), &expected);
        prop_assert!(needles.iter().all(|needle| !contains(&expected, needle)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_form_of_any_value_survives(
        values in prop::collection::vec(prop::collection::vec(any::<u8>(), 8..90), 1..4),
        text in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..20), any::<prop::sample::Index>()), 1..8),
        chunks in prop::collection::vec(1..200_usize, 1..5),
    ) {
        let secrets = values.iter().enumerate().map(|(i, value)| secret(&i.to_string(), value));
        let Ok(redactor) = Redactor::new(secrets) else { return Ok(()) };
        let needles: Vec<_> = values.iter().flat_map(|value| forms::of(value)).collect();
        prop_assume!(!needles.is_empty());
        let text: Vec<u8> = text.into_iter().flat_map(|(noise, which)| [noise, which.get(&needles).clone()].concat()).collect();
        let out = stream(&redactor, &needles, &text, &chunks);
        prop_assert_eq!(&out, &model(&needles, &text));
        for needle in needles.iter().filter(|needle| !needle.contains(&b'*')) {
            prop_assert!(!contains(&out, needle));
        }
    }
}

fn redact(redactor: &Redactor, text: &[u8]) -> String {
    let mut out = Vec::new();
    let mut redactor = redactor.fresh();
    redactor.push(text, &mut out);
    redactor.finish(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

#[test]
fn values_and_forms_are_masked_where_they_stand() {
    let redactor =
        Redactor::new([secret("npm", "tok\"en 12\n"), secret("key", "-----BEGIN\nab\nlonger line\n")])
            .unwrap();
    let table = [
        ("x tok\"en 12\ny", "x ***\ny"),
        ("x tok\"en 1x", "x tok\"en 1x"),
        (r#"{"a":"tok\"en 12\n"}"#, r#"{"a":"***\n"}"#),
        ("?t=tok%22en%2012&x", "?t=***&x"),
        ("?t=tok%22en+12", "?t=***"),
        ("tok\"en 12tok\"en 12", "***"),
        ("tok\"en 12 tok\"en 12", "*** ***"),
        ("-----BEGIN\nab\nlonger line\n", "***\n"),
        ("> -----BEGIN\n> ab\n> longer line", "> ***\n> ab\n> ***"),
    ];
    for (text, expected) in table {
        assert_eq!(redact(&redactor, text.as_bytes()), expected, "{text}");
    }
}

#[test]
fn only_the_start_of_a_secret_is_held_back() {
    let mut redactor = Redactor::new([secret("s", "secret-value")]).unwrap();
    let mut out = Vec::new();
    redactor.push(b"Password: ", &mut out);
    assert_eq!(out, b"Password: ");
    redactor.push(b"sec", &mut out);
    assert_eq!((out.as_slice(), redactor.held()), (b"Password: ".as_slice(), 3));
    redactor.push(b"ond", &mut out);
    assert_eq!((out.as_slice(), redactor.held()), (b"Password: second".as_slice(), 0));
    redactor.push(b" secret-valu", &mut out);
    redactor.push(b"e", &mut out);
    assert_eq!((out.as_slice(), redactor.held()), (b"Password: second ***".as_slice(), 0), "not delayed");
}

#[test]
fn a_secret_that_the_end_cuts_off_is_masked() {
    let redactor = Redactor::new([secret("s", "secret-value")]).unwrap();
    assert_eq!(redact(&redactor, b"got secret-va"), "got ***");
    assert_eq!(redact(&redactor, b"got secre"), "got secre", "five bytes are too few to mean anything");
}

#[test]
fn a_long_secret_is_masked_in_any_chunks() {
    let value: Vec<u8> =
        (0..70_000_u32).map(|i| b'!' + (i.wrapping_mul(2_654_435_761) >> 24) as u8 % 90).collect();
    let redactor = Redactor::new([secret("long", &value)]).unwrap();
    let text = [b"before ".as_slice(), &value, b" between ", &value[..65_536], b"\n"].concat();
    for length in [1, 4_096, 65_536, usize::MAX] {
        let mut streaming = redactor.fresh();
        let mut out = Vec::new();
        text.chunks(length.min(text.len())).for_each(|chunk| {
            streaming.push(chunk, &mut out);
            assert!(streaming.held() <= value.len());
        });
        streaming.finish(&mut out);
        assert!(out.starts_with(b"before *** between "), "in chunks of {length}");
    }
}

#[test]
fn values_that_cannot_be_masked_are_refused_by_name() {
    for value in ["1", "12345", " 12345\n"] {
        let error = Redactor::new([secret("pin", value)]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("`pin`") && text.contains('6') && !text.contains("12345"), "{text}");
    }
    assert!(Redactor::new([secret("pin", "123456")]).is_ok());
    assert!(Redactor::new([secret("empty", " \n"), secret("none", "")]).is_ok());
    let error =
        Redactor::new([secret("small", "123456"), secret("huge", vec![b'x'; MAX_NEEDLE_BYTES])]).unwrap_err();
    assert!(matches!(error, RedactError::TooLong { name, .. } if name == "huge"));
}

#[test]
fn debug_output_and_error_text_hold_no_secret() {
    let value = secret("s", "secret-value");
    let mut redactor = Redactor::new([value.clone()]).unwrap();
    redactor.push(b"secret-", &mut Vec::new());
    assert!(!format!("{value:?}{redactor:?}").contains("secret-"));
    assert!(!format!("{value:?}").contains(&format!("{:?}", value.bytes)));
    assert_eq!(redactor.redact_text("bad secret-value at https://a:b@c"), "bad *** at https://***@c");
}

#[test]
fn without_secrets_nothing_changes() {
    assert_eq!(redact(&Redactor::new([]).unwrap(), b"any \xff\n"), "any \u{fffd}\n");
}
