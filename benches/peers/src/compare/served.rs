//! A server process: started, read from outside, ended by its pid.

use std::{
    env,
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
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
        let mut served = Self { child, address: ([127, 0, 0, 1], 0).into() };
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

    fn end(&mut self) -> io::Result<()> {
        // SAFETY: the call takes no pointer, and the pid is the child's until it is waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let deadline = Instant::now() + END_S_MAX;
        while self.child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Nothing to be done about a failure here; the child ends with this process.
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
