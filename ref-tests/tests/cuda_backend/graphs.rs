//! Decoding as graphs: one run and one wait a token, whatever the model, with the bits of launches one by one; and what becomes of refusals.

use crate::models::{load, options};
use crate::{asked, device, gpu, open};
use engine::{Context, Rows, Session, SessionOptions};
use kernels::Device;
use kernels::cuda::modules::Ptx;
use kernels::cuda::{Arg, Gpu, GpuError, GpuInfo, GraphId, KernelId, Launch, Step};
use quant::DType;
use ref_tests::gpu::{Counts, Fault, Interpreted};
use ref_tests::{fixture, read_tokens};

/// Logits after each token of a prompt's last `n`, decoded one by one behind the others, and what each cost.
fn decode(
    name: &str,
    o: &SessionOptions,
    prompt: usize,
    n: usize,
    fault: Option<Fault>,
) -> (Vec<Vec<f32>>, Vec<Counts>, Interpreted) {
    decode_on(Interpreted::new(1 << 30), name, o, prompt, n, fault)
}

fn decode_on(
    on: Interpreted,
    name: &str,
    o: &SessionOptions,
    prompt: usize,
    n: usize,
    fault: Option<Fault>,
) -> (Vec<Vec<f32>>, Vec<Counts>, Interpreted) {
    let dev = on.device().expect("the kernels load");
    let tokens = read_tokens(&fixture(name).join("tokens.json"));
    let tokens: Vec<u32> = tokens.iter().copied().cycle().take(prompt + n).collect();
    let mut session = Session::new(&load(name, Some(dev.into())), o).expect("a session");
    session.eval(&tokens[..prompt]).expect("evaluation");
    fault.into_iter().for_each(|f| on.fail(f));
    let (mut logits, mut counts) = (Vec::new(), Vec::new());
    for t in &tokens[prompt..] {
        let before = on.counts();
        logits.push(session.eval(&[*t]).expect("evaluation").to_vec());
        counts.push(on.counts() - before);
    }
    (logits, counts, on)
}

/// Graphs of a pass of so many steps: the first has 64, each further one four times as many as that before.
fn pieces(steps: usize) -> usize {
    [64, 320, 1344].iter().filter(|before| steps > **before).count() + 1
}

#[test]
fn a_token_is_few_graphs_and_one_wait() {
    for (name, kv) in [
        ("llama3", "full"),
        ("gemma3", "sinks:2+window:6"),
        ("qwen3moe", "full"),
        ("deepseek2-v3", "full"),
        ("deepseek2-v2-lite", "sinks:2+window:6"),
    ] {
        let o = SessionOptions { kv: kv.parse().expect("a policy"), ..options(24, 8, DType::F16) };
        let (logits, counts, on) = decode(name, &o, 3, 8, None);
        let first = counts[0];
        let pieces = pieces(first.launches + first.writes);
        println!(
            "{name}, {kv}: {} launches and {} writes a token, {pieces} graphs",
            first.launches, first.writes
        );
        assert!(counts.iter().all(|c| c.waits == 1), "{name}: {counts:?}");
        // What is new goes out as it comes: the first token, and where the ring turns what rows see is another number of spans.
        let plain = counts.iter().filter(|c| c.launches > 0).count();
        assert!(plain <= 2, "{name}: {counts:?}");
        for c in counts.iter().filter(|c| c.launches == 0) {
            assert_eq!((c.runs, c.writes), (pieces, 0), "{name}");
            assert!(c.graphs > 0 || c.changes == 0, "{name}: {c:?}");
        }
        assert!((pieces..=plain * pieces).contains(&on.counts().graphs), "{name}: {counts:?}");
        let (want, counts, _) = decode(name, &o, 3, 8, Some(Fault::Graph(1)));
        assert!(counts.iter().all(|c| c.runs == 0), "{name}: {counts:?}");
        assert!(same(&logits, &want), "{name}");
    }
}

fn same(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    a.iter().flatten().map(|x| x.to_bits()).eq(b.iter().flatten().map(|x| x.to_bits()))
}

/// Where rows come to see another part of 128 entries, attention's launches are changed and nothing else.
#[test]
fn longer_lists_change_a_few_launches() {
    let o = options(136, 128, DType::F16);
    let (logits, counts, _) = decode("llama3", &o, 125, 6, None);
    let changes: Vec<usize> = counts.iter().map(|c| c.changes).collect();
    // The token behind 128 others: `attend` and `merge` of three layers.
    assert_eq!(changes, [0, 0, 0, 6, 0, 0]);
    assert_eq!(counts.iter().map(|c| c.graphs).sum::<usize>(), 1);
    let (want, ..) = decode("llama3", &o, 125, 6, Some(Fault::Graph(1)));
    assert!(same(&logits, &want));
}

/// A refusal of any call on graphs changes no bit; one of a run changes nothing before it.
#[test]
fn refused_graphs_are_launches() {
    let o = options(16, 8, DType::F16);
    let (want, ..) = decode("qwen3moe", &o, 3, 5, Some(Fault::Graph(1)));
    for n in [2, 3, 4] {
        let (got, counts, on) = decode("qwen3moe", &o, 3, 5, Some(Fault::Graph(n)));
        assert!(same(&got, &want), "{n}");
        assert_eq!((counts[4].runs, on.graphs()), (0, 0), "{n}: {counts:?}");
    }
}

/// From compute capability 9.0 on launches begin while those before them run, as far as the interpreter can tell with the same bits: it
/// knows what each of them writes. Only behind writes, kernels that cannot wait, and where a graph begins they do not.
#[test]
fn launches_of_a_token_overlap() {
    for (name, kv, cache) in [
        ("llama3", "full", DType::Q8_0),
        ("gemma3", "sinks:2+window:6", DType::F32),
        ("quantised/q-llama-q4_k_m", "full", DType::F16),
        ("quantised/q-gemma3-qat", "full", DType::BF16),
        ("qwen3moe", "full", DType::Q4_0),
        ("deepseek2-v3", "full", DType::F16),
        ("deepseek2-v3-heads", "full", DType::F16),
        ("quantised/q-deepseek2-mxfp4", "full", DType::Q8_0),
    ] {
        let o = SessionOptions { kv: kv.parse().expect("a policy"), ..options(24, 8, cache) };
        let hopper = || Interpreted::like((9, 0), 1 << 30);
        let (logits, counts, _) = decode_on(hopper(), name, &o, 3, 5, None);
        let (Counts { launches, writes, .. }, last) = (counts[0], counts[4]);
        let pieces = pieces(launches + writes);
        println!("{name}: {} of {launches} launches overlap, in {pieces} graphs", last.overlaps);
        let alone = writes + pieces - 1;
        assert!(last.runs == pieces && launches - last.overlaps <= alone, "{name}: {counts:?}");
        // A driver that takes no such graphs gets others.
        let (apart, counts, on) = decode_on(hopper(), name, &o, 3, 5, Some(Fault::Overlaps));
        assert!(same(&logits, &apart), "{name}");
        let last = counts[4];
        assert_eq!((last.runs, last.overlaps, on.graphs()), (pieces, 0, pieces), "{name}: {counts:?}");
        // Of as much shared memory, so that MLA takes the same tiles.
        let (older, ..) = decode_on(Interpreted::like((8, 0), 1 << 30), name, &o, 3, 5, None);
        assert!(same(&logits, &older), "{name}");
    }
}

/// Sequences side by side, in passes of one and two rows: graphs for each, bits as alone. Where launches overlap, those of two rows do too.
#[test]
fn several_sequences_share_graphs() {
    for (name, capability) in
        [("llama3", (7, 5)), ("quantised/q-llama-q4_k_m", (9, 0)), ("deepseek2-v3", (9, 0))]
    {
        let on = Interpreted::like(capability, 1 << 30);
        let dev = on.device().expect("the kernels load");
        let model = load(name, Some(dev.clone().into()));
        let mut context = Context::new(&model, &options(16, 8, DType::F16), 2).expect("a context");
        let a = context.cache_mut().admit(0).expect("room");
        let b = context.cache_mut().admit(0).expect("room");
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        let mut one = |seq, token, logits: &mut Vec<f32>| {
            context.forward(&[Rows { seq, tokens: &[token], prompt: 0 }]).expect("a pass");
            context.logits(&[0], logits).expect("logits");
        };
        for t in 1..7 {
            one(a, t, &mut alone);
            // The second a token behind the first.
            if t > 1 {
                one(b, t - 1, &mut beside);
            }
        }
        assert_eq!(on.counts().graphs, 1, "{name}");
        assert!(alone.iter().zip(&beside).all(|(x, y)| x.to_bits() == y.to_bits()), "{name}");
        let (before, mut plain) = (on.counts(), Counts::default());
        for t in 1..5u32 {
            let (both, before) = ([(a, 6 + t), (b, 5 + t)], on.counts());
            let both = both.map(|(seq, token)| (seq, [token]));
            let rows = [0, 1].map(|i| Rows { seq: both[i].0, tokens: &both[i].1, prompt: 0 });
            context.forward(&rows).expect("a pass");
            context.logits(&[0, 1], &mut alone).expect("logits");
            let counts = on.counts() - before;
            if counts.launches > 0 {
                plain = counts;
            }
        }
        // MLA counts the heads of two rows once more, which is a step of the first pass only.
        let counts = on.counts() - before;
        let (each, passes) =
            (pieces(plain.launches + plain.writes), if name == "deepseek2-v3" { 2 } else { 3 });
        assert_eq!((counts.graphs, counts.runs, counts.waits), (each, passes * each, 4), "{name}");
        let overlaps = counts.overlaps / passes;
        println!("{name}: {overlaps} of {} launches of two rows overlap", plain.launches);
        let apart = if capability >= (9, 0) { plain.writes + each - 1 } else { plain.launches };
        assert_eq!(plain.launches - overlaps, apart, "{name}: {counts:?}, {plain:?}");
        drop((context, model, dev));
        assert_eq!(on.held(), 0, "{name}");
    }
}

/// A GPU that knows no graphs.
struct Plain(Box<dyn Gpu>);

fn none<T>() -> Result<T, GpuError> {
    Err(GpuError::Driver { call: "graph", why: "a test's GPU has none".into() })
}

impl Gpu for Plain {
    fn info(&self) -> GpuInfo {
        self.0.info()
    }
    fn memory(&self) -> Result<(u64, u64), GpuError> {
        self.0.memory()
    }
    fn alloc(&self, bytes: usize) -> Result<u64, GpuError> {
        self.0.alloc(bytes)
    }
    fn free(&self, at: u64) -> Result<(), GpuError> {
        self.0.free(at)
    }
    fn zero(&self, at: u64, bytes: usize) -> Result<(), GpuError> {
        self.0.zero(at, bytes)
    }
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.0.write(at, bytes)
    }
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.0.read(at, bytes)
    }
    fn load(&self, module: &Ptx) -> Result<(), GpuError> {
        self.0.load(module)
    }
    fn kernel(&self, module: &str, entry: &str) -> Result<KernelId, GpuError> {
        self.0.kernel(module, entry)
    }
    fn launch(&self, kernel: KernelId, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        self.0.launch(kernel, launch, args)
    }
    fn synchronize(&self) -> Result<(), GpuError> {
        self.0.synchronize()
    }
    fn graph(&self, _: &[Step<'_>], _: usize) -> Result<GraphId, GpuError> {
        none()
    }
    fn change(&self, _: GraphId, _: usize, _: Launch, _: &[Arg]) -> Result<(), GpuError> {
        none()
    }
    fn run(&self, _: GraphId, _: &[u8]) -> Result<(), GpuError> {
        none()
    }
    fn forget(&self, _: GraphId) -> Result<(), GpuError> {
        none()
    }
}

/// On a GPU, of many tokens: steps that wrongly ran beside one another would show in some of them. The same kernels launched one by one are
/// what the other tests hold against the interpreter.
#[test]
fn graphs_have_the_bits_of_launches() {
    let (n, plain): (usize, Box<dyn Gpu>) = match asked() {
        Some(index) => (300, open(index)),
        None => (4, Box::new(Interpreted::mirrored(1 << 30))),
    };
    let plain = device(Box::new(Plain(plain)));
    for name in ["llama3", "gemma3", "qwen3moe", "deepseek2-v3"] {
        let tokens: Vec<u32> = (0..n as u32).map(|i| 1 + i % 7).collect();
        let decode = |dev: Device| {
            let mut session =
                Session::new(&load(name, Some(dev.into())), &options(320, 8, DType::F16)).expect("a session");
            tokens.iter().map(|t| session.eval(&[*t]).expect("a token").to_vec()).collect::<Vec<_>>()
        };
        let (graphs, launches) = (decode(gpu()), decode(plain.clone()));
        for (i, (a, b)) in graphs.iter().zip(&launches).enumerate() {
            assert!(a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())), "{name}, token {i}");
        }
    }
}
