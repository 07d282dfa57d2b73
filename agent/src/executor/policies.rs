//! What the policies say before anything is built (shell).

use std::io::Seek as _;
use std::sync::Arc;

use kiln_protocol::request::BuildRequest;
use kiln_protocol::result::{Failure, Location, Phase};
use kiln_protocol::verdict::{self, Verdict};
use kiln_protocol::{Digest, Reason};
use serde_json::json;
use sha2::Digest as _;

use super::{Attempt, Planned, Resolved, Run};
use crate::error::chain;
use crate::hooks::HookHost;
use crate::hooks::view::{BaseImageView, BuildArg, BuildView, ContextView, TagView, instructions};
use crate::registry::Platform;

/// Policies, and what they need to know beyond the request.
#[derive(Debug)]
pub struct Policies {
    /// The loaded plugins.
    pub host: Arc<HookHost>,
    /// Who asked for the build.
    pub requester: String,
    /// sha256 of the packed context.
    pub context: Digest,
    /// Where the image goes; empty if nowhere.
    pub places: Vec<Place>,
}

/// A repository, and the tags that are to move there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Host and path.
    pub repository: String,
    /// Tags, and what they show now.
    pub tags: Vec<TagView>,
}

impl Run {
    /// Every policy must let the build pass, for every repository.
    pub(super) async fn ask_policies(&mut self, planned: &Planned, resolved: &[Resolved]) -> Attempt<()> {
        let Some(policies) = self.policies.take() else { return Ok(()) };
        let common = self.common_view(&policies, planned, resolved).await?;
        let nowhere = Place { repository: String::new(), tags: Vec::new() };
        let places = if policies.places.is_empty() { vec![nowhere] } else { policies.places };
        for Place { repository, tags } in places {
            let mut view = BuildView { repository, tags, ..common.clone() };
            view.input_digest = input_digest(&view, &self.request, &policies.context);
            let view = Arc::new(view);
            let verdicts = policies.host.pre_build(Arc::clone(&view), &self.stop).await;
            self.agent.metrics.asked(&verdicts);
            self.tell_verdicts(&verdicts).await;
            self.verdicts.extend(verdicts);
            self.views.push(view);
        }
        judged(&self.verdicts).map_err(|failure| Failure { phase: self.phase, ..failure })
    }

    async fn tell_verdicts(&self, verdicts: &[Verdict]) {
        for verdict in verdicts {
            for line in verdict_lines(verdict) {
                self.note(line).await;
            }
        }
    }

    async fn common_view(
        &self,
        policies: &Policies,
        planned: &Planned,
        resolved: &[Resolved],
    ) -> Attempt<BuildView> {
        let failed = |e: std::io::Error| self.fail(Reason::ContextInvalid, chain(&e));
        let mut archive = self.inputs.archive.try_clone().map_err(failed)?;
        archive.rewind().map_err(failed)?;
        let (limits, readable) = (self.agent.config.context.clone(), policies.host.readable());
        let context = self.blocking(move || ContextView::read(archive, &limits, &readable)).await?;
        let context = context.map_err(|e| self.fail(Reason::ContextInvalid, chain(&e)))?;
        let request = &self.request;
        let pairs = |map: &std::collections::BTreeMap<String, String>| {
            map.iter().map(|(key, value)| (key.clone(), value.clone())).collect::<Vec<_>>()
        };
        Ok(BuildView {
            input_digest: Digest::from_sha256([0; 32]),
            build_id: self.build,
            attempt: self.attempt.get(),
            requester: policies.requester.clone(),
            repository: String::new(),
            tags: Vec::new(),
            labels: pairs(&request.labels),
            build_args: pairs(&request.build_args)
                .into_iter()
                .map(|(key, value)| BuildArg::Plain { key, value })
                .collect(),
            platforms: vec![Platform::host().to_string()],
            target: request.target.clone(),
            dockerfile_path: request.dockerfile_name.clone(),
            dockerfile: request.dockerfile.as_str().into(),
            instructions: instructions(&planned.dockerfile),
            base_images: resolved.iter().map(base_image).collect(),
            context: Arc::new(context),
        })
    }
}

fn base_image(resolved: &Resolved) -> BaseImageView {
    BaseImageView {
        reference: resolved.image.reference.to_string(),
        digest: Some(resolved.image.manifest_digest.clone()),
        line: u32::try_from(resolved.line).unwrap_or(u32::MAX),
    }
}

/// Names all that goes into the build: what the verdicts are about.
fn input_digest(view: &BuildView, request: &BuildRequest, context: &Digest) -> Digest {
    let tags: Vec<&str> = view.tags.iter().map(|tag| tag.name.as_str()).collect();
    let bases = view.base_images.iter().map(|base| json!([base.reference, base.digest]));
    let input = json!({
        "request": request,
        "repository": view.repository,
        "tags": tags,
        "bases": bases.collect::<Vec<_>>(),
        "context": context,
    });
    Digest::from_sha256(sha2::Sha256::digest(input.to_string()).into())
}

/// The failure that the verdicts mean, if they mean one.
pub(crate) fn judged(verdicts: &[Verdict]) -> Result<(), Failure> {
    let Err(reason) = verdict::decide(verdicts) else { return Ok(()) };
    let against: Vec<&Verdict> =
        verdicts.iter().filter(|v| !v.passed() && v.outcome.reason() == Some(reason)).collect();
    let message = against.iter().flat_map(|v| verdict_lines(v)).collect::<Vec<_>>().join("; ");
    let line = against.iter().flat_map(|v| &v.violations).find_map(|violation| violation.at);
    let hint = match reason {
        Reason::PolicyDenied => "mend what the policy names, or ask its owner for an exception",
        _ => "tell the owner of the plugin; `on_failure = \"open\"` would let builds pass without it",
    };
    Err(Failure {
        location: line.map(|(line, _)| Location { line, text: String::new() }),
        hint: Some(hint.to_owned()),
        ..Failure::new(reason, Phase::PreBuild, message)
    })
}

/// A verdict for people: nothing for one that says nothing.
pub(crate) fn verdict_lines(verdict: &Verdict) -> Vec<String> {
    let (plugin, hook) = (&verdict.plugin, verdict.hook.label());
    let rule = |kind: &str, v: &kiln_protocol::verdict::Violation| {
        let help = v.help_url.as_ref().map(|url| format!(" (see {url})")).unwrap_or_default();
        format!("{plugin} {kind} {}: {}{help}", v.rule, v.message)
    };
    let denied = if verdict.waived.is_some() { "would deny" } else { "denies" };
    let mut lines: Vec<String> = verdict.violations.iter().map(|v| rule(denied, v)).collect();
    lines.extend(verdict.warnings.iter().map(|v| rule("warns", v)));
    if verdict.outcome.reason().is_some() && lines.is_empty() {
        let detail = verdict.detail.as_deref().unwrap_or("no detail");
        lines.push(format!("{plugin} ({hook}) ended with {}: {detail}", verdict.outcome));
    }
    lines
}
