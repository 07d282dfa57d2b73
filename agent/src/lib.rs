//! The Kiln agent: fetches base images, runs rootless buildah in sealed slots, seals what comes out.

pub mod slot;
pub mod stop;
pub mod unpack;
