//! Results as Markdown. Knows nothing of how they were measured.

use super::{Kind, Measured, PeerForm, Results, Test};
use std::fmt::Write;

/// Both tables: the comparison, and the roofline.
pub fn markdown(r: &Results) -> String {
    let mut out = String::new();
    let giga = |v: f64| v / 1e9;
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}: {}, {} threads, beside {}. The machine's limits, medians over the same rounds: {:.1} GB/s read, {:.0} int8{} and \
         {:.0} f32 GMAC/s. Other programs took at most {} of the processor while one was measured.\n",
        r.date,
        r.machine,
        r.threads,
        r.peer,
        giga(r.limits.read),
        giga(r.limits.int8),
        r.limits.tiles.map_or(String::new(), |t| format!(", {:.0} bf16 (tiles)", giga(t))),
        giga(r.limits.float),
        percent(r.others)
    );
    out += "| model, type (GB) | test | llama.cpp, tokens/s | rsinfer, tokens/s | ratio | of the limit: llama.cpp | rsinfer |\n";
    out += "| --- | --- | --- | --- | --- | --- | --- |\n";
    each(r, |m, t| {
        let _ = writeln!(
            out,
            "| {} {} ({:.2}) | {} | {}{} | {} | {} | {} | {} |",
            m.model,
            m.types,
            m.file_bytes as f64 / 1e9,
            name(&t.kind),
            t.peer().map_or("-".into(), rate),
            if m.peer_form == PeerForm::Default { "" } else { "*" },
            rate(t.ours()),
            t.ratio().map_or("-".into(), |v| format!("{v:.2}")),
            t.peer_share().map_or("-".into(), percent),
            percent(t.share()),
        );
    });
    let mut forms: Vec<_> =
        r.models.iter().map(|m| m.peer_form).filter(|f| *f != PeerForm::Default).collect();
    forms.dedup();
    for form in forms {
        let _ = writeln!(
            out,
            "\n\\* {}: with its defaults it ended in a crash on this model and machine.",
            form.note()
        );
    }
    out += "\nThe roofline: what a token needs, what the machine could do, what is reached.\n\n";
    out += "| model, type | test | a token needs | limit, tokens/s | reached | % of the limit | rounds apart |\n";
    out += "| --- | --- | --- | --- | --- | --- | --- |\n";
    each(r, |m, t| {
        let limit = super::median(t.rounds.iter().map(|r| r.limit)).unwrap_or(f64::NAN);
        let need = match t.kind {
            Kind::Decode { .. } => format!("{:.3} GB read", t.work / 1e9),
            Kind::Prompt(_) => format!("{:.2} GMAC {}", t.work / 1e9, if m.float { "f32" } else { "int8" }),
        };
        let _ = writeln!(
            out,
            "| {} {} | {} | {need} | {} | {} | {} | {} |",
            m.model,
            m.types,
            name(&t.kind),
            rate(limit),
            rate(t.ours()),
            percent(t.share()),
            percent(t.spread()),
        );
    });
    out
}

fn each(r: &Results, mut f: impl FnMut(&Measured, &Test)) {
    for m in &r.models {
        m.tests.iter().for_each(|t| f(m, t));
    }
}

/// llama-bench's name of a test.
pub fn name(kind: &Kind) -> String {
    match kind {
        Kind::Prompt(n) => format!("pp{n}"),
        Kind::Decode { depth: 0, tokens } => format!("tg{tokens}"),
        Kind::Decode { depth, tokens } => format!("tg{tokens} @ d{depth}"),
    }
}

fn rate(v: f64) -> String {
    if v < 100.0 { format!("{v:.1}") } else { format!("{v:.0}") }
}

fn percent(v: f64) -> String {
    format!("{:.0}%", 100.0 * v)
}

/// `text` with what lies between the lines `begin` and `end` replaced; `None` if it has no such lines.
pub fn replace_between(text: &str, begin: &str, end: &str, new: &str) -> Option<String> {
    let from = text.find(begin)? + begin.len();
    let to = from + text[from..].find(end)?;
    Some(format!("{}\n{}\n{}", &text[..from], new.trim_end(), &text[to..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::{Limits, Round};

    #[test]
    fn a_row_says_what_was_measured() {
        let rounds = vec![Round { ours: 30.0, peer: Some(20.0), limit: 40.0 }];
        let test = Test { kind: Kind::Decode { depth: 4096, tokens: 64 }, work: 0.7e9, rounds };
        let slow = Test {
            kind: Kind::Prompt(512),
            work: 1e9,
            rounds: vec![Round { ours: 150.0, peer: None, limit: 300.0 }],
        };
        let r = Results {
            date: "2026-01-31".into(),
            machine: "a machine".into(),
            peer: "llama.cpp".into(),
            threads: 2,
            others: 0.02,
            limits: Limits { read: 10e9, int8: 300e9, float: 70e9, tiles: Some(900e9) },
            models: vec![Measured {
                model: "llama-3.2-1b".into(),
                types: "Q4_K".into(),
                file_bytes: 770_000_000,
                float: false,
                peer_form: PeerForm::NotRepacked,
                tests: vec![slow, test],
            }],
        };
        let text = markdown(&r);
        for row in [
            "300 int8, 900 bf16 (tiles) and 70 f32 GMAC/s",
            "| llama-3.2-1b Q4_K (0.77) | tg64 @ d4096 | 20.0* | 30.0 | 1.50 | 50% | 75% |",
            "| llama-3.2-1b Q4_K (0.77) | pp512 | -* | 150 | - | - | 50% |",
            "| llama-3.2-1b Q4_K | pp512 | 1.00 GMAC int8 | 300 | 150 | 50% | 0% |",
            "\\* without repacked weights: with its defaults",
        ] {
            assert!(text.contains(row), "{row}\n{text}");
        }
    }

    #[test]
    fn only_the_marked_part_is_replaced() {
        let text = "a\n<!-- b -->\nold\n<!-- e -->\nc\n";
        let new = replace_between(text, "<!-- b -->", "<!-- e -->", "x\ny\n");
        assert_eq!(new.as_deref(), Some("a\n<!-- b -->\nx\ny\n<!-- e -->\nc\n"));
        assert_eq!(replace_between(text, "<!-- e -->", "<!-- b -->", ""), None);
    }
}
