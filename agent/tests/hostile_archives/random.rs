//! Random archives and random damage.

use std::fmt;
use std::io;

use kiln_agent::unpack::{Limits, UnpackError};
use proptest::prelude::*;

use super::arena::Arena;
use super::corpus;
use super::forge::{BLOCK, gzip, seal, zstd};
use super::oracle::{difference, listed};

/// One entry for the `tar` crate to write.
#[derive(Debug, Clone)]
enum Member {
    File { name: String, content: Vec<u8>, mode: u32 },
    PaxFile { name: String, comment: String, seconds: i32 },
    Directory { at: usize },
    Symlink { name: String, target: String },
    HardLink { name: String, to: usize },
}

/// Directories that members lie in; some names need an extension header.
fn directory(at: usize) -> String {
    let long = "long".repeat(30);
    ["", "d/", "d/e/", "sp ace/", "ünï/", &format!("{long}/"), &format!("{long}/{long}/")][at % 7].to_owned()
}

fn name() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![Just("leaf".to_owned()), "[a-z .\\\\\"\t-]{1,12}", "[a-zé]{90,120}"];
    (0..7_usize, leaf).prop_map(|(at, leaf)| format!("{}{leaf}", directory(at)))
}

fn member() -> impl Strategy<Value = Member> {
    let content = proptest::collection::vec(any::<u8>(), 0..1500);
    let target = "[a-z/. >-]{1,150}";
    prop_oneof![
        (name(), content, 0..0o10000_u32).prop_map(|(name, content, mode)| Member::File {
            name,
            content,
            mode
        }),
        (name(), "[ -~\n]{0,30}", any::<i32>()).prop_map(|(name, comment, seconds)| Member::PaxFile {
            name,
            comment,
            seconds
        }),
        (1..7_usize).prop_map(|at| Member::Directory { at }),
        (name(), target).prop_map(|(name, target)| Member::Symlink { name, target }),
        (name(), any::<usize>()).prop_map(|(name, to)| Member::HardLink { name, to }),
    ]
}

/// Writes the members; the index keeps names apart, so that no file stands where a directory must.
fn write(members: &[Member]) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut files = vec![];
    for (index, member) in members.iter().enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(1_600_000_000);
        match member {
            Member::File { name, content, mode } => {
                header.set_mode(*mode);
                header.set_size(content.len() as u64);
                files.push(format!("{name}{index}"));
                builder.append_data(&mut header, format!("{name}{index}"), &content[..])?;
            }
            Member::PaxFile { name, comment, seconds } => {
                write_pax(&mut builder, &format!("{name}{index}"), comment, *seconds)?;
            }
            Member::Directory { at } => {
                header.set_entry_type(tar::EntryType::Directory);
                builder.append_data(&mut header, directory(*at), io::empty())?;
            }
            Member::Symlink { name, target } => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, format!("{name}{index}"), target)?;
            }
            Member::HardLink { name, to } if !files.is_empty() => {
                header.set_entry_type(tar::EntryType::Link);
                builder.append_link(&mut header, format!("{name}{index}"), &files[to % files.len()])?;
            }
            Member::HardLink { .. } => {}
        }
    }
    builder.into_inner()
}

/// A file whose name and time are in a PAX header only.
fn write_pax(builder: &mut tar::Builder<Vec<u8>>, name: &str, comment: &str, seconds: i32) -> io::Result<()> {
    let time = format!("{seconds}.25");
    builder.append_pax_extensions([
        ("path", name.as_bytes()),
        ("comment", comment.as_bytes()),
        ("mtime", time.as_bytes()),
        ("size", b"3"),
    ])?;
    let mut header = tar::Header::new_ustar();
    header.set_path("see-pax")?;
    header.set_mode(0o600);
    header.set_size(3);
    header.set_cksum();
    builder.append(&header, &b"abc"[..])
}

/// A small change to an archive.
#[derive(Debug, Clone)]
enum Damage {
    /// One byte anywhere.
    Byte {
        at: usize,
        value: u8,
    },
    /// One byte of a block, which then gets the checksum of a header, so that the change is looked at.
    Header {
        block: usize,
        at: usize,
        value: u8,
    },
    /// A byte of a header replaced by one that matters.
    Type {
        block: usize,
        value: u8,
    },
    /// A block in the place of another.
    Copy {
        from: usize,
        to: usize,
    },
    Cut {
        at: usize,
    },
}

fn damage() -> impl Strategy<Value = Damage> {
    let meaningful =
        prop_oneof![any::<u8>(), proptest::sample::select(b"\0 /.0123456789=\n\x7f\x80\xff".to_vec()),];
    prop_oneof![
        2 => (any::<usize>(), meaningful.clone()).prop_map(|(at, value)| Damage::Byte { at, value }),
        6 => (any::<usize>(), 0..BLOCK, meaningful).prop_map(|(block, at, value)| Damage::Header { block, at, value }),
        3 => (any::<usize>(), proptest::sample::select(b"\x000123567LKxgSDZ".to_vec()))
            .prop_map(|(block, value)| Damage::Type { block, value }),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(from, to)| Damage::Copy { from, to }),
        1 => any::<usize>().prop_map(|at| Damage::Cut { at }),
    ]
}

fn apply(archive: &mut Vec<u8>, damage: &Damage) {
    let blocks = archive.len() / BLOCK;
    if blocks == 0 {
        return;
    }
    let block = |at: &usize| at % blocks * BLOCK..(at % blocks + 1) * BLOCK;
    match damage {
        Damage::Byte { at, value } => {
            let length = archive.len();
            archive[at % length] = *value;
        }
        Damage::Header { block: index, at, value } => {
            archive[block(index)][*at] = *value;
            seal(&mut archive[block(index)]);
        }
        Damage::Type { block: index, value } => {
            archive[block(index)][156] = *value;
            seal(&mut archive[block(index)]);
        }
        Damage::Copy { from, to } => archive.copy_within(block(from), block(to).start),
        Damage::Cut { at } => archive.truncate(at % archive.len()),
    }
}

/// An archive that a failed test can print: its bytes without the zeros.
#[derive(Clone)]
struct Archive(Vec<u8>);

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blocks =
            self.0.chunks(BLOCK).map(|block| block.split(|&byte| byte == 0).filter(|part| !part.is_empty()));
        f.debug_list()
            .entries(blocks.map(|parts| parts.collect::<Vec<_>>().join(&0).escape_ascii().to_string()))
            .finish()
    }
}

fn valid_archive() -> impl Strategy<Value = Archive> {
    let corpus: Vec<Archive> = corpus::accepted().into_iter().map(|(_, archive)| Archive(archive)).collect();
    prop_oneof![
        3 => proptest::sample::select(corpus),
        1 => proptest::collection::vec(member(), 1..6).prop_map(|members| Archive(write(&members).unwrap())),
    ]
}

fn small_limits() -> Limits {
    Limits { max_unpacked_bytes: 1 << 20, max_entries: 50, ..Limits::default() }
}

/// Unpacks and lists; fails if the two disagree, something outside changes or a limit does not hold.
fn exercise(arena: &Arena, archive: &[u8]) -> Result<(), &'static str> {
    let limits = small_limits();
    let unpacked = arena.unpack(archive, &limits).map(drop).map_err(|error| error.code());
    let listed = listed(archive, &limits).map(drop).map_err(|error| error.code());
    arena.assert_untouched("a random archive");
    assert!(arena.bytes_on_disk() <= limits.max_unpacked_bytes + (1 << 20));
    arena.clear();
    assert_eq!(unpacked, listed);
    unpacked
}

fn config() -> ProptestConfig {
    // A failure prints the archive's damage; it becomes a case of the corpus instead of a file of seeds.
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn archives_of_the_tar_crate_are_accepted_and_mean_the_same(
        members in proptest::collection::vec(member(), 0..10),
    ) {
        let archive = write(&members).unwrap();
        let ours = listed(&archive, &Limits::default()).map_err(|error| TestCaseError::fail(error.to_string()))?;
        let different = difference(&archive, &ours);
        prop_assert!(different.is_none(), "{}", different.unwrap_or_default());
        prop_assert_eq!(exercise(&Arena::new(), &archive), Ok(()));
    }

    #[test]
    fn damaged_archives_are_refused_or_mean_the_same(
        archive in valid_archive(),
        damages in proptest::collection::vec(damage(), 1..4),
    ) {
        let Archive(mut archive) = archive;
        for damage in &damages {
            apply(&mut archive, damage);
        }
        if exercise(&Arena::new(), &archive).is_ok() {
            let ours = listed(&archive, &small_limits()).map_err(|error: UnpackError| TestCaseError::fail(error.to_string()))?;
            let different = difference(&archive, &ours);
            prop_assert!(different.is_none(), "{}", different.unwrap_or_default());
        }
    }

    #[test]
    fn damaged_packed_archives_harm_nobody(
        archive in valid_archive(),
        is_gzip in any::<bool>(),
        damages in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4),
    ) {
        let mut packed = if is_gzip { gzip(&archive.0) } else { zstd(&archive.0) };
        for (at, value) in damages {
            let length = packed.len();
            packed[at % length] = value;
        }
        // The verdict may be either; what counts is that it comes and that nothing else happens.
        let _ = exercise(&Arena::new(), &packed);
    }

    #[test]
    fn noise_harms_nobody(noise in proptest::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(exercise(&Arena::new(), &noise).is_err());
    }
}
