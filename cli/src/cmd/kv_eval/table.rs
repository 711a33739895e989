//! results.csv: rows of finished cells, appended cell by cell, and settings.json beside it, which says what they were
//! measured with. What a kill left half-written is dropped; results of other settings are never mixed in. Knows nothing of
//! models.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The bucket that sums a cell up: its last row, whose presence says that the cell is whole.
pub const ALL: &str = "all";

/// Names of the columns. The last three tell of time: they alone may differ from run to run.
pub const COLUMNS: [&str; 20] = [
    "task",
    "policy",
    "budget",
    "budget_tokens",
    "kv",
    "bucket",
    "from",
    "to",
    "metric",
    "n",
    "value",
    "low",
    "high",
    "prompt_tokens",
    "new_tokens",
    "evicted",
    "bytes",
    "prompt_tokens_per_s",
    "new_tokens_per_s",
    "seconds",
];

/// What is measured at once: one policy with one budget on one task.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CellId {
    pub task: String,
    pub policy: String,
    /// As given: `64`, `25%`, or `-` for what has none.
    pub budget: String,
}

/// One line of results.csv.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub id: CellId,
    /// Entries per layer; `None` without a budget.
    pub budget_tokens: Option<usize>,
    /// The configuration string in full.
    pub kv: String,
    pub bucket: String,
    pub from: usize,
    pub to: usize,
    /// `accuracy` or `ppl`.
    pub metric: String,
    /// Answers or tokens scored.
    pub n: usize,
    /// NaN where nothing was scored.
    pub value: f64,
    /// Bounds of 95% confidence.
    pub low: f64,
    pub high: f64,
    /// Of the whole cell, as all that follows.
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    /// Tokens that some layer forgot, a sequence on average.
    pub evicted: f64,
    /// Bytes of the cache.
    pub bytes: u64,
    pub prompt_rate: f64,
    pub new_rate: f64,
    pub seconds: f64,
}

impl Row {
    /// The fields under [`COLUMNS`].
    pub fn record(&self) -> [String; COLUMNS.len()] {
        let rate = |x: f64| format!("{x:.1}");
        [
            self.id.task.clone(),
            self.id.policy.clone(),
            self.id.budget.clone(),
            self.budget_tokens.map_or(String::new(), |n| n.to_string()),
            self.kv.clone(),
            self.bucket.clone(),
            self.from.to_string(),
            self.to.to_string(),
            self.metric.clone(),
            self.n.to_string(),
            self.value.to_string(),
            self.low.to_string(),
            self.high.to_string(),
            self.prompt_tokens.to_string(),
            self.new_tokens.to_string(),
            self.evicted.to_string(),
            self.bytes.to_string(),
            rate(self.prompt_rate),
            rate(self.new_rate),
            format!("{:.3}", self.seconds),
        ]
    }

    fn parse(r: &csv::StringRecord) -> Option<Self> {
        fn at<T: std::str::FromStr>(r: &csv::StringRecord, name: &str) -> Option<T> {
            r.get(COLUMNS.iter().position(|c| *c == name)?)?.parse().ok()
        }
        let tokens: String = at(r, "budget_tokens")?;
        let budget_tokens = if tokens.is_empty() { None } else { Some(tokens.parse().ok()?) };
        Some(Self {
            id: CellId { task: at(r, "task")?, policy: at(r, "policy")?, budget: at(r, "budget")? },
            budget_tokens,
            kv: at(r, "kv")?,
            bucket: at(r, "bucket")?,
            from: at(r, "from")?,
            to: at(r, "to")?,
            metric: at(r, "metric")?,
            n: at(r, "n")?,
            value: at(r, "value")?,
            low: at(r, "low")?,
            high: at(r, "high")?,
            prompt_tokens: at(r, "prompt_tokens")?,
            new_tokens: at(r, "new_tokens")?,
            evicted: at(r, "evicted")?,
            bytes: at(r, "bytes")?,
            prompt_rate: at(r, "prompt_tokens_per_s")?,
            new_rate: at(r, "new_tokens_per_s")?,
            seconds: at(r, "seconds")?,
        })
    }
}

/// A folder of results.
pub struct Table {
    path: PathBuf,
    file: File,
    /// Rows of whole cells, in the order they were measured.
    pub rows: Vec<Row>,
}

impl Table {
    /// Opens or starts the results in `dir`. Keys of `settings` that the folder's settings lack are added (a task more);
    /// where both have a key, the values must agree.
    ///
    /// # Errors
    /// Results of other settings; a results.csv that is none; files that cannot be written.
    pub fn open(dir: &Path, settings: &Map<String, Value>) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
        let path = dir.join("results.csv");
        agree(dir, settings, path.exists())?;
        let text = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        let (rows, whole) =
            whole_cells(&text).with_context(|| format!("{}: not results of kv-eval", path.display()))?;
        let open = || -> std::io::Result<File> {
            let mut file = File::options().create(true).append(true).open(&path)?;
            file.set_len(whole as u64)?;
            if whole == 0 {
                file.write_all((COLUMNS.join(",") + "\n").as_bytes())?;
            }
            Ok(file)
        };
        let file = open().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, file, rows })
    }

    /// Whether a cell has been measured.
    pub fn has(&self, id: &CellId) -> bool {
        self.rows.iter().any(|r| r.id == *id)
    }

    /// Appends a cell's rows, the one of [`ALL`] last, and sees them to the disk.
    pub fn append(&mut self, rows: Vec<Row>) -> Result<()> {
        debug_assert!(rows.last().is_some_and(|r| r.bucket == ALL));
        let mut out = csv::Writer::from_writer(Vec::new());
        for r in &rows {
            out.write_record(r.record())?;
        }
        let bytes = out.into_inner().map_err(|e| e.into_error())?;
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("cannot write {}", self.path.display()))?;
        self.rows.extend(rows);
        Ok(())
    }
}

/// Rows of the cells that are whole, and the bytes up to the last of them. Rows of one cell stand together.
fn whole_cells(text: &[u8]) -> Result<(Vec<Row>, usize)> {
    let head = COLUMNS.join(",") + "\n";
    if !text.starts_with(head.as_bytes()) {
        // Killed while the first line was written, or another file.
        return if head.as_bytes().starts_with(text) { Ok((Vec::new(), 0)) } else { bail!("other columns") };
    }
    // A line without its end may still parse, with a number cut short.
    let lines = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(&text[..lines]);
    let (mut rows, mut cell, mut whole) = (Vec::new(), Vec::new(), head.len());
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record)? {
        let line = record.position().map_or(0, csv::Position::line);
        let row = Row::parse(&record).with_context(|| format!("line {line} is no row"))?;
        let last = row.bucket == ALL;
        cell.push(row);
        if last {
            rows.append(&mut cell);
            whole = reader.position().byte() as usize;
        }
    }
    Ok((rows, whole))
}

/// Compares `settings` with the folder's, and writes what is new.
fn agree(dir: &Path, settings: &Map<String, Value>, has_results: bool) -> Result<()> {
    let path = dir.join("settings.json");
    let mut known = match crate::text::read_json(&path) {
        Ok(Value::Object(map)) => map,
        Ok(_) => bail!("{}: not settings of kv-eval", path.display()),
        Err(_) if !path.exists() && !has_results => Map::new(),
        Err(e) => return Err(e.context("the results there cannot be continued without their settings")),
    };
    for (key, value) in settings {
        match known.get(key) {
            Some(old) if old != value => bail!(
                "{} holds results of other settings ({key}: {old} there, {value} now): choose another --out, or the same settings",
                dir.display()
            ),
            Some(_) => {}
            None => drop(known.insert(key.clone(), value.clone())),
        }
    }
    let mut out = crate::output::OutFile::create(&path)?;
    out.write_all((serde_json::to_string_pretty(&known)? + "\n").as_bytes())?;
    out.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(policy: &str, bucket: &str, value: f64) -> Row {
        Row {
            id: CellId { task: "recall".into(), policy: policy.into(), budget: "25%".into() },
            budget_tokens: Some(12),
            kv: format!("{policy}:budget=12,recent=3"),
            bucket: bucket.into(),
            from: 0,
            to: 32,
            metric: "accuracy".into(),
            n: 3,
            value,
            low: 0.0,
            high: 1.0 / 3.0,
            prompt_tokens: 5,
            new_tokens: 7,
            evicted: 1.5,
            bytes: 4096,
            prompt_rate: 1000.5,
            new_rate: 10.0,
            seconds: 0.125,
        }
    }

    fn settings(seed: u64) -> Map<String, Value> {
        json!({"seed": seed, "task recall": {"questions": 3}}).as_object().unwrap().clone()
    }

    #[test]
    fn every_kill_leaves_whole_cells() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.csv");
        let cells = [
            vec![row("h2o", "0-31", f64::NAN), row("h2o", ALL, 1.0 / 3.0)],
            vec![row("a,\"b\"", "0-31", 0.1), row("a,\"b\"", ALL, 0.2)],
        ];
        let mut t = Table::open(dir.path(), &settings(1)).unwrap();
        let mut sizes = vec![fs::metadata(&path).unwrap().len() as usize];
        for c in &cells {
            t.append(c.clone()).unwrap();
            sizes.push(fs::metadata(&path).unwrap().len() as usize);
        }
        drop(t);
        let text = fs::read(&path).unwrap();
        for cut in 0..=text.len() {
            fs::write(&path, &text[..cut]).unwrap();
            let mut t = Table::open(dir.path(), &settings(1)).unwrap();
            let whole = sizes.iter().filter(|s| **s <= cut).count().saturating_sub(1);
            assert_eq!(t.rows.len(), 2 * whole, "cut at {cut}");
            for c in &cells[whole..] {
                assert!(!t.has(&c[0].id));
                t.append(c.clone()).unwrap();
            }
            assert_eq!(fs::read(&path).unwrap(), text, "cut at {cut}");
        }
    }

    #[test]
    fn other_settings_and_other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        Table::open(dir.path(), &settings(1)).unwrap();
        let other = Table::open(dir.path(), &settings(2)).err().unwrap().to_string();
        assert!(other.contains("seed: 1 there, 2 now") && other.contains("--out"), "{other}");
        let mut more = settings(1);
        more.insert("task passkey".into(), json!(3));
        Table::open(dir.path(), &more).unwrap();
        Table::open(dir.path(), &settings(1)).unwrap();
        let path = dir.path().join("results.csv");
        fs::write(&path, "x,y\n1,2\n").unwrap();
        assert!(Table::open(dir.path(), &settings(1)).is_err());
        fs::write(&path, COLUMNS.join(",") + "\n1,2\n").unwrap();
        assert!(format!("{:#}", Table::open(dir.path(), &settings(1)).err().unwrap()).contains("line 2"));
        fs::remove_file(dir.path().join("settings.json")).unwrap();
        assert!(Table::open(dir.path(), &settings(1)).is_err());
    }
}
