//! Pure: the instruction keywords of a Dockerfile, and what a mistyped one was meant to be.

use std::fmt;

/// An instruction keyword.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each variant is the keyword it is named after")]
pub enum Keyword {
    Add,
    Arg,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Label,
    Maintainer,
    Onbuild,
    Run,
    Shell,
    Stopsignal,
    User,
    Volume,
    Workdir,
}

impl Keyword {
    /// Every keyword.
    pub const ALL: [Self; 18] = [
        Self::Add,
        Self::Arg,
        Self::Cmd,
        Self::Copy,
        Self::Entrypoint,
        Self::Env,
        Self::Expose,
        Self::From,
        Self::Healthcheck,
        Self::Label,
        Self::Maintainer,
        Self::Onbuild,
        Self::Run,
        Self::Shell,
        Self::Stopsignal,
        Self::User,
        Self::Volume,
        Self::Workdir,
    ];

    /// The keyword as people write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Arg => "ARG",
            Self::Cmd => "CMD",
            Self::Copy => "COPY",
            Self::Entrypoint => "ENTRYPOINT",
            Self::Env => "ENV",
            Self::Expose => "EXPOSE",
            Self::From => "FROM",
            Self::Healthcheck => "HEALTHCHECK",
            Self::Label => "LABEL",
            Self::Maintainer => "MAINTAINER",
            Self::Onbuild => "ONBUILD",
            Self::Run => "RUN",
            Self::Shell => "SHELL",
            Self::Stopsignal => "STOPSIGNAL",
            Self::User => "USER",
            Self::Volume => "VOLUME",
            Self::Workdir => "WORKDIR",
        }
    }

    /// The keyword that `word` is, in any case.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|keyword| keyword.as_str().eq_ignore_ascii_case(word))
    }

    /// The keyword that a mistyped `word` probably was, if one is near enough.
    pub fn nearest(word: &str) -> Option<Self> {
        // A word much longer than any keyword is not a mistyped one, and the distance is quadratic.
        if word.len() > 2 * "HEALTHCHECK".len() {
            return None;
        }
        let word: Vec<char> = word.to_uppercase().chars().collect();
        Self::ALL
            .into_iter()
            .map(|keyword| (distance(&word, keyword.as_str()), keyword))
            .filter(|(distance, keyword)| *distance <= keyword.as_str().len().min(word.len()) / 2)
            .min()
            .map(|(_, keyword)| keyword)
    }

    /// Whether buildah reads `--flags` of this instruction. It drops those of the others without a word.
    pub(super) const fn takes_flags(self) -> bool {
        matches!(self, Self::Add | Self::Copy | Self::From | Self::Healthcheck | Self::Run)
    }

    /// Whether the instruction can change files.
    pub(super) const fn may_make_a_layer(self) -> bool {
        matches!(self, Self::Add | Self::Copy | Self::Run | Self::Workdir)
    }

    /// Whether the instruction may carry a here-document.
    pub(super) const fn takes_heredoc(self) -> bool {
        matches!(self, Self::Add | Self::Copy | Self::Run)
    }
}

impl fmt::Display for Keyword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Optimal string alignment distance: a swap of two neighbours, the usual typing error, counts once.
fn distance(left: &[char], right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=right.len()).collect();
    for (i, l) in left.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, r) in right.iter().enumerate() {
            let mut cost = (last[j] + usize::from(l != r)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *l == right[j - 1] && left[i - 1] == *r {
                cost = cost.min(before_last[j - 1] + 1);
            }
            row.push(cost);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_any_case() {
        for keyword in Keyword::ALL {
            assert_eq!(Keyword::parse(keyword.as_str()), Some(keyword));
            assert_eq!(Keyword::parse(&keyword.as_str().to_lowercase()), Some(keyword));
        }
        assert_eq!(Keyword::parse("RUNN"), None);
    }

    #[test]
    fn suggests_the_nearest() {
        for (word, expected) in [
            ("RNU", Some(Keyword::Run)),
            ("form", Some(Keyword::From)),
            ("COPPY", Some(Keyword::Copy)),
            ("ENTRYPONT", Some(Keyword::Entrypoint)),
            ("WORKDIRECTORY", None),
            ("HEALTCHECK", Some(Keyword::Healthcheck)),
            ("apt-get", None),
            ("}", None),
            ("", None),
        ] {
            assert_eq!(Keyword::nearest(word), expected, "{word}");
        }
    }
}
