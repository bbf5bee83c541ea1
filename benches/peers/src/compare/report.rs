//! The results in words: tables in Markdown, and everything in JSON.

use std::fmt::Write;

use slipring_peers::json::Json;

use super::{
    about::About,
    figures::{Answer, Answered, Spread},
    round::Measured,
    rows::{AXUM, Figure, HTTP},
};

/// The results as a document.
pub fn markdown(about: &About, questions: &[Answered]) -> String {
    let mut text = format!(
        "# slipring and its peers, {}\n\n\
         - Rig: {}\n- Commit: {}\n- Command: `{}`\n- Method: {}\n- Versions: {}\n",
        about.rig.date,
        about.rig,
        about.commit,
        about.command,
        about.method,
        about.versions_text(),
    );
    let is_http = |answered: &&Answered| [HTTP, AXUM].contains(&answered.row.servers);
    let costs = |answered: &&Answered| answered.row.figure != Figure::Latency;
    let echo = |costly: bool| {
        let of_kind = move |answered: &&Answered| !is_http(answered) && costs(answered) == costly;
        questions.iter().filter(of_kind).collect::<Vec<_>>()
    };
    section(&mut text, "Server CPU per request, and memory", &echo(true), ratio_cell);
    section(
        &mut text,
        "Latency: p50 / p99 in us (server CPU per request)",
        &echo(false),
        latency_cell,
    );
    for (title, servers) in
        [("HTTP: server CPU per request", HTTP), ("axum: server CPU per request", AXUM)]
    {
        let of_these = questions.iter().filter(|answered| answered.row.servers == servers);
        section(&mut text, title, &of_these.collect::<Vec<_>>(), ratio_cell);
    }
    standing(&mut text, questions);
    for answered in questions {
        for (name, failure) in answered.failures() {
            let _ = writeln!(text, "\n{name} failed at \"{}\": {failure}", answered.row.title());
        }
    }
    let noisy = noisy(questions);
    if !noisy.is_empty() {
        let _ =
            writeln!(text, "\nOthers had the server's CPU for over 5 % in: {}", noisy.join(", "));
    }
    text
}

fn section(
    text: &mut String,
    title: &str,
    questions: &[&Answered],
    cell: fn(&Answered, &Answer) -> String,
) {
    // Some are put to more servers than others are.
    let longest = questions.iter().max_by_key(|answered| answered.answers.len());
    let Some(longest) = longest else { return };
    let names: Vec<&str> = longest.answers.iter().map(|answer| answer.name).collect();
    let _ = write!(text, "\n## {title}\n\n| workload |");
    for name in &names {
        let _ = write!(text, " {name} |");
    }
    let _ = write!(text, "\n|---|{}\n", "---|".repeat(names.len()));
    for answered in questions {
        let _ = write!(text, "| {} |", answered.row.title());
        for name in &names {
            let answer = answered.answers.iter().find(|answer| answer.name == *name);
            let _ = write!(text, " {} |", answer.map_or(String::new(), |it| cell(answered, it)));
        }
        text.push('\n');
    }
}

/// How slipring compares to the best other server of each question, round by round.
fn standing(text: &mut String, questions: &[Answered]) {
    let mut rows = questions.iter().filter_map(standing_row).peekable();
    if rows.peek().is_some() {
        text.push_str("\n## slipring and the best of the others\n\n");
        text.push_str(
            "| workload | best other | slipring / it | in the rounds |\n|---|---|---|---|\n",
        );
        rows.for_each(|row| text.push_str(&row));
    }
}

fn standing_row(answered: &Answered) -> Option<String> {
    let figure = answered.row.figure;
    let own = answered.answers.iter().find(|answer| answer.name == "slipring")?;
    let others = answered.answers.iter().filter(|answer| !answer.name.starts_with("slipring"));
    let others = others.filter_map(|answer| Some((answer.figure(figure)?.median, answer)));
    let (_, best) = others.min_by(|(a, _), (b, _)| a.total_cmp(b))?;
    let Spread { median, min, max } = own.ratio(best, figure)?;
    let (title, name) = (answered.row.title(), best.name);
    Some(format!("| {title} | {name} | {median:.2} | {min:.2} to {max:.2} |\n"))
}

/// The baseline's figure as it is, the others' as multiples of it; memory as it is.
fn ratio_cell(answered: &Answered, answer: &Answer) -> String {
    let (Some(figure), Some(ratio)) = (answer.figure(answered.row.figure), answered.ratio(answer))
    else {
        return missing(answer);
    };
    match answered.row.figure {
        Figure::Memory => bytes(figure.median),
        _ if answer.name == answered.row.baseline() => {
            format!("1.00 ({})", microseconds(figure.median))
        }
        _ => format!("{:.2}", ratio.median),
    }
}

fn latency_cell(_: &Answered, answer: &Answer) -> String {
    let quantile = |quantile| answer.spread(move |round| round.sample.quantile_us(quantile));
    match (quantile(0.5), quantile(0.99), answer.figure(Figure::Cpu)) {
        (Some(p50), Some(p99), Some(cpu)) => {
            format!("{:.0} / {:.0} ({})", p50.median, p99.median, microseconds(cpu.median))
        }
        _ => missing(answer),
    }
}

fn missing(answer: &Answer) -> String {
    if answer.failure.is_some() { "failed" } else { "" }.to_owned()
}

pub fn bytes(count: f64) -> String {
    if count < 1000.0 { format!("{count:.0} B") } else { format!("{:.1} KB", count / 1e3) }
}

pub fn microseconds(ns: f64) -> String {
    let us = ns / 1e3;
    let digits = if us < 1.0 { 2 } else { usize::from(us < 10.0) };
    format!("{us:.digits$} us")
}

/// The questions in which a server was ready and others had its CPU.
fn noisy(questions: &[Answered]) -> Vec<String> {
    let waited = |answered: &Answered| {
        let shares = answered.answers.iter().filter_map(|answer| answer.spread(Measured::waited));
        shares.map(|share| share.median).fold(0.0, f64::max)
    };
    let noisy = questions.iter().map(|answered| (answered.row.title(), waited(answered)));
    let noisy = noisy.filter(|(_, share)| *share > 0.05);
    noisy.map(|(title, share)| format!("{title} ({:.0} %)", share * 100.0)).collect()
}

/// Everything, with each round's figures.
pub fn json(about: &About, questions: &[Answered]) -> Json {
    let mut members = about.json();
    members.push(("rows", questions.iter().map(question_json).collect()));
    Json::Object(members)
}

fn question_json(answered: &Answered) -> Json {
    let row = &answered.row;
    let answers = answered.answers.iter().map(|answer| answer_json(answered, answer));
    Json::Object(vec![
        ("key", row.key.into()),
        ("title", row.title().into()),
        ("question", row.question.into()),
        ("load", format!("{:?}", row.work).into()),
        ("figure", format!("{:?}", row.figure).to_lowercase().into()),
        ("baseline", row.baseline().into()),
        ("servers", answers.collect()),
    ])
}

fn answer_json(answered: &Answered, answer: &Answer) -> Json {
    let spread = |spread: Option<Spread>| spread.map_or(Json::Null, Spread::json);
    let mut members = vec![
        ("name", answer.name.into()),
        ("failure", answer.failure.clone().into()),
        ("buffer_bytes", answered.row.buffer_bytes(answer.name).into()),
        ("ratio", spread(answered.ratio(answer))),
    ];
    members.push(match answered.row.figure {
        Figure::Memory => ("bytes_each", spread(answer.figure(Figure::Memory))),
        _ => ("cpu_ns", spread(answer.figure(Figure::Cpu))),
    });
    if answered.row.figure == Figure::Latency {
        members.push(("p50_us", spread(answer.figure(Figure::Latency))));
    }
    members.push(("rounds", answer.rounds.iter().map(round_json).collect()));
    Json::Object(members)
}

fn round_json(round: &Measured) -> Json {
    let mut members = Vec::new();
    if round.sample.requests > 0 {
        members = round.sample.json();
        members.push(("cpu_ns", round.cpu_ns().into()));
        members.push(("busy", round.busy().into()));
        members.push(("waited", round.waited().into()));
    }
    let extra = [
        ("bytes_each", round.bytes_each),
        ("idle_cpu", round.idle_cpu),
        ("alone_p50_us", round.alone_p50_us),
    ];
    members.extend(extra.into_iter().filter_map(|(name, value)| Some((name, value?.into()))));
    Json::Object(members)
}
