//! Writes archives byte by byte, also those that no program would write.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

pub(crate) const BLOCK: usize = 512;

/// An archive in the making. Nothing is checked.
#[derive(Clone, Default)]
pub(crate) struct Forge(Vec<u8>);

impl Forge {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A header, changed before its checksum is made, and content with padding.
    pub(crate) fn with(
        mut self,
        flag: u8,
        name: &[u8],
        content: &[u8],
        change: impl FnOnce(&mut [u8]),
    ) -> Self {
        self.0.extend(header(flag, name, content.len() as u64, change));
        self.raw(content).padded()
    }

    pub(crate) fn entry(self, flag: u8, name: &[u8], content: &[u8]) -> Self {
        self.with(flag, name, content, |_| ())
    }

    pub(crate) fn file(self, name: &str, content: &str) -> Self {
        self.entry(b'0', name.as_bytes(), content.as_bytes())
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.with(b'5', name.as_bytes(), b"", |header| set_octal(&mut header[100..108], 0o755))
    }

    pub(crate) fn link(self, flag: u8, name: &str, target: &[u8]) -> Self {
        self.with(flag, name.as_bytes(), b"", |header| copy(&mut header[157..257], target))
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.link(b'2', name, target.as_bytes())
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.link(b'1', name, target.as_bytes())
    }

    /// A file that declares another size than it has.
    pub(crate) fn lying(self, name: &str, declared: u64, content: &str) -> Self {
        self.with(b'0', name.as_bytes(), content.as_bytes(), |header| set_size(header, declared))
    }

    pub(crate) fn pax(self, records: &[(&str, &str)]) -> Self {
        self.entry(b'x', b"pax", &pax_records(records))
    }

    pub(crate) fn global(self, records: &[(&str, &str)]) -> Self {
        self.entry(b'g', b"pax_global_header", &pax_records(records))
    }

    /// GNU's extension header for a long name (`L`) or link target (`K`).
    pub(crate) fn gnu_long(self, flag: u8, text: &[u8]) -> Self {
        self.entry(flag, b"././@LongLink", &[text, b"\0"].concat())
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn padded(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    pub(crate) fn zero_blocks(self, count: usize) -> Self {
        self.raw(&vec![0; count * BLOCK])
    }

    /// The archive with its end.
    pub(crate) fn end(self) -> Vec<u8> {
        self.zero_blocks(2).0
    }

    /// The archive as it is.
    pub(crate) fn cut(self) -> Vec<u8> {
        self.0
    }
}

fn header(flag: u8, name: &[u8], size: u64, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut header = vec![0; BLOCK];
    copy(&mut header[..100], name);
    set_octal(&mut header[100..108], 0o644);
    set_octal(&mut header[108..116], 1000);
    set_octal(&mut header[116..124], 1000);
    set_octal(&mut header[124..136], size);
    set_octal(&mut header[136..148], 1_700_000_000);
    header[156] = flag;
    copy(&mut header[257..265], b"ustar\x0000");
    change(&mut header);
    seal(&mut header);
    header
}

/// Writes the checksum that the other bytes of the header have.
pub(crate) fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
    copy(&mut header[148..156], format!("{sum:06o}\0 ").as_bytes());
}

pub(crate) fn set_octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    copy(field, format!("{value:0digits$o}\0").as_bytes());
}

/// Octal where it fits, else GNU's binary form.
pub(crate) fn set_size(header: &mut [u8], size: u64) {
    if size < 1 << 33 {
        return set_octal(&mut header[124..136], size);
    }
    header[124..136].fill(0);
    header[124] = 0x80;
    header[128..136].copy_from_slice(&size.to_be_bytes());
}

pub(crate) fn copy(field: &mut [u8], value: &[u8]) {
    field[..value.len()].copy_from_slice(value);
}

pub(crate) fn pax_records(records: &[(&str, &str)]) -> Vec<u8> {
    records.iter().flat_map(|(key, value)| pax_record(key.as_bytes(), value.as_bytes())).collect()
}

pub(crate) fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let length = (body..body + 9).find(|length| length.to_string().len() + body == *length).unwrap();
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(data: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}
