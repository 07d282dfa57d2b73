//! Writes the archive and hashes it on the way (shell).
//!
//! An uncompressed tar in the GNU dialect: names that do not fit a header go before it as they are. The
//! alternative, PAX, wants text in UTF-8, and file names are bytes. Owners are always 0 and unnamed, so that the
//! archive says nothing about who packed it.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write};

use kiln_protocol::Digest;
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

use super::error::PackError;
use super::walk::{Entry, Kind, to_path};

/// Tar's unit: everything is padded to it.
const BLOCK: usize = 512;
const BUFFER: usize = 128 * 1024;
/// Headers are small; below this they are gathered.
const WRITE_BUFFER: usize = 64 * 1024;
/// The name that GNU tar gives to the pseudo entry with a long name or link target.
const LONG_LINK: &[u8] = b"././@LongLink";

/// A tar archive being written.
pub(super) struct Archive<'w, W: Write> {
    out: BufWriter<Hashing<'w, W>>,
    buffer: Vec<u8>,
}

struct Hashing<'w, W> {
    out: &'w mut W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.out.write(data)?;
        self.hash.update(&data[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<'w, W: Write> Archive<'w, W> {
    pub(super) fn new(out: &'w mut W) -> Self {
        let hashing = Hashing { out, hash: Sha256::new(), bytes: 0 };
        Self { out: BufWriter::with_capacity(WRITE_BUFFER, hashing), buffer: vec![0; BUFFER] }
    }

    /// Appends an entry; one that is skipped leaves no trace.
    pub(super) fn append(&mut self, entry: Entry) -> Result<(), PackError> {
        let Some(record) = Record::of(&entry) else { return Ok(()) };
        self.write(&record.bytes())?;
        match entry.kind {
            Kind::File { content, size } => self.copy(content, size, &entry.path),
            _ => Ok(()),
        }
    }

    /// Ends the archive; its digest and length.
    pub(super) fn finish(mut self) -> Result<(Digest, u64), PackError> {
        self.write(&[0; 2 * BLOCK])?;
        self.out.flush().map_err(|source| PackError::Write { source })?;
        let Hashing { hash, bytes, .. } = self.out.get_mut();
        let hash = std::mem::take(hash).finalize();
        Ok((Digest::from_sha256(hash.into()), *bytes))
    }

    fn write(&mut self, data: &[u8]) -> Result<(), PackError> {
        self.out.write_all(data).map_err(|source| PackError::Write { source })
    }

    /// Copies exactly the size that the header promised.
    fn copy(&mut self, mut content: File, size: u64, path: &[u8]) -> Result<(), PackError> {
        let changed = |what| PackError::Changed { path: to_path(path), what };
        let refused = |source| PackError::Read { path: to_path(path), source };
        let mut left = size;
        // One round more than the size needs, to see that the file ends there.
        loop {
            let length = read(&mut content, &mut self.buffer).map_err(refused)?;
            if length == 0 {
                break;
            }
            left = left.checked_sub(length as u64).ok_or_else(|| changed("grew"))?;
            self.out.write_all(&self.buffer[..length]).map_err(|source| PackError::Write { source })?;
        }
        if left > 0 {
            return Err(changed("shrank"));
        }
        self.write(padding(size))
    }
}

fn read(content: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match content.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn padding(length: u64) -> &'static [u8] {
    let used = usize::try_from(length % BLOCK as u64).unwrap_or_default();
    &[0; BLOCK][..(BLOCK - used) % BLOCK]
}

/// The fields of an entry as tar has them.
struct Record<'a> {
    name: Vec<u8>,
    target: &'a [u8],
    entry_type: EntryType,
    size: u64,
    mode: u32,
    mtime: i64,
}

impl<'a> Record<'a> {
    fn of(entry: &'a Entry) -> Option<Self> {
        let mut name = entry.path.clone();
        let (entry_type, size, target): (_, _, &[u8]) = match &entry.kind {
            Kind::Directory => {
                name.push(b'/');
                (EntryType::Directory, 0, &[])
            }
            Kind::File { size, .. } => (EntryType::Regular, *size, &[]),
            Kind::Symlink(target) => (EntryType::Symlink, 0, target),
            Kind::Skipped(_) => return None,
        };
        Some(Self { name, target, entry_type, size, mode: entry.mode, mtime: entry.mtime })
    }

    /// All blocks that come before the content.
    fn bytes(&self) -> Vec<u8> {
        let mut header = self.header();
        let mut bytes = Vec::with_capacity(BLOCK);
        if !fit(&mut header.as_old_mut().linkname, self.target) {
            bytes.extend(long(EntryType::GNULongLink, self.target));
        }
        if !fit(&mut header.as_old_mut().name, &self.name) {
            bytes.extend(long(EntryType::GNULongName, &self.name));
        }
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes
    }

    fn header(&self) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(self.entry_type);
        header.set_mode(self.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(self.size);
        set_mtime(&mut header, self.mtime);
        header
    }
}

/// The time field. Before 1970 it is a negative binary number, which the library's setter cannot express.
fn set_mtime(header: &mut Header, mtime: i64) {
    if let Ok(mtime) = u64::try_from(mtime) {
        header.set_mtime(mtime);
    } else {
        let field = &mut header.as_old_mut().mtime;
        field.fill(0xFF);
        field[4..].copy_from_slice(&mtime.to_be_bytes());
    }
}

/// Fills a name field as far as it goes; whether all of the name fits.
fn fit(field: &mut [u8; 100], name: &[u8]) -> bool {
    let length = name.len().min(field.len());
    field[..length].copy_from_slice(&name[..length]);
    length == name.len()
}

/// The pseudo entry with a long name.
fn long(entry_type: EntryType, name: &[u8]) -> Vec<u8> {
    // The name ends with a zero byte, which counts.
    let size = name.len() as u64 + 1;
    let record = Record { name: LONG_LINK.to_vec(), target: &[], entry_type, size, mode: 0o644, mtime: 0 };
    let mut bytes = record.bytes();
    bytes.extend_from_slice(name);
    bytes.push(0);
    bytes.extend_from_slice(padding(size));
    bytes
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom};
    use std::process::Command;

    use super::*;

    fn file_entry(content: &[u8], size: u64) -> Entry {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        Entry { path: b"dir/name".to_vec(), mode: 0o644, mtime: 0, kind: Kind::File { content: file, size } }
    }

    #[test]
    fn a_file_that_changes_its_size_is_an_error() {
        for (length, size, what) in [(10, 9, "grew"), (10, 11, "shrank"), (10, 0, "grew"), (0, 1, "shrank")] {
            let mut out = Vec::new();
            let error = Archive::new(&mut out).append(file_entry(&vec![1; length], size)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "\"dir/name\" {what} while the context was read; stop what writes to it or add it to .dockerignore"
                )
            );
        }
    }

    #[test]
    fn contents_are_padded_to_blocks_and_hashed() {
        for length in [0, 1, 511, 512, 513, BUFFER - 1, BUFFER, BUFFER + 1] {
            let mut out = Vec::new();
            let mut archive = Archive::new(&mut out);
            archive.append(file_entry(&vec![b'x'; length], length as u64)).unwrap();
            let (digest, bytes) = archive.finish().unwrap();
            assert_eq!(bytes, out.len() as u64);
            assert_eq!(out.len(), BLOCK + length.div_ceil(BLOCK) * BLOCK + 2 * BLOCK);
            assert_eq!(digest, Digest::from_sha256(Sha256::digest(&out).into()));
        }
    }

    /// Remembers the longest piece that it was given.
    struct Longest(usize);

    impl Write for Longest {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0 = self.0.max(data.len());
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_file_is_held_in_memory() {
        let size = 50 * BUFFER as u64;
        let content = tempfile::tempfile().unwrap();
        content.set_len(size).unwrap();
        let mut longest = Longest(0);
        let mut archive = Archive::new(&mut longest);
        let kind = Kind::File { content, size };
        archive.append(Entry { path: b"a".to_vec(), mode: 0, mtime: 0, kind }).unwrap();
        archive.finish().unwrap();
        assert!(longest.0 <= BUFFER, "{}", longest.0);
    }

    #[test]
    fn a_destination_that_fails_is_named() {
        let mut full = &mut [0_u8; 600][..];
        let mut archive = Archive::new(&mut full);
        archive.append(file_entry(b"abc", 3)).unwrap();
        let error = archive.finish().unwrap_err();
        assert!(matches!(error, PackError::Write { .. }), "{error}");
    }

    #[test]
    fn gnu_tar_reads_sizes_and_times_beyond_the_octal_fields() {
        // Only the header is written; the content of 9 GiB is a hole.
        const SIZE: u64 = 9 << 30;
        for (mtime, date) in
            [(0, "1970-01-01 00:00:00"), (-86_401, "1969-12-30 23:59:59"), (1 << 33, "2242-03-16 12:56:32")]
        {
            let record = Record {
                name: b"big".to_vec(),
                target: &[],
                entry_type: EntryType::Regular,
                size: SIZE,
                mode: 0o600,
                mtime,
            };
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&record.bytes()).unwrap();
            file.as_file_mut().seek(SeekFrom::Current(SIZE.cast_signed())).unwrap();
            file.write_all(&[0; 2 * BLOCK]).unwrap();
            let mut tar = Command::new("tar");
            tar.env("TZ", "UTC0").args(["--list", "--verbose", "--full-time", "--numeric-owner", "--file"]);
            let listed = tar.arg(file.path()).output().unwrap();
            assert!(listed.status.success(), "{listed:?}");
            assert_eq!(
                String::from_utf8(listed.stdout).unwrap(),
                format!("-rw------- 0/0      {SIZE} {date} big\n")
            );
        }
    }
}
