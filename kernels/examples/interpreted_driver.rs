//! A stand-in for NVIDIA's driver library: the functions that `cuda/driver.rs` looks up, with the PTX interpreter behind them. Tests load it
//! as libcuda.so.1, so that the program's way to a GPU runs to its end where there is none. Whatever is asynchronous happens as late as it
//! may: when the host waits; a copy from memory that is not pinned, which may be read until then, must be waited for at once.
//! `RSINFER_TEST_DRIVER` asks for what goes wrong: `old`, `none`, `busy`, `pre-turing`, `small`, `nothing pinned`, `refuses`, `lost`, `no graphs`,
//! `lost in a graph`; `hopper` (a GPU whose kernels may overlap), `no overlaps` (the same, of a driver that takes no edges for that);
//! `idle` (a Hopper of an H200's memory that computes nothing: reads give zeros, so that what the host does for real models can be gone through);
//! `wrong:ENTRY` (that kernel subtracts where it first adds), `faults:ENTRY` (the GPU is lost when it is launched), `hangs:ENTRY`. Must not know
//! of the backend.
// NVIDIA documents what these do and ask.
#![allow(clippy::missing_safety_doc, missing_docs)]

use ptx::{Machine, Module, Param};
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard};

const OK: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const DEVICE_UNAVAILABLE: c_int = 46;
const NO_DEVICE: c_int = 100;
const INVALID_DEVICE: c_int = 101;
const BAD_PTX: c_int = 218;
const BAD_PTX_VERSION: c_int = 222;
const NOT_FOUND: c_int = 500;
const NOT_SUPPORTED: c_int = 801;
const ILLEGAL_ADDRESS: c_int = 700;

/// Shared memory of a block, as of an A100 or an H200.
fn shared_memory() -> c_int {
    if hopper() { 227 << 10 } else { 163 << 10 }
}

#[derive(Default)]
struct State {
    machine: Machine,
    modules: Vec<Module>,
    /// Module and name of each kernel.
    functions: Vec<(usize, String)>,
    /// Dynamic shared memory that each may have beyond the usual.
    allowed: Vec<usize>,
    held: HashMap<u64, usize>,
    launches: usize,
    lost: bool,
    graphs: Vec<Vec<Node>>,
    /// The stream: what was asked for and has not happened, and how much has.
    waits: VecDeque<Node>,
    done: usize,
    /// Of each event, how much had been asked for when it was recorded last.
    events: Vec<usize>,
    /// Where pinned memory lies, and its bytes.
    pinned: Vec<(usize, usize)>,
    /// The last copy reads memory that is not pinned.
    hurry: bool,
    /// `idle`: bytes given out, of memory that is not there.
    promised: usize,
}

/// A node of a graph, or a call that is asynchronous.
#[derive(Clone)]
enum Node {
    /// Function, grid, threads, shared memory, arguments; how it depends on the node before.
    Kernel(usize, [c_uint; 3], [c_uint; 3], c_uint, Vec<Param>, Behind),
    /// To, from (on the host), bytes.
    Copy(u64, usize, usize),
    /// To (on the host), from, bytes.
    Read(usize, u64, usize),
    /// Where, a value, bytes.
    Fill(u64, u8, usize),
}

impl State {
    /// Puts a call behind all others.
    fn later(&mut self, node: Node) -> c_int {
        if self.lost {
            return ILLEGAL_ADDRESS;
        }
        if self.hurry {
            eprintln!("interpreted driver: a copy from memory that is not pinned was not waited for");
            return INVALID_VALUE;
        }
        self.waits.push_back(node);
        OK
    }

    /// The host waits until so many calls have happened.
    fn until(&mut self, count: usize) -> c_int {
        while self.done < count && !self.lost {
            let Some(node) = self.waits.pop_front() else { break };
            self.done += 1;
            let code = match node {
                Node::Read(to, _, bytes) if idle() => {
                    // SAFETY: the caller has room for `bytes` until it has waited.
                    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(to).write_bytes(0, bytes) };
                    OK
                }
                _ if idle() => OK,
                Node::Kernel(function, grid, block, shared, values, behind) => {
                    run(self, function, grid, block, shared, &values, behind == Behind::Early)
                }
                Node::Copy(to, from, bytes) => {
                    let from = std::ptr::with_exposed_provenance(from);
                    // SAFETY: the caller's memory, pinned or waited for.
                    code(self.machine.write(to, unsafe { std::slice::from_raw_parts(from, bytes) }))
                }
                Node::Read(to, from, bytes) => {
                    let got = self.machine.read(from, bytes);
                    if let Ok(b) = &got {
                        let to = std::ptr::with_exposed_provenance_mut(to);
                        // SAFETY: the caller has room for `bytes` until it has waited.
                        unsafe { std::ptr::copy_nonoverlapping(b.as_ptr(), to, bytes) };
                    }
                    code(got)
                }
                Node::Fill(at, value, bytes) => code(self.machine.write(at, &vec![value; bytes])),
            };
            self.lost |= code != OK;
        }
        self.hurry &= !self.waits.is_empty();
        if self.lost { ILLEGAL_ADDRESS } else { OK }
    }

    /// The host waits for everything.
    fn all(&mut self) -> c_int {
        self.until(self.done + self.waits.len())
    }
}

/// How a node depends on the one before.
#[derive(Clone, Copy, PartialEq)]
enum Behind {
    /// Not yet.
    Open,
    Full,
    /// It may begin while that one runs.
    Early,
}

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[repr(C)]
pub struct KernelNode {
    function: *mut c_void,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
    kernel: *mut c_void,
    context: *mut c_void,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|e| e.into_inner())
}

fn asked(what: &str) -> bool {
    std::env::var("RSINFER_TEST_DRIVER").is_ok_and(|v| v == what)
}

/// Whether nothing is computed; asked at every turn, so found once.
fn idle() -> bool {
    static IDLE: LazyLock<bool> = LazyLock::new(|| asked("idle"));
    *IDLE
}

fn hopper() -> bool {
    idle() || asked("hopper") || asked("no overlaps")
}

/// Whether it is asked for of this kernel.
fn asked_of(what: &str, kernel: &str) -> bool {
    std::env::var("RSINFER_TEST_DRIVER").is_ok_and(|v| v.split_once(':') == Some((what, kernel)))
}

/// The text with one kernel's first addition made a subtraction, where that is asked for.
fn spoiled(text: &str) -> String {
    let asked = std::env::var("RSINFER_TEST_DRIVER").unwrap_or_default();
    let add = asked.strip_prefix("wrong:").and_then(|entry| {
        let start = text.find(&format!(".entry {entry}("))?;
        Some(start + text[start..].find("add.rn.f32")?)
    });
    add.map_or_else(|| text.to_owned(), |at| format!("{}sub{}", &text[..at], &text[at + 3..]))
}

fn size() -> usize {
    match () {
        () if asked("small") => 1 << 20,
        () if idle() => 139 << 30,
        () => 4 << 30,
    }
}

/// Handles are numbers from 1.
fn handle(i: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(i + 1)
}

fn number(h: *mut c_void) -> usize {
    h.addr().wrapping_sub(1)
}

/// Writes a result of the caller's.
///
/// # Safety
/// `to` must be writable, as the driver's interface says of each such argument.
unsafe fn give<T>(to: *mut T, value: T) -> c_int {
    // SAFETY: the caller's.
    unsafe { to.write(value) };
    OK
}

fn code<T>(r: Result<T, ptx::PtxError>) -> c_int {
    match r {
        Ok(_) => OK,
        Err(e) => {
            eprintln!("interpreted driver: {e}");
            ILLEGAL_ADDRESS
        }
    }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuInit(_: c_uint) -> c_int {
    if asked("none") { NO_DEVICE } else { OK }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuDriverGetVersion(v: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(v, if asked("old") { 11_080 } else { 12_040 }) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGetErrorName(error: c_int, text: *mut *const c_char) -> c_int {
    let name = match error {
        BAD_PTX_VERSION => c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        _ => c"CUDA_ERROR_OF_A_TEST",
    };
    // SAFETY: the caller's.
    unsafe { give(text, name.as_ptr()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGetErrorString(_: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(text, c"the interpreted driver says so".as_ptr()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuDeviceGetCount(n: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(n, c_int::from(!asked("none"))) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuDeviceGet(device: *mut c_int, i: c_int) -> c_int {
    // SAFETY: the caller's.
    if i == 0 { unsafe { give(device, 7) } } else { INVALID_DEVICE }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuDeviceGetName(name: *mut c_char, len: c_int, _: c_int) -> c_int {
    let text = c"interpreted GPU".to_bytes_with_nul();
    assert!(text.len() <= len as usize);
    // SAFETY: the caller gives room for `len` bytes.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuDeviceGetAttribute(x: *mut c_int, what: c_int, device: c_int) -> c_int {
    let value = match what {
        75 if asked("pre-turing") => 7,
        75 if hopper() => 9,
        75 => 8,
        76 => 0,
        97 => shared_memory(),
        17 => 0,
        _ => return INVALID_VALUE,
    };
    assert_eq!(device, 7, "devices are what cuDeviceGet gave");
    // SAFETY: the caller's.
    unsafe { give(x, value) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _: c_int) -> c_int {
    if asked("busy") {
        return DEVICE_UNAVAILABLE;
    }
    // SAFETY: the caller's.
    unsafe { give(context, handle(41)) }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuDevicePrimaryCtxRelease_v2(_: c_int) -> c_int {
    OK
}

#[unsafe(no_mangle)]
pub extern "system" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    if context == handle(41) { OK } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuStreamCreate(stream: *mut *mut c_void, _: c_uint) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(stream, handle(42)) }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuStreamDestroy_v2(_: *mut c_void) -> c_int {
    OK
}

#[unsafe(no_mangle)]
pub extern "system" fn cuStreamSynchronize(stream: *mut c_void) -> c_int {
    if stream == handle(42) { state().all() } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(total, size()) };
    // SAFETY: the caller's.
    unsafe { give(free, size() - state().held.values().sum::<usize>()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> c_int {
    let s = &mut *state();
    if bytes == 0 {
        return INVALID_VALUE;
    }
    if s.held.values().sum::<usize>() + bytes > size() {
        return OUT_OF_MEMORY;
    }
    let address = if idle() { (1 << 40) + s.promised as u64 } else { s.machine.alloc(bytes) };
    s.promised += bytes.next_multiple_of(256);
    s.held.insert(address, bytes);
    // SAFETY: the caller's.
    unsafe { give(at, address) }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuMemFree_v2(at: u64) -> c_int {
    let s = &mut *state();
    let waited = s.all();
    s.held.remove(&at);
    if idle() { waited } else { code(s.machine.free(at)).max(waited) }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuMemsetD8Async(at: u64, value: u8, bytes: usize, _: *mut c_void) -> c_int {
    state().later(Node::Fill(at, value, bytes))
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    _: *mut c_void,
) -> c_int {
    let s = &mut *state();
    let at = from.expose_provenance();
    let code = s.later(Node::Copy(to, at, bytes));
    s.hurry = !s.pinned.iter().any(|p| p.0 <= at && at + bytes <= p.0 + p.1);
    code
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    _: *mut c_void,
) -> c_int {
    state().later(Node::Read(to.expose_provenance(), from, bytes))
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuModuleLoadDataEx(
    module: *mut *mut c_void,
    text: *const c_void,
    _: c_uint,
    _: *mut c_int,
    _: *mut *mut c_void,
) -> c_int {
    if asked("refuses") {
        return BAD_PTX_VERSION;
    }
    // SAFETY: a terminated text of the caller's.
    let text = unsafe { CStr::from_ptr(text.cast()) }.to_string_lossy();
    let Ok(parsed) = Module::parse(&spoiled(&text)) else { return BAD_PTX };
    let s = &mut *state();
    s.modules.push(parsed);
    // SAFETY: the caller's.
    unsafe { give(module, handle(s.modules.len() - 1)) }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuModuleUnload(_: *mut c_void) -> c_int {
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> c_int {
    let s = &mut *state();
    // SAFETY: a terminated name of the caller's.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    let m = number(module);
    if s.modules.get(m).and_then(|x| x.kernel(&name)).is_none() {
        return NOT_FOUND;
    }
    s.functions.push((m, name));
    s.allowed.push(0);
    // SAFETY: the caller's.
    unsafe { give(function, handle(s.functions.len() - 1)) }
}

/// Shared memory that a kernel declares.
fn declared(s: &State, function: usize) -> Option<usize> {
    let (m, name) = s.functions.get(function)?;
    Some(s.modules[*m].kernel(name)?.shared_bytes())
}

/// More than 48 KiB in all must have been allowed.
fn fits(s: &State, function: usize, shared: c_uint) -> bool {
    let shared = shared as usize;
    declared(s, function).is_some_and(|own| own + shared <= 48 << 10 || shared <= s.allowed[function])
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuFuncGetAttribute(x: *mut c_int, what: c_int, function: *mut c_void) -> c_int {
    match declared(&state(), number(function)).filter(|_| what == 1) {
        // SAFETY: the caller's.
        Some(bytes) => unsafe { give(x, bytes as c_int) },
        None => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuFuncSetAttribute(function: *mut c_void, what: c_int, bytes: c_int) -> c_int {
    let s = &mut *state();
    let (f, bytes) = (number(function), usize::try_from(bytes).unwrap_or(usize::MAX >> 1));
    if what != 8 || declared(s, f).is_none_or(|own| own + bytes > shared_memory() as usize) {
        return INVALID_VALUE;
    }
    s.allowed[f] = bytes;
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuLaunchKernel(
    function: *mut c_void,
    x: c_uint,
    y: c_uint,
    z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    stream: *mut c_void,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    let s = &mut *state();
    s.launches += 1;
    if stream != handle(42) || !extra.is_null() || s.lost || (asked("lost") && s.launches > 20) {
        return ILLEGAL_ADDRESS;
    }
    if !fits(s, number(function), shared) {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's.
    let Some(values) = (unsafe { arguments(s, number(function), params) }) else { return INVALID_VALUE };
    let block = [threads_x, threads_y, threads_z];
    s.later(Node::Kernel(number(function), [x, y, z], block, shared, values, Behind::Full))
}

/// The arguments of a launch.
///
/// # Safety
/// `params` points to as many values, of their sizes, as the function has parameters.
unsafe fn arguments(s: &State, function: usize, params: *mut *mut c_void) -> Option<Vec<Param>> {
    let (m, name) = s.functions.get(function)?;
    let kernel = s.modules[*m].kernel(name).expect("found before");
    let values = kernel.parameters().enumerate().map(|(i, size)| {
        // SAFETY: the caller's.
        let at = unsafe { *params.add(i) };
        match size {
            // SAFETY: as above.
            8 => Param::U64(unsafe { at.cast::<u64>().read() }),
            // SAFETY: as above; a float's bits are as good as an integer's.
            _ => Param::U32(unsafe { at.cast::<u32>().read() }),
        }
    });
    Some(values.collect())
}

fn run(
    s: &mut State,
    function: usize,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    values: &[Param],
    overlaps: bool,
) -> c_int {
    let State { machine, modules, functions, lost, .. } = s;
    let (m, name) = &functions[function];
    if asked_of("faults", name) {
        *lost = true;
        return ILLEGAL_ADDRESS;
    }
    if asked_of("hangs", name) {
        std::thread::sleep(std::time::Duration::from_secs(3600));
    }
    let kernel = modules[*m].kernel(name).expect("found before");
    code(match overlaps {
        true => machine.launch_overlapping(kernel, grid, block, shared as usize, values),
        false => machine.launch(kernel, grid, block, shared as usize, values),
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuMemHostAlloc(at: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int {
    if flags != 0 {
        return INVALID_VALUE;
    }
    if asked("nothing pinned") {
        return OUT_OF_MEMORY;
    }
    // As long as the process: `cuMemFreeHost` is not told how much it is.
    let memory = Box::leak(vec![0u8; bytes].into_boxed_slice());
    state().pinned.push((memory.as_ptr().expose_provenance(), bytes));
    // SAFETY: the caller's.
    unsafe { give(at, memory.as_mut_ptr().cast()) }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuMemFreeHost(_: *mut c_void) -> c_int {
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuEventCreate(event: *mut *mut c_void, _: c_uint) -> c_int {
    let s = &mut *state();
    // Nothing before it: never recorded.
    s.events.push(0);
    // SAFETY: the caller's.
    unsafe { give(event, handle(s.events.len() - 1)) }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> c_int {
    let s = &mut *state();
    let now = s.done + s.waits.len();
    match s.events.get_mut(number(event)).filter(|_| stream == handle(42)) {
        Some(e) => *e = now,
        None => return INVALID_VALUE,
    }
    if s.lost { ILLEGAL_ADDRESS } else { OK }
}

#[unsafe(no_mangle)]
pub extern "system" fn cuEventSynchronize(event: *mut c_void) -> c_int {
    let s = &mut *state();
    s.events.get(number(event)).copied().map_or(INVALID_VALUE, |e| s.until(e))
}

#[unsafe(no_mangle)]
pub extern "system" fn cuEventDestroy_v2(event: *mut c_void) -> c_int {
    if number(event) < state().events.len() { OK } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGraphCreate(graph: *mut *mut c_void, _: c_uint) -> c_int {
    let s = &mut *state();
    s.graphs.push(Vec::new());
    // SAFETY: the caller's.
    unsafe { give(graph, handle(s.graphs.len() - 1)) }
}

/// Adds a node behind the last, which `after` must name, or an edge that follows.
///
/// # Safety
/// `after` points to `count` handles, `node` to room for one.
unsafe fn add(
    s: &mut State,
    node: *mut *mut c_void,
    graph: *mut c_void,
    after: *const *mut c_void,
    count: usize,
    mut what: Node,
) -> c_int {
    let Some(nodes) = s.graphs.get_mut(number(graph)) else { return INVALID_VALUE };
    // SAFETY: the caller's.
    let chained = nodes.is_empty() && count == 0
        || count == 1 && number(unsafe { *after }).wrapping_add(1) == nodes.len();
    match &mut what {
        Node::Kernel(.., behind) if chained => *behind = Behind::Full,
        Node::Copy(..) if !chained => return INVALID_VALUE,
        _ if count > 1 => return INVALID_VALUE,
        _ => {}
    }
    nodes.push(what);
    // SAFETY: the caller's.
    unsafe { give(node, handle(nodes.len() - 1)) }
}

/// The node that the parameters say.
///
/// # Safety
/// As the driver's interface says of them.
unsafe fn kernel_node(s: &State, what: &KernelNode) -> Option<Node> {
    let function = number(what.function);
    if !fits(s, function, what.shared) {
        return None;
    }
    // SAFETY: the caller's.
    let values = unsafe { arguments(s, function, what.params) }?;
    let node = Node::Kernel(function, what.grid, what.block, what.shared, values, Behind::Open);
    what.extra.is_null().then_some(node)
}

/// One edge of the kind that lets a kernel begin early, from the kernel before.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGraphAddDependencies_v2(
    graph: *mut c_void,
    from: *const *mut c_void,
    to: *const *mut c_void,
    edge: *const [u8; 8],
    count: usize,
) -> c_int {
    if asked("no overlaps") {
        return NOT_SUPPORTED;
    }
    let s = &mut *state();
    let Some(nodes) = s.graphs.get_mut(number(graph)).filter(|_| count == 1) else { return INVALID_VALUE };
    // SAFETY: the caller's.
    let (from, to, edge) = unsafe { (number(*from), number(*to), *edge) };
    // From port 1 to port 0, type 1.
    if edge != [1, 0, 1, 0, 0, 0, 0, 0]
        || to != from + 1
        || !matches!(nodes.get(from), Some(Node::Kernel(..)))
    {
        return INVALID_VALUE;
    }
    match nodes.get_mut(to) {
        Some(Node::Kernel(.., behind @ Behind::Open)) => *behind = Behind::Early,
        _ => return INVALID_VALUE,
    }
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGraphAddKernelNode_v2(
    node: *mut *mut c_void,
    graph: *mut c_void,
    after: *const *mut c_void,
    count: usize,
    what: *const KernelNode,
) -> c_int {
    let s = &mut *state();
    // SAFETY: the caller's.
    let Some(what) = (unsafe { kernel_node(s, &*what) }) else { return INVALID_VALUE };
    // SAFETY: the caller's.
    unsafe { add(s, node, graph, after, count, what) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGraphAddMemcpyNode(
    node: *mut *mut c_void,
    graph: *mut c_void,
    after: *const *mut c_void,
    count: usize,
    what: *const [u64; 25],
    context: *mut c_void,
) -> c_int {
    // `CUDA_MEMCPY3D` in words: kind, host and device of the source are words 4 to 6, of the destination 15 to 17; then width, height, depth.
    // SAFETY: the caller's; kinds are half a word and padding, which the caller may leave open, so only that half is read.
    let (from, to, [width, height, depth]) = unsafe {
        let word = what.cast::<u64>();
        let kind = |i: usize| word.add(i).cast::<u32>().read();
        let from = (kind(4), word.add(5).read() as usize);
        let to = (kind(15), word.add(17).read());
        (from, to, [22, 23, 24].map(|i| word.add(i).read() as usize))
    };
    if (from.0, to.0, height, depth) != (1, 2, 1, 1) || context != handle(41) {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's.
    unsafe { add(&mut state(), node, graph, after, count, Node::Copy(to.1, from.1, width)) }
}

/// An executable graph is a copy of the other.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGraphInstantiateWithFlags(
    exec: *mut *mut c_void,
    graph: *mut c_void,
    flags: u64,
) -> c_int {
    if asked("no graphs") {
        return NOT_SUPPORTED;
    }
    let s = &mut *state();
    let Some(nodes) = s.graphs.get(number(graph)).filter(|_| flags == 0).cloned() else {
        return INVALID_VALUE;
    };
    if nodes.iter().any(|n| matches!(n, Node::Kernel(.., Behind::Open))) {
        return INVALID_VALUE;
    }
    s.graphs.push(nodes);
    // SAFETY: the caller's.
    unsafe { give(exec, handle(s.graphs.len() - 1)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn cuGraphExecKernelNodeSetParams_v2(
    exec: *mut c_void,
    node: *mut c_void,
    what: *const KernelNode,
) -> c_int {
    let s = &mut *state();
    // SAFETY: the caller's.
    let Some(new) = (unsafe { kernel_node(s, &*what) }) else { return INVALID_VALUE };
    match (s.graphs.get_mut(number(exec)).and_then(|g| g.get_mut(number(node))), new) {
        // Edges stay.
        (Some(Node::Kernel(f, g, b, s, v, _)), Node::Kernel(function, grid, block, shared, values, _)) => {
            (*f, *g, *b, *s, *v) = (function, grid, block, shared, values);
        }
        _ => return INVALID_VALUE,
    }
    OK
}

#[unsafe(no_mangle)]
pub extern "system" fn cuGraphLaunch(exec: *mut c_void, stream: *mut c_void) -> c_int {
    let s = &mut *state();
    if stream != handle(42) || s.lost || asked("lost in a graph") {
        return ILLEGAL_ADDRESS;
    }
    if idle() {
        return OK;
    }
    let Some(nodes) = s.graphs.get(number(exec)).cloned() else { return INVALID_VALUE };
    nodes.into_iter().map(|node| s.later(node)).max().unwrap_or(OK)
}

#[unsafe(no_mangle)]
pub extern "system" fn cuGraphExecDestroy(exec: *mut c_void) -> c_int {
    cuGraphDestroy(exec)
}

#[unsafe(no_mangle)]
pub extern "system" fn cuGraphDestroy(graph: *mut c_void) -> c_int {
    match state().graphs.get_mut(number(graph)) {
        Some(g) => g.clear(),
        None => return INVALID_VALUE,
    }
    OK
}
