//! A link of its own for a test: a veth pair between two network namespaces, in a child process
//! that this binary runs itself in. The server's side is the child's own namespace; the peers' is
//! that of one thread. Nothing outlives the child, and the child outlives neither its time nor
//! the test.
//!
//! The link carries many subnets, `10.77.n.0/24`, so that one peer can vanish while others stay.
//! Neighbours are entered for good: nobody asks with ARP, so nobody hears that there is no answer.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::{child, late, not_run};

/// Both ends of the link.
pub struct World {
    /// Runs things in the peers' namespace.
    far: Mutex<Sender<Job>>,
}

type Job = Box<dyn FnOnce() + Send>;

/// Runs the test of that name in a child process with a link of its own. Where none can be had,
/// it says so on the standard error, runs nothing, and returns false.
#[track_caller]
pub fn in_a_world(test: &str, body: impl FnOnce(&World)) -> bool {
    if child::role().is_some() {
        body(&World::make());
        return true;
    }
    let Some(unshare) = how_to_unshare(test) else { return false };
    let through: Vec<&str> = [&["unshare"], unshare].concat();
    let (succeeded, words) = child::run(child::again(test, "world", &through));
    println!("{words}");
    assert!(succeeded, "in its namespaces: {words}");
    true
}

/// The arguments of unshare(1) that work here: as root, or in a user namespace of our own.
fn how_to_unshare(test: &str) -> Option<&'static [&'static str]> {
    const WAYS: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let mut refusals = Vec::new();
    for way in WAYS {
        let probe = Command::new("unshare")
            .args(way)
            .args(["ip", "link"])
            .env("PATH", child::path())
            .output();
        match probe {
            Ok(output) if output.status.success() => return Some(way),
            Ok(output) => refusals.push(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => refusals.push(error.to_string()),
        }
    }
    not_run(test, format!("no network namespace can be made here: {}", refusals.concat()));
    None
}

impl World {
    fn make() -> World {
        let (far, jobs) = channel::<Job>();
        let (named, name) = channel();
        thread::spawn(move || {
            // SAFETY: takes an integer, and moves this thread alone to a namespace of its own.
            let made = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(made, 0, "unshare: {}", std::io::Error::last_os_error());
            // SAFETY: has no argument.
            named.send(unsafe { libc::gettid() }).expect("the test waits for it");
            jobs.into_iter().for_each(|job| job());
        });
        let thread = name.recv().expect("the peers' thread has its namespace").to_string();
        late::watch();
        let world = World { far: Mutex::new(far) };
        ip("link set lo up");
        ip(&format!(
            "link add near address {NEAR} type veth peer name far address {FAR} netns {thread}"
        ));
        ip("link set near up");
        world.far(|| {
            // A router would tell of addresses that are gone.
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("be no router");
            ip("link set lo up");
            ip("link set far up");
        });
        world
    }

    /// Makes subnet `n`, with an address on each side. Returns the server's, with a port for it.
    pub fn subnet(&self, n: u8) -> SocketAddr {
        ip(&format!("addr add 10.77.{n}.1/24 dev near"));
        ip(&format!("neigh replace 10.77.{n}.2 lladdr {FAR} dev near nud permanent"));
        self.far(move || {
            ip(&format!("addr add 10.77.{n}.2/24 dev far"));
            ip(&format!("neigh replace 10.77.{n}.1 lladdr {NEAR} dev far nud permanent"));
        });
        (Ipv4Addr::new(10, 77, n, 1), 7000).into()
    }

    /// From now on, everything that is sent to the peer of subnet `n` is lost without a word.
    pub fn vanish(&self, n: u8) {
        self.far(move || ip(&format!("addr del 10.77.{n}.2/24 dev far")));
    }

    /// The peer of subnet `n` is there again.
    pub fn reappear(&self, n: u8) {
        self.far(move || ip(&format!("addr add 10.77.{n}.2/24 dev far")));
    }

    /// Runs `work` among the peers. Sockets that it makes may be used anywhere.
    pub fn far<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let job = Box::new(move || drop(done.send(work())));
        let far = self.far.lock().unwrap_or_else(PoisonError::into_inner);
        far.send(job).expect("the peers' thread is there");
        drop(far);
        result.recv().expect("no panic among the peers")
    }
}

/// Runs ip(8) in the namespace of the thread that calls it.
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("run ip(8)");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {complaint}");
}

/// The two ends of the link.
const NEAR: &str = "02:00:00:00:00:01";
const FAR: &str = "02:00:00:00:00:02";
