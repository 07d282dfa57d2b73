//! Behind a company's proxy, which opens TLS with certificates of its own: RUN and fetch work, the image does
//! not show it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, SocketAddr};

use kiln_tests::base::{BaseImage, digest};
use kiln_tests::image::Image;
use kiln_tests::intercept::{InterceptingProxy, contains_certificate};
use kiln_tests::lab::Lab;
use kiln_tests::registry::{Access, Registry};
use kiln_tests::site::{Site, content};
use kiln_tests::tools;
use kiln_tests::tree::containing;
use kiln_tests::world::{Plan, SERVER, World, within};

const PACKAGES: &str = "packages.internal.test";
const REGISTRY: &str = "registry.internal.test";
/// Part of the proxy's address as the configuration gives it; it must be nowhere else.
const PASSWORD: &str = "canary-proxy-51c9";

/// What is behind the proxy, and the place to build.
struct Company {
    lab: Lab,
    proxy: InterceptingProxy,
    packages: Site,
    _registry: Registry,
}

impl Company {
    /// Servers on the loopback interface beyond the host, where only the proxy reaches them.
    fn new(world: &World) -> Self {
        let lab = Lab::new();
        lab.registry.push("tools/curl", "1", &tools::curl());
        let (packages, registry, proxy) = world.beyond(|| {
            let packages = Site::start(Ipv4Addr::LOCALHOST);
            let registry = Registry::start(Access::Open);
            registry.push("base", "1", &BaseImage::busybox());
            let hosts = [(PACKAGES, packages.address()), (REGISTRY, registry.address())];
            let proxy = InterceptingProxy::start(SocketAddr::new(SERVER.into(), 0), &hosts);
            (packages, registry, proxy)
        });
        let company = Self { lab, proxy, packages, _registry: registry };
        company.configure(&company.trust());
        company
    }

    fn configure(&self, trust: &str) {
        let url = self.url();
        let text = format!(
            "[build]\n{trust}\n[build.proxy]\nhttp = \"{url}\"\nhttps = \"{url}\"\nno_proxy = \"127.0.0.1\"\n"
        );
        self.lab.configure(&self.lab.registry.host(), &text);
    }

    fn trust(&self) -> String {
        format!("ca = \"{}\"", self.proxy.ca().display())
    }

    fn url(&self) -> String {
        self.proxy.url().replace("http://", &format!("http://builder:{PASSWORD}@"))
    }

    /// Fails the test if anything of the proxy is in the image or in what Kiln keeps.
    fn assert_unseen(&self, image: &Image) {
        let archive = std::fs::read(self.lab.archive()).unwrap();
        assert!(!contains_certificate(&archive, &self.proxy.ca()), "the authority is in the image");
        let address = self.proxy.url().replace("http://", "");
        let needles = [address, PASSWORD.to_owned()];
        let found = containing(self.lab.archive().parent().unwrap(), &needles);
        let place = self.lab.path("kiln.toml");
        assert_eq!(found, [place], "only the configuration may name the proxy");
        let text = image.config.to_string().to_ascii_lowercase();
        assert!(!text.contains("proxy") && !text.contains("ca.pem"), "{text}");
    }
}

/// What buildah leaves behind in every layer of RUN, proxy or not.
const BUILDAHS_OWN: [&str; 5] = ["etc", "etc/hostname", "etc/hosts", "etc/resolv.conf", "run"];

/// The paths that the build itself added or changed, directories included.
fn written(image: &Image, base_layers: usize) -> Vec<String> {
    let paths = image.layers[base_layers..].iter().flat_map(|layer| layer.keys().cloned());
    paths.filter(|path| !BUILDAHS_OWN.contains(&path.as_str())).collect()
}

#[test]
fn a_step_downloads_through_it_and_verifies() {
    within("a_step_downloads_through_it_and_verifies", &Plan::default(), |world| {
        let company = Company::new(world);
        company.lab.dockerfile(&format!(
            "FROM tools/curl:1\nRUN curl -fsS https://{PACKAGES}/secure -o /secure && curl -fsS http://{PACKAGES}/plain -o /plain\n"
        ));
        let image = company.lab.image(&[]);
        for name in ["secure", "plain"] {
            let wanted = digest(content(&format!("/{name}")).as_bytes());
            assert_eq!(image.entry(name).unwrap().content, wanted);
        }
        assert_eq!(company.packages.requests(), ["/secure", "/plain"]);
        assert_eq!(company.proxy.count(&format!("GET https://{PACKAGES}/secure")), 1);
        assert_eq!(company.proxy.count(&format!("GET http://{PACKAGES}/plain")), 1);
        assert_eq!(written(&image, 2), ["plain", "secure"]);
        company.assert_unseen(&image);
        assert_eq!(world.resolver.questions(), [""; 0], "only the proxy knows names");
    });
}

#[test]
fn without_its_authority_nothing_is_trusted() {
    within("without_its_authority_nothing_is_trusted", &Plan::default(), |world| {
        let company = Company::new(world);
        company.configure("");
        company
            .lab
            .dockerfile(&format!("FROM tools/curl:1\nRUN curl -fsS https://{PACKAGES}/secure -o /secure\n"));
        let _ = company.lab.fails(&[], 1).expect_text(&["curl: (60)"]);
        assert_eq!(company.proxy.count("CONNECT"), 1);
        assert_eq!(company.packages.requests(), [""; 0]);
        company.lab.dockerfile(&format!("FROM {REGISTRY}/base:1\n"));
        let _ =
            company.lab.fails(&[], 2).expect_text(&["the certificate of the server is not trusted", "ca"]);
    });
}

/// The usual shape: what was downloaded goes into an image without a bundle and without RUN.
#[test]
fn a_last_stage_without_run_gets_only_what_is_copied() {
    within("a_last_stage_without_run_gets_only_what_is_copied", &Plan::default(), |world| {
        let company = Company::new(world);
        company.lab.dockerfile(&format!(
            "FROM tools/curl:1 AS download\nRUN curl -fsS https://{PACKAGES}/a -o /a\n\
             FROM busybox:1\nCOPY --from=download /a /\n"
        ));
        let image = company.lab.image(&[]);
        assert_eq!(written(&image, 1), ["a"]);
        company.assert_unseen(&image);
    });
}

/// The bundle is mounted where a base has one. Another base of the same build has none, and its RUN must not
/// leave an empty file there, which would trust nobody.
#[test]
fn no_stub_is_left_in_any_stage() {
    within("no_stub_is_left_in_any_stage", &Plan::default(), |world| {
        let company = Company::new(world);
        company.lab.dockerfile(
            "FROM tools/curl:1 AS one\nRUN echo a > /a\nFROM busybox:1 AS two\nRUN mkdir /t && echo b > /t/b\n\
             FROM busybox:1\nRUN echo c > /c\nCOPY --from=one /a /\nCOPY --from=two /etc /t/\n",
        );
        let image = company.lab.image(&[]);
        let stubs: Vec<_> = written(&image, 1).into_iter().filter(|path| path.contains("ssl")).collect();
        assert_eq!(stubs, [""; 0]);
        company.assert_unseen(&image);
    });
}

#[test]
fn images_are_fetched_through_it() {
    within("images_are_fetched_through_it", &Plan::default(), |world| {
        let company = Company::new(world);
        company.lab.dockerfile(&format!("FROM {REGISTRY}/base:1\nRUN echo a > /a\n"));
        let image = company.lab.image(&[]);
        assert_eq!(written(&image, 1), ["a"]);
        assert_eq!(company.proxy.count(&format!("GET https://{REGISTRY}/v2/base/manifests/1")), 1);
        assert!(company.proxy.count(&format!("GET https://{REGISTRY}/v2/base/blobs/")) >= 2);
        company.assert_unseen(&image);
        assert_eq!(world.resolver.questions(), [""; 0], "only the proxy knows names");
    });
}
