//! Kernels of tests on the PTX interpreter and, where `RSINFER_TEST_GPU=cuda:N` asks for it, launch by launch on that GPU as well: on the
//! same inputs, after which every byte of every allocation is compared. What differs fails the test, or is a line of the file that
//! `RSINFER_TEST_GPU_REPORT` names, and the test goes on with the interpreter's bytes. Knows launches and memory; nothing of what is computed.

mod compare;
mod device;
mod report;

use compare::{bar, difference};
use kernels::cuda::modules::{self, Ptx};
use kernels::cuda::{Arg, GpuError, Launch};
use ptx::{Module, Param, PtxError, Stats};
use std::collections::BTreeMap;

pub use device::{Device, asked, device};

/// A module parsed, with its text where a GPU is to run it too.
pub struct Text {
    module: Module,
    ptx: Option<&'static Ptx>,
}

impl Text {
    /// A text that ships runs on a GPU too; any other, a mutant say, on the interpreter alone.
    ///
    /// # Errors
    /// What the interpreter does not understand.
    pub fn new(text: &str) -> Result<Self, PtxError> {
        let ptx = device().and_then(|_| modules::all().find(|m| m.text == text));
        Ok(Self { module: Module::parse(text)?, ptx })
    }

    /// Whether there is such a kernel.
    pub fn has(&self, entry: &str) -> bool {
        self.module.kernel(entry).is_some()
    }

    /// Bytes of shared memory that a kernel declares; 0 where there is no such kernel.
    pub fn shared_bytes(&self, entry: &str) -> usize {
        self.module.kernel(entry).map_or(0, ptx::Kernel::shared_bytes)
    }

    /// A text of a test's own that is to run on a GPU too.
    ///
    /// # Errors
    /// What the interpreter does not understand.
    pub fn own(name: &str, text: String) -> Result<Self, PtxError> {
        let module = Module::parse(&text)?;
        // A GPU's modules have names and texts that stay; without one nothing is kept.
        let ptx =
            device().map(|_| &*Box::leak(Box::new(Ptx { name: name.to_owned().leak(), text: text.leak() })));
        Ok(Self { module, ptx })
    }
}

/// Bytes before and behind each allocation on the GPU, which must stay.
const GUARD: usize = 256;
/// What memory holds there before anything is written.
const PATTERN: u8 = 0xa5;

/// The interpreter's machine, and a GPU that does the same.
pub struct Machine {
    here: ptx::Machine,
    there: Option<Twin>,
}

/// The same memory on a GPU: addresses of the interpreter, and what lies there.
struct Twin {
    device: &'static Device,
    places: BTreeMap<u64, Place>,
}

#[derive(Clone, Copy)]
struct Place {
    /// Of the first guard.
    at: u64,
    bytes: usize,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A machine without memory, mirrored on the GPU that was asked for.
    pub fn new() -> Self {
        let there = device().map(|device| Twin { device, places: BTreeMap::new() });
        Self { here: ptx::Machine::new(), there }
    }

    /// One on the interpreter alone.
    pub fn alone() -> Self {
        Self { here: ptx::Machine::new(), there: None }
    }

    /// One on the interpreter alone, with what this one holds.
    pub fn copy(&self) -> Self {
        Self { here: self.here.clone(), there: None }
    }

    /// As the interpreter's.
    pub fn allocations(&self) -> Vec<(u64, usize)> {
        self.here.allocations().collect()
    }

    /// As the interpreter's.
    ///
    /// # Errors
    /// Its.
    pub fn in_flight(&mut self, allocations: &[u64]) -> Result<(), PtxError> {
        self.here.in_flight(allocations)
    }

    /// As the interpreter's.
    pub fn set_limit(&mut self, instructions: u64) {
        self.here.set_limit(instructions);
    }

    /// As the interpreter's; on the GPU between guards.
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        let address = self.here.alloc(bytes);
        self.both(|twin| twin.alloc(address, bytes));
        address
    }

    /// As the interpreter's.
    ///
    /// # Errors
    /// Its.
    pub fn free(&mut self, address: u64) -> Result<(), PtxError> {
        self.here.free(address)?;
        self.both(|twin| match twin.places.remove(&address) {
            Some(place) => twin.device.gpu.free(place.at),
            None => Ok(()),
        });
        Ok(())
    }

    /// As the interpreter's.
    ///
    /// # Errors
    /// Its.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), PtxError> {
        self.here.write(address, bytes)?;
        self.both(|twin| match twin.find(address) {
            Some(at) => twin.device.gpu.write(at, bytes),
            None => Ok(()),
        });
        Ok(())
    }

    /// As the interpreter's, whose bytes these are.
    ///
    /// # Errors
    /// Its.
    pub fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, PtxError> {
        self.here.read(address, bytes)
    }

    /// As the interpreter's.
    ///
    /// # Errors
    /// Its.
    pub fn peek(&self, address: u64, bytes: usize) -> Result<Vec<Option<u8>>, PtxError> {
        self.here.peek(address, bytes)
    }

    /// Runs a kernel as the interpreter does. What it finds nothing wrong with, the GPU runs too.
    ///
    /// # Errors
    /// The interpreter's.
    ///
    /// # Panics
    /// Where the module has no such kernel; where the GPU's result is another, or it refuses, unless there is a report for that.
    pub fn launch(
        &mut self,
        text: &Text,
        entry: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        params: &[Param],
    ) -> Result<Stats, PtxError> {
        self.run(text, entry, grid, block, shared, params, false)
    }

    /// The same of a launch that may begin while those before it run: as the interpreter's. On a GPU it comes by itself.
    ///
    /// # Errors
    /// The interpreter's.
    ///
    /// # Panics
    /// As [`Machine::launch`].
    pub fn launch_overlapping(
        &mut self,
        text: &Text,
        entry: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        params: &[Param],
    ) -> Result<Stats, PtxError> {
        self.run(text, entry, grid, block, shared, params, true)
    }

    fn run(
        &mut self,
        text: &Text,
        entry: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        params: &[Param],
        overlaps: bool,
    ) -> Result<Stats, PtxError> {
        let kernel = text.module.kernel(entry).unwrap_or_else(|| panic!("no kernel {entry}"));
        let bar = text.ptx.and_then(|p| bar(p, entry));
        let mirrored = self.there.is_some() && text.ptx.is_some();
        // Which allocations an inexact kernel writes: all others must stay as they are.
        let before = if mirrored && bar.is_some() { self.images() } else { Vec::new() };
        let stats = match overlaps {
            true => self.here.launch_overlapping(kernel, grid, block, shared, params)?,
            false => self.here.launch(kernel, grid, block, shared, params)?,
        };
        let (Some(twin), Some(ptx)) = (&self.there, text.ptx) else { return Ok(stats) };
        let device = twin.device;
        let n = device.count();
        let name = format!("{}.{entry}", ptx.name);
        let spared = [
            (device.skips(n, &name), "it lost the GPU before, or did not end"),
            (!device.takes(ptx), "the GPU is too old for this text"),
            (block[1..] != [1, 1], "its blocks have several dimensions"),
        ];
        if let Some((_, why)) = spared.iter().find(|s| s.0) {
            report::skipped(n, &name, why);
            self.restore();
            return Ok(stats);
        }
        let launch = Launch { grid, threads: block[0], shared: shared as u32, overlaps: false };
        let args: Vec<String> = params.iter().map(|p| twin.say(*p)).collect();
        let kernel = device.kernel(ptx, entry);
        report::launch(n, &name, launch, &args);
        let at: Vec<Arg> = params.iter().map(|p| twin.arg(*p)).collect();
        match kernel.and_then(|k| device.run(k, launch, &at)) {
            Ok(()) => {
                report::ended(n);
                self.compare(n, &before, bar);
            }
            Err(e) => {
                report::failed(n, &e);
                self.restore();
            }
        }
        Ok(stats)
    }

    /// A call of the GPU beside the interpreter's. Should it fail, nothing more is mirrored.
    fn both(&mut self, f: impl FnOnce(&mut Twin) -> Result<(), GpuError>) {
        if let Some(Err(e)) = self.there.as_mut().map(f) {
            report::failed(0, &e);
            self.there = None;
        }
    }

    /// What every allocation should hold on the GPU.
    fn images(&self) -> Vec<(u64, Vec<u8>)> {
        let places = self.there.iter().flat_map(|t| &t.places);
        let image = |(address, place): (&u64, &Place)| {
            let bytes = self.here.peek(*address, place.bytes).expect("it is allocated");
            (*address, bytes.into_iter().map(|b| b.unwrap_or(PATTERN)).collect())
        };
        places.map(image).collect()
    }

    /// Puts what the interpreter holds onto the GPU.
    fn restore(&mut self) {
        let images = self.images();
        self.both(|twin| {
            images
                .iter()
                .try_for_each(|(a, bytes)| twin.device.gpu.write(twin.places[a].at + GUARD as u64, bytes))
        });
    }

    fn compare(&mut self, n: usize, before: &[(u64, Vec<u8>)], bar: Option<f32>) {
        let images = self.images();
        let was = |address: u64| before.iter().find(|b| b.0 == address).map(|b| &b.1);
        self.both(|twin| {
            for (address, image) in &images {
                let place = twin.places[address];
                let mut found = vec![0; place.bytes + 2 * GUARD];
                twin.device.gpu.read(place.at, &mut found)?;
                let (content, mut back) = (&found[GUARD..GUARD + place.bytes], false);
                if content != image {
                    let bar = bar.filter(|_| was(*address) != Some(image));
                    report::compared(n, address >> 40, difference(image, content, bar, PATTERN));
                    back = true;
                }
                let guards = found[..GUARD].iter().chain(&found[GUARD + place.bytes..]);
                let hurt = guards.filter(|b| **b != PATTERN).count();
                if hurt > 0 {
                    report::outside(n, address >> 40, place.bytes, hurt);
                    back = true;
                }
                if back {
                    let mut whole = vec![PATTERN; found.len()];
                    whole[GUARD..GUARD + place.bytes].copy_from_slice(image);
                    twin.device.gpu.write(place.at, &whole)?;
                }
            }
            Ok(())
        });
    }
}

impl Twin {
    fn alloc(&mut self, address: u64, bytes: usize) -> Result<(), GpuError> {
        let whole = bytes + 2 * GUARD;
        let at = self.device.gpu.alloc(whole)?;
        self.places.insert(address, Place { at, bytes });
        self.device.gpu.write(at, &vec![PATTERN; whole])
    }

    /// Where an address of the interpreter's lies on the GPU.
    fn find(&self, address: u64) -> Option<u64> {
        let (start, place) = self.places.range(..=address).next_back()?;
        let offset = address - start;
        (offset <= place.bytes as u64).then(|| place.at + GUARD as u64 + offset)
    }

    /// Numbers are far below addresses, which begin at 2^40.
    fn arg(&self, p: Param) -> Arg {
        match p {
            Param::U64(x) => Arg::U64(self.find(x).unwrap_or(x)),
            Param::U32(x) => Arg::U32(x),
            Param::F32(x) => Arg::F32(x),
        }
    }

    /// An argument for people: `#3+64` is byte 64 of the third allocation.
    fn say(&self, p: Param) -> String {
        match p {
            Param::U64(x) if self.find(x).is_some() => format!("#{}+{}", x >> 40, x & ((1 << 40) - 1)),
            Param::U64(x) => format!("{x}"),
            Param::U32(x) => format!("{x}"),
            Param::F32(x) => format!("{x:?}f"),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Tests make thousands of machines on one GPU. One that is lost has nothing to give back.
        if let Some(twin) = &self.there {
            for place in twin.places.values() {
                let _ = twin.device.gpu.free(place.at);
            }
        }
    }
}
