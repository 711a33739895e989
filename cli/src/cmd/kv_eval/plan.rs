//! Which cells there are: policies and budgets as the command line gives them. Knows nothing of sessions.

use super::table::CellId;
use anyhow::{Result, anyhow, bail};
use engine::kv::{Budget, KvSpec, registered};
use std::str::FromStr;

/// The budget of what needs none.
pub const NO_BUDGET: &str = "-";

/// A policy, checked but for its budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// As given.
    pub text: String,
    /// Whether it takes the budgets; if not, it is `full` or brings its own.
    pub takes_budget: bool,
}

/// A policy with a budget.
pub struct Cell {
    pub id: CellId,
    pub budget_tokens: Option<usize>,
    pub spec: KvSpec,
}

/// A list of policies separated by commas: `full,h2o:recent=16,every=8,pyramid(snapkv)` are three. `all`: every policy
/// that is no wrapper.
pub fn policies(list: &[String]) -> Result<Vec<Policy>> {
    let mut out: Vec<Policy> = Vec::new();
    for text in list.iter().flat_map(|l| split(l)) {
        let texts = match text.as_str() {
            "all" => all(),
            _ => vec![text],
        };
        for text in texts {
            let takes_budget = KvSpec::parse(&text, None).is_err();
            // Any budget will do to find what is wrong with the rest.
            if let Err(e) = KvSpec::parse(&text, Some(Budget::Percent(100.0))) {
                bail!(
                    "--policies: {} (in {text:?}; `rsinfer kv-eval --list` shows what there is)",
                    e.message()
                );
            }
            let policy = Policy { text, takes_budget };
            if !out.contains(&policy) {
                out.push(policy);
            }
        }
    }
    Ok(out)
}

fn all() -> Vec<String> {
    registered().into_iter().filter(|p| !p.is_wrapper()).map(|p| p.name.to_owned()).collect()
}

/// Cuts at commas outside of brackets, unless what follows is a parameter of what precedes (`name=value`).
fn split(list: &str) -> Vec<String> {
    let mut parts: Vec<String> = vec![String::new()];
    let mut depth = 0i32;
    let mut rest = list;
    while let Some(c) = rest.chars().next() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        let after = &rest[c.len_utf8()..];
        let word = &after[..after.find([':', '(', ',', '+']).unwrap_or(after.len())];
        let part = parts.last_mut().expect("there is one at least");
        if c == ',' && depth <= 0 && !(word.contains('=') && part.contains(':')) {
            parts.push(String::new());
        } else {
            part.push(c);
        }
        rest = after;
    }
    parts.iter().map(|p| p.trim().to_owned()).collect()
}

/// Budgets in order, without repetitions.
pub fn budgets(list: &[String]) -> Result<Vec<(String, Budget)>> {
    let mut out: Vec<(String, Budget)> = Vec::new();
    for text in list.iter().flat_map(|l| l.split(',')).map(str::trim) {
        let budget = Budget::from_str(text).map_err(|e| anyhow!("--budgets: {e}"))?;
        if !out.iter().any(|b| b.0 == text) {
            out.push((text.to_owned(), budget));
        }
    }
    Ok(out)
}

/// The cells of one task; shares are of its longest sequence.
pub fn cells(
    task: &str,
    longest: usize,
    policies: &[Policy],
    budgets: &[(String, Budget)],
) -> Result<Vec<Cell>> {
    let cell = |policy: &Policy, label: &str, budget: Option<Budget>| {
        let tokens = budget.map(|b| b.resolve(longest));
        let spec = KvSpec::parse(&policy.text, tokens.map(Budget::Entries))
            .map_err(|e| anyhow!("--policies: {} (in {:?})", e.message(), policy.text))?;
        let id = CellId { task: task.into(), policy: policy.text.clone(), budget: label.into() };
        anyhow::Ok(Cell { id, budget_tokens: tokens, spec })
    };
    let mut out = Vec::new();
    for policy in policies.iter().filter(|p| !p.takes_budget) {
        out.push(cell(policy, NO_BUDGET, None)?);
    }
    for (label, budget) in budgets {
        for policy in policies.iter().filter(|p| p.takes_budget) {
            out.push(cell(policy, label, Some(*budget))?);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut_between_policies() {
        for (list, want) in [
            ("full,window", vec!["full", "window"]),
            ("h2o:recent=16,every=8,random", vec!["h2o:recent=16,every=8", "random"]),
            (
                "pyramid:beta=4(snapkv:window=8,kernel=5),sinks:4+window",
                vec!["pyramid:beta=4(snapkv:window=8,kernel=5)", "sinks:4+window"],
            ),
            (" full , random ", vec!["full", "random"]),
            ("full,", vec!["full", ""]),
        ] {
            assert_eq!(split(list), want, "{list}");
        }
    }

    #[test]
    fn bad_lists_are_refused_with_the_word() {
        let e = |l: &str| policies(&[l.into()]).unwrap_err().to_string();
        assert!(e("full,hzo").contains("hzo") && !e("full,hzo").contains('\n'));
        assert!(e("h2o:nonsense=1").contains("nonsense"));
        assert!(e("full,,window").contains("name"));
        for b in ["0", "0%", "101%", "x", "", "-5", "64,"] {
            let e = budgets(&[b.into()]).unwrap_err().to_string();
            assert!(e.starts_with("--budgets: "), "{b}: {e}");
        }
    }

    #[test]
    fn every_policy_meets_every_budget() {
        let p = policies(&["full,window,h2o:recent=4,window".into(), "random:budget=9".into()]).unwrap();
        assert_eq!(p.len(), 4);
        let b = budgets(&["16,50%".into()]).unwrap();
        let cells = cells("recall", 101, &p, &b).unwrap();
        let ids: Vec<String> = cells.iter().map(|c| format!("{} {}", c.id.policy, c.id.budget)).collect();
        assert_eq!(
            ids,
            ["full -", "random:budget=9 -", "window 16", "h2o:recent=4 16", "window 50%", "h2o:recent=4 50%"]
        );
        assert_eq!(cells[4].budget_tokens, Some(51));
        assert_eq!(cells[4].spec.to_string(), "window:51");
        assert!(policies(&["all".into()]).unwrap().len() > 5);
    }
}
