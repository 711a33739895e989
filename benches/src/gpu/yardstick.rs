//! What the machine itself can do, by the same clock as everything else: bytes copied and read, products of tensor cores and multiply-adds out of
//! registers. Kernels of a few instructions, written here as PTX; nothing but these figures depends on them.

use super::timed::{Call, Timed};
use kernels::cuda::modules::Ptx;
use kernels::cuda::{Arg, Gpu, GpuError, Launch};
use std::sync::OnceLock;

/// Blocks of 256 threads.
const THREADS: u32 = 256;

/// A loop of `%r2` rounds around `body`, %rd1 being `to` and %rd2 the place of this thread's 16 bytes behind `from`, %rd3 that behind `to`,
/// %rd4 how far all threads' reach together.
fn kernel(name: &str, declare: &str, before: &str, body: &str, after: &str) -> String {
    format!(
        ".visible .entry {name}(.param .u64 {name}_param_0, .param .u64 {name}_param_1, .param .u32 {name}_param_2)\n{{\n\
         .reg .pred %p<2>;\n.reg .b32 %r<80>;\n.reg .f32 %f<80>;\n.reg .b64 %rd<8>;\n{declare}\
         ld.param.u64 %rd2, [{name}_param_0];\nld.param.u64 %rd1, [{name}_param_1];\nld.param.u32 %r2, [{name}_param_2];\n\
         mov.u32 %r3, %ctaid.x;\nmov.u32 %r4, %ntid.x;\nmov.u32 %r5, %tid.x;\nmov.u32 %r6, %nctaid.x;\n\
         mad.lo.u32 %r7, %r3, %r4, %r5;\nmul.wide.u32 %rd5, %r7, 16;\nadd.s64 %rd2, %rd2, %rd5;\nadd.s64 %rd3, %rd1, %rd5;\n\
         mul.lo.u32 %r8, %r6, %r4;\nmul.wide.u32 %rd4, %r8, 16;\nmov.u32 %r9, 0;\n{before}\
         {name}_loop:\n{body}add.u32 %r9, %r9, 1;\nsetp.lt.u32 %p1, %r9, %r2;\n@%p1 bra {name}_loop;\n{after}ret;\n}}\n"
    )
}

/// Vectors that a thread has under way.
const AHEAD: usize = 8;
/// Sums that do not wait for one another.
const SUMS: usize = 8;

fn lines(n: usize, f: impl Fn(usize) -> String) -> String {
    (0..n).map(f).collect()
}

fn float(i: usize) -> String {
    format!("0f{:08X}", (i as f32).to_bits())
}

fn text() -> String {
    let load = |i: usize| {
        let r = 16 + 4 * i;
        format!(
            "ld.global.nc.v4.u32 {{%r{r}, %r{}, %r{}, %r{}}}, [%rd2];\nadd.s64 %rd2, %rd2, %rd4;\n",
            r + 1,
            r + 2,
            r + 3
        )
    };
    let store = |i: usize| {
        let r = 16 + 4 * i;
        format!(
            "st.global.v4.u32 [%rd3], {{%r{r}, %r{}, %r{}, %r{}}};\nadd.s64 %rd3, %rd3, %rd4;\n",
            r + 1,
            r + 2,
            r + 3
        )
    };
    // Only so that the loads are not left out: the sum is all but never 0.
    let fold = lines(4 * AHEAD, |i| format!("xor.b32 %r10, %r10, %r{};\n", 16 + i));
    let unlikely = "setp.eq.u32 %p1, %r10, 0x5eed5eed;\n@%p1 st.global.u32 [%rd3], %r10;\n";
    // Sums begin apart: an assembler makes one of what is alike.
    let product = |shape: &str, letter: &str, ty: &str, start: fn(usize) -> String| {
        let before = lines(4 * SUMS, |i| format!("mov.{ty} %{letter}{}, {};\n", 16 + i, start(i)));
        let body = lines(SUMS, |i| {
            let c = 16 + 4 * i;
            let sums =
                format!("{{%{letter}{c}, %{letter}{}, %{letter}{}, %{letter}{}}}", c + 1, c + 2, c + 3);
            format!("mma.sync.aligned.{shape} {sums}, {{%r60, %r61, %r62, %r63}}, {{%r64, %r65}}, {sums};\n")
        });
        // Bytes of all kinds; as f16, below 1.
        let ready = lines(6, |i| {
            let r = 60 + i;
            format!("mad.lo.u32 %r{r}, %r7, 0x9e3779b1, {i};\nand.b32 %r{r}, %r{r}, 0x3bff3bff;\n")
        });
        // Sums that nothing reads would be left out.
        let out = lines(4 * SUMS, |i| format!("add.{ty} %{letter}8, %{letter}8, %{letter}{};\n", 16 + i));
        let out = format!("mov.{ty} %{letter}8, {};\n{out}st.global.{ty} [%rd3], %{letter}8;\n", start(0));
        (format!("{ready}{before}"), body, out)
    };
    let (f16, s8) = (
        product("m16n8k16.row.col.f32.f16.f16.f32", "f", "f32", float),
        product("m16n8k32.row.col.s32.s8.s8.s32", "r", "u32", |i| i.to_string()),
    );
    let fma = lines(4 * SUMS, |i| format!("fma.rn.f32 %f{}, %f{}, %f8, %f9;\n", 16 + i, 16 + i));
    let ready = format!(
        "mov.f32 %f8, 0f3F000000;\nmov.f32 %f9, 0f3F800000;\n{}",
        lines(4 * SUMS, |i| format!("mov.f32 %f{}, {};\n", 16 + i, float(i)))
    );
    let out = lines(4 * SUMS, |i| format!("add.f32 %f8, %f8, %f{};\n", 16 + i));
    let out = format!("{out}st.global.f32 [%rd3], %f8;\n");
    [
        ".version 8.1\n.target sm_80\n.address_size 64\n".to_owned(),
        kernel("copy", "", "", &format!("{}{}", lines(AHEAD, load), lines(AHEAD, store)), ""),
        kernel("read", "", "mov.u32 %r10, 0;\n", &format!("{}{fold}", lines(AHEAD, load)), unlikely),
        kernel("mma_f16", "", &f16.0, &f16.1, &f16.2),
        kernel("mma_s8", "", &s8.0, &s8.1, &s8.2),
        kernel("fma", "", &ready, &fma, &out),
    ]
    .concat()
}

/// The text of these kernels.
pub fn module() -> &'static Ptx {
    static MODULE: OnceLock<Ptx> = OnceLock::new();
    MODULE.get_or_init(|| Ptx { name: "yardstick", text: text().leak() })
}

/// What the machine can do, per second.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Peaks {
    /// Bytes read and written by a copy.
    pub copied: f64,
    /// Bytes read.
    pub read: f64,
    /// Operations of `mma.sync` on f16 with sums in f32.
    pub f16: f64,
    /// Operations of `mma.sync` on int8.
    pub s8: f64,
    /// Operations of f32 multiply-adds, two each.
    pub fma: f64,
}

impl Peaks {
    /// What issue 7 says of an H200, for shares where nothing could be measured.
    pub const ASSUMED: Self = Self { copied: 4.3e12, read: 4.3e12, f16: 790e12, s8: 1580e12, fma: 67e12 };

    /// Measures them; `toy`: at sizes for an interpreter.
    ///
    /// # Errors
    /// The GPU's: also one before Ampere, which has none of these products.
    pub fn measure(gpu: &Timed, toy: bool) -> Result<Self, GpuError> {
        let (blocks, rounds) = if toy { (2, 2) } else { (132 * 16, 16) };
        let threads = u64::from(blocks * THREADS);
        let bytes = threads * 16 * AHEAD as u64 * u64::from(rounds);
        let (from, to) = (gpu.alloc(bytes as usize)?, gpu.alloc(bytes as usize)?);
        gpu.load(module())?;
        gpu.zero(from, bytes as usize)?;
        gpu.zero(to, bytes as usize)?;
        let run = |entry: &str, rounds: u32| -> Result<f64, GpuError> {
            let launch = Launch { grid: [blocks, 1, 1], threads: THREADS, shared: 0, overlaps: false };
            let args = vec![Arg::U64(from), Arg::U64(to), Arg::U32(rounds)];
            let call: Call = gpu.call(module(), entry, launch, args)?;
            gpu.seconds(&[call], toy)
        };
        let long = if toy { 2 } else { 2048 };
        let warps = threads as f64 / 32.0 * f64::from(long) * SUMS as f64;
        let peaks = Self {
            copied: 2.0 * bytes as f64 / run("copy", rounds)?,
            read: bytes as f64 / run("read", rounds)?,
            f16: 4096.0 * warps / run("mma_f16", long)?,
            s8: 8192.0 * warps / run("mma_s8", long)?,
            // Four times as many sums, 32 lanes, two operations.
            fma: 4.0 * 64.0 * warps / run("fma", long)?,
        };
        gpu.free(from)?;
        gpu.free(to)?;
        Ok(peaks)
    }
}
