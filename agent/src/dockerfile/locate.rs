//! Pure: from the text in an error of buildah to the instruction it is about.
//!
//! buildah writes `building at STEP "TEXT": …`. TEXT is the keyword in capitals, the flags with their quotes
//! resolved and the arguments as written, joined by one space; a RUN keeps the blanks within its command. It is
//! not the text of the `STEP n/m:` lines, which is the instruction as it stands in the file.

use super::{Dockerfile, Instruction, Keyword, words};

/// How much of the text must agree from its beginning, in percent, to take an instruction that is not the same.
const SIMILAR_PERCENT: usize = 60;

impl Dockerfile {
    /// The instruction that `step_text` came from. Where several are the same the first is taken; the stage, if
    /// the caller knows it, makes that rare: see [`Dockerfile::locate_in_stage`].
    pub fn locate(&self, step_text: &str) -> Option<&Instruction> {
        best(&self.instructions, step_text, self.escape)
    }

    /// As [`Dockerfile::locate`], but prefers the instructions of one stage (`[2/3] STEP …` is stage 1).
    pub fn locate_in_stage(&self, stage: usize, step_text: &str) -> Option<&Instruction> {
        let own = self.stages.get(stage).map(|stage| self.instructions_of(stage)).unwrap_or_default();
        exact(own, step_text, self.escape).or_else(|| self.locate(step_text))
    }
}

fn best<'a>(instructions: &'a [Instruction], text: &str, escape: char) -> Option<&'a Instruction> {
    exact(instructions, text, escape).or_else(|| similar(instructions, text, escape))
}

fn exact<'a>(instructions: &'a [Instruction], text: &str, escape: char) -> Option<&'a Instruction> {
    let text = text.trim();
    instructions
        .iter()
        .find(|instruction| message(instruction, escape).trim() == text)
        .or_else(|| instructions.iter().find(|instruction| instruction.text.trim() == text))
        .or_else(|| {
            let text = squeezed(text);
            instructions.iter().find(|instruction| squeezed(&message(instruction, escape)) == text)
        })
}

/// The instruction with the same keyword that agrees longest from the beginning.
fn similar<'a>(instructions: &'a [Instruction], text: &str, escape: char) -> Option<&'a Instruction> {
    let text = squeezed(text);
    let keyword = Keyword::parse(text.split(' ').next()?)?;
    let mut best = None;
    for instruction in instructions.iter().filter(|instruction| instruction.keyword == keyword) {
        let message = squeezed(&message(instruction, escape));
        let common = message.bytes().zip(text.bytes()).take_while(|(left, right)| left == right).count();
        let enough = common * 100 >= SIMILAR_PERCENT * message.len().max(text.len());
        if enough && best.is_none_or(|(longest, _)| common > longest) {
            best = Some((common, instruction));
        }
    }
    best.map(|(_, instruction)| instruction)
}

fn squeezed(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The text that buildah writes into an error about this instruction.
fn message(instruction: &Instruction, escape: char) -> String {
    let mut parts = vec![instruction.keyword.as_str().to_owned()];
    parts.extend(instruction.flags.iter().cloned());
    match &instruction.trigger {
        Some(trigger) => {
            parts.push(trigger.keyword.as_str().to_lowercase());
            parts.extend(trigger.flags.iter().cloned());
            parts.extend(arguments(trigger, escape));
        }
        None => parts.extend(arguments(instruction, escape)),
    }
    parts.join(" ")
}

fn arguments(instruction: &Instruction, escape: char) -> Vec<String> {
    let args = instruction.args.as_str();
    let whole = || vec![args.to_owned()];
    let separated = || words::blank_separated(args).into_iter().map(str::to_owned).collect();
    match instruction.keyword {
        Keyword::Add | Keyword::Copy | Keyword::Volume => words::json_strings(args).unwrap_or_else(separated),
        Keyword::Expose | Keyword::From => separated(),
        Keyword::Cmd | Keyword::Entrypoint | Keyword::Run | Keyword::Shell => {
            words::json_strings(args).unwrap_or_else(whole)
        }
        Keyword::Arg => words::quoted_words(args, escape),
        Keyword::Env | Keyword::Label => {
            words::pairs(args, escape).into_iter().flat_map(|(key, value)| [key, value]).collect()
        }
        Keyword::Healthcheck => {
            let (kind, command) = args.split_once(char::is_whitespace).unwrap_or((args, ""));
            let command = command.trim_start();
            let words = words::json_strings(command).unwrap_or_else(|| vec![command.to_owned()]);
            std::iter::once(kind.to_owned()).chain(words).collect()
        }
        Keyword::Maintainer | Keyword::Onbuild | Keyword::Stopsignal | Keyword::User | Keyword::Workdir => {
            whole()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts are those of errors of buildah 1.28.2 about these files.
    #[test]
    fn finds_the_line_of_an_error() {
        for (body, step, line) in [
            (
                "RUN   echo a  b \\\n   # comment\n\n   && echo \"x y\"   \\\n   && false",
                "RUN echo a  b    && echo \"x y\"      && false",
                2,
            ),
            ("ENV D=/srv\nCOPY   nope   $D/x", "COPY nope $D/x", 3),
            ("ARG N=nope\nADD --chown=0:0   [\"${N} x\",  \"/y\"]", "ADD --chown=0:0 ${N} x /y", 3),
            ("RUN [\"/bin/nope\",   \"a b\"]", "RUN /bin/nope a b", 2),
            (
                "RUN --mount=type=cache,target=\"/x\" --mount=type=tmpfs,target=/y  echo  hi",
                "RUN --mount=type=cache,target=/x --mount=type=tmpfs,target=/y echo  hi",
                2,
            ),
            ("COPY --chmod=u+x a /b", "COPY --chmod=u+x a /b", 2),
            ("STOPSIGNAL  NOPE", "STOPSIGNAL NOPE", 2),
            ("onbuild run  x", "ONBUILD run x", 2),
            ("HEALTHCHECK --interval=0s CMD   echo  hi", "HEALTHCHECK --interval=0s CMD echo  hi", 2),
            ("RUN <<EOF\necho hi\nEOF", "RUN <<EOF", 2),
            ("RUN a\nRUN b\nRUN a", "RUN a", 2),
            ("RUN a b\nRUN a  b", "RUN a  b", 3),
            ("env A=1 B=\"2 3\"", "ENV A 1 B \"2 3\"", 2),
            (
                "RUN apt-get update && apt-get install curl\nRUN make",
                "RUN apt-get update && apt-get instal",
                2,
            ),
        ] {
            let file = Dockerfile::parse(&format!("FROM scratch\n{body}\nCMD end\n")).unwrap();
            assert_eq!(file.locate(step).map(|found| found.start_line), Some(line), "{step}");
        }
    }

    #[test]
    fn finds_nothing_where_nothing_is_near() {
        let file = Dockerfile::parse("FROM scratch\nRUN make\n").unwrap();
        for step in ["", "RUN something else", "COPY make", "make", "FOO x"] {
            assert_eq!(file.locate(step), None, "{step}");
        }
    }

    #[test]
    fn the_stage_decides_between_equal_instructions() {
        let file = Dockerfile::parse("FROM a AS x\nRUN make\nFROM b\nRUN make\n").unwrap();
        let line = |stage| file.locate_in_stage(stage, "RUN make").map(|found| found.start_line);
        assert_eq!((line(0), line(1), line(7)), (Some(2), Some(4), Some(2)));
    }
}
