//! Keys that expire: nobody finds them after their time, and a task removes those that nobody asks
//! for.

use std::time::{Duration, Instant};

use slipring::{cores, task, time};

use crate::Shard;
use crate::store::Store;

impl Store {
    /// How long a key has to live: `None` where there is none, for ever unless it expires.
    pub(crate) fn ttl(&mut self, key: &[u8]) -> Option<Option<Duration>> {
        self.get(key)?;
        let at = self.deadlines.get(key);
        Some(at.map(|at| at.saturating_duration_since(Instant::now())))
    }

    pub(crate) fn expire(&mut self, key: &[u8], after: Duration) -> bool {
        if self.get(key).is_none() {
            return false;
        }
        self.forget_deadline(key);
        let at = Instant::now() + after;
        self.deadlines.insert(Box::from(key), at);
        self.expiring.insert((at, Box::from(key)));
        if !self.sweeping {
            // A core that can't take it removes keys when they are asked for.
            self.sweeping = task::detach("expiry", sweep()).is_ok();
        }
        true
    }

    /// The key is gone, or has another value.
    pub(crate) fn forget_deadline(&mut self, key: &[u8]) {
        if !self.deadlines.is_empty()
            && let Some((key, at)) = self.deadlines.remove_entry(key)
        {
            self.expiring.remove(&(at, key));
        }
    }

    pub(crate) fn remove_expired(&mut self, key: &[u8]) {
        if !self.deadlines.is_empty()
            && self.deadlines.get(key).is_some_and(|at| *at <= Instant::now())
        {
            self.remove(key);
        }
    }

    /// Removes some of those whose time has come, and says after what time to look again, if ever.
    pub(crate) fn sweep(&mut self) -> Option<Duration> {
        for _ in 0..SWEPT_MAX {
            let (at, key) = self.expiring.first()?;
            if *at > Instant::now() {
                return Some(SWEEP_EVERY);
            }
            let key = key.clone();
            self.remove(&key);
        }
        Some(Duration::ZERO)
    }
}

/// Removes what expires, for as long as something does.
async fn sweep() {
    let Ok(shard) = cores::state::<Shard>() else { return };
    loop {
        let pause = shard.borrow_mut().sweep();
        match pause {
            None => return shard.borrow_mut().sweeping = false,
            Some(Duration::ZERO) => task::yield_now().await,
            Some(pause) => time::sleep(pause).await,
        }
    }
}

const SWEPT_MAX: usize = 1000;
const SWEEP_EVERY: Duration = Duration::from_millis(50);
