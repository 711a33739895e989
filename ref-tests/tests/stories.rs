//! A real model, small: karpathy's stories260K (Llama, SentencePiece), greedy, word for word.

use engine::text::EncodeOptions;
use engine::{GenerateOptions, LoadOptions, Model, Sampler, SamplerOptions, Session, SessionOptions};
use std::ops::ControlFlow;

const STORY: &str = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.";

#[test]
fn stories260k_tells_its_story_word_for_word() {
    let Some(path) = ref_tests::shared("models/stories260K.gguf") else { return };
    for mmap in [true, false] {
        let model = Model::load(&path, &LoadOptions { mmap, threads: 1, ..Default::default() }).unwrap();
        let options = SessionOptions { ctx: 256, ..SessionOptions::default() };
        let mut session = Session::new(&model, &options).unwrap();
        let prompt = model
            .vocab()
            .encode("Once upon a time", EncodeOptions { add_special: true, parse_special: false });
        let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
        let stop = GenerateOptions { max_tokens: Some(60), ..GenerateOptions::default() };
        let mut text = String::new();
        session
            .generate(&prompt, &mut sampler, &stop, |t| {
                text.push_str(t);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert!(text.starts_with(STORY), "{text}");
    }
}
