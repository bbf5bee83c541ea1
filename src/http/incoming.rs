//! A request's body, watched to its end.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::conn::Link;
use crate::local;
use crate::table::Id;

/// The body of a request that is being received: hyper's
/// [`Incoming`](hyper::body::Incoming), with the same frames and errors.
///
/// The connection's deadline for a message runs until it has come whole or is dropped. It may be
/// sent to other threads; what becomes of it there, the connection's core hears of when the
/// response is there.
pub struct Incoming {
    body: hyper::body::Incoming,
    watch: Option<Watch>,
}

/// Tells the core that a body has come whole, once, and not after its request is over.
struct Watch {
    core: u64,
    id: Id,
    over: Arc<AtomicBool>,
}

/// Ends the watch of a request that is over.
pub(super) struct Watching(Arc<AtomicBool>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Incoming {
    /// One that nobody has to wait for.
    pub(super) fn new(body: hyper::body::Incoming) -> Incoming {
        Incoming { body, watch: None }
    }

    /// One that is watched until `Watching` is dropped.
    pub(super) fn watched(body: hyper::body::Incoming, link: &Link) -> (Incoming, Watching) {
        let over = Arc::new(AtomicBool::new(false));
        let watching = Watching(Arc::clone(&over));
        let watch = Watch { core: link.core.serial(), id: link.id, over };
        (Incoming { body, watch: Some(watch) }, watching)
    }

    fn came_whole(&mut self) {
        if let Some(Watch { core, id, over }) = self.watch.take()
            && !over.load(Ordering::Relaxed)
            && let Ok(cell) = local::current("receive a body")
            && cell.serial() == core
        {
            cell.borrow_mut().set_busy(id);
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let more = matches!(frame, Some(Ok(_))) && !self.body.is_end_stream();
        if !more {
            self.came_whole();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.came_whole();
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.body.fmt(f)
    }
}
