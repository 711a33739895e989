//! Tests of the tests: kernels that ship with one instruction wrong, each run by what its module's tests ask of it. CI takes a sample
//! (`a_sample_is_caught`); all of them, and which are not noticed, in minutes to hours (`RSINFER_MUTANTS=skinny` narrows it by name):
//!
//!     cargo test -p rsinfer-ref-tests --test cuda_kernels -- --ignored --nocapture all_mutants

use crate::{attention, half, matvec, mla, skinny};
use kernels::cuda::modules::all;
use ptx::Stats;
use quant::DType;
use ref_tests::mirror::Text;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Once};

/// A text that stands in for one entry point of a module, and the most instructions that a launch of it took or may take.
#[derive(Clone)]
struct Mutant {
    module: &'static str,
    entry: &'static str,
    text: Arc<Text>,
    most: u64,
    clean: bool,
}

thread_local! {
    static MUTANT: RefCell<Option<Mutant>> = const { RefCell::new(None) };
}

/// Whether this thread looks for mutants: launches then are the interpreter's alone, of one text.
pub(crate) fn active() -> bool {
    MUTANT.with_borrow(Option::is_some)
}

/// What to launch in an entry point's place, and its limit of instructions.
pub(crate) fn stands_in(module: &str, entry: &str) -> Option<(Arc<Text>, Option<u64>)> {
    MUTANT.with_borrow(|m| {
        let m = m.as_ref().filter(|m| (m.module, m.entry) == (module, entry))?;
        // A mutant that takes twice as long will not end.
        Some((m.text.clone(), (!m.clean).then_some(2 * m.most + 1000)))
    })
}

/// Says what such a launch took.
pub(crate) fn took(stats: Stats) {
    MUTANT.with_borrow_mut(|m| {
        m.iter_mut().filter(|m| m.clean).for_each(|m| m.most = m.most.max(stats.instructions));
    });
}

/// An entry point, and what is asked of it.
struct Target {
    module: &'static str,
    entry: &'static str,
    suite: fn(),
}

const TARGETS: &[Target] = &[
    Target { module: "matvec_q4_k", entry: "matvec_1", suite: || matvec::suite(DType::Q4_K) },
    Target { module: "matvec_q6_k", entry: "matvec_1", suite: || matvec::suite(DType::Q6_K) },
    Target { module: "matvec_q5_0", entry: "matvec_1", suite: || matvec::suite(DType::Q5_0) },
    Target { module: "matvec_f16", entry: "matvec_1", suite: || matvec::suite(DType::F16) },
    Target { module: "matvec_q4_k", entry: "gate_1", suite: || matvec::gates(DType::Q4_K) },
    Target { module: "skinny_q4_k", entry: "skinny_32x16", suite: || skinny::suite(75, DType::Q4_K, 2) },
    Target { module: "skinny_q4_k_sm80", entry: "skinny_16x8", suite: || skinny::suite(80, DType::Q4_K, 0) },
    Target { module: "skinny_q4_k_sm80", entry: "skinny_32x8", suite: || skinny::suite(80, DType::Q4_K, 1) },
    Target { module: "skinny_q4_k_sm80", entry: "skinny_32x16", suite: || skinny::suite(80, DType::Q4_K, 2) },
    Target { module: "matmul_half_q4_k_sm80", entry: "matmul_32", suite: || half::suite("matmul_32") },
    Target { module: "matmul_half_q4_k_sm80", entry: "matmul_128", suite: || half::suite("matmul_128") },
    Target { module: "matmul_half_q4_k_sm80", entry: "matmul_256", suite: || half::suite("matmul_256") },
    Target { module: "attention_f16", entry: "attend", suite: attention::suite },
    Target { module: "attention_f16", entry: "merge", suite: attention::suite },
    Target { module: "mla_f16_sm80", entry: "mla_split", suite: || mla::suite("mla_split") },
    Target { module: "mla_f16_sm80", entry: "mla_16", suite: || mla::suite("mla_16") },
    Target { module: "mla_f16_sm80", entry: "mla_64", suite: || mla::suite("mla_64") },
];

/// What an instruction may be mistaken for.
const OTHERS: [(&str, &str); 22] = [
    ("add.rn.f32", "sub.rn.f32"),
    ("mul.rn.f32", "add.rn.f32"),
    ("max.f32", "min.f32"),
    ("dp4a.s32.s32", "dp4a.s32.u32"),
    ("shfl.sync.idx", "shfl.sync.down"),
    ("shfl.sync.bfly", "shfl.sync.down"),
    ("and.b32", "or.b32"),
    ("or.b32", "and.b32"),
    ("shr.u32", "shl.b32"),
    ("shl.b32", "shr.u32"),
    ("add.s32", "sub.s32"),
    ("sub.s32", "add.s32"),
    ("add.s64", "sub.s64"),
    ("cvt.rn.f32.s32", "cvt.rn.f32.u32"),
    ("setp.lt.", "setp.le."),
    ("setp.le.", "setp.lt."),
    ("setp.gt.", "setp.ge."),
    ("setp.ge.", "setp.gt."),
    ("setp.eq.", "setp.ne."),
    ("setp.ne.", "setp.eq."),
    ("@%p", "@!%p"),
    ("@!%p", "@%p"),
];
/// What may be forgotten.
const NEEDED: [&str; 6] = ["bar.", "cp.async", "st.", "griddepcontrol.wait", "mma.", "ldmatrix."];
/// Whose last number may be off by one.
const NUMBERS: [&str; 10] =
    ["add.s", "add.u", "shl.", "shr.", "and.", "or.", "mad.", "mul.", "setp.", "cp.async.wait_group"];
/// Whose last two operands are not to be swapped.
const ORDERED: [&str; 8] = ["sub.", "setp.l", "setp.g", "selp.", "div.", "rem.", "prmt.", "shr."];

/// A line's mutants.
fn mutants(line: &str) -> Vec<String> {
    let code = line.trim();
    let (guard, instruction) = match code.strip_prefix('@') {
        Some(rest) => rest
            .split_once([' ', '\t'])
            .map_or(("", rest), |(_, i)| (code.split_whitespace().next().unwrap(), i.trim())),
        None => ("", code),
    };
    if !instruction.ends_with(';') || instruction.starts_with(['.', '/']) {
        return Vec::new();
    }
    let starts = |list: &[&str]| list.iter().any(|s| instruction.starts_with(s));
    let mut out = Vec::new();
    for (from, to) in OTHERS {
        if code.starts_with(from) || instruction.starts_with(from) {
            out.push(code.replacen(from, to, 1));
        }
    }
    if starts(&NEEDED) {
        out.push(String::new());
    }
    let Some((head, last)) = instruction.trim_end_matches(';').rsplit_once([' ', '\t']) else { return out };
    if starts(&NUMBERS)
        && let Ok(number) = last.parse::<i64>()
    {
        out.push(format!("{guard} {head} {};", number + 1));
    }
    // A word too far.
    if let Some((before, rest)) = instruction.split_once('+')
        && let Some((number, after)) = rest.split_once(']')
        && let Ok(number) = number.parse::<i64>()
    {
        let by = if instruction.contains(".v4.") || instruction.starts_with("cp.async.cg") { 16 } else { 4 };
        out.push(format!("{guard} {before}+{}]{after}", number + by));
    }
    let operands: Vec<&str> = instruction.trim_end_matches(';').split(", ").collect();
    if starts(&ORDERED)
        && let [first, a, b, rest @ ..] = &operands[..]
        && a != b
    {
        out.push(format!("{guard} {};", [&[*first, *b, *a][..], rest].concat().join(", ")));
    }
    out
}

/// What no thread can run.
const TRAP: &str = "bar.warp.sync 0;";

#[derive(Default)]
struct Count {
    mutants: usize,
    /// Unnoticed, of instructions that the suite never reaches.
    idle: Vec<String>,
    /// Unnoticed.
    missed: Vec<String>,
}

impl Target {
    /// Runs one mutant in `every`.
    fn run(&self, every: usize) -> Count {
        let text = all().find(|m| m.name == self.module).expect("it ships").text;
        let lines: Vec<&str> = text.lines().collect();
        let entry = |l: &&str| l.starts_with(".visible .entry ");
        let first = lines.iter().position(entry).unwrap();
        let start = lines.iter().position(|l| *l == format!(".visible .entry {}(", self.entry)).unwrap();
        let end = lines[start + 1..].iter().position(entry).map_or(lines.len(), |e| start + 1 + e);
        // The mutated entry alone: parsing is what most mutants cost.
        let with = |at: usize, line: &str| {
            let body: Vec<&str> = (start..end).map(|i| if i == at { line } else { lines[i] }).collect();
            Text::new(&[&lines[..first], &body].concat().join("\n")).map(Arc::new)
        };
        let clean = with(start, lines[start]).expect("it ships");
        let mut mutant = Mutant { module: self.module, entry: self.entry, text: clean, most: 0, clean: true };
        let run = |mutant: &Mutant| {
            MUTANT.set(Some(mutant.clone()));
            let passed = catch_unwind(AssertUnwindSafe(self.suite)).is_ok();
            (passed, MUTANT.take().expect("as it was").most)
        };
        (_, mutant.most) = run(&mutant);
        assert!(mutant.most > 0, "{} {}: nothing launches it", self.module, self.entry);
        mutant.clean = false;
        assert!(run(&mutant).0, "{} {} as it ships", self.module, self.entry);
        let (mut count, mut at) = (Count::default(), 0);
        for (i, shipped) in lines.iter().enumerate().take(end).skip(start) {
            for line in mutants(shipped) {
                at += 1;
                // Spread over kinds of changes, the same at every run.
                if at * 7919 % every != 0 {
                    continue;
                }
                let Ok(text) = with(i, &line) else { continue };
                mutant.text = text;
                count.mutants += 1;
                if run(&mutant).0 {
                    let what = format!("{}: {}  ->  {line}", i + 1, shipped.trim());
                    let guard = shipped.split_whitespace().next().filter(|w| w.starts_with('@'));
                    mutant.text = with(i, &format!("{} {TRAP}", guard.unwrap_or_default())).expect("a trap");
                    if run(&mutant).0 { count.idle.push(what) } else { count.missed.push(what) }
                }
            }
        }
        count
    }
}

/// Mutants fail in silence.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !active() {
                loud(info);
            }
        }));
    });
}

/// One in `every` mutants of the targets whose name contains `only`. Of those that change what runs some nine in ten must be noticed.
fn check(every: usize, only: &str) {
    quiet();
    let (mut all, mut missed) = (0, 0);
    for t in TARGETS.iter().filter(|t| format!("{} {}", t.module, t.entry).contains(only)) {
        let begun = std::time::Instant::now();
        let c = t.run(every);
        println!(
            "{} {}: {} mutants, {} missed, {} where nothing runs, {:.1?}",
            t.module,
            t.entry,
            c.mutants,
            c.missed.len(),
            c.idle.len(),
            begun.elapsed()
        );
        c.missed.iter().for_each(|m| println!("  {m}"));
        c.idle.iter().for_each(|m| println!("  idle: {m}"));
        (all, missed) = (all + c.mutants - c.idle.len(), missed + c.missed.len());
    }
    // The root: a sample may be unlucky.
    assert!(missed <= all / 10 + all.isqrt(), "{missed} of {all} are not noticed");
}

#[test]
fn a_sample_is_caught() {
    check(199, "");
}

#[test]
#[ignore = "takes long: see above"]
fn all_mutants_are_caught() {
    let every = std::env::var("RSINFER_MUTANTS_EVERY").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    check(every, &std::env::var("RSINFER_MUTANTS").unwrap_or_default());
}

/// The mutants of a line, worked out by hand.
#[test]
fn a_line_has_these_mutants() {
    let of = |line: &str| mutants(line).into_iter().map(|m| m.trim().to_owned()).collect::<Vec<_>>();
    assert_eq!(of("\tadd.s32 \t%r1, %r2, 7;"), ["sub.s32 \t%r1, %r2, 7;", "add.s32 \t%r1, %r2, 8;"]);
    assert_eq!(of("\t@%p1 bra \t$L__BB0_2;"), ["@!%p1 bra \t$L__BB0_2;"]);
    assert_eq!(of("\tbar.sync \t0;"), [""]);
    assert_eq!(of("\tcp.async.wait_group 2;"), ["", "cp.async.wait_group 3;"]);
    assert_eq!(
        of("\tsetp.lt.u32 \t%p3, %r4, %r5;"),
        ["setp.le.u32 \t%p3, %r4, %r5;", "setp.lt.u32 \t%p3, %r5, %r4;"]
    );
    assert_eq!(of("\tld.global.f32 \t%f1, [%rd1+8];"), ["ld.global.f32 \t%f1, [%rd1+12];"]);
    assert_eq!(of("\t@!%p2 st.f32 \t[%rd1], %f1;"), ["@%p2 st.f32 \t[%rd1], %f1;", ""]);
    assert!(of("$L__BB0_2:").is_empty() && of("\t.reg .pred \t%p<9>;").is_empty());
}
