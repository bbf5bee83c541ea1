//! One core leaves a server that goes on: nobody notices, and the others share its part evenly.
//!
//! The tests take turns, as they load the machine.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use crate::common::load::{Load, Outcome, Outcomes, answer_one, attempt};
use crate::common::{config, connect, echo, length, limit, start, turn, wait_until};
use slipring::{CloseReason, ErrorKind, Phase, Server, StopMethod};

/// Scenario 2.
#[test]
fn one_of_four_cores_leaves_under_load_and_nobody_is_reset_refused_or_held_off() {
    let _turn = turn();
    let total = Outcomes::default();
    for round in 0..10 * length() {
        let server = Server::new(config().cpus("0-3")).listen("127.0.0.1:0", answer_one);
        let (running, addr) = start(server);
        let handle = running.handle();
        let load = Load::start(addr, 8);
        wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 100);
        let leaver = round as usize % 4;
        let left = handle.retire(leaver, limit(5_000)).expect("three are left");
        assert_eq!(left.stop, Some(StopMethod::Steered), "round {round}");
        assert!(left.is_balanced() && left.stuck.is_none(), "round {round}");
        let before = load.outcomes().get(Outcome::Ok);
        wait_until("the load goes on", || load.outcomes().get(Outcome::Ok) >= before + 100);
        let outcomes = load.stop();
        assert_eq!(outcomes.harmed(), 0, "round {round}: {outcomes}");
        assert_eq!(outcomes.get(Outcome::Refused), 0, "round {round}: {outcomes}");
        assert_eq!(outcomes.get(Outcome::HeldOff), 0, "round {round}: {outcomes}");
        total.add(&outcomes);

        // The kernel chooses among those that stay, each as often.
        let before = handle.stats();
        (0..96).for_each(|_| assert_eq!(attempt(addr), Outcome::Ok, "round {round}"));
        let after = handle.stats();
        let got = (0..4).map(|n| after.cores()[n].accepted - before.cores()[n].accepted);
        let got: Vec<u64> = got.collect();
        let fair = |(core, &count): (usize, &u64)| {
            if core == leaver { count == 0 } else { (10..60).contains(&count) }
        };
        assert!(got.iter().enumerate().all(fair), "round {round}: {got:?}");

        handle.begin_drain(limit(5_000));
        let report = running.join().expect("the report");
        assert!(report.is_balanced(), "{report}");
        assert_eq!(report.cores()[leaver].stats.accepted, left.stats.accepted, "{report}");
    }
    eprintln!("one core of four left: {total}");
}

#[test]
fn cores_leave_one_after_the_other_until_one_is_left() {
    let _turn = turn();
    let (running, addr) =
        start(Server::new(config().cpus("0-3")).listen("127.0.0.1:0", answer_one));
    let handle = running.handle();
    let load = Load::start(addr, 4);
    for leaver in [2, 0, 3] {
        let before = load.outcomes().get(Outcome::Ok);
        wait_until("the load goes on", || load.outcomes().get(Outcome::Ok) >= before + 50);
        handle.retire(leaver, limit(5_000)).expect("one is left");
        assert!(handle.is_ready() && handle.phase() == Phase::Running);
    }
    let last = handle.retire(1, limit(5_000)).expect_err("it is the last one");
    assert_eq!(last.kind(), ErrorKind::Misuse, "{last}");
    assert!(last.to_string().contains("drain the server"), "{last}");
    let unknown = handle.retire(4, limit(5_000)).expect_err("there are four");
    assert_eq!(unknown.kind(), ErrorKind::Misuse, "{unknown}");
    let before = load.outcomes().get(Outcome::Ok);
    wait_until("the load goes on", || load.outcomes().get(Outcome::Ok) >= before + 50);
    let outcomes = load.stop();
    assert_eq!(outcomes.harmed(), 0, "{outcomes}");
    assert_eq!(outcomes.get(Outcome::Refused), 0, "{outcomes}");
    handle.begin_drain(limit(5_000));
    assert!(running.join().expect("the report").is_balanced());
}

/// Two leave at once, on two addresses, one of them a Unix socket with one queue for all.
#[test]
fn two_leave_at_once_and_a_unix_sockets_queue_is_served_by_the_others() {
    let _turn = turn();
    let name = format!("slipring-retire-{}", std::process::id());
    let server = Server::new(config().cpus("0-3"))
        .listen("127.0.0.1:0", answer_one)
        .listen(format!("unix:@{name}"), echo);
    let (running, addr) = start(server);
    let load = Load::start(addr, 4);
    wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 50);
    std::thread::scope(|scope| {
        for leaver in [0, 3] {
            let handle = running.handle();
            scope.spawn(move || handle.retire(leaver, limit(5_000)).expect("two are left"));
        }
    });
    let before = load.outcomes().get(Outcome::Ok);
    wait_until("the load goes on", || load.outcomes().get(Outcome::Ok) >= before + 50);
    let outcomes = load.stop();
    assert_eq!(outcomes.harmed(), 0, "{outcomes}");
    for _ in 0..20 {
        use std::os::linux::net::SocketAddrExt;
        let name = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
        let mut client = std::os::unix::net::UnixStream::connect_addr(&name).expect("connect");
        client.set_read_timeout(Some(limit(5_000))).expect("set a time limit");
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an answer");
    }
    running.handle().begin_drain(limit(5_000));
    assert!(running.join().expect("the report").is_balanced());
}

#[test]
fn a_core_that_leaves_lets_its_connections_finish_and_the_others_keep_theirs() {
    let _turn = turn();
    let server = Server::new(config().cpus("0-1")).listen("127.0.0.1:0", echo);
    let (running, addr) = start(server);
    let handle = running.handle();
    let mut clients = Vec::new();
    while handle.stats().cores().iter().any(|core| core.accepted < 4) {
        let mut client = connect(addr);
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an answer");
        clients.push(client);
    }
    let since = Instant::now();
    let left = handle.retire(0, limit(5_000)).expect("one is left");
    assert!(since.elapsed() < limit(1_000), "idle ones are not waited for");
    assert_eq!(left.stats.closed.get(CloseReason::Drained), left.stats.accepted);
    assert_eq!(left.stats.live, 0);
    let closed = clients.iter().filter(|&client| {
        let mut client = client;
        client.set_read_timeout(Some(Duration::from_millis(50))).expect("set a time limit");
        matches!(client.read(&mut [0]), Ok(0))
    });
    assert_eq!(closed.count() as u64, left.stats.accepted, "a FIN each, and nobody else");
    handle.begin_drain(limit(5_000));
    assert!(running.join().expect("the report").is_balanced());
}
