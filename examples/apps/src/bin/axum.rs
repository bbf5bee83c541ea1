//! An axum application on slipring: `cargo run --release -p slipring-apps --bin axum`, then
//! `curl 127.0.0.1:7000/`, `curl '127.0.0.1:7000/sum?a=2&b=3'` or
//! `curl --json '{"name":"you"}' 127.0.0.1:7000/greet`.
//!
//! axum's handlers are `Send` futures, wherever they run; here each stays on the core of its
//! connection. Ctrl-C or SIGTERM drains it.
//! Exit status: 0 when the books balance, 1 when they do not, 2 when it could not serve.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::extract::{Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use slipring::http::{Http, tower};
use slipring::{Config, DrainReport, Result, Server};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("axum: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport> {
    let app = Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/sum", get(sum))
        .route("/greet", post(greet))
        .route("/slow", get(slow))
        .with_state(Arc::new(AtomicU64::new(0)));
    let config = Config::from_env()?;
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        server = server.listen(address, Http::new().handler(tower(app.clone())));
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    println!("{report}");
    Ok(report)
}

#[derive(Deserialize)]
struct Summands {
    a: i64,
    b: i64,
}

async fn sum(Query(Summands { a, b }): Query<Summands>) -> String {
    format!("{}\n", a.saturating_add(b))
}

#[derive(Deserialize)]
struct Guest {
    name: String,
}

#[derive(Serialize)]
struct Greeting {
    text: String,
    number: u64,
}

async fn greet(
    State(greeted): State<Arc<AtomicU64>>,
    Json(Guest { name }): Json<Guest>,
) -> Json<Greeting> {
    let number = greeted.fetch_add(1, Relaxed) + 1;
    Json(Greeting { text: format!("hello, {name}"), number })
}

/// A core's timers serve axum's handlers too: a sleep is `Send`.
async fn slow() -> &'static str {
    slipring::time::sleep(Duration::from_millis(300)).await;
    "that took its time\n"
}
