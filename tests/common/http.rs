//! A service to ask by HTTP, and a client that takes answers by the letter.
#![cfg(feature = "hyper")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use slipring::http::{Http, Incoming};
use slipring::time::{Sleep, sleep};
use slipring::{Config, Handle, Running, Server};

pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// Serves [`answer`] on a port that the kernel chooses.
pub fn serve(config: Config) -> (Running, SocketAddr) {
    let http = Http::new().handler(service_fn(answer));
    super::start(Server::new(config).listen("127.0.0.1:0", http))
}

/// Does what the path's first part says, with the number that is its second.
pub async fn answer(request: Request<Incoming>) -> Result<Response<Body>, hyper::Error> {
    let path = request.uri().path().to_owned();
    let mut parts = path.split('/').skip(1);
    let what = parts.next().unwrap_or_default();
    let number: u64 = parts.next().and_then(|text| text.parse().ok()).unwrap_or(0);
    let pause = Duration::from_millis(number);
    Ok(match what {
        "hello" => text(StatusCode::OK, "hello\n"),
        // The body, and its trailers as a header.
        "echo" => match request.into_body().collect().await {
            Ok(whole) => {
                let trailers = whole.trailers().map(|fields| format!("{fields:?}"));
                let mut echo = text(StatusCode::OK, whole.to_bytes());
                if let Some(trailers) = trailers {
                    echo.headers_mut().insert("x-trailers", trailers.parse().expect("a value"));
                }
                echo
            }
            Err(error) => text(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
        },
        // The body while it comes.
        "stream" => Response::new(request.into_body().boxed_unsync()),
        // Does not look at the body.
        "ignore" => text(StatusCode::PAYLOAD_TOO_LARGE, "too much\n"),
        "late" => {
            sleep(pause).await;
            text(StatusCode::OK, "late\n")
        }
        // First it thinks, then it reads.
        "thinks" => {
            sleep(pause).await;
            text(StatusCode::OK, length(request.into_body()).await)
        }
        // First it reads, then it thinks.
        "reads" => {
            let answer = length(request.into_body()).await;
            sleep(pause).await;
            text(StatusCode::OK, answer)
        }
        // Both on another thread.
        "thread" => {
            let (done, answer) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build();
                let answer = runtime.expect("a runtime").block_on(length(request.into_body()));
                std::thread::sleep(pause);
                done.send(answer)
            });
            text(StatusCode::OK, answer.await.expect("the thread says it"))
        }
        "bytes" => text(StatusCode::OK, pattern(number as usize)),
        "pieces" => Response::new(Pieces::new(number, 16 * 1024, None).boxed_unsync()),
        "drips" => {
            let step = Some(Duration::from_millis(20));
            Response::new(Pieces::new(number, 1, step).boxed_unsync())
        }
        "none" => text(StatusCode::NO_CONTENT, ""),
        "unmodified" => text(StatusCode::NOT_MODIFIED, ""),
        _ => text(StatusCode::NOT_FOUND, "no such path\n"),
    })
}

async fn length(body: Incoming) -> String {
    match body.collect().await {
        Ok(whole) => whole.to_bytes().len().to_string(),
        Err(error) => error.to_string(),
    }
}

pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(body.into()).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

/// Bytes of which none is like its neighbours.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

/// A body of unknown length, piece by piece.
struct Pieces {
    left: u64,
    piece: Bytes,
    step: Option<Duration>,
    pause: Option<Sleep>,
}

impl Pieces {
    fn new(left: u64, piece: usize, step: Option<Duration>) -> Pieces {
        Pieces { left, piece: pattern(piece).into(), step, pause: None }
    }
}

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        if let Some(step) = self.step {
            ready!(Pin::new(self.pause.get_or_insert_with(|| sleep(step))).poll(cx));
            self.pause = None;
        }
        self.left -= 1;
        Poll::Ready(Some(Ok(Frame::data(self.piece.clone()))))
    }
}

/// The states of a server's connections, in order.
pub fn states(handle: &Handle) -> Vec<&'static str> {
    let connections = handle.connections().expect("a list");
    let mut states: Vec<_> = connections.iter().map(|it| it.state.as_str()).collect();
    states.sort_unstable();
    states
}

/// An answer, taken apart.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The status line and the headers, in lower case.
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// It says that no other follows.
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.contains("close"))
    }
}

/// How a connection has ended where an answer was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// A FIN between answers.
    Fin,
    /// A FIN in the middle of one.
    Cut,
    Reset,
    TimedOut,
}

pub struct Client {
    pub stream: TcpStream,
    /// Received and not taken.
    pub rest: Vec<u8>,
}

impl Client {
    pub fn connect(addr: SocketAddr) -> Client {
        Client { stream: super::connect(addr), rest: Vec::new() }
    }

    /// Sends as much as the server takes: it may have closed already.
    pub fn say(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    pub fn get(&mut self, path: &str) -> Result<Answer, End> {
        self.say(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        self.answer()
    }

    pub fn answer(&mut self) -> Result<Answer, End> {
        self.answer_to(false)
    }

    /// The next answer, to a HEAD request or another one.
    pub fn answer_to(&mut self, head_only: bool) -> Result<Answer, End> {
        let end = loop {
            match find(&self.rest, b"\r\n\r\n") {
                Some(end) => break end,
                None => self.more()?,
            }
        };
        let head: Vec<u8> = self.rest.drain(..end + 4).collect();
        let head = String::from_utf8(head).expect("a head is text").to_ascii_lowercase();
        let version = head.get(..9).unwrap_or_default();
        assert!(["http/1.1 ", "http/1.0 "].contains(&version), "{head:?}");
        let status = head[9..12].parse().expect("a status");
        let mut answer = Answer { status, head, body: Vec::new() };
        let bodiless = head_only || status < 200 || status == 204 || status == 304;
        answer.body = if bodiless {
            Vec::new()
        } else if answer.header("transfer-encoding").is_some_and(|it| it == "chunked") {
            self.chunks()?
        } else if let Some(length) = answer.header("content-length") {
            let length = length.parse().expect("a length");
            self.take(length)?
        } else {
            while self.more_until_end()? {}
            std::mem::take(&mut self.rest)
        };
        Ok(answer)
    }

    /// Waits for the end, before which nothing may come.
    pub fn end(&mut self) -> End {
        let left = String::from_utf8_lossy(&self.rest).into_owned();
        assert!(left.is_empty(), "this was not asked for: {left:?}");
        let end = self.more().expect_err("nothing comes any more");
        assert!(self.rest.is_empty());
        end
    }

    fn chunks(&mut self) -> Result<Vec<u8>, End> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            let length = usize::from_str_radix(&line, 16).expect("a chunk's length");
            if length == 0 {
                while !self.line()?.is_empty() {}
                return Ok(body);
            }
            body.extend(self.take(length)?);
            assert_eq!(self.line()?, "", "after a chunk");
        }
    }

    pub fn line(&mut self) -> Result<String, End> {
        loop {
            if let Some(end) = find(&self.rest, b"\r\n") {
                let line: Vec<u8> = self.rest.drain(..end + 2).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.more()?;
        }
    }

    pub fn take(&mut self, length: usize) -> Result<Vec<u8>, End> {
        while self.rest.len() < length {
            self.more().map_err(|end| if end == End::Fin { End::Cut } else { end })?;
        }
        Ok(self.rest.drain(..length).collect())
    }

    /// Receives more; the end is none.
    pub fn more(&mut self) -> Result<(), End> {
        let fin = if self.rest.is_empty() { End::Fin } else { End::Cut };
        if self.more_until_end()? { Ok(()) } else { Err(fin) }
    }

    fn more_until_end(&mut self) -> Result<bool, End> {
        let mut buf = [0; 64 * 1024];
        match self.stream.read(&mut buf) {
            Ok(count) => {
                self.rest.extend_from_slice(&buf[..count]);
                Ok(count > 0)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(End::TimedOut),
            Err(_) => Err(End::Reset),
        }
    }
}

pub fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
