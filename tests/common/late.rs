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

/// The worst so far. On the way to a result there may be a few threads and processes, each of
/// which may be as late.
pub fn allowance() -> Duration {
    4 * Duration::from_nanos(LATE_NS.load(Relaxed))
}

const STEP: Duration = Duration::from_millis(2);
