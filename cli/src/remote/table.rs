//! Tables for people (pure).

use jiff::Timestamp;

/// Columns as wide as their widest cell, two spaces apart.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &&Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    all.iter().map(line).collect()
}

/// How long ago that was, in the largest unit that says enough.
pub(crate) fn age(of: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(of).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_blanks_at_the_end() {
        let rows =
            [["1", "äh", ""].map(str::to_owned).to_vec(), ["22", "b", "c"].map(str::to_owned).to_vec()];
        assert_eq!(table(&["ID", "NAME", "X"], &rows), ["ID  NAME  X", "1   äh", "22  b     c"]);
        assert_eq!(table(&["ID"], &[]), ["ID"]);
    }

    #[test]
    fn ages_are_short() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let ages = [59, 60, 3599, 3600, 172_800, -5].map(|seconds| age(at(1_000), at(1_000 + seconds)));
        assert_eq!(ages, ["59s", "1m", "59m", "1h", "2d", "0s"]);
    }
}
