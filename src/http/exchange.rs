//! A connection's requests, from the first byte of one to the end of its response.

use std::cell::Cell;
use std::future::Future;
use std::io::IoSlice;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::header::{CONNECTION, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::Service;
use pin_project_lite::pin_project;

use crate::conn::Link;
use crate::requests::{SoFar, Stance};

/// What is known of a connection's requests, for its core.
///
/// hyper does not tell when a message begins and when it has come whole. But it asks for the rest
/// of an HTTP/1 message as long as there is one, and room for it: the first piece of a body, and
/// then what the handler wants. So what it does not ask for, the peer does not owe.
pub(super) struct Exchange {
    link: Link,
    /// Requests that have not been answered to the end.
    open: Cell<usize>,
    /// Bytes of a message have come, and it is not known to be whole.
    unfinished: Cell<bool>,
    turn: Cell<Turn>,
    /// hyper waits for input, as far as it was polled.
    asked: Cell<bool>,
    /// A response is there: it does not wait for what may still be on its way of the request.
    answered: Cell<bool>,
    /// The request at hand has a body.
    has_body: Cell<bool>,
    /// A request was answered, and the end of its body may be what comes next.
    left_over: Cell<bool>,
    /// The last request had no body, so hyper may have the beginning of the next one in hand, and
    /// nobody has looked.
    may_have_more: Cell<bool>,
    /// hyper may have output in hand, as it has not flushed since there was some.
    behind: Cell<bool>,
    /// How far the message had come when nobody waited for its rest any more.
    so_far: Cell<Option<SoFar>>,
    http2: Cell<bool>,
    switched: Cell<bool>,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// There is no message.
    Nobodys,
    /// The peer owes the rest of a message.
    Peers,
    Handlers,
}

impl Exchange {
    pub(super) fn new(link: Link) -> Exchange {
        Exchange {
            link,
            open: Cell::new(0),
            unfinished: Cell::new(false),
            turn: Cell::new(Turn::Nobodys),
            asked: Cell::new(false),
            answered: Cell::new(false),
            has_body: Cell::new(false),
            left_over: Cell::new(false),
            may_have_more: Cell::new(false),
            behind: Cell::new(false),
            so_far: Cell::new(None),
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
        self.link.asks_by_itself();
        self.ends();
    }

    pub(super) fn is_http2(&self) -> bool {
        self.http2.get()
    }

    pub(super) fn has_switched(&self) -> bool {
        self.switched.get()
    }

    /// Input is about to be asked for: the rest of a message, if one has begun. The core has to
    /// know before, as it tells who is between messages that the server drains.
    pub(super) fn asks(&self) {
        let owes = self.unfinished.get() && !self.answered.get();
        if owes && self.turn.replace(Turn::Peers) != Turn::Peers {
            self.link.owes_message(self.so_far.take());
        }
    }

    pub(super) fn is_amid_message(&self) -> bool {
        self.unfinished.get()
    }

    /// hyper does not say whether the beginning of another request has come with the last one: it
    /// has to be taken apart to see. Not while it has something else to lose.
    pub(super) fn may_have_more(&self) -> bool {
        let between = self.open.get() == 0 && !self.unfinished.get();
        between && self.may_have_more.get() && !self.behind.get()
    }

    /// The same, when that is the last moment to look.
    pub(super) fn is_to_be_looked_at(&self) -> bool {
        self.may_have_more() && self.link.is_leaving()
    }

    /// It was looked at, and this is what hyper had in hand. Empty lines begin no request
    /// (RFC 9112, section 2.2).
    pub(super) fn looked_at(&self, rest: &[u8]) {
        self.may_have_more.set(false);
        self.unfinished.set(rest.iter().any(|byte| !b"\r\n".contains(byte)));
    }

    /// hyper is done with the connection, whatever it has in hand.
    pub(super) fn finishes(&self) {
        self.may_have_more.set(false);
    }

    /// There is output, of which hyper may have more in hand.
    pub(super) fn writes(&self) {
        self.behind.set(true);
    }

    /// hyper has none in hand: it flushes what is below only then.
    pub(super) fn has_flushed(&self) {
        self.behind.set(false);
    }

    /// Some has come, or is waited for.
    pub(super) fn has_asked(&self, comes: bool) {
        self.asked.set(!comes);
        let left_over = self.left_over.take();
        if comes && !left_over && !self.http2.get() {
            self.unfinished.set(true);
        }
    }

    /// hyper has done what there is to do. The message for whose rest it does not ask is whole, or
    /// its handler does not want more of it now.
    pub(super) fn rests(&self) {
        let asked = self.asked.take();
        if !asked && self.open.get() > 0 && self.turn.replace(Turn::Handlers) != Turn::Handlers {
            self.so_far.set(self.link.set_busy());
        }
    }

    /// A request is at work.
    pub(super) fn begin(&self) {
        self.open.set(self.open.get() + 1);
        self.answered.set(false);
        self.may_have_more.set(!self.http2.get());
        self.whole();
    }

    /// Its head has come, and the body is still to, as far as is known.
    fn begin_with_body(&self) {
        self.open.set(self.open.get() + 1);
        self.answered.set(false);
        self.unfinished.set(true);
        self.has_body.set(true);
        self.may_have_more.set(false);
    }

    /// A message has come whole, or so much of it as anybody waits for.
    fn whole(&self) {
        self.unfinished.set(false);
        self.so_far.set(None);
        if self.turn.replace(Turn::Handlers) != Turn::Handlers {
            self.link.set_busy();
        }
    }

    /// Nothing is at work any more.
    pub(super) fn ends(&self) {
        self.open.set(0);
        self.unfinished.set(false);
        self.so_far.set(None);
        self.answered.set(false);
        self.left_over.set(self.has_body.take());
        self.turn.set(Turn::Nobodys);
        self.link.set_free();
    }

    /// Requests that have not been answered to the end.
    pub(super) fn open(&self) -> usize {
        self.open.get()
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

impl<S, B> Service<Request<Incoming>> for Watched<S>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    B: Body,
{
    type Response = Response<Outgoing<B>>;
    type Error = S::Error;
    type Future = Answering<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Answering<S::Future> {
        let (connects, heads) =
            (request.method() == Method::CONNECT, request.method() == Method::HEAD);
        if self.exchange.http2.get() || request.body().is_end_stream() {
            self.exchange.begin();
        } else {
            self.exchange.begin_with_body();
        }
        let at_work = AtWork(Rc::clone(&self.exchange));
        let future = self.service.call(request);
        Answering { future, at_work: Some(at_work), connects, heads }
    }
}

/// A request that is at work until this is dropped, and what was made of it.
struct AtWork(Rc<Exchange>);

impl Clone for AtWork {
    fn clone(&self) -> AtWork {
        self.0.open.set(self.0.open.get() + 1);
        AtWork(Rc::clone(&self.0))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.end();
    }
}

pin_project! {
    /// A request's future.
    pub(super) struct Answering<F> {
        #[pin]
        future: F,
        at_work: Option<AtWork>,
        connects: bool,
        heads: bool,
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
        if let Some(AtWork(exchange)) = this.at_work.as_ref()
            && !exchange.http2.get()
        {
            exchange.answered.set(true);
            exchange.writes();
            exchange.whole();
            let status = response.status();
            if status == StatusCode::SWITCHING_PROTOCOLS || (*this.connects && status.is_success())
            {
                exchange.switched.set(true);
            } else if exchange.link.is_leaving() {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
        }
        let at_work = this.at_work.take();
        // What hyper sees to in HTTP/1, it leaves to the service in HTTP/2.
        let http2 = at_work.as_ref().is_some_and(|at_work| at_work.0.http2.get());
        let bodiless = [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED];
        let mute = http2 && (*this.heads || bodiless.contains(&response.status()));
        Poll::Ready(Ok(response.map(|body| Outgoing { body, mute, at_work })))
    }
}

pin_project! {
    /// A response's body, until whose end its request is at work.
    pub(super) struct Outgoing<B> {
        #[pin]
        body: B,
        // The answer is one without a body, whatever the service has made.
        mute: bool,
        at_work: Option<AtWork>,
    }
}

impl<B: Body> Body for Outgoing<B> {
    type Data = Held<B::Data>;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Held<B::Data>>, B::Error>>> {
        let this = self.project();
        if *this.mute {
            return Poll::Ready(None);
        }
        let frame = ready!(this.body.poll_frame(cx));
        let held = |data| Held { data, _at_work: this.at_work.clone() };
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(held))))
    }

    fn is_end_stream(&self) -> bool {
        self.mute || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A piece of a body. hyper is done with the body as soon as it has the last piece, and may have to
/// wait for long until the peer takes it: until then the request is at work.
pub(super) struct Held<D> {
    data: D,
    _at_work: Option<AtWork>,
}

impl<D: Buf> Buf for Held<D> {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn chunks_vectored<'a>(&'a self, pieces: &mut [IoSlice<'a>]) -> usize {
        self.data.chunks_vectored(pieces)
    }

    fn advance(&mut self, count: usize) {
        self.data.advance(count);
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        self.data.copy_to_bytes(count)
    }
}
