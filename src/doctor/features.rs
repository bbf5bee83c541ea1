//! The features of io_uring that the driver uses, each with a way to try it and what it is worth.

use std::thread;
use std::time::Duration;

use crate::refusal::RingAsked;
use crate::sys::probe::{self, feature, setup};

/// What the kernel said to the rings that were tried.
pub(super) struct Answers {
    /// A ring with all flags that the driver cannot do without, or the errno of its refusal.
    pub(super) ring: Result<(), i32>,
    pub(super) features: Vec<(&'static Feature, Answer)>,
}

impl Answers {
    pub(super) fn ask() -> Answers {
        let plain = patiently(|| probe::setup_flags_accepted(0, SMALL, 0));
        let answer = |feature: &Feature| match plain.map(|bits| patiently(|| (feature.ask)(bits))) {
            Err(_) => Answer::NotAsked,
            Ok(Ok(())) => Answer::Present,
            Ok(Err(libc::EINVAL | libc::EOPNOTSUPP)) => Answer::Missing,
            Ok(Err(errno)) => Answer::Failed(errno),
        };
        let features = FEATURES.iter().map(|feature| (feature, answer(feature))).collect();
        let RingAsked { flags, sq_entries, cq_entries } = DRIVER_RING;
        // Where no ring at all is to be had, that errno says more than one about these flags.
        let whole = || probe::setup_flags_accepted(flags, sq_entries, cq_entries);
        Answers { ring: plain.and_then(|_| patiently(whole)).map(|_| ()), features }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Present,
    Missing,
    /// The attempt ended in an errno that does not speak about the feature.
    Failed(i32),
    /// There was no ring to try it on.
    NotAsked,
}

/// Something of io_uring's that the driver uses.
#[derive(Debug)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    /// The kernel release that brought it: for people to read, never compared with.
    pub(super) since: &'static str,
    /// Whether the driver cannot do without it.
    pub(super) needed: bool,
    /// What its absence costs.
    pub(super) costs: &'static str,
    /// Tries it; is told the kernel's feature bits.
    ask: fn(u32) -> Result<(), i32>,
}

/// Asks again when memory is short: a closed ring gives back what it was charged a little later,
/// and many rings are closed here in a short time.
fn patiently<T>(ask: impl Fn() -> Result<T, i32>) -> Result<T, i32> {
    for _ in 0..ATTEMPTS_MAX - 1 {
        match ask() {
            Err(libc::ENOMEM) => thread::sleep(PAUSE),
            answer => return answer,
        }
    }
    ask()
}

fn accepts(flags: u32) -> Result<(), i32> {
    probe::setup_flags_accepted(flags, SMALL, 0).map(|_| ())
}

fn has(bits: u32, bit: u32) -> Result<(), i32> {
    if bits & bit == 0 { Err(libc::EINVAL) } else { Ok(()) }
}

/// The ring of one core: the driver's flags, and the sizes that `Config` has by default.
pub(super) const DRIVER_RING: RingAsked = RingAsked {
    flags: setup::SINGLE_ISSUER
        | setup::DEFER_TASKRUN
        | setup::SUBMIT_ALL
        | setup::TASKRUN_FLAG
        | setup::CQSIZE
        | setup::CLAMP,
    sq_entries: 512,
    cq_entries: 4096,
};

/// The entries of a ring on which one feature is tried.
const SMALL: u32 = 8;

const ATTEMPTS_MAX: u32 = 4;
const PAUSE: Duration = Duration::from_millis(10);

const NEEDED: &str = "slipring cannot do without it";

pub(super) static FEATURES: [Feature; 15] = [
    Feature {
        name: "operations",
        since: "5.6",
        needed: true,
        costs: "slipring cannot do without ACCEPT, RECV, RECVMSG, SEND, SENDMSG, CONNECT, \
                POLL_ADD, TIMEOUT, ASYNC_CANCEL and FILES_UPDATE",
        ask: |_| probe::operations(),
    },
    Feature {
        name: "SUBMIT_ALL",
        since: "5.18",
        needed: true,
        costs: NEEDED,
        ask: |_| accepts(setup::SUBMIT_ALL),
    },
    Feature {
        name: "SINGLE_ISSUER",
        since: "6.0",
        needed: true,
        costs: NEEDED,
        ask: |_| accepts(setup::SINGLE_ISSUER),
    },
    Feature {
        name: "DEFER_TASKRUN",
        since: "6.1",
        needed: true,
        costs: NEEDED,
        ask: |_| accepts(setup::SINGLE_ISSUER | setup::DEFER_TASKRUN),
    },
    Feature {
        name: "TASKRUN_FLAG",
        since: "5.19",
        needed: true,
        costs: NEEDED,
        ask: |_| accepts(setup::COOP_TASKRUN | setup::TASKRUN_FLAG),
    },
    Feature {
        name: "EXT_ARG",
        since: "5.11",
        needed: true,
        costs: NEEDED,
        ask: |bits| has(bits, feature::EXT_ARG),
    },
    Feature {
        name: "multishot receive",
        since: "6.0",
        needed: true,
        costs: NEEDED,
        ask: |_| probe::multishot_recv(),
    },
    Feature {
        name: "buffer rings",
        since: "5.19",
        needed: true,
        costs: "slipring cannot do without it (some builds of \
                Ubuntu's 6.8 reject it by mistake: upgrade)",
        ask: |_| probe::buffer_ring(),
    },
    Feature {
        name: "multishot recvmsg",
        since: "6.0",
        needed: false,
        costs: "UDP sockets receive nothing",
        ask: |_| probe::multishot_recvmsg(),
    },
    Feature {
        name: "synchronous cancel",
        since: "6.0",
        needed: false,
        costs: "a core that ends waits in vain for what is in flight, and leaks the memory of that",
        ask: |_| probe::synchronous_cancel(),
    },
    Feature {
        name: "registered ring",
        since: "5.18",
        needed: false,
        costs: "each turn of a core looks its ring's descriptor up",
        ask: |_| probe::registered_ring_fd(),
    },
    Feature {
        name: "NO_SQARRAY",
        since: "6.6",
        needed: false,
        costs: "each submission goes through one more table",
        ask: |_| accepts(setup::NO_SQARRAY),
    },
    Feature {
        name: "accept poll-first",
        since: "6.10",
        needed: false,
        costs: "each accept is tried once in vain, and a system call asks whether more \
                connections are queued",
        ask: |bits| has(bits, feature::RECVSEND_BUNDLE),
    },
    Feature {
        name: "direct descriptors",
        // Of 6.13, which had no bit of its own, nothing tells.
        since: "6.15",
        needed: false,
        costs: "each send looks its socket's descriptor up: some 60 ns on several cores",
        ask: |bits| has(bits, feature::NO_IOWAIT).and_then(|()| probe::direct_descriptors()),
    },
    Feature {
        name: "NO_IOWAIT",
        since: "6.15",
        needed: false,
        costs: "an idle server shows as iowait in top and in pressure figures",
        ask: |bits| has(bits, feature::NO_IOWAIT),
    },
];

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::machine::Facts;

    /// The driver asks for some of them in its own way; the doctor is to say what it will find.
    #[test]
    fn a_kernel_has_all_that_its_release_and_those_before_it_brought() {
        const TEST: &str = "a_kernel_has_all_that_its_release_and_those_before_it_brought";
        let number = |release: &str| {
            let (major, minor) = release.split_once('.').expect("two numbers");
            (major.parse().expect("a number"), minor.parse().expect("a number"))
        };
        let asking = thread::spawn(Answers::ask);
        let Answers { ring, features } = asking.join().expect("no panic");
        if let Err(errno) = ring {
            let why = format!("NOT RUN: {TEST}: no ring is to be had, errno {errno}\n");
            let _ = std::io::stderr().write_all(why.as_bytes());
            return;
        }
        let kernel: (u32, u32) = Facts::read().kernel().expect("a release");
        for (feature, answer) in features {
            let due = kernel >= number(feature.since);
            assert!(!due || answer == Answer::Present, "{}: {answer:?}", feature.name);
        }
    }

    #[test]
    fn whatever_differs_among_the_kernels_that_are_supported_is_told_of() {
        for name in ["accept poll-first", "direct descriptors", "NO_SQARRAY", "NO_IOWAIT"] {
            let feature = FEATURES.iter().find(|feature| feature.name == name);
            let feature = feature.unwrap_or_else(|| panic!("{name} is not listed"));
            assert!(!feature.needed && feature.costs != NEEDED, "{feature:?}");
        }
    }
}
