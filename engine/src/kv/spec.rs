//! The string that configures a cache anywhere (`--kv`): parsing, errors that point at a word, and the canonical form.
//!
//! ```text
//! full | window:1024 | sinks:4+window:2044            bounded without choosing, by a ring
//! h2o:budget=1024,recent=256                          a policy and its parameters
//! keep-first:16(h2o:budget=25%,every=8)               a wrapper around it
//! ```
//! Every policy takes `budget` (entries per layer, or a share of the context as `25%`), `evict` (`prompt`, `decode` or
//! `both`), `every` (decoded tokens between evictions) and `positions` (`original` or `compact`). Knows nothing of caches.

mod parse;

use super::policies::streaming::Streaming;
use super::policy::{KvError, KvPolicy, LayerBudget, LayerGeometry, Needs};
use super::registry::{Evict, Make, ParamError, Params, PolicyInfo, registered};
use parse::{Node, Word};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Decoded tokens between two evictions, unless `every=` says otherwise.
const EVERY: usize = 32;

/// A `--kv` string that cannot be used: what is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    message: String,
    /// The text around the word, one line without control characters.
    excerpt: String,
    /// The word in it, in characters.
    at: std::ops::Range<usize>,
}

impl SpecError {
    /// What is wrong, without the excerpt.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl std::error::Error for SpecError {}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, n) = (self.at.start, self.at.len().max(1));
        write!(f, "--kv: {}\n  {}\n  {:from$}{}", self.message, self.excerpt, "", "^".repeat(n))
    }
}

/// Entries per layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// As many as this.
    Entries(usize),
    /// A percentage of the session's context.
    Percent(f64),
}

impl Budget {
    /// Entries in a context of `ctx` tokens, at least 1; shares are rounded up.
    pub fn resolve(self, ctx: usize) -> usize {
        match self {
            Budget::Entries(n) => n,
            Budget::Percent(p) => ((ctx as f64 * p / 100.0).ceil() as usize).max(1),
        }
    }
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || format!("a budget is a number of entries or a share such as 25%, `{s}` is neither");
        if let Some(p) = s.strip_suffix('%') {
            return match p.parse::<f64>().map_err(|_| wrong())? {
                p if p > 0.0 && p <= 100.0 => Ok(Budget::Percent(p)),
                _ => Err(format!("a share lies above 0% and up to 100%, `{s}` does not")),
            };
        }
        match s.parse().map_err(|_| wrong())? {
            0 => Err("a budget of 0 leaves nothing to attend to".into()),
            n if n > u32::MAX as usize => Err(format!("a budget of {n} entries is not possible")),
            n => Ok(Budget::Entries(n)),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::Entries(n) => write!(f, "{n}"),
            Budget::Percent(p) => write!(f, "{p}%"),
        }
    }
}

/// What positions the kept entries have for later queries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Positions {
    /// Those they were made at.
    #[default]
    Original,
    /// 0, 1, 2, ...: keys are rotated anew after an eviction.
    Compact,
}

/// When entries are evicted, besides when there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// When the prompt has been read.
    pub prompt_end: bool,
    /// After so many decoded tokens; `None`: not.
    pub every: Option<usize>,
}

/// A cache configuration: what `--kv` says. Its `Display` is canonical and parses back to an equal one.
#[derive(Clone, Debug)]
pub struct KvSpec {
    text: String,
    kind: Kind,
    /// Recorded besides what the policy needs.
    more: Needs,
}

#[derive(Clone, Debug)]
enum Kind {
    Full,
    Ring { sinks: usize, budget: Budget },
    Set(Arc<dyn KvPolicy>, Budget, Trigger, Positions),
}

/// A configuration made concrete for a model and a context.
#[derive(Clone, Debug)]
pub enum KvPlan {
    /// Every entry stays.
    Full,
    /// The first `sinks` positions and the latest `window` ones stay.
    Ring {
        /// Sinks.
        sinks: usize,
        /// Window, the query's own position included; above `sinks`.
        window: usize,
    },
    /// A policy chooses.
    Set(SetPlan),
}

/// A policy at work.
#[derive(Clone, Debug)]
pub struct SetPlan {
    /// The policy with its wrappers.
    pub policy: Arc<dyn KvPolicy>,
    /// What must be recorded for it.
    pub needs: Needs,
    /// Entries per layer after an eviction, in the order of the layers given; at least 1, at most the context.
    pub budgets: Vec<usize>,
    /// When to evict.
    pub trigger: Trigger,
    /// Positions of what stays.
    pub positions: Positions,
}

impl Default for KvSpec {
    /// Everything stays.
    fn default() -> Self {
        Self { text: "full".into(), kind: Kind::Full, more: Needs::default() }
    }
}

impl PartialEq for KvSpec {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Display for KvSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for KvSpec {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        Self::parse(s, None)
    }
}

impl KvSpec {
    /// Parses `text`; a policy in it that has no budget gets `budget`, as when several are compared at the same size.
    ///
    /// # Errors
    /// A name or parameter that is not known, a value that cannot be, a budget given nowhere: with the word in question.
    pub fn parse(text: &str, budget: Option<Budget>) -> Result<Self, SpecError> {
        let node = parse::parse(text)?;
        Builder { text, budget }.build(&node)
    }

    /// The same, recording more than its policy needs, for those who watch. What makes no choice records nothing.
    pub fn recording(self, more: Needs) -> Self {
        Self { more: self.more.and(more), ..self }
    }

    /// Whether a policy chooses what stays; otherwise there are no evictions to watch.
    pub fn chooses(&self) -> bool {
        matches!(self.kind, Kind::Set(..))
    }

    /// Whether nothing is ever evicted.
    pub fn is_full(&self) -> bool {
        matches!(self.kind, Kind::Full)
    }

    /// What it means for a context of `ctx` tokens and the layers whose entries may be chosen (those with local attention
    /// keep their window under any configuration and are not among them).
    ///
    /// # Errors
    /// A layer that the policy cannot serve; a window not above the sinks.
    pub fn plan(&self, ctx: usize, layers: &[LayerGeometry]) -> Result<KvPlan, KvError> {
        let refuse = |why| Err(KvError::Budget { policy: self.text.clone(), why });
        match &self.kind {
            Kind::Full => Ok(KvPlan::Full),
            Kind::Ring { sinks, budget } => {
                let window = budget.resolve(ctx).saturating_sub(*sinks);
                if window <= *sinks {
                    return refuse(format!(
                        "{sinks} sinks and a window of {window}: the window must be larger"
                    ));
                }
                Ok(KvPlan::Ring { sinks: *sinks, window })
            }
            Kind::Set(policy, budget, trigger, positions) => {
                let base = budget.resolve(ctx);
                let mut budgets = Vec::with_capacity(layers.len());
                for (rank, geometry) in layers.iter().enumerate() {
                    let (layer, n_layers) = (rank, layers.len());
                    policy.supports(geometry).map_err(|why| KvError::Unsupported {
                        policy: self.text.clone(),
                        layer: geometry.layer,
                        why,
                    })?;
                    let n = policy.budget(LayerBudget { layer, n_layers, base, ctx });
                    budgets.push(n.clamp(1, ctx.max(1)));
                }
                Ok(KvPlan::Set(SetPlan {
                    policy: policy.clone(),
                    needs: policy.needs().and(self.more),
                    budgets,
                    trigger: *trigger,
                    positions: *positions,
                }))
            }
        }
    }
}

/// What all policies take besides their own parameters.
#[derive(Default)]
struct Common {
    budget: Option<Budget>,
    evict: Option<Evict>,
    every: Option<usize>,
    positions: Positions,
}

struct Builder<'a> {
    text: &'a str,
    budget: Option<Budget>,
}

type Args = Vec<(String, String)>;

impl Builder<'_> {
    fn error(&self, at: &Word, message: impl Into<String>) -> SpecError {
        parse::error(self.text, at.at.clone(), message)
    }

    fn build(&self, node: &Node) -> Result<KvSpec, SpecError> {
        if node.name.text == "full" {
            if let Some(word) = node.args.first().map(|a| &a.value).or(node.plus.as_ref().map(|n| &n.name)) {
                return Err(self.error(word, "`full` keeps everything and takes no parameters"));
            }
            if let Some(inner) = &node.inner {
                return Err(self.error(&inner.name, "`full` goes around nothing"));
            }
            return Ok(KvSpec::default());
        }
        let (text, policy, common, info) = self.policy(node)?;
        // `policy` has seen to it that there is a budget.
        let budget = common.budget.unwrap_or(Budget::Percent(100.0));
        let plain = node.inner.is_none() && common.evict.is_none() && common.every.is_none();
        let kind = match streaming_sinks(node) {
            Some(sinks) if plain && common.positions == Positions::Original => Kind::Ring { sinks, budget },
            _ => {
                let evict = common.evict.unwrap_or(info.evict);
                let trigger = Trigger {
                    prompt_end: evict != Evict::Decode,
                    every: (evict != Evict::Prompt).then(|| common.every.unwrap_or(EVERY)),
                };
                Kind::Set(policy, budget, trigger, common.positions)
            }
        };
        Ok(KvSpec { text, kind, more: Needs::default() })
    }

    /// Canonical text, policy and common parameters of a node; the last is the innermost policy's entry.
    fn policy(&self, node: &Node) -> Result<(String, Arc<dyn KvPolicy>, Common, PolicyInfo), SpecError> {
        let name = &node.name;
        if name.text == "full" {
            return Err(self.error(name, "`full` keeps everything: there is nothing to wrap"));
        }
        let infos = registered();
        let Some(info) = infos.iter().find(|i| i.name == name.text).copied() else {
            return Err(self.error(name, unknown("kv policy", &name.text, infos.iter().map(|i| i.name))));
        };
        if let Some(plus) = &node.plus {
            return self.sinks_and_window(node, plus, info);
        }
        let (own, mut common) = self.args(node, &info)?;
        match (info.make, &node.inner) {
            (Make::Policy(_), Some(inner)) => {
                Err(self.error(&inner.name, format!("`{}` goes around nothing", info.name)))
            }
            (Make::Wrapper(_), None) => {
                Err(self.error(name, format!("`{0}` goes around a policy: {0}(h2o:budget=512)", info.name)))
            }
            (Make::Wrapper(make), Some(inner)) => {
                let (inner_text, policy, common, innermost) = self.policy(inner)?;
                let params = Params { args: &own, budget: None };
                let policy = make(&params, policy).map_err(|e| self.param_error(node, e))?;
                let text = format!("{}({inner_text})", canonical(&info, &own, &Common::default()));
                Ok((text, policy, common, innermost))
            }
            (Make::Policy(make), None) => {
                common.budget = common.budget.or(self.budget);
                if common.budget.is_none() {
                    let message =
                        format!("`{0}` needs a budget: {0}:budget=512 or {0}:budget=25%", info.name);
                    return Err(self.error(name, message));
                }
                let params = Params { args: &own, budget: common.budget };
                let policy = make(&params).map_err(|e| self.param_error(node, e))?;
                Ok((canonical(&info, &own, &common), policy, common, info))
            }
        }
    }

    /// `sinks:S+window:W` is `sinks:S,budget=S+W`.
    fn sinks_and_window(
        &self,
        sinks: &Node,
        window: &Node,
        info: PolicyInfo,
    ) -> Result<(String, Arc<dyn KvPolicy>, Common, PolicyInfo), SpecError> {
        if sinks.name.text != "sinks" || window.name.text != "window" {
            let word = if sinks.name.text == "sinks" { &window.name } else { &sinks.name };
            return Err(self.error(word, "`+` joins only sinks and a window: sinks:4+window:2044"));
        }
        if let Some(n) = window.plus.as_ref().or(window.inner.as_ref()).or(sinks.inner.as_ref()) {
            return Err(self.error(&n.name, "nothing follows sinks:4+window:2044"));
        }
        let (own, early) = self.args(sinks, &info)?;
        if early.budget.is_some() || early.evict.is_some() || early.every.is_some() {
            return Err(self.error(&sinks.name, "parameters go to the end: sinks:4+window:2044,every=8"));
        }
        let window_info = PolicyInfo { primary: "budget", params: &[], ..info };
        let (_, mut common) = self.args(window, &window_info)?;
        let word = window.args.first().map_or(&window.name, |a| &a.value);
        let sinks_of = |budget| Streaming::sinks(&Params { args: &own, budget });
        let n = sinks_of(None).map_err(|e| self.param_error(sinks, e))?;
        match common.budget {
            None if self.budget.is_some() => common.budget = self.budget,
            None => return Err(self.error(word, "the window needs a length: sinks:4+window:2044")),
            Some(Budget::Percent(p)) => {
                let message = format!("with sinks, a share of the context is written sinks:{n},budget={p}%");
                return Err(self.error(word, message));
            }
            Some(Budget::Entries(w)) if w <= n => {
                return Err(self.error(word, format!("the window of {w} must be larger than the {n} sinks")));
            }
            Some(Budget::Entries(w)) => common.budget = Some(Budget::Entries(w.saturating_add(n))),
        }
        sinks_of(common.budget).map_err(|e| self.param_error(sinks, e))?;
        let policy = Arc::new(Streaming { sinks: n });
        Ok((canonical(&info, &own, &common), policy, common, info))
    }

    /// A node's own parameters, in the order of the policy's list, and the common ones.
    fn args(&self, node: &Node, info: &PolicyInfo) -> Result<(Args, Common), SpecError> {
        let mut common = Common::default();
        let mut own: Args = Vec::new();
        let mut seen: Vec<&str> = Vec::new();
        for arg in &node.args {
            let value = arg.value.text.as_str();
            let key = match &arg.key {
                Some(key) => key.text.as_str(),
                None if info.primary.is_empty() || !seen.is_empty() => {
                    let message = format!("`{value}` has no name: parameters are written name=value");
                    return Err(self.error(&arg.value, message));
                }
                None => info.primary,
            };
            let word = arg.key.as_ref().unwrap_or(&arg.value);
            if seen.contains(&key) {
                return Err(self.error(word, format!("{key} is given twice")));
            }
            seen.push(key);
            if value.is_empty() {
                return Err(self.error(&arg.value, format!("{key} needs a value")));
            }
            if !info.is_wrapper() && self.common(key, &arg.value, &mut common)? {
                continue;
            }
            if !info.free && !info.params.iter().any(|p| p.name == key) {
                let mut known: Vec<_> = info.params.iter().map(|p| p.name).collect();
                let mut message = String::new();
                if info.is_wrapper() {
                    message = "; those of all policies go to the one inside".into();
                } else {
                    known.extend(["budget", "evict", "every", "positions"]);
                }
                let message = unknown(&format!("parameter of {}", info.name), key, known) + &message;
                return Err(self.error(word, message));
            }
            let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
            let zeros = if digits { value.trim_start_matches('0') } else { value };
            own.push((key.into(), if zeros.is_empty() { "0" } else { zeros }.into()));
        }
        own.sort_by_key(|(k, _)| info.params.iter().position(|p| p.name == *k).unwrap_or(usize::MAX));
        Ok((own, common))
    }

    /// Takes `key` if it is a parameter of all policies.
    fn common(&self, key: &str, value: &Word, common: &mut Common) -> Result<bool, SpecError> {
        let (text, wrong) = (value.text.as_str(), |message: String| self.error(value, message));
        match key {
            "budget" => common.budget = Some(text.parse().map_err(wrong)?),
            "evict" => {
                common.evict = Some(match text {
                    "both" => Evict::Both,
                    "prompt" => Evict::Prompt,
                    "decode" => Evict::Decode,
                    _ => return Err(wrong(format!("evict is prompt, decode or both, not `{text}`"))),
                });
            }
            "every" => match text.parse().ok().filter(|n| (1..=u32::MAX as usize).contains(n)) {
                Some(n) => common.every = Some(n),
                None => return Err(wrong(format!("every is a number of tokens from 1, not `{text}`"))),
            },
            "positions" => {
                common.positions = match text {
                    "original" => Positions::Original,
                    "compact" => Positions::Compact,
                    _ => return Err(wrong(format!("positions are original or compact, not `{text}`"))),
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn param_error(&self, node: &Node, e: ParamError) -> SpecError {
        let named = node.args.iter().find(|a| a.key.as_ref().is_some_and(|k| k.text == e.key));
        let positional = node.args.iter().find(|a| a.key.is_none());
        let arg = if e.key.is_empty() { None } else { named.or(positional) };
        self.error(arg.map_or(&node.name, |a| &a.value), e.message)
    }
}

/// The sinks of a ring, if the node says nothing that a ring cannot do.
fn streaming_sinks(node: &Node) -> Option<usize> {
    match node.name.text.as_str() {
        "window" => Some(0),
        "sinks" => {
            let named = |key: &Option<Word>| key.as_ref().is_none_or(|k| k.text == "sinks");
            let given = node.args.iter().find(|a| named(&a.key));
            Some(given.and_then(|a| a.value.text.parse().ok()).unwrap_or(Streaming::SINKS))
        }
        _ => None,
    }
}

/// The canonical form of one policy, parameters in the order of its list.
fn canonical(info: &PolicyInfo, own: &Args, common: &Common) -> String {
    let mut args = Vec::new();
    let primary = |key: &str| key == info.primary;
    args.extend(own.iter().filter(|(k, _)| primary(k)).map(|(_, v)| v.clone()));
    let mut window = String::new();
    match common.budget {
        Some(b) if info.name == "window" => args.push(b.to_string()),
        Some(Budget::Entries(n)) if info.name == "sinks" => {
            let sinks = own.first().and_then(|(_, v)| v.parse().ok()).unwrap_or(Streaming::SINKS);
            args = vec![sinks.to_string()];
            window = format!("+window:{}", n.saturating_sub(sinks));
        }
        Some(b) => args.push(format!("budget={b}")),
        None => {}
    }
    args.extend(own.iter().filter(|(k, _)| !primary(k)).map(|(k, v)| format!("{k}={v}")));
    let mut rest = Vec::new();
    match common.evict {
        Some(Evict::Both) => rest.push("evict=both".into()),
        Some(Evict::Prompt) => rest.push("evict=prompt".into()),
        Some(Evict::Decode) => rest.push("evict=decode".into()),
        None => {}
    }
    rest.extend(common.every.map(|n| format!("every={n}")));
    if common.positions == Positions::Compact {
        rest.push("positions=compact".into());
    }
    if window.is_empty() {
        args.append(&mut rest);
    }
    let colon = if args.is_empty() { "" } else { ":" };
    let comma = if rest.is_empty() { "" } else { "," };
    format!("{}{colon}{}{window}{comma}{}", info.name, args.join(","), rest.join(","))
}

/// "unknown WHAT `name`", with the nearest of the known names or all of them.
fn unknown<'a>(what: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    // Names are short: a long word is near none of them, and not worth the comparison.
    let nearest = known
        .iter()
        .map(|k| (distance(k, name), *k))
        .min()
        .filter(|(d, k)| *d <= 2 && *d < k.len() && name.len() < 40);
    match nearest {
        Some((_, k)) => format!("unknown {what}: `{name}`; did you mean `{k}`?"),
        None if known.is_empty() => format!("unknown {what}: `{name}`; it has none"),
        None => format!("unknown {what}: `{name}`; there are {}", known.join(", ")),
    }
}

/// Letters to change, add or take away (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(40).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
