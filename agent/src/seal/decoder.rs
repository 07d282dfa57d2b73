//! Reads layers as the plain tar archives that they contain (shell).

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

use super::manifest::Compression;

/// Largest zstd window (2^27 bytes = 128 MiB), which is what decoders accept by default.
const ZSTD_WINDOW_LOG: u32 = 27;

/// The plain content. Fails on bytes that are cut off or followed by others.
pub(crate) fn decoder<'a>(
    compression: Compression,
    input: impl BufRead + 'a,
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    })
}
