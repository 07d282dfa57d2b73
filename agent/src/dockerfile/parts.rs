//! Pure: the parts of an instruction, as a policy sees them.

use super::{Dockerfile, Instruction, Keyword, words};

impl Dockerfile {
    /// What follows the keyword and its flags, variables not expanded: the strings of the JSON form; one text for a
    /// shell command and for the instruction behind ONBUILD; `KEY=value` of ENV, LABEL and ARG; words of the rest.
    pub fn arguments(&self, instruction: &Instruction) -> Vec<String> {
        let args = &instruction.args;
        match instruction.keyword {
            Keyword::Onbuild | Keyword::Maintainer => one(args),
            Keyword::Env | Keyword::Label => self.pairs(args),
            Keyword::Arg => {
                words::quoted_words(args, self.escape).iter().map(|word| self.unquoted(word)).collect()
            }
            Keyword::Run | Keyword::Cmd | Keyword::Entrypoint | Keyword::Healthcheck => {
                words::json_strings(args).unwrap_or_else(|| one(args))
            }
            _ => words::json_strings(args)
                .unwrap_or_else(|| words::blank_separated(args).into_iter().map(str::to_owned).collect()),
        }
    }

    fn pairs(&self, args: &str) -> Vec<String> {
        let pairs = words::pairs(args, self.escape).into_iter();
        pairs.map(|(key, value)| format!("{}={}", self.unquoted(&key), self.unquoted(&value))).collect()
    }

    /// The word without its quotes. Where an escape stands is left as it is.
    fn unquoted(&self, word: &str) -> String {
        let mut plain = String::with_capacity(word.len());
        let mut quote = None;
        let mut chars = word.chars();
        while let Some(c) = chars.next() {
            match quote {
                _ if c == self.escape && quote != Some('\'') => {
                    plain.push(c);
                    plain.extend(chars.next());
                }
                None if matches!(c, '\'' | '"') => quote = Some(c),
                Some(open) if c == open => quote = None,
                _ => plain.push(c),
            }
        }
        plain
    }

    /// The number of the stage that an instruction stands in; none before the first FROM.
    pub fn stage_of(&self, index: usize) -> Option<usize> {
        self.stages.iter().find(|stage| stage.instructions.contains(&index)).map(|stage| stage.index)
    }
}

impl Instruction {
    /// Its flags as names and values: `--from=tool` is `from` and `tool`.
    pub fn options(&self) -> impl Iterator<Item = (&str, &str)> {
        self.flags.iter().map(|flag| {
            let flag = flag.strip_prefix("--").unwrap_or(flag);
            flag.split_once('=').unwrap_or((flag, ""))
        })
    }
}

fn one(text: &str) -> Vec<String> {
    if text.is_empty() { Vec::new() } else { vec![text.to_owned()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_every_form() {
        for (line, expected) in [
            ("RUN echo  \"a b\" && true", &["echo  \"a b\" && true"][..]),
            ("RUN [\"a\", \"b c\"]", &["a", "b c"]),
            ("ENV A=1 B=\"x y\" C=a\\ b", &["A=1", "B=x y", "C=a\\ b"]),
            ("ENV A some text", &["A=some text"]),
            ("LABEL \"my key\"='v w'", &["my key=v w"]),
            ("ARG X=\"1 2\"", &["X=1 2"]),
            ("COPY --from=0 --chown=1:1 a b /c", &["a", "b", "/c"]),
            ("COPY [\"a b\", \"/c\"]", &["a b", "/c"]),
            ("USER nobody", &["nobody"]),
            ("ONBUILD RUN a b", &["RUN a b"]),
            ("EXPOSE 80 443/udp", &["80", "443/udp"]),
        ] {
            let file = Dockerfile::parse(&format!("FROM a\nFROM b\n{line}\n")).unwrap();
            assert_eq!(file.arguments(&file.instructions()[2]), expected, "{line}");
        }
    }

    #[test]
    fn options_and_stages() {
        let file =
            Dockerfile::parse("ARG V=1\nFROM a AS b\nFROM c\nCOPY --from=b --chown=1:1 /a /b\n").unwrap();
        let options: Vec<_> = file.instructions()[3].options().collect();
        assert_eq!(options, [("from", "b"), ("chown", "1:1")]);
        let stages: Vec<_> = (0..4).map(|index| file.stage_of(index)).collect();
        assert_eq!(stages, [None, Some(0), Some(1), Some(1)]);
    }
}
