//! Graphs of NVIDIA's driver: kernels and copies in a chain, run by one call. Layouts and functions as NVIDIA's "CUDA Driver API" has them
//! since CUDA 12.0 ("Graph Management"), edges with data since 12.3. Copies read memory that the driver has
//! pinned: one piece for all graphs, of which those that may run behind one another have parts of their own.

use super::{Code, Driver, Handle, addresses, api, old_driver};
use crate::cuda::gpu::{Arg, GpuError, GraphId, KernelId, Launch, STAGED, Step};
use libloading::Library;
use std::ffi::{c_uint, c_void};
use std::ptr;

api! {
    /// What graphs need.
    pub(super) struct Functions {
        create = "cuGraphCreate" (*mut Handle, c_uint);
        add_kernel = "cuGraphAddKernelNode_v2" (*mut Handle, Handle, *const Handle, usize, *const KernelNode);
        add_copy = "cuGraphAddMemcpyNode" (*mut Handle, Handle, *const Handle, usize, *const Memcpy, Handle);
        instantiate = "cuGraphInstantiateWithFlags" (*mut Handle, Handle, u64);
        change = "cuGraphExecKernelNodeSetParams_v2" (Handle, Handle, *const KernelNode);
        launch = "cuGraphLaunch" (Handle, Handle);
        destroy_exec = "cuGraphExecDestroy" (Handle);
        destroy = "cuGraphDestroy" (Handle);
    }
}

api! {
    /// What edges need by which a launch may begin before the one before it has ended. Without them it does not.
    pub(super) struct Edges {
        add = "cuGraphAddDependencies_v2" (Handle, *const Handle, *const Handle, *const Edge, usize);
    }
}

/// `CUgraphEdgeData`.
#[repr(C)]
struct Edge {
    from_port: u8,
    to_port: u8,
    kind: u8,
    reserved: [u8; 5],
}

/// From CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC: open once every block of the kernel before has said so, or ended. Of kind
/// CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC: the kernel behind waits for its end and its writes itself.
const OVERLAPS: Edge = Edge { from_port: 1, to_port: 0, kind: 1, reserved: [0; 5] };

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[repr(C)]
struct KernelNode {
    function: Handle,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
    kernel: Handle,
    context: Handle,
}

/// One side of a `CUDA_MEMCPY3D`.
#[repr(C)]
struct Side {
    x: usize,
    y: usize,
    z: usize,
    level: usize,
    /// `CUmemorytype`.
    kind: c_uint,
    host: *mut c_void,
    device: u64,
    array: Handle,
    reserved: Handle,
    pitch: usize,
    height: usize,
}

/// `CUDA_MEMCPY3D`.
#[repr(C)]
struct Memcpy {
    from: Side,
    to: Side,
    width: usize,
    height: usize,
    depth: usize,
}

impl Side {
    const HOST: c_uint = 1;
    const DEVICE: c_uint = 2;

    /// A single row of `bytes`.
    fn new(kind: c_uint, host: *mut c_void, device: u64, bytes: usize) -> Self {
        let (array, reserved) = (ptr::null_mut(), ptr::null_mut());
        Self { x: 0, y: 0, z: 0, level: 0, kind, host, device, array, reserved, pitch: bytes, height: 1 }
    }
}

/// The graphs of a GPU, by their numbers, and the memory that their copies read.
pub(super) struct Graphs {
    all: Vec<Option<Graph>>,
    staged: *mut u8,
}

impl Default for Graphs {
    fn default() -> Self {
        Self { all: Vec::new(), staged: ptr::null_mut() }
    }
}

/// Its nodes are those of `graph`, which must live as long as they are named.
struct Graph {
    graph: Handle,
    exec: Handle,
    nodes: Vec<Handle>,
    /// Kernels of nodes that are launches.
    kernels: Vec<Option<KernelId>>,
    /// Where its bytes begin in what is pinned, and how many they are.
    from: usize,
    bytes: usize,
}

fn refused(call: &'static str, why: &str) -> GpuError {
    GpuError::Driver { call, why: why.into() }
}

impl Driver {
    fn graphs(&self) -> Result<&Functions, GpuError> {
        self.api.graphs.as_ref().ok_or_else(|| refused("cuGraphCreate", "this driver has no graphs"))
    }

    /// The memory that copies read, made when it is first asked for.
    fn staged(&self) -> Result<*mut u8, GpuError> {
        let here = self.state().graphs.staged;
        if !here.is_null() {
            return Ok(here);
        }
        let at = self.pin(STAGED)?;
        self.state().graphs.staged = at;
        Ok(at)
    }

    fn node(
        &self,
        kernel: KernelId,
        launch: Launch,
        params: &mut [*mut c_void],
    ) -> Result<KernelNode, GpuError> {
        Ok(KernelNode {
            function: self.function(kernel)?,
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            shared: launch.shared,
            params: params.as_mut_ptr(),
            extra: ptr::null_mut(),
            kernel: ptr::null_mut(),
            context: ptr::null_mut(),
        })
    }

    /// See `Gpu::graph`.
    pub(super) fn make_graph(&self, steps: &[Step<'_>], from: usize) -> Result<GraphId, GpuError> {
        let (f, staged) = (self.graphs()?, self.staged()?);
        let mut g = Graph {
            graph: ptr::null_mut(),
            exec: ptr::null_mut(),
            nodes: Vec::with_capacity(steps.len()),
            kernels: Vec::with_capacity(steps.len()),
            from,
            bytes: 0,
        };
        // SAFETY: writes a handle, given back by `destroy`.
        self.call("cuGraphCreate", |_| unsafe { (f.create)(&mut g.graph, 0) })?;
        let made = steps.iter().try_for_each(|s| self.add(f, &mut g, *s, staged)).and_then(|()| {
            // SAFETY: a graph with all its nodes; writes a handle.
            self.call("cuGraphInstantiateWithFlags", |_| unsafe { (f.instantiate)(&mut g.exec, g.graph, 0) })
        });
        if let Err(e) = made {
            let _ = self.destroy(g);
            return Err(e);
        }
        let mut s = self.state();
        let free = s.graphs.all.iter().position(Option::is_none);
        let i = free.unwrap_or_else(|| {
            s.graphs.all.push(None);
            s.graphs.all.len() - 1
        });
        s.graphs.all[i] = Some(g);
        Ok(GraphId(i))
    }

    /// A node for a step, behind the last.
    fn add(&self, f: &Functions, g: &mut Graph, step: Step<'_>, staged: *mut u8) -> Result<(), GpuError> {
        let (after, mut node) = (g.nodes.last().copied(), ptr::null_mut());
        let (mut behind, mut count) =
            (after.as_ref().map_or(ptr::null(), ptr::from_ref), usize::from(after.is_some()));
        match step {
            Step::Launch { kernel, launch, args } => {
                let mut params = addresses(args);
                let what = self.node(kernel, launch, &mut params)?;
                // Such edges lie between kernels only.
                let edges = self.api.edges.as_ref();
                let early = edges.filter(|_| launch.overlaps && matches!(g.kernels.last(), Some(Some(_))));
                if early.is_some() {
                    (behind, count) = (ptr::null(), 0);
                }
                // SAFETY: as `cuLaunchKernel`, which takes the same; arguments are copied at once. One node or none before it.
                self.call("cuGraphAddKernelNode", |_| unsafe {
                    (f.add_kernel)(&mut node, g.graph, behind, count, &what)
                })?;
                if let (Some(edges), Some(after)) = (early, after) {
                    // SAFETY: two kernels' nodes of this graph, and an edge's data.
                    self.call("cuGraphAddDependencies", |_| unsafe {
                        (edges.add)(g.graph, &after, &node, &OVERLAPS, 1)
                    })?;
                }
                g.kernels.push(Some(kernel));
            }
            Step::Write { at, bytes } => {
                let begin = g.from + g.bytes;
                if bytes > STAGED.saturating_sub(begin) {
                    return Err(refused("cuGraphAddMemcpyNode", "more bytes than wait for a graph"));
                }
                // SAFETY: within what was pinned.
                let from = unsafe { staged.add(begin) };
                let what = Memcpy {
                    from: Side::new(Side::HOST, from.cast(), 0, bytes),
                    to: Side::new(Side::DEVICE, ptr::null_mut(), at, bytes),
                    width: bytes,
                    height: 1,
                    depth: 1,
                };
                // SAFETY: pinned memory that lives as long as the graph, to device memory; a range that is not there is the driver's error.
                self.call("cuGraphAddMemcpyNode", |_| unsafe {
                    (f.add_copy)(&mut node, g.graph, behind, count, &what, self.context)
                })?;
                g.bytes += bytes;
                g.kernels.push(None);
            }
        }
        g.nodes.push(node);
        Ok(())
    }

    /// Looks into a graph.
    fn in_graph<T>(&self, id: GraphId, f: impl FnOnce(&Graph) -> Option<T>) -> Result<T, GpuError> {
        let s = self.state();
        let g = s.graphs.all.get(id.0).and_then(Option::as_ref);
        g.and_then(f).ok_or_else(|| refused("cuGraphLaunch", "no such graph, or not these steps"))
    }

    /// See `Gpu::change`.
    pub(super) fn change_graph(
        &self,
        id: GraphId,
        i: usize,
        launch: Launch,
        args: &[Arg],
    ) -> Result<(), GpuError> {
        let f = self.graphs()?;
        let (exec, node, kernel) =
            self.in_graph(id, |g| Some((g.exec, *g.nodes.get(i)?, (*g.kernels.get(i)?)?)))?;
        let mut params = addresses(args);
        let what = self.node(kernel, launch, &mut params)?;
        // SAFETY: a graph and its node, a launch of the same kernel; arguments are copied at once.
        self.call("cuGraphExecKernelNodeSetParams", |_| unsafe { (f.change)(exec, node, &what) })
    }

    /// See `Gpu::run`.
    pub(super) fn run_graph(&self, id: GraphId, bytes: &[u8]) -> Result<(), GpuError> {
        let (f, staged) = (self.graphs()?, self.staged()?);
        let (exec, from) = self.in_graph(id, |g| (g.bytes == bytes.len()).then_some((g.exec, g.from)))?;
        // SAFETY: they end within STAGED, or there were no such graph (one of no bytes moves none); no Rust reference to them exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), staged.wrapping_add(from), bytes.len()) };
        // SAFETY: a graph of this context, and its stream.
        self.call("cuGraphLaunch", |_| unsafe { (f.launch)(exec, self.stream) })
    }

    /// See `Gpu::forget`.
    pub(super) fn forget_graph(&self, id: GraphId) -> Result<(), GpuError> {
        let g = self.state().graphs.all.get_mut(id.0).and_then(Option::take);
        g.map_or(Ok(()), |g| self.destroy(g))
    }

    fn destroy(&self, g: Graph) -> Result<(), GpuError> {
        let f = self.graphs()?;
        if !g.exec.is_null() {
            // SAFETY: made by `make_graph`, named by nothing any more; one that runs is destroyed once it has run.
            self.call("cuGraphExecDestroy", |_| unsafe { (f.destroy_exec)(g.exec) })?;
        }
        // SAFETY: likewise.
        self.call("cuGraphDestroy", |_| unsafe { (f.destroy)(g.graph) })
    }

    /// Gives everything back; nothing runs any more.
    pub(super) fn forget_graphs(&self) {
        let Graphs { all, staged } = std::mem::take(&mut self.state().graphs);
        all.into_iter().flatten().for_each(|g| drop(self.destroy(g)));
        // The graphs that read it are gone.
        self.unpin(staged);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// As `sizeof` and `offsetof` of cuda.h (CUDA 12.9) say, printed by gcc for x86-64.
    #[test]
    fn structures_are_laid_out_as_in_c() {
        macro_rules! places {
            ($ty:ty, $size:literal: $($field:ident $at:literal)*) => {
                assert_eq!(size_of::<$ty>(), $size);
                $(assert_eq!(offset_of!($ty, $field), $at, concat!(stringify!($ty), ".", stringify!($field)));)*
            };
        }
        places!(KernelNode, 72: function 0 grid 8 block 20 shared 32 params 40 extra 48 kernel 56 context 64);
        places!(Side, 88: x 0 y 8 z 16 level 24 kind 32 host 40 device 48 array 56 reserved 64 pitch 72 height 80);
        places!(Memcpy, 200: from 0 to 88 width 176 height 184 depth 192);
        places!(Edge, 8: from_port 0 to_port 1 kind 2 reserved 3);
        // CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE.
        assert_eq!((Side::HOST, Side::DEVICE), (1, 2));
    }
}
