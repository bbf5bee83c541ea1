//! Outbound connections in a drain: whoever waits for an upstream's answer gets it, what nobody
//! uses is nothing to wait for, and the deadline ends the rest.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::client::{Client, check_books};
use crate::common::{config, connect, limit, start, wait_until};
use slipring::{CloseReason, Connection, Phase, Result, Server, net};

/// Asks the upstream for two bytes and gives them to the client.
async fn relay(mut client: Connection, upstream: SocketAddr) -> Result<()> {
    let mut upstream = net::connect(upstream).await?;
    let mut byte = [0];
    client.read_exact(&mut byte).await?;
    upstream.write(&byte).await?;
    let mut answer = Vec::new();
    while answer.len() < 2 {
        match upstream.recv().await? {
            Some(chunk) => answer.extend_from_slice(&chunk),
            None => answer.extend_from_slice(b" and the upstream's end"),
        }
    }
    client.write(&answer).await
}

/// An upstream that hands over its connections, each with a question in it.
fn upstream() -> (SocketAddr, Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("bound");
    let (asked, questions) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            stream.read_exact(&mut [0]).expect("a question");
            if asked.send(stream).is_err() {
                return;
            }
        }
    });
    (addr, questions)
}

#[test]
fn a_handler_that_waits_for_an_upstream_is_waited_for_and_gets_the_answer() {
    let (upstream, questions) = upstream();
    let server = Server::new(config()).listen("127.0.0.1:0", move |conn| relay(conn, upstream));
    let (running, addr) = start(server);
    let handle = running.handle();
    let mut client = connect(addr);
    client.write_all(b"q").expect("ask");
    let mut question = questions.recv_timeout(limit(5_000)).expect("it is asked");
    let begun = Instant::now();
    handle.begin_drain(limit(20_000));
    wait_until("it drains", || handle.phase() >= Phase::DrainConnections);
    // Nothing but turns of the cores: a core that said `None` at once has done so by then.
    wait_until("cores have turned", || handle.connections().is_ok_and(|list| list.len() == 2));
    // It waits anew in the drain, too.
    question.write_all(b"a").expect("answer");
    wait_until("it is heard", || handle.stats().total().bytes_received == 2);
    question.write_all(b"b").expect("answer");
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("no reset");
    assert_eq!(answer, b"ab");
    assert_eq!(question.read(&mut [0]).expect("no reset"), 0, "the upstream gets a FIN");
    let report = running.join().expect("no core fails");
    check_books(&report);
    assert_eq!(report.total().closed.get(CloseReason::Served), 2, "{report}");
    assert!(begun.elapsed() < limit(5_000), "it took {:?}", begun.elapsed());
    assert!(report.to_string().contains("1 accepted + 1 connected = 2 closed"), "{report}");
    assert!(report.to_json().contains("\"connected\":1"), "{}", report.to_json());
}

#[test]
fn a_pool_of_connections_that_nobody_uses_is_nothing_to_wait_for() {
    let (echo, upstream) = crate::common::echo_server(config());
    // A handler that takes a connection of the pool and puts it back.
    let server = Server::new(config()).listen_with("127.0.0.1:0", move |_core| {
        let pool: Rc<RefCell<Vec<Connection>>> = Rc::default();
        move |mut client: Connection| {
            let pool = Rc::clone(&pool);
            async move {
                while let Some(chunk) = client.recv().await? {
                    let pooled = pool.borrow_mut().pop();
                    let mut upstream = match pooled {
                        Some(pooled) => pooled,
                        None => net::connect(upstream).await?,
                    };
                    upstream.send(chunk).await?;
                    let answer = upstream.recv().await?.expect("an echo");
                    client.send(answer).await?;
                    pool.borrow_mut().push(upstream);
                }
                Ok(())
            }
        }
    });
    let (running, addr) = start(server);
    let mut answer = [0; 1];
    for _ in 0..20 {
        let mut client = connect(addr);
        client.write_all(b"x").expect("ask");
        client.read_exact(&mut answer).expect("an answer");
    }
    let total = || running.handle().stats().total();
    wait_until("the clients are gone", || total().live == total().connected);
    let begun = Instant::now();
    let report = running.handle().drain(limit(20_000)).expect("a report");
    assert!(begun.elapsed() < limit(2_000), "it waited for {:?}", begun.elapsed());
    check_books(&report);
    let total = report.total();
    assert!((1..=2).contains(&total.connected), "one for each core: {report}");
    assert_eq!(total.closed.get(CloseReason::Drained), total.connected, "{report}");
    assert_eq!(total.closed.get(CloseReason::Forced), 0, "{report}");
    assert!(report.cores().iter().all(|core| core.oldest_survivor.is_none()), "{report}");
    let report = echo.handle().drain(limit(5_000)).expect("a report");
    assert_eq!(report.total().closed.get(CloseReason::Finished), total.connected, "{report}");
}

#[test]
fn what_the_upstream_does_not_answer_is_forced_at_the_deadline() {
    let (upstream, questions) = upstream();
    let server = Server::new(config()).listen("127.0.0.1:0", move |conn| relay(conn, upstream));
    let (running, addr) = start(server);
    let mut client = connect(addr);
    client.write_all(b"q").expect("ask");
    let mut question = questions.recv_timeout(limit(5_000)).expect("it is asked");
    let begun = Instant::now();
    let report = running.handle().drain(Duration::from_millis(500)).expect("a report");
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(500) + limit(100), "{took:?}");
    check_books(&report);
    assert_eq!(report.total().closed.get(CloseReason::Forced), 2, "{report}");
    for stream in [&mut client, &mut question] {
        assert_eq!(stream.read(&mut [0]).expect("a FIN and no reset"), 0);
    }
}

#[test]
fn an_attempt_that_is_under_way_ends_with_the_drain() {
    let mute = crate::common::client::Mute::tcp();
    let (addr, client) = (mute.addr, Client::plain());
    let (tell, told) = channel();
    client
        .handle()
        .spawn_on(0, move || async move {
            let error = net::connect(addr).await.map(drop).expect_err("nobody answers");
            let _ = tell.send(error.kind());
        })
        .expect("a task");
    wait_until("it is under way", || client.total().connecting == 1);
    let report = client.drain(200);
    assert_eq!(report.total().connects_cancelled, 1, "{report}");
    assert!(report.to_string().contains("1 attempts to connect: cancelled"), "{report}");
    // The task was dropped, or heard of it in time.
    assert!(told.recv().is_err() || report.total().tasks_forced == 0);
}
