//! `kv-eval --list`: the policies there are, from the registry.

use engine::kv::{Budget, Evict, KvPlan, KvSpec, registered};
use std::fmt::Write;

/// The list, as text.
pub fn text() -> String {
    let mut out = String::new();
    for p in registered() {
        let shape = if p.is_wrapper() { format!("{}(POLICY)", p.name) } else { p.name.to_owned() };
        let paper = if p.paper.is_empty() { String::new() } else { format!("  [{}]", p.paper) };
        let _ = writeln!(out, "{shape}{paper}\n    {}", p.idea);
        for q in p.params {
            let _ = writeln!(out, "    {:<12} {} (default: {})", q.name, q.what, q.default);
        }
        if !p.is_wrapper() && p.name != "full" {
            let _ = writeln!(out, "    needs        {}", needs(p.name));
            let when = match p.evict {
                Evict::Both => "when the prompt has been read, and while decoding",
                Evict::Prompt => "when the prompt has been read",
                Evict::Decode => "while decoding",
            };
            let _ = writeln!(out, "    evicts       {when}");
        }
        out.push('\n');
    }
    out + "Every policy takes budget=N or budget=P% (entries per layer, or a share of the context), evict=prompt|decode|both,\n\
           every=N (decoded tokens between evictions), positions=original|compact. Wrappers nest: keep-first:16(h2o:budget=25%).\n"
}

/// What the cache records for a policy with its default parameters.
fn needs(name: &str) -> String {
    let plan = KvSpec::parse(name, Some(Budget::Percent(100.0))).map(|s| s.plan(1 << 20, &[]));
    let n = match plan {
        Ok(Ok(KvPlan::Set(plan))) => plan.needs,
        Ok(Ok(_)) => return "nothing".into(),
        _ => return "depends on its parameters".into(),
    };
    let words = [
        (n.keys, "keys or latents".to_owned()),
        (n.values, "values".into()),
        (n.mass_total, "attention mass".into()),
        (n.mass_recent > 0, format!("attention mass of the last {} queries", n.mass_recent)),
        (n.queries > 0, format!("the last {} queries", n.queries)),
        (n.whole_prompt, "the whole prompt before it evicts".into()),
    ];
    let words: Vec<String> = words.into_iter().filter(|w| w.0).map(|w| w.1).collect();
    if words.is_empty() { "nothing".into() } else { words.join(", ") }
}
