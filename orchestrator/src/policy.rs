//! Which policies a build needs (pure).

use std::collections::BTreeSet;

use kiln_protocol::glob::Glob;
use kiln_protocol::message::{Hook, PolicyKey, RequiredPolicy};

/// A policy that the operator requires.
#[derive(Debug, Clone)]
pub struct PolicyRule {
    /// Its name.
    pub name: String,
    /// Which code with which settings.
    pub key: PolicyKey,
    /// The hooks that it exports.
    pub hooks: Vec<Hook>,
    /// The repositories that it judges.
    pub repositories: Glob,
}

/// The policies that must speak about a build that goes to these repositories. A build that goes nowhere is
/// judged by the policies that judge everything, under an empty name.
pub fn required(rules: &[PolicyRule], repositories: &BTreeSet<String>) -> Vec<RequiredPolicy> {
    let nowhere = BTreeSet::from([String::new()]);
    let repositories = if repositories.is_empty() { &nowhere } else { repositories };
    let require = |rule: &PolicyRule| {
        let judged = repositories.iter().filter(|name| rule.repositories.matches_repository(name));
        let repositories: Vec<String> = judged.cloned().collect();
        let (name, key, hooks) = (rule.name.clone(), rule.key.clone(), rule.hooks.clone());
        (!repositories.is_empty()).then_some(RequiredPolicy { name, key, hooks, repositories })
    };
    rules.iter().filter_map(require).collect()
}

/// What an agent must have loaded for these.
pub fn keys(required: &[RequiredPolicy]) -> BTreeSet<PolicyKey> {
    required.iter().map(|policy| policy.key.clone()).collect()
}

#[cfg(test)]
mod tests {
    use kiln_protocol::Digest;

    use super::*;

    #[test]
    fn a_policy_is_required_where_its_pattern_matches() {
        let rule = |name: &str, glob: &str| PolicyRule {
            name: name.to_owned(),
            key: PolicyKey { plugin: Digest::from_sha256([1; 32]), settings: Digest::from_sha256([2; 32]) },
            hooks: vec![Hook::PreBuild],
            repositories: Glob::new(glob).unwrap(),
        };
        let rules = [rule("all", "**"), rule("a", "team-a/**")];
        let names = |repositories: &[&str]| -> Vec<(String, Vec<String>)> {
            let repositories = repositories.iter().map(|&name| name.to_owned()).collect();
            required(&rules, &repositories).into_iter().map(|p| (p.name, p.repositories)).collect()
        };
        let list = |names: &[&str]| -> Vec<String> { names.iter().map(|&name| name.to_owned()).collect() };
        assert_eq!(names(&[]), [("all".to_owned(), list(&[""]))]);
        assert_eq!(
            names(&["r.example/team-a/x", "r.example/y"]),
            [
                ("all".to_owned(), list(&["r.example/team-a/x", "r.example/y"])),
                ("a".to_owned(), list(&["r.example/team-a/x"]))
            ]
        );
    }
}
