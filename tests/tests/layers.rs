//! Layers that one build leaves to the next: what is found again, what is not, and that nothing else is shared.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_tests::base::{BaseImage, LayerTar};
use kiln_tests::image::{Image, assert_same};
use kiln_tests::kiln::Build;
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::assert_none;
use kiln_tests::process::{Outcome, eventually};
use nix::sys::signal::Signal;
use serde_json::json;

/// No more than these stay on disk for one cache, however many builds there were.
const GENERATIONS: usize = 6;
const SOON: Duration = Duration::from_mins(1);
/// Four steps; the last three depend on `a`, `b` or nothing of the context.
const FOUR: &str =
    "FROM busybox:1\nRUN echo first > /1\nCOPY a /a\nRUN cat /a > /2; date +%N > /time\nCOPY b /b\n";

/// A place for builds of one Dockerfile.
struct Place(Lab);

impl Place {
    fn new(dockerfile: &str) -> Self {
        let lab = Lab::new();
        lab.dockerfile(dockerfile);
        lab.context.file("a", "A").file("b", "B");
        Self(lab)
    }

    /// Builds, and compares the number of cached steps with `expected`.
    fn cached(&self, flags: &[&str], expected: &str) -> Image {
        let outcome = self.run(flags);
        let line = format!("cached {expected} steps\n");
        assert!(outcome.output().contains(&line), "not {line}{}", outcome.output());
        assert_none(&self.0.data(), CLEAN);
        Image::docker_archive(&self.0.archive())
    }

    fn run(&self, flags: &[&str]) -> Outcome {
        self.0.build_archive().args(flags).run().expect_code(0)
    }

    fn generations(&self) -> Vec<PathBuf> {
        entries(&self.0.data().join("store/layers"))
    }

    fn heads(&self) -> Vec<PathBuf> {
        let all = entries(&self.0.data().join("layers"));
        all.into_iter().filter(|path| path.extension().is_some_and(|e| e == "json")).collect()
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn copies(count: usize) -> String {
    (0..count).fold(String::new(), |text, n| format!("{text}COPY a /{n}\n"))
}

fn has(image: &Image, path: &str, content: &str) {
    let entry = image.entry(path).unwrap_or_else(|| panic!("{path} is missing"));
    assert_eq!(entry.content, kiln_tests::base::digest(content.as_bytes()), "content of {path}");
}

#[test]
fn a_second_build_is_the_first_image_again() {
    let place = Place::new(FOUR);
    let first = place.cached(&[], "0/4");
    for _ in 0..2 {
        assert_eq!(place.cached(&[], "4/4").id, first.id);
    }
    assert_eq!(place.generations().len(), 1, "a build with nothing new keeps nothing");
}

#[test]
fn the_number_of_cached_steps_is_in_the_metadata() {
    let place = Place::new(FOUR);
    let path = place.0.path("metadata.json");
    let metadata = format!("--metadata-file={}", path.display());
    for cached in [0, 4] {
        let _ = place.run(&[&metadata]);
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["kiln.cache"], json!({"cached": cached, "total": 4}));
    }
}

#[test]
fn changed_content_counts_from_its_copy_on() {
    let place = Place::new(FOUR);
    let first = place.cached(&[], "0/4");
    place.0.context.file("b", "B2");
    let second = place.cached(&[], "3/4");
    assert_eq!(second.entry("time"), first.entry("time"));
    has(&second, "b", "B2");
    place.0.context.file("a", "A2");
    let third = place.cached(&[], "1/4");
    has(&third, "2", "A2");
    let again = place.cached(&[], "4/4");
    assert_eq!(again.id, third.id);
}

#[test]
fn changed_instructions_count() {
    let place = Place::new(FOUR);
    let _ = place.cached(&[], "0/4");
    place.0.dockerfile(&FOUR.replace("cat /a", "cat /a /1"));
    has(&place.cached(&[], "2/4"), "2", "Afirst\n");
    place.0.dockerfile(&format!("{FOUR}ENV A=b\nRUN echo $A > /3\n"));
    has(&place.cached(&[], "4/6"), "3", "b\n");
    has(&place.cached(&[], "6/6"), "3", "b\n");
}

#[test]
fn a_cached_image_is_what_plain_buildah_makes() {
    let place = Place::new(
        "FROM busybox:1 AS made\nCOPY a /a\nRUN echo made > /made\nFROM busybox:1\nWORKDIR /w\nENV E=1\n\
         COPY --from=made --chown=7:8 /made .\nRUN rm /bin/cat; mkdir -m 1777 /open; ln -s /w/made /link\n\
         USER 65532\nCMD [\"x\"]\n",
    );
    let first = place.0.compare(&[]);
    let second = place.cached(&[], "8/8");
    assert_eq!(second.id, first.id);
    assert_same(&second, &first, true);
    place.0.context.file("b", "not used");
    let flags = ["--label=l=1", "--format=oci"];
    let _ = place.0.compare(&flags);
    let _ = place.0.compare(&flags);
}

#[test]
fn files_of_a_cached_image_are_all_there() {
    let place = Place::new(FOUR);
    let _ = place.cached(&[], "0/4");
    let tar = place.0.path("files.tar");
    let output = format!("type=tar,dest={}", tar.display());
    let _ =
        place.0.build().arg("--output").arg(output).run().expect_code(0).expect_text(&["cached 4/4 steps"]);
    let list = std::process::Command::new("tar").arg("tf").arg(&tar).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    for name in ["1", "2", "a", "b", "bin/busybox"] {
        assert!(list.lines().any(|line| line.trim_start_matches("./") == name), "{name} is missing:\n{list}");
    }
}

/// buildah 1.28 itself would take the old value wherever an instruction but RUN uses it.
#[test]
fn an_argument_counts_wherever_it_is_used() {
    for (instruction, find) in [
        ("RUN echo $A > /x", "echo"),
        ("ENV X=$A", "X=two"),
        ("LABEL x=${A}", "two"),
        ("USER $A", "two"),
        ("WORKDIR /$A", "/two"),
    ] {
        let place = Place::new(&format!("FROM busybox:1\nRUN echo 1 > /1\nARG A=one\n{instruction}\n"));
        let _ = place.run(&[]);
        let _ = place.run(&["--build-arg=A=two"]);
        let image = Image::docker_archive(&place.0.archive());
        if instruction.starts_with("RUN") {
            has(&image, "x", "two\n");
        } else {
            assert!(image.config["config"].to_string().contains(find), "{instruction}: {}", image.config);
        }
        place.0.dockerfile(&format!("FROM busybox:1\nRUN echo 1 > /1\nARG A=three\n{instruction}\n"));
        let _ = place.run(&[]);
        let config = Image::docker_archive(&place.0.archive()).config["config"].to_string();
        assert!(!config.contains("two") && !config.contains("one"), "{instruction}: {config}");
    }
}

/// An argument that only RUN uses, as the commit of a pipeline, leaves the steps before it cached.
#[test]
fn an_argument_of_a_command_counts_only_from_there() {
    let place = Place::new("FROM busybox:1\nRUN echo 1 > /1\nARG A\nRUN echo $A > /x\n");
    let _ = place.cached(&["--build-arg=A=1"], "0/3");
    has(&place.cached(&["--build-arg=A=2"], "2/3"), "x", "2\n");
}

#[test]
fn what_a_step_mounts_counts() {
    for step in ["--mount=source=a,target=/m cat /m > /x", "--mount=from=s,source=/s,target=/m cat /m > /x"] {
        let place = Place::new(&format!("FROM busybox:1 AS s\nCOPY a /s\nFROM busybox:1\nRUN {step}\n"));
        has(&place.cached(&[], if step.contains("from") { "0/2" } else { "0/1" }), "x", "A");
        place.0.context.file("a", "A2");
        let _ = place.run(&[]);
        has(&Image::docker_archive(&place.0.archive()), "x", "A2");
        let again = place.run(&[]);
        assert!(!again.output().contains("cached 0/"), "{}", again.output());
    }
}

#[test]
fn times_and_labels_count() {
    let place = Place::new(FOUR);
    let _ = place.cached(&["--label=gone=1"], "0/5");
    let image = place.cached(&[], "0/4");
    assert!(!image.config.to_string().contains("gone"), "{}", image.config);
    assert_eq!(place.cached(&["--timestamp=7"], "0/4").config["created"], "1970-01-01T00:00:07Z");
    assert_eq!(place.cached(&["--timestamp=8"], "0/4").config["created"], "1970-01-01T00:00:08Z");
    let _ = place.cached(&["--label=l=1"], "0/5");
    let image = place.cached(&["--label=l=2"], "4/5");
    assert_eq!(image.config["config"]["Labels"]["l"], "2");
}

#[test]
fn without_the_cache_everything_runs_and_is_kept() {
    let place = Place::new(FOUR);
    let first = place.cached(&[], "0/4");
    let second = place.cached(&["--no-cache"], "0/4");
    assert_ne!(first.entry("time"), second.entry("time"), "the step did not run");
    assert_eq!(place.cached(&[], "4/4").id, second.id);
}

#[test]
fn a_base_that_moves_counts_though_its_files_are_the_same() {
    let place = Place::new("FROM base:1\nRUN echo $WHO > /who\n");
    let base = |who: &str| BaseImage::busybox().with(json!({"Env": [format!("WHO={who}")]}));
    place.0.registry.push("library/base", "1", &base("one"));
    has(&place.cached(&[], "0/1"), "who", "one\n");
    place.0.registry.push("library/base", "1", &base("two"));
    has(&place.cached(&[], "0/1"), "who", "two\n");
    let other = base("two").layer(LayerTar::default().file("new", 0o644, b"new"));
    place.0.registry.push("library/base", "1", &other);
    has(&place.cached(&[], "0/1"), "new", "new");
    has(&place.cached(&[], "1/1"), "who", "two\n");
}

#[test]
fn another_target_shares_nothing() {
    let place = Place::new("FROM busybox:1 AS one\nRUN echo 1 > /1\nFROM one AS two\nRUN echo 2 > /2\n");
    let _ = place.cached(&["--target=two"], "0/2");
    let _ = place.cached(&["--target=one"], "0/1");
    let _ = place.cached(&["--target=two"], "2/2");
    let _ = place.cached(&["--target=one"], "1/1");
    assert_eq!(place.heads().len(), 2);
}

/// The usual life of a cache: dependencies stay, sources change with every build.
#[test]
fn many_changes_keep_what_they_share_and_little_else() {
    let place = Place::new(FOUR);
    let first = place.cached(&[], "0/4");
    for number in 0..GENERATIONS + 3 {
        place.0.context.file("b", format!("B{number}"));
        assert_eq!(place.cached(&[], "3/4").entry("time"), first.entry("time"), "{number}");
        assert!(place.generations().len() <= GENERATIONS + 1, "{:?}", place.generations());
    }
}

/// One more instruction each time: a generation on a generation on a generation.
#[test]
fn a_dockerfile_that_grows_starts_afresh_now_and_then() {
    let place = Place::new(FOUR);
    let mut text = FOUR.to_owned();
    let mut afresh = 0;
    for number in 0..GENERATIONS + 3 {
        place.0.dockerfile(&text);
        let outcome = place.run(&[]);
        afresh += usize::from(outcome.output().contains("cached 0/"));
        assert!(place.generations().len() <= GENERATIONS + 1, "{:?}", place.generations());
        text = format!("{text}RUN echo {number} > /number-{number}\n");
    }
    assert_eq!(afresh, 2);
    has(&Image::docker_archive(&place.0.archive()), "number-7", "7\n");
}

#[test]
fn an_image_of_many_layers_is_built_without_the_cache() {
    let steps = copies(76);
    let place = Place::new(&format!("FROM busybox:1\n{steps}"));
    let outcome = place.run(&[]);
    assert!(outcome.output().contains("the image may have 77 layers, more than 75"), "{}", outcome.output());
    has(&Image::docker_archive(&place.0.archive()), "75", "A");
    assert!(place.generations().is_empty());
}

/// Then every mount of the last steps has a full page of options.
#[test]
fn an_image_of_as_many_layers_as_are_cached_is_built_on_cached_ones() {
    let steps = copies(34);
    let place = Place::new(&format!("FROM deep:1\n{steps}RUN cp /0 /run\n"));
    let layer = |n: usize| LayerTar::default().file(&format!("base-{n}"), 0o644, b"x");
    let deep = (1..40).fold(BaseImage::busybox(), |image, n| image.layer(layer(n)));
    place.0.registry.push("library/deep", "1", &deep);
    let _ = place.cached(&[], "0/35");
    place.0.dockerfile(&format!("FROM deep:1\n{steps}RUN cp /33 /ran\n"));
    has(&place.cached(&[], "34/35"), "ran", "A");
}

/// Lets steps wait for the test.
struct Gate(TcpListener);

impl Gate {
    fn new() -> Self {
        Self(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
    }

    fn wait(&self) -> String {
        format!("nc 127.0.0.1 {} >/dev/null </dev/null || true", self.0.local_addr().unwrap().port())
    }

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
fn builds_beside_each_other_share_what_was_there_and_both_are_kept() {
    let place = Place::new("FROM busybox:1\nRUN echo common; date +%N > /common\nARG OWN\nENV NOT=last\n");
    let net = "--network=unsafe-host";
    let common = place.cached(&[net, "--build-arg=OWN=none"], "0/3");
    let gate = Gate::new();
    let text = format!(
        "FROM busybox:1\nRUN echo common; date +%N > /common\nARG OWN\nRUN echo $OWN > /own; {}\n",
        gate.wait()
    );
    place.0.dockerfile(&text);
    let start = |own: &str| -> Build {
        let output = format!("docker-archive:{}", place.0.path(own).display());
        let build = place.0.build().arg(net).arg(format!("--build-arg=OWN={own}"));
        build.arg("--output").arg(output).start()
    };
    let builds = [start("one"), start("two")];
    gate.open(2);
    for build in builds {
        let _ = build.wait().expect_code(0).expect_text(&["cached 2/3 steps"]);
    }
    for own in ["one", "two"] {
        let image = Image::docker_archive(&place.0.path(own));
        assert_eq!(image.entry("common"), common.entry("common"));
        has(&image, "own", &format!("{own}\n"));
        let argument = format!("--build-arg=OWN={own}");
        assert_eq!(place.cached(&[net, &argument], "3/3").id, image.id);
    }
}

#[test]
fn prune_all_takes_nothing_from_a_running_build() {
    let gate = Gate::new();
    let place = Place::new(FOUR);
    let net = "--network=unsafe-host";
    let _ = place.cached(&[net], "0/4");
    place.0.dockerfile(&format!("{FOUR}RUN {}; [ -e /a ]\n", gate.wait()));
    let build = place.0.build_archive().arg(net).start();
    build.expect_output("STEP 6/6");
    let _ = place.0.kiln("prune").arg("--all").run().expect_code(0).expect_text(&[" 0 of layers"]);
    assert_eq!(place.generations().len(), 1);
    gate.open(1);
    let _ = build.wait().expect_code(0).expect_text(&["cached 4/5 steps", "was emptied meanwhile"]);
    let _ = place.0.kiln("prune").run().expect_code(0).expect_text(&[" 1 of layers"]);
    assert!(place.generations().is_empty() && place.heads().is_empty());
}

#[test]
fn prune_keeps_what_fits_and_prune_all_forgets() {
    let place = Place::new(FOUR);
    let _ = place.cached(&[], "0/4");
    let _ = place.0.kiln("prune").run().expect_code(0).expect_text(&[" 0 of layers"]);
    let _ = place.cached(&[], "4/4");
    let _ = place.0.kiln("prune").arg("--all").run().expect_code(0).expect_text(&[" 1 of layers"]);
    assert_eq!(entries(&place.0.data().join("layers")), [place.0.data().join("layers/lock")]);
    let _ = place.cached(&[], "0/4");
}

#[test]
fn layers_above_the_limit_are_not_kept() {
    let place =
        Place::new("FROM busybox:1\nRUN echo small > /small\nRUN dd if=/dev/zero of=/big bs=64k count=40\n");
    place.0.configure(&place.0.registry.host(), "[data]\nmax_layer_cache_bytes = \"2MiB\"\n");
    let outcome = place.run(&[]);
    assert!(
        outcome.output().contains("more than data.max_layer_cache_bytes = 2097152"),
        "{}",
        outcome.output()
    );
    assert!(place.generations().is_empty());
    place.0.dockerfile("FROM busybox:1\nRUN echo small > /small\n");
    let _ = place.cached(&[], "0/1");
    let _ = place.cached(&[], "1/1");
}

#[test]
fn a_failed_build_keeps_nothing_and_forgets_nothing() {
    let place = Place::new(FOUR);
    let _ = place.cached(&[], "0/4");
    place.0.dockerfile(&format!("{FOUR}RUN exit 3\n"));
    let _ = place.0.fails(&[], 1);
    assert_eq!(place.generations().len(), 1);
    place.0.dockerfile(FOUR);
    let _ = place.cached(&[], "4/4");
}

/// The crash points of a promotion are: before the rename, before the head, before the old head is gone.
#[test]
fn a_generation_that_was_never_announced_is_forgotten() {
    let place = Place::new(FOUR);
    let _ = place.cached(&[], "0/4");
    let head = place.heads().remove(0);
    let before = std::fs::read(&head).unwrap();
    place.0.context.file("b", "B2");
    let _ = place.cached(&[], "3/4");
    std::fs::write(&head, before).unwrap();
    std::fs::write(head.with_file_name(".tmphalf"), "{\"chain\":[").unwrap();
    has(&place.cached(&[], "3/4"), "b", "B2");
    let _ = place.cached(&[], "4/4");
    assert_eq!(place.generations().len(), 2);
    assert!(!head.with_file_name(".tmphalf").exists());
}

#[test]
fn a_damaged_cache_is_an_empty_one() {
    let place = Place::new(FOUR);
    let _ = place.cached(&[], "0/4");
    for damage in ["", "{\"chain\":[0", "[]"] {
        std::fs::write(&place.heads()[0], damage).unwrap();
        let _ = place.cached(&[], "0/4");
    }
    for generation in place.generations() {
        std::fs::rename(&generation, generation.with_extension("aside")).unwrap();
    }
    let _ = place.cached(&[], "0/4");
    let _ = place.cached(&[], "4/4");
}

/// Killed as soon as its generation has a name, which is before, while or after it is announced.
#[test]
fn a_kill_while_layers_are_kept_leaves_a_usable_cache() {
    let place = Place::new(FOUR);
    let _ = place.cached(&[], "0/4");
    for round in 1..=4 {
        place.0.context.file("b", format!("B{round}"));
        let before = place.generations();
        let build = place.0.build_archive().start();
        let renamed = eventually(SOON, || place.generations().iter().any(|name| !before.contains(name)));
        let outcome = build.stop(Signal::SIGKILL);
        assert!(renamed, "{}", outcome.output());
        let next = place.run(&[]);
        let found = ["cached 3/4 steps", "cached 4/4 steps"].iter().any(|text| next.output().contains(text));
        assert!(found, "{}", next.output());
        has(&Image::docker_archive(&place.0.archive()), "b", &format!("B{round}"));
    }
    assert_none(&place.0.data(), CLEAN);
    let _ = place.run(&[]);
    let named = std::fs::read_to_string(&place.heads()[0]).unwrap();
    for generation in place.generations() {
        let name = generation.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(named.contains(&name), "{name} is left over");
    }
}

/// buildah 1.28 follows a link that a stage brings along, so any Dockerfile gets the job's directory.
const JOB_FROM_INSIDE: &str = "FROM busybox:1 AS evil\nRUN ln -s /job /j\nFROM busybox:1\n";

/// A step that rewrites its own store spoils its own cache. Nobody else's, and not for ever.
#[test]
fn a_spoilt_store_reaches_nobody_else_and_is_forgotten() {
    let victim = "FROM busybox:1\nRUN echo good > /file\n";
    let place = Place::new(victim);
    let good = place.cached(&[], "0/1");
    let mount = "--mount=type=bind,from=evil,source=/j,target=/x,rw";
    for spoil in [
        "echo '[{' > /x/root/overlay-layers/layers.json",
        "for f in /x/root/overlay/*/diff/file; do echo evil > $f; done",
        "rm -rf /x/root/overlay-images; mkfifo /x/root/overlay-images",
        "rm -rf /x/root; ln -s /var/tmp /x/root",
    ] {
        // After the layers of this step are made only what a survivor does would count, and none survives.
        let text = format!(
            "{JOB_FROM_INSIDE}RUN echo mine > /file\nRUN {mount} {spoil}; true\nRUN echo end > /end\n"
        );
        place.0.dockerfile(&text);
        let _ = place.0.build_archive().arg("--timeout=60s").run();
        for generation in place.generations() {
            assert!(generation.symlink_metadata().unwrap().is_dir(), "{}", generation.display());
        }
        place.0.dockerfile(victim);
        assert_eq!(place.cached(&[], "1/1").id, good.id, "{spoil}");
    }
    assert_none(&place.0.data(), CLEAN);
}

/// Whatever is wrong with a generation, it costs one build.
#[test]
fn a_generation_that_buildah_cannot_read_is_not_used_again() {
    let place = Place::new(FOUR);
    let garbage = |path: &Path| std::fs::write(path, "[{").unwrap();
    let endless = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // buildah passes over the one, and waits for the other.
    for (spoil, doubted) in [(garbage as fn(&Path), false), (endless, true)] {
        let _ = place.cached(&["--no-cache"], "0/4");
        let head = std::fs::read_to_string(&place.heads()[0]).unwrap();
        let named = |path: &PathBuf| path.file_name().is_some_and(|n| head.contains(n.to_str().unwrap()));
        for generation in place.generations().into_iter().filter(named) {
            // A copy of its form: an ordinary user cannot change what belongs to subordinate ids.
            std::fs::rename(&generation, generation.with_extension("aside")).unwrap();
            for name in ["overlay", "overlay-images", "overlay-layers"] {
                std::fs::create_dir_all(generation.join(name)).unwrap();
            }
            for name in
                ["overlay-images/images.lock", "overlay-layers/layers.lock", "overlay-layers/layers.json"]
            {
                std::fs::write(generation.join(name), "[]").unwrap();
            }
            spoil(&generation.join("overlay-images/images.json"));
        }
        let outcome = place.0.build_archive().arg("--timeout=20s").run();
        let output = outcome.output();
        assert_eq!(output.contains("the cached layers are not used again"), doubted, "{output}");
        let _ = place.run(&[]);
        let _ = place.cached(&[], "4/4");
    }
}
