//! Reading perftest's and qperf's tables, and the lines a lab prefixes.

/// The lines of container `name` in a lab's output, without their prefix.
pub fn lines_of(name: &str, lab_output: &str) -> String {
    let prefix = format!("{name}| ");
    lab_output.lines().filter_map(|l| l.strip_prefix(&prefix)).fold(String::new(), |all, l| all + l + "\n")
}

/// perftest's result rows: size, iterations, and three or more figures.
pub fn rows(text: &str) -> Vec<Vec<f64>> {
    let numbers = |line: &str| line.split_whitespace().map(|w| w.parse().ok()).collect::<Option<Vec<f64>>>();
    text.lines().filter_map(numbers).filter(|row| row.len() >= 4).collect()
}

/// The row of a message size.
pub fn row(rows: &[Vec<f64>], size: u64) -> Option<&[f64]> {
    rows.iter().find(|row| row[0] == size as f64).map(Vec::as_slice)
}

/// qperf's figure in units of `to`.
pub fn scaled(value: &str, unit: &str, to: f64) -> Option<f64> {
    let factor = match unit {
        "bytes/sec" => 1.0,
        "KB/sec" => 1e3,
        "MB/sec" => 1e6,
        "GB/sec" => 1e9,
        "TB/sec" => 1e12,
        "ns" => 1e-9,
        "us" => 1e-6,
        "ms" => 1e-3,
        "sec" => 1.0,
        _ => return None,
    };
    value.parse::<f64>().ok().map(|v| v * factor / to)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAB: &str = "\
c1| #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
c2|  Mtu             : 4096[B]
c2|  2          200              9.31               8.07   \t\t   4.230123
c2|  65536      200              1000.5             998.00   \t\t   0.016000
c2| ---------------------------------------------------------------------------------------
";

    #[test]
    fn only_rows_of_numbers_count() {
        let rows = rows(&lines_of("c2", LAB));
        assert_eq!(rows.len(), 2);
        assert_eq!(row(&rows, 65536).map(|r| r[3]), Some(998.0));
        assert_eq!(row(&rows, 4), None);
        assert_eq!(lines_of("c1", LAB).lines().count(), 1);
    }
}
