//! Examples as processes of their own, which end with the test that has started them.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

use super::{connect, wait_until};

/// An example that serves.
pub struct Example {
    process: Child,
    output: BufReader<ChildStdout>,
    pub addr: SocketAddr,
}

impl Example {
    /// Starts it on a port that the kernel chooses, and waits until it listens.
    ///
    /// `RING_TEST_EXAMPLES` names the folder of the built examples; by default it is the one that
    /// `cargo test` builds them into.
    pub fn start(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Example {
        let folder = std::env::var_os("RING_TEST_EXAMPLES").map_or_else(
            || {
                let test = std::env::current_exe().expect("the path of this test");
                test.parent().and_then(|deps| deps.parent()).expect("a folder").join("examples")
            },
            Into::into,
        );
        let path = folder.join(name);
        assert!(path.exists(), "{} is not there: `cargo build --examples`", path.display());
        let mut command = Command::new(path);
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"SLIPRING_") {
                command.env_remove(name);
            }
        }
        command.env("SLIPRING_LISTEN", "127.0.0.1:0").env("SLIPRING_CONNECTIONS_MAX", "500");
        command.envs(variables.iter().copied()).args(arguments);
        let mut process =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("start it");
        let mut output = BufReader::new(process.stdout.take().expect("its output"));
        let mut line = String::new();
        output.read_line(&mut line).expect("what it says first");
        let addr = line.trim().strip_prefix("listening on ").expect("it says where it listens");
        Example { process, output, addr: addr.parse().expect("an address") }
    }

    pub fn connect(&self) -> std::net::TcpStream {
        connect(self.addr)
    }

    pub fn terminate(&self) {
        // SAFETY: kill(2) touches no memory; the child has not been waited for, so the number is
        // still its own.
        let result = unsafe { libc::kill(self.process.id() as libc::pid_t, libc::SIGTERM) };
        assert_eq!(result, 0, "kill");
    }

    /// Waits for its end, which must be a good one, and returns what it has said.
    pub fn end(mut self) -> String {
        let mut status = None;
        wait_until("the example has ended", || {
            status = self.process.try_wait().expect("ask for the child");
            status.is_some()
        });
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("it is UTF-8");
        assert_eq!(status.and_then(|status| status.code()), Some(0), "{text}");
        text
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
