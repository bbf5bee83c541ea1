//! What does each room of a core cost by itself: table, mailbox, wakers, ring?
//!
//! ```text
//! cargo bench -p slipring-benches --bench rooms [-- table|mailbox|task|core|ring]
//! ```
//!
//! An element is always one operation, or one round trip. Each bench answers one question:
//!
//! * `table`: what do a lookup, a short-lived tenant (`insert_and_remove_lifo`) and the replacement
//!   of any tenant (`remove_random_and_insert`) cost beside so many live ones? Random ids are all
//!   over the table, and independent: the processor may look up the next while it waits for one.
//! * `mailbox`: what does a message cost when no bell is rung, and what does a core pay to say that
//!   it sleeps?
//! * `task`: what do a local wake-up with the poll that it leads to, and a task of its own with its
//!   result, cost on a core? In both, a turn of the core's loop per 256 polls is included. And with
//!   so many live tasks: what does the wake-up alone cost, and what with the poll, of one of the
//!   last thousand tasks (`recent`) and of one of all (`random`), whose memory is in no cache?
//! * `core`: how long does another thread wait for the answer of a core that sleeps, to a task's
//!   waker (`wake_and_answer`) and to a message (`spawn_on_and_answer`)? Ringing the bell and
//!   waking the core's CPU takes nearly all of it, the more so in a virtual machine. The thread
//!   spins meanwhile.
//! * `ring`: what does the cheapest operation cost through a ring with the library's flags, alone
//!   and as one of 64 that share a system call?
//!
//! The core is on CPU 0, everything else on CPU 1.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    hint::{black_box, spin_loop},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use io_uring::{IoUring, opcode};
use slipring::{Config, Handle, Server};

use mailbox::{Bell, Mailbox};
use support::{
    rig,
    ring::{self, Door},
};
use table::{Id, Table};

#[path = "../src/mailbox.rs"]
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "private to the library; the bench uses a part of it, and not its tests"
)]
mod mailbox;

#[path = "../src/table.rs"]
#[allow(dead_code, unused_imports, unreachable_pub, reason = "as above")]
mod table;

/// What the table knows of tokens.
#[path = "../src/token.rs"]
#[allow(dead_code, unused_imports, unreachable_pub, reason = "as above")]
mod token;

#[expect(dead_code, reason = "what pair.rs uses besides")]
mod support {
    pub mod rig;
    pub mod ring;
}

// ---- the table ----

/// A cache line; of the larger entries, too, a visit touches few.
type Tenant = [u64; 8];

fn table(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("table");
    group.throughput(Throughput::Elements(1));
    for live in LIVE {
        group.bench_function(BenchmarkId::new("get_random", live), |bencher| {
            let (table, ids) = filled(live);
            let order: Vec<Id> = random_below(live).into_iter().map(|at| ids[at]).collect();
            let mut turn = 0;
            bencher.iter(|| {
                turn += 1;
                table.get(order[turn % order.len()]).map(|tenant| tenant[0])
            });
        });
        group.bench_function(BenchmarkId::new("insert_and_remove_lifo", live), |bencher| {
            let (mut table, _) = filled(live);
            bencher.iter(|| {
                let id = table.insert(black_box([7; 8]));
                table.remove(black_box(id)).map(|tenant| tenant[0])
            });
        });
        group.bench_function(BenchmarkId::new("remove_random_and_insert", live), |bencher| {
            let (mut table, mut ids) = filled(live);
            let order = random_below(live);
            let mut turn = 0;
            bencher.iter(|| {
                turn += 1;
                let id = &mut ids[order[turn % order.len()]];
                let gone = table.remove(*id).map(|tenant| tenant[0]);
                *id = table.insert(black_box([7; 8]));
                gone
            });
        });
    }
}

fn filled(live: usize) -> (Table<Tenant>, Vec<Id>) {
    let mut table = Table::new();
    let ids = (0..live).map(|number| table.insert([number as u64; 8])).collect();
    (table, ids)
}

/// Numbers made beforehand, so that making them is not measured.
fn random_below(limit: usize) -> Vec<usize> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize % limit
    };
    (0..1 << 20).map(step).collect()
}

// ---- the mailbox ----

/// Fails the bench if it is rung.
struct NoBell;

impl Bell for NoBell {
    fn ring(&self) {
        panic!("the core is awake");
    }
}

fn mailbox(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mailbox");
    group.throughput(Throughput::Elements(1));
    group.bench_function("post_and_take_awake", |bencher| {
        let mailbox = Mailbox::new(NoBell);
        let mut taken = Vec::new();
        bencher.iter(|| {
            mailbox.post(black_box([7_u64; 2])).expect("nobody has closed it");
            mailbox.take(&mut taken);
            taken.pop()
        });
    });
    group.bench_function("take_nothing", |bencher| {
        let mailbox = Mailbox::<u64, _>::new(NoBell);
        let mut taken = Vec::new();
        bencher.iter(|| black_box(&mailbox).take(&mut taken));
    });
    group.bench_function("fall_asleep_and_wake_up", |bencher| {
        let mailbox = Mailbox::<u64, _>::new(NoBell);
        bencher.iter(|| {
            let sleeps = black_box(&mailbox).fall_asleep();
            mailbox.wake_up();
            sleeps
        });
    });
}

// ---- a core, through the public interface ----

fn core(criterion: &mut Criterion) {
    let config = Config::default().cpus("0").tasks_max(2_000_000);
    let server = Server::new(config).start().expect("a core can start");
    let handle = server.handle();
    rig::pin(1).expect("there is a CPU 1");
    on_the_core(criterion, &handle);
    from_outside(criterion, &handle);
    handle.begin_drain(PATIENCE);
    server.join().expect("the core has not failed");
}

fn on_the_core(criterion: &mut Criterion, handle: &Handle) {
    let mut group = criterion.benchmark_group("task");
    group.throughput(Throughput::Elements(1));
    group.bench_function("local_wake_and_poll", |bencher| {
        bencher.iter_custom(|iterations| {
            time_on(handle, move || async move {
                for _ in 0..iterations {
                    slipring::task::yield_now().await;
                }
            })
        });
    });
    // One task woken again and again is polled once.
    for live in LIVE.into_iter().skip(1) {
        let (sender, crowd) = mpsc::channel();
        let gather = move || async move { drop(sender.send(Crowd::gather(live).await)) };
        handle.spawn_on(0, gather).expect("the core runs");
        let crowd = Arc::new(crowd.recv_timeout(PATIENCE).expect("the core answers"));
        for (among, last) in [("recent", live.min(1_000)), ("random", live)] {
            for (what, polls) in [("wake", false), ("wake_and_poll", true)] {
                let name = BenchmarkId::new(format!("local_{what}_{among}"), live);
                group.bench_function(name, |bencher| {
                    bencher.iter_custom(|iterations| {
                        let (sender, spent) = mpsc::channel();
                        let crowd = Arc::clone(&crowd);
                        let wake = move || async move {
                            let _ = sender.send(crowd.wake(iterations, last, polls).await);
                        };
                        handle.spawn_on(0, wake).expect("the core runs");
                        spent.recv_timeout(PATIENCE).expect("the core answers")
                    });
                });
            }
        }
        time_on(handle, move || async move { crowd.end() });
    }
    group.bench_function("spawn_and_join", |bencher| {
        bencher.iter_custom(|iterations| {
            time_on(handle, move || async move {
                for number in 0..iterations {
                    let task = slipring::task::spawn(async move { number }).expect("on a core");
                    assert_eq!(task.await.expect("it does not panic"), number);
                }
            })
        });
    });
}

/// Tasks of the core that do nothing but wait to be woken.
struct Crowd {
    wakers: Vec<Waker>,
    over: Arc<AtomicBool>,
}

impl Crowd {
    async fn gather(count: usize) -> Crowd {
        let (wakers, over) = (Rc::new(RefCell::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        for _ in 0..count {
            let (wakers, over) = (Rc::clone(&wakers), Arc::clone(&over));
            let mut is_new = true;
            let task = poll_fn(move |context| {
                if std::mem::take(&mut is_new) {
                    wakers.borrow_mut().push(context.waker().clone());
                }
                if over.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending }
            });
            // Nobody waits for it.
            drop(slipring::task::spawn(task).expect("on a core"));
        }
        while wakers.borrow().len() < count {
            slipring::task::yield_now().await;
        }
        let wakers = wakers.take();
        Crowd { wakers, over }
    }

    /// Each task ends when it is next polled.
    fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.wakers.iter().for_each(Waker::wake_by_ref);
    }

    /// The time of so many wake-ups of tasks among the last, or of the polls as well.
    async fn wake(&self, wakes: u64, last: usize, polls: bool) -> Duration {
        let order = random_below(last);
        let first = self.wakers.len() - last;
        let mut spent = Duration::ZERO;
        let mut done = 0;
        while done < wakes {
            let batch = (wakes - done).min(BATCH) as usize;
            let from = done as usize % (order.len() - BATCH as usize);
            // Looking up the wakers is not measured.
            let batch: Vec<&Waker> =
                order[from..][..batch].iter().map(|at| &self.wakers[first + at]).collect();
            let start = Instant::now();
            batch.iter().for_each(|waker| waker.wake_by_ref());
            let woken = start.elapsed();
            // All of them are polled before this task is again.
            slipring::task::yield_now().await;
            spent += if polls { start.elapsed() } else { woken };
            done += batch.len() as u64;
        }
        spent
    }
}

/// How long a future takes on the core, by the core's own look at the clock.
fn time_on<M, F>(handle: &Handle, make: M) -> Duration
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = ()> + 'static,
{
    let (sender, spent) = mpsc::channel();
    let timed = move || async move {
        let future = make();
        let start = Instant::now();
        future.await;
        // Nobody listens any more only after PATIENCE.
        let _ = sender.send(start.elapsed());
    };
    handle.spawn_on(0, timed).expect("the core runs");
    spent.recv_timeout(PATIENCE).expect("the core answers")
}

fn from_outside(criterion: &mut Criterion, handle: &Handle) {
    let mut group = criterion.benchmark_group("core");
    group.throughput(Throughput::Elements(1));
    let peer = Peer::start(handle);
    group.bench_function("wake_and_answer", |bencher| {
        bencher.iter_custom(|iterations| time_asleep(iterations, || peer.trip()));
    });
    let (sender, answers) = mpsc::channel();
    let message = || {
        let sender = sender.clone();
        let answer = move || async move { sender.send(()).expect("this thread waits for it") };
        handle.spawn_on(0, answer).expect("the core runs");
        // Blocked, this thread would have to be woken, too.
        while answers.try_recv().is_err() {
            spin_loop();
        }
    };
    group.bench_function("spawn_on_and_answer", |bencher| {
        bencher.iter_custom(|iterations| time_asleep(iterations, message));
    });
}

/// The time of round trips, each begun when the core has had time to block: it does so at once,
/// but a message that comes before would ring no bell.
fn time_asleep(iterations: u64, trip: impl Fn()) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..iterations {
        let idle = Instant::now();
        while idle.elapsed() < TO_FALL_ASLEEP {
            spin_loop();
        }
        let start = Instant::now();
        trip();
        spent += start.elapsed();
    }
    spent
}

/// A task on the core that answers whenever this thread uses its waker.
struct Peer {
    counts: Arc<Counts>,
    waker: Waker,
}

#[derive(Default)]
struct Counts {
    /// `END` ends the task.
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Peer {
    fn start(handle: &Handle) -> Peer {
        let counts = Arc::new(Counts::default());
        let theirs = Arc::clone(&counts);
        let (sender, waker) = mpsc::channel();
        let answer = move || {
            poll_fn(move |context| match theirs.asked.load(Ordering::Acquire) {
                END => Poll::Ready(()),
                asked => {
                    if asked == 0 {
                        // A task's waker stays the same, so once is enough.
                        drop(sender.send(context.waker().clone()));
                    }
                    theirs.answered.store(asked, Ordering::Release);
                    Poll::Pending
                }
            })
        };
        handle.spawn_on(0, answer).expect("the core runs");
        Peer { counts, waker: waker.recv_timeout(PATIENCE).expect("the core answers") }
    }

    fn trip(&self) {
        let asked = self.counts.asked.load(Ordering::Relaxed) + 1;
        self.counts.asked.store(asked, Ordering::Release);
        self.waker.wake_by_ref();
        while self.counts.answered.load(Ordering::Acquire) != asked {
            spin_loop();
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.counts.asked.store(END, Ordering::Release);
        self.waker.wake_by_ref();
    }
}

// ---- the ring ----

fn ring(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    group.throughput(Throughput::Elements(1));
    for batch in [1, 64] {
        group.bench_function(BenchmarkId::new("nop_submit_and_reap", batch), |bencher| {
            let (mut uring, fd) = ring::open_with_fd(512, 4096).expect("a ring can be had");
            bencher.iter_custom(|iterations| nops(&mut uring, fd, iterations as usize, batch));
        });
    }
}

/// The time of so many operations, `batch` of them for each system call.
fn nops(uring: &mut IoUring, fd: i32, operations: usize, batch: usize) -> Duration {
    let (submitter, mut queue, mut completions) = uring.split();
    let mut door = Door::new(submitter, fd);
    let mut left = operations;
    let start = Instant::now();
    while left > 0 {
        let count = left.min(batch);
        for number in 0..count {
            let nop = opcode::Nop::new().build().user_data(number as u64);
            // SAFETY: a NOP points to nothing.
            unsafe { queue.push(&nop) }.expect("the queue has room for a batch");
        }
        queue.sync();
        door.enter(count, count as u32).expect("the kernel takes the batch");
        completions.sync();
        let reaped = completions.by_ref().map(|completion| completion.result()).filter(|&r| r == 0);
        assert_eq!(reaped.count(), count, "each operation completes at once");
        left -= count;
    }
    start.elapsed()
}

fn config() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
}

criterion_group! {
    name = benches;
    config = config();
    targets = table, mailbox, core, ring
}
criterion_main!(benches);

const LIVE: [usize; 3] = [1, 10_000, 1_000_000];
const END: u64 = u64::MAX;
/// Wake-ups in a row; fewer than the polls of a turn.
const BATCH: u64 = 250;
/// Far more than the core needs to block once it has answered.
const TO_FALL_ASLEEP: Duration = Duration::from_micros(20);
/// A core that hangs must not hang the bench.
const PATIENCE: Duration = Duration::from_secs(60);
