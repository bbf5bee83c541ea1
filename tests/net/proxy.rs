//! Proxied connections: the bytes that go each way, how one side's end, reset or slowness reaches
//! the other, and what a drain makes of them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::client::check_books;
use crate::common::load::{Load, Outcome, answer_one};
use crate::common::peer::{MB, Peer, Until, bytes, exchange};
use crate::common::{config, connect, first_cpus, free_address, limit, start, wait_until};
use slipring::{
    CloseReason, Config, Connection, DeadlineKind, DrainReport, Phase, Result, Running, Server, net,
};
use socket2::SockRef;

async fn pass_on(mut client: Connection, upstream: SocketAddr) -> Result<()> {
    let mut upstream = net::connect(upstream).await?;
    net::proxy(&mut client, &mut upstream).await.map(drop)
}

/// A proxy of one core before an upstream.
fn proxy(config: Config, upstream: SocketAddr) -> (Running, SocketAddr) {
    let server = Server::new(config.cpus(&first_cpus(1)));
    start(server.listen("127.0.0.1:0", move |client| pass_on(client, upstream)))
}

/// The far ends of proxied connections, as they come.
fn upstream() -> (SocketAddr, Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("bound");
    let (came, streams) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("accept");
            stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
            if came.send(stream).is_err() {
                return;
            }
        }
    });
    (addr, streams)
}

/// Both ends of one proxied connection.
fn pair(addr: SocketAddr, streams: &Receiver<TcpStream>) -> (TcpStream, TcpStream) {
    let client = connect(addr);
    (client, streams.recv_timeout(limit(10_000)).expect("the proxy connects"))
}

fn end(running: Running) -> DrainReport {
    wait_until("nothing is left", || running.handle().stats().total().live == 0);
    running.handle().begin_drain(limit(5_000));
    let report = running.join().expect("no core fails");
    check_books(&report);
    report
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
}

/// For so long neither a byte comes nor an end.
fn hears_nothing(stream: &mut TcpStream, ms: u64) {
    stream.set_read_timeout(Some(Duration::from_millis(ms))).expect("set a time limit");
    let open = stream.read(&mut [0]).expect_err("nothing comes");
    assert_eq!(open.kind(), ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
}

/// Sends all, half-closes, and reads to the end meanwhile.
fn talk(stream: TcpStream, words: &'static [u8]) -> Vec<u8> {
    crate::common::peer::ask(stream, words)
}

#[test]
fn bytes_of_every_size_come_back_through_a_proxy() {
    let (echo, upstream) = crate::common::echo_server(config());
    let (running, addr) = proxy(config(), upstream);
    let sizes = [0, 1, 4_095, 4_096, 4_097, 100_000, MB, 3 * MB];
    let peer = |(n, size): (usize, &usize)| {
        Peer::new(connect(addr), bytes(n, *size)).in_pieces_of([1_000, 64 * 1024, 7_777][n % 3])
    };
    let mut peers: Vec<Peer> = sizes.iter().enumerate().map(peer).collect();
    exchange(&mut peers, Until::End);
    drop(peers);
    let total = end(running).total();
    let count = sizes.len() as u64;
    assert_eq!((total.accepted, total.connected), (count, count));
    assert_eq!(total.closed.get(CloseReason::Finished), 2 * count, "{:?}", total.closed);
    crate::common::settle(echo, count);
}

#[test]
fn two_streams_go_each_their_way_and_their_bytes_are_counted() {
    let (upstream, streams) = upstream();
    let (tell, told) = channel();
    let server = Server::new(config()).listen("127.0.0.1:0", move |mut client: Connection| {
        let tell = tell.clone();
        async move {
            let mut upstream = net::connect(upstream).await?;
            let passed_on = net::proxy(&mut client, &mut upstream).await?;
            let _ = tell.send(passed_on);
            Ok(())
        }
    });
    let (running, addr) = start(server);
    for (n, [there, back]) in [[0, 0], [1, 0], [0, 1], [3 * MB, 10], [10, 3 * MB], [2 * MB, 2 * MB]]
        .into_iter()
        .enumerate()
    {
        let (client, far) = pair(addr, &streams);
        let (question, answer) = (bytes(n, there), bytes(100 + n, back));
        let far = thread::spawn(move || talk(far, answer));
        assert!(talk(client, question) == answer, "{n}: what came back");
        assert!(far.join().expect("no panic") == question, "{n}: what went there");
        let passed_on = told.recv_timeout(limit(5_000)).expect("it has ended well");
        assert_eq!((passed_on.a_to_b, passed_on.b_to_a), (there as u64, back as u64), "{n}");
    }
    end(running);
}

#[test]
fn the_end_of_one_side_is_passed_on_and_the_other_goes_on_to_its_own() {
    let (upstream, streams) = upstream();
    let (running, addr) = proxy(config(), upstream);
    for client_first in [true, false] {
        let (client, far) = pair(addr, &streams);
        let (mut first, mut second) = if client_first { (client, far) } else { (far, client) };
        first.write_all(bytes(1, MB)).expect("send");
        first.shutdown(Shutdown::Write).expect("half-close");
        let mut got = Vec::new();
        second.read_to_end(&mut got).expect("a FIN behind all of it");
        assert!(got == bytes(1, MB));
        // The other has only begun.
        let late = thread::spawn(move || {
            second.write_all(bytes(2, MB)).expect("send");
            second
        });
        let mut got = vec![0; MB];
        first.read_exact(&mut got).expect("all of it");
        assert!(got == bytes(2, MB));
        first.set_nonblocking(true).expect("set non-blocking");
        let open = first.read(&mut [0]).expect_err("no end yet");
        assert_eq!(open.kind(), ErrorKind::WouldBlock);
        first.set_nonblocking(false).expect("set blocking");
        drop(late.join().expect("no panic"));
        assert_eq!(first.read(&mut [0]).expect("a FIN"), 0);
    }
    let report = end(running);
    assert_eq!(report.total().closed.get(CloseReason::Finished), 4, "{report}");
}

#[test]
fn a_reset_of_one_side_reaches_the_other_as_a_reset() {
    let (upstream, streams) = upstream();
    let (running, addr) = proxy(config(), upstream);
    for (clients, amid) in [(true, false), (true, true), (false, false), (false, true)] {
        let (client, far) = pair(addr, &streams);
        let (mut breaks, mut hears) = if clients { (client, far) } else { (far, client) };
        breaks.write_all(b"half a me").expect("send");
        hears.read_exact(&mut [0; 9]).expect("it is passed on");
        if amid {
            hears.write_all(bytes(3, 1_000)).expect("send");
        }
        reset(breaks);
        let heard = hears.read(&mut [0]).expect_err("no clean end");
        assert_eq!(heard.kind(), ErrorKind::ConnectionReset, "{clients} {amid}");
    }
    let closed = end(running).total().closed;
    let counts = [CloseReason::PeerReset, CloseReason::Aborted].map(|reason| closed.get(reason));
    assert_eq!(counts, [4, 4], "{closed:?}");
}

#[test]
fn a_side_whose_deadline_passes_is_no_clean_end_for_the_other() {
    let (upstream, streams) = upstream();
    let (running, addr) = proxy(config().idle_ms(200), upstream);
    let (mut client, mut far) = pair(addr, &streams);
    far.write_all(b"half an ans").expect("send");
    client.read_exact(&mut [0; 11]).expect("it is passed on");
    let ends = [&mut client, &mut far].map(|stream| stream.read(&mut [0]).map_err(|e| e.kind()));
    assert_eq!(ends, [Err(ErrorKind::ConnectionReset); 2]);
    let closed = end(running).total().closed;
    let counts = [CloseReason::Idle, CloseReason::Aborted].map(|reason| closed.get(reason));
    assert_eq!((counts[0] > 0, counts[0] + counts[1]), (true, 2), "{closed:?}");
}

#[test]
fn a_reader_that_is_slow_holds_up_its_sender_in_bounded_memory_and_gets_everything() {
    const QUEUE: usize = 64 * 1024;
    let (upstream, streams) = upstream();
    // No more patience with a busy handler, or after a peer's end, than this test goes on.
    let config = config().send_queue_bytes(QUEUE).receive_queue_bytes(QUEUE);
    let config =
        config.handler_ms(200).half_close_ms(200).buffer_bytes(1_024).large_buffer_bytes(1_024);
    let (running, addr) = proxy(config, upstream);
    let handle = running.handle();
    let (mut client, far) = pair(addr, &streams);
    SockRef::from(&client).set_recv_buffer_size(64 * 1024).expect("a small buffer");
    client.write_all(b"q").expect("ask");
    let mut sender = far.try_clone().expect("a descriptor");
    let sent = thread::spawn(move || {
        for _ in 0..8 {
            sender.write_all(bytes(4, 3 * MB)).expect("send");
        }
        sender.shutdown(Shutdown::Write).expect("half-close");
    });
    let memory = || handle.stats().total().memory_bytes as usize;
    wait_until("the queues are full", || memory() >= QUEUE);
    // It reads, a little at a time, for longer than a handler may be busy.
    let (begun, mut got) = (Instant::now(), vec![0; 3 * MB]);
    let (mut most, mut read) = (0, 0);
    while begun.elapsed() < Duration::from_millis(700) {
        client.read_exact(&mut got[read..read + 64]).expect("some of it");
        read += 64;
        most = most.max(memory());
        let next = Instant::now() + Duration::from_millis(2);
        wait_until("it wants more", || Instant::now() >= next);
    }
    client.read_exact(&mut got[read..]).expect("the rest of the first part");
    for n in 0..8 {
        assert!(got == bytes(4, 3 * MB), "part {n}");
        if n < 7 {
            client.read_exact(&mut got).expect("all of it");
            most = most.max(memory());
        }
    }
    sent.join().expect("no panic");
    assert_eq!(client.read(&mut [0]).expect("a FIN"), 0);
    // Each queue may be exceeded, by what a multishot receive brings while it is cancelled.
    assert!(most <= 4 * QUEUE, "{most} bytes were queued");
    drop((client, far));
    let report = end(running);
    assert_eq!(report.total().closed.get(CloseReason::Finished), 2, "{report}");
}

#[test]
fn where_the_upstream_is_down_the_client_gets_an_end_and_the_books_say_why() {
    let (running, addr) = proxy(config(), free_address());
    for _ in 0..10 {
        assert_eq!(connect(addr).read(&mut [0]).expect("a FIN"), 0);
    }
    let total = end(running).total();
    assert_eq!((total.connects_refused, total.connected, total.accepted), (10, 0, 10));
    assert_eq!(total.closed.get(CloseReason::HandlerError), 10, "{:?}", total.closed);
}

#[test]
fn a_drain_lets_an_answer_that_is_on_its_way_come_whole_and_keeps_no_idle_pair() {
    let (upstream, streams) = upstream();
    let (running, addr) = proxy(config().new_grace_ms(300), upstream);
    let handle = running.handle();
    let (mut idle, mut idles) = pair(addr, &streams);
    idle.write_all(b"q").expect("ask");
    idles.read_exact(&mut [0]).expect("a question");
    idles.write_all(b"a").expect("answer");
    idle.read_exact(&mut [0]).expect("an answer");
    let (mut client, mut far) = pair(addr, &streams);
    client.write_all(b"q").expect("ask");
    far.read_exact(&mut [0]).expect("a question");
    handle.begin_drain(limit(20_000));
    wait_until("it drains", || handle.phase() >= Phase::DrainConnections);
    // The pair whose answer was given is over; the other one waits for its own.
    let begun = Instant::now();
    assert_eq!(idle.read(&mut [0]).expect("a FIN"), 0);
    assert!(begun.elapsed() < limit(2_000), "{:?}", begun.elapsed());
    assert_eq!(idles.read(&mut [0]).expect("a FIN"), 0);
    // It is not told of any end while it answers.
    hears_nothing(&mut far, 500);
    for part in 0..4 {
        far.write_all(bytes(part, 100_000)).expect("answer");
        hears_nothing(&mut far, 100);
    }
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("all of it, and a FIN");
    let whole: Vec<u8> = (0..4).flat_map(|part| bytes(part, 100_000)).copied().collect();
    assert!(answer == whole, "{} of {} bytes", answer.len(), whole.len());
    let report = running.join().expect("no core fails");
    check_books(&report);
    let closed = report.total().closed;
    let counts = [CloseReason::Drained, CloseReason::Served].map(|reason| closed.get(reason));
    assert_eq!(counts, [2, 2], "{report}");
}

#[test]
fn a_pair_whose_upstream_is_at_its_greatest_age_ends_well_when_it_is_quiet() {
    let (upstream, streams) = upstream();
    let config = config().lifetime_ms(300).drain_ms(1_500).new_grace_ms(100);
    let server = Server::new(config).listen("127.0.0.1:0", move |client: Connection| async move {
        client.set_deadline(DeadlineKind::Lifetime, Duration::from_secs(3_600))?;
        pass_on(client, upstream).await
    });
    let (running, addr) = start(server);
    let (mut client, mut far) = pair(addr, &streams);
    client.write_all(b"q").expect("ask");
    far.read_exact(&mut [0]).expect("a question");
    // It is old while it answers.
    hears_nothing(&mut far, 600);
    far.write_all(b"a").expect("answer");
    client.read_exact(&mut [0]).expect("an answer");
    let ends = [&mut client, &mut far].map(|stream| stream.read(&mut [0]).map_err(|e| e.kind()));
    assert_eq!(ends, [Ok(0); 2]);
    let closed = end(running).total().closed;
    assert_eq!(closed.get(CloseReason::Served), 2, "{closed:?}");
}

#[test]
fn drains_under_load_cut_nobody_off() {
    for round in 0..3 {
        let (answers, upstream) = start(Server::new(config()).listen("127.0.0.1:0", answer_one));
        let (running, addr) = proxy(config(), upstream);
        let load = Load::start(addr, 4);
        wait_until("there is load", || load.outcomes().get(Outcome::Ok) > 100);
        running.handle().begin_drain(limit(10_000));
        let report = running.join().expect("no core fails");
        let outcomes = load.stop();
        check_books(&report);
        println!("round {round}: {outcomes}: {report}");
        // Whoever was accepted before it had said anything may be told so by a FIN.
        let harmed = outcomes.harmed() - outcomes.get(Outcome::Eof);
        assert_eq!(harmed, 0, "round {round}: {outcomes}: {report}");
        assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
        assert!(answers.handle().drain(limit(5_000)).expect("a report").is_balanced());
    }
}
