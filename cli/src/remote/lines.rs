//! Lines out of the parts of a log (pure).

/// A line that is longer is shown in parts.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// Puts lines together.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    open: String,
}

impl Lines {
    /// Takes a part; whole lines go to `show`.
    pub(crate) fn push(&mut self, text: &str, mut show: impl FnMut(&str)) {
        for part in text.split_inclusive('\n') {
            self.open.push_str(part);
            let whole = self.open.strip_suffix('\n');
            if let Some(line) = whole.or((self.open.len() >= MAX_LINE_BYTES).then_some(&self.open)) {
                show(line);
                self.open.clear();
            }
        }
    }

    /// Shows what is left of a log that has ended.
    pub(crate) fn finish(&mut self, show: impl FnOnce(&str)) {
        let open = std::mem::take(&mut self.open);
        if !open.is_empty() {
            show(&open);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_whatever_the_parts_are() {
        let (mut lines, mut shown) = (Lines::default(), Vec::new());
        for part in ["a\nb", "c\n", "", "\nd"] {
            lines.push(part, |line| shown.push(line.to_owned()));
        }
        lines.finish(|line| shown.push(line.to_owned()));
        assert_eq!(shown, ["a", "bc", "", "d"]);
        let mut count = 0;
        lines.push(&"x".repeat(MAX_LINE_BYTES), |_| count += 1);
        assert_eq!(count, 1);
    }
}
