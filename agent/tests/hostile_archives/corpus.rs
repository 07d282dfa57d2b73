//! Archives that attack, and archives that only look odd.

use std::path::Path;

use super::forge::{BLOCK, Forge, copy, gzip, pax_record, pax_records, set_octal, set_size, zstd};

/// What it is, and the archive.
pub(crate) type Case = (&'static str, Vec<u8>);

fn one(flag: u8, name: &str) -> Vec<u8> {
    Forge::new().entry(flag, name.as_bytes(), b"").end()
}

fn changed(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    Forge::new().with(b'0', b"f", b"", change).end()
}

fn pax_file(records: &[(&str, &str)]) -> Vec<u8> {
    Forge::new().pax(records).file("f", "").end()
}

pub(crate) fn unsafe_paths(outside: &Path) -> Vec<Case> {
    let absolute = outside.join("evil");
    let absolute = absolute.to_str().unwrap();
    let long = "d/".repeat(2500);
    let deep = "d/".repeat(100_000);
    vec![
        ("parent", one(b'0', "../canary/evil")),
        ("parent inside", one(b'0', "a/../../canary/evil")),
        ("parent that stays inside", one(b'0', "a/../b")),
        ("parent last", one(b'5', "a/..")),
        ("parent alone", one(b'5', "..")),
        ("parent behind dot", one(b'0', "./../canary/evil")),
        ("absolute", pax_file(&[("path", absolute)])),
        ("absolute root", one(b'5', "/")),
        ("absolute by two slashes", one(b'0', "//canary/evil")),
        ("absolute by GNU name", Forge::new().gnu_long(b'L', absolute.as_bytes()).file("f", "").end()),
        ("parent by GNU name", Forge::new().gnu_long(b'L', b"../canary/evil").file("f", "").end()),
        ("parent by PAX", pax_file(&[("path", "x/../../canary/evil")])),
        ("parent by prefix", changed(|header| copy(&mut header[345..500], b"../canary"))),
        ("absolute by prefix", changed(|header| copy(&mut header[345..500], b"/tmp"))),
        ("name behind a zero byte", Forge::new().entry(b'0', b"ok\0/../../evil", b"").end()),
        ("zero byte in PAX path", pax_file(&[("path", "ok\0/../evil")])),
        ("zero byte in GNU name", Forge::new().gnu_long(b'L', b"ok\0/../evil").file("f", "").end()),
        ("empty name", one(b'0', "")),
        ("empty PAX path", pax_file(&[("path", "")])),
        ("empty GNU name", Forge::new().gnu_long(b'L', b"").file("f", "").end()),
        ("component of 300 bytes", pax_file(&[("path", &"c".repeat(300))])),
        ("path of 5,000 bytes by PAX", pax_file(&[("path", &long)])),
        ("path of 5,000 bytes by GNU", Forge::new().gnu_long(b'L', long.as_bytes()).file("f", "").end()),
        ("100,000 directories deep", pax_file(&[("path", &deep)])),
        ("129 directories deep", pax_file(&[("path", &"d/".repeat(129))])),
        ("root as a file", one(b'0', ".")),
        ("root as a symlink", Forge::new().symlink("./", "/").end()),
    ]
}

pub(crate) fn unsafe_links(outside: &Path) -> Vec<Case> {
    let canary = outside.to_str().unwrap();
    let victim = format!("{canary}/victim");
    let link = |name: &str| Forge::new().symlink(name, canary);
    vec![
        ("file through a symlink", link("s").file("s/evil", "x").end()),
        ("victim through a symlink", link("s").file("s/victim", "x").end()),
        ("file through a relative symlink", Forge::new().symlink("s", "../canary").file("s/evil", "x").end()),
        (
            "file through a link to a sibling",
            Forge::new().directory("d").symlink("s", "d").file("s/f", "").end(),
        ),
        ("directory through a symlink", link("s").directory("s/sub").end()),
        ("symlink through a symlink", link("s").symlink("s/evil", "/").end()),
        ("deep below a symlink", link("d/s").file("d/s/sub/evil", "x").end()),
        ("chain of symlinks", link("a").symlink("b", "a").file("b/evil", "x").end()),
        ("loop of symlinks", Forge::new().symlink("a", "b").symlink("b", "a").file("a/evil", "x").end()),
        ("symlink spelled with dots", link("./d/./s").file("d//s/evil", "x").end()),
        (
            "symlink named by PAX",
            Forge::new()
                .pax(&[("path", "s"), ("linkpath", canary)])
                .symlink("x", "y")
                .file("s/evil", "x")
                .end(),
        ),
        ("directory after symlink", link("s").directory("s").end()),
        ("directory after symlink, old style", link("s").file("s/", "").end()),
        (
            "symlink after directory",
            Forge::new().directory("d").symlink("d", canary).file("d/evil", "x").end(),
        ),
        (
            "symlink after file inside",
            Forge::new().file("d/f", "").symlink("d", canary).file("d/g", "").end(),
        ),
        ("hard link to absolute path", Forge::new().hard_link("h", &victim).file("h", "x").end()),
        ("hard link to parent", Forge::new().hard_link("h", "../canary/victim").end()),
        (
            "hard link to parent by GNU name",
            Forge::new().gnu_long(b'K', b"../canary/victim").hard_link("h", "f").end(),
        ),
        (
            "hard link to parent by PAX",
            Forge::new().file("f", "").pax(&[("linkpath", "../canary/victim")]).hard_link("h", "f").end(),
        ),
        ("hard link through a symlink", link("s").hard_link("h", "s/victim").end()),
        ("hard link to a symlink", Forge::new().symlink("s", &victim).hard_link("h", "s").end()),
        (
            "hard link to a replaced file",
            Forge::new().file("f", "").symlink("f", &victim).hard_link("h", "f").end(),
        ),
        ("hard link to a directory", Forge::new().directory("d").hard_link("h", "d").end()),
        ("hard link to nothing", Forge::new().hard_link("h", "later").file("later", "").end()),
        ("hard link to itself", Forge::new().hard_link("h", "h").end()),
        ("hard link without target", Forge::new().file("f", "").hard_link("h", "").end()),
        (
            "hard link below a symlink",
            Forge::new().file("f", "").symlink("s", canary).hard_link("s/h", "f").end(),
        ),
        ("symlink without target", Forge::new().symlink("s", "").end()),
        ("symlink with an empty PAX target", Forge::new().pax(&[("linkpath", "")]).symlink("s", "x").end()),
        ("symlink target behind a zero byte", Forge::new().link(b'2', "s", b"ok\0/etc").end()),
        ("symlink target of 5,000 bytes", Forge::new().gnu_long(b'K', &[b't'; 5000]).symlink("s", "x").end()),
    ]
}

pub(crate) fn forbidden_types() -> Vec<Case> {
    let sparse = |records: &[(&str, &str)]| Forge::new().pax(records).file("f", "").end();
    vec![
        ("character device", one(b'3', "null")),
        ("block device", one(b'4', "sda")),
        ("FIFO", one(b'6', "fifo")),
        ("contiguous file", one(b'7', "f")),
        ("socket", one(b's', "socket")),
        ("GNU sparse file", one(b'S', "f")),
        (
            "GNU sparse file of 8 EiB",
            Forge::new().with(b'S', b"f", b"", |h| set_size(h, i64::MAX as u64)).end(),
        ),
        ("PAX sparse file 0.1", sparse(&[("GNU.sparse.map", "0,1"), ("GNU.sparse.size", "9")])),
        ("PAX sparse file 1.0", sparse(&[("GNU.sparse.major", "1"), ("GNU.sparse.name", "../evil")])),
        ("star sparse file", sparse(&[("SCHILY.realsize", "9")])),
        ("directory dump", one(b'D', "d")),
        ("multi-volume part", one(b'M', "f")),
        ("volume label", one(b'V', "v")),
        ("old GNU names", one(b'N', "n")),
        ("Solaris extended header", one(b'X', "x")),
        ("unknown type", one(b'Z', "z")),
        ("type beyond ASCII", one(0xff, "z")),
    ]
}

pub(crate) fn malformed() -> Vec<Case> {
    let mut cases = malformed_headers();
    cases.extend(malformed_extensions());
    cases.extend(malformed_structure());
    cases.extend(damaged_packing());
    cases
}

fn malformed_headers() -> Vec<Case> {
    let mut unsealed = Forge::new().file("f", "").end();
    unsealed[0] ^= 1;
    let late = [Forge::new().file("ok", "x").cut(), unsealed.clone()].concat();
    vec![
        ("wrong checksum", unsealed),
        ("wrong checksum in the second header", late),
        ("unknown magic", changed(|header| copy(&mut header[257..265], b"ustarxxx"))),
        ("size with letters", changed(|header| copy(&mut header[124..136], b"0000000000x"))),
        ("size of spaces", changed(|header| header[124..136].fill(b' '))),
        ("negative size", changed(|header| header[124..136].fill(0xff))),
        ("size beyond 63 bits", changed(|header| set_size(header, 1 << 63))),
        (
            "size beyond 64 bits",
            changed(|header| copy(&mut header[124..136], b"\x80\x01\0\0\0\0\0\0\0\0\0\0")),
        ),
        ("mode with letters", changed(|header| copy(&mut header[100..108], b"rwxr-xr-"))),
        (
            "mtime in the year 10000",
            changed(|header| copy(&mut header[136..148], b"\x80\0\0\0\0\0\0\x3b\0\0\0\0")),
        ),
        ("owner with letters", changed(|header| copy(&mut header[108..116], b"root\0\0\0\0"))),
        ("directory with content", Forge::new().entry(b'5', b"d", b"x").end()),
        ("old-style directory with content", Forge::new().entry(b'0', b"d/", b"x").end()),
        ("symlink with content", Forge::new().with(b'2', b"s", b"x", |h| h[157] = b't').end()),
        (
            "hard link with content",
            Forge::new().file("t", "").with(b'1', b"h", b"x", |h| h[157] = b't').end(),
        ),
    ]
}

fn malformed_extensions() -> Vec<Case> {
    let raw = |data: &[u8]| Forge::new().entry(b'x', b"pax", data).file("f", "").end();
    let two = [("path", "a")];
    let globals = (0..17).fold(Forge::new(), |forge, _| forge.global(&[("comment", "c")]));
    vec![
        ("two PAX headers", Forge::new().pax(&two).pax(&two).file("f", "").end()),
        ("two GNU names", Forge::new().gnu_long(b'L', b"a").gnu_long(b'L', b"b").file("f", "").end()),
        ("two GNU targets", Forge::new().gnu_long(b'K', b"a").gnu_long(b'K', b"b").symlink("f", "x").end()),
        ("GNU name, then PAX path", Forge::new().gnu_long(b'L', b"a").pax(&two).file("f", "").end()),
        ("PAX path, then GNU name", Forge::new().pax(&two).gnu_long(b'L', b"a").file("f", "").end()),
        (
            "PAX size, then GNU name",
            Forge::new().pax(&[("size", "0")]).gnu_long(b'L', b"a").file("f", "").end(),
        ),
        ("PAX header, then global", Forge::new().pax(&two).global(&[("comment", "c")]).file("f", "").end()),
        ("global path", Forge::new().global(&[("path", "../evil")]).file("f", "").end()),
        ("global size", Forge::new().global(&[("size", "9")]).file("f", "").end()),
        ("global sparse map", Forge::new().global(&[("GNU.sparse.map", "0,1")]).file("f", "").end()),
        ("17 global headers", globals.file("f", "").end()),
        ("PAX header at the end", Forge::new().file("f", "").pax(&two).end()),
        ("GNU name at the end", Forge::new().gnu_long(b'L', b"a").end()),
        (
            "GNU name without its zero byte",
            Forge::new().entry(b'L', b"././@LongLink", b"name").file("f", "").end(),
        ),
        (
            "GNU target without its zero byte",
            Forge::new().entry(b'K', b"././@LongLink", b"to").symlink("s", "x").end(),
        ),
        ("GNU target for a file", Forge::new().gnu_long(b'K', b"a").file("f", "").end()),
        ("PAX target for a directory", Forge::new().pax(&[("linkpath", "a")]).directory("d").end()),
        ("empty PAX header", raw(b"")),
        ("PAX length too long", raw(b"99 path=a\n")),
        ("PAX length too short", raw(b"5 path=a\n")),
        ("PAX length of 20 digits", raw(b"99999999999999999999 path=a\n")),
        ("PAX length with a sign", raw(b"+10 path=a\n")),
        ("PAX record without newline", raw(b"10 path=ab")),
        ("PAX record without equals", raw(b"7 path\n")),
        ("PAX key with a zero byte", raw(&pax_record(b"path\0", b"../evil"))),
        ("zero bytes behind PAX records", raw(&[&pax_records(&two)[..], b"\0\0"].concat())),
        ("PAX path twice", pax_file(&[("path", "a"), ("path", "../b")])),
        ("PAX size twice", pax_file(&[("size", "0"), ("size", "512")])),
        ("PAX size negative", pax_file(&[("size", "-1")])),
        ("PAX size beyond 63 bits", pax_file(&[("size", "9223372036854775808")])),
        ("PAX size empty", pax_file(&[("size", "")])),
        ("PAX mtime with letters", pax_file(&[("mtime", "now")])),
        (
            "PAX size over a broken one",
            Forge::new()
                .pax(&[("size", "0")])
                .with(b'0', b"f", b"", |h| copy(&mut h[124..136], b"8000000000x"))
                .end(),
        ),
        ("PAX size for a directory", Forge::new().pax(&[("size", "512")]).directory("d").end()),
        ("PAX header of 2 MiB", raw(&pax_record(b"comment", &vec![b'c'; 2 << 20]))),
        ("PAX header of 8 EiB", Forge::new().with(b'x', b"p", b"", |h| set_size(h, i64::MAX as u64)).end()),
    ]
}

fn malformed_structure() -> Vec<Case> {
    let whole = Forge::new().file("f", "content").end();
    let smuggled = Forge::new().file("smuggled", "x").end();
    vec![
        ("cut in the first header", whole[..300].to_vec()),
        ("cut in the content", whole[..BLOCK + 3].to_vec()),
        ("cut in the padding", whole[..BLOCK + 100].to_vec()),
        ("cut in a later header", [&whole[..2 * BLOCK], &whole[..100]].concat()),
        ("cut in a PAX header", Forge::new().pax(&[("path", "a")]).cut()[..BLOCK + 5].to_vec()),
        ("cut behind a PAX header", Forge::new().pax(&[("path", "a")]).cut()),
        ("no end", Forge::new().file("f", "content").cut()),
        ("one zero block at the end", Forge::new().file("f", "").zero_blocks(1).cut()),
        ("one zero block, then an entry", Forge::new().file("f", "").zero_blocks(1).file("g", "").end()),
        ("second archive behind the end", [&whole[..], &smuggled].concat()),
        ("second archive behind padding", [&whole[..], &[0; 20 * BLOCK], &smuggled].concat()),
        ("text behind the end", [&whole[..], b"trailer"].concat()),
        ("zero bytes behind the end, no block", [&whole[..], &[0; 100]].concat()),
        ("size less than the content", Forge::new().lying("f", 0, "a content").end()),
        ("size more than the content", Forge::new().lying("f", 5000, "a content").end()),
        ("PAX size more than the content", Forge::new().pax(&[("size", "5000")]).file("f", "x").end()),
        ("file below a file", Forge::new().file("f", "").file("f/g", "").end()),
        ("directory after file", Forge::new().file("f", "").directory("f").end()),
        ("file after directory", Forge::new().directory("d").file("d", "").end()),
        ("file after implied directory", Forge::new().file("d/f", "").file("d", "").end()),
        ("hard link after directory", Forge::new().directory("d").file("f", "").hard_link("d", "f").end()),
    ]
}

fn damaged_packing() -> Vec<Case> {
    let archive = Forge::new().file("f", "content").end();
    let mut wrong_sum = gzip(&archive);
    let at = wrong_sum.len() - 8;
    wrong_sum[at] ^= 1;
    let mut wrong_zstd_sum = zstd(&archive);
    *wrong_zstd_sum.last_mut().unwrap() ^= 1;
    let cut = |packed: Vec<u8>, less: usize| packed[..packed.len() - less].to_vec();
    vec![
        ("gzip with a wrong checksum", wrong_sum),
        ("gzip without its trailer", cut(gzip(&archive), 8)),
        ("gzip cut by one byte", cut(gzip(&archive), 1)),
        ("gzip cut in the middle", cut(gzip(&archive), 40)),
        ("gzip with text behind it", [&gzip(&archive)[..], b"trailer"].concat()),
        ("gzip with a second archive behind it", [gzip(&archive), gzip(&archive)].concat()),
        ("gzip with an unknown method", [&b"\x1f\x8b\x09\0"[..], &[0; 600]].concat()),
        ("zstd with a wrong checksum", wrong_zstd_sum),
        ("zstd cut by one byte", cut(zstd(&archive), 1)),
        ("zstd with text behind it", [&zstd(&archive)[..], b"trailer"].concat()),
        ("zstd with a second archive behind it", [zstd(&archive), zstd(&archive)].concat()),
    ]
}

pub(crate) fn strangers() -> Vec<Case> {
    let html = b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>".repeat(20);
    let archive = Forge::new().file("f", "").end();
    vec![
        ("nothing", Vec::new()),
        ("HTML", html.clone()),
        ("ELF", [&b"\x7fELF\x02\x01\x01"[..], &[0; 600]].concat()),
        ("zip", [&b"PK\x03\x04"[..], &[7; 600]].concat()),
        ("JSON", b"{\"code\":\"not_found\"}".to_vec()),
        ("bzip2", [&b"BZh91AY&SY"[..], &[7; 600]].concat()),
        ("xz", [&b"\xfd7zXZ\0"[..], &[7; 600]].concat()),
        ("text", b"FROM scratch\n".to_vec()),
        ("noise", (0..2000_u32).map(|i| (i * 7919).to_le_bytes()[1]).collect()),
        ("HTML in gzip", gzip(&html)),
        ("nothing in gzip", gzip(b"")),
        ("nothing in zstd", zstd(b"")),
        ("gzip in gzip", gzip(&gzip(&archive))),
        ("gzip in zstd", zstd(&gzip(&archive))),
        ("zero bytes, less than a block", vec![0; 511]),
    ]
}

/// Odd but clear: these are taken, and mean what GNU tar says they mean.
pub(crate) fn accepted() -> Vec<Case> {
    let mut cases = accepted_entries();
    cases.extend(accepted_extensions());
    cases
}

fn accepted_entries() -> Vec<Case> {
    let magic = |magic: &'static [u8; 8]| changed(move |header| copy(&mut header[257..265], magic));
    let old = Forge::new()
        .with(0, b"d/", b"", |h| h[257..265].fill(0))
        .with(0, b"d/f", b"abc", |h| h[257..265].fill(0));
    vec![
        ("no entries", Forge::new().end()),
        ("much padding", Forge::new().file("f", "x").zero_blocks(50).end()),
        ("plain entries", Forge::new().directory("d/").file("d/f", "content").symlink("s", "d/f").end()),
        (
            "root and dots",
            Forge::new().directory("./").directory("./d/").file("./d//f", "x").file("d/./g", "").end(),
        ),
        ("implied directories", Forge::new().file("a/b/c", "x").file("a/d", "").end()),
        (
            "outward symlinks",
            Forge::new()
                .symlink("etc/localtime", "/usr/share/zoneinfo/UTC")
                .symlink("up", "../../x")
                .symlink("a -> b", "c -> d")
                .end(),
        ),
        ("hard links", Forge::new().file("d/f", "x").hard_link("h", "./d/f").hard_link("i", "h").end()),
        ("hard link to itself", Forge::new().file("f", "x").hard_link("f", "f").end()),
        ("file twice", Forge::new().file("f", "first").file("f", "second").end()),
        ("symlink, then file", Forge::new().symlink("f", "../canary/victim").file("f", "second").end()),
        ("file, then symlink", Forge::new().file("f", "first").symlink("f", "/x").end()),
        ("hard link, then file", Forge::new().file("a", "1").hard_link("b", "a").file("b", "2").end()),
        ("directory twice", Forge::new().directory("d").file("d/f", "").directory("d/").end()),
        (
            "odd names",
            Forge::new()
                .file(" a \\ b\t\n\"'*", "")
                .entry(b'0', b"caf\xe9\x01\x7f", b"")
                .file("..a", "")
                .end(),
        ),
        ("name of 100 bytes", Forge::new().file(&"n".repeat(100), "").end()),
        ("prefix", changed(|header| copy(&mut header[345..500], b"some/prefix"))),
        ("GNU header", magic(b"ustar  \0")),
        ("old header", magic(&[0; 8])),
        ("other version", magic(b"ustar\0\0\0")),
        ("old directory and file", old.end()),
        (
            "special bits",
            Forge::new()
                .with(b'0', b"su", b"x", |h| set_octal(&mut h[100..108], 0o104_755))
                .with(b'5', b"tmp", b"", |h| set_octal(&mut h[100..108], 0o1777))
                .end(),
        ),
        ("blank numbers", changed(|header| header[100..124].fill(0))),
        (
            "binary size",
            Forge::new()
                .with(b'0', b"f", b"abc", |h| {
                    h[124..136].fill(0);
                    h[124] = 0x80;
                    h[135] = 3;
                })
                .end(),
        ),
        ("time before 1970", changed(|header| header[136..148].fill(0xff))),
    ]
}

fn accepted_extensions() -> Vec<Case> {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let target = "t".repeat(300);
    let inner = Forge::new().file("inner", "").cut();
    let inner = String::from_utf8(inner).unwrap();
    vec![
        ("GNU long name", Forge::new().gnu_long(b'L', long.as_bytes()).file("f", "x").end()),
        ("GNU long target", Forge::new().gnu_long(b'K', target.as_bytes()).symlink("s", "x").end()),
        (
            "GNU long name and target",
            Forge::new()
                .gnu_long(b'K', target.as_bytes())
                .gnu_long(b'L', long.as_bytes())
                .symlink("s", "x")
                .end(),
        ),
        (
            "PAX path and target",
            Forge::new().pax(&[("path", &long), ("linkpath", &target)]).symlink("s", "x").end(),
        ),
        ("PAX path of a directory", Forge::new().pax(&[("path", "d/")]).file("f", "").file("d/g", "").end()),
        (
            "PAX attributes",
            Forge::new()
                .pax(&[
                    ("SCHILY.xattr.security.capability", "\u{1}\0=\n"),
                    ("mtime", "1.5"),
                    ("atime", "-1.25"),
                    ("uid", "0"),
                    ("uname", "root"),
                    ("hdrcharset", "BINARY"),
                ])
                .file("f", "x")
                .end(),
        ),
        (
            "global comment",
            Forge::new().global(&[("comment", "a commit")]).file("f", "x").file("g", "y").end(),
        ),
        (
            "global time",
            Forge::new().global(&[("mtime", "5")]).file("f", "x").pax(&[("mtime", "6")]).file("g", "").end(),
        ),
        ("PAX size more than the header's", Forge::new().pax(&[("size", "512")]).lying("f", 0, &inner).end()),
        (
            "PAX size less than the header's",
            Forge::new().pax(&[("size", "0")]).lying("f", 512, "").raw(inner.as_bytes()).end(),
        ),
        ("entries as content", Forge::new().file("f", &inner).file("g", "").end()),
    ]
}
