//! How connections are spread over the cores: by the kernel's hash, by CPU, and by moving them.
//!
//! The tests take turns, as they count who is where.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::common::load::{Load, Outcome, Outcomes, answer_one, attempt, may_filter};
use crate::common::{
    config, connect, echo, echo_or_loop, echo_server, first_cpus, length, limit, not_run, open_fds,
    pin, start, turn, wait_until,
};
use slipring::{Balance, CloseReason, Config, Connection, ErrorKind, Handle, Server, task};

/// How many connections each core has.
fn live(handle: &Handle) -> Vec<u64> {
    handle.stats().cores().iter().map(|core| core.live).collect()
}

fn least(cores: usize) -> Config {
    config().cpus(&format!("0-{}", cores - 1)).balance(Balance::Least)
}

/// A client that stays, once it was answered.
fn stay(addr: SocketAddr) -> TcpStream {
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("an answer");
    client
}

fn end(running: slipring::Running) {
    running.handle().begin_drain(limit(5_000));
    let report = running.join().expect("the report");
    assert!(report.is_balanced(), "{report}");
}

#[test]
fn connections_that_stay_come_out_even_with_the_least_loaded_core() {
    let _turn = turn();
    for round in 0..10 * length() {
        // A thread that is kept from running for a moment does not count as one that works.
        for (cores, clients) in [(2, 16), (2, 64), (4, 64)] {
            let (running, addr) = echo_server(least(cores).stall_ms(0));
            let clients: Vec<_> = (0..clients).map(|_| stay(addr)).collect();
            let live = live(&running.handle());
            let (most, fewest) = (live.iter().max().unwrap(), live.iter().min().unwrap());
            assert_eq!(live.iter().sum::<u64>(), clients.len() as u64, "round {round}");
            // Two cores that accept at the same time may both choose the same third.
            let apart = if cores == 2 { 0 } else { 1 };
            assert!(most - fewest <= apart, "round {round}: {live:?}");
            end(running);
        }
    }
}

/// Those that come all at once too, some of them before the cores have begun.
#[test]
fn a_burst_of_connections_that_stay_comes_out_even() {
    let _turn = turn();
    for round in 0..10 * length() {
        let (running, addr) = echo_server(least(2).stall_ms(0));
        let clients: Vec<_> = (0..64).map(|_| connect(addr)).collect();
        let handle = running.handle();
        wait_until("all are there", || live(&handle).iter().sum::<u64>() == 64);
        let live = live(&handle);
        assert!(live[0].abs_diff(live[1]) <= 2, "round {round}: {live:?}");
        drop(clients);
        end(running);
    }
}

/// Scenario 64: the kernel's hash, as it is documented.
#[test]
fn the_kernels_hash_is_uneven_for_few_connections() {
    let _turn = turn();
    for (cores, clients) in [(2, 16), (2, 64), (4, 16), (4, 64)] {
        let mut shares = Vec::new();
        for _ in 0..20 {
            let config = config().cpus(&format!("0-{}", cores - 1)).balance(Balance::Hash);
            let (running, addr) = echo_server(config);
            let clients: Vec<_> = (0..clients).map(|_| stay(addr)).collect();
            let live = live(&running.handle());
            assert_eq!(live.iter().sum::<u64>(), clients.len() as u64);
            let mean = clients.len() as f64 / cores as f64;
            shares.push(*live.iter().max().unwrap() as f64 / mean);
            assert_eq!(running.handle().stats().total().moved_out, 0);
            end(running);
        }
        shares.sort_by(f64::total_cmp);
        let (median, most) = (shares[10], shares[19]);
        eprintln!(
            "hash: {cores} cores, {clients} connections: the fullest core has {median:.2} of \
                   its share in the median of 20, at most {most:.2}"
        );
    }
}

/// Scenario 64: a core whose handler takes all of its time, in short pieces, gets no newcomers.
#[test]
fn a_core_that_computes_all_the_time_gets_none_of_the_newcomers() {
    let _turn = turn();
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let handler = move |mut conn: Connection| {
        let stop = Arc::clone(&told);
        async move {
            while let Some(chunk) = conn.recv().await? {
                while &*chunk == b"work" && !stop.load(SeqCst) {
                    spin(Duration::from_millis(2));
                    task::yield_now().await;
                }
                conn.send(chunk).await?;
            }
            Ok(())
        }
    };
    let config = least(4).stall_ms(0).task_budget(1);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", handler));
    let handle = running.handle();
    let mut worker = stay(addr);
    let busy = live(&handle).iter().position(|live| *live == 1).expect("it is on some core");
    worker.write_all(b"work").expect("send");
    let polls = || handle.stats().cores()[busy].polls;
    let before = polls();
    // A hundred of them are longer than what it takes to be noticed.
    wait_until("it is under way", || polls() >= before + 100);
    let others: Vec<_> = (0..32).map(|_| stay(addr)).collect();
    let live = live(&handle);
    assert_eq!((live[busy], live.iter().sum::<u64>()), (1, 33), "{live:?}");
    stop.store(true, SeqCst);
    worker.read_exact(&mut [0; 4]).expect("the answer");
    drop((worker, others));
    end(running);
}

/// Scenario 64: nobody is moved to a core in the middle of a poll that does not end. Whom the
/// kernel has given to it waits until it does.
#[test]
fn a_core_that_is_stuck_in_a_poll_is_sent_nobody() {
    let _turn = turn();
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let handler = move |conn: Connection| {
        let stop = Arc::clone(&told);
        async move { echo_or_loop(conn, &stop).await }
    };
    let (running, addr) = start(Server::new(least(2)).listen("127.0.0.1:0", handler));
    let handle = running.handle();
    let mut worker = stay(addr);
    let busy = live(&handle).iter().position(|live| *live == 1).expect("it is on some core");
    worker.write_all(b"loop").expect("send");
    wait_until("it is noticed", || handle.stalls().iter().any(|stall| stall.ongoing));
    let mut clients: Vec<_> = (0..32).map(|_| connect(addr)).collect();
    for client in &mut clients {
        client.write_all(b"x").expect("send");
    }
    let other = || handle.stats().cores()[1 - busy];
    wait_until("the other one serves its own", || {
        other().live > 2 && other().bytes_sent >= other().live
    });
    let stats = handle.stats();
    assert_eq!((stats.cores()[busy].moved_in, stats.cores()[1 - busy].moved_out), (0, 0));
    stop.store(true, SeqCst);
    for client in &mut clients {
        client.read_exact(&mut [0]).expect("an answer, now that it goes on");
    }
    drop((worker, clients));
    end(running);
}

/// Scenario 64: a lame duck accepts, and moves nobody.
#[test]
fn nobody_is_moved_while_the_server_drains() {
    let _turn = turn();
    let heard = Arc::new(AtomicUsize::new(0));
    let hears = Arc::clone(&heard);
    let server = Server::new(least(2).lameduck_ms(500)).listen("127.0.0.1:0", echo);
    let (running, addr) = start(server.on_drain(move |_| {
        hears.fetch_add(1, SeqCst);
        std::future::ready(())
    }));
    let handle = running.handle();
    let mut clients: Vec<_> = (0..16).map(|_| stay(addr)).collect();
    handle.begin_drain(limit(5_000));
    wait_until("both have heard of it", || heard.load(SeqCst) == 2);
    let before = handle.stats().total();
    clients.extend((0..16).map(|_| stay(addr)));
    let after = handle.stats().total();
    assert_eq!(after.accepted, before.accepted + 16);
    assert_eq!(after.moved_out, before.moved_out);
    let report = running.join().expect("the report");
    assert!(report.is_balanced(), "{report}");
}

/// Short connections, many of which are moved, and a drain in the middle.
#[test]
fn a_drain_in_a_churn_with_moves_harms_nobody() {
    let _turn = turn();
    let filters = may_filter("a_drain_in_a_churn_with_moves_harms_nobody");
    let (total, mut moved) = (Outcomes::default(), 0);
    for round in 0..8 * length() {
        let fds = open_fds();
        let server = Server::new(least(4)).listen("127.0.0.1:0", answer_one);
        let (running, addr) = start(server);
        let load = Load::start(addr, 8);
        wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 500);
        running.handle().begin_drain(limit(5_000));
        let report = running.join().expect("the report");
        let outcomes = load.stop();
        assert!(report.is_balanced(), "round {round}: {report}");
        let sum = report.total();
        assert_eq!(sum.moved_out, sum.moved_in, "round {round}: {report}");
        assert_eq!((sum.tasks_forced, sum.leaked_operations), (0, 0), "round {round}: {report}");
        if filters {
            assert_eq!(outcomes.harmed(), 0, "round {round}: {outcomes}: {report}");
            assert_eq!(sum.accepted, outcomes.get(Outcome::Ok), "round {round}: {report}");
        }
        wait_until("all descriptors are closed", || open_fds() <= fds);
        moved += sum.moved_out;
        total.add(&outcomes);
    }
    eprintln!("{moved} moved: {total}");
    assert!(moved > 0);
}

/// As before, without time: those on their way are ended and counted, and no descriptor is left.
#[test]
fn a_close_in_a_churn_with_moves_counts_everybody() {
    let _turn = turn();
    for round in 0..8 * length() {
        let fds = open_fds();
        let server = Server::new(least(4)).listen("127.0.0.1:0", answer_one);
        let (running, addr) = start(server);
        let load = Load::start(addr, 8);
        wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 200);
        running.handle().close();
        let report = running.join().expect("the report");
        let outcomes = load.stop();
        assert!(report.is_balanced(), "round {round}: {outcomes}: {report}");
        assert_eq!(outcomes.get(Outcome::TimedOut), 0, "round {round}: {outcomes}: {report}");
        wait_until("all descriptors are closed", || open_fds() <= fds);
    }
}

/// Scenario 2, with moves.
#[test]
fn a_core_leaves_a_churn_with_moves_and_nobody_notices() {
    let _turn = turn();
    for round in 0..4 * length() {
        let server = Server::new(least(4)).listen("127.0.0.1:0", answer_one);
        let (running, addr) = start(server);
        let handle = running.handle();
        let load = Load::start(addr, 8);
        wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 200);
        let leaver = round as usize % 4;
        let left = handle.retire(leaver, limit(5_000)).expect("three are left");
        assert!(left.is_balanced() && left.stuck.is_none(), "round {round}");
        let before = load.outcomes().get(Outcome::Ok);
        wait_until("the load goes on", || load.outcomes().get(Outcome::Ok) >= before + 200);
        let outcomes = load.stop();
        assert_eq!(outcomes.harmed(), 0, "round {round}: {outcomes}");
        assert_eq!(outcomes.get(Outcome::Refused), 0, "round {round}: {outcomes}");
        assert_eq!(handle.stats().cores()[leaver].accepted, left.stats.accepted, "round {round}");
        end(running);
    }
}

/// A Unix socket's queue is shared; what one core gets may be another's all the same.
#[test]
fn connections_of_a_unix_socket_come_out_even_too() {
    use std::os::linux::net::SocketAddrExt;
    let _turn = turn();
    let name = format!("slipring-balance-{}", std::process::id());
    let server = Server::new(least(2).stall_ms(0)).listen(format!("unix:@{name}"), echo);
    let running = server.start().expect("the server starts");
    let addr = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
    let mut clients = Vec::new();
    for _ in 0..16 {
        let client = std::os::unix::net::UnixStream::connect_addr(&addr).expect("connect");
        client.set_read_timeout(Some(limit(5_000))).expect("set a time limit");
        (&client).write_all(b"x").expect("send");
        (&client).read_exact(&mut [0]).expect("an answer");
        clients.push(client);
    }
    assert_eq!(live(&running.handle()), [8, 8]);
    drop(clients);
    end(running);
}

/// The limits hold where connections are moved: for all, and for one address.
#[test]
fn moved_connections_are_within_the_limits() {
    let _turn = turn();
    let (running, addr) = echo_server(least(4).connections_per_ip_max(10));
    let clients: Vec<_> = (0..30).map(|_| connect(addr)).collect();
    let total = || running.handle().stats().total();
    wait_until("all were accepted", || total().accepted == 30);
    wait_until("who was too much is gone", || total().live == 10);
    assert_eq!(total().closed.get(CloseReason::PerIp), 20);
    drop(clients);
    end(running);

    let (running, addr) = echo_server(least(2).connections_max(20).evict_percent(0));
    let handle = running.handle();
    for _ in 0..5 {
        let mut clients: Vec<_> = (0..40).map(|_| connect(addr)).collect();
        for client in &mut clients {
            client.write_all(b"x").expect("send");
            client.set_nonblocking(true).expect("set non-blocking");
        }
        wait_until("there are as many as may be", || handle.stats().total().live >= 19);
        assert!(handle.stats().total().live <= 20, "nobody has left yet");
        wait_until("everybody gets a place in turn", || {
            // Whoever has an answer leaves.
            clients.retain_mut(|client| client.read(&mut [0]).is_err());
            clients.is_empty()
        });
        wait_until("all are gone", || handle.stats().total().live == 0);
    }
    assert!(handle.stats().total().moved_out > 0);
    end(running);
}

/// Whose CPU handles the handshake, on the loopback the client's, has the connection, also when a
/// core has left; what comes by that one's CPU is shared by the others.
#[test]
fn the_cpu_chooses_the_core() {
    const TEST: &str = "the_cpu_chooses_the_core";
    let _turn = turn();
    let cpus: Vec<u16> =
        first_cpus(2).split(',').map(|cpu| cpu.parse().expect("a CPU's number")).collect();
    let [first, second] = cpus[..] else {
        return not_run(TEST, "needs two CPUs");
    };
    // The core that is named first runs on the CPU that is named first.
    let config = config().cpus(&format!("{second},{first}")).pin(Some(true));
    let server = Server::new(config.balance(Balance::Cpu)).listen("127.0.0.1:0", answer_one);
    let (running, addr) = start(server);
    let handle = running.handle();
    let accepted = || handle.stats().cores().iter().map(|core| core.accepted).collect::<Vec<_>>();
    let try_from = |cpu: u16| {
        let before = accepted();
        let tries = move || {
            pin(cpu);
            (0..50).for_each(|_| assert_eq!(attempt(addr), Outcome::Ok));
        };
        std::thread::spawn(tries).join().expect("all are served");
        let after = accepted();
        (after[0] - before[0], after[1] - before[1])
    };
    // A thread that is moved or interrupted for a moment may leave one to another CPU.
    assert_eq!(try_from(second), (50, 0));
    assert_eq!(try_from(first), (0, 50));
    handle.retire(0, limit(5_000)).expect("one is left");
    assert_eq!(try_from(second), (0, 50));
    assert_eq!(try_from(first), (0, 50));
    end(running);
}

#[test]
fn cores_that_are_not_pinned_can_not_be_chosen_by_cpu() {
    let _turn = turn();
    let config = config().balance(Balance::Cpu);
    let error = Server::new(config).listen("127.0.0.1:0", echo).start().expect_err("not pinned");
    assert_eq!(error.kind(), ErrorKind::Config);
    let text = error.to_string();
    assert!(text.contains("SLIPRING_BALANCE") && text.contains("SLIPRING_PIN"), "{text}");
}

fn spin(time: Duration) {
    let since = Instant::now();
    while since.elapsed() < time {
        std::hint::spin_loop();
    }
}
