//! Programs for steps: this machine's curl with what it needs, and small ones made from their source (shell).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::base::{BaseImage, LayerTar};
use crate::process::run;

const CURL: &str = "/usr/bin/curl";
/// Where Debian's family keeps them, and this machine's curl looks.
pub const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const LDD: Duration = Duration::from_secs(20);
const CC: Duration = Duration::from_mins(1);

/// busybox and curl. It trusts what this machine trusts.
pub fn curl() -> BaseImage {
    let bundle = read(Path::new(BUNDLE));
    let layer = programs(&[CURL]).dir("etc/ssl", 0o755).dir("etc/ssl/certs", 0o755);
    BaseImage::busybox().layer(layer.file(BUNDLE.trim_start_matches('/'), 0o644, &bundle))
}

/// A C program, linked statically.
pub fn compile(source: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (file, program) = (dir.path().join("program.c"), dir.path().join("program"));
    std::fs::write(&file, source).unwrap();
    let mut cc = Command::new("cc");
    let _ = run(cc.arg("-static").arg("-o").arg(&program).arg(&file), CC).expect_code(0);
    read(&program)
}

/// Programs of this machine with the libraries that they load.
fn programs(paths: &[&str]) -> LayerTar {
    let mut files: BTreeSet<PathBuf> = paths.iter().map(PathBuf::from).collect();
    for path in paths {
        let said = run(Command::new("ldd").arg(path), LDD).expect_code(0).stdout;
        files.extend(said.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    let dirs: BTreeSet<&Path> = files.iter().flat_map(|file| file.ancestors().skip(1)).collect();
    let dirs = dirs.into_iter().filter(|dir| *dir != Path::new("/"));
    let layer = dirs.fold(LayerTar::default(), |layer, dir| layer.dir(relative(dir), 0o755));
    files.iter().fold(layer, |layer, file| layer.file(relative(file), 0o755, &read(file)))
}

fn relative(path: &Path) -> &str {
    path.to_str().unwrap().trim_start_matches('/')
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path)
        .unwrap_or_else(|e| panic!("{}: {e}; run scripts/setup-system.sh test", path.display()))
}
