//! Pure: from the bytes of a Dockerfile to the lines that buildah takes as instructions.
//!
//! A logical line is what remains of one or more lines after continuations are joined and comments are dropped.

use super::words::{self, HeredocMark};
use super::{DockerfileError, Keyword};

/// No real Dockerfile comes near; buildah itself has no limit.
pub(super) const MAX_BYTES: usize = 1024 * 1024;

/// buildah reads lines into a buffer of 64 KiB, end of line included, and takes a longer one for the end of the
/// file (seen with 1.28.2): it would build the first half without an error.
pub(super) const MAX_LINE: usize = 64 * 1024 - 2;

/// A here-document: where its text is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// The word that ends it.
    pub name: String,
    /// The line of the end word.
    pub end_line: usize,
}

/// One instruction as text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LogicalLine {
    pub(super) text: String,
    /// The line of the first character, 1-based.
    pub(super) start: usize,
    /// The last line that belongs to it, the ends of here-documents included.
    pub(super) end: usize,
    pub(super) heredocs: Vec<Heredoc>,
}

/// A Dockerfile cut into logical lines.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) lines: Vec<LogicalLine>,
    pub(super) escape: char,
    /// The text with here-documents blanked out line by line, for the second reading.
    pub(super) without_heredocs: String,
}

pub(super) fn read(text: &str) -> Result<Source, DockerfileError> {
    if text.len() > MAX_BYTES {
        return Err(DockerfileError::TooLarge { bytes: text.len(), limit: MAX_BYTES });
    }
    let mut physical = physical_lines(text)?;
    let escape = escape_directive(&physical)?;
    let mut lines = Vec::new();
    let mut reader = Reader { physical: &mut physical, next: 0, escape };
    while let Some(line) = reader.logical_line()? {
        lines.push(line);
    }
    Ok(Source { lines, escape, without_heredocs: physical.join("\n") })
}

fn physical_lines(text: &str) -> Result<Vec<String>, DockerfileError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.strip_suffix('\n').unwrap_or(text).split('\n').enumerate();
    lines
        .map(|(index, line)| {
            if line.len() > MAX_LINE {
                return Err(DockerfileError::LineTooLong {
                    line: index + 1,
                    bytes: line.len(),
                    limit: MAX_LINE,
                });
            }
            Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
        })
        .collect()
}

/// The escape character. buildah looks for the directive on the first line only: any other line, `# syntax=`
/// and an empty one included, ends its search.
fn escape_directive(physical: &[String]) -> Result<char, DockerfileError> {
    let Some(value) = physical.first().and_then(|line| escape_value(line)) else { return Ok('\\') };
    if physical.get(1).is_some_and(|line| escape_value(line).is_some()) {
        return Err(DockerfileError::EscapeTwice { line: 2 });
    }
    match value.chars().next() {
        Some(c @ ('\\' | '`')) => Ok(c),
        _ => Err(DockerfileError::EscapeValue { line: 1, value: value.to_owned() }),
    }
}

fn escape_value(line: &str) -> Option<&str> {
    let blanks = [' ', '\t'];
    let rest = line.trim_start().strip_prefix('#')?.trim_start_matches(blanks);
    let (word, rest) = rest.split_at_checked("escape".len())?;
    let value = rest.trim_start_matches(blanks).strip_prefix('=')?;
    (word.eq_ignore_ascii_case("escape") && !value.is_empty()).then(|| value.trim_matches(blanks))
}

struct Reader<'a> {
    physical: &'a mut Vec<String>,
    /// Index of the next line, which is also the 1-based number of the line before it.
    next: usize,
    escape: char,
}

impl Reader<'_> {
    fn logical_line(&mut self) -> Result<Option<LogicalLine>, DockerfileError> {
        while self.next < self.physical.len() {
            let first = self.next;
            if let Some((text, start, end)) = self.joined() {
                if text.trim().is_empty() {
                    return Err(DockerfileError::LoneContinuation { line: first + 1 });
                }
                let mut line = LogicalLine { text, start, end, heredocs: Vec::new() };
                self.skip_heredocs(&mut line, first)?;
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    /// The next line with its continuations, its first and its last line; `None` for a blank line or a comment.
    fn joined(&mut self) -> Option<(String, usize, usize)> {
        let line = self.take().trim_start().to_owned();
        if line.is_empty() || line.starts_with('#') {
            return None;
        }
        let (part, mut open) = self.cut_continuation(&line);
        let mut text = part.to_owned();
        let (mut start, mut end) = (self.next, self.next);
        while open && self.next < self.physical.len() {
            let line = self.take();
            // Blank lines and comments inside a continuation do not end it.
            if line.trim_start().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            if text.trim().is_empty() {
                start = self.next;
            }
            end = self.next;
            let part;
            (part, open) = self.cut_continuation(&line);
            text.push_str(part);
        }
        Some((text, start, end))
    }

    fn take(&mut self) -> String {
        let line = self.physical.get(self.next).cloned().unwrap_or_default();
        self.next += 1;
        line
    }

    fn cut_continuation<'b>(&self, line: &'b str) -> (&'b str, bool) {
        match line.trim_end_matches([' ', '\t']).strip_suffix(self.escape) {
            Some(part) => (part, true),
            None => (line, false),
        }
    }

    /// Takes the bodies of the here-documents that `line` opens, and blanks them out for the second reading.
    fn skip_heredocs(&mut self, line: &mut LogicalLine, first: usize) -> Result<(), DockerfileError> {
        let marks = heredocs_of(&line.text, self.escape);
        if marks.is_empty() {
            return Ok(());
        }
        for index in first..self.next {
            self.physical[index] = self.physical[index].replace("<<", "__");
        }
        for mark in marks {
            let end_line = self.skip_heredoc(&mark).ok_or_else(|| DockerfileError::HeredocWithoutEnd {
                line: line.start,
                name: mark.name.clone(),
            })?;
            line.end = end_line;
            line.heredocs.push(Heredoc { name: mark.name, end_line });
        }
        Ok(())
    }

    fn skip_heredoc(&mut self, mark: &HeredocMark) -> Option<usize> {
        while let Some(line) = self.physical.get_mut(self.next).map(std::mem::take) {
            self.next += 1;
            let line = if mark.strip_tabs { line.trim_start_matches('\t') } else { line.as_str() };
            if line == mark.name {
                return Some(self.next);
            }
        }
        None
    }
}

/// The here-documents of an instruction: ADD, COPY and RUN, also behind ONBUILD, and not in the JSON form.
fn heredocs_of(text: &str, escape: char) -> Vec<HeredocMark> {
    if !text.contains("<<") {
        return Vec::new();
    }
    let Ok(command) = words::split_command(text) else { return Vec::new() };
    match Keyword::parse(command.word) {
        Some(Keyword::Onbuild) => match words::split_command(command.args) {
            Ok(trigger) if Keyword::parse(trigger.word) != Some(Keyword::Onbuild) => {
                heredocs_of(command.args, escape)
            }
            _ => Vec::new(),
        },
        Some(keyword) if keyword.takes_heredoc() && words::json_strings(command.args).is_none() => {
            words::heredoc_marks(text, escape)
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<(String, usize, usize)> {
        read(text).unwrap().lines.into_iter().map(|line| (line.text, line.start, line.end)).collect()
    }

    /// The texts were seen in buildah's STEP lines.
    #[test]
    fn joins_lines_as_buildah_does() {
        let one = |text: &str, start, end| vec![(text.to_owned(), start, end)];
        for (text, expected) in [
            ("FROM a", one("FROM a", 1, 1)),
            ("\u{feff}FROM a\r\n", one("FROM a", 1, 1)),
            ("# c\n\n  FROM a\n", one("FROM a", 3, 3)),
            ("RUN a \\\n  b", one("RUN a   b", 1, 2)),
            ("RUN a \\  \t\n b", one("RUN a  b", 1, 2)),
            ("RUN a \\\r\n b\r\n", one("RUN a  b", 1, 2)),
            ("RUN a \\\n# c\n\n  # d \\\n b", one("RUN a  b", 1, 5)),
            ("RUN a \\\n# c\n", one("RUN a ", 1, 1)),
            ("RUN a \\", one("RUN a ", 1, 1)),
            ("RU\\\nN a", one("RUN a", 1, 2)),
            ("\\\n\nRUN a", one("RUN a", 3, 3)),
            ("RUN a \\\\\nb", one("RUN a \\b", 1, 2)),
            ("RUN a # c", one("RUN a # c", 1, 1)),
            ("# escape=`\nRUN a `\nb \\", one("RUN a b \\", 2, 3)),
            ("#Escape = `x\nRUN a `\nb", one("RUN a b", 2, 3)),
            ("# syntax=x\n# escape=`\nRUN a `", one("RUN a `", 3, 3)),
            ("RUN <<A <<-B\n#\n A\nA\n x\n\tB\n", one("RUN <<A <<-B", 1, 6)),
            ("onbuild copy <<E /x\nRUN y\nE", one("onbuild copy <<E /x", 1, 3)),
            ("", vec![]),
            ("\n\n# x\n", vec![]),
        ] {
            assert_eq!(texts(text), expected, "{text:?}");
        }
        assert_eq!(texts("CMD [\"<<E\"]\nRUN [\"<<E\", \"x\"]\nENV A=<<E").len(), 3);
    }

    #[test]
    fn refuses_what_buildah_reads_wrongly() {
        let long = format!("FROM a\nRUN {}\n", "x".repeat(MAX_LINE - 3));
        let big = "#\n".repeat(MAX_BYTES);
        for (text, expected) in [
            (long.as_str(), DockerfileError::LineTooLong { line: 2, bytes: MAX_LINE + 1, limit: MAX_LINE }),
            (big.as_str(), DockerfileError::TooLarge { bytes: 2 * MAX_BYTES, limit: MAX_BYTES }),
            ("# escape=x\nFROM a", DockerfileError::EscapeValue { line: 1, value: "x".to_owned() }),
            ("# escape=`\n# escape=`\n", DockerfileError::EscapeTwice { line: 2 }),
            ("FROM a\n\\\n\n", DockerfileError::LoneContinuation { line: 2 }),
            ("RUN <<E\nF\n", DockerfileError::HeredocWithoutEnd { line: 1, name: "E".to_owned() }),
        ] {
            assert_eq!(read(text).unwrap_err(), expected, "{text:.40}");
        }
        assert!(read(&format!("FROM a\nRUN {}\n", "x".repeat(MAX_LINE - 4))).is_ok());
    }

    #[test]
    fn blanks_out_heredocs_for_the_second_reading() {
        let source = read("FROM a\nRUN cat <<E \\\n > x\nFROM dir:/\nE\nRUN y").unwrap();
        assert_eq!(source.without_heredocs, "FROM a\nRUN cat __E \\\n > x\n\n\nRUN y");
    }
}
