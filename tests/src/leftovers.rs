//! What must not exist once a build has ended: processes, mounts and job files (shell).

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::{Process, eventually, processes};

/// Everything that is left of builds in a data directory, described for a person.
///
/// A process belongs to the directory if its mounts, its working directory or its arguments name it. That
/// finds RUN's orphans too: they live in a mount namespace with the job directory in it.
pub fn of(data: &Path) -> Vec<String> {
    let mut found = live(data);
    found.extend(files(data).into_iter().map(|p| format!("file {}", p.display())));
    found
}

/// Processes and mounts only.
pub fn live(data: &Path) -> Vec<String> {
    let marker = data.to_str().unwrap();
    let mut found: Vec<String> = processes()
        .into_iter()
        .filter(|p| p.pid != std::process::id() && belongs(p, marker))
        .map(|p| format!("process {} {}", p.pid, p.command))
        .collect();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(mounts.lines().filter(|l| names(l, marker)).map(|l| format!("mount {l}")));
    found
}

/// Fails the test unless nothing is left within `limit`.
pub fn assert_none(data: &Path, limit: Duration) {
    let clean = eventually(limit, || of(data).is_empty());
    assert!(clean, "left over after {limit:?}:\n{}", of(data).join("\n"));
}

/// Fails the test unless no process and no mount is left within `limit`.
pub fn assert_none_live(data: &Path, limit: Duration) {
    let clean = eventually(limit, || live(data).is_empty());
    assert!(clean, "alive after {limit:?}:\n{}", live(data).join("\n"));
}

/// Fails the test unless all of `gone` have ended within `limit`.
pub fn assert_dead(gone: &[Process], limit: Duration) {
    let alive = || gone.iter().filter(|p| p.is_alive()).collect::<Vec<_>>();
    assert!(eventually(limit, || alive().is_empty()), "alive after {limit:?}: {:#?}", alive());
}

fn belongs(process: &Process, marker: &str) -> bool {
    let proc = PathBuf::from(format!("/proc/{}", process.pid));
    let mounts = std::fs::read_to_string(proc.join("mountinfo")).unwrap_or_default();
    let directory = std::fs::read_link(proc.join("cwd")).unwrap_or_default();
    mounts.lines().any(|l| names(l, marker))
        || directory.starts_with(marker)
        || process.command.split(' ').any(|a| a == marker)
}

/// A mount line names the directory from the root of its file system, which may be a mount itself.
fn names(line: &str, marker: &str) -> bool {
    let unique = marker.rsplit('/').take(2).collect::<Vec<_>>();
    line.contains(marker) || line.contains(&format!("{}/{}/", unique[1], unique[0]))
}

/// Entries below every `jobs` and `in` directory, and what never got its final name.
pub fn files(data: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![(data.to_owned(), 0)];
    while let Some((dir, depth)) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let in_jobs = dir.ends_with("jobs") || dir.ends_with("store/in");
            if in_jobs || path.extension().is_some_and(|e| e == "tmp") {
                found.push(path);
            } else if depth < 2 && path.is_dir() {
                open.push((path, depth + 1));
            }
        }
    }
    found
}
