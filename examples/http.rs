//! HTTP/1 and HTTP/2 by hyper, with state of each core that needs no lock:
//! `cargo run --release --features hyper --example http`, then `curl 127.0.0.1:7000/hello` or
//! `curl --http2-prior-knowledge -d text 127.0.0.1:7000/upper`.
//!
//! Ctrl-C or SIGTERM drains it: keep-alive connections are told to close in their next response.
//! Exit status: 0 when the books balance, 1 when they do not, 2 when it could not serve.

use std::cell::Cell;
use std::process::ExitCode;
use std::rc::Rc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use slipring::http::{Http, Incoming};
use slipring::{Config, DrainReport, Result, Server};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("http: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport> {
    let config = Config::from_env()?;
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        server = server.listen_with(address, |core| {
            let state = Rc::new(State { core: core.index, served: Cell::new(0) });
            Http::new().handler(service_fn(move |request| answer(Rc::clone(&state), request)))
        });
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    println!("{report}");
    Ok(report)
}

/// What a core's requests share.
struct State {
    core: usize,
    served: Cell<u64>,
}

async fn answer(
    state: Rc<State>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
    state.served.set(state.served.get() + 1);
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/hello") => (StatusCode::OK, Bytes::from_static(b"hello\n")),
        (&Method::GET, "/served") => {
            let text = format!("core {} has served {}\n", state.core, state.served.get());
            (StatusCode::OK, Bytes::from(text))
        }
        (&Method::POST, "/upper") => upper(request.into_body()).await,
        _ => (StatusCode::NOT_FOUND, Bytes::from_static(b"GET /hello, /served; POST /upper\n")),
    };
    Response::builder().status(status).body(Full::new(body))
}

/// The body in upper case, if it is not too long.
async fn upper(body: Incoming) -> (StatusCode, Bytes) {
    match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(body) => (StatusCode::OK, Bytes::from(body.to_bytes().to_ascii_uppercase())),
        Err(error) => (StatusCode::PAYLOAD_TOO_LARGE, Bytes::from(format!("{error}\n"))),
    }
}

const BODY_BYTES_MAX: usize = 1 << 20;
