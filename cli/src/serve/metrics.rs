//! Prometheus metrics of the process. Knows nothing of who records them.

use engine::Usage;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// See the module.
pub struct Metrics(PrometheusHandle);

/// Seconds, for passes and the gaps between tokens.
const FINE: [f64; 14] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0];
/// Seconds, for first tokens and requests.
const COARSE: [f64; 13] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];

impl Metrics {
    /// Records from now on; once in a process.
    ///
    /// # Errors
    /// Something records already.
    pub fn install() -> anyhow::Result<Self> {
        let name = |n: &str| Matcher::Full(n.to_owned());
        let handle = PrometheusBuilder::new()
            .set_buckets_for_metric(name("rsinfer_inter_token_seconds"), &FINE)?
            .set_buckets_for_metric(name("rsinfer_pass_seconds"), &FINE)?
            .set_buckets_for_metric(name("rsinfer_time_to_first_token_seconds"), &COARSE)?
            .set_buckets_for_metric(name("rsinfer_http_request_seconds"), &COARSE)?
            .install_recorder()?;
        Ok(Self(handle))
    }

    /// The text that Prometheus reads; llama-server's names for what it has too.
    pub fn render(&self) -> String {
        if let Some(u) = Usage::now() {
            metrics::gauge!("rsinfer_memory_bytes", "kind" => "anonymous").set(u.resident_anon as f64);
            metrics::gauge!("rsinfer_memory_bytes", "kind" => "file").set(u.resident_file as f64);
            metrics::counter!("rsinfer_page_faults_total", "kind" => "minor").absolute(u.minor_faults);
            metrics::counter!("rsinfer_page_faults_total", "kind" => "major").absolute(u.major_faults);
            metrics::counter!("rsinfer_disk_read_bytes_total").absolute(u.disk_read);
        }
        self.0.run_upkeep();
        let mut text = self.0.render();
        for (theirs, kind, ours) in LLAMA {
            let value = text.lines().find_map(|l| l.strip_prefix(ours)?.strip_prefix(' ')).unwrap_or("0");
            text += &format!("# TYPE llamacpp:{theirs} {kind}\nllamacpp:{theirs} {value}\n\n");
        }
        text
    }
}

/// llama-server's metrics: name, type, ours.
const LLAMA: [(&str, &str, &str); 6] = [
    ("prompt_tokens_total", "counter", "rsinfer_prompt_tokens_total"),
    ("tokens_predicted_total", "counter", "rsinfer_tokens_generated_total"),
    ("tokens_predicted_seconds_total", "counter", "rsinfer_inter_token_seconds_sum"),
    ("n_decode_total", "counter", "rsinfer_pass_seconds_count"),
    ("requests_processing", "gauge", "rsinfer_requests_running"),
    ("requests_deferred", "gauge", "rsinfer_requests_waiting"),
];
