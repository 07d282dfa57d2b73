//! Pure: the rules.

use crate::pattern;
use crate::settings::{Semver, Settings};
use crate::version::{self, Version};

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its name.
    pub rule: &'static str,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// What a tag points to now, if it exists.
pub type Now<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Where the tags are about to point.
#[derive(Clone, Copy)]
pub enum Moves<'a> {
    /// Nobody knows: the image does not exist yet. Equal inputs may give an equal image, so a tag that exists is
    /// refused only once the digest is known.
    BeforeBuild(Now<'a>),
    /// To this manifest.
    To {
        /// Of the manifest.
        digest: &'a str,
        /// What a tag points to now.
        now: Now<'a>,
    },
}

/// Everything about these tags that the settings do not allow.
pub fn check(settings: &Settings, repository: &str, tags: &[String], moves: Moves<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for tag in tags {
        found.extend(names(settings, tag));
        found.extend(prefix(settings, repository, tag));
        found.extend(move_of_release(settings, tag, moves));
    }
    found
}

fn finding(rule: &'static str, message: String) -> Finding {
    Finding { rule, message }
}

fn names(settings: &Settings, tag: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(denied) = settings.deny.iter().find(|pattern| pattern::matches(pattern, tag)) {
        found.push(finding("deny", format!("tag `{tag}` is denied by `{denied}`")));
    }
    let allowed = |pattern: &String| pattern::matches(pattern, tag);
    if !settings.allow.is_empty() && !settings.allow.iter().any(allowed) {
        let list = settings.allow.join("`, `");
        found.push(finding("allow", format!("tag `{tag}` matches none of `{list}`")));
    }
    found.extend(semver(settings.semver, tag));
    found
}

fn semver(wanted: Semver, tag: &str) -> Option<Finding> {
    let wrong = match (wanted, version::parse(tag)) {
        (Semver::Off, _) | (Semver::Any, Some(_)) | (Semver::Release, Some(Version::Release)) => return None,
        (_, None) => "is no semantic version; write for example 1.2.3",
        (Semver::Release, Some(Version::PreRelease)) => "is a pre-release; only releases are allowed",
    };
    Some(finding("semver", format!("tag `{tag}` {wrong}")))
}

/// A repository's own name also matches without the host of its registry.
fn prefix(settings: &Settings, repository: &str, tag: &str) -> Option<Finding> {
    let path = repository.split_once('/').map_or(repository, |(_, path)| path);
    let applies = |pattern: &str| pattern::matches(pattern, repository) || pattern::matches(pattern, path);
    let broken =
        |(pattern, prefix): &(&String, &String)| applies(pattern) && !tag.starts_with(prefix.as_str());
    let (pattern, prefix) = settings.prefix.iter().find(broken)?;
    let message = format!("tag `{tag}` does not begin with `{prefix}`, as tags of `{pattern}` do");
    Some(finding("prefix", message))
}

fn move_of_release(settings: &Settings, tag: &str, moves: Moves<'_>) -> Option<Finding> {
    if settings.move_releases || version::parse(tag) != Some(Version::Release) {
        return None;
    }
    let there = match moves {
        Moves::BeforeBuild(now) => now(tag)?,
        Moves::To { digest, now } => now(tag).filter(|there| there != digest)?,
    };
    let message = format!("release `{tag}` exists ({there}) and never moves; publish a new version");
    Some(finding("release", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(
        settings: &str,
        repository: &str,
        tags: &[&str],
        existing: Option<(&str, &str)>,
    ) -> Vec<&'static str> {
        let settings = Settings::parse(settings).unwrap();
        let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
        let now = |tag: &str| existing.filter(|(name, _)| *name == tag).map(|(_, digest)| digest.to_owned());
        let found = check(&settings, repository, &tags, Moves::To { digest: "sha256:new", now: &now });
        found.into_iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn names_and_versions() {
        for (settings, tag, expected) in [
            ("{}", "anything", vec![]),
            (r#"{"allow":["v*","main"]}"#, "main", vec![]),
            (r#"{"allow":["v*","main"]}"#, "dev", vec!["allow"]),
            (r#"{"deny":["latest"]}"#, "latest", vec!["deny"]),
            (r#"{"deny":["latest"]}"#, "latest-1", vec![]),
            (r#"{"semver":"any"}"#, "1.2.3-rc.1", vec![]),
            (r#"{"semver":"any"}"#, "1.2", vec!["semver"]),
            (r#"{"semver":"release"}"#, "1.2.3-rc.1", vec!["semver"]),
            (r#"{"allow":["v*"],"deny":["l*"],"semver":"any"}"#, "latest", vec!["deny", "allow", "semver"]),
        ] {
            assert_eq!(rules(settings, "r.example.com/app", &[tag], None), expected, "{settings} {tag}");
        }
    }

    #[test]
    fn every_tag_counts() {
        assert_eq!(rules(r#"{"deny":["b","c"]}"#, "r/app", &["a", "b", "c"], None), ["deny", "deny"]);
    }

    #[test]
    fn prefixes_belong_to_repositories() {
        let settings = r#"{"prefix":{"team-a/**":"a-"}}"#;
        for (repository, tag, expected) in [
            ("r.example.com/team-a/app", "a-1", vec![]),
            ("r.example.com/team-a/app", "b-1", vec!["prefix"]),
            ("team-a/app", "b-1", vec!["prefix"]),
            ("r.example.com/team-b/app", "b-1", vec![]),
        ] {
            assert_eq!(rules(settings, repository, &[tag], None), expected, "{repository} {tag}");
        }
    }

    #[test]
    fn a_release_never_moves_to_another_image() {
        for (settings, tag, there, expected) in [
            ("{}", "1.2.3", "sha256:old", vec!["release"]),
            ("{}", "1.2.3", "sha256:new", vec![]),
            ("{}", "1.2.3-rc.1", "sha256:old", vec![]),
            ("{}", "latest", "sha256:old", vec![]),
            (r#"{"move_releases":true}"#, "1.2.3", "sha256:old", vec![]),
        ] {
            assert_eq!(rules(settings, "r/app", &[tag], Some((tag, there))), expected, "{tag} {there}");
        }
    }

    #[test]
    fn before_the_build_an_existing_release_is_refused() {
        let now = |_: &str| Some("sha256:old".to_owned());
        let tags = ["1.2.3".to_owned(), "main".to_owned()];
        let found = check(&Settings::default(), "r/app", &tags, Moves::BeforeBuild(&now));
        assert_eq!(found.len(), 1);
        assert!(found[0].message.contains("publish a new version"), "{}", found[0].message);
    }
}
