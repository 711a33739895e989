//! The policies that `--kv` and the evaluation know by name: the built-in ones and what programs register.
//!
//! Knows how policies are made of parameters, not how strings are parsed (that is `spec`).

use super::policies;
use super::policy::{KvError, KvPolicy};
use super::spec::Budget;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// A parameter, for lists and for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamInfo {
    /// Its name.
    pub name: &'static str,
    /// The value it has when not given, in words where it is computed.
    pub default: &'static str,
    /// What it does.
    pub what: &'static str,
}

/// When entries are evicted unless `evict=` says otherwise. In any case room is made when there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evict {
    /// When the prompt has been read, and regularly while decoding.
    Both,
    /// When the prompt has been read.
    Prompt,
    /// While decoding.
    Decode,
}

/// Makes a policy of its parameters.
pub type MakePolicy = fn(&Params<'_>) -> Made;
/// Puts one around another.
pub type MakeWrapper = fn(&Params<'_>, Arc<dyn KvPolicy>) -> Made;
/// A policy, or the parameter that is wrong.
pub type Made = Result<Arc<dyn KvPolicy>, ParamError>;

/// How a policy is made of its parameters.
#[derive(Clone, Copy, Debug)]
pub enum Make {
    /// A policy.
    Policy(MakePolicy),
    /// Something around another policy.
    Wrapper(MakeWrapper),
}

/// What is known of a policy.
#[derive(Clone, Copy, Debug)]
pub struct PolicyInfo {
    /// Its name in `--kv`: lower-case letters, digits and dashes.
    pub name: &'static str,
    /// What it does, in one line.
    pub idea: &'static str,
    /// Its source, as `arXiv:1234.56789`; empty if there is none.
    pub paper: &'static str,
    /// Its own parameters. All policies (not wrappers) also take `budget`, `evict`, `every` and `positions`.
    pub params: &'static [ParamInfo],
    /// The parameter that a value without a name is.
    pub primary: &'static str,
    /// Parameters may have any name: the constructor checks them.
    pub free: bool,
    /// When it evicts by default.
    pub evict: Evict,
    /// Its constructor. It must accept any budget and make equal policies of equal parameters.
    pub make: Make,
}

impl PolicyInfo {
    /// A policy without parameters of its own; set the other fields with `..PolicyInfo::policy(...)`.
    pub const fn policy(name: &'static str, make: MakePolicy) -> Self {
        let make = Make::Policy(make);
        let (evict, primary) = (Evict::Both, "budget");
        Self { name, idea: "", paper: "", params: &[], primary, free: false, evict, make }
    }

    /// The same for a wrapper.
    pub const fn wrapper(name: &'static str, make: MakeWrapper) -> Self {
        let make = Make::Wrapper(make);
        let (evict, primary) = (Evict::Both, "");
        Self { name, idea: "", paper: "", params: &[], primary, free: false, evict, make }
    }

    /// Whether it goes around another policy.
    pub fn is_wrapper(&self) -> bool {
        matches!(self.make, Make::Wrapper(_))
    }
}

/// A parameter with an impossible value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamError {
    /// The parameter; empty if it is the policy as a whole.
    pub key: String,
    /// What is wrong.
    pub message: String,
}

/// The parameters given to a policy, all of known names.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    pub(super) args: &'a [(String, String)],
    pub(super) budget: Option<Budget>,
}

impl Params<'_> {
    /// The entries per layer that the user asked for; `None` inside wrappers.
    pub fn budget(&self) -> Option<Budget> {
        self.budget
    }

    /// All of them, in the order given.
    pub fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.args.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// A parameter as it was written.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.all().find(|(k, _)| *k == key).map(|(_, v)| v)
    }

    /// A whole number.
    ///
    /// # Errors
    /// It is none.
    pub fn whole(&self, key: &str) -> Result<Option<usize>, ParamError> {
        // 2^32 entries are beyond any cache; below it no sum of parameters overflows.
        let parse = |v: &str| v.parse().ok().filter(|n| *n <= u32::MAX as usize);
        self.parsed(key, "a whole number", parse)
    }

    /// A number.
    ///
    /// # Errors
    /// It is none, or not finite.
    pub fn number(&self, key: &str) -> Result<Option<f32>, ParamError> {
        self.parsed(key, "a number", |v| v.parse().ok().filter(|x: &f32| x.is_finite()))
    }

    /// One of several words, as its index.
    ///
    /// # Errors
    /// It is none of them.
    pub fn choice(&self, key: &str, words: &[&str]) -> Result<Option<usize>, ParamError> {
        self.parsed(key, &format!("one of {}", words.join(", ")), |v| words.iter().position(|w| *w == v))
    }

    /// An error about a parameter.
    pub fn error(&self, key: &str, message: impl Into<String>) -> ParamError {
        ParamError { key: key.into(), message: message.into() }
    }

    fn parsed<T>(
        &self,
        key: &str,
        what: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ParamError> {
        let Some(v) = self.text(key) else { return Ok(None) };
        let wrong = || self.error(key, format!("{key} must be {what}, `{v}` is not"));
        parse(v).map(Some).ok_or_else(wrong)
    }
}

fn table() -> &'static RwLock<Vec<PolicyInfo>> {
    static TABLE: OnceLock<RwLock<Vec<PolicyInfo>>> = OnceLock::new();
    TABLE.get_or_init(|| RwLock::new(policies::BUILT_IN.to_vec()))
}

/// Names that `--kv` gives a meaning of its own.
const COMMON: [&str; 4] = ["budget", "evict", "every", "positions"];

/// Makes a policy known to `--kv` and the evaluation.
///
/// # Errors
/// A name that is taken, or not made of lower-case letters, digits and dashes; a parameter that all policies have.
pub fn register(info: PolicyInfo) -> Result<(), KvError> {
    let refuse = |why: String| Err(KvError::Register { name: info.name.into(), why });
    let sound = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if info.name.is_empty() || !info.name.chars().all(sound) {
        return refuse("a name is made of lower-case letters, digits and dashes".into());
    }
    if let Some(p) = info.params.iter().find(|p| COMMON.contains(&p.name)) {
        return refuse(format!("{} is a parameter of every policy already", p.name));
    }
    let mut table = table().write().unwrap_or_else(PoisonError::into_inner);
    if table.iter().any(|i| i.name == info.name) {
        return refuse("the name is taken".into());
    }
    table.push(info);
    Ok(())
}

/// All that is registered, built-in ones first.
pub fn registered() -> Vec<PolicyInfo> {
    table().read().unwrap_or_else(PoisonError::into_inner).clone()
}
