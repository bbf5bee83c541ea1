//! What cores have to do with one another: state of their own, calls that are always answered,
//! whatever becomes of the core that is called, and books that fit.

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::io::{Read, Write};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use slipring::{Connection, CoreStats, DrainReport, Error, ErrorKind, Running, Server, cores};
use slipring::{task, time};

use crate::common::{config, connect, first_cpus, limit, start, wait_until};

/// A server of so many cores, unpinned, whatever the machine has.
fn server(cores: usize) -> Server {
    let cpus = (0..cores).map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",");
    Server::new(config().cpus(&cpus)).listen("127.0.0.1:0", crate::common::echo)
}

/// Runs a future on a core, and hands over what it returns.
fn on_core<M, F, R>(running: &Running, core: usize, make: M) -> Receiver<R>
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = R> + 'static,
    R: Send + 'static,
{
    let (sender, receiver) = channel();
    let run = move || {
        let future = make();
        async move {
            // Whoever has given up does not want it.
            let _ = sender.send(future.await);
        }
    };
    running.handle().spawn_on(core, run).expect("the core is up");
    receiver
}

fn answer<R>(receiver: &Receiver<R>) -> R {
    receiver.recv_timeout(limit(10_000)).expect("an answer in time")
}

fn drained(running: Running) -> DrainReport {
    running.handle().begin_drain(limit(5_000));
    let report = running.join().expect("every core ends well");
    assert!(report.is_balanced(), "{report}");
    check_books(&report.total());
    report
}

/// The books of calls, when nothing is under way.
fn check_books(total: &CoreStats) {
    let ends = total.calls_answered + total.calls_failed + total.calls_dropped;
    assert_eq!(ends, total.calls, "each call has one end: {total:?}");
    assert!(total.calls_run <= total.calls, "{total:?}");
}

#[test]
fn each_core_has_its_own_state_which_handlers_and_calls_find() {
    async fn count(mut conn: Connection) -> slipring::Result<()> {
        let served = cores::state::<Cell<u64>>()?;
        served.set(served.get() + 1);
        conn.send(format!("{}", cores::current()?.index)).await
    }
    let cpus = (0..2).map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",");
    let dropped = Arc::new(AtomicUsize::new(0));
    struct Noted(Arc<AtomicUsize>, usize);
    impl Drop for Noted {
        fn drop(&mut self) {
            self.0.fetch_add(1, SeqCst);
        }
    }
    let noted = Arc::clone(&dropped);
    let server = Server::new(config().cpus(&cpus))
        .state(|_| Cell::new(7u64))
        .state(|core| Cell::new(core.index as u64 * 1_000))
        .state(move |core| Noted(Arc::clone(&noted), core.index))
        .listen("127.0.0.1:0", count);
    let (running, addr) = start(server);
    let mut served = [0u64; 2];
    for _ in 0..40 {
        let mut text = String::new();
        connect(addr).read_to_string(&mut text).expect("an answer");
        served[text.parse::<usize>().expect("a core's number")] += 1;
    }
    for (core, served) in served.into_iter().enumerate() {
        for asker in 0..2 {
            let ask = move || {
                cores::call(core, || -> slipring::Result<(u64, usize, usize)> {
                    let count = cores::state::<Cell<u64>>()?.get();
                    Ok((count, cores::state::<Noted>()?.1, cores::current()?.index))
                })
            };
            let found = answer(&on_core(&running, asker, ask)).expect("answered").expect("found");
            // Of two of a type the later one counts.
            assert_eq!(found, (core as u64 * 1_000 + served, core, core));
        }
    }
    let unknown = answer(&on_core(&running, 0, || async { cores::state::<String>().err() }));
    let unknown = unknown.expect("nobody has made one");
    assert_eq!(unknown.kind(), ErrorKind::Misuse);
    assert!(unknown.to_string().contains("String"), "{unknown}");
    assert_eq!(cores::state::<Cell<u64>>().unwrap_err().kind(), ErrorKind::Misuse, "no core");
    let report = drained(running);
    assert_eq!(dropped.load(SeqCst), 2, "one a core, and it goes with the core");
    assert_eq!(report.total().accepted, 40);
}

#[test]
fn calls_run_on_their_core_in_the_order_sent_and_bring_their_answers_back() {
    let (running, _) = start(server(3).state(|_| RefCell::new(Vec::<u32>::new())));
    for core in 0..3 {
        let calls = move || async move {
            let calls: Vec<_> = (0..1_000u32)
                .map(|number| {
                    cores::call(core, move || {
                        let seen = cores::state::<RefCell<Vec<u32>>>().expect("it is there");
                        seen.borrow_mut().push(number);
                        (number, cores::current().expect("a core").index)
                    })
                })
                .collect();
            let mut answers = Vec::new();
            for call in calls {
                answers.push(call.await.expect("an answer"));
            }
            answers
        };
        let answers = answer(&on_core(&running, 0, calls));
        assert_eq!(answers, (0..1_000).map(|number| (number, core)).collect::<Vec<_>>());
        let take = move || {
            cores::call(core, || cores::state::<RefCell<Vec<u32>>>().expect("it is there").take())
        };
        let seen = answer(&on_core(&running, 1, take)).expect("an answer");
        assert_eq!(seen, (0..1_000).collect::<Vec<_>>(), "in the order sent");
    }
    let total = drained(running).total();
    assert_eq!((total.calls, total.calls_run), (3_003, 3_003));
    assert_eq!((total.calls_failed, total.calls_dropped, total.panics), (0, 0, 0));
}

#[test]
fn many_calls_of_a_turn_wake_their_core_few_times() {
    const CALLS: u64 = 20_000;
    let (running, _) = start(server(2));
    let calls = || async {
        for _ in 0..CALLS / 200 {
            let calls: Vec<_> = (0..200).map(|_| cores::call(1, || ())).collect();
            for call in calls {
                call.await.expect("an answer");
            }
        }
    };
    let before = running.handle().stats();
    answer(&on_core(&running, 0, calls));
    let after = running.handle().stats();
    let enters = after.cores()[1].enters - before.cores()[1].enters;
    assert!(enters <= CALLS / 40, "{enters} calls of the kernel for {CALLS}");
    let total = drained(running).total();
    assert_eq!((total.calls, total.calls_run), (CALLS, CALLS));
}

#[test]
fn a_spawned_future_may_wait_and_its_answer_comes_back() {
    let (running, _) = start(server(2));
    let make = || async {
        let slow = cores::spawn(1, || async {
            let local = Rc::new(Cell::new(1));
            time::sleep(Duration::from_millis(20)).await;
            task::yield_now().await;
            local.get() + cores::current().expect("a core").index
        });
        // Calls overtake it, and it may call back.
        let quick = cores::call(1, || 5).await.expect("an answer");
        let back = cores::spawn(1, || async { cores::call(0, || 6).await });
        (quick, back.await.expect("an answer").expect("an answer"), slow.await.expect("an answer"))
    };
    assert_eq!(answer(&on_core(&running, 0, make)), (5, 6, 2));
    let total = drained(running).total();
    assert_eq!((total.calls, total.calls_run, total.calls_failed), (4, 4, 0));
}

#[test]
fn a_panic_and_a_core_that_is_not_there_are_errors_of_the_caller_alone() {
    let (running, _) = start(server(2));
    let make = || async {
        let failed = |core, kind: ErrorKind, error: Option<Error>| {
            let error = error.expect("it fails");
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(&format!("call core {core}")), "{error}");
        };
        for core in 0..2 {
            let call = cores::call(core, || -> u32 { panic!("as a test wants it") });
            failed(core, ErrorKind::Panicked, call.await.err());
            let make = || -> std::future::Ready<u32> { panic!("as a test wants it") };
            failed(core, ErrorKind::Panicked, cores::spawn(core, make).await.err());
            let make = || async {
                task::yield_now().await;
                panic!("as a test wants it")
            };
            let spawned: cores::Call<u32> = cores::spawn(core, make);
            failed(core, ErrorKind::Panicked, spawned.await.err());
            assert_eq!(cores::call(core, || 7).await.expect("it goes on"), 7);
        }
        failed(2, ErrorKind::Misuse, cores::call(2, || ()).await.err());
    };
    answer(&on_core(&running, 0, make));
    let outside = cores::call(0, || ());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let outside = std::pin::pin!(outside).poll(&mut context);
    assert!(matches!(outside, std::task::Poll::Ready(Err(e)) if e.kind() == ErrorKind::Misuse));
    let total = drained(running).total();
    assert_eq!((total.panics, total.calls_failed, total.calls_run), (6, 6, 8));
}

#[test]
fn a_call_that_is_dropped_is_run_if_it_was_sent_and_else_is_not() {
    const ROOM: usize = 256;
    let (running, _) = start(server(2));
    let ran = Arc::new(AtomicUsize::new(0));
    let runs = Arc::clone(&ran);
    let make = move || async move {
        let calls: Vec<_> = (0..ROOM + 100)
            .map(|_| {
                let runs = Arc::clone(&runs);
                cores::call(1, move || runs.fetch_add(1, SeqCst))
            })
            .collect();
        drop(calls);
        // What waits behind them has its turn all the same.
        cores::call(1, || ()).await
    };
    answer(&on_core(&running, 0, make)).expect("an answer");
    assert_eq!(ran.load(SeqCst), ROOM, "the others had not been sent");
    let total = drained(running).total();
    assert_eq!(total.calls, ROOM as u64 + 101);
    assert_eq!((total.calls_run, total.calls_dropped), (ROOM as u64 + 1, ROOM as u64 + 100));
}

#[test]
fn a_core_that_is_stuck_holds_up_only_those_who_call_it() {
    let (running, addr) = start(server(3));
    let stop = Arc::new(AtomicBool::new(false));
    let stuck = Arc::clone(&stop);
    let spin = move || async move {
        while !stuck.load(SeqCst) {
            std::hint::spin_loop();
        }
    };
    running.handle().spawn_on(1, spin).expect("it is up");
    let make = || async {
        let waiting: Vec<_> = (0..1_000).map(|_| cores::call(1, || 1)).collect();
        let late = time::timeout(Duration::from_millis(50), cores::call(1, || 1)).await;
        assert_eq!(late.expect_err("it is stuck").kind(), ErrorKind::TimedOut);
        assert_eq!(cores::call(2, || 2).await.expect("that one is not"), 2);
        waiting
    };
    let go_on = Arc::clone(&stop);
    let make = move || async move {
        let waiting = make().await;
        go_on.store(true, SeqCst);
        let mut sum = 0;
        for call in waiting {
            sum += call.await.expect("an answer");
        }
        sum
    };
    assert_eq!(answer(&on_core(&running, 0, make)), 1_000);
    drop(connect(addr));
    drained(running);
}

#[test]
fn calls_under_load_while_cores_leave_are_all_answered() {
    const CORES: usize = 4;
    let (running, _) = start(server(CORES));
    let stop = Arc::new(AtomicBool::new(false));
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    let mut callers = Vec::new();
    for caller in 0..2 {
        let (stop, outcomes) = (Arc::clone(&stop), Arc::clone(&outcomes));
        callers.push(on_core(&running, caller, move || async move {
            let (mut good, mut closed) = (0u64, 0u64);
            while !stop.load(SeqCst) {
                let mut calls = Vec::new();
                for number in 0..64usize {
                    let core = number % CORES;
                    calls.push((number, cores::call(core, move || number)));
                    let made = move || async move {
                        task::yield_now().await;
                        number
                    };
                    calls.push((number, cores::spawn(core, made)));
                }
                for (number, call) in calls {
                    match call.await {
                        Ok(answer) => {
                            assert_eq!(answer, number);
                            good += 1;
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
                            assert!(number % CORES >= 2, "only those leave: {error}");
                            closed += 1;
                        }
                    }
                }
            }
            outcomes.lock().expect("nobody panics").push((good, closed));
        }));
    }
    for core in 2..CORES {
        let before = running.handle().stats().total().calls_run;
        wait_until("calls are under way", || {
            running.handle().stats().total().calls_run > before + 2_000
        });
        running.handle().retire(core, limit(2_000)).expect("others stay");
    }
    let before = running.handle().stats().total().calls_failed;
    wait_until("the cores' end is heard of", || {
        running.handle().stats().total().calls_failed > before + 200
    });
    stop.store(true, SeqCst);
    callers.iter().for_each(answer);
    let total = drained(running).total();
    let outcomes = outcomes.lock().expect("nobody panics");
    let (good, closed) = outcomes.iter().fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    assert_eq!(good + closed, total.calls, "{outcomes:?}");
    assert_eq!(closed, total.calls_failed, "{outcomes:?}");
    assert_eq!((total.panics, total.calls_dropped), (0, 0));
}

#[test]
fn a_drain_in_the_midst_of_calls_leaves_nobody_waiting_and_keeps_to_its_deadline() {
    for round in 0..5 {
        let (running, addr) = start(server(3));
        let mut peer = connect(addr);
        peer.write_all(b"x").expect("send");
        for core in 0..3 {
            let calls = move || async move {
                loop {
                    let sync: Vec<_> = (0..3).map(|to| cores::call(to, || ())).collect();
                    let never = cores::spawn((core + 1) % 3, pending::<()>);
                    for call in sync {
                        // Whoever is told that a core has ended is one whose own end is near.
                        if call.await.is_err() {
                            let lost = never.await.expect_err("nothing comes of it");
                            assert_eq!(lost.kind(), ErrorKind::Closed, "{lost}");
                            return;
                        }
                    }
                }
            };
            running.handle().spawn_on(core, calls).expect("it is up");
        }
        wait_until("calls are under way", || running.handle().stats().total().calls_run > 3_000);
        let since = std::time::Instant::now();
        running.handle().begin_drain(Duration::from_millis(20 * round));
        let report = running.join().expect("every core ends well");
        assert!(since.elapsed() < limit(20 * round + 1_000), "{:?}", since.elapsed());
        assert!(report.is_balanced(), "{report}");
        let total = report.total();
        assert_eq!((total.panics, total.tasks, total.leaked_operations), (0, 0, 0), "{report}");
        check_books(&total);
    }
}

#[test]
fn in_a_drain_cores_answer_until_those_who_call_them_have_finished() {
    // One core has state, the other was called before.
    for server in [server(2).state(|_| Cell::new(7u64)), server(2)] {
        let (running, _) = start(server);
        let handle = running.handle().clone();
        let calls = on_core(&running, 0, || async move {
            cores::call(1, || ()).await.expect("it serves");
            while handle.is_ready() {
                task::yield_now().await;
            }
            for _ in 0..20 {
                time::sleep(Duration::from_millis(5)).await;
                cores::call(1, || ()).await.expect("it drains, and answers");
            }
        });
        let since = std::time::Instant::now();
        wait_until("it has called", || running.handle().stats().total().calls_run == 1);
        running.handle().begin_drain(limit(30_000));
        answer(&calls);
        let report = running.join().expect("every core ends well");
        assert!(report.is_balanced(), "{report}");
        assert!(since.elapsed() < limit(10_000), "nobody waits for more: {report}");
        let total = report.total();
        assert_eq!((total.calls_run, total.calls_failed, total.panics), (21, 0, 0), "{report}");
    }
}

#[test]
fn a_core_that_has_too_many_tasks_says_so_to_the_caller() {
    let cpus = first_cpus(1);
    let config = config().cpus(&cpus).tasks_max(64);
    let (running, _) = start(Server::new(config).listen("127.0.0.1:0", crate::common::echo));
    let make = || async {
        let held: Vec<_> = (0..100).map(|_| cores::spawn(0, pending::<()>)).collect();
        let late = cores::spawn(0, || async { 1 }).await.expect_err("there is no room");
        assert_eq!(late.kind(), ErrorKind::Resource);
        assert!(late.to_string().contains("SLIPRING_TASKS_MAX"), "{late}");
        held.len()
    };
    assert_eq!(answer(&on_core(&running, 0, make)), 100);
    running.handle().close();
    let report = running.join().expect("every core ends well");
    assert!(report.is_balanced(), "{report}");
}
