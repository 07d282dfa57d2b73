//! Places where tests kill this process as if its power had failed (shell).
//!
//! Agent and orchestrator reach these points, each right after something that outlives the process and before the
//! next such thing. They are here because this crate is the one of effects that both stand on. A list that the
//! compiler knows lets a suite prove that it visits every point; libraries of fail points know names only, and do
//! not kill. Programs without debug assertions, as releases are, contain the list but no way to die of it.

macro_rules! points {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal;)+) => {
        /// What has just happened for good.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum CrashPoint {
            $($(#[doc = $doc])+ $name,)+
        }

        impl CrashPoint {
            /// Every point, in the order of a build's life, then what people do and what the next run does.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The name for [`AT`].
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label),+ }
            }
        }
    };
}

points! {
    /// A context is stored.
    ContextStored = "context-stored";
    /// A build is recorded, and nobody knows.
    SubmitRecorded = "submit-recorded";
    /// A message of the outbox is sent and still in it.
    OutboxSent = "outbox-sent";
    /// A hint at a build is sent.
    HintSent = "hint-sent";
    /// A lease is recorded, and its agent does not know.
    ClaimRecorded = "claim-recorded";
    /// The context is copied for the build.
    ContextCopied = "context-copied";
    /// The private directory exists.
    JobMade = "job-made";
    /// Every target was asked.
    Probed = "probed";
    /// The slot runs.
    SlotStarted = "slot-started";
    /// The image is in the blob store of the build.
    Sealed = "sealed";
    /// The layers are kept for other builds.
    LayersKept = "layers-kept";
    /// The slot is gone.
    SlotEnded = "slot-ended";
    /// A repository has the image by digest.
    Uploaded = "uploaded";
    /// The report of the candidate is on disk.
    CandidateKept = "candidate-kept";
    /// The report of the verdicts is on disk; the commit was not asked for.
    VerdictsKept = "verdicts-kept";
    /// The commit is recorded, and the agent does not know.
    CommitRecorded = "commit-recorded";
    /// The agent knows.
    CommitHeard = "commit-heard";
    /// A tag moved, and nobody reported it.
    TagPut = "tag-put";
    /// The report of a tag is on disk.
    TagKept = "tag-kept";
    /// The report of the end is on disk.
    EndKept = "end-kept";
    /// A report is sent.
    ReportSent = "report-sent";
    /// A report that ends nothing is recorded, and not acknowledged.
    ReportRecorded = "report-recorded";
    /// The end of a build is recorded, and its report not acknowledged.
    EndRecorded = "end-recorded";
    /// The report of the end is confirmed, and still on disk.
    EndConfirmed = "end-confirmed";
    /// The private directory is gone.
    JobDeleted = "job-deleted";
    /// Another attempt is scheduled.
    RetryRecorded = "retry-recorded";
    /// The system gave up.
    DeadLetterRecorded = "dead-letter-recorded";
    /// A look at what is due ended something.
    SweepRecorded = "sweep-recorded";
    /// A wish to cancel is recorded.
    CancelRecorded = "cancel-recorded";
    /// A dead letter is to be tried again.
    ReplayRecorded = "replay-recorded";
    /// A dead letter is ended for good.
    DiscardRecorded = "discard-recorded";
    /// The next run deleted the slots of this one.
    SlotsReclaimed = "slots-reclaimed";
    /// The next run has its earlier reports confirmed.
    EarlierConfirmed = "earlier-confirmed";
    /// The next run is known, so that the leases of this one ended.
    RunKnown = "run-known";
    /// The next run has the lease for moving the tags.
    PublishClaimed = "publish-claimed";
}

/// Variable with the point to die at, `POINT` or `POINT:COUNT` to die when it is reached for that time.
pub const AT: &str = "KILN_CRASH_AT";
/// Variable with a file that is written first: the proof that the point was reached.
pub const MARKER: &str = "KILN_CRASH_MARKER";

/// Says that this has just happened.
#[cfg(not(debug_assertions))]
pub const fn reach(_: CrashPoint) {}

#[cfg(debug_assertions)]
pub use armed::reach;

#[cfg(debug_assertions)]
mod armed {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::{AT, CrashPoint, MARKER};

    /// Where this process is to die.
    pub(super) struct Armed {
        point: String,
        /// How often it is still passed.
        left: AtomicU32,
        marker: Option<PathBuf>,
    }

    impl Armed {
        pub(super) fn parse(at: &str, marker: Option<PathBuf>) -> Self {
            let (point, count) = at.split_once(':').unwrap_or((at, "1"));
            Self { point: point.to_owned(), left: AtomicU32::new(count.parse().unwrap_or(1)), marker }
        }

        /// Whether this is the place and the time.
        pub(super) fn is_due(&self, point: CrashPoint) -> bool {
            self.point == point.label() && self.left.fetch_sub(1, Ordering::SeqCst) == 1
        }
    }

    /// Says that this has just happened.
    pub fn reach(point: CrashPoint) {
        static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
        let armed = ARMED.get_or_init(|| {
            let at = std::env::var(AT).ok()?;
            Some(Armed::parse(&at, std::env::var_os(MARKER).map(PathBuf::from)))
        });
        if let Some(armed) = armed.as_ref().filter(|armed| armed.is_due(point)) {
            if let Some(marker) = &armed.marker {
                // Without its marker the suite fails.
                let _ = std::fs::write(marker, point.label());
            }
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let labels: BTreeSet<_> = CrashPoint::ALL.iter().map(|point| point.label()).collect();
        assert_eq!(labels.len(), CrashPoint::ALL.len());
    }

    #[cfg(debug_assertions)]
    #[test]
    fn a_point_is_due_once_at_its_count() {
        let armed = armed::Armed::parse("tag-put:2", None);
        let passed = [CrashPoint::TagPut, CrashPoint::Sealed, CrashPoint::TagPut, CrashPoint::TagPut];
        assert_eq!(passed.map(|point| armed.is_due(point)), [false, false, true, false]);
        assert!(armed::Armed::parse("sealed", None).is_due(CrashPoint::Sealed));
    }
}
