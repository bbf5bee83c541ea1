//! The comparison: every question of `rows.rs` put to every server, with tables, JSON and pictures.
//!
//! ```text
//! scripts/compare.sh [--quick] [--rounds 5] [--seconds 1] [--rows KEY,..] [--servers NAME,..]
//!                    [--out DIR] [--server-cpu 0] [--load-cpu 1] [--before SERVE]
//! ```
//!
//! `--quick` is one round of 0.2 s with smaller crowds: it shows that everything works, and its
//! figures mean nothing, so they go to the temporary folder unless `--out` says where. `--seconds`
//! is per server, question and round. Results go to `benches/results/DATE`, beside older ones.
//! `--before` is another build's `serve`: its slipring is what this one's is compared to, beside
//! the yardstick alone (`scripts/regress.sh`).
//! The exit code is 1 when a server failed at something, which the results then name.

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use slipring_peers::{machine, rig};

mod about;
mod figures;
mod report;
mod round;
mod rows;
mod served;
mod svg;

use about::About;
use figures::{Answer, Answered};
use rows::{ROWS, Row, Work};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub struct Options {
    quick: bool,
    rounds: usize,
    seconds: Duration,
    rows: Vec<String>,
    servers: Vec<String>,
    out: Option<PathBuf>,
    before: Option<PathBuf>,
    server_cpu: usize,
    load_cpu: usize,
}

fn main() -> ExitCode {
    match Options::parse(env::args().skip(1)).and_then(|options| compare(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::from(2)
        }
    }
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let (mut rounds, mut seconds) = (None, None);
        let mut options = Self {
            quick: false,
            rounds: 5,
            seconds: Duration::from_secs(1),
            rows: Vec::new(),
            servers: Vec::new(),
            out: None,
            before: None,
            server_cpu: 0,
            load_cpu: 1,
        };
        let list = |text: String| text.split(',').map(str::to_owned).collect();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
            match argument.as_str() {
                "--quick" => options.quick = true,
                "--rounds" => rounds = Some(value()?.parse()?),
                "--seconds" => seconds = Some(value()?.parse::<f64>()?),
                "--rows" => options.rows = list(value()?),
                "--servers" => options.servers = list(value()?),
                "--out" => options.out = Some(value()?.into()),
                "--before" => options.before = Some(value()?.into()),
                "--server-cpu" => options.server_cpu = value()?.parse()?,
                "--load-cpu" => options.load_cpu = value()?.parse()?,
                _ => Err(format!("{argument}: not an option"))?,
            }
        }
        options.rounds = rounds.unwrap_or(if options.quick { 1 } else { 5 });
        let seconds = seconds.unwrap_or(if options.quick { 0.2 } else { 1.0 });
        if !(1..=rows::ROUNDS_MAX).contains(&options.rounds) || !(0.05..=60.0).contains(&seconds) {
            Err("--rounds is 1 to 100 and --seconds 0.05 to 60")?;
        }
        options.seconds = Duration::from_secs_f64(seconds);
        for key in &options.rows {
            let keys: Vec<&str> = ROWS.iter().map(|row| row.key).collect();
            keys.contains(&key.as_str()).then_some(()).ok_or(format!("{key}: none of {keys:?}"))?;
        }
        Ok(options)
    }

    /// What is asked for, with crowds that fit into so many descriptors.
    fn questions(&self, nofile: u64) -> Vec<Row> {
        let asked = |row: &&Row| self.rows.is_empty() || self.rows.iter().any(|key| key == row.key);
        let mut rows: Vec<Row> = ROWS.iter().filter(asked).copied().collect();
        for row in &mut rows {
            if let Work::Idle { connections } | Work::Crowd { connections } = &mut row.work {
                *connections /= if self.quick { QUICKER } else { 1 };
                *connections = (*connections).min((nofile as usize).saturating_sub(RESERVE));
            }
        }
        if self.before.is_some() {
            rows.retain(|row| row.servers.contains(&"slipring"));
            rows.iter_mut().for_each(|row| row.servers = rows::BEFORE);
        }
        rows
    }
}

/// Whether everybody answered everything.
fn compare(options: &Options) -> Result<bool> {
    let (about, begin) = (About::new(options), Instant::now());
    rig::pin(options.load_cpu)?;
    let nofile = machine::most_nofile(NOFILE)?;
    if nofile < NOFILE {
        println!("crowds are smaller than they should be: RLIMIT_NOFILE is {nofile}, not {NOFILE}");
    }
    let mut known = served::names()?;
    known.extend(options.before.is_some().then(|| rows::BEFORE[0].to_owned()));
    for name in &options.servers {
        let known = known.iter().any(|known| known == name);
        known.then_some(()).ok_or_else(|| format!("{name}: not in this build"))?;
    }
    println!("{}", about.rig);
    let mut questions = Vec::new();
    for row in options.questions(nofile) {
        let wanted = |name: &&&str| {
            let chosen = options.servers.is_empty()
                || **name == row.baseline()
                || options.servers.iter().any(|server| server == *name);
            chosen && known.iter().any(|known| known == *name)
        };
        let names: Vec<&'static str> = row.servers.iter().filter(wanted).copied().collect();
        if names.first() != Some(&row.baseline()) {
            println!("{}: not asked, {} is not in this build", row.key, row.baseline());
            continue;
        }
        questions.push(ask(row, &names, options));
    }
    let markdown = report::markdown(&about, &questions);
    println!("\n{markdown}");
    let out = out(options, &about)?;
    fs::write(out.join("README.md"), markdown)?;
    fs::write(out.join("results.json"), format!("{:#}\n", report::json(&about, &questions)))?;
    for answered in &questions {
        if let Some(picture) = svg::picture(&about, answered) {
            fs::write(out.join(format!("{}.svg", answered.row.key)), picture)?;
        }
    }
    println!("{} s, written to {}", begin.elapsed().as_secs(), out.display());
    Ok(questions.iter().all(|answered| answered.failures().next().is_none()))
}

/// All rounds of a question.
fn ask(row: Row, names: &[&'static str], options: &Options) -> Answered {
    let begin = Instant::now();
    let answer = |&name: &&'static str| Answer { name, rounds: Vec::new(), failure: None };
    let mut answers: Vec<Answer> = names.iter().map(answer).collect();
    for number in 0..options.rounds.min(row.rounds_max) {
        let failed = |name| answers.iter().any(|a| a.name == name && a.failure.is_some());
        let left: Vec<&'static str> = names.iter().copied().filter(|name| !failed(*name)).collect();
        if left.is_empty() {
            break;
        }
        let round = round::round(&row, &left, number, options);
        let mut round: HashMap<&str, _> = round.into_iter().collect();
        for answer in &mut answers {
            match round.remove(answer.name) {
                Some(Ok(measured)) => answer.rounds.push(measured),
                Some(Err(error)) => {
                    eprintln!("{}: {} failed: {error}", row.key, answer.name);
                    answer.failure = Some(error.to_string());
                    // Some of its rounds would not be comparable to all of the others'.
                    answer.rounds.clear();
                }
                None => {}
            }
        }
    }
    println!("{:10} {:4} s  {}", row.key, begin.elapsed().as_secs(), row.title());
    Answered { row, answers }
}

/// The folder of the results, made here; never one that is there already, unless it was named.
fn out(options: &Options, about: &About) -> Result<PathBuf> {
    if let Some(out) = &options.out {
        fs::create_dir_all(out)?;
        return Ok(out.clone());
    }
    let base = match options.quick {
        true => env::temp_dir().join("slipring-compare"),
        false => Path::new(env!("CARGO_MANIFEST_DIR")).join("../results"),
    };
    fs::create_dir_all(&base)?;
    let date = &about.rig.date;
    let names = (1..1000).map(|number| match number {
        1 => date.clone(),
        _ => format!("{date}-{number}"),
    });
    for name in names {
        match fs::create_dir(base.join(&name)) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
            made => return made.map(|()| base.join(name)).map_err(Into::into),
        }
    }
    Err("too many results of one day".into())
}

/// For 100 000 connections.
const NOFILE: u64 = 102_000;
/// Descriptors that are not a crowd's.
const RESERVE: usize = 2_000;
const QUICKER: usize = 20;
