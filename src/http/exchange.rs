//! A connection's requests, from the first byte of one to the end of its response.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use http::header::{CONNECTION, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::service::Service;
use pin_project_lite::pin_project;

use super::incoming::{Incoming, Watching};
use crate::conn::Link;
use crate::requests::Stance;

/// What is known of a connection's requests, for its core.
pub(super) struct Exchange {
    link: Link,
    /// Requests that have not been answered to the end.
    open: Cell<usize>,
    /// Bytes of a message have come, and it is not whole.
    unfinished: Cell<bool>,
    http2: Cell<bool>,
    switched: Cell<bool>,
}

impl Exchange {
    pub(super) fn new(link: Link) -> Exchange {
        Exchange {
            link,
            open: Cell::new(0),
            unfinished: Cell::new(false),
            http2: Cell::new(false),
            switched: Cell::new(false),
        }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    pub(super) fn stance(&self, cx: &mut Context<'_>) -> Stance {
        self.link.stance(cx)
    }

    /// The preface has come, and from now on messages are its affair.
    pub(super) fn speaks_http2(&self) {
        self.http2.set(true);
        self.ends();
    }

    pub(super) fn has_switched(&self) -> bool {
        self.switched.get()
    }

    /// Some bytes of a message have come.
    pub(super) fn received(&self) {
        self.unfinished.set(!self.http2.get());
    }

    pub(super) fn is_amid_message(&self) -> bool {
        self.unfinished.get()
    }

    /// hyper waits for more input: of a message that has begun, if one has.
    pub(super) fn awaits(&self) {
        if self.unfinished.get() {
            self.link.owes_message();
        }
    }

    /// A request is at work.
    pub(super) fn begin(&self) {
        self.open.set(self.open.get() + 1);
        self.whole();
    }

    /// Its head has come, and the body is still to.
    fn begin_with_body(&self) {
        self.open.set(self.open.get() + 1);
    }

    /// A message has come whole.
    fn whole(&self) {
        self.unfinished.set(false);
        self.link.set_busy();
    }

    /// Nothing is at work any more.
    pub(super) fn ends(&self) {
        self.open.set(0);
        self.unfinished.set(false);
        self.link.set_free();
    }

    fn end(&self) {
        match self.open.get() {
            0 => {}
            1 => self.ends(),
            more => self.open.set(more - 1),
        }
    }
}

/// A service whose requests are watched.
pub(super) struct Watched<S> {
    service: S,
    exchange: Rc<Exchange>,
}

impl<S> Watched<S> {
    pub(super) fn new(service: S, exchange: Rc<Exchange>) -> Watched<S> {
        Watched { service, exchange }
    }
}

impl<S, B> Service<Request<hyper::body::Incoming>> for Watched<S>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    B: Body,
{
    type Response = Response<Outgoing<B>>;
    type Error = S::Error;
    type Future = Answering<S::Future>;

    fn call(&self, request: Request<hyper::body::Incoming>) -> Answering<S::Future> {
        let connects = request.method() == Method::CONNECT;
        let mut turn = Turn { exchange: Rc::clone(&self.exchange), body: None };
        let request = if self.exchange.http2.get() || request.body().is_end_stream() {
            self.exchange.begin();
            request.map(Incoming::new)
        } else {
            self.exchange.begin_with_body();
            request.map(|body| {
                let (body, watching) = Incoming::watched(body, self.exchange.link());
                turn.body = Some(watching);
                body
            })
        };
        Answering { future: self.service.call(request), turn: Some(turn), connects }
    }
}

/// A request that is at work until this is dropped.
struct Turn {
    exchange: Rc<Exchange>,
    body: Option<Watching>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.exchange.end();
    }
}

pin_project! {
    /// A request's future.
    pub(super) struct Answering<F> {
        #[pin]
        future: F,
        turn: Option<Turn>,
        connects: bool,
    }
}

impl<F, B, E> Future for Answering<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<Outgoing<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.future.poll(cx))?;
        if let Some(Turn { exchange, body }) = this.turn.as_mut()
            && !exchange.http2.get()
        {
            // A body that is still on its way is not what the response waits for.
            if body.take().is_some() {
                exchange.whole();
            }
            let status = response.status();
            if status == StatusCode::SWITCHING_PROTOCOLS || (*this.connects && status.is_success())
            {
                exchange.switched.set(true);
            } else if exchange.link.is_leaving() {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
        }
        let turn = this.turn.take();
        Poll::Ready(Ok(response.map(|body| Outgoing { body, turn })))
    }
}

pin_project! {
    /// A response's body, until whose end its request is at work.
    pub(super) struct Outgoing<B> {
        #[pin]
        body: B,
        turn: Option<Turn>,
    }
}

impl<B: Body> Body for Outgoing<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
