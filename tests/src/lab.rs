//! Everything that one test needs: a registry, a context, a data directory, a configuration (shell).

use std::fmt::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::base::BaseImage;
use crate::image::{Image, assert_same};
use crate::kiln::Kiln;
use crate::leftovers;
use crate::plain::Plain;
use crate::process::Outcome;
use crate::registry::{Access, Registry};

/// How long the kernel may take to forget what a build was. The promise is 1 s; a busy machine may be late
/// to look.
pub const CLEAN: Duration = Duration::from_secs(1);

/// A build context on disk.
#[derive(Debug)]
pub struct Context(PathBuf);

impl Context {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file with mode 0644.
    pub fn file(&self, path: &str, contents: impl AsRef<[u8]>) -> &Self {
        self.file_mode(path, contents, 0o644)
    }

    /// Writes a file.
    pub fn file_mode(&self, path: &str, contents: impl AsRef<[u8]>, mode: u32) -> &Self {
        let path = self.0.join(path);
        make_dirs(&self.0, path.parent().unwrap());
        std::fs::write(&path, contents).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        self
    }

    /// Makes a directory.
    pub fn dir(&self, path: &str, mode: u32) -> &Self {
        let path = self.0.join(path);
        make_dirs(&self.0, &path);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        self
    }

    /// Makes a symbolic link.
    pub fn symlink(&self, path: &str, target: &str) -> &Self {
        symlink(target, self.0.join(path)).unwrap();
        self
    }

    /// Makes a hard link.
    pub fn hard_link(&self, path: &str, target: &str) -> &Self {
        std::fs::hard_link(self.0.join(target), self.0.join(path)).unwrap();
        self
    }
}

/// The time of every file of a context that is compared: buildah hashes times into its history, and Kiln
/// keeps whole seconds, as Docker does.
pub const CONTEXT_TIME: i64 = 1_600_000_000;

fn set_times(dir: &Path) {
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;
    let time = TimeSpec::new(CONTEXT_TIME, 0);
    let flags = UtimensatFlags::NoFollowSymlink;
    // Children first: setting the time of an entry leaves its directory alone.
    for path in crate::tree::paths(dir).into_iter().chain([dir.to_owned()]) {
        utimensat(nix::fcntl::AT_FDCWD, &path, &time, &time, flags).unwrap();
    }
}

/// Whatever the umask of the person who runs the tests, directories are 0755.
fn make_dirs(top: &Path, path: &Path) {
    let missing: Vec<_> = path.ancestors().take_while(|p| *p != top && !p.exists()).collect();
    for dir in missing.into_iter().rev() {
        std::fs::create_dir(dir).unwrap();
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// A place for one test.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
    /// The registry that serves Docker Hub's names.
    pub registry: Registry,
    /// The context.
    pub context: Context,
}

impl Drop for Lab {
    fn drop(&mut self) {
        // An ordinary user cannot delete what belongs to its subordinate ids, but their root can.
        if !nix::unistd::Uid::effective().is_root() {
            let home = self.path("home");
            let entries = std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten();
            let paths = entries.map(|entry| entry.path()).filter(|path| *path != home);
            let mut command = std::process::Command::new("buildah");
            command.env("HOME", &home).env("XDG_RUNTIME_DIR", &home);
            let _ = command.args(["unshare", "rm", "-rf"]).args(paths).output();
        }
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    /// A registry with `busybox:1`, an empty context.
    pub fn new() -> Self {
        let lab = Self::empty(Access::Open);
        lab.registry.push("library/busybox", "1", &BaseImage::busybox());
        lab
    }

    /// A registry with nothing in it.
    pub fn empty(access: Access) -> Self {
        let dir = tempfile::Builder::new().prefix("kiln-lab-").tempdir().unwrap();
        let context = Context(dir.path().join("context"));
        for name in ["context", "home"] {
            make_dirs(dir.path(), &dir.path().join(name));
        }
        let lab = Self { registry: Registry::start(access), context, dir };
        lab.configure(&lab.registry.host(), "");
        lab
    }

    /// A path beside the context.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Kiln's data directory.
    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// Rewrites the configuration: `registry` serves Docker Hub's names and its own, `more` is added.
    pub fn configure(&self, registry: &str, more: &str) {
        let mut text = String::new();
        for prefix in ["docker.io", registry] {
            writeln!(text, "[[registry]]\nprefix = \"{prefix}\"\nlocation = \"{registry}\"\ninsecure = true")
                .unwrap();
        }
        self.configure_exactly(&format!("{text}{more}"));
    }

    /// Replaces the configuration.
    pub fn configure_exactly(&self, text: &str) {
        std::fs::write(self.path("kiln.toml"), text).unwrap();
    }

    /// Writes the Dockerfile, outside the context.
    pub fn dockerfile(&self, text: &str) -> &Self {
        std::fs::write(self.path("Dockerfile"), text).unwrap();
        self
    }

    /// `kiln SUBCOMMAND` with this place's data and configuration.
    pub fn kiln(&self, subcommand: &str) -> Kiln {
        Kiln::new(subcommand, &self.data(), &self.path("kiln.toml"), &self.path("home"))
    }

    /// `kiln build` of the Dockerfile and the context, without an output yet. Tried once: a test that wants to see
    /// a failure does not wait for three more.
    pub fn build(&self) -> Kiln {
        self.kiln("build")
            .arg("--attempts=1")
            .arg("--file")
            .arg(self.path("Dockerfile"))
            .arg(self.context.path())
    }

    /// `kiln build` into [`Lab::archive`].
    pub fn build_archive(&self) -> Kiln {
        self.build().arg("--output").arg(format!("docker-archive:{}", self.archive().display()))
    }

    /// Where [`Lab::build_archive`] writes.
    pub fn archive(&self) -> PathBuf {
        self.path("image.tar")
    }

    /// Builds with `flags`, reads the image, and checks that nothing is left.
    pub fn image(&self, flags: &[&str]) -> Image {
        let _ = self.build_archive().args(flags).run().expect_code(0);
        leftovers::assert_none(&self.data(), CLEAN);
        Image::docker_archive(&self.archive())
    }

    /// Builds with Kiln and with plain buildah, and fails the test unless the images are the same.
    pub fn compare(&self, flags: &[&str]) -> Image {
        self.compare_with(flags, self.context.path())
    }

    /// The same, where plain buildah gets another context: what is left of ours after filtering.
    pub fn compare_with(&self, flags: &[&str], filtered: &Path) -> Image {
        set_times(self.context.path());
        set_times(filtered);
        let image = self.image(flags);
        let plain = self.plain_image(flags, filtered);
        let times = flags.iter().any(|flag| flag.starts_with("--timestamp"));
        assert_same(&image, &plain, times);
        image
    }

    fn plain_image(&self, flags: &[&str], context: &Path) -> Image {
        let plain = Plain::new(self.path("plain"), &self.registry.host());
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        let format = if flags.iter().any(|f| f == "--format=oci") { "oci" } else { "docker" };
        let _ = plain.build(format, &self.path("Dockerfile"), context, &flags).expect_code(0);
        plain.image()
    }

    /// Builds, expects `code`, and checks that nothing is left.
    pub fn fails(&self, flags: &[&str], code: i32) -> Outcome {
        let _ = std::fs::remove_file(self.archive());
        let outcome = self.build_archive().args(flags).run().expect_code(code);
        leftovers::assert_none(&self.data(), CLEAN);
        assert!(!self.archive().exists(), "a failed build left an output");
        outcome
    }
}
