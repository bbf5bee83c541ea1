//! Full stops under load: who connects while a server closes its listeners is served, refused or
//! held off, but not reset, as far as the privileges allow; and the report names the method.
//!
//! The tests take turns, as they load the machine.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::common::load::{Load, Outcome, Outcomes, answer_one, attach_filter, may_filter};
use crate::common::{config, length, limit, not_run, start, turn, wait_until};
use slipring::{Config, DrainReport, Server, StopMethod};
use socket2::{Domain, Socket, Type};

/// Scenario 3, with the privilege; scenario 6: who is served is in the books; scenario 23: nobody
/// connects to a listener that nobody serves.
#[test]
fn nobody_is_reset_by_a_full_stop_behind_the_syn_filter() {
    let _turn = turn();
    if !may_filter("nobody_is_reset_by_a_full_stop_behind_the_syn_filter") {
        return;
    }
    let total = Outcomes::default();
    for round in 0..8 * length() {
        let (outcomes, report) = stop_under_load(four_cores());
        for core in report.cores() {
            assert_eq!(core.stop, Some(StopMethod::SynFilter), "{report}");
        }
        assert_eq!(outcomes.harmed(), 0, "round {round}: {outcomes}: {report}");
        assert_eq!(report.total().accepted, outcomes.get(Outcome::Ok), "{outcomes}: {report}");
        total.add(&outcomes);
    }
    eprintln!("behind the filter: {total}");
    assert!(total.get(Outcome::Ok) > 0 && total.get(Outcome::HeldOff) > 0, "{total}");
}

/// Scenario 3, without the privilege, or without the wish.
#[test]
fn without_the_filter_a_full_stop_resets_a_tenth_of_what_closing_the_listeners_does() {
    let _turn = turn();
    let (plain, ours) = (Outcomes::default(), Outcomes::default());
    for _ in 0..8 * length() {
        plain.add(&close_plain_listeners_under_load());
        let (outcomes, report) = stop_under_load(four_cores().syn_quiesce_ms(0));
        for core in report.cores() {
            assert_eq!(core.stop, Some(StopMethod::QueueEmptied), "{report}");
        }
        assert_eq!(outcomes.harmed(), outcomes.get(Outcome::Reset), "{outcomes}: {report}");
        ours.add(&outcomes);
    }
    eprintln!("closed outright: {plain}\nqueues emptied: {ours}");
    // Some sixty and more here; with fewer than ten, a tenth of them would be nobody.
    assert!(plain.get(Outcome::Reset) >= 10, "nothing to compare with: {plain}");
    assert!(ours.harmed() * 10 <= plain.harmed(), "{ours}, against {plain}");
}

#[test]
fn a_server_without_the_privilege_says_that_it_emptied_the_queues() {
    let _turn = turn();
    const TEST: &str = "a_server_without_the_privilege_says_that_it_emptied_the_queues";
    if !may_filter(TEST) {
        return;
    }
    let (outcomes, report) = std::thread::spawn(|| {
        drop_net_admin();
        (attach_filter().is_err()).then(|| stop_under_load(four_cores()))
    })
    .join()
    .expect("no panic")
    .unzip();
    let (Some(outcomes), Some(report)) = (outcomes, report) else {
        return not_run(TEST, "this kernel asks for no privilege to filter");
    };
    for core in report.cores() {
        assert_eq!(core.stop, Some(StopMethod::QueueEmptied), "{report}");
    }
    assert_eq!(outcomes.harmed(), outcomes.get(Outcome::Reset), "{outcomes}: {report}");
    assert!(outcomes.get(Outcome::Reset) <= 4, "{outcomes}: {report}");
    assert!(report.to_string().contains("queue_emptied"), "{report}");
    assert!(report.to_json().contains("\"stop\":\"queue_emptied\""), "{report}");
}

/// Takes `CAP_NET_ADMIN` from this thread, and those that it starts.
fn drop_net_admin() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    // Effective, permitted and inheritable, the lower 32 of each and then the upper.
    let mut sets = [0u32; 6];
    // SAFETY: the header and the sets are as capget(2) has them for version 3.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    assert_eq!(got, 0, "capget");
    sets[..3].iter_mut().for_each(|set| *set &= !(1 << 12));
    // SAFETY: as above; both are only read.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    assert_eq!(set, 0, "capset");
}

fn four_cores() -> Config {
    config().cpus("0-3")
}

/// Starts a server, has 8 clients at it, and drains it.
fn stop_under_load(config: Config) -> (Arc<Outcomes>, DrainReport) {
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", answer_one));
    let load = Load::start(addr, 8);
    wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 200);
    running.handle().begin_drain(limit(5_000));
    let report = running.join().expect("the report");
    let outcomes = load.stop();
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().closed.get(slipring::CloseReason::Forced), 0, "{report}");
    (outcomes, report)
}

/// The same with a server that is a thread for each listener, and closes them when it is told.
fn close_plain_listeners_under_load() -> Arc<Outcomes> {
    let mut addr = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut listeners = Vec::new();
    for _ in 0..4 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_port(true).expect("set SO_REUSEPORT");
        socket.set_nonblocking(true).expect("set non-blocking");
        socket.bind(&addr.into()).expect("bind");
        addr = socket.local_addr().expect("its address").as_socket().expect("an IP address");
        listeners.push(socket);
    }
    listeners.iter().for_each(|listener| listener.listen(4096).expect("listen"));
    let stop = Arc::new(AtomicBool::new(false));
    let serve = |listener: Socket| {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            while !stop.load(SeqCst) {
                let Ok((socket, _)) = listener.accept() else {
                    std::thread::yield_now();
                    continue;
                };
                let mut message = [0; 16];
                let mut stream = std::net::TcpStream::from(socket);
                stream.set_nonblocking(false).expect("set blocking");
                if stream.read_exact(&mut message).is_ok() {
                    let _ = stream.write_all(&message);
                }
            }
        })
    };
    let threads: Vec<_> = listeners.into_iter().map(serve).collect();
    let load = Load::start(addr, 8);
    wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 200);
    stop.store(true, SeqCst);
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    load.stop()
}
