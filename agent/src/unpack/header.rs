//! Pure: one 512-byte tar header, read strictly.
//!
//! Where programs read a field differently, it is refused instead of guessed.

use std::ops::Range;

use super::error::{Defect, PathFault};

/// Tar's unit: headers are one block, content is padded to whole blocks.
pub(super) const BLOCK: usize = 512;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE: usize = 156;
const LINK: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..265;
const PREFIX: Range<usize> = 345..500;

const POSIX: &[u8] = b"ustar\0";
const GNU: &[u8] = b"ustar  \0";

/// Four-digit years, 0001 to 9999: beyond them `tar` cannot print a date, and no clock meant it.
const TIMES: Range<i64> = -62_135_596_800..253_402_300_800;

/// A header whose checksum and format are right; its fields are read when asked for.
pub(super) struct Header {
    block: [u8; BLOCK],
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, Defect> {
        let header = Self { block: *block };
        let recorded = octal(&header.block[CHECKSUM]).ok_or(Defect::Checksum)?;
        if recorded != header.sum() {
            return Err(Defect::Checksum);
        }
        if !(header.is_posix() || &header.block[MAGIC] == GNU || header.block[MAGIC].iter().all(|&b| b == 0))
        {
            return Err(Defect::Magic);
        }
        header.check_numbers()?;
        Ok(header)
    }

    /// Whether the block claims to be a header of POSIX or GNU, right or wrong.
    pub(super) fn claims_tar(block: &[u8]) -> bool {
        block.get(MAGIC).is_some_and(|magic| magic.starts_with(b"ustar"))
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.block[TYPE]
    }

    /// The name, with the prefix where the format has one.
    pub(super) fn name(&self) -> Result<Vec<u8>, PathFault> {
        let name = text(&self.block[NAME])?;
        let prefix = if self.is_posix() { text(&self.block[PREFIX])? } else { b"" };
        if prefix.is_empty() || name.is_empty() {
            return Ok(name.to_vec());
        }
        Ok([prefix, b"/", name].concat())
    }

    pub(super) fn link(&self) -> Result<Vec<u8>, PathFault> {
        text(&self.block[LINK]).map(<[u8]>::to_vec)
    }

    /// The permission bits; some old programs store the file type above them.
    pub(super) fn mode(&self) -> Result<u32, Defect> {
        self.number::<u32>(MODE, "mode").map(|mode| mode & 0o7777)
    }

    pub(super) fn size(&self) -> Result<u64, Defect> {
        // Offsets of files are signed, so nothing longer can exist.
        let size: i64 = self.number(SIZE, "size")?;
        u64::try_from(size).map_err(|_| Defect::Number { field: "size" })
    }

    pub(super) fn mtime(&self) -> Result<i64, Defect> {
        in_calendar(self.number(MTIME, "mtime")?).ok_or(Defect::Number { field: "mtime" })
    }

    /// Also what is not used or overridden later: GNU tar does not take a header in which such a field is wrong.
    fn check_numbers(&self) -> Result<(), Defect> {
        self.mode()?;
        self.size()?;
        self.mtime()?;
        self.number::<u32>(UID, "uid")?;
        self.number::<u32>(GID, "gid")?;
        Ok(())
    }

    fn is_posix(&self) -> bool {
        self.block[MAGIC].starts_with(POSIX)
    }

    /// The sum of all bytes, with the checksum field taken as spaces.
    fn sum(&self) -> i128 {
        let byte =
            |(at, byte): (usize, &u8)| if CHECKSUM.contains(&at) { b' '.into() } else { i128::from(*byte) };
        self.block.iter().enumerate().map(byte).sum()
    }

    fn number<T: TryFrom<i128>>(&self, field: Range<usize>, name: &'static str) -> Result<T, Defect> {
        let bytes = &self.block[field];
        let value = if bytes[0] & 0x80 == 0 { octal(bytes) } else { base256(bytes) };
        value.and_then(|value| T::try_from(value).ok()).ok_or(Defect::Number { field: name })
    }
}

/// The time, if a date can be printed for it.
pub(super) fn in_calendar(seconds: i64) -> Option<i64> {
    TIMES.contains(&seconds).then_some(seconds)
}

/// A text field ends at its first zero byte; bytes behind it are a name that only some programs see.
fn text(field: &[u8]) -> Result<&[u8], PathFault> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let (text, rest) = field.split_at(end);
    if rest.iter().all(|&byte| byte == 0) { Ok(text) } else { Err(PathFault::Zero) }
}

/// Spaces, octal digits, then only zero bytes and spaces. A field of zero bytes is 0, one of spaces is no number.
fn octal(field: &[u8]) -> Option<i128> {
    if field.iter().all(|&byte| byte == 0) {
        return Some(0);
    }
    let start = field.iter().position(|&byte| byte != b' ')?;
    let digits = field[start..].iter().take_while(|byte| matches!(byte, b'0'..=b'7')).count();
    let (number, rest) = field[start..].split_at(digits);
    if digits == 0 || !rest.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return None;
    }
    Some(number.iter().fold(0, |value, digit| value * 8 + i128::from(digit - b'0')))
}

/// GNU's form for large and negative numbers: a marker byte, then big-endian two's complement.
/// The widest field has 11 bytes behind the marker, so the value always fits.
fn base256(field: &[u8]) -> Option<i128> {
    let (&marker, digits) = field.split_first()?;
    let value = digits.iter().fold(0_i128, |value, &digit| value << 8 | i128::from(digit));
    match marker {
        0x80 => Some(value),
        0xff => Some(value - (1_i128 << (8 * digits.len()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(change: impl FnOnce(&mut [u8; BLOCK])) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..4].copy_from_slice(b"name");
        block[MAGIC].copy_from_slice(b"ustar\x0000");
        block[TYPE] = b'0';
        change(&mut block);
        block[CHECKSUM].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn header(change: impl FnOnce(&mut [u8; BLOCK])) -> Header {
        Header::parse(&sealed(change)).unwrap_or_else(|defect| panic!("{defect}"))
    }

    #[test]
    fn octal_fields_are_digits_between_blanks() {
        let table: [(&[u8], Option<i128>); 12] = [
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"00000644", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"    ", None),
            (b"", Some(0)),
            (b"12a\0", None),
            (b"128\0", None),
            (b"1\x002\0", None),
            (b"-1\0\0", None),
            (b"\x0017\0", None),
            (b"777777777777", Some(0o777_777_777_777)),
        ];
        for (field, value) in table {
            assert_eq!(octal(field), value, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn base256_fields_are_two_complement_behind_a_marker() {
        assert_eq!(base256(b"\x80\0\0\x01\0"), Some(256));
        assert_eq!(base256(b"\xff\xff\xff\xff"), Some(-1));
        assert_eq!(base256(b"\xff\xff\xff\0"), Some(-256));
        assert_eq!(base256(b"\x81\0\0\0"), None);
        assert_eq!(base256(b"\xc0\0\0\0"), None);
    }

    #[test]
    fn sizes_stay_in_the_range_of_file_offsets() {
        let size = |bytes: &[u8]| {
            Header::parse(&sealed(|block| block[SIZE].copy_from_slice(bytes)))
                .and_then(|header| header.size())
        };
        assert_eq!(size(b"77777777777\0"), Ok(0o77_777_777_777));
        assert_eq!(size(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), Ok(i64::MAX.unsigned_abs()));
        for bad in [
            b"\x80\0\0\0\x80\0\0\0\0\0\0\0",
            b"\x80\x01\0\0\0\0\0\0\0\0\0\0",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            assert_eq!(size(bad), Err(Defect::Number { field: "size" }));
        }
    }

    #[test]
    fn times_may_be_negative_but_have_a_date() {
        let mtime = |bytes: &[u8]| {
            Header::parse(&sealed(|block| block[MTIME].copy_from_slice(bytes)))
                .and_then(|header| header.mtime())
        };
        assert_eq!(mtime(b"00000000017\0"), Ok(15));
        assert_eq!(mtime(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"), Ok(-2));
        assert!(mtime(b"\x80\0\0\0\0\0\0\x3b\0\0\0\0").is_err());
    }

    #[test]
    fn checksum_and_format_must_be_right() {
        let mut wrong = sealed(|_| ());
        wrong[0] ^= 1;
        assert_eq!(Header::parse(&wrong).err(), Some(Defect::Checksum));
        let odd = sealed(|block| block[MAGIC].copy_from_slice(b"ustar_00"));
        assert_eq!(Header::parse(&odd).err(), Some(Defect::Magic));
        for magic in [b"ustar\x0000", b"ustar  \0", b"\0\0\0\0\0\0\0\0"] {
            header(|block| block[MAGIC].copy_from_slice(magic));
        }
        let owner = sealed(|block| block[UID].copy_from_slice(b"  root  "));
        assert_eq!(Header::parse(&owner).err(), Some(Defect::Number { field: "uid" }));
    }

    #[test]
    fn the_prefix_counts_in_posix_headers_only() {
        let prefixed = |magic: &[u8]| {
            header(|block| {
                block[MAGIC].copy_from_slice(magic);
                block[PREFIX][..3].copy_from_slice(b"pre");
            })
            .name()
        };
        assert_eq!(prefixed(b"ustar\x0000").as_deref(), Ok(&b"pre/name"[..]));
        assert_eq!(prefixed(b"ustar  \0").as_deref(), Ok(&b"name"[..]));
        assert_eq!(prefixed(&[0; 8]).as_deref(), Ok(&b"name"[..]));
    }

    #[test]
    fn bytes_behind_a_terminator_are_refused() {
        let hidden = header(|block| block[5..8].copy_from_slice(b"etc"));
        assert_eq!(hidden.name(), Err(PathFault::Zero));
        let hidden = header(|block| block[LINK][1] = b'x');
        assert_eq!(hidden.link(), Err(PathFault::Zero));
    }

    #[test]
    fn modes_lose_the_file_type() {
        let typed = header(|block| block[MODE].copy_from_slice(b"0104755\0"));
        assert_eq!(typed.mode(), Ok(0o4755));
    }
}
