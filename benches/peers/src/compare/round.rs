//! One round of a question: every server is asked in short slices, in turn, so that a machine whose
//! speed changes, as a virtual one's does, changes it for all of them.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use slipring_peers::load::{Churn, Crowd, Plan, Sample, Session, Talk};

use super::{
    Options, Result,
    rows::{Row, Work},
    served::Served,
};

/// What one server did in one round.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    pub sample: Sample,
    pub ran_ns: u64,
    /// Ready to run, but another process had the CPU.
    pub waited_ns: u64,
    /// Of the server's own memory, for each connection.
    pub bytes_each: Option<f64>,
    /// The share of its CPU that it used while all its connections were idle.
    pub idle_cpu: Option<f64>,
    /// The median latency before the crowd came.
    pub alone_p50_us: Option<f64>,
}

impl Measured {
    pub fn cpu_ns(&self) -> f64 {
        self.ran_ns as f64 / self.sample.requests as f64
    }

    pub fn busy(&self) -> f64 {
        self.ran_ns as f64 / self.sample.elapsed.as_nanos() as f64
    }

    pub fn waited(&self) -> f64 {
        self.waited_ns as f64 / self.sample.elapsed.as_nanos() as f64
    }

    /// Takes a slice's figures in.
    fn slice(
        &mut self,
        served: &Served,
        load: impl FnOnce() -> io::Result<Sample>,
    ) -> io::Result<()> {
        let before = served.cpu_time()?;
        self.sample.add(&served.within(STUCK_S_MAX, load)?);
        // The server has sent its last reply and is about to block; only then is its time exact.
        thread::sleep(Duration::from_millis(1));
        let after = served.cpu_time()?;
        // A thread that ended takes its time along.
        self.ran_ns += after.ran_ns.saturating_sub(before.ran_ns);
        self.waited_ns += after.waited_ns.saturating_sub(before.waited_ns);
        Ok(())
    }
}

/// A server in a round, until it fails.
struct Contender {
    name: &'static str,
    outcome: Result<(Served, Load)>,
    measured: Measured,
}

enum Load {
    Session(Box<Session>, Option<f64>),
    Churn(Churn),
    /// What is measured in one go, and not in slices.
    Whole,
}

/// All servers of the question once; each with its figures or its failure.
pub fn round(
    row: &Row,
    names: &[&'static str],
    number: usize,
    options: &Options,
) -> Vec<(&'static str, Result<Measured>)> {
    let contender = |&name: &&'static str| {
        let outcome = prepare(name, row, options);
        if let Ok((served, _)) = &outcome {
            served.may_run(false);
        }
        Contender { name, outcome, measured: Measured::default() }
    };
    // Those that hold a crowd are asked one after the other: there are only so many descriptors.
    if matches!(row.work, Work::Idle { .. } | Work::Crowd { .. }) {
        let mut order = names.to_vec();
        order.rotate_left(number % names.len());
        let whole = |name: &'static str| {
            let mut served = Served::start(name, row, options)?;
            let measured = whole(row, &served, options.seconds)?;
            served.end()?;
            Ok(measured)
        };
        return order.into_iter().map(|name| (name, whole(name))).collect();
    }
    let mut contenders: Vec<Contender> = names.iter().map(contender).collect();
    let time = options.seconds.div_f64(SLICES as f64);
    for slice in 0..SLICES {
        // Nobody always follows the same one.
        let count = contenders.len();
        for step in 0..count {
            let step = if slice % 2 == 0 { step } else { count - 1 - step };
            let place = (number + 3 * slice + step) % count;
            contenders[place].slice(row, time);
        }
    }
    contenders.into_iter().map(Contender::finish).collect()
}

impl Contender {
    fn slice(&mut self, row: &Row, time: Duration) {
        let Ok((served, load)) = &mut self.outcome else { return };
        served.may_run(true);
        let done = self.measured.slice(served, || match load {
            Load::Session(session, Some(per_second)) => session.open(*per_second, time),
            Load::Session(session, None) => session.closed(time),
            Load::Churn(churn) => churn.run(time),
            Load::Whole => Err(io::Error::other(format!("{} has no slices", row.key))),
        });
        served.may_run(false);
        if let Err(error) = done {
            self.outcome = Err(error.into());
        }
    }

    /// One that cannot be ended has failed too.
    fn finish(self) -> (&'static str, Result<Measured>) {
        let end = |(mut served, _load): (Served, Load)| served.end().map_err(Into::into);
        (self.name, self.outcome.and_then(end).map(|()| self.measured))
    }
}

/// Starts a server and its load, and warms both up.
fn prepare(name: &str, row: &Row, options: &Options) -> Result<(Served, Load)> {
    let served = Served::start(name, row, options)?;
    let address = served.address;
    let echo = |connections, bytes, pipeline, poll| Plan {
        address,
        connections,
        talk: Talk::Echo { bytes },
        pipeline,
        poll,
    };
    let (plan, rate) = match row.work {
        Work::Closed { connections, bytes, pipeline, poll } => {
            (echo(connections, bytes, pipeline, poll), None)
        }
        Work::Http { connections, pipeline } => {
            (Plan { address, connections, talk: Talk::Http, pipeline, poll: false }, None)
        }
        Work::Open { connections, bytes, per_second } => {
            (echo(connections, bytes, BEHIND_MAX, true), Some(per_second))
        }
        Work::Churn { under_way, bytes } => {
            let churn = Churn { address, under_way, bytes };
            served.within(STUCK_S_MAX, || churn.run(WARM_UP))?;
            return Ok((served, Load::Churn(churn)));
        }
        Work::Idle { .. } | Work::Crowd { .. } => return Ok((served, Load::Whole)),
    };
    let session = served.within(STUCK_S_MAX, || {
        let mut session = Session::connect(&plan)?;
        match rate {
            Some(per_second) => session.open(per_second, WARM_UP)?,
            None => session.closed(WARM_UP)?,
        };
        Ok(session)
    })?;
    Ok((served, Load::Session(Box::new(session), rate)))
}

/// A crowd's memory and CPU, and the latency of one beside it.
fn whole(row: &Row, served: &Served, time: Duration) -> Result<Measured> {
    let mut measured = Measured::default();
    let (connections, active) = match row.work {
        Work::Idle { connections } => (connections, false),
        Work::Crowd { connections } => (connections, true),
        _ => return Err("this row has no crowd".into()),
    };
    let talk = Talk::Echo { bytes: 64 };
    let plan = Plan { address: served.address, connections: 1, talk, pipeline: 1, poll: false };
    let connected = || served.within(STUCK_S_MAX, || Session::connect(&plan));
    let mut session = active.then(connected).transpose()?;
    if let Some(session) = &mut session {
        served.within(STUCK_S_MAX, || session.closed(WARM_UP))?;
        let alone = served.within(STUCK_S_MAX, || session.closed(time))?;
        measured.alone_p50_us = Some(alone.quantile_us(0.5));
    }
    let mut crowd = Crowd::new();
    // The first ones, and more requests than there are shared buffers, make the server touch what
    // all connections share.
    let first = FIRST.min(connections / 2);
    served.within(STUCK_S_MAX, || {
        crowd.grow(served.address, first)?;
        Session::connect(&Plan { connections: 16, ..plan })?.closed(WARM_UP)
    })?;
    let before = served.memory()?.anonymous_bytes;
    served.within(STUCK_S_MAX, || crowd.grow(served.address, connections))?;
    let grown = served.memory()?.anonymous_bytes.saturating_sub(before);
    measured.bytes_each = Some(grown as f64 / (connections - first) as f64);
    thread::sleep(SETTLE);
    let (begin, ran_ns) = (Instant::now(), served.cpu_time()?.ran_ns);
    thread::sleep(time);
    let ran_ns = served.cpu_time()?.ran_ns - ran_ns;
    measured.idle_cpu = Some(ran_ns as f64 / begin.elapsed().as_nanos() as f64);
    if let Some(session) = &mut session {
        measured.slice(served, || session.closed(time))?;
    }
    Ok(measured)
}

/// What takes longer is not worth waiting for: a crowd of 100 000 comes in some seconds, and loads
/// notice a silent server by themselves.
const STUCK_S_MAX: Duration = Duration::from_secs(60);
/// Per server and round.
const SLICES: usize = 5;
const WARM_UP: Duration = Duration::from_millis(100);
const SETTLE: Duration = Duration::from_millis(200);
/// Requests of a schedule that may leave in one send after a delay.
const BEHIND_MAX: usize = 16;
const FIRST: usize = 2_000;
