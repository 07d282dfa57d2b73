//! What a RUN step reaches and what it does not, on a host and beyond it that exist for one test only.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_tests::kiln::Kiln;
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::assert_dead;
use kiln_tests::process::{Outcome, with_argument};
use kiln_tests::site::Site;
use kiln_tests::world::{
    ELSEWHERE, HOST, HOST_ALIAS, HOST6, INTERNAL, METADATA, PUBLIC, Plan, SERVER, World, give, within,
};
use nix::sys::signal::Signal;

/// Says of each argument whether a web server answers there.
const PROBE: &str = r#"for target in "$@"; do
    answer=$(busybox timeout 5 wget -q -O - "http://$target/probe" 2>&1) && answer=HTTP/
    case $answer in
        *HTTP/*) echo "reached $target" ;;
        *) echo "closed $target ($answer)" ;;
    esac
done
"#;
/// slirp4netns' own network: its gateway, its name server, the slot itself, nobody, everybody.
const USER_MODE: [Ipv4Addr; 5] =
    [GATEWAY, Ipv4Addr::new(10, 0, 2, 3), SLOT, Ipv4Addr::new(10, 0, 2, 4), Ipv4Addr::new(10, 0, 2, 255)];
/// Stands for the host's loopback unless slirp4netns is told otherwise.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Every slot has this address, in a network of its own.
const SLOT: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);
/// The probe has 5 s; a busy machine may take as long for the rest.
const UNFIT_WITHIN: Duration = Duration::from_secs(10);
const ISOLATED: &str = "--network=isolated";

/// The targets that a RUN step of an otherwise empty build reached.
fn reached(lab: &Lab, targets: &[String], flag: &str) -> Vec<String> {
    let outcome = probe(lab, targets).arg(flag).run().expect_code(0);
    let answers = answers(&outcome);
    let tried = outcome.output().lines().filter(|line| line.starts_with("closed ")).count() + answers.len();
    assert_eq!(tried, targets.len(), "not every target was tried:\n{}", outcome.output());
    answers
}

fn probe(lab: &Lab, targets: &[String]) -> Kiln {
    lab.context.file("probe", PROBE);
    lab.dockerfile(&format!("FROM busybox:1\nCOPY probe /probe\nRUN sh /probe {}\n", targets.join(" ")));
    // A step found in the cache reaches nothing.
    lab.build().arg("--no-cache")
}

fn answers(outcome: &Outcome) -> Vec<String> {
    let output = outcome.output();
    output.lines().filter_map(|line| line.strip_prefix("reached ")).map(str::to_owned).collect()
}

fn targets(addresses: impl IntoIterator<Item = impl Into<IpAddr>>, port: u16) -> Vec<String> {
    addresses.into_iter().map(|address| target(address, port)).collect()
}

fn target(address: impl Into<IpAddr>, port: u16) -> String {
    SocketAddr::new(address.into(), port).to_string()
}

/// A web server beyond the host, on all its addresses.
fn beyond(world: &World) -> Site {
    world.beyond(|| Site::start(Ipv4Addr::UNSPECIFIED))
}

#[test]
fn isolated_reaches_servers_beyond_the_host() {
    within("isolated_reaches_servers_beyond_the_host", &Plan::default(), |world| {
        let site = beyond(world);
        let mut wanted = targets([SERVER, ELSEWHERE, PUBLIC], site.port());
        wanted.push(format!("packages.test:{}", site.port()));
        let lab = Lab::new();
        assert_eq!(reached(&lab, &wanted, ISOLATED), wanted);
        let questions = world.resolver.questions();
        assert!(
            !questions.is_empty() && questions.iter().all(|name| name == "packages.test"),
            "{questions:?}"
        );
    });
}

#[test]
fn isolated_does_not_reach_the_host() {
    within("isolated_does_not_reach_the_host", &Plan::default(), |world| {
        let everywhere = Site::start(Ipv4Addr::UNSPECIFIED);
        let loopback = Site::start(Ipv4Addr::LOCALHOST);
        let version6 = Site::start(Ipv6Addr::UNSPECIFIED);
        let metadata = beyond(world);
        let lab = Lab::new();
        let mut of_host = targets([Ipv4Addr::LOCALHOST, HOST, HOST_ALIAS], everywhere.port());
        of_host.push(target(Ipv4Addr::LOCALHOST, loopback.port()));
        of_host.extend(targets([Ipv6Addr::LOCALHOST, HOST6], version6.port()));
        of_host.push(target(HOST, version6.port()));
        of_host.push(lab.registry.host());
        of_host.push(target(METADATA, metadata.port()));
        assert_eq!(reached(&lab, &of_host, "--network=unsafe-host"), of_host, "nothing else can be shown");
        let before = [&everywhere, &loopback, &version6, &metadata].map(|site| site.requests().len());

        let mut closed = of_host;
        for port in [everywhere.port(), loopback.port(), lab.registry.address().port()] {
            closed.extend(targets(USER_MODE, port));
            closed.push(target(Ipv4Addr::UNSPECIFIED, port));
        }
        closed.push(format!("host.containers.internal:{}", everywhere.port()));
        assert_eq!(reached(&lab, &closed, ISOLATED), [""; 0]);
        let after = [&everywhere, &loopback, &version6, &metadata].map(|site| site.requests().len());
        assert_eq!(before, after, "a connection arrived");
    });
}

/// A resolver on the host's loopback is usual. Its name service is meant to be reached, nothing else.
#[test]
fn a_resolver_on_loopback_opens_no_other_port() {
    let resolver = Ipv4Addr::new(127, 0, 0, 53);
    let plan = Plan { resolver: Some(resolver), ..Plan::default() };
    within("a_resolver_on_loopback_opens_no_other_port", &plan, |world| {
        let beyond = beyond(world);
        let (beside, everywhere) = (Site::start(resolver), Site::start(Ipv4Addr::UNSPECIFIED));
        let lab = Lab::new();
        let by_name = format!("packages.test:{}", beyond.port());
        let mut all = vec![by_name.clone()];
        for port in [beside.port(), everywhere.port()] {
            all.extend(targets(USER_MODE, port));
            all.push(target(resolver, port));
        }
        assert_eq!(reached(&lab, &all, ISOLATED), [by_name]);
        assert_eq!((beside.requests(), everywhere.requests()), (Vec::new(), Vec::new()));
    });
}

#[test]
fn none_has_no_interface_but_loopback() {
    within("none_has_no_interface_but_loopback", &Plan::default(), |world| {
        let site = beyond(world);
        let lab = Lab::new();
        let step = "ip -o link && ip route && ip -6 route && echo interfaces: $(ls /sys/class/net)";
        lab.dockerfile(&format!("FROM busybox:1\nRUN {step}\n"));
        let look = |flag: &str| lab.build().arg(flag).run().expect_code(0).output();
        let links = |output: &str| -> Vec<String> {
            let lines = output
                .lines()
                .filter_map(|line| line.split_once(": ").filter(|(n, _)| n.parse::<u8>().is_ok()));
            lines.map(|(_, rest)| rest.split([':', '@']).next().unwrap().to_owned()).collect()
        };
        let none = look("--network=none");
        assert_eq!(links(&none), ["lo"], "{none}");
        assert!(none.contains("interfaces: lo\n") && !none.contains("default"), "{none}");
        assert_eq!(links(&look(ISOLATED)), ["lo", "tap0"]);
        assert_eq!(reached(&lab, &[target(SERVER, site.port())], "--network=none"), [""; 0]);
        assert_eq!(site.requests(), [""; 0]);
    });
}

/// The same rights as root inside the slot has: they are rights over nothing of the network.
#[test]
fn a_step_cannot_change_its_network() {
    within("a_step_cannot_change_its_network", &Plan::default(), |world| {
        let metadata = beyond(world);
        let lab = Lab::new();
        let host = Site::start(Ipv4Addr::UNSPECIFIED);
        lab.context.file("probe", PROBE);
        let change = format!(
            "for route in {HOST} 169.254.0.0/16 0.0.0.0/8; do ip route del prohibit $route; ip route del $route; done; \
             ip route add {HOST} via 10.0.2.2; ip route add {METADATA} via 10.0.2.2; ip rule add table 7 pref 1; \
             ip addr add {HOST}/32 dev tap0; ip link set tap0 down; ip route show"
        );
        let probes = [target(HOST, host.port()), target(METADATA, metadata.port())].join(" ");
        lab.dockerfile(&format!(
            "FROM busybox:1\nCOPY probe /probe\nRUN {change}\nRUN sh /probe {probes} {}\n",
            target(SERVER, metadata.port())
        ));
        let outcome = lab.build().run().expect_code(0).expect_text(&["Operation not permitted"]);
        assert_eq!(answers(&outcome), [target(SERVER, metadata.port())], "{}", outcome.output());
    });
}

/// The allowed networks by themselves, and a name service to find them. The host stays closed.
#[test]
fn allow_restricts_to_the_listed_networks() {
    within("allow_restricts_to_the_listed_networks", &Plan::default(), |world| {
        let (site, host) = (beyond(world), Site::start(Ipv4Addr::UNSPECIFIED));
        let lab = Lab::new();
        let by_name = format!("packages.test:{}", site.port());
        let mut all = targets([SERVER, ELSEWHERE, PUBLIC, METADATA], site.port());
        all.push(by_name.clone());
        all.extend(targets([HOST, HOST_ALIAS, Ipv4Addr::LOCALHOST], host.port()));
        let try_with = |allow: &str| {
            lab.configure(&lab.registry.host(), &format!("[network]\nallow = [{allow}]\n"));
            reached(&lab, &all, ISOLATED)
        };
        let at = |address: Ipv4Addr| target(address, site.port());
        assert_eq!(try_with(&format!("\"{INTERNAL}\"")), [at(SERVER), by_name.clone()]);
        assert_eq!(try_with(&format!("\"{ELSEWHERE}\", \"{PUBLIC}/31\"")), [at(ELSEWHERE), at(PUBLIC)]);
        assert_eq!(try_with(&format!("\"{HOST}\", \"{HOST_ALIAS}/30\"")), [""; 0]);
        assert_eq!(try_with(""), [""; 0]);
        assert_eq!(host.requests(), [""; 0]);
        assert!(world.resolver.questions().len() >= 4, "names are answered whatever is allowed");
    });
}

/// Networks that coincide with routes that Kiln or slirp4netns make themselves.
#[test]
fn allow_means_what_it_says_at_its_limits() {
    within("allow_means_what_it_says_at_its_limits", &Plan::default(), |world| {
        let (site, host) = (beyond(world), Site::start(Ipv4Addr::UNSPECIFIED));
        let lab = Lab::new();
        let at = |addresses: &[Ipv4Addr]| targets(addresses.iter().copied(), site.port());
        let mut all = at(&[SERVER, ELSEWHERE, PUBLIC, METADATA]);
        all.extend(targets([HOST, Ipv4Addr::LOCALHOST, GATEWAY], host.port()));
        for (allow, expected) in [
            ("0.0.0.0/0", at(&[SERVER, ELSEWHERE, PUBLIC])),
            ("0.0.0.0/1", at(&[SERVER])),
            ("128.0.0.0/1", at(&[ELSEWHERE, PUBLIC])),
            ("169.0.0.0/8", Vec::new()),
        ] {
            lab.configure(&lab.registry.host(), &format!("[network]\nallow = [\"{allow}\"]\n"));
            assert_eq!(reached(&lab, &all, ISOLATED), expected, "allow = {allow}");
        }
        for never in ["169.254.169.254", "169.254.0.0/16", "127.0.0.0/8", "0.0.0.0/8"] {
            lab.configure(&lab.registry.host(), &format!("[network]\nallow = [\"{never}\"]\n"));
            let _ = probe(&lab, &all).run().expect_code(2).expect_text(&[never, "RUN never reaches it"]);
        }
    });
}

/// Where the user-mode network cannot start, the build says so soon and names the way out.
fn unfit(name: &str, place: &str, cover: impl FnOnce(&Path) -> PathBuf, says: &str) {
    let dir = tempfile::Builder::new().prefix("kiln-cover-").tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    give(dir.path());
    let plan = Plan { covers: vec![(place.into(), cover(dir.path()))], ..Plan::default() };
    within(name, &plan, |_| {
        let lab = Lab::new();
        lab.dockerfile("FROM busybox:1\nRUN true\n");
        let _ = lab.build().arg("--network=none").run().expect_code(0);
        let outcome = lab.fails(&[], 5);
        let outcome = outcome.expect_text(&["node_unfit", "slirp4netns", says, "--network=none"]);
        assert!(outcome.elapsed < UNFIT_WITHIN, "it took {:?}", outcome.elapsed);
        let _ = lab
            .kiln("doctor")
            .run()
            .expect_code(0)
            .expect_text(&["limited  isolated network", "--network=none"]);
    });
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn file(dir: &Path, contents: &str, mode: u32) -> PathBuf {
    let path = dir.join("file");
    std::fs::write(&path, contents).unwrap();
    set_mode(&path, mode);
    path
}

const SLIRP: &str = "/usr/bin/slirp4netns";

#[test]
fn slirp4netns_that_is_not_there_is_named() {
    let cover = |dir: &Path| file(dir, "", 0o644);
    unfit("slirp4netns_that_is_not_there_is_named", SLIRP, cover, "ermission denied");
}

#[test]
fn slirp4netns_that_fails_is_quoted() {
    let cover = |dir: &Path| file(dir, "#!/bin/sh\necho 'out of clouds' >&2\nexit 3\n", 0o755);
    unfit("slirp4netns_that_fails_is_quoted", SLIRP, cover, "out of clouds");
}

#[test]
fn slirp4netns_that_hangs_is_given_up() {
    let mark = format!("sleep 8{}.5", std::process::id());
    let cover = |dir: &Path| file(dir, &format!("#!/bin/sh\nexec {mark}\n"), 0o755);
    unfit("slirp4netns_that_hangs_is_given_up", SLIRP, cover, "no answer within");
    assert_dead(&with_argument(&mark), CLEAN);
}

/// What it starts may hold its streams after it was killed.
#[test]
fn slirp4netns_that_hangs_with_a_child_is_given_up() {
    let mark = format!("sleep 9{}.5", std::process::id());
    let _stray = Stray(mark.clone());
    let cover = |dir: &Path| file(dir, &format!("#!/bin/sh\n{mark}\n"), 0o755);
    unfit("slirp4netns_that_hangs_with_a_child_is_given_up", SLIRP, cover, "no answer within");
    assert_dead(&with_argument(&mark), CLEAN);
}

/// Nobody is left behind by a test that fails.
struct Stray(String);

impl Drop for Stray {
    fn drop(&mut self) {
        for left in with_argument(&self.0).iter().filter(|p| p.command.starts_with("sleep")) {
            left.signal(Signal::SIGKILL);
        }
    }
}

#[test]
fn slirp4netns_that_talks_without_end_is_given_up() {
    let cover = |dir: &Path| file(dir, "#!/bin/sh\nexec yes complaint >&2\n", 0o755);
    unfit("slirp4netns_that_talks_without_end_is_given_up", SLIRP, cover, "no answer within");
}

#[test]
fn a_tun_device_that_is_closed_is_named() {
    let cover = |dir: &Path| file(dir, "", 0o600);
    unfit("a_tun_device_that_is_closed_is_named", "/dev/net/tun", cover, "ermission denied");
}

#[test]
fn a_tun_device_that_is_missing_is_named() {
    let cover = |dir: &Path| {
        let empty = dir.join("empty");
        std::fs::create_dir(&empty).unwrap();
        set_mode(&empty, 0o755);
        empty
    };
    unfit("a_tun_device_that_is_missing_is_named", "/dev/net", cover, "/dev/net/tun");
}

/// Answers on every address that the slot has, and says so once it does.
const LISTEN: &str = r#"(while printf 'HTTP/1.0 200 OK\r\n\r\n' | nc -l -p PORT >/dev/null; do :; done) &
for target in "$@"; do
    until sh /probe "$target" | grep reached; do :; done
done
echo up and listening
while :; do sleep 1; done
"#;

/// One step listens on every address that it has, and another looks for it there.
#[test]
fn builds_beside_each_other_do_not_meet() {
    within("builds_beside_each_other_do_not_meet", &Plan::default(), |_| {
        const PORT: u16 = 7391;
        let lab = Lab::new();
        let mine = targets([Ipv4Addr::LOCALHOST, SLOT], PORT);
        lab.context.file("probe", PROBE).file("listen", LISTEN.replace("PORT", &PORT.to_string()));
        let text = format!("FROM busybox:1\nCOPY probe listen /\nRUN sh /listen {}\n", mine.join(" "));
        std::fs::write(lab.path("first"), text).unwrap();
        let first = lab.kiln("build").arg("--file").arg(lab.path("first")).arg(lab.context.path()).start();
        first.expect_output("up and listening");
        let said = first.running.stdout.text();
        assert_eq!(said.matches("reached ").count(), mine.len(), "the listener answers nobody: {said}");
        let mut tried = mine;
        tried.extend(targets([GATEWAY, Ipv4Addr::UNSPECIFIED, HOST], PORT));
        assert_eq!(reached(&lab, &tried, ISOLATED), [""; 0]);
        let _ = first.stop(Signal::SIGTERM).expect_code(130);
    });
}
