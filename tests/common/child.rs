//! This test binary in processes of their own, which end with the test that has started them.

use std::borrow::BorrowMut;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use super::{length, not_run, slowness};

/// What this process was started as by [`again`]; `None` in the process of the tests.
pub fn role() -> Option<String> {
    std::env::var("RING_TEST_CHILD").ok()
}

/// Starts the test of that name again, which is in the file that calls, in a process that is to
/// play a role: what it runs through is a program and its arguments, or nothing.
#[track_caller]
pub fn again(test: &str, role: &str, through: &[&str]) -> Command {
    let this = std::env::current_exe().expect("the path of this test");
    let mut command = match through {
        [] => Command::new(this),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(this);
            command
        }
    };
    command.args(["--exact", &path_of(test), "--nocapture", "--test-threads=1"]);
    command.env("RING_TEST_CHILD", role).env("PATH", path());
    tie(&mut command);
    command
}

/// What the harness calls the test of that name in the file that calls, which is a module of its
/// program, or the program itself.
#[track_caller]
pub fn path_of(test: &str) -> String {
    let file = Path::new(Location::caller().file());
    let stem = file.file_stem().expect("a file's name").display();
    let folder = file.parent().expect("it is in a folder");
    if folder.ends_with("tests") { test.to_owned() } else { format!("{stem}::{test}") }
}

/// Makes the child end with the thread that starts it, and after two minutes in any case, or longer
/// in a long run.
pub fn tie(command: &mut Command) {
    let seconds = (SECONDS_MAX * slowness() * length()) as libc::c_uint;
    let tie = move || {
        // SAFETY: takes integers.
        let tied = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        // SAFETY: takes an integer; an alarm goes on in what is executed.
        unsafe { libc::alarm(seconds) };
        if tied == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec it makes two system calls and allocates nothing.
    unsafe { command.pre_exec(tie) };
}

/// Where an example is; `cargo test` builds them.
pub fn example(name: &str) -> PathBuf {
    let folder = std::env::var_os("RING_TEST_EXAMPLES").map(PathBuf::from).unwrap_or_else(|| {
        let this = std::env::current_exe().expect("this executable has a path");
        // target/PROFILE/deps/this
        this.ancestors().nth(2).expect("it is in a profile's folder").join("examples")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is not there: `cargo build --examples` makes it", path.display());
    path
}

/// Where programs are, those of administrators too: ip(8) is one on some systems.
pub fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Runs a child to its end. Returns all that it has said, and whether it succeeded.
pub fn run(mut command: Command) -> (bool, String) {
    let output = command.output().expect("start this test again");
    let words = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(!words[0].contains("running 0 tests"), "no test has that name: {words:?}");
    (output.status.success(), format!("{}{}{}", words[0], words[1], output.status))
}

/// Runs a child that must succeed, as a user who has no privilege and no other process.
/// Returns what it has said; `None` where no other user may run it.
pub fn run_as_nobody(test: &str, mut command: Command) -> Option<String> {
    // SAFETY: has no argument and can't fail.
    if unsafe { libc::geteuid() } == 0 {
        let user = 60_000 + std::process::id() % 5_000;
        command.uid(user).gid(user);
    }
    let (succeeded, words) = run(command);
    println!("{words}");
    if words.ends_with("exit status: 126") {
        not_run(test, format!("another user may not start this executable: {words}"));
        return None;
    }
    assert!(succeeded, "{words}");
    Some(words)
}

/// A child that goes on until it is told to end, or is dropped.
pub struct Process {
    pub child: Child,
    output: BufReader<ChildStdout>,
}

impl Process {
    pub fn start(mut command: impl BorrowMut<Command>) -> Process {
        let mut child =
            command.borrow_mut().stdout(Stdio::piped()).spawn().expect("start this test again");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        Process { child, output }
    }

    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill(2) touches no memory; the child has not been waited for, so the number is
        // still its own.
        let result = unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        assert_eq!(result, 0, "kill");
    }

    /// Waits for a line that begins like this, and returns the rest of it.
    pub fn line_after(&mut self, beginning: &str) -> String {
        for line in (&mut self.output).lines() {
            let line = line.expect("a line of text");
            if let Some(rest) = line.strip_prefix(beginning) {
                return rest.to_owned();
            }
        }
        panic!("the process has ended without {beginning:?}: {:?}", self.child.wait());
    }

    /// Waits for its end, and returns what it has said since.
    pub fn rest(&mut self) -> Vec<String> {
        (&mut self.output).lines().map(|line| line.expect("a line of text")).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// After so long a child of an ordinary run is killed, whatever it does.
const SECONDS_MAX: u64 = 120;
