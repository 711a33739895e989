//! Which device runs which part of a model, and a forward pass's way over them: the residual stream is copied where the device
//! changes. Written once for all architectures; knows layers by number, nothing of what they compute.

use crate::EngineError;
use crate::model::{Network, Piece};
use crate::plan::Part;
use kernels::{Buf, Device, Limits, ViewMut, Weight, gpu_meter, meter};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The devices of a layer, by their places in a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Spot {
    /// Of attention with its cache, norms, dense feed-forward layers and shared experts.
    pub layer: usize,
    /// Of the routed experts and their router; where there are none, the same.
    pub experts: usize,
}

/// Where the parts of a model lie. Layers that are not listed lie on the first device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Of each layer.
    pub layers: Vec<Spot>,
    /// Of the last norm and the output.
    pub head: usize,
}

impl Layout {
    /// Of layer `i`.
    pub fn spot(&self, i: usize) -> Spot {
        self.layers.get(i).copied().unwrap_or_default()
    }

    /// Of a tensor; `None`: it stays on the host (the table of embeddings, factors of rotary frequencies).
    pub fn of(&self, part: Part, layer: Option<usize>) -> Option<usize> {
        match (part, layer) {
            (Part::Output, _) => Some(self.head),
            (Part::Experts | Part::Router, Some(i)) => Some(self.spot(i).experts),
            (Part::Embeddings, _) | (_, None) => None,
            (_, Some(i)) => Some(self.spot(i).layer),
        }
    }

    /// The devices that it names, in ascending order; the first where it names none.
    pub fn used(&self) -> Vec<usize> {
        let spots = self.layers.iter().flat_map(|s| [s.layer, s.experts]);
        let used: BTreeSet<usize> = spots.chain([self.head]).collect();
        used.into_iter().collect()
    }

    /// The same with other numbers for devices.
    pub fn renumbered(&self, place: impl Fn(usize) -> usize) -> Self {
        let spot = |s: &Spot| Spot { layer: place(s.layer), experts: place(s.experts) };
        Self { layers: self.layers.iter().map(spot).collect(), head: place(self.head) }
    }

    /// What the operations of `net` that run on device `d` will ask of it, for passes of `tokens` rows over `slots` cache entries.
    pub(crate) fn limits(&self, net: &dyn Network, d: usize, tokens: usize, slots: usize) -> Limits {
        let mut l = Limits::default();
        for i in 0..net.dims().n_layers {
            let Spot { layer, experts } = self.spot(i);
            if layer == d {
                (l.tokens, l.slots) = (tokens, slots);
                net.limits(Piece::Layer(i), &mut l);
            }
            if experts == d {
                l.tokens = tokens;
                net.limits(Piece::Experts(i), &mut l);
            }
        }
        if self.head == d {
            l.tokens = l.tokens.max(tokens.min(crate::layers::head::HEAD_ROWS));
            net.limits(Piece::Head, &mut l);
        }
        l
    }
}

/// Devices, and what of a model lies on which.
#[derive(Clone, Debug)]
pub struct Devices {
    all: Vec<Device>,
    layout: Arc<Layout>,
}

impl From<Device> for Devices {
    /// Everything on one.
    fn from(device: Device) -> Self {
        Self { all: vec![device], layout: Arc::default() }
    }
}

impl Devices {
    /// A model laid out over `all`.
    ///
    /// # Errors
    /// A layout that names a device that is not among them.
    pub fn new(all: Vec<Device>, layout: Layout) -> Result<Self, EngineError> {
        match layout.used().into_iter().max().filter(|d| *d >= all.len()) {
            Some(d) => Err(EngineError::Option(format!("there is no device {d} among {}", all.len()))),
            None => Ok(Self { all, layout: Arc::new(layout) }),
        }
    }

    /// All of them; some may have nothing to do.
    pub fn all(&self) -> &[Device] {
        &self.all
    }

    /// What lies where.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Of layer `i`, its cache too.
    pub fn layer(&self, i: usize) -> &Device {
        &self.all[self.layout.spot(i).layer]
    }

    /// Of the output.
    pub fn head(&self) -> &Device {
        &self.all[self.layout.head]
    }

    /// Of a tensor by its name; `None`: it stays on the host.
    pub(crate) fn of(&self, tensor: &str) -> Option<&Device> {
        self.layout.of(Part::of(tensor), Part::layer(tensor)).map(|d| &self.all[d])
    }

    /// Whether device `d` runs any part of a model of so many layers.
    pub(crate) fn uses(&self, d: usize, n_layers: usize) -> bool {
        self.layout.head == d
            || (0..n_layers).map(|i| self.layout.spot(i)).any(|s| s.layer == d || s.experts == d)
    }

    /// The same laid out over devices that only count; those on the host as ones of so many threads.
    pub(crate) fn metered(&self, threads: usize) -> Self {
        let stand_in = |d: &Device| if d.is_host() { meter(threads).0 } else { gpu_meter().0 };
        Self { all: self.all.iter().map(stand_in).collect(), layout: self.layout.clone() }
    }

    /// The same with counts of their own ([`Device::counting`]).
    pub(crate) fn counting(&self) -> Self {
        Self { all: self.all.iter().map(Device::counting).collect(), layout: self.layout.clone() }
    }

    /// For people: the devices that run something of a model of so many layers.
    pub(crate) fn name(&self, n_layers: usize) -> String {
        let used = (0..self.all.len()).filter(|d| self.uses(*d, n_layers));
        used.map(|d| self.all[d].name()).collect::<Vec<_>>().join(" + ")
    }
}

/// The residual stream and a sub-layer's normed input, `[n, d]` each, on one device.
pub struct Stream {
    x: Buf,
    h: Buf,
}

/// What a layer computes with.
pub struct Stage<'a, B> {
    /// Its device, for the rows of this pass.
    pub dev: &'a Device,
    /// `[n, d]`: the residual stream.
    pub x: &'a mut Buf,
    /// `[n, d]`: a sub-layer's normed input.
    pub h: &'a mut Buf,
    /// The architecture's own buffers.
    pub bufs: &'a mut B,
    /// Where its routed experts are, if not here.
    pub experts: Option<Far<'a>>,
}

/// Another device, and room on it for what goes there and comes back: its part of the residual stream, which is elsewhere now.
pub struct Far<'a> {
    /// The device, for the rows of this pass.
    pub dev: &'a Device,
    /// `[n, d]`: inputs.
    pub h: &'a mut Buf,
    /// `[n, d]`: outputs.
    pub out: &'a mut Buf,
}

/// The buffers of a forward pass on every device that runs a layer or its experts. `B`: those of the architecture.
pub struct Stages<B> {
    on: Devices,
    /// The devices, for the rows of this pass.
    pass: Vec<Device>,
    streams: Vec<Option<Stream>>,
    bufs: Vec<Option<B>>,
    /// Where the residual stream is, and its rows.
    at: usize,
    rows: usize,
}

impl<B> Stages<B> {
    /// For passes of up to `n` rows of width `d` through so many layers; `make` makes the architecture's buffers.
    pub fn new(
        on: &Devices,
        n_layers: usize,
        (n, d): (usize, usize),
        make: impl Fn(&Device) -> Result<B, EngineError>,
    ) -> Result<Self, EngineError> {
        let (mut streams, mut bufs) = (Vec::new(), Vec::new());
        for (i, dev) in on.all.iter().enumerate() {
            let spots = || (0..n_layers.max(1)).map(|l| on.layout.spot(l));
            let (layers, experts) = (spots().any(|s| s.layer == i), spots().any(|s| s.experts == i));
            let stream = || Ok::<_, EngineError>(Stream { x: dev.alloc(n, d)?, h: dev.alloc(n, d)? });
            streams.push((layers || experts).then(stream).transpose()?);
            bufs.push(layers.then(|| make(dev)).transpose()?);
        }
        Ok(Self { on: on.clone(), pass: Vec::new(), streams, bufs, at: 0, rows: 0 })
    }

    /// Begins a pass: the residual stream is `scale` times the rows `tokens` of `table`. `prompts`: see [`Device::for_rows`].
    pub fn embed(
        &mut self,
        table: &Weight,
        tokens: &[u32],
        scale: f32,
        prompts: &[u32],
    ) -> Result<(), EngineError> {
        self.pass = self.on.all.iter().map(|d| d.for_rows(prompts)).collect();
        (self.at, self.rows) = (self.on.layout.spot(0).layer, tokens.len());
        let (dev, n) = (&self.pass[self.at], self.rows);
        Ok(dev.embed(table, tokens, scale, stream(&mut self.streams, self.at).x.view_mut(n))?)
    }

    /// What layer `i` computes with; brings the residual stream to its device.
    pub fn layer(&mut self, i: usize) -> Result<Stage<'_, B>, EngineError> {
        let Spot { layer, experts } = self.on.layout.spot(i);
        if layer != self.at {
            let (from, to) = pair(&mut self.streams, self.at, layer);
            self.pass[layer].receive(
                &self.pass[self.at],
                from.x.view(self.rows),
                to.x.view_mut(self.rows),
            )?;
            self.at = layer;
        }
        let (dev, bufs) =
            (&self.pass[layer], self.bufs[layer].as_mut().expect("made for every device with layers"));
        if experts == layer {
            let Stream { x, h } = stream(&mut self.streams, layer);
            return Ok(Stage { dev, x, h, bufs, experts: None });
        }
        let (Stream { x, h }, far) = pair(&mut self.streams, layer, experts);
        let experts = Some(Far { dev: &self.pass[experts], h: &mut far.h, out: &mut far.x });
        Ok(Stage { dev, x, h, bufs, experts })
    }

    /// The residual stream behind the last layer.
    pub fn last(&mut self) -> Last<'_> {
        let (at, head) = (self.at, self.on.layout.head);
        let far = (at != head).then(|| &self.on.all[at]);
        let (here, pass) = (&self.on.all[head], self.pass.get(head));
        Last { head: here, pass, far, stream: stream(&mut self.streams, at), rows: self.rows }
    }
}

const MADE: &str = "made for every device with layers or experts";

fn stream(all: &mut [Option<Stream>], i: usize) -> &mut Stream {
    all[i].as_mut().expect(MADE)
}

fn pair(all: &mut [Option<Stream>], a: usize, b: usize) -> (&mut Stream, &mut Stream) {
    let [a, b] = all.get_disjoint_mut([a, b]).expect("two devices");
    (a.as_mut().expect(MADE), b.as_mut().expect(MADE))
}

/// The residual stream of the last pass, as the output head reads it.
pub struct Last<'a> {
    /// The head's device.
    pub head: &'a Device,
    /// The same for the rows of the pass.
    pass: Option<&'a Device>,
    /// Where the stream is, if not there.
    far: Option<&'a Device>,
    stream: &'a mut Stream,
    rows: usize,
}

impl Last<'_> {
    /// The head's device for some of the rows. On a GPU those of prompts are multiplied as in the layers; the CPU takes all alike, since tiles
    /// cost the one row behind a prompt more than they gain.
    pub fn device(&self, rows: &[u32]) -> Result<Device, EngineError> {
        match self.pass.filter(|_| !self.head.is_host()) {
            Some(pass) => Ok(pass.some_rows(rows)?),
            None => Ok(self.head.clone()),
        }
    }

    /// Some of its rows, on the head's device.
    pub fn gather(&mut self, rows: &[u32], mut out: ViewMut<'_>) -> Result<(), EngineError> {
        let Stream { x, h } = &mut *self.stream;
        let Some(dev) = self.far else { return Ok(self.head.gather(x.view(self.rows), rows, out)?) };
        dev.gather(x.view(self.rows), rows, h.view_mut(rows.len()))?;
        Ok(self.head.receive(dev, h.view(rows.len()), out.reborrow())?)
    }
}
