//! Plots as SVG, without help: axes, dots, lines, bars.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// For those who see colours and those who do not.
const COLOURS: [&str; 4] = ["#d55e00", "#0072b2", "#888888", "#009e73"];

/// How axes are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// The upward one by powers of ten.
    Logarithmic,
    /// Both.
    BothLogarithmic,
}

struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    is_line: bool,
}

/// Points in two dimensions.
pub struct Plot {
    title: String,
    across: String,
    up: String,
    scale: Scale,
    series: Vec<Series>,
}

impl Plot {
    pub fn new(title: &str, across: &str, up: &str, scale: Scale) -> Self {
        let (title, across, up) = (title.to_owned(), across.to_owned(), up.to_owned());
        Self { title, across, up, scale, series: Vec::new() }
    }

    pub fn dots(&mut self, name: &str, points: &[(f64, f64)]) {
        self.add(name, points, false);
    }

    pub fn line(&mut self, name: &str, points: &[(f64, f64)]) {
        self.add(name, points, true);
    }

    fn add(&mut self, name: &str, points: &[(f64, f64)], is_line: bool) {
        let points = points.to_vec();
        self.series.push(Series { name: name.to_owned(), points, is_line });
    }

    pub fn svg(&self) -> String {
        let all = || self.series.iter().flat_map(|series| &series.points);
        let fold = |pick: fn(&(f64, f64)) -> f64, with: fn(f64, f64) -> f64, from| {
            all().map(pick).fold(from, with)
        };
        let low = fold(|p| p.1, f64::min, f64::INFINITY).max(0.1).log10().floor();
        let high = fold(|p| p.1, f64::max, 1.0).log10().ceil().max(low + 1.0);
        let (left, right) = match self.scale {
            Scale::BothLogarithmic => (0.0, fold(|p| p.0, f64::max, 10.0).log10()),
            Scale::Logarithmic => (0.0, fold(|p| p.0, f64::max, 1.0)),
        };
        let x = |value: f64| {
            let value = match self.scale {
                Scale::BothLogarithmic => value.max(1.0).log10(),
                Scale::Logarithmic => value,
            };
            LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        };
        let y = |value: f64| {
            let part = (value.max(0.01).log10() - low) / (high - low);
            HEIGHT - BOTTOM - part.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
        };
        let mut svg = open(&self.title);
        for power in low as i32..=high as i32 {
            let value = 10f64.powi(power);
            rule(&mut svg, y(value));
            label(&mut svg, LEFT - 6.0, y(value) + 4.0, "end", &format!("{value}"));
        }
        for tick in self.ticks(right) {
            label(&mut svg, x(tick), HEIGHT - BOTTOM + 18.0, "middle", &format!("{tick}"));
        }
        label(&mut svg, WIDTH / 2.0, HEIGHT - 10.0, "middle", &self.across);
        label(&mut svg, LEFT - 6.0, TOP - 10.0, "end", &self.up);
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let at: Vec<_> = series.points.iter().map(|p| (x(p.0), y(p.1))).collect();
            draw(&mut svg, &at, colour, series.is_line);
            legend(&mut svg, index, colour, &series.name);
        }
        svg + "</svg>\n"
    }

    fn ticks(&self, right: f64) -> Vec<f64> {
        match self.scale {
            Scale::BothLogarithmic => self
                .series
                .first()
                .map(|series| series.points.iter().map(|point| point.0).collect())
                .unwrap_or_default(),
            Scale::Logarithmic => (0..=right as u32 / 5).map(|five| f64::from(five * 5)).collect(),
        }
    }
}

/// Named bars, with their values written at their ends.
pub fn bars(title: &str, bars: &[(String, f64)]) -> String {
    let most = bars.iter().map(|bar| bar.1).fold(0.0, f64::max);
    let height = (HEIGHT - TOP - 20.0) / bars.len() as f64;
    let mut svg = open(title);
    for (index, (name, value)) in bars.iter().enumerate() {
        let top = TOP + height * index as f64;
        let length = value / most * (WIDTH - 320.0);
        let colour = COLOURS[usize::from(!name.contains("etcd"))];
        label(&mut svg, 190.0, top + height / 2.0 + 4.0, "end", name);
        let _ = write!(
            svg,
            r#"<rect x="200" y="{:.1}" width="{length:.1}" height="{:.1}" fill="{colour}"/>"#,
            top + 3.0,
            height - 6.0
        );
        label(&mut svg, 206.0 + length, top + height / 2.0 + 4.0, "start", &format!("{value:.2}"));
    }
    svg + "</svg>\n"
}

fn open(title: &str) -> String {
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>"#
    );
    let _ = write!(svg, r#"<text x="{LEFT}" y="18" font-size="14">{title}</text>"#);
    svg.push('\n');
    svg
}

fn rule(svg: &mut String, y: f64) {
    let right = WIDTH - RIGHT;
    let _ = write!(svg, r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#dddddd"/>"##);
}

fn label(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#);
}

fn draw(svg: &mut String, points: &[(f64, f64)], colour: &str, is_line: bool) {
    if is_line {
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let path = path.join(" ");
        let _ = writeln!(
            svg,
            r#"<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>"#
        );
    }
    // One path for all dots: a thousand circles make a large file.
    let mut path = String::new();
    for (x, y) in points {
        let _ = write!(path, "M{x:.1} {y:.1}h0");
    }
    let width = if is_line { 6 } else { 3 };
    let _ = writeln!(
        svg,
        r#"<path d="{path}" stroke="{colour}" stroke-width="{width}" stroke-linecap="round"/>"#
    );
}

fn legend(svg: &mut String, index: usize, colour: &str, name: &str) {
    let x = WIDTH - RIGHT - 90.0 * (3 - index.min(3)) as f64;
    let _ = write!(svg, r#"<rect x="{x}" y="24" width="10" height="10" fill="{colour}"/>"#);
    label(svg, x + 15.0, 33.0, "start", name);
}
