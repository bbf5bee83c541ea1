//! The load generator by itself: one line of JSON about one stretch of load.
//!
//! ```text
//! load ADDRESS [--connections 64] [--bytes 64 | --http] [--pipeline 1] [--seconds 2] [--poll]
//!              [--open PER_SECOND | --churn] [--idle 0] [--cpu 1] [--pid PID]
//! ```
//!
//! A closed loop unless `--open` gives a schedule, in which a request's latency counts from its due
//! time, or `--churn` makes each request a connection (of which `--connections` are under way).
//! `--idle` opens so many connections first that then do nothing. `--pid` names the server: its CPU
//! time per request and its memory are told too.

use std::{env, error::Error, net::SocketAddr, process::ExitCode, thread, time::Duration};

use slipring_peers::{
    json::Json,
    load::{Churn, Crowd, Plan, Sample, Session, Talk},
    machine, rig,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match Options::parse(env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Options {
    address: SocketAddr,
    connections: usize,
    bytes: usize,
    http: bool,
    pipeline: usize,
    seconds: f64,
    poll: bool,
    open: Option<f64>,
    churn: bool,
    idle: usize,
    cpu: usize,
    pid: Option<u32>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let address = arguments.next().ok_or("the first argument is the server's address")?;
        let mut options = Self {
            address: address.parse()?,
            connections: 64,
            bytes: 64,
            http: false,
            pipeline: 1,
            seconds: 2.0,
            poll: false,
            open: None,
            churn: false,
            idle: 0,
            cpu: 1,
            pid: None,
        };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
            match argument.as_str() {
                "--connections" => options.connections = value()?.parse()?,
                "--bytes" => options.bytes = value()?.parse()?,
                "--http" => options.http = true,
                "--pipeline" => options.pipeline = value()?.parse()?,
                "--seconds" => options.seconds = value()?.parse()?,
                "--poll" => options.poll = true,
                "--open" => options.open = Some(value()?.parse()?),
                "--churn" => options.churn = true,
                "--idle" => options.idle = value()?.parse()?,
                "--cpu" => options.cpu = value()?.parse()?,
                "--pid" => options.pid = Some(value()?.parse()?),
                _ => Err(format!("{argument}: not an option"))?,
            }
        }
        match (0.01..=600.0).contains(&options.seconds) {
            true => Ok(options),
            false => Err("--seconds is 0.01 to 600".into()),
        }
    }
}

fn run(options: &Options) -> Result<Json> {
    rig::pin(options.cpu)?;
    machine::raise_nofile((options.connections + options.idle) as u64 + 1_000)?;
    let mut crowd = Crowd::new();
    crowd.grow(options.address, options.idle)?;
    let time = Duration::from_secs_f64(options.seconds);
    let &Options { address, connections, bytes, pipeline, poll, .. } = options;
    let (sample, ran_ns) = if options.churn {
        let churn = Churn { address, under_way: connections, bytes };
        churn.run(WARM_UP)?;
        measured(options.pid, || churn.run(time))?
    } else {
        let talk = if options.http { Talk::Http } else { Talk::Echo { bytes } };
        // By a schedule, `pipeline` is only how far a slow server can fall behind in one send.
        let pipeline = if options.open.is_some() { pipeline.max(16) } else { pipeline };
        let mut session = Session::connect(&Plan { address, connections, talk, pipeline, poll })?;
        session.closed(WARM_UP)?;
        measured(options.pid, || match options.open {
            Some(per_second) => session.open(per_second, time),
            None => session.closed(time),
        })?
    };
    let mut members = sample.json();
    if let (Some(pid), Some(ran_ns)) = (options.pid, ran_ns) {
        let memory = machine::memory(pid)?;
        members.push(("server_cpu_ns", (ran_ns as f64 / sample.requests as f64).into()));
        members.push(("server_anonymous_bytes", memory.anonymous_bytes.into()));
        members.push(("server_resident_bytes", memory.resident_bytes.into()));
    }
    Ok(Json::Object(members))
}

/// The sample, and the CPU time that the server spent on it.
fn measured(
    pid: Option<u32>,
    load: impl FnOnce() -> std::io::Result<Sample>,
) -> Result<(Sample, Option<u64>)> {
    let ran_ns = || pid.map(|pid| rig::cpu_time(pid).map(|time| time.ran_ns)).transpose();
    let before = ran_ns()?;
    let sample = load()?;
    // The server has sent its last reply and is about to block; only then is its time exact.
    thread::sleep(Duration::from_millis(1));
    let after = ran_ns()?;
    Ok((sample, before.zip(after).map(|(before, after)| after - before)))
}

const WARM_UP: Duration = Duration::from_millis(200);
