//! Notes in an SQLite database, by sqlx and axum: `cargo run --release -p slipring-apps
//! --bin sql`, then `curl -d 'buy milk' 127.0.0.1:7000/notes` and `curl 127.0.0.1:7000/notes/1`.
//!
//! sqlx wants a tokio runtime for its timers. It gets one with a single thread, which each request
//! enters; connections, HTTP and handlers stay on slipring's cores. The database is in memory, or
//! the file named by `-- notes.db`. Ctrl-C or SIGTERM drains it, and closes the database behind.
//! Exit status: 0 when the books balance, 1 when they do not, 2 when it could not serve.

use std::error::Error;
use std::process::ExitCode;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use hyper::service::{Service, service_fn};
use slipring::http::{Http, tower};
use slipring::{Config, DrainReport, Server};
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use tokio_util::context::TokioContext;

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("sql: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("sql-timers")
        .enable_all()
        .build()?;
    let pool = runtime.block_on(open())?;
    let app = Router::new()
        .route("/notes", post(add).get(count))
        .route("/notes/{number}", get(show).delete(remove))
        .with_state(pool.clone());

    let config = Config::from_env()?;
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        let (app, context) = (tower(app.clone()), runtime.handle().clone());
        // Around each request, so that it holds for those of HTTP/2 too, which are tasks.
        let app = service_fn(move |request| TokioContext::new(app.call(request), context.clone()));
        server = server.listen(address, Http::new().handler(app));
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    runtime.block_on(pool.close());
    println!("{report}");
    Ok(report)
}

async fn open() -> Result<SqlitePool, sqlx::Error> {
    let options = match std::env::args().nth(1) {
        Some(file) => SqliteConnectOptions::new().filename(file).create_if_missing(true),
        None => SqliteConnectOptions::new().in_memory(true),
    };
    // A database in memory is gone with its only connection.
    let pool = SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
    let pool = pool.connect_with(options).await?;
    sqlx::query(
        "CREATE TABLE IF NOT EXISTS notes (number INTEGER PRIMARY KEY, text TEXT NOT NULL)",
    )
    .execute(&pool)
    .await?;
    Ok(pool)
}

type Answer = Result<String, (StatusCode, String)>;

async fn add(State(pool): State<SqlitePool>, text: String) -> Answer {
    let insert = sqlx::query("INSERT INTO notes (text) VALUES (?)").bind(text);
    let done = insert.execute(&pool).await.map_err(internal)?;
    Ok(format!("{}\n", done.last_insert_rowid()))
}

async fn count(State(pool): State<SqlitePool>) -> Answer {
    let count = sqlx::query_scalar::<_, i64>("SELECT COUNT(*) FROM notes");
    Ok(format!("{}\n", count.fetch_one(&pool).await.map_err(internal)?))
}

async fn show(State(pool): State<SqlitePool>, Path(number): Path<i64>) -> Answer {
    let select = sqlx::query_scalar::<_, String>("SELECT text FROM notes WHERE number = ?");
    let found = select.bind(number).fetch_optional(&pool).await.map_err(internal)?;
    found.ok_or((StatusCode::NOT_FOUND, format!("there is no note {number}\n")))
}

async fn remove(State(pool): State<SqlitePool>, Path(number): Path<i64>) -> Answer {
    let delete = sqlx::query("DELETE FROM notes WHERE number = ?").bind(number);
    let done = delete.execute(&pool).await.map_err(internal)?;
    Ok(format!("{}\n", done.rows_affected()))
}

fn internal(error: sqlx::Error) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}
