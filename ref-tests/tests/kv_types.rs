//! What cache types cost in quality: KL divergence of the demo model's predictions from those with an f32 cache. The table of
//! docs/numerics.md: `cargo test -p rsinfer-ref-tests --test kv_types -- --nocapture`.

use engine::text::EncodeOptions;
use engine::{DType, EngineError, LoadOptions, Model, Session, SessionOptions};
use ref_tests::{compare, root};
use std::sync::Arc;

const TOKENS: usize = 512;
const CHUNKS: usize = 4;

fn logits(model: &Arc<Model>, ids: &[u32], k: DType, k_pe: Option<DType>) -> (Vec<f32>, usize) {
    let o = SessionOptions { ctx: TOKENS, cache_k: k, cache_k_pe: k_pe, ..SessionOptions::default() };
    let mut s = Session::new(model, &o).unwrap();
    let mut out = Vec::new();
    for chunk in ids.chunks_exact(TOKENS) {
        s.truncate(0);
        // Half is read as a prompt, half decoded: both kernels read the cache.
        s.eval_all(&chunk[..TOKENS / 2], |_, row| {
            out.extend_from_slice(row);
            Ok::<_, EngineError>(())
        })
        .unwrap();
        for t in &chunk[TOKENS / 2..] {
            out.extend_from_slice(s.eval(&[*t]).unwrap());
        }
    }
    (out, s.cache_bytes() / TOKENS)
}

#[test]
fn smaller_types_cost_what_the_table_says() {
    let Some(path) = ref_tests::shared("corpus/shakespeare.txt") else { return };
    let text: Vec<char> = std::fs::read_to_string(path).unwrap().chars().collect();
    let text: String = text[(text.len() as f64 * 0.9) as usize..].iter().collect();
    let path = root().join("ref-tests/demo-model/demo-q8_0.gguf");
    let model = Model::load(&path, &LoadOptions { threads: 2, ..Default::default() }).unwrap();
    let ids = model.vocab().encode(&text, EncodeOptions { add_special: true, parse_special: true });
    let ids = &ids[..CHUNKS * TOKENS];
    let vocab = model.info().n_vocab;
    let (reference, _) = logits(&model, ids, DType::F32, None);
    use DType::{BF16, F16, F32, Q4_0, Q8_0};
    // Latent, k_pe where asked for, and the mean KL that is allowed.
    let rows = [
        (F32, None, 0.0),
        (F16, None, 5e-3),
        (BF16, None, 2e-2),
        (Q8_0, None, 2e-2),
        (Q4_0, None, 2e-1),
        (F16, Some(Q8_0), 2e-2),
        (F16, Some(Q4_0), 5e-1),
        (Q8_0, Some(Q8_0), 2e-2),
        (Q4_0, Some(Q4_0), 5e-1),
    ];
    println!(
        "| latent | k_pe | bytes a token | mean KL | max KL | same best token |\n| --- | --- | --- | --- | --- | --- |"
    );
    for (k, k_pe, bar) in rows {
        let (other, bytes) = logits(&model, ids, k, k_pe);
        let d = compare(&reference, &other, vocab);
        let shown = k_pe.unwrap_or(match k {
            F32 | BF16 => k,
            _ => F16,
        });
        println!(
            "| {} | {} | {bytes} | {:.2e} | {:.2e} | {:.2}% |",
            k.name(),
            shown.name(),
            d.mean_kl,
            d.max_kl,
            100.0 * d.top1
        );
        assert!(d.mean_kl <= bar, "{k:?}, {k_pe:?}: {d:?}");
    }
}
