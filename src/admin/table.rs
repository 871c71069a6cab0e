//! Draws tables as etcdctl does.

use std::io::{self, Write};

/// Draws one: a head and rows of as many cells.
pub(super) fn draw<const N: usize>(
    head: [&str; N],
    rows: &[[String; N]],
    out: &mut dyn Write,
) -> io::Result<()> {
    let widths: [usize; N] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    });
    let rule: String = widths.iter().map(|width| format!("+{}", "-".repeat(width + 2))).collect();
    writeln!(out, "{rule}+")?;
    let line = |cells: [&str; N], out: &mut dyn Write| {
        for (cell, width) in cells.iter().zip(widths) {
            write!(out, "| {cell:width$} ")?;
        }
        writeln!(out, "|")
    };
    line(head, out)?;
    writeln!(out, "{rule}+")?;
    for row in rows {
        line(row.each_ref().map(String::as_str), out)?;
    }
    writeln!(out, "{rule}+")
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        let rows = [["pi-1".to_owned(), "é".to_owned()], [String::new(), "long".to_owned()]];
        super::draw(["ID", "B"], &rows, &mut out).unwrap();
        expect![[r#"
            +------+------+
            | ID   | B    |
            +------+------+
            | pi-1 | é    |
            |      | long |
            +------+------+
        "#]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }
}
