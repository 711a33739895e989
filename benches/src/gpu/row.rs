//! Lines of the report: what was measured or checked, what it should be, and the table they end in.

use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// A figure, or why there is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What it belongs to: `kernels alone`.
    pub part: String,
    /// What was measured.
    pub name: String,
    /// The figure; none where something failed.
    pub value: Option<f64>,
    /// Its unit.
    pub unit: String,
    /// What it means, or why there is none.
    pub note: String,
    /// What issue 7 asks for, and what is held against it.
    pub bar: Option<Bar>,
}

/// A bar, in words and numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// `>= 75% of the bandwidth`.
    pub text: String,
    /// What was reached, as a share of the bar: 1 is just met.
    pub reached: f64,
}

impl Bar {
    /// Reached `value` where `least` is asked for.
    pub fn least(text: impl Into<String>, value: f64, least: f64) -> Option<Self> {
        Some(Self { text: text.into(), reached: value / least })
    }

    fn met(&self) -> &'static str {
        if self.reached >= 1.0 { "met" } else { "missed" }
    }
}

impl Row {
    /// A figure.
    pub fn new(part: &str, name: impl Into<String>, value: f64, unit: &str, note: impl Into<String>) -> Self {
        let (name, note) = (name.into(), note.into());
        Self { part: part.into(), name, value: Some(value), unit: unit.into(), note, bar: None }
    }

    /// None, and why.
    pub fn failed(part: &str, name: impl Into<String>, why: impl Into<String>) -> Self {
        Self { part: part.into(), name: name.into(), note: why.into(), ..Self::default() }
    }

    /// With a bar.
    pub fn bar(mut self, bar: Option<Bar>) -> Self {
        self.bar = bar;
        self
    }

    fn figure(&self) -> String {
        match self.value {
            None => "FAILED".into(),
            Some(v) if v >= 100.0 => format!("{v:.0} {}", self.unit),
            Some(v) if v >= 10.0 => format!("{v:.1} {}", self.unit),
            Some(v) => format!("{v:.3} {}", self.unit),
        }
    }
}

/// For who watches.
impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}; {}", self.part, self.name, self.figure(), self.note)
    }
}

/// How parts end that say where the time of another goes.
pub const WAITED: &str = ", each launch waited for";

/// Rows by part, in Markdown; where time goes comes last.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::from("| what | figure | bar | |\n| --- | --- | --- | --- |\n");
    let mut part = "";
    let (inside, whole): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|r| r.part.ends_with(WAITED));
    for r in whole.into_iter().chain(inside) {
        if r.part != part {
            part = &r.part;
            let _ = writeln!(out, "| **{part}** | | | |");
        }
        let bar = r.bar.as_ref().map_or(String::new(), |b| format!("{}: {}", b.text, b.met()));
        let _ = writeln!(out, "| {} | {} | {bar} | {} |", r.name, r.figure(), r.note.replace('|', "/"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_met_or_missed() {
        let row = |v| Row::new("a", "b", v, "GB/s", "c").bar(Bar::least(">= 10", v, 10.0));
        let text = table(&[row(10.0), row(9.99), Row::failed("d", "e", "x|y")]);
        let lines: Vec<&str> = text.lines().skip(2).collect();
        let want = [
            "| **a** | | | |",
            "| b | 10.0 GB/s | >= 10: met | c |",
            "| b | 9.990 GB/s | >= 10: missed | c |",
            "| **d** | | | |",
            "| e | FAILED |  | x/y |",
        ];
        assert_eq!(lines, want);
    }
}
