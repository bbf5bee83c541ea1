//! The pages that never change, and what goes around every answer.

use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, VARY,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, Response, StatusCode};

/// What an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Json,
    Metrics,
    Index,
    Connections,
}

impl Type {
    fn media(self) -> &'static str {
        match self {
            Type::Text => "text/plain; charset=utf-8",
            Type::Json => "application/json",
            Type::Metrics => "text/plain; version=0.0.4; charset=utf-8",
            Type::Index | Type::Connections => "text/html; charset=utf-8",
        }
    }

    /// What a page may do: run and look like what stands in it, and ask this listener.
    fn policy(self) -> &'static str {
        match self {
            Type::Text | Type::Json | Type::Metrics => "default-src 'none'",
            Type::Index => INDEX_POLICY,
            Type::Connections => CONNECTIONS_POLICY,
        }
    }
}

/// An answer, which nobody keeps, embeds or takes for something else.
pub(super) fn reply(status: StatusCode, kind: Type, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, kind.media()),
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, kind.policy()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (VARY, "accept"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

pub(super) const CONNECTIONS: &str = include_str!("connections.html");
pub(super) const INDEX: &str = include_str!("index.html");
pub(super) const INDEX_TEXT: &str = "\
GET  /connections  every connection, as JSON or a page (also .json and .html); ?limit=100
GET  /metrics      the counters, in Prometheus' text format
GET  /healthz      200, or 503 while a task keeps a core for ten seconds and longer
GET  /readyz       200 while connections are welcome, 503 as soon as a drain is ordered
POST /drain        begins a drain, where that is allowed; ?deadline_ms=5000
";

// The hashes are those of the pages' one `style` and one `script`; a test says what they have to be
// when a page has been changed.
const INDEX_POLICY: &str = "default-src 'none'; \
    style-src 'sha256-B9LZH30/Hh0DfLmuwLqXq6y5RIzjXDIbpg0qf2L7Zyg='; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const CONNECTIONS_POLICY: &str = "default-src 'none'; connect-src 'self'; \
    script-src 'sha256-LuD9aPzt/m4XZdzB9X43J7TP0xvYBUYdNwH+oaZYt7U='; \
    style-src 'sha256-LfPTKMxLBTsGwr9fnpLHW9lWNicCOvI9P11bxKoUQMA='; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
