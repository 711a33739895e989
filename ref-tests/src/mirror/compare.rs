//! Two contents of an allocation: the interpreter's and the GPU's. Equal to the bit, but for kernels whose sums hardware rounds in ways of
//! its own.

use kernels::cuda::modules::Ptx;

/// How far a kernel may be from the interpreter, as a share of the largest value of its result: module (its beginning), entry point
/// (its beginning), bar. The first that fits counts. They are asked for only where a kernel has `mma` on floats: how hardware rounds the
/// sum inside of one is not defined; everything else must have the interpreter's bits.
/// Where one part of f16 is made of a softmax's weight (prompts; decoding with many heads), a score that differs in its last bits may put the
/// weight on the other side of a boundary: a 2048th of it.
/// Rows of prompts times block formats are summed in place over whole rows.
const BARS: &[(&str, &str, f32)] = &[
    ("mla", "mla_split", 1e-5),
    ("mla", "mla_", 1e-3),
    ("prompt_half", "", 1e-3),
    ("attend_half", "attend_many", 1e-3),
    ("attend_half", "packed_many", 1e-3),
    ("matmul_half", "", 5e-4),
    ("", "", 1e-5),
];

/// The bar of a kernel that cannot be exact.
pub fn bar(ptx: &Ptx, entry: &str) -> Option<f32> {
    let start = ptx.text.find(&format!(".entry {entry}("))?;
    let body = &ptx.text[start..];
    let end = body[1..].find(".entry ").map_or(body.len(), |e| e + 1);
    let float =
        |l: &&str| l.contains("mma.sync") && [".f16.", ".bf16.", ".tf32."].iter().any(|t| l.contains(t));
    body[..end].lines().find(float)?;
    BARS.iter().find(|b| ptx.name.starts_with(b.0) && entry.starts_with(b.1)).map(|b| b.2)
}

/// One word that differs.
pub struct Word {
    /// Its place in the allocation, in words of four bytes.
    pub index: usize,
    pub expected: u32,
    pub found: u32,
}

/// How two contents differ.
pub struct Difference {
    /// The first few words that do.
    pub first: Vec<Word>,
    /// How many do, and of how many.
    pub count: usize,
    pub words: usize,
    /// How many of these the GPU never wrote.
    pub untouched: usize,
    /// The largest difference as floats, as a share of the largest value; of all words.
    pub worst: f32,
    /// Within the bar.
    pub passes: bool,
}

/// Most words that are listed.
const LISTED: usize = 8;

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks(4).map(|c| {
        let mut word = [0; 4];
        word[..c.len()].copy_from_slice(c);
        u32::from_le_bytes(word)
    })
}

/// Compares contents of the same length that are not equal.
pub fn difference(expected: &[u8], found: &[u8], bar: Option<f32>, pattern: u8) -> Difference {
    let float = |w: u32| f32::from_bits(w);
    let largest = words(expected).map(float).filter(|v| v.is_finite()).fold(0f32, |m, v| m.max(v.abs()));
    let pattern = u32::from_le_bytes([pattern; 4]);
    let mut d =
        Difference { first: Vec::new(), count: 0, words: 0, untouched: 0, worst: 0.0, passes: bar.is_some() };
    for (index, (e, f)) in words(expected).zip(words(found)).enumerate() {
        d.words += 1;
        if e == f {
            continue;
        }
        let share = (float(e) - float(f)).abs() / largest;
        let share = if share.is_nan() { f32::INFINITY } else { share };
        d.worst = d.worst.max(share);
        let both_nan = float(e).is_nan() && float(f).is_nan();
        if bar.is_some_and(|b| share <= b || both_nan) {
            continue;
        }
        d.passes = false;
        d.count += 1;
        d.untouched += usize::from(f == pattern);
        if d.first.len() < LISTED {
            d.first.push(Word { index, expected: e, found: f });
        }
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::cuda::modules::module;

    fn bytes(x: &[f32]) -> Vec<u8> {
        x.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn what_differs_is_named() {
        let (a, mut b) = (bytes(&[1.0, 2.0, -4.0]), bytes(&[1.0, 2.0, -4.0]));
        b[8..].copy_from_slice(&[0xa5; 4]);
        let d = difference(&a, &b, None, 0xa5);
        assert_eq!((d.count, d.words, d.untouched, d.passes), (1, 3, 1, false));
        assert_eq!((d.first[0].index, d.first[0].expected), (2, (-4f32).to_bits()));
        let near = bytes(&[1.0, 2.00001, -4.0]);
        assert!(difference(&a, &near, Some(1e-5), 0).passes && !difference(&a, &near, Some(1e-6), 0).passes);
        assert!(!difference(&a, &near, None, 0).passes);
        // Ends that are no whole word count too; NaN is far from everything else.
        assert_eq!(difference(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 6], None, 0).first[0].index, 1);
        assert!(!difference(&a, &bytes(&[1.0, f32::NAN, -4.0]), Some(1e-5), 0).passes);
    }

    /// Products on int8 are exact, and so is whatever has no `mma`.
    #[test]
    fn only_mma_on_floats_has_a_bar() {
        let named = |name: &str| module(name).expect("it ships");
        assert_eq!(bar(named("matmul_q4_k"), "matmul"), None);
        assert_eq!(bar(named("matvec_f16"), "matvec_1"), None);
        let text = ".visible .entry a()\n{\nadd.rn.f32\n}\n.visible .entry b()\n{\n\
                    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32\n}\n";
        let made = Ptx { name: "made", text };
        assert_eq!((bar(&made, "a"), bar(&made, "b")), (None, Some(1e-5)));
    }
}
