//! A connection whose request is at work is not idle, though hyper listens for more on it.
//!
//! The test: 1. serves HTTP with a handler that takes its time, to more connections than the server
//! keeps idle ones for; 2. sees that all of them are answered; 3. sees that some are evicted once
//! they are idle; 4. settles the account.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::common::peer::ANY;
use crate::common::{config, connect, settle, start, wait_until};
use hyper::service::service_fn;
use hyper::{Request, Response};
use slipring::http::{Http, Incoming};
use slipring::{CloseReason, Server};

/// Answers after three seconds, which is longer than an active connection is spared.
async fn answer(_: Request<Incoming>) -> Result<Response<String>, Infallible> {
    slipring::time::sleep(Duration::from_secs(3)).await;
    Ok(Response::new("answer".to_owned()))
}

fn ask(addr: std::net::SocketAddr) -> TcpStream {
    let mut stream = connect(addr);
    write!(stream, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").expect("send");
    stream
}

/// Reads until the answer has come, or the stream has ended.
fn is_answered(stream: &mut TcpStream) -> bool {
    let mut answer = Vec::new();
    let mut piece = [0; 512];
    while !answer.ends_with(b"answer") {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return false,
            Ok(count) => answer.extend_from_slice(&piece[..count]),
        }
    }
    true
}

#[test]
fn who_is_at_work_is_not_evicted_and_who_is_idle_is() {
    let few = config().cpus("0").connections_max(20).evict_percent(50);
    let (running, addr) =
        start(Server::new(few).listen(ANY, Http::new().handler(service_fn(answer))));
    let handle = running.handle();
    let evicted = || handle.stats().total().closed.get(CloseReason::Evicted);
    // Twelve are more than half of twenty, and are quiet for longer than an active one is spared.
    let mut at_work: Vec<TcpStream> = (0..12).map(|_| ask(addr)).collect();
    let answered = at_work.iter_mut().filter_map(|it| is_answered(it).then_some(())).count();
    assert_eq!((answered, evicted()), (12, 0), "while at work: {}", handle.stats());
    wait_until("idle ones were evicted", || evicted() > 0);
    drop(at_work);
    settle(running, 12);
}
