//! The medians as horizontal bars, in SVG.

use std::fmt::Write;

use crate::floor;
use crate::machine::Machine;
use crate::report::headline;
use crate::sample::Row;
use crate::stage::Stage;

const WIDTH: f64 = 800.0;
const TOP: f64 = 84.0;
const ROW: f64 = 44.0;
const BAR: f64 = 24.0;
/// Where bars begin, behind the names.
const LEFT: f64 = 200.0;
/// Room for the figures behind the longest bar.
const RIGHT: f64 = 210.0;
const FOOT: f64 = 40.0;
const STYLE: &str = "text{font-family:system-ui,sans-serif;font-size:13px;fill:#1f2328}\
    .title{font-size:16px;font-weight:600}.soft{fill:#59636e;font-size:12px}\
    .lamina{fill:#0a7d6b}.other{fill:#a9b4bf}.range{stroke:#1f2328;stroke-width:1.5}\
    .floor{stroke:#b3261e;stroke-width:1.2;stroke-dasharray:4 3}";

/// A complete SVG document. Systems without a valid sample say so instead of a bar.
pub(crate) fn draw(stage: &Stage, rows: &[Row]) -> String {
    let height = TOP + ROW * rows.len() as f64 + FOOT;
    let longest =
        rows.iter().filter_map(|row| row.seconds()).map(|[.., greatest]| greatest).fold(0.001, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / longest;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\">\n<title>Cold start of a container</title>\n<style>{STYLE}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, (24.0, 34.0), "title", "From nothing on the node to the program's exit");
    text(&mut svg, (24.0, 56.0), "soft", &headline(stage));
    for (index, row) in rows.iter().enumerate() {
        bar(&mut svg, TOP + ROW * index as f64, row, scale);
    }
    if let Some(seconds) = floor::seconds(stage, rows) {
        let (x, bottom) = (LEFT + seconds * scale, TOP + ROW * rows.len() as f64 - ROW + BAR + 6.0);
        writeln!(
            svg,
            "<line class=\"floor\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{bottom}\"/>",
            TOP - 6.0
        )
        .expect("a string takes all");
        let words = format!("floor {seconds:.2} s: {}", floor::MEANING);
        text(&mut svg, (x, TOP - 9.0), "soft", &words);
    }
    text(&mut svg, (24.0, height - 16.0), "soft", &Machine::here().line());
    svg.push_str("</svg>\n");
    svg
}

fn bar(svg: &mut String, top: f64, row: &Row, scale: f64) {
    let middle = top + BAR / 2.0;
    text(svg, (24.0, middle + 4.5), "name", label(row.name));
    let (Some([median, least, greatest]), Some(mib)) = (row.seconds(), row.received_mib()) else {
        return text(svg, (LEFT, middle + 4.5), "soft", "no valid sample");
    };
    let class = if matches!(row.name, "lamina" | "first" | "boot" | "warm") { "lamina" } else { "other" };
    let width = (median * scale).max(1.0);
    write!(
        svg,
        "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{top}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"3\"/>\n\
         <line class=\"range\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\"/>\n",
        LEFT + least * scale,
        LEFT + greatest * scale,
    )
    .expect("a string takes all");
    let figures = format!("{median:.2} s, {mib:.0} MiB received");
    text(svg, (LEFT + greatest.max(median) * scale + 10.0, middle + 4.5), "figure", &figures);
}

fn label(name: &str) -> &str {
    match name {
        "lamina" => "lamina, no boot pack",
        "first" => "lamina, first start",
        "boot" => "lamina, boot pack",
        "warm" => "lamina, second run",
        "native" => "local disk, second run",
        "podman" => "podman, pull and run",
        "ctr" => "containerd, pull and run",
        other => other,
    }
}

fn text(svg: &mut String, (x, y): (f64, f64), class: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    writeln!(svg, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>")
        .expect("a string takes all");
}
