//! Bench results as llama-bench's table, JSON, JSON lines or CSV. Knows nothing of how they were measured.

use super::{Format, Outcome, Setup};
use crate::memory::Resident;
use crate::output;
use serde_json::{Value, json};

/// Name and value of every field, in llama-bench's order and under its names; ours at the end.
fn fields(o: &Outcome) -> Vec<(&'static str, Value)> {
    let (s, t, i) = (&o.setup, &o.test, &o.info);
    let ns: Vec<f64> = o.seconds.iter().map(|s| (s * 1e9).round()).collect();
    let rates = o.rates();
    let ((avg_ns, sd_ns), (avg_ts, sd_ts)) = (mean(&ns), mean(&rates));
    vec![
        ("backends", i.device.as_str().into()),
        ("model_filename", s.source.name().into()),
        ("model_type", i.label.as_str().into()),
        ("model_size", i.size.into()),
        ("model_n_params", i.params.into()),
        ("n_batch", s.batch.into()),
        ("n_threads", s.threads.into()),
        ("type_k", s.cache_k.name().into()),
        ("type_v", s.cache_v.name().into()),
        ("kv_policy", s.kv.to_string().into()),
        ("use_mmap", (s.memory.access != engine::plan::Access::Read).into()),
        ("n_prompt", t.prompt.into()),
        ("n_gen", t.generated.into()),
        ("n_depth", t.depth.into()),
        ("n_parallel", t.sequences.into()),
        ("test_time", o.time.as_str().into()),
        ("avg_ns", (avg_ns as u64).into()),
        ("stddev_ns", (sd_ns as u64).into()),
        ("avg_ts", avg_ts.into()),
        ("stddev_ts", sd_ts.into()),
        ("samples_ns", ns.iter().map(|&n| Value::from(n as u64)).collect()),
        ("samples_ts", rates.iter().map(|&r| Value::from(r)).collect()),
        ("read_bytes_per_second", o.read_rate().map_or(Value::Null, Value::from)),
        ("bandwidth_bytes_per_second", o.bandwidth.into()),
        ("cache_bytes", o.memory.cache.into()),
        ("scratch_bytes", o.memory.scratch.into()),
        ("rss_file_bytes", o.memory.resident.map_or(Value::Null, |r| r.file.into())),
        ("rss_anon_bytes", o.memory.resident.map_or(Value::Null, |r| r.anon.into())),
        ("bandwidth_share", o.read_rate().map_or(Value::Null, |r| (r / o.bandwidth).into())),
    ]
}

/// Mean and sample standard deviation.
pub fn mean(v: &[f64]) -> (f64, f64) {
    let n = v.len() as f64;
    let mean = v.iter().sum::<f64>() / n;
    let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, var.sqrt())
}

/// Prints outcomes one by one; widths follow what is known beforehand.
pub struct Report {
    format: Format,
    name_width: usize,
    /// Columns of the table that differ between setups.
    varies: [(bool, &'static str); 3],
    printed: usize,
}

impl Report {
    pub fn new(format: Format, setups: &[Setup]) -> Self {
        let varied = |f: fn(&Setup) -> String, default: &str| setups.iter().any(|s| f(s) != default);
        let varies = [
            (varied(|s| s.batch.to_string(), "2048"), "n_batch"),
            (varied(|s| s.cache_k.name().into(), "f16"), "type_k"),
            (varied(|s| s.cache_v.name().into(), "f16"), "type_v"),
        ];
        Self { format, name_width: 30, varies, printed: 0 }
    }

    /// The text for the next outcome, with whatever must stand before it.
    pub fn add(&mut self, o: &Outcome) -> String {
        let first = self.printed == 0;
        self.printed += 1;
        match self.format {
            Format::Md => {
                let mut text = if first { self.row(&self.header()) + &self.rule() } else { String::new() };
                text += &self.row(&self.cells(o));
                text
            }
            Format::Json => (if first { "[\n" } else { ",\n" }).to_owned() + &indent(&object(o, true)),
            Format::Jsonl => object(o, false) + "\n",
            Format::Csv => {
                let fields: Vec<_> = fields(o).into_iter().filter(|f| !f.1.is_array()).collect();
                let names: Vec<&str> = fields.iter().map(|f| f.0).collect();
                let values: Vec<String> = fields.iter().map(|f| quoted(&f.1)).collect();
                let head = if first { names.join(",") + "\n" } else { String::new() };
                head + &values.join(",") + "\n"
            }
        }
    }

    /// What must stand at the end.
    pub fn finish(&self) -> &'static str {
        match self.format {
            Format::Json if self.printed == 0 => "[]\n",
            Format::Json => "\n]\n",
            _ => "",
        }
    }

    fn header(&self) -> Vec<String> {
        let extra = self.varies.iter().filter(|v| v.0).map(|v| v.1);
        let mut names = vec!["model", "size", "params", "backend", "threads"];
        names.extend(extra);
        names.extend(["test", "t/s", "GB/s", "of bandwidth", "mapped", "anonymous"]);
        names.into_iter().map(Into::into).collect()
    }

    fn cells(&self, o: &Outcome) -> Vec<String> {
        let (s, i) = (&o.setup, &o.info);
        let (ts, sd) = mean(&o.rates());
        let read = o.read_rate();
        let mut cells = vec![
            i.label.clone(),
            output::bytes(i.size),
            params(i.params),
            i.backend.clone(),
            s.threads.to_string(),
        ];
        let values = [s.batch.to_string(), s.cache_k.name().into(), s.cache_v.name().into()];
        cells.extend(self.varies.iter().zip(values).filter(|(v, _)| v.0).map(|(_, c)| c));
        cells.push(o.test.name());
        cells.push(format!("{ts:.2} ± {sd:.2}"));
        cells.push(read.map_or("-".into(), |r| format!("{:.2}", r / 1e9)));
        cells.push(read.map_or("-".into(), |r| format!("{:.0}%", 100.0 * r / o.bandwidth)));
        let resident =
            |f: fn(&Resident) -> u64| o.memory.resident.map_or("-".into(), |r| output::bytes(f(&r)));
        cells.push(resident(|r| r.file));
        cells.push(resident(|r| r.anon));
        cells
    }

    fn widths(&self) -> Vec<usize> {
        let mut w = vec![self.name_width, 10, 10, 10, 7];
        w.extend(self.varies.iter().filter(|v| v.0).map(|_| 7));
        w.extend([16, 20, 8, 12, 10, 10]);
        w
    }

    /// The first and the backend's column to the left, the others to the right.
    fn row(&self, cells: &[String]) -> String {
        let text = cells.iter().zip(self.widths()).enumerate().map(|(i, (c, w))| match i {
            0 | 3 => format!(" {c:<w$} |"),
            _ => format!(" {c:>w$} |"),
        });
        format!("|{}\n", text.collect::<String>())
    }

    fn rule(&self) -> String {
        let text = self.widths().into_iter().enumerate().map(|(i, w)| match i {
            0 | 3 => format!(" {} |", "-".repeat(w)),
            _ => format!(" {}: |", "-".repeat(w - 1)),
        });
        format!("|{}\n", text.collect::<String>())
    }
}

fn params(n: u64) -> String {
    if n >= 1_000_000_000 { format!("{:.2} B", n as f64 / 1e9) } else { format!("{:.2} M", n as f64 / 1e6) }
}

fn object(o: &Outcome, pretty: bool) -> String {
    let map: Value =
        json!(fields(o).into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<serde_json::Map<_, _>>());
    let text = if pretty { serde_json::to_string_pretty(&map) } else { serde_json::to_string(&map) };
    text.unwrap_or_default()
}

fn indent(s: &str) -> String {
    s.lines().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n")
}

/// A CSV field in quotes, as llama-bench writes all of them.
fn quoted(v: &Value) -> String {
    let text = match v {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        v => v.to_string(),
    };
    format!("\"{}\"", text.replace('"', "\"\""))
}
