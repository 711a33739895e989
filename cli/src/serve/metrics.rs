//! Prometheus metrics of the process. Knows nothing of who records them.

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

    /// The text that Prometheus reads.
    pub fn render(&self) -> String {
        self.0.run_upkeep();
        self.0.render()
    }
}
