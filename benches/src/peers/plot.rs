//! Results as a plot: bars of the share of the machine's limit that each test reaches, ours beside the peer's, and the goals
//! as lines. Prompts above, decoding below. Knows nothing of how they were measured.

use super::table::name;
use super::{Kind, Results, Test};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::error::Error;
use std::path::Path;

const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const PEER: RGBColor = RGBColor(0xb8, 0xb8, 0xb8);
const GOAL: RGBColor = RGBColor(0xc0, 0x39, 0x2b);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);

/// Shares of the limits to reach: prompts, decoding.
const GOALS: (f64, f64) = (0.40, 0.75);

const WIDTH: u32 = 1200;
const PANEL: u32 = 360;
const HEAD: u32 = 44;

/// A group of bars.
struct Bar {
    label: [String; 2],
    ours: f64,
    peer: Option<f64>,
    rate: f64,
}

fn bars(r: &Results, wanted: impl Fn(&Kind) -> bool) -> Vec<Bar> {
    let mut out = Vec::new();
    for m in &r.models {
        for t in m.tests.iter().filter(|t| wanted(&t.kind)) {
            let at = match t.kind {
                Kind::Decode { depth, .. } if depth > 0 => format!(" @ d{depth}"),
                _ => String::new(),
            };
            let label = [m.model.clone(), format!("{}{at}", m.types)];
            out.push(Bar { label, ours: t.share(), peer: t.peer_share(), rate: t.ours() });
        }
    }
    out
}

/// Writes the plot as SVG.
///
/// # Errors
/// The file cannot be written.
pub fn draw(r: &Results, out: &Path) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(out, (WIDTH, HEAD + 2 * PANEL)).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, panels) = root.split_vertically(HEAD);
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    head.draw(&Text::new("Share of the machine's limit", (16, 12), text(20)))?;
    for (x, color, label) in
        [(560, OURS, "rsinfer (tokens/s above its bar)"), (850, PEER, "llama.cpp"), (980, GOAL, "goal")]
    {
        head.draw(&Rectangle::new([(x, 16), (x + 14, 28)], color.filled()))?;
        head.draw(&Text::new(label, (x + 20, 14), text(15)))?;
    }
    let (above, below) = panels.split_vertically(PANEL);
    let prompt = |k: &Kind| matches!(k, Kind::Prompt(_));
    let title = |wanted: &dyn Fn(&Kind) -> bool, what: &str| {
        let test: Option<&Test> = r.models.iter().flat_map(|m| &m.tests).find(|t| wanted(&t.kind));
        test.map_or(String::new(), |t| format!("{}: {what}", name(&t.kind)))
    };
    let first = title(&prompt, "multiply-adds with weights over the measured int8 (float files: f32) peak");
    panel(&above, &first, &bars(r, prompt), GOALS.0)?;
    let decode = |k: &Kind| !prompt(k);
    panel(&below, &title(&decode, "bytes read over the measured read bandwidth"), &bars(r, decode), GOALS.1)?;
    root.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    title: &str,
    bars: &[Bar],
    goal: f64,
) -> Result<(), Box<dyn Error>> {
    if bars.is_empty() {
        return Ok(());
    }
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let highest = bars.iter().flat_map(|b| [Some(b.ours), b.peer]).flatten().fold(goal, f64::max);
    // Up to the next tenth, with room for the rates above the bars.
    let top = ((highest * 1.08) * 10.0).ceil() / 10.0;
    let mut chart = ChartBuilder::on(area)
        .caption(title, text(15))
        .margin(8)
        .margin_right(20)
        .x_label_area_size(46)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..bars.len() as f64, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(0xe4, 0xe4, 0xe4))
        .y_labels((top * 10.0) as usize + 1)
        .y_label_formatter(&|v| format!("{:.0}%", 100.0 * v))
        .y_label_style(text(13))
        .axis_style(INK)
        .draw()?;
    let centred = |size: i32, v: VPos| text(size).pos(Pos::new(HPos::Center, v));
    for (i, b) in bars.iter().enumerate() {
        let x = i as f64;
        let bar = |from: f64, to: f64, height: f64, color: RGBColor| {
            Rectangle::new([(x + from, 0.0), (x + to, height)], color.filled())
        };
        if let Some(p) = b.peer {
            chart.draw_series([bar(0.14, 0.48, p, PEER)])?;
        }
        chart.draw_series([bar(0.52, 0.86, b.ours, OURS)])?;
        let rate = if b.rate < 100.0 { format!("{:.1}", b.rate) } else { format!("{:.0}", b.rate) };
        chart.draw_series([Text::new(rate, (x + 0.69, b.ours + 0.008 * top), centred(13, VPos::Bottom))])?;
    }
    chart.draw_series([PathElement::new([(0.0, goal), (bars.len() as f64, goal)], GOAL.stroke_width(2))])?;
    for (i, b) in bars.iter().enumerate() {
        let at = chart.backend_coord(&(i as f64 + 0.5, 0.0));
        let origin = area.get_base_pixel();
        for (line, label) in b.label.iter().enumerate() {
            let y = at.1 - origin.1 + 8 + 16 * line as i32;
            area.draw(&Text::new(label.as_str(), (at.0 - origin.0, y), centred(12, VPos::Top)))?;
        }
    }
    Ok(())
}
