//! What the admin listener answers.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use http::request::Parts;
use http::{Method, Request, Response, StatusCode, header};

use super::Rights;
use super::guard::{self, Refusal};
use super::pages::{self, Type, reply};
use crate::drain::Phase;
use crate::handle::Handle;
use crate::http::Incoming;
use crate::inspect::inspect;
use crate::json::JsonObject;
use crate::local;
use crate::prometheus::{Kind, Page};
use crate::stalls::Stall;
use crate::time::sleep;

/// Who answers, on the listener's one core.
pub(super) struct Desk {
    handle: Handle,
    rights: Rights,
    /// How many requests have been answered, by status code.
    answered: RefCell<BTreeMap<u16, u64>>,
    /// The connections are being listed for somebody.
    lists: Cell<bool>,
}

impl Desk {
    pub(super) fn new(handle: Handle, rights: Rights) -> Desk {
        let (answered, lists) = (RefCell::new(BTreeMap::new()), Cell::new(false));
        Desk { handle, rights, answered, lists }
    }

    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<String>, Infallible> {
        let (parts, _body) = request.into_parts();
        let refused = |(status, text): Refusal| reply(status, Type::Text, text.to_owned());
        let response = self.route(&parts).await.unwrap_or_else(refused);
        *self.answered.borrow_mut().entry(response.status().as_u16()).or_default() += 1;
        Ok(response)
    }

    async fn route(&self, parts: &Parts) -> Result<Response<String>, Refusal> {
        guard::check_host(&parts.uri, parts.version, &parts.headers, &self.rights.hosts)?;
        let path = parts.uri.path();
        let methods = match path {
            "/" | "/metrics" | "/healthz" | "/readyz" => READS,
            "/connections" | "/connections.html" | "/connections.json" => READS,
            "/drain" => "POST",
            _ => return Err((StatusCode::NOT_FOUND, "there is no such page; / lists all\n")),
        };
        let reads = [Method::GET, Method::HEAD].contains(&parts.method);
        if !(reads && methods == READS || parts.method == Method::POST && methods == "POST") {
            let text = format!("allowed here: {methods}\n");
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, Type::Text, text);
            let methods = header::HeaderValue::from_static(methods);
            response.headers_mut().insert(header::ALLOW, methods);
            return Ok(response);
        }
        let html = guard::prefers_html(&parts.headers);
        match path {
            "/" if html => Ok(reply(StatusCode::OK, Type::Index, pages::INDEX.to_owned())),
            "/" => Ok(reply(StatusCode::OK, Type::Text, pages::INDEX_TEXT.to_owned())),
            "/metrics" => Ok(reply(StatusCode::OK, Type::Metrics, self.metrics())),
            "/healthz" => Ok(self.health()),
            "/readyz" => Ok(self.readiness()),
            "/drain" => self.drain(parts),
            "/connections.json" => self.connections(parts.uri.query()).await,
            "/connections" if !html => self.connections(parts.uri.query()).await,
            _ => Ok(reply(StatusCode::OK, Type::Connections, pages::CONNECTIONS.to_owned())),
        }
    }

    /// The server's counters, and those of this listener.
    fn metrics(&self) -> String {
        let mut page = Page::default();
        if let Ok(core) = local::current("count the admin listener's connections") {
            let stats = core.borrow_mut().counters.snapshot();
            let name = "admin_connections";
            page.family(name, Kind::Gauge, "Connections of the admin listener.");
            page.sample(name, &[], stats.live);
            let name = "admin_connections_accepted_total";
            page.family(name, Kind::Counter, "Connections that the admin listener has accepted.");
            page.sample(name, &[], stats.accepted);
        }
        let name = "admin_requests_total";
        page.family(name, Kind::Counter, "Requests that the admin listener has answered before.");
        let answered = self.answered.borrow();
        page.sample(name, &[("code", &200)], answered.get(&200).copied().unwrap_or(0));
        for (code, count) in answered.iter().filter(|(code, _)| **code != 200) {
            page.sample(name, &[("code", code)], *count);
        }
        self.handle.stats().to_prometheus() + &page.into_text()
    }

    /// Whether each core turns.
    fn health(&self) -> Response<String> {
        let stalls = self.handle.stalls();
        let limit = self.rights.unhealthy_after;
        let stuck = |stall: &&Stall| stall.ongoing && stall.lasted >= limit;
        match stalls.iter().find(stuck) {
            None => reply(StatusCode::OK, Type::Text, "ok\n".to_owned()),
            Some(stall) => reply(StatusCode::SERVICE_UNAVAILABLE, Type::Text, format!("{stall}\n")),
        }
    }

    /// Whether to send connections here.
    fn readiness(&self) -> Response<String> {
        if !self.handle.control().is_listening() {
            return reply(StatusCode::SERVICE_UNAVAILABLE, Type::Text, "starting\n".to_owned());
        }
        match self.handle.is_ready() {
            true => reply(StatusCode::OK, Type::Text, "ready\n".to_owned()),
            false => {
                let text = format!("draining: {}\n", self.handle.phase().as_str());
                reply(StatusCode::SERVICE_UNAVAILABLE, Type::Text, text)
            }
        }
    }

    fn drain(&self, parts: &Parts) -> Result<Response<String>, Refusal> {
        if !self.rights.drain {
            return Err((StatusCode::FORBIDDEN, "a drain takes Admin::allow_drain\n"));
        }
        guard::check_origin(&parts.headers)?;
        let asked = parameter(parts.uri.query(), "deadline_ms", 0..=DRAIN_MS_MAX)?;
        let deadline = asked.map_or(self.handle.drain_default(), Duration::from_millis);
        self.handle.begin_drain(deadline);
        let control = self.handle.control();
        let left = Duration::from_nanos(control.deadline_ns()).saturating_sub(control.elapsed());
        let json = JsonObject::new()
            .string("phase", self.handle.phase().as_str())
            .number("deadline_in_ms", left.as_millis() as u64)
            .finish();
        Ok(reply(StatusCode::ACCEPTED, Type::Json, json))
    }

    /// The inspector's list, those first that have been without progress for longest.
    async fn connections(&self, query: Option<&str>) -> Result<Response<String>, Refusal> {
        let limit = parameter(query, "limit", 1..=LIST_MAX)?.unwrap_or(LIST_DEFAULT);
        let _turn = self.turn_to_list().await?;
        let found = inspect(self.handle.control()).await;
        let (total, phase) = (found.len(), self.handle.phase());
        let found = found.by_progress().first(limit as usize);
        let json = JsonObject::new()
            .number("total", total as u64)
            .bool("ready", phase == Phase::Running)
            .string("phase", phase.as_str());
        Ok(reply(StatusCode::OK, Type::Json, found.write_to(json).finish()))
    }

    /// Waits until nobody else lists: a list takes memory for all connections that there are.
    async fn turn_to_list(&self) -> Result<ListTurn<'_>, Refusal> {
        for _ in 0..TRIES {
            if !self.lists.replace(true) {
                return Ok(ListTurn(&self.lists));
            }
            sleep(TRY_AGAIN).await;
        }
        Err((StatusCode::SERVICE_UNAVAILABLE, "others list the connections; try again\n"))
    }
}

struct ListTurn<'a>(&'a Cell<bool>);

impl Drop for ListTurn<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// Reads the only parameter that a page has.
fn parameter(
    query: Option<&str>,
    name: &'static str,
    bounds: std::ops::RangeInclusive<u64>,
) -> Result<Option<u64>, Refusal> {
    let text = match query.unwrap_or_default().split_once('=') {
        None if query.unwrap_or_default().is_empty() => return Ok(None),
        Some((key, text)) if key == name => text,
        _ => return Err((StatusCode::BAD_REQUEST, UNKNOWN_PARAMETER)),
    };
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let value = text.parse().ok().filter(|value| digits && bounds.contains(value));
    value.map(Some).ok_or((StatusCode::BAD_REQUEST, BAD_PARAMETER))
}

const READS: &str = "GET, HEAD";
const UNKNOWN_PARAMETER: &str =
    "unknown parameter: /drain takes deadline_ms, /connections takes limit\n";
const BAD_PARAMETER: &str =
    "bad value: deadline_ms is from 0 to 3600000, limit is from 1 to 20000\n";
const DRAIN_MS_MAX: u64 = 3_600_000;
/// More than a person looks at.
const LIST_DEFAULT: u64 = 1_000;
/// Some 10 MB; it takes a tenth of a second, during which nobody else is answered.
const LIST_MAX: u64 = 20_000;
const TRIES: usize = 100;
const TRY_AGAIN: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_known_and_in_bounds_or_refused() {
        let read = |query| parameter(query, "limit", 1..=20).map_err(|(status, _)| status);
        assert_eq!(read(None), Ok(None));
        assert_eq!(read(Some("")), Ok(None));
        assert_eq!(read(Some("limit=20")), Ok(Some(20)));
        for query in ["limit=21", "limit=0", "limit=", "limit=+1", "limit=1&limit=2", "limit"] {
            assert_eq!(read(Some(query)), Err(StatusCode::BAD_REQUEST), "{query}");
        }
        for query in ["Limit=1", "deadline_ms=1", "=", "&", "limit=99999999999999999999"] {
            assert_eq!(read(Some(query)), Err(StatusCode::BAD_REQUEST), "{query}");
        }
    }
}
