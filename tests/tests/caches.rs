//! `RUN --mount=type=cache`: what is kept between builds, what is not, and that builds do not mix.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use kiln_tests::image::Image;
use kiln_tests::kiln::Build;
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::assert_none;
use kiln_tests::process::{Outcome, eventually};
use kiln_tests::site::Site;
use nix::sys::signal::Signal;

/// More than the number of generations after which a cache is copied into one.
const MANY: usize = 10;
/// No more than these stay on disk, however many builds there were.
const GENERATIONS: usize = 9;
const SOON: Duration = Duration::from_mins(1);

/// A place with a package server on the host's loopback.
struct Place {
    lab: Lab,
    site: Site,
}

impl Place {
    fn new() -> Self {
        Self { lab: Lab::new(), site: Site::start(Ipv4Addr::LOCALHOST) }
    }

    /// A build whose RUN has the cache at `/cache`.
    fn run(&self, script: &str) -> Outcome {
        self.run_with("", script)
    }

    fn run_with(&self, options: &str, script: &str) -> Outcome {
        self.prepare(options, script);
        self.build().run()
    }

    fn prepare(&self, options: &str, script: &str) {
        self.lab.context.file("script", format!("set -e\n{script}\n"));
        let mount = format!("--mount=type=cache,target=/cache{options}");
        self.lab.dockerfile(&format!("FROM busybox:1\nCOPY script /script\nRUN {mount} sh /script\n"));
    }

    /// Every instruction runs: this is about what the mounts keep.
    fn build(&self) -> kiln_tests::kiln::Kiln {
        self.lab.build_archive().arg("--network=unsafe-host").arg("--no-cache")
    }

    /// A step that uses the package, and downloads it unless the cache has it.
    fn install(&self) -> String {
        let url = format!("http://{}/package", self.site.address());
        format!("[ -e /cache/package ] || wget -q -O /cache/package {url}\ncp /cache/package /installed")
    }

    fn downloads(&self) -> usize {
        self.site.requests().len()
    }

    fn generations(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.lab.data().join("store/cache/local"));
        entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    /// Also tells a name that is given a second time: a rename sets the time of change.
    fn names_on_disk(&self) -> Vec<(u64, i64, i64)> {
        let found = self.generations().into_iter().filter_map(|path| path.metadata().ok());
        found.map(|meta| (meta.ino(), meta.ctime(), meta.ctime_nsec())).collect()
    }

    fn assert_clean(&self) {
        assert_none(&self.lab.data(), CLEAN);
    }
}

#[test]
fn a_second_build_downloads_nothing() {
    let place = Place::new();
    for _ in 0..2 {
        let _ = place.run(&place.install()).expect_code(0);
        let image = Image::docker_archive(&place.lab.archive());
        assert_eq!(place.downloads(), 1);
        assert!(image.entry("installed").is_some());
        assert!(image.entry("cache/package").is_none(), "the cache is no part of the image");
    }
    place.assert_clean();
}

#[test]
fn a_failed_or_cancelled_build_keeps_nothing() {
    let place = Place::new();
    let _ = place.run(&format!("{}\nexit 3", place.install())).expect_code(1);
    place.prepare("", &format!("{}\necho under way; sleep 100", place.install()));
    let build = place.build().start();
    build.expect_output("\nunder way");
    let _ = build.stop(Signal::SIGTERM).expect_code(130);
    assert_eq!((place.downloads(), place.generations().len()), (2, 0));
    let _ = place.run("[ -z \"$(ls -A /cache)\" ]").expect_code(0);
    place.assert_clean();
}

/// A failed build may spoil what it sees. Others do not see that.
#[test]
fn a_failed_build_spoils_nothing() {
    let place = Place::new();
    let _ = place.run("echo good > /cache/file; mkdir /cache/dir; echo x > /cache/dir/x").expect_code(0);
    let _ = place.run("echo bad > /cache/file; rm -r /cache/dir; exit 3").expect_code(1);
    let _ = place.run("[ $(cat /cache/file) = good ]; [ -e /cache/dir/x ]").expect_code(0);
}

/// Lets steps wait for the test.
struct Gate(TcpListener);

impl Gate {
    fn new() -> Self {
        Self(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
    }

    /// A command that ends when the gate opens.
    fn wait(&self) -> String {
        format!("nc 127.0.0.1 {} >/dev/null </dev/null || true", self.0.local_addr().unwrap().port())
    }

    /// Waits until `count` steps wait, and lets all of them go on.
    fn open(&self, count: usize) {
        self.0.set_nonblocking(true).unwrap();
        let mut waiting = Vec::new();
        let all = eventually(SOON, || {
            waiting.extend(self.0.accept());
            waiting.len() == count
        });
        assert!(all, "only {} of {count} steps came", waiting.len());
    }
}

#[test]
fn builds_beside_each_other_do_not_mix() {
    let place = Place::new();
    let _ = place.run("echo common > /cache/common").expect_code(0);
    let gate = Gate::new();
    let start = |own: &str| -> Build {
        let script = format!(
            "set -e\necho {own} > /cache/{own}\necho {own} >> /cache/common\n{}\n\
             [ \"$(echo $(ls /cache))\" = \"$(echo $(printf '%s\\n' common {own} | sort))\" ]\n\
             [ \"$(echo $(cat /cache/common))\" = 'common {own}' ]\n",
            gate.wait()
        );
        place.lab.context.file(own, script);
        let file = place.lab.path(&format!("Dockerfile.{own}"));
        let step = "RUN --mount=type=cache,target=/cache sh /script\n";
        std::fs::write(&file, format!("FROM busybox:1\nCOPY {own} /script\n{step}")).unwrap();
        let build = place.lab.kiln("build").arg("--network=unsafe-host").arg("--no-cache");
        let build = build.arg("--file").arg(file);
        build.arg(place.lab.context.path()).start()
    };
    let builds = [start("one"), start("two")];
    gate.open(2);
    let outcomes = builds.map(|build| build.wait().expect_code(0).output());
    let late = outcomes.iter().filter(|o| o.contains("another build renewed the cache mounts")).count();
    assert_eq!(late, 1, "{outcomes:#?}");
    let list = place.run("echo content: $(cat /cache/common) $(ls /cache)").expect_code(0).output();
    let either = ["content: common one common one\n", "content: common two common two\n"];
    assert!(either.iter().any(|text| list.contains(text)), "{list}");
    place.assert_clean();
}

/// Overlays of overlays: deleted files stay deleted, replaced directories stay replaced, and everything keeps
/// its owner, mode and links, also when the generations are copied into one.
#[test]
fn many_builds_keep_content_and_stay_few_on_disk() {
    let place = Place::new();
    let first = "echo keep > /cache/owned; chown 65532:10 /cache/owned; chmod 4750 /cache/owned\n\
                 ln -s owned /cache/link; ln /cache/owned /cache/hard; mkfifo /cache/fifo; mkdir -m 1777 /cache/empty";
    let _ = place.run(first).expect_code(0);
    for number in 1..=MANY {
        let before = number - 1;
        let check = format!(
            "[ $(cat /cache/log 2>/dev/null | wc -l) = {before} ] && echo {number} >> /cache/log\n\
             [ {before} = 0 ] || [ \"$(ls /cache/replaced)\" = {before} ]\n\
             rm -rf /cache/replaced; mkdir /cache/replaced; touch /cache/replaced/{number}\n\
             [ ! -e /cache/deleted-{before} ]; [ {before} = 0 ] || rm /cache/gone-{before}\n\
             touch /cache/deleted-{number} /cache/gone-{number}; rm /cache/deleted-{number}\n\
             [ \"$(ls /cache | grep -c gone)\" = 1 ]"
        );
        let _ = place.run(&check).expect_code(0);
        assert!(place.generations().len() <= GENERATIONS, "{:?}", place.generations());
    }
    let last = "stat -c '%n %u %g %a %h' /cache/owned /cache/empty /cache; readlink /cache/link; [ -p /cache/fifo ]\n\
                [ /cache/hard -ef /cache/owned ] && echo same file";
    let _ = place.run(last).expect_code(0).expect_text(&[
        "/cache/owned 65532 10 4750 2\n",
        "/cache/empty 0 0 1777 2\n",
        "/cache 0 0 755 ",
        "\nowned\n",
        "same file",
    ]);
    place.assert_clean();
}

#[test]
fn a_cache_above_its_limit_starts_afresh() {
    let place = Place::new();
    place.lab.configure(&place.lab.registry.host(), "[data]\nmax_cache_bytes = \"2MiB\"\n");
    let _ = place.run("dd if=/dev/zero of=/cache/first bs=64k count=16").expect_code(0);
    let over =
        place.run("[ -e /cache/first ]; dd if=/dev/zero of=/cache/second bs=64k count=17").expect_code(0);
    let _ = over.expect_text(&["more than data.max_cache_bytes = 2097152; they start empty next time"]);
    let _ = place.run("[ -z \"$(ls -A /cache)\" ]; echo small > /cache/third").expect_code(0);
    assert_eq!(place.generations().len(), 1, "the old ones still take space");
    let _ = place.run("[ \"$(ls /cache)\" = third ]").expect_code(0);
    place.assert_clean();
}

#[test]
fn the_owner_and_mode_of_the_mount_hold_in_every_build() {
    let place = Place::new();
    let options = ",id=mine,uid=65532,gid=10,mode=0750,sharing=locked";
    for expected in ["", "\nwritten by 65532\n"] {
        let script = "stat -c 'mount %u %g %a' /cache; cat /cache/* 2>/dev/null || true";
        place.prepare(options, script);
        let write = format!(
            "USER 65532\nRUN --mount=type=cache,target=/cache{options} echo written by $(id -u) > /cache/x\n"
        );
        let text = std::fs::read_to_string(place.lab.path("Dockerfile")).unwrap();
        place.lab.dockerfile(&format!("{text}{write}"));
        let _ = place.build().run().expect_code(0).expect_text(&["mount 65532 10 750\n", expected]);
    }
    let _ = place.run_with(",id=other", "[ -z \"$(ls -A /cache)\" ]").expect_code(0);
    place.assert_clean();
}

#[test]
fn caches_with_other_names_are_others() {
    let place = Place::new();
    place.lab.dockerfile(
        "FROM busybox:1\nRUN --mount=type=cache,target=/a --mount=type=cache,id=b,target=/b \
         echo a > /a/a; echo b > /b/b\nRUN --mount=type=cache,id=b,target=/elsewhere [ \"$(ls /elsewhere)\" = b ]\n\
         RUN --mount=type=cache,target=/other [ -z \"$(ls -A /other)\" ]\n",
    );
    let _ = place.build().run().expect_code(0);
    let _ = place.run_with(",id=b", "[ \"$(ls /cache)\" = b ]").expect_code(0);
}

#[test]
fn prune_all_forgets() {
    let place = Place::new();
    let _ = place.run(&place.install()).expect_code(0);
    let _ = place.lab.kiln("prune").run().expect_code(0);
    let _ = place.run(&place.install()).expect_code(0);
    assert_eq!(place.downloads(), 1, "plain prune keeps what the next build uses");
    let _ = place
        .lab
        .kiln("prune")
        .arg("--all")
        .run()
        .expect_code(0)
        .expect_text(&["generations of cache mounts"]);
    assert!(place.generations().is_empty(), "{:?}", place.generations());
    let _ = place.run(&place.install()).expect_code(0);
    assert_eq!(place.downloads(), 2);
    place.assert_clean();
}

/// `prune --all` beside a build that uses the cache: the build goes on with it.
#[test]
fn prune_all_takes_nothing_from_a_running_build() {
    let place = Place::new();
    let _ = place.run("echo kept > /cache/kept").expect_code(0);
    let gate = Gate::new();
    place.prepare("", &format!("{}\n[ $(cat /cache/kept) = kept ]", gate.wait()));
    let build = place.build().start();
    build.expect_output("RUN --mount");
    let _ = place.lab.kiln("prune").arg("--all").run().expect_code(0);
    gate.open(1);
    let _ = build.wait().expect_code(0);
    place.assert_clean();
}

/// The kiln that died had renamed its generation, and not yet said so.
#[test]
fn a_generation_that_was_never_announced_is_forgotten() {
    let place = Place::new();
    let _ = place.run("echo first > /cache/first").expect_code(0);
    let head = place.lab.data().join("caches/local.json");
    let before = std::fs::read(&head).unwrap();
    let _ = place.run("echo lost > /cache/lost").expect_code(0);
    std::fs::write(&head, before).unwrap();
    let next = place.run("[ \"$(ls /cache)\" = first ]; echo next > /cache/next").expect_code(0).output();
    assert!(!next.contains("not kept") && !next.contains("cannot delete"), "{next}");
    let _ = place.run("[ \"$(echo $(ls /cache))\" = 'first next' ]").expect_code(0);
}

/// A head that was half written, or names what is no longer there, is a cache that forgot.
#[test]
fn a_damaged_cache_is_an_empty_one() {
    let place = Place::new();
    let head = place.lab.data().join("caches/local.json");
    for damage in ["", "{\"chain\":[0", "[]"] {
        let _ = place.run("echo x > /cache/x").expect_code(0);
        std::fs::write(&head, damage).unwrap();
        let _ = place.run("[ -z \"$(ls -A /cache)\" ]").expect_code(0);
    }
    let _ = place.run("echo x > /cache/x").expect_code(0);
    for generation in place.generations() {
        // Beside it: an ordinary user may not move a directory of another to another parent.
        std::fs::rename(&generation, generation.with_extension("aside")).unwrap();
    }
    let _ = place.run("[ -z \"$(ls -A /cache)\" ]; echo y > /cache/y").expect_code(0);
    let _ = place.run("[ \"$(ls /cache)\" = y ]").expect_code(0);
}

/// Killed as soon as its generation has a name, which is before, while or after it is announced.
#[test]
fn a_kill_while_content_is_kept_leaves_a_usable_cache() {
    let place = Place::new();
    let _ = place.run("echo base > /cache/base").expect_code(0);
    for round in 1..=4 {
        place.prepare("", &format!("[ $(cat /cache/base) = base ]; echo {round} > /cache/round-{round}"));
        let before = place.names_on_disk();
        let build = place.build().start();
        let renamed = eventually(SOON, || place.names_on_disk().iter().any(|name| !before.contains(name)));
        let outcome = build.stop(Signal::SIGKILL);
        assert!(renamed, "{}", outcome.output());
        let next =
            place.run("[ $(cat /cache/base) = base ]; ls /cache; echo next > /cache/next").expect_code(0);
        assert!(!next.output().contains("not kept"), "{}", next.output());
        let _ = place.run("[ $(cat /cache/next) = next ]; rm /cache/next").expect_code(0);
    }
    place.assert_clean();
}

/// buildah 1.28 follows a link that a stage brings along, so any Dockerfile gets the job's directory.
const JOB_FROM_INSIDE: &str = "FROM busybox:1 AS evil\nRUN ln -s /job /j\nFROM busybox:1\n";

#[test]
fn a_step_cannot_put_a_link_where_content_is_kept() {
    let place = Place::new();
    let mount = "--mount=type=bind,from=evil,source=/j,target=/x,rw --mount=type=cache,target=/cache";
    let script = "ls /x > /seen; echo x > /cache/x; \
                  for d in cache cache/upper cache/flat; do rm -rf /x/$d; ln -s /var/tmp /x/$d; done; true";
    place.lab.dockerfile(&format!("{JOB_FROM_INSIDE}RUN {mount} {script}\n"));
    let _ = place.build().run().expect_code(0);
    for generation in place.generations() {
        assert!(generation.symlink_metadata().unwrap().is_dir(), "{}", generation.display());
    }
    let _ = place.run("[ \"$(ls /cache)\" = x ]").expect_code(0);
    place.assert_clean();
}

/// Names that deletion would use for its own purpose, below trees deeper than it descends.
#[test]
fn a_job_with_hostile_names_is_deleted() {
    let place = Place::new();
    let script = "cd /x; i=0; while [ $i -lt 20 ]; do mkdir -p .deep-$i/a; i=$((i+1)); done; \
                  i=0; while [ $i -lt 100 ]; do mkdir d; cd d; i=$((i+1)); done; touch f";
    place.lab.dockerfile(&format!(
        "{JOB_FROM_INSIDE}RUN --mount=type=bind,from=evil,source=/j,target=/x,rw {script}\n"
    ));
    let _ = place.build().run().expect_code(0);
    place.assert_clean();
}
