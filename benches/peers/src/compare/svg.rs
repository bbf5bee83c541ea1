//! A picture per question, as SVG by hand: bars for costs, dots on a logarithmic axis for latency.

use std::fmt::Write;

use super::{
    about::About,
    figures::{Answer, Answered},
    report::{bytes, microseconds},
    rows::Figure,
};

/// The picture; `None` if nobody answered.
pub fn picture(about: &About, answered: &Answered) -> Option<String> {
    let answers: Vec<&Answer> =
        answered.answers.iter().filter(|answer| !answer.rounds.is_empty()).collect();
    if answers.is_empty() {
        return None;
    }
    let mut text = String::new();
    let unit = match answered.row.figure {
        Figure::Cpu => format!("server CPU per request, multiple of {}", answered.row.baseline()),
        Figure::Memory => "bytes per connection".to_owned(),
        Figure::Latency => "latency in us: p50, p90, p99, p99.9, paler to the right".to_owned(),
    };
    let height = TOP + answers.len() as f64 * STEP + BOTTOM;
    let _ = write!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    words(&mut text, 16.0, 24.0, "font-size=\"16\" font-weight=\"bold\"", &answered.row.title());
    words(&mut text, 16.0, 44.0, "", answered.row.question);
    words(&mut text, 16.0, 62.0, "fill=\"#666666\"", &unit);
    match answered.row.figure {
        Figure::Latency => dots(&mut text, &answers),
        _ => bars(&mut text, answered, &answers),
    }
    let rig = format!("{}, commit {:.12}", about.rig, about.commit);
    words(&mut text, 16.0, height - 12.0, "fill=\"#666666\" font-size=\"10\"", &rig);
    text.push_str("</svg>\n");
    Some(text)
}

/// One bar per server with the rounds' outermost figures as a whisker.
fn bars(text: &mut String, answered: &Answered, answers: &[&Answer]) {
    let figure = answered.row.figure;
    let spread = |answer: &Answer| match figure {
        Figure::Memory => answer.figure(figure),
        _ => answered.ratio(answer),
    };
    let spreads = answers.iter().filter_map(|answer| spread(answer));
    let most = spreads.map(|spread| spread.max).fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| LEFT + value / most * (WIDTH - LEFT - RIGHT);
    if figure != Figure::Memory {
        line(text, x(1.0), TOP - 4.0, x(1.0), TOP + answers.len() as f64 * STEP, "#bbbbbb");
    }
    for (index, answer) in answers.iter().enumerate() {
        let y = TOP + index as f64 * STEP;
        name(text, y, answer.name);
        let Some(spread) = spread(answer) else { continue };
        let _ = writeln!(
            text,
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{}\"/>",
            y + (STEP - BAR) / 2.0,
            x(spread.median) - LEFT,
            colour(answer.name)
        );
        let middle = y + STEP / 2.0;
        line(text, x(spread.min), middle, x(spread.max), middle, "#222222");
        let value = match (figure, answer.figure(figure)) {
            (Figure::Memory, _) => bytes(spread.median),
            (_, Some(own)) => format!("{:.2} ({})", spread.median, microseconds(own.median)),
            (_, None) => continue,
        };
        words(text, x(spread.max) + 6.0, middle + 4.0, "", &value);
    }
}

/// One row of dots per server: its latency's quantiles, on a logarithmic axis.
fn dots(text: &mut String, answers: &[&Answer]) {
    let of = |answer: &Answer, quantile: f64| {
        answer.spread(|round| round.sample.quantile_us(quantile)).map(|spread| spread.median)
    };
    let all = || answers.iter().flat_map(|answer| QUANTILES.map(|quantile| of(answer, quantile)));
    let least = all().flatten().fold(f64::MAX, f64::min).max(0.1);
    let most = all().flatten().fold(0.0, f64::max).max(2.0 * least);
    let (low, high) = ((least * 0.9).log10(), (most * 1.1).log10());
    let x = |us: f64| LEFT + (us.max(0.1).log10() - low) / (high - low) * (WIDTH - LEFT - RIGHT);
    let bottom = TOP + answers.len() as f64 * STEP;
    words(text, WIDTH - RIGHT + 12.0, TOP - 8.0, "fill=\"#666666\"", "p50 / p99");
    // 1, 2, 5, 10, ..
    let ticks = (-1..8).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(power)));
    for tick in ticks.filter(|tick| (low..=high).contains(&tick.log10())) {
        line(text, x(tick), TOP - 4.0, x(tick), bottom, "#dddddd");
        words(
            text,
            x(tick) - 8.0,
            bottom + 14.0,
            "fill=\"#666666\" font-size=\"11\"",
            &tick.to_string(),
        );
    }
    for (index, answer) in answers.iter().enumerate() {
        let y = TOP + index as f64 * STEP;
        name(text, y, answer.name);
        let figures = QUANTILES.map(|quantile| of(answer, quantile));
        for (figure, opacity) in figures.iter().zip([1.0, 0.65, 0.45, 0.25]) {
            let Some(us) = figure else { continue };
            let (x, y) = (x(*us), y + STEP / 2.0);
            let _ = writeln!(
                text,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"6\" fill=\"{}\" \
                 fill-opacity=\"{opacity}\"/>",
                colour(answer.name)
            );
        }
        if let [Some(p50), _, Some(p99), _] = figures {
            let value = format!("{p50:.0} / {p99:.0}");
            words(text, WIDTH - RIGHT + 12.0, y + STEP / 2.0 + 4.0, "", &value);
        }
    }
}

fn name(text: &mut String, y: f64, name: &str) {
    let place = "text-anchor=\"end\"";
    words(text, LEFT - 8.0, y + STEP / 2.0 + 4.0, place, name);
}

fn words(text: &mut String, x: f64, y: f64, attributes: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{words}</text>");
}

fn line(text: &mut String, x1: f64, y1: f64, x2: f64, y2: f64, colour: &str) {
    let _ = writeln!(
        text,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
    );
}

fn colour(name: &str) -> &'static str {
    match name {
        name if name.contains("slipring") => "#d1495b",
        "minimal" => "#30638e",
        _ => "#8d99a6",
    }
}

const QUANTILES: [f64; 4] = [0.5, 0.9, 0.99, 0.999];
const WIDTH: f64 = 760.0;
const LEFT: f64 = 120.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 80.0;
const BOTTOM: f64 = 44.0;
const STEP: f64 = 26.0;
const BAR: f64 = 18.0;
