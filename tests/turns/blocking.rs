//! Blocking work off the core: the core goes on meanwhile, the answer wakes it at once, a panic is
//! an error, so many run at a time and no more, and a drain keeps to its deadline.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use slipring::{ErrorKind, Running, Server, task, time};

use crate::common::{config, echo, first_cpus, limit, start, turn, wait_until};

fn server(cores: usize) -> Running {
    let cpus = (0..cores).map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",");
    start(Server::new(config().cpus(&cpus)).listen("127.0.0.1:0", echo)).0
}

/// Runs a future on the first core and returns what it does.
fn on_core<M, F, R>(running: &Running, make: M) -> R
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = R> + 'static,
    R: Send + 'static,
{
    let (sender, receiver) = channel();
    let run = move || {
        let future = make();
        async move { sender.send(future.await).expect("somebody waits for it") }
    };
    running.handle().spawn_on(0, run).expect("the core is up");
    receiver.recv_timeout(limit(20_000)).expect("an answer in time")
}

/// A door that blocks those who come until it is opened.
#[derive(Default)]
struct Door {
    open: Mutex<bool>,
    opened: Condvar,
    /// How many wait before it, and the most that ever have.
    inside: AtomicUsize,
    most: AtomicUsize,
}

impl Door {
    fn wait(&self) {
        let inside = self.inside.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(inside, SeqCst);
        let open = self.open.lock().expect("nobody panics");
        drop(self.opened.wait_while(open, |open| !*open).expect("nobody panics"));
        self.inside.fetch_sub(1, SeqCst);
    }

    fn open(&self) {
        *self.open.lock().expect("nobody panics") = true;
        self.opened.notify_all();
    }
}

#[test]
fn the_core_goes_on_while_something_blocks_and_the_answer_comes_back() {
    let _turn = turn();
    let running = server(1);
    let door = Arc::new(Door::default());
    let (theirs, ours) = (Arc::clone(&door), Arc::clone(&door));
    let ran = on_core(&running, move || async move {
        let blocked = task::blocking(move || {
            theirs.wait();
            std::thread::current().name().map(str::to_owned)
        });
        // Nothing but this very core opens the door.
        time::sleep(Duration::from_millis(5)).await;
        ours.open();
        blocked.await.expect("an answer")
    });
    assert!(!ran.is_some_and(|name| name.starts_with("slipring")), "not on a core");
    crate::common::settle(running, 0);
}

#[test]
fn the_wake_comes_at_once_also_beside_busy_tasks() {
    let _turn = turn();
    const ROUNDS: u32 = 300;
    for busy in [false, true] {
        let running = server(1);
        let late = on_core(&running, move || async move {
            if busy {
                let spin = async {
                    loop {
                        task::yield_now().await;
                    }
                };
                task::detach("busy", spin).expect("there is room");
            }
            let mut late = Vec::new();
            for _ in 0..ROUNDS {
                let done = task::blocking(Instant::now).await.expect("an answer");
                late.push(done.elapsed());
            }
            late.sort_unstable();
            late[late.len() / 2]
        });
        // A core that looked for it at a timer's tick would be a millisecond late and more.
        assert!(late < limit(1), "busy: {busy}, median {late:?}");
        running.handle().begin_drain(limit(100));
        assert!(running.join().expect("it ends well").is_balanced());
    }
}

#[test]
fn a_panic_is_an_error_of_the_caller_alone() {
    let _turn = turn();
    let running = server(1);
    let kinds = on_core(&running, || async {
        let failed = task::blocking(|| -> u32 { panic!("as a test wants it") }).await;
        let error = failed.expect_err("it panics");
        assert!(error.to_string().contains("task::blocking"), "{error}");
        (error.kind(), task::blocking(|| 7).await.expect("an answer"))
    });
    assert_eq!(kinds, (ErrorKind::Panicked, 7));
    let total = crate::common::settle(running, 0);
    assert_eq!((total.calls, total.calls_answered, total.calls_failed), (2, 1, 1));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let outside = std::pin::pin!(task::blocking(|| ())).poll(&mut context);
    assert!(matches!(outside, std::task::Poll::Ready(Err(e)) if e.kind() == ErrorKind::Misuse));
}

#[test]
fn so_many_run_at_a_time_and_the_others_have_their_turn() {
    let _turn = turn();
    const MOST: usize = 256;
    let running = server(1);
    let door = Arc::new(Door::default());
    let theirs = Arc::clone(&door);
    let (sender, receiver) = channel();
    let run = move || async move {
        let blocked: Vec<_> = (0..MOST + 100)
            .map(|number| {
                let door = Arc::clone(&theirs);
                task::blocking(move || {
                    door.wait();
                    number
                })
            })
            .collect();
        let mut sum = 0;
        for blocked in blocked {
            sum += blocked.await.expect("an answer");
        }
        sender.send(sum).expect("somebody waits for it");
    };
    running.handle().spawn_on(0, run).expect("the core is up");
    wait_until("as many run as may", || door.inside.load(SeqCst) == MOST);
    door.open();
    let sum = receiver.recv_timeout(limit(20_000)).expect("all are answered");
    assert_eq!(sum, (0..MOST + 100).sum::<usize>());
    assert!(door.most.load(SeqCst) <= MOST, "{} at a time", door.most.load(SeqCst));
    crate::common::settle(running, 0);
}

#[test]
fn a_drain_waits_for_what_blocks_until_its_deadline_and_no_longer() {
    let _turn = turn();
    for (opens, within) in [(true, 5_000), (false, 50)] {
        let running = server(2);
        let door = Arc::new(Door::default());
        let theirs = Arc::clone(&door);
        let done = Arc::new(AtomicUsize::new(0));
        let finished = Arc::clone(&done);
        let run = move || async move {
            task::blocking(move || theirs.wait()).await.expect("an answer");
            finished.fetch_add(1, SeqCst);
        };
        running.handle().spawn_on(0, run).expect("the core is up");
        wait_until("it blocks", || door.inside.load(SeqCst) == 1);
        let since = Instant::now();
        running.handle().begin_drain(limit(within));
        if opens {
            door.open();
        }
        let report = running.join().expect("every core ends well");
        assert!(since.elapsed() < limit(within + 500), "{:?}", since.elapsed());
        assert!(report.is_balanced(), "{report}");
        assert_eq!(report.total().tasks_forced, u64::from(!opens), "{report}");
        assert_eq!(done.load(SeqCst), usize::from(opens));
        // What nothing can stop ends by itself, and finds nobody.
        door.open();
        wait_until("the closure has ended", || door.inside.load(SeqCst) == 0);
    }
}

#[test]
fn what_blocks_may_run_on_other_cpus_than_that_of_the_core_that_asked() {
    let _turn = turn();
    let cpus = first_cpus(2);
    if !cpus.contains(',') {
        crate::common::not_run("what_blocks_may_run_on_other_cpus", "there is one CPU");
        return;
    }
    let config = config().cpus(&first_cpus(1)).pin(Some(true));
    let running = start(Server::new(config).listen("127.0.0.1:0", echo)).0;
    let allowed = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("it is there");
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        list.expect("proc(5) has this line").trim().to_owned()
    };
    let (core, pool) = on_core(&running, move || async move {
        (allowed(), task::blocking(allowed).await.expect("an answer"))
    });
    assert_eq!(core, first_cpus(1));
    assert_ne!(pool, core, "as the main thread, whose CPUs are not one alone");
    crate::common::settle(running, 0);
}
