//! Who may ask: requests that a browser sends on behalf of somebody else's page are told apart by
//! what the browser says of them.
//!
//! A page can have its own name resolve to this machine, and is then of the same origin in the
//! browser's eyes (DNS rebinding): so the name in the request has to be one that no page can have.
//! And a page can send a POST anywhere, though not read the answer (cross-site request forgery):
//! so a POST that a browser sends has to come from a page of ours.

use std::net::IpAddr;

use http::{HeaderMap, StatusCode, Uri, Version, header};

/// Why a request is not answered.
pub(super) type Refusal = (StatusCode, &'static str);

/// Checks by which name the listener was called.
pub(super) fn check_host(
    uri: &Uri,
    version: Version,
    headers: &HeaderMap,
    allowed: &[String],
) -> Result<(), Refusal> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err((StatusCode::BAD_REQUEST, "more than one Host\n"));
    }
    // One in the request's target goes before the header (RFC 9112, section 3.2.2).
    let authority = match (uri.authority(), host) {
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host.to_str().unwrap_or_default(),
        // No browser is that old.
        (None, None) if version == Version::HTTP_10 => return Ok(()),
        (None, None) => return Err((StatusCode::BAD_REQUEST, "no Host\n")),
    };
    let Some(host) = host_of(authority) else {
        return Err((StatusCode::BAD_REQUEST, "a Host that is none\n"));
    };
    if is_ours(host, allowed) {
        return Ok(());
    }
    Err((
        StatusCode::MISDIRECTED_REQUEST,
        "not a name of this listener: use an IP address or localhost, or allow the name with \
         Admin::allow_host\n",
    ))
}

/// The host without its port; `None` for what is none (RFC 3986, section 3.2.2).
fn host_of(authority: &str) -> Option<&str> {
    let end = match authority.starts_with('[') {
        true => authority.find(']')? + 1,
        false => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at(end);
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._[]:".contains(&byte);
    let has_port = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
    (has_port && !host.is_empty() && host.bytes().all(fits)).then_some(host)
}

fn is_ours(host: &str, allowed: &[String]) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let names = allowed.iter().map(String::as_str).chain(["localhost"]);
    bare.parse::<IpAddr>().is_ok() || names.into_iter().any(|name| host.eq_ignore_ascii_case(name))
}

/// Checks that a request that changes something does not come from another site's page.
///
/// Source: <https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Sec-Fetch-Site>; where
/// a browser is too old for that, its `Origin`. Programs send neither.
pub(super) fn check_origin(headers: &HeaderMap) -> Result<(), Refusal> {
    let refused = Err((StatusCode::FORBIDDEN, "a request from another site's page\n"));
    if let Some(site) = headers.get("sec-fetch-site") {
        let same = site == "same-origin" || site == "none";
        return if same { Ok(()) } else { refused };
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let origin = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    match (origin, host) {
        (Some(origin), Some(host)) if origin.eq_ignore_ascii_case(host) => Ok(()),
        _ => refused,
    }
}

/// Whether a page is wanted rather than JSON (RFC 9110, section 12.5.1).
pub(super) fn prefers_html(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT).iter();
    let accept: Vec<&str> = values.filter_map(|value| value.to_str().ok()).collect();
    let accept = accept.join(",");
    quality(&accept, "text", "html") > quality(&accept, "application", "json")
}

/// How much a type is wanted, in thousandths: by the range that fits best.
fn quality(accept: &str, main: &str, sub: &str) -> u32 {
    let mut best = (0, 0);
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let Some((a, b)) = parts.next().and_then(|range| range.split_once('/')) else { continue };
        let fits = |range: &str, it| range == "*" || range.eq_ignore_ascii_case(it);
        if !fits(a, main) || !fits(b, sub) {
            continue;
        }
        let precision = 1 + u32::from(a != "*") + u32::from(b != "*");
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f64>().ok());
        let weight = (weight.unwrap_or(1.0).clamp(0.0, 1.0) * 1000.0) as u32;
        if precision > best.0 {
            best = (precision, weight);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            let name = http::HeaderName::from_static(name);
            (name, HeaderValue::from_static(value))
        });
        let mut headers = HeaderMap::new();
        pairs.for_each(|(name, value)| {
            headers.append(name, value);
        });
        headers
    }

    fn host_status(host: &'static str) -> u16 {
        let headers = headers(&[("host", host)]);
        let allowed = ["box.internal".to_owned()];
        let checked = check_host(&Uri::from_static("/"), Version::HTTP_11, &headers, &allowed);
        checked.map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn only_names_that_no_page_can_have_are_ours() {
        let ours = ["127.0.0.1:9100", "10.0.0.7", "[::1]:9100", "localhost:1", "LocalHost"];
        for host in ours.into_iter().chain(["box.internal:9100", "BOX.internal"]) {
            assert_eq!(host_status(host), 200, "{host}");
        }
        let others = ["evil.example", "localhost.evil.example:9100", "127.0.0.1.evil.example"];
        for host in others.into_iter().chain(["other.internal", "2130706433", "0x7f.1"]) {
            assert_eq!(host_status(host), 421, "{host}");
        }
        let broken = ["127.0.0.1@evil.example", "evil@127.0.0.1", "", "a b", "[::1].evil", "[::1"];
        for host in broken.into_iter().chain(["localhost:80.evil", "localhost:8x", ":80"]) {
            assert_eq!(host_status(host), 400, "{host:?}");
        }
    }

    #[test]
    fn the_target_goes_before_the_header_and_only_old_clients_need_neither() {
        let check = |uri, version, headers: &HeaderMap| {
            check_host(&Uri::from_static(uri), version, headers, &[])
        };
        let ours = headers(&[("host", "localhost")]);
        assert!(check("http://evil.example/", Version::HTTP_11, &ours).is_err());
        let none = HeaderMap::new();
        assert!(check("/", Version::HTTP_10, &none).is_ok());
        assert!(check("/", Version::HTTP_11, &none).is_err());
        let two = headers(&[("host", "localhost"), ("host", "localhost")]);
        assert!(check("/", Version::HTTP_11, &two).is_err());
    }

    #[test]
    fn what_a_browser_sends_for_another_page_is_refused() {
        let ok = |pairs: &[(&'static str, &'static str)]| check_origin(&headers(pairs)).is_ok();
        assert!(ok(&[("host", "localhost")]), "a program");
        assert!(ok(&[("sec-fetch-site", "same-origin")]) && ok(&[("sec-fetch-site", "none")]));
        assert!(
            !ok(&[("sec-fetch-site", "cross-site")]) && !ok(&[("sec-fetch-site", "same-site")])
        );
        assert!(ok(&[("host", "localhost:9100"), ("origin", "http://localhost:9100")]));
        assert!(!ok(&[("host", "localhost:9100"), ("origin", "http://localhost:9101")]));
        assert!(!ok(&[("host", "localhost:9100"), ("origin", "null")]));
        assert!(!ok(&[("origin", "http://evil.example")]));
    }

    #[test]
    fn a_browser_gets_a_page_and_a_program_gets_json() {
        let html = |accept| prefers_html(&headers(&[("accept", accept)]));
        assert!(html("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"));
        assert!(html("application/json;q=0.5, text/*;q=0.6"));
        assert!(!html("*/*") && !html("application/json") && !html("text/html;q=0, */*"));
        assert!(!html("application/json, text/html") && !html("text/plain") && !html("nonsense"));
        assert!(!prefers_html(&HeaderMap::new()));
    }
}
