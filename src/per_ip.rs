//! How many connections each address has, over all cores: a map in shards, for little contention.
//! Only there while `SLIPRING_CONNECTIONS_PER_IP_MAX` is on.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::fmt;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

/// Whom connections are counted for: an IPv4 address, or an IPv6 network of 64 bits, which is what
/// one customer gets and may pick addresses from as he likes (RFC 4291, RFC 6177).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    V4(u32),
    V6(u64),
}

impl Source {
    pub(crate) fn of(addr: IpAddr) -> Source {
        match addr.to_canonical() {
            IpAddr::V4(addr) => Source::V4(addr.to_bits()),
            IpAddr::V6(addr) => Source::V6((addr.to_bits() >> 64) as u64),
        }
    }
}

/// The counts.
pub(crate) struct Sources {
    max: u32,
    /// Seeded at random, so that nobody can choose addresses that collide.
    hasher: RandomState,
    shards: Vec<Mutex<HashMap<Source, u32>>>,
}

impl Sources {
    /// So many connections are allowed for each.
    pub(crate) fn new(max: u32) -> Sources {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Sources { max, hasher: RandomState::new(), shards }
    }

    /// Counts one more connection. False, and nothing counted, when that would be too many.
    pub(crate) fn enter(&self, source: Source) -> bool {
        let mut shard = self.shard(source);
        let count = shard.entry(source).or_insert(0);
        let fits = *count < self.max;
        *count += u32::from(fits);
        fits
    }

    /// One that was counted has ended.
    pub(crate) fn leave(&self, source: Source) {
        if let Entry::Occupied(mut count) = self.shard(source).entry(source) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    /// How many addresses have connections.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap().len()).sum()
    }

    fn shard(&self, source: Source) -> MutexGuard<'_, HashMap<Source, u32>> {
        let shard = &self.shards[self.hasher.hash_one(source) as usize % SHARDS];
        shard.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sources(at most {} each)", self.max)
    }
}

const SHARDS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn source(text: &str) -> Source {
        Source::of(text.parse().unwrap())
    }

    #[test]
    fn an_address_is_one_source_however_it_is_written() {
        assert_eq!(source("192.0.2.7"), source("::ffff:192.0.2.7"));
        assert_ne!(source("192.0.2.7"), source("192.0.2.8"));
        assert_eq!(source("2001:db8:1:2::1"), source("2001:db8:1:2:ffff::9"));
        assert_ne!(source("2001:db8:1:2::1"), source("2001:db8:1:3::1"));
        assert_ne!(source("::1"), source("0.0.0.0"));
    }

    #[test]
    fn one_above_the_limit_is_refused_and_another_source_is_not() {
        let sources = Sources::new(2);
        let (mine, other) = (source("192.0.2.7"), source("192.0.2.8"));
        assert_eq!([mine, mine, mine, other].map(|s| sources.enter(s)), [true, true, false, true]);
        sources.leave(mine);
        assert!(sources.enter(mine));
        for _ in 0..2 {
            sources.leave(mine);
        }
        sources.leave(other);
        assert_eq!(sources.len(), 0, "what is not there takes no memory");
    }

    /// Scenario 62: exact, with several threads at once.
    #[test]
    fn threads_never_have_more_than_the_limit_and_leave_nothing() {
        let sources = Sources::new(10);
        let live = [const { AtomicU32::new(0) }; 3];
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (sources, live) = (&sources, &live);
                scope.spawn(move || {
                    let mut mine = Vec::new();
                    for round in 0..if cfg!(miri) { 100 } else { 20_000_u32 } {
                        let n = (round.wrapping_mul(2_654_435_761) >> 16) + thread;
                        let who = (n % 3) as usize;
                        if n % 7 < 4 && sources.enter(Source::V4(who as u32)) {
                            assert!(live[who].fetch_add(1, Ordering::SeqCst) < 10);
                            mine.push(who);
                        } else if let Some(who) = mine.pop() {
                            live[who].fetch_sub(1, Ordering::SeqCst);
                            sources.leave(Source::V4(who as u32));
                        }
                    }
                    for who in mine {
                        live[who].fetch_sub(1, Ordering::SeqCst);
                        sources.leave(Source::V4(who as u32));
                    }
                });
            }
        });
        assert_eq!(sources.len(), 0);
    }
}
