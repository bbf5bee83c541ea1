//! The machine under the benches: what it is, and how a thread, a listener and a process are placed
//! and read.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::{SystemTime, UNIX_EPOCH},
};

use socket2::{Domain, Protocol, Socket, Type};

/// A listener on a free port of 127.0.0.1; accepted sockets inherit its options.
pub fn listen(congestion: Option<&str>) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if let Some(congestion) = congestion {
        socket.set_tcp_congestion(congestion.as_bytes())?;
    }
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// Ties the calling thread, and the ones it will start, to one CPU.
pub fn pin(cpu: usize) -> io::Result<()> {
    // SAFETY: all zeroes is an empty set.
    let mut set = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
    assert!(cpu < libc::CPU_SETSIZE as usize, "no such CPU");
    // SAFETY: `cpu` is below the set's size.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the kernel reads one set of the given size.
    let done = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the scheduler has counted for a process.
#[derive(Clone, Copy, Default)]
pub struct CpuTime {
    pub ran_ns: u64,
    /// Ready to run, but other processes had the CPU.
    pub waited_ns: u64,
}

/// CPU time of a process so far: its live threads', those of the kernel's io_uring workers
/// included.
pub fn cpu_time(pid: u32) -> io::Result<CpuTime> {
    let mut sum = CpuTime::default();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the read.
        let Ok(schedstat) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let mut fields = schedstat.split_ascii_whitespace().map(str::parse::<u64>);
        let (Some(Ok(ran_ns)), Some(Ok(waited_ns))) = (fields.next(), fields.next()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "schedstat has another form"));
        };
        sum.ran_ns += ran_ns;
        sum.waited_ns += waited_ns;
    }
    Ok(sum)
}

/// What a figure has to be read with.
pub struct Rig {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub congestion: String,
    pub load: String,
    pub date: String,
}

impl Rig {
    pub fn here(congestion: Option<&str>) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let system = read("/proc/sys/net/ipv4/tcp_congestion_control");
        Self {
            // Without the suffix of whoever built it.
            kernel: read("/proc/sys/kernel/osrelease").trim().split('-').take(1).collect(),
            cpu: model.map_or("unknown", |(_, model)| model).to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            congestion: congestion.unwrap_or(system.trim()).to_owned(),
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
            date: today(),
        }
    }
}

impl std::fmt::Display for Rig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kernel, cpu, cpus, congestion, load, date } = self;
        write!(f, "{date}, Linux {kernel}, {cpu} ({cpus} CPUs), {congestion}, load average {load}")
    }
}

/// Today's date in UTC, by the civil calendar (Howard Hinnant, "chrono-compatible low-level date
/// algorithms").
fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let days = since.as_secs() / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}
