//! The `--kv` string: what parses, what it means, where errors point.

use super::*;
use crate::kv::policies::testing::Layer;
use proptest::prelude::*;

fn plan(text: &str, ctx: usize, n_layers: usize) -> Result<KvPlan, KvError> {
    let layers: Vec<_> = (0..n_layers).map(|_| Layer::gqa(2, 1, 4, 0).geometry).collect();
    text.parse::<KvSpec>().unwrap_or_else(|e| panic!("{e}")).plan(ctx, &layers)
}

fn set(text: &str, ctx: usize, n_layers: usize) -> SetPlan {
    match plan(text, ctx, n_layers) {
        Ok(KvPlan::Set(s)) => s,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn canonical_forms() {
    for (given, canonical) in [
        ("full", "full"),
        (" full ", "full"),
        ("window:1024", "window:1024"),
        ("window:budget=0256", "window:256"),
        ("window:25%", "window:25%"),
        ("sinks:4+window:2044", "sinks:4+window:2044"),
        ("sinks+window:60", "sinks:4+window:60"),
        ("sinks:2,budget=64", "sinks:2+window:62"),
        ("sinks:2,budget=25%", "sinks:2,budget=25%"),
        ("sinks:budget=12.50%", "sinks:budget=12.5%"),
        ("sinks:4+window:60,every=8,positions=compact", "sinks:4+window:60,every=8,positions=compact"),
        ("knorm:512", "knorm:budget=512"),
        (" random : seed = 007 , budget = 64 ", "random:budget=64,seed=7"),
        (
            "random:positions=original,every=1,recent=3,seed=1,budget=9",
            "random:budget=9,seed=1,recent=3,every=1",
        ),
        ("pyramid(knorm:budget=512)", "pyramid(knorm:budget=512)"),
        (
            "keep-first:16( pyramid:recent=4,beta=10(knorm:9) )",
            "keep-first:16(pyramid:beta=10,recent=4(knorm:budget=9))",
        ),
        ("keep-first:n=16(window:99)", "keep-first:16(window:99)"),
        ("keep-prompt(sinks:4+window:60)", "keep-prompt(sinks:4+window:60)"),
        (
            "per-layer:0-1=100%,2=64(knorm:9,evict=prompt)",
            "per-layer:0-1=100%,2=64(knorm:budget=9,evict=prompt)",
        ),
    ] {
        let spec: KvSpec = given.parse().unwrap_or_else(|e| panic!("{given}\n{e}"));
        assert_eq!(spec.to_string(), canonical);
        assert_eq!(canonical.parse::<KvSpec>().unwrap_or_else(|e| panic!("{e}")), spec);
    }
}

#[test]
fn errors_point_at_the_word() {
    for (text, word, says) in [
        ("", "", "name of a kv policy"),
        ("h20:budget=9", "h20", "unknown kv policy"),
        ("knrm:budget=9", "knrm", "did you mean `knorm`?"),
        ("Knorm:9", "Knorm", "did you mean `knorm`?"),
        ("knorm", "knorm", "needs a budget"),
        ("pyramid(knorm)", "knorm", "needs a budget"),
        ("knorm:0", "0", "leaves nothing"),
        ("knorm:budget=0", "0", "leaves nothing"),
        ("knorm:budget=-1", "-1", "neither"),
        ("knorm:budget=99999999999", "99999999999", "not possible"),
        ("knorm:budget=0%", "0%", "above 0%"),
        ("knorm:budget=101%", "101%", "above 0%"),
        ("knorm:budget=nan%", "nan%", "above 0%"),
        ("knorm:budgit=9", "budgit", "did you mean `budget`?"),
        ("random:budget=9,seed=x", "x", "whole number"),
        ("random:budget=9,seed", "seed", "has no name"),
        ("random:9,seed=", "", "seed needs a value"),
        ("random:budget=9,budget=9", "budget", "twice"),
        ("knorm:9,every=0", "0", "from 1"),
        ("knorm:9,evict=never", "never", "prompt, decode or both"),
        ("knorm:9,positions=new", "new", "original or compact"),
        ("sinks:4+window:4", "4", "larger than the 4 sinks"),
        ("sinks:8,budget=12", "8", "window must be larger"),
        ("sinks:4+knorm:9", "knorm", "joins only"),
        ("knorm:9+window:9", "knorm", "joins only"),
        ("sinks:4+window:25%", "25%", "sinks:4,budget=25%"),
        ("sinks:4+window", "window", "needs a length"),
        ("sinks:4+window:60+window:9", "window", "nothing follows"),
        ("full:1", "1", "no parameters"),
        ("full(knorm:9)", "knorm", "around nothing"),
        ("keep-prompt(full)", "full", "nothing to wrap"),
        ("keep-prompt", "keep-prompt", "goes around a policy"),
        ("keep-prompt:budget=9(knorm)", "budget", "go to the one inside"),
        ("knorm:9(random:9)", "random", "around nothing"),
        ("pyramid:beta=0.5(knorm:9)", "0.5", "at least 1"),
        ("pyramid:beta=inf(knorm:9)", "inf", "a number"),
        ("per-layer(knorm:9)", "per-layer", "needs budgets"),
        ("per-layer:a=9(knorm:9)", "9", "layers are written"),
        ("per-layer:0-3=9,2=9(knorm:9)", "9", "has a budget already"),
        ("pyramid(knorm:9", "(", "not closed"),
        ("knorm:9)", ")", "not expected"),
        ("knorm:", "", "a parameter is expected"),
        ("knorm:=9", "", "before `=`"),
    ] {
        let e = text.parse::<KvSpec>().map(|s| s.to_string()).expect_err(text);
        let shown = e.to_string();
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines.len(), 3, "{shown}");
        let marked: String =
            lines[1].chars().zip(lines[2].chars()).filter(|(_, m)| *m == '^').map(|(c, _)| c).collect();
        // Where there is no word, one sign stands at the place.
        assert!(marked == word || word.is_empty() && marked.len() <= 1, "{shown}");
        assert!(e.message().contains(says), "{shown}");
    }
    let e = "pyramid(h20:budget=12)".parse::<KvSpec>().unwrap_err().to_string();
    assert!(e.ends_with("\n  pyramid(h20:budget=12)\n          ^^^"), "{e}");
}

#[test]
fn rings_and_sets() {
    assert!(matches!(plan("full", 100, 2), Ok(KvPlan::Full)));
    assert!(matches!(plan("window:25%", 1000, 2), Ok(KvPlan::Ring { sinks: 0, window: 250 })));
    assert!(matches!(plan("sinks:4+window:60", 1000, 2), Ok(KvPlan::Ring { sinks: 4, window: 60 })));
    assert!(matches!(plan("sinks:4,budget=10%", 1000, 2), Ok(KvPlan::Ring { sinks: 4, window: 96 })));
    let e = plan("sinks:4,budget=1%", 100, 2).unwrap_err();
    assert!(e.to_string().contains("window must be larger"), "{e}");
    assert_eq!(set("sinks:4+window:60,every=1", 1000, 2).budgets, [64, 64]);
    assert_eq!(set("keep-prompt(window:60)", 1000, 1).budgets, [60]);
}

#[test]
fn triggers() {
    let both = Trigger { prompt_end: true, every: Some(EVERY) };
    for (text, trigger) in [
        ("knorm:9", both),
        ("knorm:9,every=5", Trigger { every: Some(5), ..both }),
        ("knorm:9,evict=prompt", Trigger { every: None, ..both }),
        ("knorm:9,evict=decode,every=2", Trigger { prompt_end: false, every: Some(2) }),
        ("keep-first(knorm:9,evict=prompt)", Trigger { every: None, ..both }),
    ] {
        assert_eq!(set(text, 100, 1).trigger, trigger, "{text}");
    }
    assert_eq!(set("knorm:9,positions=compact", 100, 1).positions, Positions::Compact);
}

#[test]
fn budgets_per_layer() {
    assert_eq!(set("knorm:33%", 1000, 3).budgets, [330; 3]);
    assert_eq!(set("knorm:0.01%", 1000, 1).budgets, [1]);
    assert_eq!(set("knorm:5000", 1000, 1).budgets, [1000]);
    assert_eq!(set("per-layer:0=100%,2-9=7(knorm:50)", 1000, 4).budgets, [1000, 50, 7, 7]);
    // Sum kept, linear, the last layer 1/beta of the mean: 8 + (2 - 1/20) 120 ... 8 + 120/20.
    let p = set("pyramid(knorm:128)", 4096, 5).budgets;
    assert_eq!(p, [242, 185, 128, 71, 14]);
    assert_eq!(p.iter().sum::<usize>(), 5 * 128);
    // A context that the first layer's budget would exceed.
    let p = set("pyramid(knorm:128)", 160, 5).budgets;
    assert_eq!((p[0], p.iter().sum::<usize>()), (160, 5 * 128));
    assert_eq!(set("pyramid(knorm:128)", 4096, 1).budgets, [128]);
    assert_eq!(set("pyramid(knorm:5)", 4096, 3).budgets, [5; 3]);
    assert_eq!(set("pyramid(knorm:100%)", 64, 3).budgets, [64; 3]);
    assert_eq!(set("pyramid(per-layer:0=1(knorm:64))", 4096, 2).budgets[0], 1);
}

#[test]
fn a_default_budget_goes_to_those_without() {
    let at = |text, b: &str| KvSpec::parse(text, Some(b.parse().unwrap())).map(|s| s.to_string());
    assert_eq!(at("knorm", "64").unwrap(), "knorm:budget=64");
    assert_eq!(
        at("pyramid(knorm:positions=compact)", "25%").unwrap(),
        "pyramid(knorm:budget=25%,positions=compact)"
    );
    assert_eq!(at("knorm:budget=9", "64").unwrap(), "knorm:budget=9");
    assert_eq!(at("window", "64").unwrap(), "window:64");
    assert_eq!(at("sinks:4", "64").unwrap(), "sinks:4+window:60");
    assert_eq!(at("sinks:4+window", "64").unwrap(), "sinks:4+window:60");
    assert_eq!(at("full", "64").unwrap(), "full");
    assert!(at("sinks:40", "64").is_err());
}

#[test]
fn layers_that_cannot_be_served_are_named() {
    #[derive(Debug)]
    struct Picky;
    impl KvPolicy for Picky {
        fn needs(&self) -> Needs {
            Needs::default()
        }
        fn supports(&self, g: &LayerGeometry) -> Result<(), String> {
            if g.layer == 3 { Err("it is the third".into()) } else { Ok(()) }
        }
        fn score(&self, _: &crate::kv::policy::LayerView<'_>, _: usize, _: &mut [f32]) {}
    }
    let info = PolicyInfo::policy("picky", |_| Ok(Arc::new(Picky)));
    crate::kv::register(info).unwrap();
    assert!(matches!(crate::kv::register(info), Err(KvError::Register { .. })));
    assert!(crate::kv::register(PolicyInfo { name: "Picky", ..info }).is_err());
    assert!(crate::kv::register(PolicyInfo { name: "", ..info }).is_err());
    let e = plan("keep-prompt(picky:9)", 100, 1).unwrap_err();
    assert_eq!(e.to_string(), "kv policy keep-prompt(picky:budget=9) cannot serve layer 3: it is the third");
}

#[test]
fn every_built_in_policy_is_described() {
    for info in registered() {
        if info.name == "picky" {
            continue;
        }
        assert!(!info.idea.is_empty(), "{}", info.name);
        assert!(info.paper.is_empty() || info.paper.starts_with("arXiv:"), "{}", info.name);
        assert!(info.params.iter().all(|p| !p.default.is_empty() && !p.what.is_empty()), "{}", info.name);
        if !info.is_wrapper() {
            KvSpec::parse(info.name, Some(Budget::Entries(64))).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}

/// The table of docs/kv-policies.md is what the policies say of themselves.
#[test]
fn the_document_lists_every_policy() {
    let document = include_str!("../../../docs/kv-policies.md");
    for info in registered().into_iter().filter(|i| i.name != "picky") {
        let needs = match KvSpec::parse(info.name, Some(Budget::Entries(64))).map(|s| s.kind) {
            Ok(Kind::Set(policy, ..)) => policy.needs().to_string(),
            Ok(_) => "nothing".into(),
            Err(_) => "what the inner one needs".into(),
        };
        let params: Vec<_> = info.params.iter().map(|p| format!("`{}` ({})", p.name, p.default)).collect();
        let cells = [&format!("`{}`", info.name), info.idea, &params.join(", "), &needs, info.paper];
        let row = format!("| {} |", cells.join(" | ")).replace("|  |", "| |").replace("|  |", "| |");
        assert!(document.contains(&row), "docs/kv-policies.md lacks the row\n{row}");
    }
}

#[test]
fn long_and_strange_strings_are_shown_in_one_line_each() {
    for text in ["x".repeat(5000), "ä\n\t\u{7}".repeat(30), format!("{}knorm:9", "pyramid(".repeat(200))] {
        let e = text.parse::<KvSpec>().unwrap_err().to_string();
        assert_eq!(e.lines().count(), 3, "{e}");
        assert!(e.chars().count() < 1000, "{}", e.len());
    }
}

fn pieces() -> impl Strategy<Value = String> {
    let words = vec![
        "full",
        "window",
        "sinks",
        "random",
        "knorm",
        "h2o",
        "snapkv",
        "tova",
        "pyramid",
        "per-layer",
        "keep-prompt",
        "keep-first",
        "budget",
        "recent",
        "seed",
        "every",
        "evict",
        "positions",
        "compact",
        "both",
        "n",
        "0-1",
        ":",
        ":",
        "=",
        "=",
        ",",
        ",",
        "(",
        ")",
        "+",
        "%",
        "0",
        "4",
        "64",
        "25%",
        "1e3",
        " ",
        "ß",
        "-",
    ];
    prop::collection::vec(prop::sample::select(words), 0..14).prop_map(|v| v.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_string_panics_and_what_parses_round_trips(text in prop_oneof![pieces(), any::<String>()], b in 0usize..100) {
        for budget in [None, Some(Budget::Entries(b.max(1)))] {
            match KvSpec::parse(&text, budget) {
                Err(e) => prop_assert_eq!(e.to_string().lines().count(), 3),
                Ok(spec) => {
                    let again: KvSpec = spec.to_string().parse().map_err(|e| TestCaseError::fail(format!("{e}")))?;
                    prop_assert_eq!(&again, &spec);
                    let layer = Layer::gqa(2, 1, 4, 0).geometry;
                    let plans = [spec.plan(64, std::slice::from_ref(&layer)), again.plan(64, &[layer])];
                    let budgets = plans.map(|p| match p {
                        Ok(KvPlan::Set(s)) => (s.budgets, Some(s.trigger), s.positions),
                        Ok(KvPlan::Ring { sinks, window }) => (vec![sinks, window], None, Positions::Original),
                        Ok(KvPlan::Full) | Err(_) => (vec![], None, Positions::Original),
                    });
                    prop_assert_eq!(&budgets[0], &budgets[1]);
                }
            }
        }
    }

    #[test]
    fn every_sensible_string_round_trips(
        wrap in prop::sample::select(vec!["", "pyramid", "keep-prompt", "keep-first:3", "per-layer:0=7"]),
        name in prop::sample::select(vec!["random", "knorm", "window", "sinks"]),
        budget in prop_oneof![(20usize..1 << 32).prop_map(|n| n.to_string()), (0.01f64..100.0).prop_map(|p| format!("{p}%"))],
        every in prop::option::of(1usize..99),
        compact: bool,
    ) {
        let mut text = format!("{name}:budget={budget}");
        if let Some(n) = every {
            text += &format!(",every={n}");
        }
        if compact {
            text += ",positions=compact";
        }
        if !wrap.is_empty() {
            text = format!("{wrap}({text})");
        }
        let spec: KvSpec = text.parse().map_err(|e| TestCaseError::fail(format!("{e}")))?;
        let again: KvSpec = spec.to_string().parse().map_err(|e| TestCaseError::fail(format!("{e}")))?;
        prop_assert_eq!(again, spec);
    }
}
