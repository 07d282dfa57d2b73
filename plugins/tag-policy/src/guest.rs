//! Edge: the contract's hooks, connected with the rules.

#[allow(missing_docs, unreachable_pub, clippy::pedantic, reason = "generated from the contract")]
mod bindings {
    wit_bindgen::generate!({ world: "everything", path: "../../wit/v1" });
}

use bindings::exports::kiln::plugin::{post_push, pre_build, setup};
use bindings::kiln::plugin::effects::Report;
use bindings::kiln::plugin::host;
use bindings::kiln::plugin::input::{Build, Image};
use bindings::kiln::plugin::types::{Fault, Verdict, Violation};

use crate::policy::{self, Finding, Moves};
use crate::settings::Settings;

struct TagPolicy;

impl setup::Guest for TagPolicy {
    fn validate_settings(settings: String) -> Result<(), Vec<Violation>> {
        Settings::parse(&settings)
            .map(|_| ())
            .map_err(|problems| problems.into_iter().map(|message| violation("settings", message)).collect())
    }
}

impl pre_build::Guest for TagPolicy {
    fn check(build: &Build, _report: &Report) -> Result<Verdict, Fault> {
        let now = |tag: &str| build.tag_digest(tag);
        judge(&build.repository(), &build.tags(), Moves::BeforeBuild(&now))
    }
}

impl post_push::Guest for TagPolicy {
    fn check(image: &Image, _report: &Report) -> Result<Verdict, Fault> {
        let build = image.build();
        let now = |tag: &str| build.tag_digest(tag);
        let pushed = image.digest();
        judge(&image.repository(), &image.tags(), Moves::To { digest: &pushed, now: &now })
    }
}

fn judge(repository: &str, tags: &[String], moves: Moves<'_>) -> Result<Verdict, Fault> {
    let settings =
        Settings::parse(&host::settings()).map_err(|problems| Fault::InvalidSettings(problems.join("; ")))?;
    let found = policy::check(&settings, repository, tags, moves);
    let found: Vec<Violation> =
        found.into_iter().map(|Finding { rule, message }| violation(rule, message)).collect();
    Ok(if found.is_empty() { Verdict::Allow } else { Verdict::Deny(found) })
}

fn violation(rule: &str, message: String) -> Violation {
    Violation { rule: rule.to_owned(), message, severity: "error".to_owned(), at: None, help_url: None }
}

bindings::export!(TagPolicy with_types_in bindings);
