//! A device for the rows of one pass: which of them are of prompts, whose products may take another method. Knows numbers of tokens.

use crate::KernelError;
use crate::backend::{Device, shape};
use std::sync::Arc;

impl Device {
    /// The same device for a pass over rows of which row i belongs to a prompt that adds `prompts[i]` tokens, 0 when decoding
    /// ([`crate::Visible::set_prompt`]): products with weights may take another method for rows of prompts. Those of a plain device count
    /// as decoded. The pass begins here: a device may hold back what decoding asks of it until a result is read.
    pub fn for_rows(&self, prompts: &[u32]) -> Self {
        self.0.begin(prompts);
        Self(self.0.clone(), self.1.clone(), Some(prompts.into()))
    }

    /// The same device for some rows of its pass, in their order.
    ///
    /// # Errors
    /// A row that the pass has not.
    pub fn some_rows(&self, rows: &[u32]) -> Result<Self, KernelError> {
        let some = |all: &Arc<[u32]>| {
            let each: Option<Arc<[u32]>> = rows.iter().map(|r| all.get(*r as usize).copied()).collect();
            shape(each.is_some(), "rows", || format!("some of a pass of {}", all.len()))?;
            Ok::<_, KernelError>(each.unwrap_or_default())
        };
        Ok(Self(self.0.clone(), self.1.clone(), self.2.as_ref().map(some).transpose()?))
    }

    /// Begins what was asked for and is held back: the caller goes on to other work meanwhile.
    pub fn start(&self) -> Result<(), KernelError> {
        self.0.start()
    }

    /// What [`Device::for_rows`] was told, for a call of `n` rows.
    pub(crate) fn prompts(&self, n: usize) -> Result<&[u32], KernelError> {
        let p = self.2.as_deref().unwrap_or_default();
        shape(self.2.is_none() || p.len() == n, "rows", || format!("{n} in a pass of {}", p.len()))?;
        Ok(p)
    }
}
