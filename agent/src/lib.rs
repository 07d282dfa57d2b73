//! The Kiln agent: fetches base images, runs rootless buildah in sealed slots, seals what comes out.

pub mod agent;
pub mod bases;
pub mod blobs;
pub mod caches;
pub mod classify;
pub mod config;
pub mod dispatch;
pub mod dockerfile;
pub mod doctor;
pub mod error;
pub mod executor;
pub mod export;
pub mod hooks;
pub mod housekeeping;
pub mod layers;
pub mod logs;
pub mod output;
pub mod plan;
pub mod publish;
pub mod registry;
pub mod seal;
pub mod slot;
pub mod state;
pub mod stop;
mod time;
pub mod unpack;
pub mod version;
