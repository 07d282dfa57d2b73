//! Edge: the contract in `wit/v1` as types of this host. What a resource is on this side is said here.

#[allow(missing_docs, unreachable_pub, clippy::pedantic, reason = "generated from the contract")]
mod generated {
    wasmtime::component::bindgen!({
        world: "everything",
        path: "../wit/v1",
        imports: { default: trappable },
        exports: { default: async },
        with: {
            "kiln:plugin/input.instruction": super::InstructionHandle,
            "kiln:plugin/input.base-image": super::BaseImageHandle,
            "kiln:plugin/input.build": super::BuildHandle,
            "kiln:plugin/input.blob": super::BlobHandle,
            "kiln:plugin/input.image": super::ImageHandle,
            "kiln:plugin/effects.report": super::ReportHandle,
        },
    });
}

use std::fs::File;
use std::sync::Arc;

pub(super) use generated::Everything;
pub(super) use generated::exports::kiln::plugin::{post_push, pre_build, setup};
pub(super) use generated::kiln::plugin::{effects, host, input, types};

use super::view::{BuildView, ImageView};

/// The version of the contract that this host offers.
pub const API_VERSION: &str = "1.0.0-rc.1";
/// What the names of the contract's interfaces begin with.
pub(super) const PACKAGE: &str = "kiln:plugin/";

/// An instruction: the build and the position in its list.
#[derive(Debug)]
#[expect(unreachable_pub, reason = "the generated code exports it again")]
pub struct InstructionHandle(pub(super) Arc<BuildView>, pub(super) usize);

/// A base image: the build and the position in its list.
#[derive(Debug)]
#[expect(unreachable_pub, reason = "the generated code exports it again")]
pub struct BaseImageHandle(pub(super) Arc<BuildView>, pub(super) usize);

/// A build.
#[derive(Debug)]
#[expect(unreachable_pub, reason = "the generated code exports it again")]
pub struct BuildHandle(pub(super) Arc<BuildView>);

/// An open blob.
#[derive(Debug)]
#[expect(unreachable_pub, reason = "the generated code exports it again")]
pub struct BlobHandle {
    pub(super) file: File,
    pub(super) size: u64,
}

/// An image.
#[derive(Debug)]
#[expect(unreachable_pub, reason = "the generated code exports it again")]
pub struct ImageHandle(pub(super) Arc<ImageView>);

/// The report of the one call that an instance serves; its content is in the state of the call.
#[derive(Debug)]
#[expect(unreachable_pub, reason = "the generated code exports it again")]
pub struct ReportHandle;
