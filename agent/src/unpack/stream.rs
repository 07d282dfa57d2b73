//! Shell: the tar stream in blocks and chunks, held to the limits on what comes out of the archive.

use std::io::Read;

use super::error::{Defect, Excess, Name, UnpackError};
use super::header::BLOCK;
use super::limits::Limits;
use super::packed::{BUFFER, Packed, Packing};

/// One block, or what was left of the stream.
pub(super) struct Block {
    bytes: [u8; BLOCK],
    length: usize,
}

impl Block {
    /// The block, unless the stream ended in or before it.
    pub(super) fn whole(&self) -> Option<&[u8; BLOCK]> {
        (self.length == BLOCK).then_some(&self.bytes)
    }

    /// What there was of it.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Whether it is whole and one of those that end an archive.
    pub(super) fn is_zero(&self) -> bool {
        self.whole().is_some_and(|block| block.iter().all(|&byte| byte == 0))
    }
}

/// The tar stream. It never hands out a byte beyond a limit.
pub(super) struct TarStream<'r> {
    packed: Packed<'r>,
    position: u64,
    limits: Limits,
}

impl<'r> TarStream<'r> {
    pub(super) fn open(archive: &'r mut dyn Read, limits: &Limits) -> Result<Self, UnpackError> {
        Ok(Self { packed: Packed::open(archive, limits)?, position: 0, limits: limits.clone() })
    }

    /// Bytes read of the unpacked stream.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn packed_bytes(&self) -> u64 {
        self.packed.consumed()
    }

    pub(super) fn packing(&self) -> Packing {
        self.packed.packing()
    }

    pub(super) fn block(&mut self) -> Result<Block, UnpackError> {
        let mut bytes = [0; BLOCK];
        let length = self.fill(&mut bytes)?;
        Ok(Block { bytes, length })
    }

    /// Refuses what the archive only announces, before a byte of it is read or written.
    pub(super) fn expect(&self, path: &[u8], bytes: u64) -> Result<(), UnpackError> {
        let limit = self.limits.max_unpacked_bytes;
        if bytes > limit.saturating_sub(self.position) {
            return Err(UnpackError::TooLarge(Excess::Declared { path: Name::of(path), bytes, limit }));
        }
        Ok(())
    }

    /// Exactly `count` bytes; the caller has checked that they are few.
    pub(super) fn exactly(&mut self, count: usize) -> Result<Vec<u8>, UnpackError> {
        let mut bytes = vec![0; count];
        if self.fill(&mut bytes)? < count { Err(self.truncated()) } else { Ok(bytes) }
    }

    /// Reads over `count` bytes.
    pub(super) fn skip(&mut self, mut count: u64) -> Result<(), UnpackError> {
        let mut buffer = vec![0; shorter(BUFFER, count)];
        while count > 0 {
            let wanted = shorter(buffer.len(), count);
            count -= self.some(&mut buffer[..wanted])? as u64;
        }
        Ok(())
    }

    /// At least one byte: the end of the stream is an error here.
    fn some(&mut self, into: &mut [u8]) -> Result<usize, UnpackError> {
        match self.read(into)? {
            0 => Err(self.truncated()),
            count => Ok(count),
        }
    }

    fn fill(&mut self, into: &mut [u8]) -> Result<usize, UnpackError> {
        let mut done = 0;
        while done < into.len() {
            match self.read(&mut into[done..])? {
                0 => break,
                count => done += count,
            }
        }
        Ok(done)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize, UnpackError> {
        let count = self.packed.read(into)?;
        self.position += count as u64;
        self.check_limits()?;
        Ok(count)
    }

    fn check_limits(&self) -> Result<(), UnpackError> {
        let Limits { max_unpacked_bytes, max_ratio, ratio_floor_bytes, .. } = self.limits;
        if self.position > max_unpacked_bytes {
            return Err(UnpackError::TooLarge(Excess::Unpacked { limit: max_unpacked_bytes }));
        }
        let is_bomb = self.packing() != Packing::Plain
            && self.position > ratio_floor_bytes
            && self.position > self.packed_bytes().saturating_mul(max_ratio);
        if is_bomb {
            return Err(UnpackError::TooLarge(Excess::Ratio { limit: max_ratio }));
        }
        Ok(())
    }

    fn truncated(&self) -> UnpackError {
        UnpackError::Malformed { offset: self.position, defect: Defect::Truncated }
    }
}

/// The content of one entry, to be read or left.
pub struct Body<'a, 'r> {
    stream: &'a mut TarStream<'r>,
    left: u64,
}

impl<'a, 'r> Body<'a, 'r> {
    pub(super) fn new(stream: &'a mut TarStream<'r>, size: u64) -> Self {
        Self { stream, left: size }
    }

    /// The next bytes, 0 at the end (or for an empty `into`). A stream that ends earlier is an error.
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize, UnpackError> {
        let wanted = shorter(into.len(), self.left);
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.stream.some(&mut into[..wanted])?;
        self.left -= count as u64;
        Ok(count)
    }

    /// Bytes not read yet.
    pub fn left(&self) -> u64 {
        self.left
    }
}

fn shorter(length: usize, count: u64) -> usize {
    usize::try_from(count).map_or(length, |count| count.min(length))
}
