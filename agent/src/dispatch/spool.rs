//! Reports that nobody has confirmed yet (shell).
//!
//! A report says everything about its attempt, so only the newest one of each attempt is kept. It lies on disk
//! from the moment something happened that the orchestrator must not miss, until a renewal says that it was taken.
//! What an earlier run could not get confirmed is sent by the next one, before that run's leases end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_protocol::BuildId;
use kiln_protocol::envelope::{self, Message as _};
use kiln_protocol::id::{AgentId, BootId, MessageId};
use kiln_protocol::message::{LeaseKey, Renewed, Report, Snapshot, Standing};
use kiln_protocol::topology;
use kiln_transport::crash::{self, CrashPoint};
use kiln_transport::{Bus, Message};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::error::chain;

/// Reports that wait to be confirmed.
#[derive(Debug)]
pub(super) struct Spool {
    directory: PathBuf,
    boot: BootId,
    entries: Mutex<BTreeMap<BuildId, Entry>>,
    changed: Notify,
}

/// A report as it lies on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    /// The run whose lease it is.
    boot: BootId,
    report: Report,
}

#[derive(Debug, Clone)]
struct Entry {
    boot: BootId,
    report: Report,
    /// It must reach the orchestrator whatever happens.
    durable: bool,
    sent: bool,
}

impl Spool {
    /// Opens the spool of a run. Reports of earlier runs are in it.
    pub(super) fn open(directory: &Path, boot: BootId) -> std::io::Result<Arc<Self>> {
        std::fs::create_dir_all(directory)?;
        let mut entries = BTreeMap::new();
        for file in std::fs::read_dir(directory)? {
            let path = file?.path();
            match read(&path) {
                // Any other name is that of a report which was not finished: a newer one may have its own.
                Ok(Kept { boot, report }) if path.ends_with(name(report.lease.build)) => {
                    entries.insert(report.lease.build, Entry { boot, report, durable: true, sent: false });
                }
                other => {
                    let error = other.err();
                    tracing::warn!(path = %path.display(), ?error, "a report that is not whole is dropped");
                    std::fs::remove_file(&path)?;
                }
            }
        }
        let (directory, entries) = (directory.to_owned(), Mutex::new(entries));
        Ok(Arc::new(Self { directory, boot, entries, changed: Notify::new() }))
    }

    /// Earlier runs with reports that nobody has confirmed.
    pub(super) fn earlier(&self) -> BTreeSet<BootId> {
        self.entries().values().map(|entry| entry.boot).filter(|boot| *boot != self.boot).collect()
    }

    /// Gives up the reports of earlier runs: their leases are lost.
    pub(super) fn forget_earlier(&self) {
        self.entries().retain(|build, entry| {
            let ours = entry.boot == self.boot;
            if !ours {
                tracing::warn!(%build, "the last report of an earlier run was not confirmed");
                // One that stays is read again by the next run, and given up again.
                let _ = std::fs::remove_file(self.path(*build));
            }
            ours
        });
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<BuildId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a report. A durable one is on disk when this returns.
    fn put(&self, report: Report, durable: bool) {
        let build = report.lease.build;
        if durable && let Err(error) = self.write(&report) {
            // It is in memory and will be sent; only a death of this process right now would lose it.
            tracing::error!(%build, %error, "a report cannot be kept on disk");
        }
        let mut entries = self.entries();
        let durable =
            durable || entries.get(&build).is_some_and(|e| e.durable && e.report.lease == report.lease);
        entries.insert(build, Entry { boot: self.boot, report, durable, sent: false });
        drop(entries);
        self.changed.notify_one();
    }

    fn write(&self, report: &Report) -> std::io::Result<()> {
        let path = self.path(report.lease.build);
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        let kept = Kept { boot: self.boot, report: report.clone() };
        file.write_all(&serde_json::to_vec(&kept)?)?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        std::fs::File::open(&self.directory)?.sync_all()
    }

    fn path(&self, build: BuildId) -> PathBuf {
        self.directory.join(name(build))
    }

    /// Leases of a run's reports that the orchestrator must still confirm.
    pub(super) fn unconfirmed(&self, boot: BootId) -> Vec<LeaseKey> {
        let entries = self.entries();
        let waiting = entries.values().filter(|entry| entry.durable && entry.boot == boot);
        waiting.map(|entry| entry.report.lease).collect()
    }

    /// A renewal said what was taken. Reports that were not are sent again.
    pub(super) fn settle(&self, key: &LeaseKey, renewed: &Renewed) {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(&key.build).filter(|entry| entry.report.lease == *key) else {
            return;
        };
        let over = matches!(renewed.standing, Standing::Finished | Standing::Revoked);
        let taken = renewed.last_seq >= entry.report.seq;
        // An earlier run says no more: its lease ends as soon as this one is known.
        let last = entry.report.snapshot.end.is_some() || entry.boot != self.boot;
        if over || (taken && last) {
            entries.remove(&key.build);
            drop(entries);
            crash::reach(CrashPoint::EndConfirmed);
            // A file that stays is sent again by the next run, which changes nothing.
            let _ = std::fs::remove_file(self.path(key.build));
            self.changed.notify_waiters();
        } else if !taken {
            entry.sent = false;
            drop(entries);
            self.changed.notify_one();
        }
    }

    /// Sends reports as they come, the newest of each attempt.
    pub(super) async fn send_all(&self, bus: &Bus, agent: &AgentId) {
        loop {
            let changed = self.changed.notified();
            let next = self.entries().values().find(|entry| !entry.sent).map(|entry| entry.report.clone());
            let Some(report) = next else {
                changed.await;
                continue;
            };
            self.mark_sent(&report);
            if let Err(error) = send(bus, agent, &report).await {
                // The next renewal finds that it was not taken.
                tracing::warn!(build = %report.lease.build, error, "a report was not taken by the bus");
            }
        }
    }

    fn mark_sent(&self, report: &Report) {
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(&report.lease.build).filter(|entry| entry.report == *report) {
            entry.sent = true;
        }
    }

    /// Reports about one attempt.
    pub(super) fn reporter(self: &Arc<Self>, lease: LeaseKey) -> Reporter {
        Reporter { spool: Arc::clone(self), lease, known: Mutex::default() }
    }
}

fn name(build: BuildId) -> String {
    format!("{build}.json")
}

fn read(path: &Path) -> std::io::Result<Kept> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

async fn send(bus: &Bus, agent: &AgentId, report: &Report) -> Result<(), String> {
    let body = envelope::encode(report).map_err(|e| chain(&e))?;
    let message = Message::new(MessageId::generate().as_uuid(), Report::TYPE, body);
    let sent = bus.publish(topology::REPORTS, &topology::reports(agent), message, true).await;
    match sent.map_err(|e| chain(&e))? {
        kiln_transport::Published::Confirmed => {
            crash::reach(CrashPoint::ReportSent);
            Ok(())
        }
        other => Err(format!("{other:?}")),
    }
}

/// What is known of one attempt, and its way to the orchestrator.
#[derive(Debug)]
pub(super) struct Reporter {
    spool: Arc<Spool>,
    lease: LeaseKey,
    known: Mutex<(u64, Snapshot)>,
}

impl Reporter {
    /// Something changed that people like to see. May be lost.
    pub(super) fn progress(&self, change: impl FnOnce(&mut Snapshot)) {
        self.report(change, false);
    }

    /// Something changed that must not be lost.
    pub(super) fn durable(&self, change: impl FnOnce(&mut Snapshot)) {
        self.report(change, true);
    }

    fn report(&self, change: impl FnOnce(&mut Snapshot), durable: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut known.1);
        known.0 += 1;
        let report = Report { lease: self.lease, seq: known.0, snapshot: known.1.clone() };
        // Under the lock, so that an older report never replaces a newer one.
        self.spool.put(report, durable);
    }

    /// What became of the destinations so far.
    pub(super) fn outcomes(&self) -> BTreeMap<String, kiln_protocol::message::Outcome> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).1.outcomes.clone()
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::id::{Attempt, LeaseToken};
    use kiln_protocol::message::AttemptEnd;

    use super::*;

    fn key() -> LeaseKey {
        LeaseKey { build: BuildId::generate(), attempt: Attempt::FIRST, token: LeaseToken::generate() }
    }

    #[test]
    fn a_durable_report_stays_until_it_is_confirmed() {
        let temp = tempfile::tempdir().unwrap();
        let boot = BootId::generate();
        let spool = Spool::open(&temp.path().join("spool"), boot).unwrap();
        let key = key();
        let reporter = spool.reporter(key);
        reporter.progress(|_| {});
        assert!(spool.unconfirmed(boot).is_empty());
        reporter.durable(|snapshot| snapshot.end = Some(AttemptEnd::Answered));
        assert_eq!(spool.unconfirmed(boot), [key]);
        assert!(spool.path(key.build).exists());
        spool.settle(&key, &Renewed { standing: Standing::Held, last_seq: 1 });
        assert_eq!(spool.unconfirmed(boot), [key], "an older one was taken");
        let other = LeaseKey { token: LeaseToken::generate(), ..key };
        spool.settle(&other, &Renewed { standing: Standing::Revoked, last_seq: u64::MAX });
        assert_eq!(spool.unconfirmed(boot), [key], "another lease was revoked");
        spool.settle(&key, &Renewed { standing: Standing::Held, last_seq: 2 });
        assert!(spool.unconfirmed(boot).is_empty() && !spool.path(key.build).exists());
    }

    #[test]
    fn what_was_not_confirmed_is_found_by_the_next_run() {
        let temp = tempfile::tempdir().unwrap();
        let (first, second) = (BootId::generate(), BootId::generate());
        let (kept, seen) = (key(), key());
        let spool = Spool::open(temp.path(), first).unwrap();
        spool.reporter(kept).durable(|snapshot| snapshot.end = Some(AttemptEnd::Answered));
        spool.reporter(seen).progress(|_| {});
        std::fs::write(temp.path().join("torn.json"), "{").unwrap();
        let spool = Spool::open(temp.path(), second).unwrap();
        assert_eq!(spool.earlier(), BTreeSet::from([first]));
        assert_eq!((spool.unconfirmed(first), spool.unconfirmed(second)), (vec![kept], vec![]));
        assert!(!temp.path().join("torn.json").exists());
        spool.forget_earlier();
        assert!(spool.earlier().is_empty() && !spool.path(kept.build).exists());
    }

    #[test]
    fn the_last_word_of_an_earlier_run_need_not_be_an_end() {
        let temp = tempfile::tempdir().unwrap();
        let (first, second) = (BootId::generate(), BootId::generate());
        let key = key();
        let spool = Spool::open(temp.path(), first).unwrap();
        spool.reporter(key).durable(|_| {});
        std::fs::copy(spool.path(key.build), temp.path().join(".unfinished")).unwrap();
        let held = Renewed { standing: Standing::Held, last_seq: 1 };
        spool.settle(&key, &held);
        assert_eq!(spool.unconfirmed(first), [key], "the run itself has more to say");
        let spool = Spool::open(temp.path(), second).unwrap();
        assert!(!temp.path().join(".unfinished").exists());
        spool.settle(&key, &held);
        assert!(spool.earlier().is_empty() && !spool.path(key.build).exists());
    }
}
