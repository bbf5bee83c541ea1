//! Which of two echo servers takes less CPU per echo, and by how much?
//!
//! ```text
//! cargo bench -p slipring-benches --bench pair -- [--rounds 7] [--connections 64] [--bytes 64]
//!     [--pipeline 1] [--seconds 2] [--congestion NAME] [--syscalls] A B
//! ```
//!
//! A and B are of `minimal`, `slipring`, `tokio-uring`, `epoll`; without them, `slipring minimal`.
//! In each round both servers are started afresh as child processes on CPU 0, and the load, this
//! process on CPU 1, turns to one and the other in short slices: a machine whose speed changes, as
//! a virtual one's does, changes it for both, so the ratio within a round says more than either
//! figure. Who comes first alternates. The CPU time is the scheduler's for that process
//! (`/proc/PID/task/*/schedstat`), read before and after each slice while the server is idle; on
//! the loopback it contains the network's work for both directions of what the server sends.
//!
//! `busy` tells how much of its CPU the server used: well below 100 %, it waited for the load, and
//! the smaller batches cost it more per echo. `waited` is the time that it was ready but another
//! process had the CPU: above a few per cent, repeat it on a quieter machine, or run the binary
//! under `chrt -f 5`. `enters` is the server's own count over the whole run, of `io_uring_enter`
//! (for `epoll`, of all its system calls), per echo. `--syscalls` adds an unmeasured run of each
//! under `perf stat`, which counts what the kernel saw.
//!
//! `--congestion` sets the load's side and the listeners made here; slipring keeps the system's.

use std::{
    env, fmt,
    io::{self, BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

mod support {
    pub mod epoll;
    pub mod load;
    pub mod minimal;
    pub mod rig;
    pub mod ring;
    pub mod slipring;
    pub mod tokio_uring;
}

use support::{
    load::{self, Histogram, Load, Plan, Until},
    rig::{self, Rig},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let done = Options::parse(env::args().skip(1)).and_then(|options| match &options.serve {
        Some(name) => serve(name, &options),
        None => compare(&options),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pair: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Options {
    rounds: usize,
    connections: usize,
    bytes: usize,
    pipeline: usize,
    seconds: f64,
    congestion: Option<String>,
    syscalls: bool,
    /// This process is the server of that name.
    serve: Option<String>,
    servers: Vec<String>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            rounds: 7,
            connections: 64,
            bytes: 64,
            pipeline: 1,
            seconds: 2.0,
            congestion: None,
            syscalls: false,
            serve: None,
            servers: Vec::new(),
        };
        let mut benchmarking = false;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
            match argument.as_str() {
                "--bench" => benchmarking = true,
                "--syscalls" => options.syscalls = true,
                "--rounds" => options.rounds = value()?.parse()?,
                "--connections" => options.connections = value()?.parse()?,
                "--bytes" => options.bytes = value()?.parse()?,
                "--pipeline" => options.pipeline = value()?.parse()?,
                "--seconds" => options.seconds = value()?.parse()?,
                "--congestion" => options.congestion = Some(value()?),
                "--serve" => options.serve = Some(value()?),
                name if SERVERS.contains(&name) => options.servers.push(argument),
                _ => Err(format!("{argument}: not an option, nor one of {SERVERS:?}"))?,
            }
        }
        if options.servers.is_empty() {
            options.servers = vec!["slipring".to_owned(), "minimal".to_owned()];
        }
        if !benchmarking && options.serve.is_none() {
            // `cargo test -p slipring-benches --benches` only wants to know that this still works.
            (options.rounds, options.seconds) = (1, 0.2);
        }
        let Self { rounds, seconds, servers, .. } = &options;
        match ((1..=100).contains(rounds) && (0.05..=60.0).contains(seconds), servers.len()) {
            (true, 2) => Ok(options),
            (false, 2) => Err("--rounds is 1 to 100 and --seconds 0.05 to 60".into()),
            _ => Err(format!("two servers of {SERVERS:?} are compared").into()),
        }
    }
}

// ---- the child ----

static TERMINATED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_terminate(_signal: libc::c_int) {
    TERMINATED.store(true, Ordering::Relaxed);
}

/// Serves on CPU 0 until SIGTERM; dies with its parent, and by the clock if all else fails.
fn serve(name: &str, options: &Options) -> Result<()> {
    // SAFETY: this option takes a signal number and no pointer.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: the call takes no pointer; SIGALRM's default action ends this process.
    unsafe { libc::alarm(options.seconds as u32 + CHILD_S_MAX) };
    rig::pin(SERVER_CPU)?;
    let listen = || {
        let listener = rig::listen(options.congestion.as_deref())?;
        listening(&listener.local_addr()?.to_string());
        io::Result::Ok(listener)
    };
    let terminated = || TERMINATED.load(Ordering::Relaxed);
    let enters = match name {
        "minimal" => {
            catch_sigterm()?;
            support::minimal::serve(listen()?, terminated)?
        }
        "epoll" => {
            catch_sigterm()?;
            support::epoll::serve(listen()?, terminated)?
        }
        "tokio-uring" => return Ok(support::tokio_uring::serve(listen()?)?),
        _ => {
            let sigterm = block_sigterm()?;
            support::slipring::serve(|address| listening(&address), || wait_for(&sigterm))?
        }
    };
    println!("enters {enters}");
    Ok(())
}

fn listening(address: &str) {
    println!("listening {address}");
    // A parent that is gone is noticed by PR_SET_PDEATHSIG.
    let _ = io::stdout().flush();
}

/// SIGTERM sets a flag and, as SA_RESTART is not asked for, ends the wait that it interrupts.
fn catch_sigterm() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask.
    let mut action = unsafe { std::mem::zeroed::<libc::sigaction>() };
    action.sa_sigaction = on_terminate as *const () as usize;
    // SAFETY: the handler only stores to an atomic; the old action is not asked for.
    check(unsafe { libc::sigaction(libc::SIGTERM, &raw const action, std::ptr::null_mut()) })
}

/// Blocks SIGTERM in this thread and those that it will start.
fn block_sigterm() -> io::Result<libc::sigset_t> {
    // SAFETY: all zeroes is a valid set.
    let mut set = unsafe { std::mem::zeroed::<libc::sigset_t>() };
    // SAFETY: the set is valid, and SIGTERM is a signal.
    check(unsafe { libc::sigaddset(&raw mut set, libc::SIGTERM) })?;
    // SAFETY: the kernel reads one set; the old mask is not asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    Ok(set)
}

fn wait_for(signals: &libc::sigset_t) {
    let mut signal = 0;
    // SAFETY: both pointers are to live values of the right type.
    unsafe { libc::sigwait(signals, &raw mut signal) };
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

// ---- the parent ----

/// A server process; ended by its pid, at the latest when this is dropped.
struct Served {
    child: Child,
    lines: Receiver<String>,
    address: SocketAddr,
}

impl Served {
    fn start(name: &str, options: &Options) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.args(["--serve", name, "--seconds", &options.seconds.to_string()]);
        if let Some(congestion) = &options.congestion {
            command.args(["--congestion", congestion]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(child.stdout.take().ok_or("no pipe from the child")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            output.lines().map_while(io::Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut served = Self { child, lines, address: ([127, 0, 0, 1], 0).into() };
        let line = served.lines.recv_timeout(START_S_MAX);
        let line = line.map_err(|_| format!("{name} did not start"))?;
        served.address = line.strip_prefix("listening ").ok_or("no address")?.parse()?;
        Ok(served)
    }

    /// Ends the child; the `enters` that it counted, if it does.
    fn stop(mut self) -> Result<Option<u64>> {
        self.terminate()?;
        let counted = self.lines.iter().find_map(|line| line.strip_prefix("enters ")?.parse().ok());
        Ok(counted)
    }

    fn terminate(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + STOP_S_MAX;
        while self.child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            // A signal between the flag's check and the wait would be missed, so there is more than
            // one. The pid is still the child's: it has not been waited for.
            // SAFETY: the call takes no pointer.
            unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Nothing to be done about a failure here; the child has its own alarm.
        let _ = self.terminate();
    }
}

/// One server in one round.
#[derive(Clone, Copy, Default)]
struct Sample {
    cpu_ns: f64,
    busy: f64,
    waited: f64,
    echoes: u64,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// Per echo; NaN where the server does not count.
    enters: f64,
}

/// What a server did in the slices of a round so far.
#[derive(Clone, Copy, Default)]
struct Tally {
    ran_ns: u64,
    waited_ns: u64,
    elapsed: Duration,
    echoes: u64,
}

impl Tally {
    fn slice(&mut self, served: &Served, load: &mut Load<'_>, time: Duration) -> Result<()> {
        let (begin, echoes) = (rig::cpu_time(served.child.id())?, load.round_trips);
        self.elapsed += load.run(Until::Elapsed(time))?;
        // The server has sent its last reply and is about to block; only then is its time exact.
        thread::sleep(Duration::from_millis(1));
        let end = rig::cpu_time(served.child.id())?;
        // A thread that ended takes its time along.
        self.ran_ns += end.ran_ns.saturating_sub(begin.ran_ns);
        self.waited_ns += end.waited_ns.saturating_sub(begin.waited_ns);
        self.echoes += load.round_trips - echoes;
        Ok(())
    }

    fn sample(&self, load: &Load<'_>) -> Sample {
        let elapsed_ns = self.elapsed.as_nanos() as f64;
        Sample {
            cpu_ns: self.ran_ns as f64 / self.echoes as f64,
            busy: self.ran_ns as f64 / elapsed_ns,
            waited: self.waited_ns as f64 / elapsed_ns,
            echoes: self.echoes,
            per_second: self.echoes as f64 / self.elapsed.as_secs_f64(),
            p50_us: load.latency.quantile_us(0.5),
            p99_us: load.latency.quantile_us(0.99),
            enters: f64::NAN,
        }
    }
}

/// Both servers of a round, the load turning from one to the other.
fn round(names: [&str; 2], first: usize, options: &Options) -> Result<[Sample; 2]> {
    let start = |name: &str| Served::start(name, options).map_err(|e| format!("{name}: {e}"));
    let served = [start(names[0])?, start(names[1])?];
    let plans = [plan(served[0].address, options), plan(served[1].address, options)];
    let (mut samples, echoes) = load::with(&plans[0], |a| {
        load::with(&plans[1], |b| {
            let mut tallies = [Tally::default(); 2];
            warm_up(a)?;
            warm_up(b)?;
            let time = Duration::from_secs_f64(options.seconds / SLICES as f64);
            for turn in 0..2 * SLICES {
                // A B, B A, A B: neither always follows the other.
                match (first + turn + turn / 2) % 2 {
                    0 => tallies[0].slice(&served[0], a, time),
                    _ => tallies[1].slice(&served[1], b, time),
                }?;
            }
            let samples = [tallies[0].sample(a), tallies[1].sample(b)];
            Result::Ok((samples, [a.round_trips, b.round_trips]))
        })
    })?;
    for ((served, sample), echoes) in served.into_iter().zip(&mut samples).zip(echoes) {
        sample.enters = served.stop()?.map_or(f64::NAN, |enters| enters as f64 / echoes as f64);
    }
    Ok(samples)
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu_ns, echoes, per_second, p50_us, p99_us, .. } = self;
        let (busy, waited) = (self.busy * 100.0, self.waited * 100.0);
        let enters = counted(self.enters);
        write!(f, "{cpu_ns:6.0} ns/echo  busy {busy:3.0} %  waited {waited:3.0} %  ")?;
        write!(f, "{echoes:8} echoes  {per_second:7.0}/s  p50 {p50_us:6.1} us  ")?;
        write!(f, "p99 {p99_us:7.1} us  {enters} enters/echo")
    }
}

fn warm_up(load: &mut Load<'_>) -> io::Result<()> {
    load.run(Until::Elapsed(WARM_UP))?;
    load.latency = Histogram::default();
    Ok(())
}

fn plan(address: SocketAddr, options: &Options) -> Plan {
    let Options { connections, bytes, pipeline, congestion, .. } = options;
    let (connections, bytes, pipeline) = (*connections, *bytes, *pipeline);
    Plan { address, connections, bytes, pipeline, congestion: congestion.clone() }
}

fn compare(options: &Options) -> Result<()> {
    let rig = Rig::here(options.congestion.as_deref());
    rig::pin(LOAD_CPU)?;
    let Options { rounds, connections, bytes, pipeline, seconds, .. } = options;
    let names = [options.servers[0].as_str(), options.servers[1].as_str()];
    println!("{rig}");
    println!(
        "{connections} connections, {bytes} B, pipeline {pipeline}, {rounds} rounds of {seconds} s"
    );
    let mut samples = [Vec::new(), Vec::new()];
    for number in 0..*rounds {
        for (which, sample) in round(names, number % 2, options)?.into_iter().enumerate() {
            println!("round {:2}  {:12} {sample}", number + 1, names[which]);
            samples[which].push(sample);
        }
    }
    summarize(names, &samples, options, &rig);
    if options.syscalls {
        for name in names {
            match count_syscalls(name, options) {
                Ok(counts) => println!("{name:12} {counts}"),
                Err(error) => println!("{name:12} system calls not counted: {error}"),
            }
        }
    }
    Ok(())
}

fn summarize(names: [&str; 2], samples: &[Vec<Sample>; 2], options: &Options, rig: &Rig) {
    let of =
        |which: usize, figure: fn(&Sample) -> f64| Spread::of(samples[which].iter().map(figure));
    let ratio = Spread::of(samples[0].iter().zip(&samples[1]).map(|(a, b)| a.cpu_ns / b.cpu_ns));
    let mut fields = String::new();
    for (which, (name, key)) in names.into_iter().zip(["a", "b"]).enumerate() {
        let cpu_ns = of(which, |sample| sample.cpu_ns);
        let [busy, waited, per_second, p50_us, p99_us, enters] = [
            of(which, |sample| sample.busy).median,
            of(which, |sample| sample.waited).median,
            of(which, |sample| sample.per_second).median,
            of(which, |sample| sample.p50_us).median,
            of(which, |sample| sample.p99_us).median,
            of(which, |sample| sample.enters).median,
        ];
        println!("{name:12} {cpu_ns:.0} ns CPU per echo, {} enters per echo", counted(enters));
        // JSON has no NaN.
        let enters = if enters.is_nan() { "null".to_owned() } else { format!("{enters:.5}") };
        let Spread { median, min, max } = cpu_ns;
        fields +=
            &format!(r#","{key}":{{"server":"{name}","cpu_ns":{median:.1},"cpu_ns_min":{min:.1},"#);
        fields += &format!(r#""cpu_ns_max":{max:.1},"busy":{busy:.3},"waited":{waited:.3},"#);
        fields += &format!(r#""echoes_per_s":{per_second:.0},"p50_us":{p50_us:.2},"#);
        fields += &format!(r#""p99_us":{p99_us:.2},"enters":{enters}}}"#);
    }
    println!("{} / {}  {ratio:.3}, of the rounds' ratios", names[0], names[1]);
    let Options { rounds, connections, bytes, pipeline, seconds, .. } = options;
    let Rig { kernel, cpu, cpus, congestion, load, date } = rig;
    let Spread { median, min, max } = ratio;
    print!(r#"{{"date":"{date}","kernel":"{kernel}","cpu":"{cpu}","cpus":{cpus},"#);
    print!(r#""congestion":"{congestion}","load_average":{load},"rounds":{rounds},"#);
    print!(r#""connections":{connections},"bytes":{bytes},"pipeline":{pipeline},"#);
    print!(r#""seconds":{seconds},"ratio":{median:.4},"ratio_min":{min:.4},"#);
    println!(r#""ratio_max":{max:.4}{fields}}}"#);
}

/// A figure that not every server has.
fn counted(enters: f64) -> String {
    if enters.is_nan() { "uncounted".to_owned() } else { format!("{enters:.4}") }
}

/// A run of its own under `perf stat`, whose tracepoints slow the server down.
fn count_syscalls(name: &str, options: &Options) -> Result<String> {
    let served = Served::start(name, options)?;
    let events = "raw_syscalls:sys_enter,syscalls:sys_enter_io_uring_enter";
    let perf = Command::new("perf")
        .args(["stat", "-x", ",", "-e", events, "-p", &served.child.id().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    // It attaches within that time, and ends with the process that it is attached to.
    thread::sleep(Duration::from_millis(500));
    let echoes = load::with(&plan(served.address, options), |load| {
        load.run(Until::Elapsed(Duration::from_secs(1)))?;
        io::Result::Ok(load.round_trips as f64)
    });
    served.stop()?;
    let output = perf.wait_with_output()?;
    let echoes = echoes?;
    let text = String::from_utf8(output.stderr)?;
    let count = |event: &str| {
        let line = text.lines().find(|line| line.contains(event))?;
        line.split(',').next()?.parse::<f64>().ok()
    };
    let all = count("raw_syscalls").ok_or_else(|| text.trim().to_owned())?;
    let enters = count("io_uring_enter").ok_or_else(|| text.trim().to_owned())?;
    let (all, enters) = (all / echoes, enters / echoes);
    Ok(format!("{all:.4} system calls per echo, {enters:.4} of them io_uring_enter (perf stat)"))
}

/// The median of some figures, and how far they lie apart.
#[derive(Clone, Copy)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(figures: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = figures.collect();
        sorted.sort_by(f64::total_cmp);
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        Self { median, min: sorted[0], max: sorted[sorted.len() - 1] }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(2);
        let Self { median, min, max } = self;
        write!(f, "{median:.digits$} ({min:.digits$}..{max:.digits$})")
    }
}

const SERVERS: [&str; 4] = ["minimal", "slipring", "tokio-uring", "epoll"];
const SERVER_CPU: usize = 0;
const LOAD_CPU: usize = 1;
const WARM_UP: Duration = Duration::from_millis(300);
/// Per server and round.
const SLICES: usize = 10;
const START_S_MAX: Duration = Duration::from_secs(5);
const STOP_S_MAX: Duration = Duration::from_secs(3);
const CHILD_S_MAX: u32 = 60;
