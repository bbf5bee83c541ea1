//! What needs a tokio runtime works in a handler that enters one: timers, sockets, channels; its
//! threads wake handlers at once, and a drain and the runtime's own end leave the books balanced.

use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use slipring::{CloseReason, Connection, Running, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::context::TokioContext;

use crate::common::peer::{ANY, MB, Peer, Until, bytes, exchange};
use crate::common::{config, connect, late, length, limit, settle, start, wait_until};

#[test]
fn timers_fire_and_never_early() {
    let (runtime, running, addr) = serve(|mut conn| async move {
        while let Some(chunk) = conn.recv().await? {
            let wait = Duration::from_millis(chunk[0].into());
            let since = Instant::now();
            tokio::time::sleep(wait).await;
            assert!(since.elapsed() >= wait);
            let never = tokio::time::timeout(wait, std::future::pending::<()>()).await;
            assert!(never.is_err() && since.elapsed() >= 2 * wait);
            conn.send(chunk).await?;
        }
        Ok(())
    });
    let mut streams: Vec<TcpStream> = (0..50).map(|_| connect(addr)).collect();
    for round in 0..3 {
        for (n, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&[(n as u8 + round) % 20]).expect("send");
        }
        for stream in &mut streams {
            stream.read_exact(&mut [0]).expect("the answer");
        }
    }
    drop(streams);
    let total = settle(running, 50);
    assert_eq!(total.closed.get(CloseReason::Finished), 50, "{:?}", total.closed);
    drop(runtime);
}

#[test]
fn channels_carry_everything_between_handlers_and_tasks() {
    let (asks, mut asked) = mpsc::channel::<(u64, oneshot::Sender<u64>)>(4);
    let (state, state_of) = watch::channel(0u64);
    let (news, _) = broadcast::channel::<u64>(NEWS);
    let runtime = runtime();
    runtime.spawn(async move {
        while let Some((number, reply)) = asked.recv().await {
            let _ = reply.send(number * number);
        }
    });
    let server = Server::new(config()).listen(ANY, {
        let news = news.clone();
        move |mut conn: Connection| {
            let (asks, mut state, mut news) = (asks.clone(), state_of.clone(), news.subscribe());
            // None of them needs the runtime's context.
            async move {
                for number in 0..100 {
                    let (reply, replied) = oneshot::channel();
                    asks.send((number, reply)).await.expect("the task lives");
                    assert_eq!(replied.await, Ok(number * number));
                }
                conn.write(b"r").await?;
                state.wait_for(|seen| *seen == 1_000).await.expect("the sender lives");
                for number in 0..NEWS as u64 {
                    assert_eq!(news.recv().await, Ok(number));
                }
                conn.write(b"d").await
            }
        }
    });
    let (running, addr) = start(server);
    let mut streams: Vec<TcpStream> = (0..20).map(|_| connect(addr)).collect();
    let mut heard = |word: &[u8; 1]| {
        for stream in &mut streams {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a byte");
            assert_eq!(&byte, word);
        }
    };
    heard(b"r");
    runtime.block_on(async {
        for number in 0..NEWS as u64 {
            news.send(number).expect("somebody listens");
            tokio::task::yield_now().await;
        }
        for seen in 1..=1_000 {
            state.send_replace(seen);
        }
    });
    heard(b"d");
    drop(streams);
    settle(running, 20);
}

#[test]
fn a_socket_of_tokio_carries_every_byte_from_a_handler_and_back() {
    let backend = backend();
    let (runtime, running, addr) = serve(move |conn| async move {
        let mut beyond = tokio::net::TcpStream::connect(backend).await?;
        let (mut from, mut to) = beyond.split();
        let (mut read, mut write) = conn.into_split();
        let there = async {
            while let Some(chunk) = read.recv().await? {
                to.write_all(&chunk).await?;
            }
            to.shutdown().await?;
            Ok::<_, slipring::Error>(())
        };
        let back = async {
            let mut buf = vec![0; 30_000];
            loop {
                match from.read(&mut buf).await? {
                    0 => return Ok::<_, slipring::Error>(()),
                    count => write.write(&buf[..count]).await?,
                }
            }
        };
        let (there, back) = tokio::join!(there, back);
        there.and(back)
    });
    let peer = |n| Peer::new(connect(addr), bytes(n, MB + n));
    exchange(&mut (0..4).map(peer).collect::<Vec<_>>(), Until::End);
    settle(running, 4);
    drop(runtime);
}

#[test]
fn wakes_from_its_threads_arrive_at_once_and_none_is_lost() {
    late::watch();
    late::forget();
    let (asks, mut asked) = mpsc::unbounded_channel::<(bool, oneshot::Sender<Instant>)>();
    let latencies = Arc::new(Mutex::new(Vec::new()));
    let runtime = runtime();
    runtime.spawn(async move {
        while let Some((late, reply)) = asked.recv().await {
            if late {
                // By then the core sleeps in the kernel.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let _ = reply.send(Instant::now());
        }
    });
    let server = Server::new(config()).listen(ANY, {
        let latencies = Arc::clone(&latencies);
        move |mut conn: Connection| {
            let (asks, latencies) = (asks.clone(), Arc::clone(&latencies));
            async move {
                while let Some(chunk) = conn.recv().await? {
                    let (reply, replied) = oneshot::channel();
                    asks.send((&*chunk == b"l", reply)).expect("the task lives");
                    let sent = replied.await.expect("the task lives");
                    latencies.lock().expect("no panic").push(sent.elapsed());
                    conn.send(chunk).await?;
                }
                Ok(())
            }
        }
    });
    let (running, addr) = start(server);
    let rounds = 300 * length() as usize;
    for (word, connections) in [(b"l", 1), (b"x", 1), (b"x", 64)] {
        let mut streams: Vec<TcpStream> = (0..connections).map(|_| connect(addr)).collect();
        for _ in 0..rounds {
            for stream in &mut streams {
                stream.write_all(word).expect("send");
            }
            for stream in &mut streams {
                stream.read_exact(&mut [0]).expect("no wake is lost");
            }
        }
        let mut latencies = std::mem::take(&mut *latencies.lock().expect("no panic"));
        assert_eq!(latencies.len(), connections * rounds);
        latencies.sort_unstable();
        let median = latencies[latencies.len() / 2];
        println!("{connections}: median {median:?}, worst {:?}", latencies[latencies.len() - 1]);
        let bound = Duration::from_millis(5) + late::allowance();
        assert!(median < bound, "{median:?} is more than {bound:?}");
    }
    settle(running, 66);
}

#[test]
fn a_drain_lets_what_is_under_way_finish_and_ends_the_rest_at_its_deadline() {
    for (word, reason) in [(b"short", CloseReason::Finished), (b"never", CloseReason::Forced)] {
        let (runtime, running, addr) = serve(|mut conn| async move {
            let mut word = [0; 5];
            conn.read_exact(&mut word).await?;
            conn.write(b"0").await?;
            if &word == b"never" {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(Duration::from_millis(150)).await;
            let number = Handle::current().spawn_blocking(|| 7).await.expect("no panic");
            conn.write(number.to_string().as_bytes()).await
        });
        let mut streams: Vec<TcpStream> = (0..5).map(|_| connect(addr)).collect();
        for stream in &mut streams {
            stream.write_all(word).expect("send");
            stream.read_exact(&mut [0]).expect("it is at work");
        }
        let within = if reason == CloseReason::Forced { 400 } else { 10_000 };
        running.handle().begin_drain(limit(within));
        for stream in &mut streams {
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("a FIN, no reset");
            assert_eq!(answer == b"7", reason != CloseReason::Forced, "{answer:?}");
        }
        let report = running.join().expect("no core failed");
        let total = report.total();
        assert!(report.is_balanced() && total.leaked_operations == 0, "{report}");
        let served = CloseReason::Served;
        let ended = total.closed.get(reason)
            + if reason == CloseReason::Forced { 0 } else { total.closed.get(served) };
        assert_eq!(ended, 5, "{report}");
        drop(runtime);
    }
}

#[test]
fn a_runtime_that_goes_first_costs_the_handlers_that_need_it_and_nobody_else() {
    let (runtime, running, addr) = serve(|mut conn| async move {
        while let Some(chunk) = conn.recv().await? {
            if &*chunk == b"timer" {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            conn.send(chunk).await?;
        }
        Ok(())
    });
    let [mut plain, mut waits, mut late] = [(); 3].map(|()| connect(addr));
    for stream in [&mut plain, &mut waits, &mut late] {
        stream.write_all(b"hello").expect("send");
        stream.read_exact(&mut [0; 5]).expect("the answer");
    }
    waits.write_all(b"timer").expect("send");
    wait_until("it waits", || running.handle().stats().total().bytes_received == 20);
    runtime.shutdown_timeout(limit(5_000));

    // One whose timer was under way hears of it; one that asks for a timer now hears too.
    late.write_all(b"timer").expect("send");
    for stream in [&mut waits, &mut late] {
        assert_eq!(stream.read(&mut [0]).expect("a FIN, no reset"), 0);
    }
    plain.write_all(b"still").expect("send");
    plain.read_exact(&mut [0; 5]).expect("who needs no runtime goes on");
    drop(plain);
    let total = settle(running, 3);
    assert_eq!(total.closed.get(CloseReason::HandlerPanic), 2, "{:?}", total.closed);
}

#[test]
fn what_belongs_to_tokios_own_threads_is_as_documented() {
    let (sender, told) = channel();
    let (runtime, running, addr) = serve(move |mut conn| {
        let sender = sender.clone();
        async move {
            let here = thread::current().id();
            // It blocks the core, and moves nothing away from it.
            let there = tokio::task::block_in_place(|| thread::current().id());
            // Spawned on the runtime it runs on one of its threads.
            let spawned = tokio::spawn(async { thread::current().id() }).await.expect("no panic");
            // So does this.
            let blocked = Handle::current().block_on(async { thread::current().id() });
            let _ = sender.send((here == there, here != spawned, here == blocked));
            conn.recv().await?;
            // There is no local set here; `Connection::spawn` is what is meant.
            tokio::task::spawn_local(async {}).await.expect("it does not come so far");
            Ok(())
        }
    });
    let mut stream = connect(addr);
    let found = told.recv_timeout(limit(10_000)).expect("the handler ran");
    assert_eq!(found, (true, true, true));
    stream.write_all(b"x").expect("send");
    assert_eq!(stream.read(&mut [0]).expect("a FIN, no reset"), 0);
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::HandlerPanic), 1, "{:?}", total.closed);
    drop(runtime);
}

/// A server whose handlers run in the context of a runtime.
fn serve<H, F>(handle: H) -> (Runtime, Running, SocketAddr)
where
    H: Fn(Connection) -> F + Send + Sync + 'static,
    F: Future<Output = slipring::Result<()>> + 'static,
{
    let runtime = runtime();
    let context = runtime.handle().clone();
    let server = Server::new(config())
        .listen(ANY, move |conn| TokioContext::new(handle(conn), context.clone()));
    let (running, addr) = start(server);
    (runtime, running, addr)
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// Somebody else's echo server.
fn backend() -> SocketAddr {
    let listener = TcpListener::bind(ANY).expect("a port");
    let addr = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            thread::spawn(move || {
                let mut buf = vec![0; 30_000];
                while let Ok(count @ 1..) = stream.read(&mut buf) {
                    stream.write_all(&buf[..count]).expect("send");
                }
            });
        }
    });
    addr
}

const NEWS: usize = 100;
