//! The report: one HTML file without outside requests, a plot a task as SVG, and the summary for the terminal. Made of
//! results.csv alone; knows nothing of how they were measured.

use super::plot::{self, Axis, Plot, STYLES, Series};
use super::table::{ALL, COLUMNS, Row};
use crate::output;
use anyhow::Result;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// Writes report.html and a plot per task; returns the summary.
pub fn write(dir: &Path, rows: &[Row], order: &[String], about: &Map<String, Value>) -> Result<String> {
    let mut policies: Vec<&str> = order.iter().map(String::as_str).collect();
    let mut names: Vec<&str> = Vec::new();
    for r in rows {
        for (list, name) in [(&mut policies, &r.id.policy), (&mut names, &r.id.task)] {
            if !list.contains(&name.as_str()) {
                list.push(name);
            }
        }
    }
    policies.retain(|p| rows.iter().any(|r| r.id.policy == *p));
    let styles = styles(&policies);
    let (mut summary, mut tasks) = (String::new(), Vec::new());
    for name in names {
        let t = TaskView::new(name, rows, &policies, &styles);
        summary += &t.summary();
        let main = t.by_budget();
        let file: String = name.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
        save(dir, &format!("{file}.svg"), &main.standalone()?)?;
        let drawn = |plots: &[Plot]| plots.iter().map(Plot::inline).collect::<Result<Vec<_>>>();
        tasks.push(json!({
            "name": name,
            "is_text": t.is_text,
            "plots": drawn(&[vec![main], t.costs()].concat())?,
            "by_bucket": drawn(&t.by_bucket())?,
            "budgets": t.budgets.iter().map(|b| &b.0).collect::<Vec<_>>(),
            "table": t.table(),
        }));
    }
    let legend = policies.iter().zip(&styles).map(|(p, s)| json!({"name": p, "style": s % STYLES}));
    let ask = about.get("ask").cloned();
    let about = about.iter().map(|(k, v)| json!([k, v.as_str().map_or(v.to_string(), Into::into)]));
    let context = json!({
        "tasks": tasks,
        "about": about.collect::<Vec<_>>(),
        "ask": ask,
        "command": command(),
        "legend": legend.collect::<Vec<_>>(),
        "css": plot::css(":root"),
        "columns": COLUMNS,
        "rows": rows.iter().map(|r| r.record().to_vec()).collect::<Vec<_>>(),
    });
    let mut env = Environment::new();
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.add_template("report", include_str!("report.html"))?;
    let page = env.get_template("report")?.render(minijinja::Value::from(Serde(context)))?;
    save(dir, "report.html", &page)?;
    Ok(summary)
}

fn save(dir: &Path, name: &str, text: &str) -> Result<()> {
    let mut out = output::OutFile::create(&dir.join(name))?;
    out.write_all(text.as_bytes())?;
    out.finish()
}

/// The command line, as a shell would take it again.
fn command() -> String {
    let quoted = |a: String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+%@".contains(c);
        if !a.is_empty() && a.chars().all(plain) { a } else { format!("'{}'", a.replace('\'', "'\\''")) }
    };
    std::iter::once("rsinfer".to_owned())
        .chain(std::env::args().skip(1).map(quoted))
        .collect::<Vec<_>>()
        .join(" ")
}

/// A style for each policy: the full cache and the random one, which all others are compared with, have their own.
fn styles(policies: &[&str]) -> Vec<usize> {
    let mut next = 1;
    let mut style = |p: &&str| match *p {
        "full" => 0,
        "random" => STYLES - 1,
        _ => {
            next += 1;
            (next - 2) % (STYLES - 2) + 1
        }
    };
    policies.iter().map(&mut style).collect()
}

/// One task's results.
struct TaskView<'a> {
    name: &'a str,
    is_text: bool,
    rows: Vec<&'a Row>,
    policies: &'a [&'a str],
    styles: &'a [usize],
    /// Label and entries, in ascending order; those without a budget are not among them.
    budgets: Vec<(&'a str, usize)>,
}

impl<'a> TaskView<'a> {
    fn new(name: &'a str, rows: &'a [Row], policies: &'a [&'a str], styles: &'a [usize]) -> Self {
        let rows: Vec<&Row> = rows.iter().filter(|r| r.id.task == name).collect();
        let budget = |r: &&'a Row| r.budget_tokens.map(|n| (r.id.budget.as_str(), n));
        let mut budgets: Vec<(&str, usize)> = rows.iter().filter_map(budget).collect();
        budgets.sort_by_key(|b| (b.1, b.0));
        budgets.dedup();
        let is_text = rows.first().is_some_and(|r| r.metric == "ppl");
        Self { name, is_text, rows, policies, styles, budgets }
    }

    fn metric(&self) -> &'static str {
        if self.is_text { "perplexity" } else { "right answers" }
    }

    fn show(&self, value: f64) -> String {
        match () {
            () if value.is_nan() => "–".into(),
            () if !self.is_text => format!("{:.1}%", 100.0 * value),
            () if value >= 1000.0 => format!("{value:.2e}"),
            () => format!("{value:.2}"),
        }
    }

    /// A policy's row of one bucket; `budget` is `None` for what has none.
    fn row(&self, policy: &str, budget: Option<&str>, bucket: &str) -> Option<&'a Row> {
        let same = |r: &Row| match budget {
            Some(b) => r.budget_tokens.is_some() && r.id.budget == b,
            None => r.budget_tokens.is_none(),
        };
        self.rows.iter().copied().find(|r| r.id.policy == policy && r.bucket == bucket && same(r))
    }

    fn quality_axis(&self, rows: &[&Row]) -> Axis {
        if !self.is_text {
            return Axis::even(self.metric(), 0.0, 1.0, |y| format!("{:.0}%", y * 100.0));
        }
        let values = || rows.iter().map(|r| r.value).filter(|v| v.is_finite());
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
        Axis::logarithmic("perplexity (lower is better)", low.min(high), high)
    }

    /// Quality as the plots' y: perplexity by its logarithm.
    fn y(&self, value: f64) -> f64 {
        if self.is_text { value.log10() } else { value }
    }

    /// One line a policy through its budgets, `value` of each giving x, y and bounds; a level for what has no budget.
    fn lines(&self, from: f64, to: f64, value: impl Fn(&Row) -> [f64; 3]) -> Vec<Series> {
        let mut out = Vec::new();
        for (class, (&policy, &style)) in self.policies.iter().zip(self.styles).enumerate() {
            let level = self.row(policy, None, ALL);
            let points: Vec<[f64; 4]> = match level {
                Some(r) => [from, to].map(|x| [x, value(r)[0], f64::NAN, f64::NAN]).to_vec(),
                None => {
                    let rows =
                        self.budgets.iter().filter_map(|b| Some((b.1, self.row(policy, Some(b.0), ALL)?)));
                    // A little aside, so that equal values and their bounds can be told apart.
                    let aside = (class as f64 - (self.policies.len() - 1) as f64 / 2.0) * 0.004 * (to - from);
                    let point = |(n, r): (usize, &Row)| {
                        let [y, low, high] = value(r);
                        [(n as f64).log2() + aside, y, low, high]
                    };
                    rows.map(point).collect()
                }
            };
            let points: Vec<[f64; 4]> = points.into_iter().filter(|p| p[1].is_finite()).collect();
            if !points.is_empty() {
                out.push(Series { name: policy.into(), class, style, is_level: level.is_some(), points });
            }
        }
        out
    }

    fn budget_axis(&self) -> Axis {
        let values: Vec<f64> = self.budgets.iter().map(|b| b.1 as f64).collect();
        Axis::doubling("entries kept in each layer", &values, |x| format!("{x:.0}"))
    }

    fn summed(&self) -> Vec<&'a Row> {
        self.rows.iter().copied().filter(|r| r.bucket == ALL).collect()
    }

    fn by_budget(&self) -> Plot {
        let x = self.budget_axis();
        let series = self.lines(x.from, x.to, |r| [self.y(r.value), self.y(r.low), self.y(r.high)]);
        let title = format!("{}: {} by budget", self.name, self.metric());
        Plot { title, y: self.quality_axis(&self.summed()), x, series }
    }

    /// What quality costs: bytes and time.
    fn costs(&self) -> Vec<Plot> {
        let all = self.summed();
        let bytes: Vec<f64> = all.iter().map(|r| r.bytes as f64).collect();
        let whole = |b: f64| {
            let text = output::bytes(b.round() as u64);
            let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
            let number: f64 = number.parse().unwrap_or(b);
            if number < 10.0 { format!("{number:.1} {unit}") } else { format!("{number:.0} {unit}") }
        };
        let x = Axis::doubling("bytes of cache", &bytes, whole);
        let mut series = Vec::new();
        for (class, (&policy, &style)) in self.policies.iter().zip(self.styles).enumerate() {
            let mut rows: Vec<&Row> = all.iter().copied().filter(|r| r.id.policy == policy).collect();
            rows.sort_by_key(|r| r.bytes);
            let point = |r: &Row| [(r.bytes as f64).log2(), self.y(r.value), f64::NAN, f64::NAN];
            let points =
                rows.into_iter().map(point).filter(|p| p[0].is_finite() && p[1].is_finite()).collect();
            series.push(Series { name: policy.into(), class, style, is_level: false, points });
        }
        let title = format!("{}: {} by memory", self.name, self.metric());
        let memory = Plot { title, x, y: self.quality_axis(&all), series };
        let x = self.budget_axis();
        let speed = |r: &Row| if self.is_text { r.prompt_rate } else { r.new_rate };
        let fastest = all.iter().map(|r| speed(r)).fold(1.0, f64::max);
        let series = self.lines(x.from, x.to, |r| [speed(r), f64::NAN, f64::NAN]);
        let what = if self.is_text { "tokens read per second" } else { "new tokens per second" };
        let y = Axis::even(what, 0.0, fastest * 1.05, |y| format!("{y:.0}"));
        vec![memory, Plot { title: format!("{}: speed by budget", self.name), x, y, series }]
    }

    fn bucket_name(&self) -> &'static str {
        match self.name {
            "passkey" => "depth of the number in the text",
            _ if self.is_text => "position in the text",
            _ => "tokens between fact and question",
        }
    }

    /// For each budget, quality along the buckets.
    fn by_bucket(&self) -> Vec<Plot> {
        let mut labels: Vec<(usize, String)> =
            self.rows.iter().filter(|r| r.bucket != ALL).map(|r| (r.from, r.bucket.clone())).collect();
        labels.sort();
        labels.dedup();
        let labels: Vec<String> = labels.into_iter().map(|l| l.1).collect();
        let parts: Vec<&Row> = self.rows.iter().copied().filter(|r| r.bucket != ALL).collect();
        let y = self.quality_axis(&parts);
        let plot = |budget: &(&str, usize)| {
            let mut series = Vec::new();
            for (class, (&policy, &style)) in self.policies.iter().zip(self.styles).enumerate() {
                let is_level = self.row(policy, None, ALL).is_some();
                let key = if is_level { None } else { Some(budget.0) };
                let points: Vec<[f64; 4]> = labels
                    .iter()
                    .enumerate()
                    .filter_map(|(i, l)| Some((i, self.row(policy, key, l)?)))
                    .map(|(i, r)| [i as f64, self.y(r.value), f64::NAN, f64::NAN])
                    .filter(|p| p[1].is_finite())
                    .collect();
                series.push(Series { name: policy.into(), class, style, is_level, points });
            }
            let share = if budget.0.ends_with('%') { format!(" ({})", budget.0) } else { String::new() };
            let title = format!("{} entries{share}", budget.1);
            Plot { title, x: Axis::categories(self.bucket_name(), &labels), y: y.clone(), series }
        };
        self.budgets.iter().map(plot).collect()
    }

    /// Policies by budgets, for the page.
    fn table(&self) -> Value {
        let values = || self.summed().into_iter().map(|r| self.y(r.value)).filter(|v| v.is_finite());
        let (low, high) =
            (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let cell = |r: Option<&Row>| {
            let Some(r) = r else { return Value::Null };
            let share = if high > low { (self.y(r.value) - low) / (high - low) } else { 1.0 };
            let good = if self.is_text { 1.0 - share } else { share };
            json!({
                "value": self.show(r.value),
                "bounds": format!("{} to {}", self.show(r.low), self.show(r.high)),
                "good": if good.is_finite() { (good * 45.0).round() } else { 0.0 },
                "bytes": output::bytes(r.bytes),
                "rate": format!("{:.0}/s", if self.is_text { r.prompt_rate } else { r.new_rate }),
                "evicted": format!("{:.0} evicted", r.evicted),
            })
        };
        let mut out = Vec::new();
        for (&policy, &style) in self.policies.iter().zip(self.styles) {
            let own = cell(self.row(policy, None, ALL));
            let with: Vec<Value> =
                self.budgets.iter().map(|b| cell(self.row(policy, Some(b.0), ALL))).collect();
            if !own.is_null() || with.iter().any(|c| !c.is_null()) {
                out.push(json!({"policy": policy, "style": style % STYLES, "own": own, "cells": with}));
            }
        }
        out.into()
    }

    /// For the terminal.
    fn summary(&self) -> String {
        let wide = self.policies.iter().map(|p| p.chars().count()).max().unwrap_or(0).max(12);
        let mut out = format!("\n{} ({})\n{:wide$}", self.name, self.metric(), "");
        out += &format!("{:>11}", "no budget");
        self.budgets.iter().for_each(|b| out += &format!("{:>10}", b.0));
        out.push('\n');
        for policy in self.policies {
            let own = self.row(policy, None, ALL);
            let with: Vec<_> = self.budgets.iter().map(|b| self.row(policy, Some(b.0), ALL)).collect();
            if own.is_none() && with.iter().all(Option::is_none) {
                continue;
            }
            let show = |r: Option<&Row>| r.map_or(String::new(), |r| self.show(r.value));
            out += &format!("{policy:wide$}{:>11}", show(own));
            with.into_iter().for_each(|r| out += &format!("{:>10}", show(r)));
            out.push('\n');
        }
        out
    }
}
