//! Line plots as SVG text. Colours are CSS variables (`--text`, `--grid`, `--s0`, `--s1` ...), so that a page can follow the
//! reader's theme and hide a series. Knows nothing of policies.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Colours and marks repeat after this many series.
pub const STYLES: usize = 12;

/// Where an axis begins and ends, and what is written along it.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    pub name: String,
    pub from: f64,
    pub to: f64,
    pub ticks: Vec<(f64, String)>,
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    pub name: String,
    /// Elements are of class `sN` with this number, so that a page can hide a series.
    pub class: usize,
    /// Of colour and marks.
    pub style: usize,
    /// Without marks, broken: a level to compare with.
    pub is_level: bool,
    /// x, y, and the bounds around y.
    pub points: Vec<[f64; 4]>,
}

/// A plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

/// Stand-ins for the CSS variables: plotters writes colours as numbers.
const TEXT: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(1, 1, 2);
fn colour(series: usize) -> RGBColor {
    RGBColor(1, 2, series as u8)
}

/// Light and dark values of the series' colours.
pub const COLOURS: [(&str, &str); STYLES] = [
    ("#55606e", "#aab4c2"),
    ("#1f6fb4", "#5aa9ee"),
    ("#c8520a", "#f5923e"),
    ("#1e8a44", "#4cc274"),
    ("#c22f2f", "#f47272"),
    ("#7a4fc0", "#b394f2"),
    ("#8a5a30", "#cfa06c"),
    ("#c43f98", "#f386cb"),
    ("#77780c", "#cdcb4b"),
    ("#0c8b99", "#43c9d8"),
    ("#27408b", "#8fa6ff"),
    ("#3d3d3d", "#e2e2e2"),
];

impl Axis {
    /// Places `0, 1, ...` with these labels; every other is left out while they would run into each other.
    pub fn categories(name: &str, labels: &[String]) -> Self {
        let room = 46 / labels.iter().map(|l| l.chars().count()).max().unwrap_or(1).max(3);
        let every = labels.len().div_ceil(room.max(1)).max(1);
        let ticks = labels.iter().enumerate().filter(|(i, _)| i % every == 0);
        let last = labels.len().saturating_sub(1) as f64;
        let ticks = ticks.map(|(i, l)| (i as f64, l.clone())).collect();
        Self { name: name.into(), from: -0.25, to: last + 0.25, ticks }
    }

    /// Doubling by doubling, with a mark at each of `values` that has room.
    pub fn doubling(name: &str, values: &[f64], label: impl Fn(f64) -> String) -> Self {
        let mut v: Vec<f64> = values.iter().copied().filter(|v| *v > 0.0).map(f64::log2).collect();
        v.sort_by(f64::total_cmp);
        let (from, to) = (v.first().copied().unwrap_or(0.0), v.last().copied().unwrap_or(1.0));
        let mut ticks: Vec<(f64, String)> = Vec::new();
        for x in v {
            let text = label(x.exp2());
            let room = ((to - from) * (0.03 + 0.02 * text.chars().count() as f64)).max(1e-9);
            if ticks.last().is_none_or(|t| x - t.0 >= room) {
                ticks.push((x, text));
            }
        }
        let pad = ((to - from) * 0.06).max(0.1);
        Self { name: name.into(), from: from - pad, to: to + pad, ticks }
    }

    /// Even steps over `from..=to`.
    pub fn even(name: &str, from: f64, to: f64, label: impl Fn(f64) -> String) -> Self {
        let rough = ((to - from) / 5.0).max(1e-12);
        let power = 10f64.powf(rough.log10().floor());
        let step =
            power * [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|m| power * m >= rough).unwrap_or(10.0);
        let (first, last) = ((from / step).ceil() as i64, (to / step + 1e-9).floor() as i64);
        let ticks = (first..=last).map(|i| i as f64 * step).map(|x| (x, label(x))).collect();
        Self { name: name.into(), from, to, ticks }
    }

    /// Powers of ten; coordinates are decimal logarithms of `from..=to`.
    pub fn logarithmic(name: &str, from: f64, to: f64) -> Self {
        let (from, to) = (from.max(1e-9) * 0.97, to.max(1e-9) * 1.03);
        let steps: &[f64] = match (to / from).log10() {
            d if d < 0.35 => {
                &[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0]
            }
            d if d < 1.2 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
            d if d < 3.0 => &[1.0, 3.0],
            _ => &[1.0],
        };
        let powers = from.log10().floor() as i32..=to.log10().ceil() as i32;
        let values = powers.flat_map(|p| steps.iter().map(move |s| s * 10f64.powi(p)));
        let inside = values.filter(|v| *v >= from && *v <= to);
        let label =
            |v: f64| if v >= 1e5 { format!("{v:.0e}") } else { format!("{}", (v * 100.0).round() / 100.0) };
        let ticks = inside.map(|v| (v.log10(), label(v))).collect();
        Self { name: name.into(), from: from.log10(), to: to.log10(), ticks }
    }

    fn label(&self, x: f64) -> String {
        self.ticks.iter().find(|t| t.0 == x).map_or(String::new(), |t| t.1.clone())
    }
}

/// As plotters wants an axis: key points are the ticks.
struct Coord(Axis);

impl Ranged for Coord {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        let share = (value - self.0.from) / (self.0.to - self.0.from).max(1e-12);
        low + (share * f64::from(high - low)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.0.ticks.iter().map(|t| t.0).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.0.from..self.0.to
    }
}

impl Plot {
    /// For a page that defines the variables and explains the colours.
    pub fn inline(&self) -> Result<String> {
        let svg = self.draw((430, 290), false)?;
        let title = self.title.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
        let open = format!("<svg viewBox=\"0 0 430 290\" role=\"img\" aria-label=\"{title}\">");
        Ok(open + svg.split_once('>').map_or("", |s| s.1))
    }

    /// A file of its own: legend and colours within.
    pub fn standalone(&self) -> Result<String> {
        let svg = self.draw((760, 420), true)?;
        let svg = svg.split_once('>').map_or("", |s| s.1);
        Ok(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 760 420\" width=\"760\" height=\"420\">\n<style>{}\
             svg{{background:var(--page)}}</style>{svg}",
            css("svg")
        ))
    }

    fn draw(&self, size: (u32, u32), legend: bool) -> Result<String> {
        let mut out = String::new();
        {
            let root = SVGBackend::with_string(&mut out, size).into_drawing_area();
            self.paint(&root, legend).map_err(|e| anyhow!("a plot cannot be drawn: {e}"))?;
            root.present().map_err(|e| anyhow!("a plot cannot be drawn: {e}"))?;
        }
        let mut out = out.replace("#010101", "var(--text)").replace("#010102", "var(--grid)");
        for (i, s) in self.series.iter().enumerate() {
            let (number, name) = (format!("#0102{i:02X}"), format!("var(--s{})", s.style % STYLES));
            let class = |line: &str| match (line.contains(&number), line.split_once(' ')) {
                (true, Some((tag, rest))) => {
                    format!("{tag} class=\"s{}\" {}\n", s.class, rest.replace(&number, &name))
                }
                _ => format!("{line}\n"),
            };
            out = out.lines().map(class).collect();
        }
        Ok(out)
    }

    fn paint(
        &self,
        root: &DrawingArea<SVGBackend<'_>, Shift>,
        legend: bool,
    ) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'_> as DrawingBackend>::ErrorType>> {
        // plotters' sizes are heights of lines: the letters' size in the SVG is 1/1.24 of them.
        let font = |px: f64| ("sans-serif", px * 1.24).into_font().color(&TEXT);
        let wide = root.dim_in_pixel().0 as i32;
        root.draw(&Text::new(self.title.clone(), (12, 8), font(13.5).pos(Pos::new(HPos::Left, VPos::Top))))?;
        let mut chart = ChartBuilder::on(root);
        chart.margin_top(34).margin_right(if legend { 190 } else { 14 }).margin_bottom(6).margin_left(6);
        chart.x_label_area_size(44).y_label_area_size(60);
        let mut chart = chart.build_cartesian_2d(Coord(self.x.clone()), Coord(self.y.clone()))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(font(12.5))
            .axis_desc_style(font(12.5))
            .x_desc(self.x.name.clone())
            .y_desc(self.y.name.clone())
            .x_labels(self.x.ticks.len())
            .y_labels(self.y.ticks.len())
            .x_label_formatter(&|x| self.x.label(*x))
            .y_label_formatter(&|y| self.y.label(*y))
            .draw()?;
        let inside = |y: f64| y.clamp(self.y.from, self.y.to);
        for (i, s) in self.series.iter().enumerate() {
            let c = colour(i);
            let points: Vec<(f64, f64)> = s.points.iter().map(|p| (p[0], inside(p[1]))).collect();
            if s.is_level {
                chart.draw_series(DashedLineSeries::new(points, 6, 4, c.stroke_width(2)))?;
                continue;
            }
            for p in &s.points {
                if p[3] > p[2] {
                    let ends = vec![(p[0], inside(p[2])), (p[0], inside(p[3]))];
                    chart.draw_series([PathElement::new(ends, c.mix(0.35))])?;
                }
            }
            chart.draw_series(LineSeries::new(points.iter().copied(), c.stroke_width(2)))?;
            for p in &points {
                mark(s.style, c, |e| chart.draw_series([EmptyElement::at(*p) + e]).map(drop))?;
            }
        }
        if legend {
            for (i, s) in self.series.iter().enumerate() {
                let (c, y) = (colour(i), 50 + 22 * i as i32);
                let x = wide - 180;
                let parts: &[(i32, i32)] =
                    if s.is_level { &[(0, 6), (10, 16), (20, 26)] } else { &[(0, 26)] };
                for (from, to) in parts {
                    let ends = vec![(x + from, y), (x + to, y)];
                    root.draw(&PathElement::new(ends, c.stroke_width(2)))?;
                }
                if !s.is_level {
                    mark(s.style, c, |e| root.draw(&(EmptyElement::at((x + 13, y)) + e)))?;
                }
                let style = font(12.5).pos(Pos::new(HPos::Left, VPos::Center));
                root.draw(&Text::new(s.name.clone(), (x + 32, y), style))?;
            }
        }
        Ok(())
    }
}

/// The mark of a style, as corners around a point: circle, triangle, square, diamond.
fn mark<E>(
    style: usize,
    c: RGBColor,
    draw: impl FnOnce(Polygon<(i32, i32)>) -> Result<(), E>,
) -> Result<(), E> {
    let corners: Vec<(i32, i32)> = match style % 4 {
        0 => vec![(-2, -4), (2, -4), (4, -2), (4, 2), (2, 4), (-2, 4), (-4, 2), (-4, -2)],
        1 => vec![(0, -5), (5, 4), (-5, 4)],
        2 => vec![(-4, -4), (4, -4), (4, 4), (-4, 4)],
        _ => vec![(0, -5), (5, 0), (0, 5), (-5, 0)],
    };
    draw(Polygon::new(corners, c.filled()))
}

/// The variables' values below `selector`, light and dark.
pub fn css(selector: &str) -> String {
    let of = |page: &str, text: &str, grid: &str, dark: bool| {
        let series = COLOURS.iter().enumerate();
        let series =
            series.map(|(i, c)| format!("--s{i}:{};", if dark { c.1 } else { c.0 })).collect::<String>();
        format!("{selector}{{--page:{page};--text:{text};--grid:{grid};{series}}}")
    };
    let (light, dark) =
        (of("#ffffff", "#1b2430", "#d9dee6", false), of("#14181e", "#e4e9f0", "#39424e", true));
    format!("{light}@media(prefers-color-scheme:dark){{{dark}}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot() -> Plot {
        let budgets = [64.0f64, 128.0, 256.0];
        let points = |y: f64| budgets.iter().map(|b| [b.log2(), y, y - 0.1, y + 0.1]).collect();
        Plot {
            title: "a < b".into(),
            x: Axis::doubling("budget", &budgets, |x| format!("{x:.0}")),
            y: Axis::even("accuracy", 0.0, 1.0, |y| format!("{:.0}%", y * 100.0)),
            series: vec![
                Series { name: "full & all".into(), class: 0, style: 0, is_level: true, points: points(0.9) },
                Series { name: "h2o".into(), class: 7, style: 13, is_level: false, points: points(0.5) },
            ],
        }
    }

    #[test]
    fn drawings_use_the_page_colours() {
        let svg = plot().inline().unwrap();
        for part in [
            "var(--text)",
            "var(--grid)",
            "var(--s0)",
            "var(--s1)",
            "class=\"s7\"",
            "256",
            "60%",
            "a &lt; b",
            "</svg>",
        ] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(!svg.contains("#01"), "{svg}");
        let svg = plot().standalone().unwrap();
        assert!(
            svg.contains("xmlns") && svg.contains("full &amp; all") && svg.contains("prefers-color-scheme")
        );
        assert_eq!(svg, plot().standalone().unwrap());
    }

    #[test]
    fn axes() {
        let ticks = |a: &Axis| a.ticks.iter().map(|t| t.1.clone()).collect::<Vec<_>>();
        let even = Axis::even("", 0.0, 1.0, |y| format!("{y:.1}"));
        assert_eq!(ticks(&even), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        let crowded = Axis::doubling("", &[64.0, 65.0, 128.0], |x| format!("{x:.0}"));
        assert_eq!(ticks(&crowded), ["64", "128"]);
        let one = Axis::doubling("", &[64.0], |x| format!("{x:.0}"));
        assert!(one.from < 6.0 && one.to > 6.0);
        let labels: Vec<String> = (0..8).map(|i| format!("{}-{}", i * 128, i * 128 + 127)).collect();
        assert_eq!(ticks(&Axis::categories("", &labels)).len(), 4);
    }
}
