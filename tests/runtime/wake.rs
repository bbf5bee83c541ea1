//! Tasks, wakers and time: wakes from other threads under load, none lost and none too many; what
//! a drain does with tasks; sleeps that are never early and not late.
//!
//! The futures are written by hand, so that nothing but slipring is tested.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::common::{config, connect, echo_server, limit, start, wait_until};
use slipring::time::{interval, sleep, timeout};
use slipring::{Closing, ErrorKind, Server, task};

const WAKES: u64 = 100_000;
const TASKS: u64 = 32;
const WAKERS: usize = 4;

#[test]
fn no_wake_of_another_thread_is_lost() {
    let (running, _) = echo_server(config());
    let cores = running.handle().stats().cores().len();
    let (threads, senders) = foreign_threads();
    let rounds = WAKES * crate::common::length() / (TASKS * cores as u64);
    let done = Arc::new(AtomicU64::new(0));
    for number in 0..TASKS * cores as u64 {
        let (senders, done) = (senders.clone(), Arc::clone(&done));
        let make = move || async move {
            for round in 0..rounds {
                let shot = OneShot::default();
                let thread = (number + round) as usize % WAKERS;
                senders[thread].send(shot.clone()).expect("the thread is up");
                assert_eq!(shot.await, thread);
            }
            done.fetch_add(1, SeqCst);
        };
        running.handle().spawn_on(number as usize % cores, make).expect("it is up");
    }
    drop(senders);
    let give_up = Instant::now() + limit(60_000) * crate::common::length() as u32;
    while done.load(SeqCst) < TASKS * cores as u64 {
        let left = running.handle().stats().total().tasks;
        assert!(Instant::now() < give_up, "{left} tasks wait for a wake that was lost");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Their tasks are gone; then their cores are, too.
    let late: Vec<Waker> = threads.into_iter().flat_map(|it| it.join().expect("ends")).collect();
    late.iter().for_each(Waker::wake_by_ref);
    wait_until("no task is left", || running.handle().stats().total().tasks == 0);
    running.handle().begin_drain(limit(1_000));
    let report = running.join().expect("the cores have survived");
    assert_eq!((report.total().panics, report.total().tasks_forced), (0, 0), "{report}");
    late.iter().for_each(Waker::wake_by_ref);
    late.into_iter().for_each(Waker::wake);
}

/// Threads that complete what they are sent, at once or a moment later, and wake some twice. Each
/// returns some of the wakers it has seen.
fn foreign_threads() -> (Vec<JoinHandle<Vec<Waker>>>, Vec<mpsc::Sender<OneShot>>) {
    let start = |thread| {
        let (sender, receiver) = mpsc::channel::<OneShot>();
        let work = move || {
            let mut kept = Vec::new();
            for (count, shot) in receiver.into_iter().enumerate() {
                for _ in 0..count % 64 {
                    std::hint::spin_loop();
                }
                let Some(waker) = shot.complete(thread) else { continue };
                if count % 7 == 0 {
                    waker.wake_by_ref();
                }
                if count % 100 == 0 {
                    kept.push(waker.clone());
                }
                waker.wake();
            }
            kept
        };
        (std::thread::spawn(work), sender)
    };
    (0..WAKERS).map(start).unzip()
}

#[test]
fn a_combinator_with_wakers_of_its_own_gets_every_result() {
    let results = on_core(|| async {
        let started = Instant::now();
        let naps = (0..50u64).map(|n| async move {
            sleep(Duration::from_millis(n % 10 * 5)).await;
            task::yield_now().await;
            n
        });
        let results = join_all(naps.collect()).await;
        (results, started.elapsed())
    });
    assert_eq!(results.0, (0..50).collect::<Vec<_>>());
    assert!(results.1 >= Duration::from_millis(45) && results.1 < limit(500), "{results:?}");
}

/// Some combinators make a waker for each poll. Replacing one must not count as news.
#[test]
fn a_fresh_waker_at_each_poll_does_not_make_a_task_spin() {
    let polls = on_core(|| async {
        let mut polls = 0;
        let mut nap = std::pin::pin!(sleep(Duration::from_millis(200)));
        let mut early = std::pin::pin!(sleep(Duration::from_millis(50)));
        let mut is_early = true;
        poll_fn(|cx| {
            polls += 1;
            is_early = is_early && early.as_mut().poll(cx).is_pending();
            let fresh = Waker::from(Arc::new(Relay(cx.waker().clone())));
            nap.as_mut().poll(&mut Context::from_waker(&fresh))
        })
        .await;
        polls
    });
    assert!(polls < 10, "{polls} polls for two timers");
}

#[test]
fn a_task_can_be_joined_and_aborted() {
    on_core(|| async {
        static DROPPED: AtomicU64 = AtomicU64::new(0);
        let answer = task::spawn(async { 42 }).expect("spawn");
        assert_eq!(answer.await.expect("the answer"), 42);

        let guard = OnDrop(&DROPPED);
        let endless = task::spawn(async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        let endless = endless.expect("spawn");
        task::yield_now().await;
        assert!(!endless.is_finished());
        endless.abort();
        assert!(endless.is_finished());
        assert_eq!(DROPPED.load(SeqCst), 1);
        assert_eq!(endless.await.expect_err("aborted").kind(), ErrorKind::Closed);

        let own: Rc<RefCell<Option<task::JoinHandle<()>>>> = Rc::default();
        let (mine, guard) = (Rc::clone(&own), OnDrop(&DROPPED));
        let suicide = task::spawn(async move {
            let _guard = guard;
            mine.borrow().as_ref().expect("it is there").abort();
            std::future::pending::<()>().await;
        });
        *own.borrow_mut() = Some(suicide.expect("spawn"));
        while DROPPED.load(SeqCst) < 2 {
            task::yield_now().await;
        }
        let suicide = own.borrow_mut().take().expect("it is there");
        assert_eq!(suicide.await.expect_err("aborted").kind(), ErrorKind::Closed);

        let panics = task::spawn(async { panic!("on purpose, in a task") });
        let error = panics.expect("spawn").await.map(|(): ()| ()).expect_err("it panicked");
        assert_eq!(error.kind(), ErrorKind::Closed);
    });
}

/// Case 42.
#[test]
fn tasks_that_yield_for_ever_starve_nobody() {
    let (running, addr) = echo_server(config());
    let stop = Arc::new(AtomicBool::new(false));
    for core in 0..running.handle().stats().cores().len() {
        let stop = Arc::clone(&stop);
        let spin = move || async move {
            while !stop.load(SeqCst) {
                task::yield_now().await;
            }
        };
        running.handle().spawn_on(core, spin).expect("it is up");
    }
    let mut client = connect(addr);
    let mut times: Vec<Duration> = (0..500)
        .map(|_| {
            let since = Instant::now();
            ask(&mut client, b"x");
            since.elapsed()
        })
        .collect();
    times.sort();
    stop.store(true, SeqCst);
    drop(client);
    running.handle().begin_drain(limit(2_000));
    assert_eq!(running.join().expect("the report").total().tasks_forced, 0);
    assert!(times[495] < limit(50), "p50 {:?}, p99 {:?}", times[250], times[495]);
}

#[test]
fn a_child_is_dropped_with_its_connection_and_a_task_is_waited_for() {
    static CHILD: AtomicU64 = AtomicU64::new(0);
    static DONE: AtomicU64 = AtomicU64::new(0);
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn| async move {
            let guard = OnDrop(&CHILD);
            conn.spawn(async move {
                sleep(Duration::from_secs(60)).await;
                drop(guard);
            })?;
            task::spawn(async {
                assert_eq!(task::draining().await.expect("a core"), Closing::Draining);
                sleep(Duration::from_millis(300)).await;
                DONE.fetch_add(1, SeqCst);
            })?;
            conn.write(b"x").await
        }));
    let mut client = connect(addr);
    ask(&mut client, b"");
    drop(client);
    wait_until("the child is dropped", || CHILD.load(SeqCst) == 1);
    wait_until("the task alone is left", || running.handle().stats().total().tasks == 1);
    let since = Instant::now();
    let report = running.handle().drain(limit(5_000)).expect("a report");
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(300) && took < limit(1_000), "{took:?} {report}");
    assert_eq!((DONE.load(SeqCst), report.total().tasks_forced), (1, 0), "{report}");
    let outside = std::pin::pin!(task::draining());
    let mut cx = Context::from_waker(Waker::noop());
    let Poll::Ready(Err(error)) = outside.poll(&mut cx) else { panic!("no core here") };
    assert_eq!(error.kind(), ErrorKind::Misuse);
}

#[test]
fn each_of_several_tasks_hears_that_their_connection_is_closing() {
    static HEARD: AtomicU64 = AtomicU64::new(0);
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", |mut conn| async {
        conn.write(b"x").await?;
        let conn = Rc::new(conn);
        for _ in 0..3 {
            let shared = Rc::clone(&conn);
            task::spawn(async move {
                shared.closing().await;
                HEARD.fetch_add(1, SeqCst);
            })?;
        }
        Ok(())
    }));
    let mut client = connect(addr);
    ask(&mut client, b"x");
    let report = running.handle().drain(limit(500)).expect("a report");
    assert_eq!(HEARD.load(SeqCst), 3, "{report}");
}

#[test]
fn a_sleep_is_never_early_and_not_late() {
    const SLEEPS: usize = 1_000;
    let seed = std::env::var("RING_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut seed: u64 = seed.unwrap_or_else(|| std::process::id().into());
    println!("RING_TEST_SEED={seed}");
    let mut late = on_core(move || async move {
        let naps = (0..SLEEPS).map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let duration = Duration::from_micros((seed >> 33) % 50_000);
            task::spawn(async move {
                let since = Instant::now();
                sleep(duration).await;
                since.elapsed().checked_sub(duration).expect("not early")
            })
        });
        let naps: Vec<_> = naps.map(|nap| nap.expect("spawn")).collect();
        let mut late = Vec::new();
        for nap in naps {
            late.push(nap.await.expect("it does not panic"));
        }
        late
    });
    late.sort();
    let (median, most) = (late[SLEEPS / 2], late[SLEEPS - 1]);
    assert!(median < limit(3) && most < limit(100), "median {median:?}, most {most:?}");
}

#[test]
fn a_timeout_ends_what_takes_too_long_and_nothing_else() {
    on_core(|| async {
        static DROPPED: AtomicU64 = AtomicU64::new(0);
        let guard = OnDrop(&DROPPED);
        let since = Instant::now();
        let slow = timeout(Duration::from_millis(30), async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        assert_eq!(slow.await.expect_err("too slow").kind(), ErrorKind::TimedOut);
        let took = since.elapsed();
        assert!(took >= Duration::from_millis(30) && took < limit(100), "{took:?}");
        assert_eq!(DROPPED.load(SeqCst), 1);
        let fast = timeout(Duration::MAX, async {
            task::yield_now().await;
            7
        });
        assert_eq!(fast.await.expect("fast enough"), 7);
        let nap = timeout(Duration::from_millis(20), sleep(Duration::MAX)).await;
        assert!(nap.is_err(), "as long as it gets");
        sleep(Duration::ZERO).await;
    });
}

#[test]
fn an_interval_keeps_its_beat_and_makes_up_for_nothing() {
    on_core(|| async {
        let (since, period) = (Instant::now(), Duration::from_millis(20));
        let mut beat = interval(period);
        for tick in 1..=5 {
            beat.tick().await;
            let at = since.elapsed();
            assert!(at >= period * tick && at < period * tick + limit(18), "{tick}: {at:?}");
        }
        std::thread::sleep(period * 7 / 2);
        let missed = since.elapsed();
        beat.tick().await;
        assert!(since.elapsed() < missed + limit(15), "the missed ones are one tick, at once");
        beat.tick().await;
        let phase = since.elapsed().as_micros() % period.as_micros();
        assert!(phase < limit(15).as_micros(), "{phase} us after its beat");
    });
}

#[test]
fn a_sleep_outside_of_a_core_says_where_it_belongs() {
    let poll = || {
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(&mut sleep(Duration::from_millis(1))).poll(&mut cx)
    };
    let panic = std::panic::catch_unwind(poll).expect_err("it panics");
    let text = panic.downcast_ref::<String>().expect("text");
    assert!(text.contains("no core of a slipring server"), "{text}");
    let error = task::spawn(async {}).map(drop).expect_err("no core here");
    assert_eq!(error.kind(), ErrorKind::Misuse);
}

/// A waker may be kept in a place of a thread, and used when that is torn down. A panic there
/// aborts the process, hence one of its own.
#[test]
fn a_waker_may_be_used_by_the_destructors_of_a_thread() {
    if std::env::var_os("RING_TEST_CHILD").is_none() {
        let child = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "wake::a_waker_may_be_used_by_the_destructors_of_a_thread"])
            .env("RING_TEST_CHILD", "1")
            .output()
            .expect("start this test again");
        let text = String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success(), "{:?} {text}", child.status);
        return;
    }
    struct WakeOnDrop(Waker);
    impl Drop for WakeOnDrop {
        fn drop(&mut self) {
            self.0.wake_by_ref();
        }
    }
    thread_local! {
        static KEPT: RefCell<Option<WakeOnDrop>> = const { RefCell::new(None) };
    }
    let woken = on_core(|| async {
        let shot = OneShot::default();
        let there = shot.clone();
        let mut thread = None;
        let mut shot = std::pin::pin!(shot);
        poll_fn(|cx| {
            let waker = cx.waker().clone();
            let there = there.clone();
            thread.get_or_insert_with(|| {
                std::thread::spawn(move || {
                    KEPT.with(|kept| *kept.borrow_mut() = Some(WakeOnDrop(waker.clone())));
                    waker.wake_by_ref();
                    // Whoever waits for this is woken by the destructor alone.
                    there.0.lock().expect("no panic").0 = Some(7);
                })
            });
            shot.as_mut().poll(cx)
        })
        .await
    });
    assert_eq!(woken, 7);
}

/// Runs a future on a core of a server of its own, and returns what it does.
fn on_core<T: Send + 'static, F: Future<Output = T> + 'static>(
    make: impl FnOnce() -> F + Send + 'static,
) -> T {
    let (running, _) = echo_server(config());
    let (sender, receiver) = mpsc::channel();
    let task = move || async move {
        let _ = sender.send(make().await);
    };
    running.handle().spawn_on(0, task).expect("it is up");
    let result = receiver.recv_timeout(limit(20_000)).expect("it ends, and does not panic");
    running.handle().begin_drain(limit(1_000));
    running.join().expect("the core survives");
    result
}

/// Something that another thread will complete.
#[derive(Clone, Default)]
struct OneShot(Arc<Mutex<(Option<usize>, Option<Waker>)>>);

impl OneShot {
    /// Stores the value and returns whom to wake.
    fn complete(&self, value: usize) -> Option<Waker> {
        let mut shot = self.0.lock().expect("no panic");
        shot.0 = Some(value);
        shot.1.take()
    }
}

impl Future for OneShot {
    type Output = usize;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<usize> {
        let mut shot = self.0.lock().expect("no panic");
        if let Some(value) = shot.0 {
            return Poll::Ready(value);
        }
        shot.1 = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Passes a wake on.
struct Relay(Waker);

impl Wake for Relay {
    fn wake(self: Arc<Relay>) {
        self.0.wake_by_ref();
    }
}

/// Wakes its parent for one child, and remembers that it has.
struct Child {
    woken: AtomicBool,
    parent: Mutex<Waker>,
}

impl Wake for Child {
    fn wake(self: Arc<Child>) {
        self.woken.store(true, SeqCst);
        self.parent.lock().expect("no panic").wake_by_ref();
    }
}

/// Polls only those futures that were woken.
async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let new_child = |future| {
        let parent = Mutex::new(Waker::noop().clone());
        let child = Arc::new(Child { woken: AtomicBool::new(true), parent });
        (Some(Box::pin(future)), child)
    };
    let mut children: Vec<_> = futures.into_iter().map(new_child).collect();
    let mut results: Vec<Option<F::Output>> = children.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for ((future, child), result) in children.iter_mut().zip(&mut results) {
            child.parent.lock().expect("no panic").clone_from(cx.waker());
            if !child.woken.swap(false, SeqCst) {
                continue;
            }
            let waker = Waker::from(Arc::clone(child));
            let Some(pending) = future else { continue };
            if let Poll::Ready(output) = pending.as_mut().poll(&mut Context::from_waker(&waker)) {
                *result = Some(output);
                *future = None;
            }
        }
        if results.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// Sends a message and reads one byte.
fn ask(client: &mut TcpStream, message: &[u8]) {
    client.write_all(message).expect("send");
    client.read_exact(&mut [0]).expect("an answer");
}

/// Counts its own end.
struct OnDrop(&'static AtomicU64);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}
