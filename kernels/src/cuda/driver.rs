//! NVIDIA's driver behind [`Gpu`]: the library is loaded when it is asked for and never linked, every return code is looked at, nothing
//! panics where it is missing. Functions are looked up by name with codes as plain numbers: a newer driver may return any. Documented
//! in NVIDIA's "CUDA Driver API". Knows nothing of kernels' arguments but their sizes.

#[cfg(test)]
mod abi;
mod graph;
mod pinned;

use super::gpu::{Arg, Gpu, GpuError, GpuInfo, GraphId, KernelId, Launch, Step};
use super::modules::Ptx;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ops::Deref;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

type Code = c_int;
type Handle = *mut c_void;

/// CUDA 12.1, whose drivers read PTX 8.1.
const NEEDED: c_int = 12_010;
/// The oldest compute capability: Turing.
const OLDEST: (u32, u32) = (7, 5);

#[cfg(windows)]
const LIBRARY: &str = "nvcuda.dll";
#[cfg(not(windows))]
const LIBRARY: &str = "libcuda.so.1";

mod code {
    use super::Code;
    pub const OUT_OF_MEMORY: Code = 2;
    pub const NO_DEVICE: Code = 100;
    /// A text that the driver's compiler does not take: bad image, no binary, bad PTX, no compiler, a newer PTX, no compiling.
    pub const REFUSED: [Code; 6] = [200, 209, 218, 221, 222, 223];
    /// After these nothing of the context can be used: gone or broken devices and links, faults of kernels, a server (MPS) that stopped.
    pub const LOST: [Code; 18] =
        [46, 101, 201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 810, 999];
}

mod attribute {
    use super::c_int;
    pub const MAJOR: c_int = 75;
    pub const MINOR: c_int = 76;
    /// Shared memory that a block may have where its kernel is allowed it.
    pub const SHARED: c_int = 97;
    /// Kernels may run for a limited time only: the GPU serves a display.
    pub const TIMEOUT: c_int = 17;
}

macro_rules! api {
    ($(#[$doc:meta])* $vis:vis struct $name:ident { $($field:ident = $symbol:literal ($($arg:ty),*);)* }) => {
        $(#[$doc])*
        $vis struct $name {
            $($field: unsafe extern "system" fn($($arg),*) -> Code,)*
        }

        impl $name {
            /// Names, and of each argument its type and size.
            #[cfg(test)]
            $vis const SYMBOLS: &[(&str, &[(&str, usize)])] =
                &[$(($symbol, &[$((stringify!($arg), size_of::<$arg>())),*])),*];

            $vis fn of(library: &Library) -> Result<Self, GpuError> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is that of the function in NVIDIA's documentation; versions are part of its name.
                        let f = unsafe { library.get(concat!($symbol, "\0").as_bytes()) };
                        *f.map_err(|_| old_driver(concat!("without ", $symbol)))?
                    },)*
                })
            }
        }
    };
}
use api;

api! {
    /// The driver's functions.
    struct Functions {
        init = "cuInit" (c_uint);
        version = "cuDriverGetVersion" (*mut c_int);
        error_name = "cuGetErrorName" (Code, *mut *const c_char);
        error_text = "cuGetErrorString" (Code, *mut *const c_char);
        count = "cuDeviceGetCount" (*mut c_int);
        device = "cuDeviceGet" (*mut c_int, c_int);
        name = "cuDeviceGetName" (*mut c_char, c_int, c_int);
        attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
        retain = "cuDevicePrimaryCtxRetain" (*mut Handle, c_int);
        release = "cuDevicePrimaryCtxRelease_v2" (c_int);
        set_current = "cuCtxSetCurrent" (Handle);
        stream = "cuStreamCreate" (*mut Handle, c_uint);
        destroy_stream = "cuStreamDestroy_v2" (Handle);
        synchronize = "cuStreamSynchronize" (Handle);
        memory = "cuMemGetInfo_v2" (*mut usize, *mut usize);
        alloc = "cuMemAlloc_v2" (*mut u64, usize);
        free = "cuMemFree_v2" (u64);
        zero = "cuMemsetD8Async" (u64, u8, usize, Handle);
        write = "cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, Handle);
        read = "cuMemcpyDtoHAsync_v2" (*mut c_void, u64, usize, Handle);
        load = "cuModuleLoadDataEx" (*mut Handle, *const c_void, c_uint, *mut c_int, *mut *mut c_void);
        pin = "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
        unpin = "cuMemFreeHost" (*mut c_void);
        event = "cuEventCreate" (*mut Handle, c_uint);
        record = "cuEventRecord" (Handle, Handle);
        wait = "cuEventSynchronize" (Handle);
        destroy_event = "cuEventDestroy_v2" (Handle);
        unload = "cuModuleUnload" (Handle);
        function = "cuModuleGetFunction" (*mut Handle, Handle, *const c_char);
        function_get = "cuFuncGetAttribute" (*mut c_int, c_int, Handle);
        function_set = "cuFuncSetAttribute" (Handle, c_int, c_int);
        launch = "cuLaunchKernel" (
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
        );
    }
}

/// The driver, as long as anything uses it.
struct Api {
    functions: Functions,
    /// `None`: a driver without.
    graphs: Option<graph::Functions>,
    /// `None`: one of before CUDA 12.3.
    edges: Option<graph::Edges>,
    /// Keeps the functions where they are.
    _library: Library,
}

impl Deref for Api {
    type Target = Functions;

    fn deref(&self) -> &Functions {
        &self.functions
    }
}

fn old_driver(found: &str) -> GpuError {
    GpuError::OldDriver { found: found.into(), needed: version(NEEDED) }
}

fn version(v: c_int) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

impl Api {
    /// The driver, loaded and initialised once for the process.
    fn get() -> Result<Arc<Self>, GpuError> {
        static API: OnceLock<Result<Arc<Api>, GpuError>> = OnceLock::new();
        API.get_or_init(Self::open).clone()
    }

    fn open() -> Result<Arc<Self>, GpuError> {
        // SAFETY: NVIDIA's library runs no code when it is loaded that could harm this process; another library of its name would be
        // the system's doing, as with every library that a program loads.
        let library = unsafe { Library::new(LIBRARY) };
        let library = library.map_err(|_| GpuError::NoDriver { library: LIBRARY.into() })?;
        let (functions, graphs) = (Functions::of(&library)?, graph::Functions::of(&library).ok());
        let edges = graph::Edges::of(&library).ok();
        let api = Self { functions, graphs, edges, _library: library };
        // SAFETY: as documented; no pointers.
        let begun = unsafe { (api.init)(0) };
        if begun != code::NO_DEVICE {
            api.begun("cuInit", begun)?;
        }
        let mut found = 0;
        // SAFETY: writes one number.
        api.check("cuDriverGetVersion", unsafe { (api.version)(&mut found) })?;
        if found < NEEDED {
            return Err(old_driver(&version(found)));
        }
        Ok(Arc::new(api))
    }

    /// The driver's words for a code.
    fn text(&self, code: Code) -> String {
        let word = |f: unsafe extern "system" fn(Code, *mut *const c_char) -> Code| {
            let mut text = ptr::null();
            // SAFETY: writes a pointer to a constant of the library's, or null.
            let done = unsafe { f(code, &mut text) };
            // SAFETY: a string that lives as long as the library.
            (done == 0 && !text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
        };
        match (word(self.error_name), word(self.error_text)) {
            (Some(name), Some(text)) => format!("{name}: {text}"),
            _ => format!("code {code}"),
        }
    }

    fn check(&self, call: &'static str, code: Code) -> Result<(), GpuError> {
        match code {
            0 => Ok(()),
            c if code::LOST.contains(&c) => Err(GpuError::Lost { why: format!("{call}: {}", self.text(c)) }),
            c => Err(GpuError::Driver { call, why: self.text(c) }),
        }
    }

    /// Of the calls before there is a context: nothing can be lost yet.
    fn begun(&self, call: &'static str, code: Code) -> Result<(), GpuError> {
        if code == 0 { Ok(()) } else { Err(GpuError::NotReady { call, why: self.text(code) }) }
    }

    fn count(&self) -> Result<usize, GpuError> {
        let mut n = 0;
        // SAFETY: writes one number.
        match unsafe { (self.count)(&mut n) } {
            // What a driver without any GPU says (3: cuInit had found none).
            code::NO_DEVICE | 3 => Ok(0),
            c => self.check("cuDeviceGetCount", c).map(|()| usize::try_from(n).unwrap_or(0)),
        }
    }

    fn attribute(&self, what: c_int, device: c_int) -> Result<u32, GpuError> {
        let mut x = 0;
        // SAFETY: writes one number.
        self.check("cuDeviceGetAttribute", unsafe { (self.attribute)(&mut x, what, device) })?;
        Ok(u32::try_from(x).unwrap_or(0))
    }

    fn info(&self, device: c_int) -> Result<GpuInfo, GpuError> {
        let mut name = [0 as c_char; 256];
        // SAFETY: writes at most 256 bytes, the last of them 0.
        self.check("cuDeviceGetName", unsafe { (self.name)(name.as_mut_ptr(), 256, device) })?;
        let bytes: Vec<u8> = name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        Ok(GpuInfo {
            name: String::from_utf8_lossy(&bytes).into_owned(),
            capability: (
                self.attribute(attribute::MAJOR, device)?,
                self.attribute(attribute::MINOR, device)?,
            ),
            shared: self.attribute(attribute::SHARED, device)?,
            display: self.attribute(attribute::TIMEOUT, device)? != 0,
        })
    }

    /// The device with this number among those that `CUDA_VISIBLE_DEVICES` leaves: the driver numbers only these.
    fn device(&self, index: usize) -> Result<c_int, GpuError> {
        let count = self.count()?;
        let mut device = 0;
        let number = c_int::try_from(index).ok().filter(|_| index < count).ok_or_else(|| {
            let hidden = std::env::var("CUDA_VISIBLE_DEVICES");
            let hidden = hidden.map_or(String::new(), |v| format!(" with CUDA_VISIBLE_DEVICES={v}"));
            GpuError::NoDevice { index, count, hidden }
        })?;
        // SAFETY: writes one number.
        self.check("cuDeviceGet", unsafe { (self.device)(&mut device, number) })?;
        Ok(device)
    }
}

/// The GPUs that the driver shows.
///
/// # Errors
/// No driver, or one too old.
pub fn devices() -> Result<Vec<GpuInfo>, GpuError> {
    let api = Api::get()?;
    (0..api.count()?).map(|i| api.info(api.device(i)?)).collect()
}

/// The GPU `cuda:index`.
///
/// # Errors
/// [`GpuError`]: no driver, one too old, no such GPU, one too old, no memory for a context.
pub fn open(index: usize) -> Result<Box<dyn Gpu>, GpuError> {
    let api = Api::get()?;
    let device = api.device(index)?;
    let info = api.info(device)?;
    if info.capability < OLDEST {
        let (major, minor) = info.capability;
        return Err(GpuError::OldDevice { name: info.name, major, minor });
    }
    let mut context = ptr::null_mut();
    // SAFETY: writes a handle; released when the last user drops.
    let code = unsafe { (api.retain)(&mut context, device) };
    if code == code::OUT_OF_MEMORY {
        return Err(GpuError::Memory { what: "context", bytes: 0, free: 0 });
    }
    api.begun("cuDevicePrimaryCtxRetain", code)?;
    let mut driver = Driver {
        api,
        info,
        device,
        context,
        stream: ptr::null_mut(),
        state: Mutex::default(),
        pieces: Mutex::default(),
    };
    let mut stream = ptr::null_mut();
    // SAFETY: the context is current; writes a handle. 1: it does not wait for the legacy stream, which nothing uses.
    driver.call("cuStreamCreate", |api| unsafe { (api.stream)(&mut stream, 1) })?;
    driver.stream = stream;
    Ok(Box::new(driver))
}

#[derive(Default)]
struct State {
    /// Names and handles.
    modules: Vec<(&'static str, Handle)>,
    kernels: Vec<Handle>,
    graphs: graph::Graphs,
    /// Why the GPU is lost, if it is.
    lost: Option<String>,
}

/// A GPU's primary context and one stream in it, in which everything happens in order.
struct Driver {
    api: Arc<Api>,
    info: GpuInfo,
    device: c_int,
    context: Handle,
    stream: Handle,
    state: Mutex<State>,
    pieces: Mutex<pinned::Pieces>,
}

// SAFETY: handles of the driver may be used from any thread; the context is made current before each call, and calls that change
// `state` hold its lock.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver's functions are thread-safe.
unsafe impl Sync for Driver {}

impl Driver {
    fn state(&self) -> MutexGuard<'_, State> {
        // Entries are put in whole.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn function(&self, kernel: KernelId) -> Result<Handle, GpuError> {
        let missing = || GpuError::Driver { call: "cuLaunchKernel", why: "no such kernel".into() };
        self.state().kernels.get(kernel.0).copied().ok_or_else(missing)
    }

    /// A call in the context; what it says of a lost GPU is remembered.
    fn call(&self, name: &'static str, f: impl FnOnce(&Api) -> Code) -> Result<(), GpuError> {
        let mut state = self.state();
        if let Some(why) = &state.lost {
            return Err(GpuError::Lost { why: why.clone() });
        }
        // SAFETY: the context is retained as long as `self` lives.
        let current = unsafe { (self.api.set_current)(self.context) };
        let done =
            self.api.check("cuCtxSetCurrent", current).and_then(|()| self.api.check(name, f(&self.api)));
        if let Err(GpuError::Lost { why }) = &done {
            state.lost = Some(why.clone());
        }
        done
    }
}

/// Where the arguments of a launch lie, as the driver takes them.
fn addresses(args: &[Arg]) -> Vec<*mut c_void> {
    let address = |a: &Arg| match a {
        Arg::U64(x) => ptr::from_ref(x).cast_mut().cast(),
        Arg::U32(x) => ptr::from_ref(x).cast_mut().cast(),
        Arg::F32(x) => ptr::from_ref(x).cast_mut().cast(),
    };
    args.iter().map(address).collect()
}

impl Gpu for Driver {
    fn info(&self) -> GpuInfo {
        self.info.clone()
    }

    fn memory(&self) -> Result<(u64, u64), GpuError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        self.call("cuMemGetInfo", |api| unsafe { (api.memory)(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    fn alloc(&self, bytes: usize) -> Result<u64, GpuError> {
        let (mut at, mut code) = (0, 0);
        self.call("cuMemAlloc", |api| {
            // SAFETY: writes an address.
            code = unsafe { (api.alloc)(&mut at, bytes) };
            if code == code::OUT_OF_MEMORY { 0 } else { code }
        })?;
        if code == code::OUT_OF_MEMORY {
            let free = self.memory().map_or(0, |m| m.0);
            return Err(GpuError::Memory { what: "model", bytes, free });
        }
        Ok(at)
    }

    fn free(&self, at: u64) -> Result<(), GpuError> {
        // What was launched may still use it. A GPU that is lost is reported below.
        let _ = self.synchronize();
        // SAFETY: an address that `alloc` gave, which nothing uses any more; the driver refuses any other.
        self.call("cuMemFree", |api| unsafe { (api.free)(at) })
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), GpuError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: device memory alone; a range that is not there is the driver's error.
        self.call("cuMemsetD8Async", |api| unsafe { (api.zero)(at, 0, bytes, self.stream) })
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.write_pieces(at, bytes)
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.read_pieces(at, bytes)
    }

    fn load(&self, module: &Ptx) -> Result<(), GpuError> {
        const LOG: usize = 4096;
        let text = CString::new(module.text).map_err(|_| GpuError::Refused {
            module: module.name.into(),
            why: "a zero byte in its text".into(),
        })?;
        let mut log = vec![0u8; LOG];
        // CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES; the size is passed in the pointer.
        let (mut options, mut values) = ([5, 6], [log.as_mut_ptr().cast(), ptr::without_provenance_mut(LOG)]);
        let (mut handle, mut code) = (ptr::null_mut(), 0);
        self.call("cuModuleLoadDataEx", |api| {
            let text = text.as_ptr().cast();
            // SAFETY: a terminated text; two options with their values; the log's size is what is said.
            code = unsafe { (api.load)(&mut handle, text, 2, options.as_mut_ptr(), values.as_mut_ptr()) };
            if code::REFUSED.contains(&code) { 0 } else { code }
        })?;
        if code != 0 {
            let log: Vec<u8> = log.into_iter().take_while(|b| *b != 0).collect();
            let log = String::from_utf8_lossy(&log);
            let log: Vec<&str> = log.lines().take(4).map(str::trim).collect();
            let why = format!("{} {}", self.api.text(code), log.join(" "));
            return Err(GpuError::Refused { module: module.name.into(), why: why.trim().into() });
        }
        self.state().modules.push((module.name, handle));
        Ok(())
    }

    fn kernel(&self, module: &str, entry: &str) -> Result<KernelId, GpuError> {
        let refused = |why: &str| GpuError::Refused { module: module.into(), why: format!("{entry}: {why}") };
        let found = self.state().modules.iter().find(|m| m.0 == module).map(|m| m.1);
        let handle = found.ok_or_else(|| refused("its module is not loaded"))?;
        let name = CString::new(entry).map_err(|_| refused("a zero byte in its name"))?;
        let mut function = ptr::null_mut();
        // SAFETY: a loaded module, a terminated name; writes a handle.
        self.call("cuModuleGetFunction", |api| unsafe {
            (api.function)(&mut function, handle, name.as_ptr())
        })?;
        // All of shared memory that it does not declare itself: 1 is how much that is, 8 what may come at a launch.
        let mut declared = 0;
        // SAFETY: a function of a loaded module; writes one number.
        self.call("cuFuncGetAttribute", |api| unsafe { (api.function_get)(&mut declared, 1, function) })?;
        let rest = self.info.shared.saturating_sub(u32::try_from(declared).unwrap_or(0)) as c_int;
        // SAFETY: as above; no pointers.
        self.call("cuFuncSetAttribute", |api| unsafe { (api.function_set)(function, 8, rest) })?;
        let mut state = self.state();
        state.kernels.push(function);
        Ok(KernelId(state.kernels.len() - 1))
    }

    fn launch(&self, kernel: KernelId, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        let function = self.function(kernel)?;
        let mut params = addresses(args);
        let [x, y, z] = launch.grid;
        // SAFETY: a kernel of a loaded module; `params` points to as many values, each of its parameter's size, as the kernel takes
        // (`launch.rs` is held against every kernel by the interpreter, which checks both); the driver copies them at once.
        self.call("cuLaunchKernel", |api| unsafe {
            (api.launch)(
                function,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                launch.shared,
                self.stream,
                params.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: the context's own stream.
        self.call("cuStreamSynchronize", |api| unsafe { (api.synchronize)(self.stream) })
    }

    fn stream(
        &self,
        at: u64,
        least: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Result<(), GpuError> {
        self.stream_pieces(at, least, fill)
    }

    fn graph(&self, steps: &[Step<'_>], from: usize) -> Result<GraphId, GpuError> {
        self.make_graph(steps, from)
    }

    fn change(&self, graph: GraphId, i: usize, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        self.change_graph(graph, i, launch, args)
    }

    fn run(&self, graph: GraphId, bytes: &[u8]) -> Result<(), GpuError> {
        self.run_graph(graph, bytes)
    }

    fn forget(&self, graph: GraphId) -> Result<(), GpuError> {
        self.forget_graph(graph)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.synchronize();
        self.forget_graphs();
        self.forget_pieces();
        let modules = std::mem::take(&mut self.state().modules);
        for (_, handle) in modules {
            // SAFETY: loaded by this object and used by nothing else.
            let _ = self.call("cuModuleUnload", |api| unsafe { (api.unload)(handle) });
        }
        if !self.stream.is_null() {
            // SAFETY: made by `open`.
            let _ = self.call("cuStreamDestroy", |api| unsafe { (api.destroy_stream)(self.stream) });
        }
        // SAFETY: retained by `open`, once. A context that is lost is given back even so.
        unsafe { (self.api.release)(self.device) };
    }
}
