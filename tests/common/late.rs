//! How busy the machine is: how late a thread that only sleeps was at worst. What measures time
//! allows for it.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

static LATE_NS: AtomicU64 = AtomicU64::new(0);

/// Begins to watch, for as long as the process lives.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        thread::spawn(|| {
            loop {
                let since = Instant::now();
                thread::sleep(STEP);
                LATE_NS.fetch_max((since.elapsed() - STEP).as_nanos() as u64, Relaxed);
            }
        });
    });
}

/// Leaves out what has been until now, which was another test's.
pub fn forget() {
    LATE_NS.store(0, Relaxed);
}

/// The worst so far. On the way to a result there may be a few threads and processes, each of
/// which may be as late.
pub fn allowance() -> Duration {
    4 * Duration::from_nanos(LATE_NS.load(Relaxed))
}

/// The CPU time that others take meanwhile: neither this process nor children that it has waited
/// for.
pub struct Others(u64, u64);

impl Others {
    /// The share of it that they may take while something is measured that has no allowance.
    pub const MAX: f64 = 0.1;

    pub fn watch() -> Others {
        let (all, own) = ticks();
        Others(all, own)
    }

    pub fn share(&self) -> f64 {
        let (all, own) = ticks();
        1.0 - (own - self.1) as f64 / (all - self.0) as f64
    }
}

/// How long all processes have run, and this one (proc(5)), in the same unit.
fn ticks() -> (u64, u64) {
    let read = |name| std::fs::read_to_string(name).expect("proc(5) has it");
    let sum = |text: &str, skipped, count| -> u64 {
        let fields = text.split_whitespace().skip(skipped).take(count);
        fields.map(|field| field.parse::<u64>().expect("ticks")).sum()
    };
    let (all, own) = (read("/proc/stat"), read("/proc/self/stat"));
    let all = all.lines().next().expect("the line of all CPUs");
    let own = own.rsplit_once(')').expect("a name").1;
    // User, nice and system, interrupts of both kinds, and what the host has taken away. The own
    // ones are user and system, the soft interrupts that came meanwhile included, and the same of
    // children.
    (sum(all, 1, 3) + sum(all, 6, 3), sum(own, 11, 4))
}

const STEP: Duration = Duration::from_millis(2);
