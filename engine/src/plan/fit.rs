//! What would have to change for a run to fit: tried one thing at a time, then together, on plans alone.

use super::place::{Load, Machine, Plan, Rules, place};
use super::{Access, PlanModel, PlanOptions};
use crate::EngineError;
use quant::DType;
use std::fmt;

/// Contexts below are not offered.
const LEAST_CTX: usize = 256;
/// Batches below are not offered, and those that cost little speed.
const LEAST_BATCH: usize = 16;
const FAIR_BATCH: usize = 128;

/// One thing changed; its `Display` is the flags, to be put behind those given: the last one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Weights are mapped (neither read nor locked).
    Mapped,
    /// As many layers and experts on GPUs as fit.
    Placement {
        /// Layers on GPUs.
        gpu_layers: usize,
        /// Layers whose experts stay on the CPU; `None`: the flag is not needed.
        cpu_moe: Option<usize>,
    },
    /// A smaller batch.
    Batch(usize),
    /// A smaller cache type, for values too if the cache has them.
    CacheType(DType, bool),
    /// A shorter context.
    Ctx(usize),
    /// Fewer sequences.
    Parallel(usize),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mapped => f.write_str("--mmap"),
            Self::Placement { gpu_layers, cpu_moe: None } => write!(f, "-ngl {gpu_layers}"),
            Self::Placement { gpu_layers, cpu_moe: Some(n) } => {
                write!(f, "-ngl {gpu_layers} --n-cpu-moe {n}")
            }
            Self::Batch(n) => write!(f, "-b {n}"),
            Self::CacheType(t, false) => write!(f, "-ctk {}", t.name()),
            Self::CacheType(t, true) => write!(f, "-ctk {0} -ctv {0}", t.name()),
            Self::Ctx(n) => write!(f, "-c {n}"),
            Self::Parallel(n) => write!(f, "--parallel {n}"),
        }
    }
}

/// A way that fits.
#[derive(Clone, Debug)]
pub struct Way {
    /// What changed, in order.
    pub changes: Vec<Change>,
    /// The options with it.
    pub options: PlanOptions,
    /// The rules with it.
    pub rules: Rules,
    /// The plan with it.
    pub plan: Plan,
}

impl Way {
    /// Its flags, ready to paste.
    pub fn flags(&self) -> String {
        self.changes.iter().map(Change::to_string).collect::<Vec<_>>().join(" ")
    }
}

/// A plan, and ways out where it does not fit.
#[derive(Clone, Debug)]
pub struct Fit {
    /// As asked.
    pub plan: Plan,
    /// What fits, the least painful first; empty if the plan fits, or if nothing does.
    pub ways: Vec<Way>,
    /// Host memory that the smallest run takes, where nothing fits.
    pub least: u64,
}

/// A change tried on a way; `None`: not possible.
type Step<'a> = &'a dyn Fn(&Way) -> Option<Way>;

struct Search<'a> {
    model: &'a PlanModel,
    machine: &'a Machine,
}

impl Search<'_> {
    fn plan(&self, o: &PlanOptions, r: &Rules) -> Result<Plan, EngineError> {
        let m = self.model;
        let sizing = m.sizing(o)?;
        let load = Load {
            weights: m.weights(),
            layers: m.n_layers(),
            tied: m.tied(),
            needs: &sizing.needs,
            work: &|layout| sizing.work(layout),
            access: o.access,
            pinned: o.pinned,
            parallel: o.parallel,
        };
        Ok(place(load, self.machine, r))
    }

    /// The state with a change made, whether it fits or not; `None` if it cannot be.
    fn with(&self, from: &Way, change: Change) -> Option<Way> {
        let mut to = from.clone();
        let s = &mut to.options.session;
        match change {
            Change::Mapped => to.options.access = Access::Mapped,
            Change::Placement { .. } => (to.rules.gpu_layers, to.rules.cpu_moe) = (None, None),
            Change::Batch(n) => s.batch = n,
            Change::CacheType(t, values) => {
                s.cache_k = t;
                if values {
                    s.cache_v = t;
                }
            }
            Change::Ctx(n) => s.ctx = n,
            Change::Parallel(n) => to.options.parallel = n,
        }
        to.plan = self.plan(&to.options, &to.rules).ok()?;
        // Pasted behind a flag that was given, the answer must say it too.
        let cpu_moe = Some(to.plan.cpu_moe).filter(|n| *n > 0 || from.rules.cpu_moe.is_some());
        to.changes.push(match change {
            Change::Placement { .. } => Change::Placement { gpu_layers: to.plan.gpu_layers, cpu_moe },
            c => c,
        });
        Some(to)
    }

    /// The largest of `from..=to` (multiples of `step`) whose change fits.
    fn largest(
        &self,
        w: &Way,
        from: usize,
        to: usize,
        step: usize,
        make: fn(usize) -> Change,
    ) -> Option<Way> {
        let at = |k: usize| self.with(w, make(k * step)).filter(|w| w.plan.fits());
        let (mut low, mut high) = (from.div_ceil(step), to / step);
        if low > high {
            return None;
        }
        let mut best = at(low)?;
        while low < high {
            let mid = (low + high).div_ceil(2);
            match at(mid) {
                Some(w) => (best, low) = (w, mid),
                None => high = mid - 1,
            }
        }
        Some(best)
    }

    fn batch(&self, w: &Way, least: usize) -> Option<Way> {
        let mut n = w.options.session.batch / 2;
        while n >= least {
            if let Some(w) = self.with(w, Change::Batch(n)).filter(|w| w.plan.fits()) {
                return Some(w);
            }
            n /= 2;
        }
        None
    }

    fn ctx(&self, w: &Way) -> Option<Way> {
        let now = w.options.session.ctx;
        self.largest(w, LEAST_CTX, now.saturating_sub(1), 64, Change::Ctx)
    }

    fn parallel(&self, w: &Way) -> Option<Way> {
        self.largest(w, 1, w.options.parallel.saturating_sub(1), 1, Change::Parallel)
    }

    fn cache(&self, w: &Way, t: DType) -> Option<Way> {
        let s = &w.options.session;
        let values = self.model.has_values();
        let size = |t: DType| t.format().block_bytes as f64 / t.format().block_len as f64;
        let smaller = size(t) < size(s.cache_k) || (values && size(t) < size(s.cache_v));
        if smaller { self.with(w, Change::CacheType(t, values)) } else { None }
    }

    fn mapped(&self, w: &Way) -> Option<Way> {
        (w.options.access != Access::Mapped).then(|| self.with(w, Change::Mapped))?
    }

    fn placed(&self, w: &Way) -> Option<Way> {
        let open = w.rules.gpu_layers.is_none() && w.rules.cpu_moe.is_none();
        let none = Change::Placement { gpu_layers: 0, cpu_moe: None };
        if open || self.machine.gpus.is_empty() { None } else { self.with(w, none) }
    }

    /// Everything at once, one after the other, until it fits.
    fn together(&self, asked: &Way) -> Option<Way> {
        let mut w = asked.clone();
        let steps: [Step<'_>; 5] = [
            &|w| self.mapped(w),
            &|w| self.placed(w),
            &|w| (w.options.session.batch > FAIR_BATCH).then(|| self.with(w, Change::Batch(FAIR_BATCH)))?,
            &|w| self.cache(w, DType::Q8_0),
            &|w| (w.options.parallel > 1).then(|| self.with(w, Change::Parallel(1)))?,
        ];
        for step in steps {
            w = step(&w).unwrap_or(w);
            if w.plan.fits() {
                return Some(w);
            }
            if let Some(w) = self.ctx(&w) {
                return Some(w);
            }
        }
        let small = self.with(&w, Change::Batch(LEAST_BATCH.min(w.options.session.batch)))?;
        let small = self.cache(&small, DType::Q4_0).unwrap_or(small);
        if small.plan.fits() { Some(small) } else { self.ctx(&small) }
    }
}

/// Plans a run on a machine.
///
/// # Errors
/// Options that no session accepts.
pub fn plan(
    model: &PlanModel,
    o: &PlanOptions,
    machine: &Machine,
    rules: &Rules,
) -> Result<Plan, EngineError> {
    Search { model, machine }.plan(o, rules)
}

/// Plans a run on a machine, and searches for what fits if it does not.
///
/// # Errors
/// Options that no session accepts.
pub fn fit(model: &PlanModel, o: &PlanOptions, machine: &Machine, rules: &Rules) -> Result<Fit, EngineError> {
    let s = Search { model, machine };
    let plan = s.plan(o, rules)?;
    if plan.fits() {
        return Ok(Fit { plan, ways: Vec::new(), least: 0 });
    }
    let asked = Way { changes: Vec::new(), options: o.clone(), rules: rules.clone(), plan: plan.clone() };
    let fits = |w: Option<Way>| w.filter(|w| w.plan.fits());
    let single = [
        fits(s.mapped(&asked)),
        fits(s.placed(&asked)),
        s.batch(&asked, FAIR_BATCH),
        fits(s.cache(&asked, DType::Q8_0)),
        s.ctx(&asked),
        s.parallel(&asked),
        fits(s.cache(&asked, DType::Q4_0)),
    ];
    let mut ways: Vec<Way> = single.into_iter().flatten().collect();
    if ways.is_empty() {
        ways.extend(s.together(&asked));
    }
    let mut smallest = o.clone();
    smallest.parallel = 1;
    smallest.session.ctx = LEAST_CTX.min(o.session.ctx);
    smallest.session.batch = LEAST_BATCH.min(o.session.batch);
    smallest.access = Access::Mapped;
    let least = s.plan(&smallest, &Rules::default())?.devices[0].resident();
    Ok(Fit { plan, ways, least })
}
