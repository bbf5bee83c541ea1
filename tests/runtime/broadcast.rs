//! Broadcasts: everybody gets everything in order, on whatever core, whoever sends; the slow are
//! told exactly what they have missed, and nobody waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver as Answers, channel};
use std::thread;
use std::time::Duration;

use slipring::broadcast::{RecvError, Sender};
use slipring::{ErrorKind, Running, Server, cores, task, time};

use crate::common::{config, echo, limit, start, wait_until};

fn server(cores: usize) -> Running {
    let cpus = (0..cores).map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",");
    start(Server::new(config().cpus(&cpus)).listen("127.0.0.1:0", echo)).0
}

fn on_core<M, F, R>(running: &Running, core: usize, make: M) -> Answers<R>
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

fn answer<R>(receiver: &Answers<R>) -> R {
    receiver.recv_timeout(limit(20_000)).expect("an answer in time")
}

#[test]
fn every_receiver_on_every_core_gets_what_cores_and_threads_send_in_their_order() {
    const CORES: usize = 3;
    const RECEIVERS: usize = 4;
    const SENDERS: usize = CORES + 2;
    const VALUES: u64 = 2_000;
    let running = server(CORES);
    let sender = Sender::<(usize, u64)>::new(SENDERS * VALUES as usize);
    let mut heard = Vec::new();
    for core in 0..CORES {
        for _ in 0..RECEIVERS {
            let sender = sender.clone();
            heard.push(on_core(&running, core, move || async move {
                let mut receiver = sender.subscribe().expect("on a core");
                let mut next = [0; SENDERS];
                for _ in 0..SENDERS as u64 * VALUES {
                    let (from, number) = receiver.recv().await.expect("nothing is missed");
                    assert_eq!(number, next[from], "from {from}");
                    next[from] += 1;
                }
                next
            }));
        }
    }
    wait_until("all listen", || sender.receiver_count() == CORES * RECEIVERS);
    for core in 0..CORES {
        let sender = sender.clone();
        let send = move || async move {
            for number in 0..VALUES {
                sender.send((core, number));
                if number % 100 == 0 {
                    task::yield_now().await;
                }
            }
        };
        running.handle().spawn_on(core, send).expect("it is up");
    }
    thread::scope(|scope| {
        for from in CORES..SENDERS {
            let sender = &sender;
            scope.spawn(move || (0..VALUES).for_each(|number| sender.send((from, number))));
        }
    });
    for heard in &heard {
        assert_eq!(answer(heard), [VALUES; SENDERS]);
    }
    assert_eq!(sender.receiver_count(), 0, "they have gone");
    let total = crate::common::settle(running, 0);
    assert_eq!(total.broadcast_missed, 0);
}

#[test]
fn who_lags_is_told_exactly_how_much_and_goes_on_with_the_oldest_that_is_left() {
    let running = server(2);
    let sender = Sender::<u32>::new(10);
    let send = sender.clone();
    let result = answer(&on_core(&running, 1, move || async move {
        let mut slow = send.subscribe().expect("on a core");
        let mut late = send.subscribe().expect("on a core");
        (0..35).for_each(|number| send.send(number));
        let mut heard = vec![slow.recv().await];
        for _ in 0..10 {
            heard.push(slow.recv().await);
        }
        send.send(35);
        heard.push(slow.recv().await);
        // One that has subscribed later has missed nothing.
        let mut newcomer = send.subscribe().expect("on a core");
        send.send(36);
        assert_eq!(newcomer.recv().await, Ok(36));
        (heard, late.recv().await, late.recv().await)
    }));
    let mut expected = vec![Err(RecvError::Lagged(25))];
    expected.extend((25..36).map(Ok));
    assert_eq!(result, (expected, Err(RecvError::Lagged(27)), Ok(27)));
    let total = crate::common::settle(running, 0);
    assert_eq!(total.broadcast_missed, 52);
}

#[test]
fn a_core_that_is_stuck_misses_values_and_holds_up_neither_senders_nor_others() {
    let running = server(2);
    let sender = Sender::<u64>::new(100);
    let (ready, go) = (channel(), channel::<()>());
    let (subscribe, ready_sender) = (sender.clone(), ready.0);
    let stuck = on_core(&running, 1, move || async move {
        let mut receiver = subscribe.subscribe().expect("on a core");
        ready_sender.send(()).expect("somebody waits");
        // It keeps its core, and nobody on it hears anything.
        go.1.recv().expect("somebody sends");
        (receiver.recv().await, receiver.recv().await)
    });
    ready.1.recv_timeout(limit(10_000)).expect("it listens");
    let send = sender.clone();
    let other = on_core(&running, 0, move || async move {
        let mut receiver = send.subscribe().expect("on a core");
        for number in 0..10_000 {
            send.send(number);
            assert_eq!(receiver.recv().await, Ok(number));
        }
    });
    answer(&other);
    go.0.send(()).expect("it waits");
    assert_eq!(answer(&stuck), (Err(RecvError::Lagged(9_900)), Ok(9_900)));
    crate::common::settle(running, 0);
}

#[test]
fn values_are_heard_though_the_core_that_announced_them_computes_on() {
    let running = server(2);
    let sender = Sender::<u32>::new(10);
    let subscribe = sender.clone();
    let heard = on_core(&running, 1, move || async move {
        let mut receiver = subscribe.subscribe().expect("on a core");
        (receiver.recv().await, receiver.recv().await)
    });
    wait_until("it listens", || sender.receiver_count() == 1);
    let (send, (sent, has_sent), (go, wait)) = (sender.clone(), channel(), channel::<()>());
    let computes = on_core(&running, 0, move || async move {
        send.send(1);
        sent.send(()).expect("somebody waits");
        wait.recv().expect("somebody goes on");
    });
    has_sent.recv_timeout(limit(10_000)).expect("it sends");
    sender.send(2);
    assert_eq!(answer(&heard), (Ok(1), Ok(2)));
    go.send(()).expect("it waits");
    answer(&computes);
    crate::common::settle(running, 0);
}

/// Counts how many there are.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(alive: &Arc<AtomicUsize>) -> Counted {
        alive.fetch_add(1, SeqCst);
        Counted(Arc::clone(alive))
    }
}

impl Clone for Counted {
    fn clone(&self) -> Counted {
        Counted::new(&self.0)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[test]
fn a_value_is_kept_until_all_have_read_it_or_left_and_no_longer() {
    let running = server(2);
    let alive = Arc::new(AtomicUsize::new(0));
    let sender = Sender::<Counted>::new(50);
    sender.send(Counted::new(&alive));
    assert_eq!(alive.load(SeqCst), 0, "nobody listens");
    let (send, counted) = (sender.clone(), Arc::clone(&alive));
    answer(&on_core(&running, 0, move || async move {
        let mut one = send.subscribe().expect("on a core");
        let mut two = send.subscribe().expect("on a core");
        (0..20).for_each(|_| send.send(Counted::new(&counted)));
        for read in 0..20 {
            drop(one.recv().await);
            assert_eq!(counted.load(SeqCst), 20 - read, "the other one has still to read");
            drop(two.recv().await);
        }
        assert_eq!(counted.load(SeqCst), 0);
        (0..20).for_each(|_| send.send(Counted::new(&counted)));
        drop(one.recv().await);
        drop(two);
        assert_eq!(counted.load(SeqCst), 19);
        drop(one);
        assert_eq!(counted.load(SeqCst), 0, "nobody is left to read");
        let _unread = send.subscribe().expect("on a core");
        (0..200).for_each(|_| send.send(Counted::new(&counted)));
        assert_eq!(counted.load(SeqCst), 50, "as many as the channel keeps");
    }));
    crate::common::settle(running, 0);
    assert_eq!(alive.load(SeqCst), 0);
}

#[test]
fn receivers_hear_that_the_last_sender_is_gone_after_all_that_was_sent() {
    let running = server(2);
    let sender = Sender::<u32>::new(10);
    let heard: Vec<_> = (0..2)
        .map(|core| {
            let sender = sender.clone();
            on_core(&running, core, move || async move {
                let mut receiver = sender.subscribe().expect("on a core");
                drop(sender);
                let mut heard = Vec::new();
                while let Ok(number) = receiver.recv().await {
                    heard.push(number);
                }
                (heard, receiver.recv().await)
            })
        })
        .collect();
    wait_until("both listen", || sender.receiver_count() == 2);
    (0..5).for_each(|number| sender.send(number));
    drop(sender);
    for heard in &heard {
        assert_eq!(answer(heard), ((0..5).collect(), Err(RecvError::Closed)));
    }
    let outside = Sender::<u32>::new(1).subscribe().map(drop);
    assert_eq!(outside.expect_err("no core").kind(), ErrorKind::Misuse);
    crate::common::settle(running, 0);
}

#[test]
fn senders_and_receivers_come_and_go_while_cores_leave_and_the_server_drains() {
    let running = server(4);
    let sender = Sender::<u64>::new(16);
    let heard = Arc::new(AtomicU64::new(0));
    for core in 0..4 {
        let (sender, heard) = (sender.clone(), Arc::clone(&heard));
        let churn = move || async move {
            for round in 0u64.. {
                let mut receiver = sender.subscribe().expect("on a core");
                let kept = sender.subscribe().expect("on a core");
                sender.send(round);
                cores::call((core + 1) % 4, || ()).await.ok();
                for _ in 0..round % 5 {
                    let next = time::timeout(Duration::from_millis(1), receiver.recv()).await;
                    heard.fetch_add(u64::from(next.is_ok()), SeqCst);
                }
                drop(kept);
            }
        };
        running.handle().spawn_on(core, churn).expect("it is up");
    }
    let more = |by| {
        let before = heard.load(SeqCst);
        wait_until("more is heard", || heard.load(SeqCst) > before + by);
    };
    more(500);
    running.handle().retire(3, Duration::from_millis(50)).expect("others stay");
    more(500);
    running.handle().begin_drain(Duration::from_millis(50));
    let report = running.join().expect("every core ends well");
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().panics, 0, "{report}");
    assert_eq!(sender.receiver_count(), 0, "all have gone with their cores");
    sender.send(0);
}
