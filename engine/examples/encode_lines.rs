//! A JSON string a line on stdin to a JSON array of token ids a line: what ref-tests/text/llama_cpp_compare.py runs.
//!
//! `encode_lines VOCAB.gguf [--special]`; with `--special`, BOS and EOS are added and special tokens parsed.

use std::io::{BufRead, Write};

use engine::gguf::{File, OpenMode};
use engine::text::{EncodeOptions, Vocab};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or("encode_lines VOCAB.gguf [--special]")?;
    let special = args.get(1).is_some_and(|a| a == "--special");
    let vocab = Vocab::from_metadata(File::open(path, OpenMode::Mmap)?.metadata())?;
    let options = EncodeOptions { add_special: special, parse_special: special };
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let (mut bytes, start) = (0, std::time::Instant::now());
    for line in std::io::stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        bytes += text.len();
        writeln!(out, "{}", serde_json::to_string(&vocab.encode(&text, options))?)?;
    }
    eprintln!("{bytes} bytes in {:?}", start.elapsed());
    Ok(out.flush()?)
}
