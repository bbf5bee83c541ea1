//! Outbound connections: what they reach, how they fail, and that all of it is in the books.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::client::Client;
use crate::common::world::{World, in_a_world};
use crate::common::{config, echo, free_address, limit, wait_until};
use slipring::time::sleep;
use slipring::{CloseReason, Direction, Error, ErrorKind, ListenAddr, Result, Server, net};

/// Asks an echo server, and closes.
async fn ask(addr: impl std::fmt::Display) -> Result<()> {
    let mut conn = net::connect(addr).await?;
    conn.write(b"there and back").await?;
    let mut answer = [0; 14];
    conn.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"there and back");
    Ok(())
}

#[test]
fn an_upstream_is_reached_over_ipv4_ipv6_and_unix_sockets() {
    let path = std::env::temp_dir().join(format!("slipring-connect-{}", std::process::id()));
    let mut server = Server::new(config()).listen("127.0.0.1:0", echo);
    server = server.listen(format!("unix:{}", path.display()), echo);
    server = server.listen(format!("unix:@{}", path.display()), echo);
    let v6 = TcpListener::bind("[::1]:0").is_ok();
    if v6 {
        server = server.listen("[::1]:0", echo);
    } else {
        crate::common::not_run(
            "an_upstream_is_reached_over_ipv4_ipv6_and_unix_sockets",
            "no IPv6 here",
        );
    }
    let upstream = server.start().expect("the server starts");
    let addrs = upstream.local_addrs().to_vec();
    let count = addrs.len() as u64;
    let client = Client::plain();
    for addr in addrs {
        client.run(move || async move { ask(addr).await }).expect("an answer");
    }
    let total = client.end();
    assert_eq!((total.connected, total.connects, total.accepted), (count, count, 0));
    assert_eq!(total.closed.get(CloseReason::Served), count, "{:?}", total.closed);
    crate::common::settle(upstream, count);
}

#[test]
fn where_nobody_listens_the_error_says_so_and_names_the_address() {
    let client = Client::plain();
    let nobody = free_address();
    let path = std::env::temp_dir().join(format!("slipring-nobody-{}", std::process::id()));
    let missing = format!("unix:{}", path.display());
    let dead = format!("unix:{}.dead", path.display());
    drop(UnixListener::bind(&dead["unix:".len()..]).expect("a socket's file"));
    for addr in [nobody.to_string(), missing, dead.clone()] {
        let asked = addr.clone();
        let error = client.run(move || async move { ask(asked).await }).expect_err("nobody");
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains(&addr), "{error}");
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::ConnectionRefused);
    }
    std::fs::remove_file(&dead["unix:".len()..]).expect("it is there");
    // The kernel connects a socket to itself where it is given the very port that it asks for.
    let itself = move || async move { net::connect(nobody).bind(nobody).await.map(drop) };
    let error = client.run(itself).expect_err("nobody");
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    let total = client.end();
    assert_eq!((total.connects_refused, total.connects, total.connected), (4, 4, 0));
}

#[test]
fn a_unix_socket_whose_queue_is_full_is_waited_for() {
    let name = format!("@slipring-full-{}", std::process::id());
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None);
    let socket = socket.expect("a socket");
    let addr = socket2::SockAddr::unix(format!("\0{}", &name[1..])).expect("a short name");
    socket.bind(&addr).and_then(|()| socket.listen(0)).expect("listen");
    let client = Client::start(config().connect_ms(200));
    let target = format!("unix:{name}");
    let connect = |limit_ms: u64| {
        let target = target.clone();
        move || async move {
            let limit = Duration::from_millis(limit_ms);
            net::connect(target).timeout(limit).await.map(drop)
        }
    };
    client.run(connect(200)).expect("the first finds room");
    let error = client.run(connect(60)).expect_err("the queue is full");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert_eq!(client.total().connecting, 0);
    let (handle, accepter) = (client.handle(), socket.try_clone().expect("a descriptor"));
    let accept = thread::spawn(move || {
        wait_until("it waits", || handle.stats().total().connecting == 1);
        accepter.accept().map(drop)
    });
    client.run(connect(10_000)).expect("there is room now");
    accept.join().expect("no panic").expect("accepted");
    let total = client.end();
    assert_eq!((total.connected, total.connects_timed_out, total.connects), (2, 1, 3));
}

#[test]
fn what_can_not_be_connected_to_is_an_error_with_a_remedy() {
    let client = Client::start(config().connections_max(2));
    let (upstream, addr) = crate::common::echo_server(config());
    let error = |text: &'static str| {
        client.run(move || async move { net::connect(text).await.map(drop) }).expect_err(text)
    };
    for text in ["", "80", "127.0.0.1", "[::1]", "::1:80", "host:http", "unix:"] {
        assert_eq!(error(text).kind(), ErrorKind::Config, "{text}");
    }
    let (kind, words) = if cfg!(feature = "blocking") {
        (ErrorKind::Unreachable, "no-such-host.invalid")
    } else {
        (ErrorKind::Unsupported, "feature `blocking`")
    };
    let unknown = error("no-such-host.invalid:80");
    assert_eq!(unknown.kind(), kind, "{unknown}");
    assert!(unknown.to_string().contains(words), "{unknown}");
    // Places are for outbound connections too.
    let (kept, full) = client
        .run(move || async move {
            let first = net::connect(addr).await?;
            let second = net::connect(addr).await?;
            let third = net::connect(addr).await.map(drop);
            drop(second);
            sleep(Duration::from_millis(20)).await;
            let fourth = net::connect(addr).await.map(drop);
            drop(first);
            Ok::<_, Error>((fourth, third))
        })
        .expect("two have places");
    kept.expect("one has left its place");
    let full = full.expect_err("there are two places");
    assert_eq!(full.kind(), ErrorKind::Resource, "{full}");
    assert!(full.to_string().contains("SLIPRING_CONNECTIONS_MAX = 2"), "{full}");
    // Elsewhere than on a core there is nothing to connect with.
    let mut outside = std::pin::pin!(net::connect(addr).into_future());
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let std::task::Poll::Ready(Err(error)) = outside.as_mut().poll(&mut cx) else { panic!() };
    assert_eq!(error.kind(), ErrorKind::Misuse, "{error}");
    client.end();
    crate::common::settle(upstream, 3);
}

#[test]
fn the_local_address_is_the_one_that_was_asked_for() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("bound");
    let client = Client::plain();
    let from = SocketAddr::from(([127, 0, 0, 2], 0));
    client.run(move || async move { net::connect(addr).bind(from).await.map(drop) }).expect("met");
    let (_, peer) = listener.accept().expect("accept");
    assert_eq!(peer.ip(), from.ip());
    let wrong = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 0));
    let error = client.run(move || async move { net::connect(addr).bind(wrong).await.map(drop) });
    assert_eq!(error.expect_err("of another family").kind(), ErrorKind::Config);
    client.end();
}

#[test]
#[cfg(feature = "blocking")]
fn a_name_is_resolved_off_the_core_and_its_cpu() {
    let (upstream, addr) = crate::common::echo_server(config());
    let client = Client::start(config().pin(Some(true)));
    let cpus = |thread: &str| {
        let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).ok()?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some((status.starts_with("Name:\tblocking-"), list.trim().to_owned()))
    };
    let (_, all) = cpus(&std::process::id().to_string()).expect("the main thread");
    let mut asked = 0;
    // A thread of the pool that has nothing to do stays for half a second.
    wait_until("a thread is seen that has asked", || {
        let name = format!("localhost:{}", addr.port());
        client.run(move || async move { ask(name).await }).expect("an answer");
        asked += 1;
        let threads = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
        let threads = threads.filter_map(|it| cpus(&it.file_name().to_string_lossy()));
        let pool: Vec<_> = threads.filter(|(of_the_pool, _)| *of_the_pool).collect();
        assert!(pool.iter().all(|(_, list)| *list == all), "they may run on {pool:?} of {all}");
        !pool.is_empty()
    });
    client.end();
    crate::common::settle(upstream, asked);
}

#[test]
fn an_upstream_may_be_silent_at_first_but_not_for_ever() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("bound");
    let client = Client::start(config().first_byte_ms(50).idle_ms(400));
    let upstream = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let mut question = [0; 1];
        stream.read_exact(&mut question).expect("a question");
        stream.set_read_timeout(Some(Duration::from_millis(200))).expect("set a time limit");
        stream.read(&mut question).expect_err("no end while the answer is late");
        stream.set_read_timeout(None).expect("set no time limit");
        stream.write_all(b"a").expect("answer");
        // Then nothing, until the other end goes.
        let _ = stream.read(&mut question);
    });
    let (answer, error) = client
        .run(move || async move {
            let mut conn = net::connect(addr).await?;
            conn.write(b"q").await?;
            let answer = conn.recv().await?.map(|chunk| chunk.to_vec());
            Ok::<_, Error>((answer, conn.recv().await.map(drop)))
        })
        .expect("connected");
    assert_eq!(answer.as_deref(), Some(&b"a"[..]), "no first byte is due");
    let error = error.expect_err("it is silent for too long");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("SLIPRING_IDLE_MS"), "{error}");
    upstream.join().expect("no panic");
    assert_eq!(client.end().closed.get(CloseReason::Idle), 1);
}

#[test]
fn the_inspector_shows_which_end_has_begun() {
    let (upstream, addr) = crate::common::echo_server(config());
    let client = Client::plain();
    let (handle, go) = (client.handle(), Arc::new(AtomicBool::new(false)));
    let gone = Arc::clone(&go);
    client
        .handle()
        .spawn_on(0, move || async move {
            let conn = net::connect(addr).await.expect("connected");
            while !gone.load(SeqCst) {
                sleep(Duration::from_millis(1)).await;
            }
            drop(conn);
        })
        .expect("a task");
    wait_until("it is there", || handle.stats().total().live == 1);
    let list = handle.connections().expect("a list");
    let info = &list.as_slice()[0];
    assert_eq!((info.direction, info.peer), (Direction::Outbound, Some(addr)));
    assert_eq!(info.listener, None);
    assert!(list.to_string().contains("(outbound)"), "{list}");
    assert!(list.to_json().contains("\"direction\":\"outbound\""), "{}", list.to_json());
    go.store(true, SeqCst);
    client.end();
    crate::common::settle(upstream, 1);
}

#[test]
fn a_dead_network_is_unreachable_and_a_dead_host_costs_a_quarter_of_a_second() {
    let test = "a_dead_network_is_unreachable_and_a_dead_host_costs_a_quarter_of_a_second";
    in_a_world(test, |world: &World| {
        let dead = world.subnet(1);
        world.vanish(1);
        let dead = SocketAddr::from(([10, 77, 1, 2], dead.port()));
        let (upstream, alive) = crate::common::echo_server(config());
        let client = Client::start(config().connect_ms(1_000));
        let nowhere = SocketAddr::from(([192, 0, 2, 1], 80));
        let error = client.run(move || async move { ask(nowhere).await }).expect_err("no way");
        assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
        let error = client.run(move || async move { ask(dead).await }).expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        let begun = Instant::now();
        let addrs = [dead, nowhere, alive];
        let won = client.run(move || async move { net::connect_any(&addrs).await.map(drop) });
        won.expect("one is alive");
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(250) && took < limit(1_000), "{took:?}");
        let total = client.end();
        let classes = [total.connects_unreachable, total.connects_timed_out];
        assert_eq!((total.connected, classes, total.connects_cancelled), (1, [2, 1], 1));
        crate::common::settle(upstream, 1);
    });
}

/// For what only uses the type.
#[expect(dead_code, reason = "it must compile")]
fn any_text_is_an_address(addr: ListenAddr) -> [net::Connect; 3] {
    [net::connect(&addr), net::connect(String::from("h:1")), net::connect("unix:@x")]
}
