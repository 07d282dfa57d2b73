//! Pure: the records of a PAX extended header, read strictly.
//!
//! Extended attributes, access lists and owners are read over and dropped: the slot's files belong to the build,
//! and a capability (`security.capability`) is not for an archive to grant.

use super::error::Defect;
use super::header::in_calendar;

/// Digits of the longest length that a record can have.
const LENGTH_DIGITS: usize = 10;

/// What a PAX header says about an entry, as far as it is used.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) mtime: Option<i64>,
    /// Some key describes a sparse file, whose content is not what it seems.
    pub(super) sparse: bool,
}

impl Records {
    pub(super) fn parse(mut data: &[u8]) -> Result<Self, Defect> {
        let mut records = Self::default();
        while !data.is_empty() {
            let (key, value, rest) = next_record(data).ok_or(Defect::PaxRecord)?;
            records.take(key, value)?;
            data = rest;
        }
        Ok(records)
    }

    /// A global header applies to all entries that follow, so it may not say what is particular to one.
    pub(super) fn parse_global(data: &[u8]) -> Result<Self, Defect> {
        let records = Self::parse(data)?;
        let particular = [
            ("path", records.path.is_some()),
            ("linkpath", records.link.is_some()),
            ("size", records.size.is_some()),
            ("GNU.sparse", records.sparse),
        ];
        match particular.iter().find(|(_, present)| *present) {
            Some((key, _)) => Err(Defect::GlobalKey { key }),
            None => Ok(records),
        }
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), Defect> {
        match key {
            b"path" => set(&mut self.path, "path", value.to_vec()),
            b"linkpath" => set(&mut self.link, "linkpath", value.to_vec()),
            b"size" => set(&mut self.size, "size", decimal(value, "size")?),
            b"mtime" => set(&mut self.mtime, "mtime", seconds(value, "mtime")?),
            b"atime" => seconds(value, "atime").map(drop),
            b"ctime" => seconds(value, "ctime").map(drop),
            b"uid" => owner(value, "uid"),
            b"gid" => owner(value, "gid"),
            _ => {
                self.sparse |= is_sparse(key);
                Ok(())
            }
        }
    }
}

/// Later records would override earlier ones, but not in every program; so none may repeat.
fn set<T>(slot: &mut Option<T>, key: &'static str, value: T) -> Result<(), Defect> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Defect::PaxRepeated { key }),
    }
}

/// The ways of GNU tar, star and Solaris to describe holes, and GNU's notes about dumps and volumes.
fn is_sparse(key: &[u8]) -> bool {
    key.starts_with(b"GNU.sparse")
        || key.starts_with(b"GNU.volume")
        || matches!(key, b"GNU.dumpdir" | b"SCHILY.realsize" | b"SUN.holesdata")
}

/// `length SPACE key = value NEWLINE`, where the length counts the whole record. Answers key, value and the rest.
fn next_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let digits = data.iter().take(LENGTH_DIGITS).take_while(|byte| byte.is_ascii_digit()).count();
    let length: usize = std::str::from_utf8(&data[..digits]).ok()?.parse().ok()?;
    if data[0] == b'0' || length <= digits || length > data.len() {
        return None;
    }
    let (record, rest) = data.split_at(length);
    let body = record[digits..].strip_prefix(b" ")?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    // A zero byte ends the key for programs written in C.
    (!key.is_empty() && !key.contains(&0)).then_some((key, value, rest))
}

fn decimal(value: &[u8], key: &'static str) -> Result<u64, Defect> {
    let text = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    // Offsets of files are signed, so nothing longer can exist.
    let number = text.and_then(|text| text.parse::<i64>().ok()).map(i64::unsigned_abs);
    number.ok_or(Defect::PaxValue { key })
}

fn owner(value: &[u8], key: &'static str) -> Result<(), Defect> {
    u32::try_from(decimal(value, key)?).map(drop).map_err(|_| Defect::PaxValue { key })
}

/// Seconds with a fraction, rounded down: images keep whole seconds.
fn seconds(value: &[u8], key: &'static str) -> Result<i64, Defect> {
    parse_seconds(value).and_then(in_calendar).ok_or(Defect::PaxValue { key })
}

fn parse_seconds(value: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(value).ok()?;
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole: i64 = whole.parse().ok()?;
    let rest = i64::from(fraction.bytes().any(|byte| byte != b'0'));
    if negative { (-whole).checked_sub(rest) } else { Some(whole) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &str) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let length = (body..body + 9).find(|length| length.to_string().len() + body == *length).unwrap();
        format!("{length} {key}={value}\n").into_bytes()
    }

    fn parse(records: &[(&str, &str)]) -> Result<Records, Defect> {
        Records::parse(&records.iter().flat_map(|(key, value)| record(key, value)).collect::<Vec<_>>())
    }

    #[test]
    fn used_keys_are_read_and_others_dropped() {
        let records = parse(&[
            ("path", "a=b\nc"),
            ("linkpath", "../x"),
            ("size", "8589934592"),
            ("mtime", "1700000000.987654321"),
            ("uid", "0"),
            ("SCHILY.xattr.security.capability", "\u{1}\0\n"),
            ("comment", ""),
        ])
        .unwrap();
        let wanted = Records {
            path: Some(b"a=b\nc".to_vec()),
            link: Some(b"../x".to_vec()),
            size: Some(8 << 30),
            mtime: Some(1_700_000_000),
            sparse: false,
        };
        assert_eq!(records, wanted);
    }

    #[test]
    fn broken_records_are_refused() {
        for data in [
            &b"x"[..],
            b"12 path=abc",
            b"011 path=ab\n",
            b" 11 path=ab\n",
            b"11  path=b\n1",
            b"99 path=ab\n",
            b"5 =b\n",
            b"6 abc\n",
            b"2 \n",
            b"1\n",
            b"0 a=\n",
            b"99999999999999999999 a=b\n",
            b"10 path=ab\n",
            b"12 path=ab\n\0",
            b"13 pa\0th=ab\n",
            b"\0",
        ] {
            assert_eq!(Records::parse(data), Err(Defect::PaxRecord), "{}", data.escape_ascii());
        }
    }

    #[test]
    fn keys_that_identify_an_entry_stand_once() {
        for (key, value) in [("path", "a"), ("linkpath", "a"), ("size", "1"), ("mtime", "1")] {
            assert_eq!(parse(&[(key, value), (key, value)]), Err(Defect::PaxRepeated { key }));
        }
    }

    #[test]
    fn numbers_are_plain_and_in_range() {
        for size in ["", "+1", "-1", " 1", "1 ", "0x1", "1.0", "9223372036854775808"] {
            assert_eq!(parse(&[("size", size)]), Err(Defect::PaxValue { key: "size" }), "{size}");
        }
        assert_eq!(parse(&[("uid", "4294967296")]), Err(Defect::PaxValue { key: "uid" }));
        assert_eq!(parse(&[("ctime", "now")]), Err(Defect::PaxValue { key: "ctime" }));
    }

    #[test]
    fn times_are_rounded_down() {
        let table =
            [("1.9", Some(1)), ("0", Some(0)), ("-1.5", Some(-2)), ("-1.0", Some(-1)), ("-0.1", Some(-1))];
        for (text, seconds) in table {
            assert_eq!(parse_seconds(text.as_bytes()), seconds, "{text}");
        }
        for text in ["", ".", ".5", "-", "1e3", "1.2.3", "--1", "99999999999999999999"] {
            assert_eq!(parse_seconds(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse(&[("mtime", "253402300800")]), Err(Defect::PaxValue { key: "mtime" }));
    }

    #[test]
    fn sparse_files_are_noticed_in_every_dialect() {
        for key in
            ["GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.name", "SCHILY.realsize", "SUN.holesdata"]
        {
            assert!(parse(&[(key, "1")]).unwrap().sparse, "{key}");
        }
    }

    #[test]
    fn global_headers_cannot_rename_or_resize() {
        assert!(Records::parse_global(&record("comment", "a commit")).is_ok());
        for key in ["path", "linkpath", "size"] {
            assert_eq!(Records::parse_global(&record(key, "1")), Err(Defect::GlobalKey { key }));
        }
    }
}
