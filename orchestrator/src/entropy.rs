//! Randomness, so that a simulation can repeat it (shell).

use std::sync::{Arc, Mutex, PoisonError};

use kiln_protocol::BuildId;
use kiln_protocol::id::{Attempt, LeaseToken};
use uuid::Uuid;

/// Where randomness comes from.
#[derive(Debug, Clone, Default)]
pub enum Entropy {
    /// From the operating system: tokens cannot be guessed.
    #[default]
    System,
    /// From a seed, for tests and simulations only.
    Seeded(Arc<Mutex<fastrand::Rng>>),
}

impl Entropy {
    /// The same sequence for the same seed.
    pub fn seeded(seed: u64) -> Self {
        Self::Seeded(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }

    /// A fresh build id.
    pub fn build_id(&self) -> BuildId {
        match self {
            Self::System => BuildId::generate(),
            Self::Seeded(_) => BuildId::from_uuid(self.uuid()),
        }
    }

    /// A fresh proof of a lease.
    pub fn lease_token(&self) -> LeaseToken {
        LeaseToken::from_uuid(self.uuid())
    }

    fn uuid(&self) -> Uuid {
        match self {
            Self::System => Uuid::new_v4(),
            Self::Seeded(rng) => {
                let bits = rng.lock().unwrap_or_else(PoisonError::into_inner).u128(..);
                uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
            }
        }
    }
}

/// A factor from 0.5 to 1.5 that differs between builds and attempts. It is not drawn but derived, so that the
/// record after a report does not depend on what else arrived before it.
pub fn jitter(build: BuildId, attempt: Attempt) -> f64 {
    let (high, low) = build.as_uuid().as_u64_pair();
    0.5 + fastrand::Rng::with_seed(high ^ low.rotate_left(attempt.get())).f64()
}
