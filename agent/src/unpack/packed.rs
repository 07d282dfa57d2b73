//! Edge: the archive as it arrives, counted, and the decompressor that its first bytes ask for.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

use super::error::{Excess, UnpackError};
use super::header::{BLOCK, Header};
use super::limits::Limits;

/// Size of the read buffer: large enough that system calls do not count, small enough for the stop at a limit to
/// be prompt.
pub(super) const BUFFER: usize = 64 * 1024;

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// How an archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// A bare tar stream.
    Plain,
    /// Gzip, also of several members one after the other, as parallel packers and seekable formats write it.
    Gzip,
    /// Zstandard, also of several frames.
    Zstd,
}

impl Packing {
    fn of(head: &[u8]) -> Self {
        if head.starts_with(GZIP) {
            Self::Gzip
        } else if head.starts_with(ZSTD) {
            Self::Zstd
        } else {
            Self::Plain
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "tar",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// The arriving bytes. Remembers why it failed, because decompressors pass errors on without their cause.
struct Source<'r> {
    archive: &'r mut dyn Read,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    arrived: u64,
    limit: u64,
    failure: Option<UnpackError>,
}

impl<'r> Source<'r> {
    fn new(archive: &'r mut dyn Read, limit: u64) -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Self { archive, buffer, start: 0, end: 0, arrived: 0, limit, failure: None }
    }

    /// The first block, or less where the archive is shorter. Nothing is consumed.
    fn head(&mut self) -> Result<&[u8], UnpackError> {
        while self.end < BLOCK && self.read_more()? > 0 {}
        Ok(&self.buffer[..self.end.min(BLOCK)])
    }

    fn read_more(&mut self) -> Result<usize, UnpackError> {
        let count = loop {
            match self.archive.read(&mut self.buffer[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                answer => break answer.map_err(UnpackError::Read)?,
            }
        };
        self.end += count;
        self.arrived += count as u64;
        if self.arrived > self.limit {
            return Err(UnpackError::TooLarge(Excess::Packed { limit: self.limit }));
        }
        Ok(count)
    }

    /// Bytes that the decompressor has taken.
    fn consumed(&self) -> u64 {
        self.arrived - (self.end - self.start) as u64
    }
}

impl Read for Source<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(into)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Err(error) = self.read_more() {
                self.failure = Some(error);
                return Err(io::Error::other("the archive cannot be read"));
            }
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
    }
}

enum Decoder<'r> {
    Plain(Source<'r>),
    Gzip(Box<MultiGzDecoder<Source<'r>>>),
    Zstd(zstd::Decoder<'static, Source<'r>>),
}

/// The tar stream inside the archive.
pub(super) struct Packed<'r> {
    decoder: Decoder<'r>,
    packing: Packing,
    zstd_window_log_max: u32,
}

impl<'r> Packed<'r> {
    pub(super) fn open(archive: &'r mut dyn Read, limits: &Limits) -> Result<Self, UnpackError> {
        let mut source = Source::new(archive, limits.max_packed_bytes);
        let packing = Packing::of(source.head()?);
        // The range that the library takes; outside of it every archive would fail for a reason nobody finds.
        let zstd_window_log_max = limits.zstd_window_log_max.clamp(10, 31);
        let decoder = match packing {
            Packing::Plain => Decoder::Plain(source),
            Packing::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(source))),
            Packing::Zstd => Decoder::Zstd(zstd_decoder(source, zstd_window_log_max)?),
        };
        Ok(Self { decoder, packing, zstd_window_log_max })
    }

    pub(super) fn packing(&self) -> Packing {
        self.packing
    }

    /// Compressed bytes used up so far.
    pub(super) fn consumed(&self) -> u64 {
        match &self.decoder {
            Decoder::Plain(source) => source.consumed(),
            Decoder::Gzip(decoder) => decoder.get_ref().consumed(),
            Decoder::Zstd(decoder) => decoder.get_ref().consumed(),
        }
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize, UnpackError> {
        let answer = match &mut self.decoder {
            Decoder::Plain(source) => source.read(into),
            Decoder::Gzip(decoder) => decoder.read(into),
            Decoder::Zstd(decoder) => decoder.read(into),
        };
        answer.map_err(|error| self.blame(error))
    }

    /// An error of the source is the source's; every other one is the compressed data's.
    fn blame(&mut self, error: io::Error) -> UnpackError {
        let source = match &mut self.decoder {
            Decoder::Plain(source) => source,
            Decoder::Gzip(decoder) => decoder.get_mut(),
            Decoder::Zstd(decoder) => decoder.get_mut(),
        };
        if let Some(failure) = source.failure.take() {
            return failure;
        }
        // The library has no code for it in its errors, only this text.
        if self.packing == Packing::Zstd && error.to_string().contains("too much memory") {
            return UnpackError::TooLarge(Excess::ZstdWindow { limit: self.zstd_window_log_max });
        }
        UnpackError::Corrupt { packing: self.packing.name(), source: error }
    }
}

fn zstd_decoder(
    source: Source<'_>,
    window_log: u32,
) -> Result<zstd::Decoder<'static, Source<'_>>, UnpackError> {
    let mut decoder = zstd::Decoder::with_buffer(source).map_err(UnpackError::Read)?;
    decoder.window_log_max(window_log).map_err(UnpackError::Read)?;
    Ok(decoder)
}

/// What the first bytes are, if they are no tar header; [`None`] if they are a tar header gone wrong.
pub(super) fn recognise(head: &[u8]) -> Option<&'static str> {
    if Header::claims_tar(head) {
        return None;
    }
    let magics: [(&[u8], &str); 11] = [
        (GZIP, "gzip data packed a second time"),
        (ZSTD, "zstd data packed a second time"),
        (b"\x7fELF", "an ELF program"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PK\x05\x06", "an empty zip archive"),
        (b"BZh", "bzip2 data"),
        (b"\xfd7zXZ\0", "xz data"),
        (b"7z\xbc\xaf", "a 7-Zip archive"),
        (b"%PDF", "a PDF document"),
        (b"MZ", "a Windows program"),
        (b"#!", "a script"),
    ];
    let known = magics.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, what)| *what);
    Some(known.unwrap_or_else(|| recognise_text(head)))
}

fn recognise_text(head: &[u8]) -> &'static str {
    let text = head.trim_ascii_start();
    let starts = |tag: &[u8]| text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag));
    if head.is_empty() {
        "nothing at all"
    } else if starts(b"<!doctype html") || starts(b"<html") {
        "an HTML page"
    } else if starts(b"<") {
        "an XML document"
    } else if starts(b"{") || starts(b"[") {
        "a JSON document"
    } else if head.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
        "text"
    } else {
        "unknown data"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_are_recognised() {
        let table: [(&[u8], &str); 9] = [
            (b"", "nothing at all"),
            (b"\n <!DOCTYPE HTML><p>502", "an HTML page"),
            (b"<?xml version", "an XML document"),
            (b"{\"error\":1}", "a JSON document"),
            (b"\x7fELF\x02", "an ELF program"),
            (b"PK\x03\x04", "a zip archive"),
            (b"\x1f\x8b\x08", "gzip data packed a second time"),
            (b"hello\n", "text"),
            (b"\x01\x02\xff", "unknown data"),
        ];
        for (head, what) in table {
            assert_eq!(recognise(head), Some(what), "{}", head.escape_ascii());
        }
    }

    #[test]
    fn a_broken_tar_header_is_no_stranger() {
        let mut block = [b'a'; BLOCK];
        block[257..262].copy_from_slice(b"ustar");
        assert_eq!(recognise(&block), None);
        assert_eq!(recognise(&block[..261]), Some("text"));
    }

    /// Gives its bytes one by one, then an error if there is one.
    struct Slow<'a>(&'a [u8], Option<io::ErrorKind>);

    impl Read for Slow<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            match (self.0.split_first(), self.1) {
                (Some((first, rest)), _) => {
                    into[0] = *first;
                    self.0 = rest;
                    Ok(1)
                }
                (None, Some(kind)) => Err(kind.into()),
                (None, None) => Ok(0),
            }
        }
    }

    fn drain(archive: &mut dyn Read, limits: &Limits) -> Result<Vec<u8>, UnpackError> {
        let mut packed = Packed::open(archive, limits)?;
        let mut all = Vec::new();
        let mut buffer = [0; 1000];
        loop {
            match packed.read(&mut buffer)? {
                0 => return Ok(all),
                count => all.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn zstd_of(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 1).unwrap()
    }

    #[test]
    fn packing_is_found_even_if_bytes_trickle_in() {
        let packed = zstd_of(b"content");
        assert_eq!(drain(&mut Slow(&packed, None), &Limits::default()).unwrap(), b"content");
        assert_eq!(drain(&mut Slow(b"plain", None), &Limits::default()).unwrap(), b"plain");
    }

    #[test]
    fn a_failing_source_is_not_damaged_data() {
        let packed = zstd_of(&[7; 4000]);
        let cut = &packed[..packed.len() - 2];
        let broken = drain(&mut Slow(cut, Some(io::ErrorKind::ConnectionReset)), &Limits::default());
        assert!(matches!(broken, Err(UnpackError::Read(_))), "{broken:?}");
        let short = drain(&mut Slow(cut, None), &Limits::default());
        assert!(matches!(short, Err(UnpackError::Corrupt { packing: "zstd", .. })), "{short:?}");
    }

    #[test]
    fn the_packed_limit_holds_exactly() {
        let packed = zstd_of(b"content");
        let limits = |max| Limits { max_packed_bytes: max, ..Limits::default() };
        assert!(drain(&mut &packed[..], &limits(packed.len() as u64)).is_ok());
        let over = drain(&mut &packed[..], &limits(packed.len() as u64 - 1));
        assert!(matches!(over, Err(UnpackError::TooLarge(Excess::Packed { .. }))), "{over:?}");
    }
}
