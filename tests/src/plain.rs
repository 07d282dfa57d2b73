//! The same build by plain buildah, to compare with (shell).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::image::Image;
use crate::process::{Outcome, run};

/// See [`crate::kiln::HARD_LIMIT`].
const LIMIT: Duration = Duration::from_mins(2);

/// A throw-away buildah: its own store, its own configuration.
#[derive(Debug)]
pub struct Plain {
    dir: PathBuf,
}

impl Plain {
    /// Works in `dir`, with Docker Hub's names served by `registry`.
    pub fn new(dir: PathBuf, registry: &str) -> Self {
        for name in ["home", "xdg", "tmp"] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        let registries = format!(
            "unqualified-search-registries = [\"docker.io\"]\n\
             [[registry]]\nprefix = \"docker.io\"\nlocation = \"{registry}\"\ninsecure = true\n\
             [[registry]]\nprefix = \"{registry}\"\nlocation = \"{registry}\"\ninsecure = true\n"
        );
        std::fs::write(dir.join("registries.conf"), registries).unwrap();
        std::fs::write(dir.join("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)
            .unwrap();
        Self { dir }
    }

    /// `buildah ARGUMENTS` on this store. As root in a mount namespace of its own, so that no mount stays.
    fn buildah(&self) -> Command {
        let mut command = if nix::unistd::Uid::effective().is_root() {
            let mut wrapped = Command::new("unshare");
            wrapped.args(["--mount", "--propagation", "private", "buildah"]);
            wrapped
        } else {
            Command::new("buildah")
        };
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LANG", "C.UTF-8");
        command.env("HOME", self.dir.join("home")).env("XDG_RUNTIME_DIR", self.dir.join("xdg"));
        command.env("TMPDIR", self.dir.join("tmp"));
        command.env("CONTAINERS_REGISTRIES_CONF", self.dir.join("registries.conf"));
        command.args(["--storage-driver", "overlay"]);
        command.arg("--root").arg(self.dir.join("root")).arg("--runroot").arg(self.dir.join("run"));
        command
    }

    /// Builds with the options that Kiln uses, and `flags`.
    pub fn build(&self, format: &str, dockerfile: &Path, context: &Path, flags: &[String]) -> Outcome {
        let mut command = self.buildah();
        command.arg("bud").arg("--signature-policy").arg(self.dir.join("policy.json"));
        command.args(["--isolation", "chroot", "--layers=true", "--no-cache", "--format", format]);
        command.args(["--cap-drop", "CAP_SYS_CHROOT", "--cap-drop", "CAP_MKNOD"]);
        command.arg("--iidfile").arg(self.dir.join("id")).args(flags);
        command.arg("--file").arg(dockerfile).arg("--").arg(context);
        run(&mut command, LIMIT)
    }

    /// Pulls an image, or finds that it is still the same.
    pub fn pull(&self, name: &str) {
        let mut command = self.buildah();
        command
            .arg("pull")
            .arg("--signature-policy")
            .arg(self.dir.join("policy.json"))
            .arg("--quiet")
            .arg(name);
        let _ = run(&mut command, LIMIT).expect_code(0);
    }

    /// Writes the image that the last build made as a `dir:` layout.
    pub fn push(&self, layout: &Path) {
        self.write_layout(layout, &[]);
    }

    /// Sends the image that the last build made to a registry without TLS.
    pub fn publish(&self, reference: &str) {
        self.send(&format!("docker://{reference}"), &["--tls-verify=false"]);
    }

    fn write_layout(&self, layout: &Path, flags: &[&str]) {
        self.send(&format!("dir:{}", layout.display()), flags);
    }

    fn send(&self, destination: &str, flags: &[&str]) {
        let id = std::fs::read_to_string(self.dir.join("id")).unwrap();
        let mut command = self.buildah();
        command.arg("push").arg("--signature-policy").arg(self.dir.join("policy.json")).arg("--quiet");
        command.args(flags).arg(id.trim()).arg(destination);
        let _ = run(&mut command, LIMIT).expect_code(0);
    }

    /// Reads the image that the last build made.
    pub fn image(&self) -> Image {
        let layout = self.dir.join("layout");
        self.write_layout(&layout, &["--disable-compression"]);
        Image::dir(&layout)
    }
}
