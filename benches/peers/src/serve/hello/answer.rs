//! What hyper serves, whatever it runs on.

use std::convert::Infallible;

use http_body_util::Full;
use hyper::{
    Request, Response,
    body::Bytes,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
};

use super::HELLO;

pub async fn hello<B>(_: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::new(Bytes::from_static(HELLO.as_bytes())));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// Pipelined replies leave together.
pub fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.pipeline_flush(true);
    builder
}
