//! A server process: started, read from outside, ended by its pid.

use std::{
    env,
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use slipring_peers::{
    machine::{self, Memory},
    rig::{self, CpuTime},
};

use super::{
    Options, Result,
    rows::{self, Row},
};

pub struct Served {
    child: Child,
    pub address: SocketAddr,
    ended: bool,
}

impl Served {
    pub fn start(name: &str, row: &Row, options: &Options) -> Result<Self> {
        let (program, known_as) = match &options.before {
            Some(before) if name == rows::BEFORE[0] => (before.clone(), "slipring"),
            _ => (program()?, name),
        };
        let mut command = Command::new(program);
        command.args([known_as, "127.0.0.1:0", &options.server_cpu.to_string()]);
        command.args(["--buffer-bytes", &row.buffer_bytes(name).to_string()]);
        command.args(["--connections-max", &row.connections_max().to_string()]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(child.stdout.take().ok_or("no pipe from the child")?);
        let (sender, lines) = mpsc::channel();
        // It reads on, so that a server that says more does not block.
        thread::spawn(move || {
            output.lines().map_while(io::Result::ok).for_each(|line| drop(sender.send(line)));
        });
        let mut served = Self { child, address: ([127, 0, 0, 1], 0).into(), ended: false };
        let line = lines.recv_timeout(START_S_MAX).map_err(|_| "it did not start")?;
        served.address = line.strip_prefix("listening ").ok_or("it gave no address")?.parse()?;
        Ok(served)
    }

    pub fn cpu_time(&self) -> io::Result<CpuTime> {
        rig::cpu_time(self.child.id())
    }

    pub fn memory(&self) -> io::Result<Memory> {
        machine::memory(self.child.id())
    }

    /// Lets it run, or keeps it from running: one that spins though nobody asks it anything would
    /// take its CPU from the one that is asked.
    pub fn may_run(&self, may: bool) {
        let signal = if may { libc::SIGCONT } else { libc::SIGSTOP };
        // SAFETY: the call takes no pointer, and the pid is the child's until it is waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }

    /// Does something that the server has to play its part in. If that takes longer than `most`
    /// the server is killed, which ends whatever waits for it.
    pub fn within<T>(&self, most: Duration, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (done, is_done) = mpsc::channel::<()>();
        let pid = self.child.id() as libc::pid_t;
        let guard = thread::spawn(move || {
            let late = is_done.recv_timeout(most) == Err(RecvTimeoutError::Timeout);
            if late {
                // SAFETY: the call takes no pointer, and the pid is the child's until it is waited
                // for, which nobody does before this thread has been joined.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            late
        });
        let result = work();
        drop(done);
        match guard.join() {
            Ok(false) => result,
            _ => Err(io::Error::new(io::ErrorKind::TimedOut, "it got stuck, and was killed")),
        }
    }

    /// Ends the server, by force if need be.
    ///
    /// # Errors
    ///
    /// It is still there after that. Then it is left behind.
    pub fn end(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        self.may_run(true);
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            // SAFETY: the call takes no pointer, and the pid is the child's until it is waited for.
            unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
            let deadline = Instant::now() + END_S_MAX;
            while Instant::now() < deadline {
                if self.child.try_wait()?.is_some() {
                    return Ok(());
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "it does not end, not even when killed"))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Nobody is there any more to be told; the child ends with this process.
        let _ = self.end();
    }
}

/// The names that this build's `serve` knows.
pub fn names() -> Result<Vec<String>> {
    let output = Command::new(program()?).arg("list").output()?;
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// `serve` lies beside this program.
fn program() -> Result<PathBuf> {
    let program = env::current_exe()?.with_file_name("serve");
    if program.exists() { Ok(program) } else { Err("build `serve` too: cargo build --bins".into()) }
}

const START_S_MAX: Duration = Duration::from_secs(5);
const END_S_MAX: Duration = Duration::from_secs(3);
